"""The claims ledger: what the paper claims, the rule that each claim is judged by, and computed verdicts.

An analysis names :class:`ClaimTest`s, each a rule over columns of its rows. :func:`judge` applies every rule in every
scope (setting and training stage) that has rows. Nothing here knows a result: verdicts follow from rows and rules.

The statistics: docs/theory.md, section 10.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, ttest_1samp

from mdm_interp.files import UserError, write_text
from mdm_interp.presets import scope_label
from mdm_interp.results import Result, tidy
from mdm_interp.stats import Estimate, bootstrap_mean, where

CLAIMS = {
    "1": "Any-order masking alone does not explain the mitigation of the reversal curse.",
    "2": "Shared parameters store token-pair evidence on the value side, independent of position.",
    "3": "Relative position encodings route attention through queries and keys and leave that evidence alone.",
    "4": "Forward masked training strengthens evidence that a reverse query can reuse.",
    "5": "Forward and reverse attention routes are correlated.",
    "6": "The shared-storage gradient is positively aligned and lowers the reverse loss to first order.",
    "7": "These signatures go with better reverse prediction.",
}
"""The claims of arXiv 2602.02133 as its abstract makes them."""

ALPHA = 0.05
"""False discovery rate over all verdicts of a ledger."""

Outcome = Literal["holds", "fails", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class ClaimTest:
    """A rule, stated before anything is measured, that turns an effect and its null into a verdict.

    `above`: the claim holds where the effect exceeds the null by more than `margin`. `below`: where the effect is less
    than `margin`, whatever the null, which then only shows what a false claim would look like.
    """

    claim: str
    """Key of :data:`CLAIMS`."""
    measure: str
    """What the effect is, with its unit."""
    null_is: str
    """What the null is."""
    effect: str
    """Column of the rows."""
    null: str
    """Column of the rows."""
    side: Literal["above", "below"]
    margin: float
    rows: Callable[[Result], pd.DataFrame] = lambda result: result.frame
    """The rows that it reads, one per run and stage; default: all of the result."""

    @property
    def rule(self) -> str:
        """The rule in words."""
        bar = f"exceeds the null by {self.margin:g}" if self.side == "above" else f"stays below {self.margin:g}"
        return (
            f"holds where the effect {bar} (two-sided t-test over seeds, Benjamini-Hochberg at {ALPHA:g} over the "
            "ledger), fails where it significantly does not, inconclusive otherwise"
        )

    def excess(self, rows: pd.DataFrame) -> np.ndarray:
        """By how much each row clears the bar; positive speaks for the claim."""
        effect = rows[self.effect].to_numpy(dtype=float)
        if self.side == "below":
            return self.margin - effect
        return effect - rows[self.null].to_numpy(dtype=float) - self.margin


@dataclass(frozen=True)
class Verdict:
    """One line of the ledger."""

    claim: dict[str, str]
    """id and sentence."""
    scope: dict[str, Any]
    """World, scheme, objective, layers, MLP and training stage."""
    measure: str
    effect: Estimate
    null: Estimate
    null_is: str
    p: float
    """That a true excess of 0 would look like this, either way; adjusted for the number of verdicts."""
    verdict: Outcome
    rule: str
    figure: str
    """The analysis whose rows it was computed from."""


def p_value(excess: np.ndarray) -> float:
    """Two-sided one-sample t-test of a mean of 0; 1 for fewer than two observations, 0 where all agree on one that is
    not 0."""
    if len(excess) < 2:
        return 1.0
    if np.ptp(excess) <= 1e-12 * max(1.0, float(np.abs(excess).max())):
        return float(excess.mean() == 0)
    tested: Any = ttest_1samp(excess, 0.0)
    return float(tested.pvalue)


def judge(tested: Sequence[tuple[Result, Sequence[ClaimTest]]], scope: Sequence[str]) -> list[Verdict]:
    """The ledger: every test of every result in every scope that it has rows of, one observation per seed.

    Args:
        scope: The columns that tell scopes apart. Rows whose effect is undefined (NaN) are left out.

    Raises:
        UserError: a test names an unknown claim or a column that the rows lack.
    """
    lines, excesses = [], []
    for result, tests in tested:
        for test in tests:
            frame = test.rows(result)
            _check(test, result.name, frame, scope)
            defined = frame.dropna(subset=[test.effect])
            for where_measured in defined[list(scope)].drop_duplicates().to_dict("records"):
                rows = where(pd.DataFrame(defined), **{str(name): value for name, value in where_measured.items()})
                per_seed = rows.groupby("seed")[[test.effect, test.null]].mean()
                excess = test.excess(per_seed)
                excess = excess[~np.isnan(excess)]
                excesses.append(excess)
                lines.append((test, where_measured, per_seed, result.name))
    if not lines:
        return []
    adjusted = false_discovery_control([p_value(excess) for excess in excesses])
    return [
        Verdict(
            claim={"id": test.claim, "sentence": CLAIMS[test.claim]},
            scope=scope_values,
            measure=test.measure,
            effect=bootstrap_mean(per_seed[test.effect]),
            null=bootstrap_mean(per_seed[test.null]),
            null_is=test.null_is,
            p=float(p),
            verdict="inconclusive" if p >= ALPHA else "holds" if excess.mean() > 0 else "fails",
            rule=test.rule,
            figure=figure,
        )
        for (test, scope_values, per_seed, figure), excess, p in zip(lines, excesses, adjusted, strict=True)
    ]


def _check(test: ClaimTest, figure: str, frame: pd.DataFrame, scope: Sequence[str]) -> None:
    if test.claim not in CLAIMS:
        raise UserError(f"claim: {test.claim!r} in analysis {figure!r} is not one of {', '.join(CLAIMS)}; correct it")
    missing = [column for column in (*scope, "seed", test.effect, test.null) if column not in frame.columns]
    if missing:
        raise UserError(
            f"rows: analysis {figure!r} lacks column {missing[0]!r}, which claim {test.claim} reads; add it"
        )


def save_ledger(verdicts: Sequence[Verdict], path: str | Path) -> None:
    """Write a ledger as a JSON list, one verdict per line, atomically."""
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in tidy([asdict(verdict) for verdict in verdicts]))
    write_text(path, f"[\n{lines}\n]\n")


OUTCOMES: tuple[Outcome, ...] = ("holds", "fails", "inconclusive")


def counts(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """How many scopes of each claim hold, fail and stay open: index claim id, columns the three outcomes."""
    table = pd.DataFrame(
        [{"claim": verdict.claim["id"], "verdict": verdict.verdict} for verdict in verdicts],
        columns=["claim", "verdict"],
    )
    return pd.crosstab(table["claim"], table["verdict"]).reindex(columns=list(OUTCOMES), fill_value=0)


def findings(verdicts: Sequence[Verdict]) -> str:
    """The ledger as a Markdown table: per claim and measure, in how many settings it holds, fails or stays open at each
    stage of training, and in which it fails at the last one."""
    stages = list(dict.fromkeys(str(verdict.scope["stage"]) for verdict in verdicts))
    lines = ["| claim | measured by | " + " | ".join(stages) + " | where it fails at the last of these |"]
    lines.append("|" + "---|" * (len(stages) + 3))
    for (claim, measure), group in itertools.groupby(
        verdicts, key=lambda verdict: (verdict.claim["id"], verdict.measure)
    ):
        rows = list(group)
        last = max((str(verdict.scope["stage"]) for verdict in rows), key=stages.index)
        cells = []
        for stage in stages:
            at = [verdict.verdict for verdict in rows if verdict.scope["stage"] == stage]
            cells.append(", ".join(f"{outcome} {at.count(outcome)}" for outcome in OUTCOMES if outcome in at) or "-")
        failed = [
            scope_label({name: value for name, value in verdict.scope.items() if name != "stage"})
            for verdict in rows
            if verdict.verdict == "fails" and verdict.scope["stage"] == last
        ]
        lines.append(
            f"| {claim}. {CLAIMS[claim]} | {measure} | {' | '.join(cells)} | {'; '.join(failed) or 'nowhere'} |"
        )
    return "\n".join(lines) + "\n"


MARKS = ("<!-- findings: written by `mdm-interp verify --readme` -->\n", "<!-- end of findings -->\n")


def write_findings(verdicts: Sequence[Verdict], path: str | Path) -> None:
    """Put the table of findings between the marks of a Markdown file, atomically.

    Raises:
        UserError: the file is missing or has no marks.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        before, rest = text.split(MARKS[0])
        _, after = rest.split(MARKS[1])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no place for the findings ({error}); add the lines {MARKS[0]!r}, {MARKS[1]!r}"
        ) from error
    write_text(path, before + MARKS[0] + "\n" + findings(verdicts) + "\n" + MARKS[1] + after)
