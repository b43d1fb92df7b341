"""The claims ledger on a terminal: one screen of it, the lines that are asked for, or a table.

print(summary(verdicts, sentences(results)))                   # what was found, and a row for each claim
print(listing(select(verdicts, claim=["6"], stage=["end"])))   # each line with its effect, null and verdict
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict

import pandas as pd

from mdm_interp.errors import UserError, nearest
from mdm_interp.experiments.claims import OUTCOMES, TITLES, Verdict, counts
from mdm_interp.experiments.findings import SIGNS, by_setting
from mdm_interp.experiments.results import tidy
from mdm_interp.experiments.scope import shown_label
from mdm_interp.viz.theme import shown

WIDTH = 80
"""Of a line, in characters."""
MARKS = {"🟢": "+", "🔴": "-", "🟡": "?", "⚪": "="}
"""What tables of findings mark, in characters that every terminal has."""
SETTINGS = {name: name for name in ("RoPE", "ALiBi", "NoPE", "T5", "4 heads", "deep", "ARM")} | {
    "learned": "learn.",
    "sinusoidal": "sinus.",
}
"""The settings of a summary, by their names in `findings.NAMED_SETTINGS`, and what they are called there."""


def select(verdicts: Sequence[Verdict], **asked: Collection[str] | None) -> list[Verdict]:
    """Return the lines of a ledger that have one of the values asked for, in each of the fields that are asked for.

    Args:
        asked: Values of `claim`, `scheme` (as configs or as figures name it), `stage` and `verdict`; None for all.

    Raises:
        UserError: the ledger has no line with a value.
    """
    kept = list(verdicts)
    for field, values in asked.items():
        if values is None:
            continue
        there = dict.fromkeys(_value(verdict, field) for verdict in verdicts)
        known = {name.lower(): value for value in there for name in (value, shown(value))}
        if unknown := sorted(value for value in values if value.lower() not in known):
            raise UserError(f"--{field}: the ledger has no {unknown[0]!r}; there are {nearest(unknown[0], there)}")
        wanted = {known[value.lower()] for value in values}
        kept = [verdict for verdict in kept if _value(verdict, field) in wanted]
    return kept


def _value(verdict: Verdict, field: str) -> str:
    if field == "claim":
        return verdict.claim["id"]
    return verdict.verdict if field == "verdict" else str(verdict.scope[field])


def summary(verdicts: Sequence[Verdict], found: Sequence[str]) -> str:
    """Say on one screen what was found (:func:`~mdm_interp.experiments.findings.sentences`), and what becomes of each
    claim in each of :data:`SETTINGS`."""
    total = counts(verdicts).sum()
    told = [f"{total[outcome]} {outcome}" for outcome in OUTCOMES]
    rest = [f"{n} {role}" for role, n in total.drop(list(OUTCOMES)).items() if n]
    table = by_setting(verdicts)[list(SETTINGS)].rename(columns=SETTINGS)
    for long, short in {**MARKS, r" ?([-+?=])": r"\1", r"^\d+=$": "="}.items():
        table = table.replace(long, short, regex=True)
    columns = [max(len(name), *(len(cell) for cell in table[name])) + 1 for name in table.columns]
    left = WIDTH - sum(columns)

    def row(words: str, cells: Iterable[str]) -> str:
        return f"{words:<{left}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, columns, strict=True))

    lines = [*textwrap.wrap(" ".join(found), WIDTH), "", row("Measures per claim", table.columns)]
    lines += [row(f"{id} {TITLES[id]}", cells) for id, cells in zip(table.index, table.to_numpy(), strict=True)]
    lines += textwrap.wrap(
        "At the last stage they support (+), contradict (-) or leave open (?) the paper; =: true or false by "
        f"construction. {len(verdicts)} lines in all: {', '.join(told)}; apart: {', '.join(rest) or 'none'}. --claim, "
        "--scheme, --stage and --verdict show lines, --csv and --json all of them.",
        WIDTH,
    )
    return "\n".join(lines)


def listing(verdicts: Sequence[Verdict]) -> str:
    """List lines of a ledger: under each claim and measure its rule, and for each setting effect, null and verdict."""
    lines: list[str] = []
    for _, group in itertools.groupby(verdicts, key=lambda one: (one.claim["id"], one.measure)):
        of_measure = list(group)
        first = of_measure[0]
        heading = f"{first.claim['id']}  {first.claim['sentence']} Measured: {first.measure}. Null: {first.null_is}."
        lines += [*([""] if lines else []), *textwrap.wrap(heading, WIDTH)]
        lines += textwrap.wrap(f"It {first.rule}.", WIDTH, initial_indent="   ", subsequent_indent="   ")
        for one in of_measure:
            sign = MARKS[SIGNS[one.reading]] if one.reading in SIGNS else "?" if one.role == "test" else " "
            p = "" if pd.isna(one.p) else f", p {one.p:.2g}"
            role = "" if one.role == "test" else f" ({one.role})"
            said = f"{one.verdict}{role}: {one.effect}, null {one.null}{p}; {one.figure}"
            lines += textwrap.wrap(shown_label(one.scope), WIDTH, initial_indent=f" {sign} ", subsequent_indent="     ")
            lines += textwrap.wrap(said, WIDTH, initial_indent="     ", subsequent_indent="     ")
    return "\n".join(lines)


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return the ledger as a table, a row per line; what is nested has dotted names, as `effect.low`."""
    return pd.json_normalize(tidy([asdict(verdict) for verdict in verdicts]))
