"""Code: the Python that makes a page, for a reader to copy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.training.runs import Run

NAMES = ("Query", "QueryPair", "Run", "load_checkpoint", "viz")
"""What such code may import from the package."""


def call(function: str, *given: str, **options: Any) -> str:
    """Write a call: of `given` the code, of options the values, without those that are None."""
    said = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return f"{function}({', '.join([*given, *(f'{name}={said[name]!r}' for name in said if said[name] is not None)])})"


def saving(page: str, *before: str) -> str:
    """Write code that saves a page, with the imports that it needs.

    Args:
        page: The call that makes it.
        before: Lines that the call needs.
    """
    body = "\n".join([*before, f'{page}.save("page.html")'])
    used = [name for name in NAMES if re.search(rf"\b{name}[.(]", body)]
    return f"from mdm_interp import {', '.join(used)}\n\n{body}"


def left_open(*what: str) -> str:
    """Write a comment on what cannot be written down."""
    made = "it" if len(what) == 1 else "them"
    return f"# {' and '.join(what)} came from elsewhere: make {made} before you run this."


def prompt_code(prompt: Any, tokens: Sequence[int]) -> str:
    """Write a prompt as it was given, a tensor as its tokens."""
    return repr(prompt if isinstance(prompt, (str, Query)) else list(tokens))


def first_pairs(given: Any, variable: str, pairs: Sequence[QueryPair]) -> str:
    """Write query pairs: as the first of the run called `variable` where they are, or one by one."""
    if list(pairs) == _own_pairs(given)[: len(pairs)]:
        return f"{_OWN.format(variable)}[:{len(pairs)}]"
    return _lines(map(repr, pairs))


def one_pair(given: Any, variable: str, pair: QueryPair) -> str:
    """Write a query pair: as one of the run called `variable` where it is, or in full."""
    own = _own_pairs(given)
    return f"{_OWN.format(variable)}[{own.index(pair)}]" if pair in own else repr(pair)


_OWN = "{}.query_pairs(n_contexts=1)"


def _own_pairs(given: Any) -> list[QueryPair]:
    return given.query_pairs(n_contexts=1) if isinstance(given, Run) else []


def _lines(items: Iterable[str]) -> str:
    return "".join(["[\n", *(f"    {item},\n" for item in items), "]"])
