"""Words of figures: who is meant, what was found of each, and of how many; no more than intervals allow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from mdm_interp.stats.estimates import Estimate
from mdm_interp.viz.theme import shown

ANSWER = {"above": "yes", "below": "no", "undecided": "undecided"}
"""What the side of 0 on which an interval is says to a question."""
Side = Literal["above", "below", "undecided"]


def side_of(effect: Estimate, null: Estimate | None) -> Side:
    """Say on which side of its null an effect is; undecided where their intervals overlap or one has none."""
    if null is None:
        return "undecided"
    return "above" if effect.low > null.high else "below" if effect.high < null.low else "undecided"


def told(answers: Mapping[str, str]) -> str:
    """Say what the answer is for whom, MDMs first: `yes for every MDM, no for the ARM`."""
    mdms, found = [name for name in answers if name.startswith("MDM ")], []
    for answer in ANSWER.values():
        names = [name for name in answers if answers[name] == answer]
        if len(mdms) > 1 and names[: len(mdms)] == mdms:
            names[: len(mdms)] = ["every MDM"]
        found += [f"{answer} for {listed(names)}"] if names else []
    return ", ".join(found)


def listed(names: Sequence[str]) -> str:
    """List labels as figures call them: `MDM RoPE, ALiBi and the ARM`."""
    named = ["the ARM" if name == "ARM rope" else shown(name) for name in names]
    for i in reversed(range(1, len(named))):
        if named[i - 1].startswith("MDM "):
            named[i] = named[i].removeprefix("MDM ")
    return joined(named)


def joined(names: Sequence[str]) -> str:
    """Join names, as `RoPE, ALiBi and NoPE`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def number(value: int | float, form: str = ".2f") -> str:
    """Write a number, without a minus before what is rounded to zero."""
    return re.sub(r"^-(?=[0.]+%?$)", "", format(value, form))


def between(values: Iterable[Any], form: str = ".2f") -> str:
    """Say between which numbers some are: `0.70 to 0.86`, or one number if all are written alike."""
    known = [value for value in values if value == value]  # NaN is not
    return " to ".join(dict.fromkeys(number(end, form) for end in (min(known), max(known)))) if known else "?"


def span(estimates: Iterable[Estimate | None], form: str = ".2f") -> str:
    """Say between which values estimates lie; nothing where there are none."""
    values = [one.value for one in estimates if one is not None and one.n]
    return between(values, form) if values else ""


def counted(n: int, noun: str) -> str:
    """Say how many there are, as in `1 layer` or `4 heads`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def heads_in_layers(n_layers: int, n_heads: int) -> str:
    """Say how large a model is, as `1 layer of 4 heads`."""
    return f"{counted(n_layers, 'layer')} of {counted(n_heads, 'head')}"


def counted_of(count: int, total: int, noun: str) -> str:
    """Say how many of so many, as `all 6 cases`, `4 of 6 cases` or `none of 6 cases`."""
    how_many = "all" if count == total else f"{count or 'none'} of"
    return f"{how_many} {total} {noun}"


def sample_size(estimates: Iterable[Estimate], unit: str = "seeds") -> str:
    """Say how many observations are behind estimates, as `n = 5 to 10 seeds`."""
    told = between([one.n for one in estimates if one.n] or [0], ".0f")
    return f"n = {told} {unit.removesuffix('s') if told == '1' else unit}"


def with_n(label: str, rows: pd.DataFrame, by: str | None = None) -> str:
    """Return a panel's title: a label, and how many seeds its rows are of, at every value of a column."""
    counts = [rows["seed"].nunique()] if by is None else rows.groupby(by)["seed"].nunique()
    return f"{shown(label)} (n = {between(counts, '.0f')})"


def opening(text: str) -> str:
    """Return words as a sentence begins with them."""
    return text[:1].upper() + text[1:]
