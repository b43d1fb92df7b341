"""Sentences of figures: who is meant, what was found of each, and of how many seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from mdm_interp.stats.estimates import Estimate
from mdm_interp.viz.theme import shown

ANSWER = {"above": "yes", "below": "no", "undecided": "undecided"}
"""What the side of 0 on which an interval is says to a question."""


def listed(names: Sequence[str]) -> str:
    """List labels as figures call them: `MDM RoPE, ALiBi and the ARM`."""
    named = ["the ARM" if name == "ARM rope" else shown(name) for name in names]
    for i in reversed(range(1, len(named))):
        if named[i - 1].startswith("MDM "):
            named[i] = named[i].removeprefix("MDM ")
    return " and ".join(filter(None, (", ".join(named[:-1]), *named[-1:])))


def told(answers: Mapping[str, str]) -> str:
    """Say what the answer is for whom, MDMs first: `yes for every MDM, no for the ARM`."""
    mdms, found = [name for name in answers if name.startswith("MDM ")], []
    for answer in ANSWER.values():
        names = [name for name in answers if answers[name] == answer]
        if len(mdms) > 1 and names[: len(mdms)] == mdms:
            names[: len(mdms)] = ["every MDM"]
        found += [f"{answer} for {listed(names)}"] if names else []
    return ", ".join(found)


def between(values: Iterable[Any], rounding: str = ".2f") -> str:
    """Say between which numbers some are: `0.70 to 0.86`, or one number if all are written alike."""
    known = [value for value in values if value == value]  # NaN is not
    if not known:
        return "?"
    ends = [format(end, rounding) for end in (min(known), max(known))]
    return " to ".join(dict.fromkeys(end if float(end) else end.removeprefix("-") for end in ends))


def of_seeds(estimates: Iterable[Estimate]) -> str:
    """Say of how many seeds estimates are: `n = 5 to 10 seeds`."""
    counts = between([estimate.n for estimate in estimates if estimate.n], ".0f")
    return f"n = {counts} seed{'' if counts == '1' else 's'}"


def with_n(label: str, rows: pd.DataFrame, by: str | None = None) -> str:
    """Return a panel's title: a label, and how many seeds its rows are of, at every value of a column."""
    counts = [rows["seed"].nunique()] if by is None else rows.groupby(by)["seed"].nunique()
    return f"{shown(label)} (n = {between(counts, '.0f')})"


def opening(text: str) -> str:
    """Return words as a sentence begins with them."""
    return text[:1].upper() + text[1:]
