"""Words for takeaways, which say no more than intervals allow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from mdm_interp.stats.estimates import Estimate

Side = Literal["above", "below", "undecided"]


def side_of(effect: Estimate, null: Estimate | None) -> Side:
    """Say on which side of its null an effect is; undecided where their intervals overlap or one has none."""
    if null is None:
        return "undecided"
    return "above" if effect.low > null.high else "below" if effect.high < null.low else "undecided"


def span(estimates: Iterable[Estimate | None], form: str = ".2f") -> str:
    """Say between which values estimates lie, as `0.21` or `0.21 to 0.34`; nothing where there are none."""
    values = [one.value for one in estimates if one is not None and one.n]
    return " to ".join(dict.fromkeys(number(end, form) for end in (min(values), max(values)))) if values else ""


def number(value: float, form: str = ".2f") -> str:
    """Write a number, without a minus before what is rounded to zero."""
    return re.sub(r"^-(?=[0.]+%?$)", "", format(value, form))


def sample_size(estimates: Iterable[Estimate], unit: str = "seeds") -> str:
    """Say how many observations are behind estimates, as `n = 5 to 10 seeds`."""
    sizes = [one.n for one in estimates if one.n]
    told = " to ".join(dict.fromkeys(map(str, (min(sizes), max(sizes))))) if sizes else "0"
    return f"n = {told} {unit[:-1] if told == '1' and unit.endswith('s') else unit}"


def counted_of(count: int, total: int, noun: str) -> str:
    """Say how many of so many, as `all 6 cases`, `4 of 6 cases` or `none of 6 cases`."""
    how_many = "all" if count == total else f"{count or 'none'} of"
    return f"{how_many} {total} {noun}"


def listed(names: Sequence[str]) -> str:
    """Join names, as `RoPE, ALiBi and NoPE`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
