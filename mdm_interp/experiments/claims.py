"""The claims ledger: what the paper claims, the rule that each claim is judged by, and computed verdicts.

An analysis names its tests, each a rule over columns of its rows: a :class:`ClaimTest` judges seeds within a setting, a
:class:`LinkTest` judges settings against each other. :func:`judge` applies every rule wherever it has rows. Nothing
here knows a result: verdicts follow from rows and rules.

The statistics: docs/theory.md, section 10.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, rankdata, ttest_1samp

from mdm_interp.errors import UserError
from mdm_interp.experiments.results import Result, rows_expected, tidy
from mdm_interp.experiments.scope import SCOPE
from mdm_interp.files import write_text
from mdm_interp.stats.correlations import correlation_estimate, rank_correlation
from mdm_interp.stats.estimates import Contrast, Estimate, mean_estimate

CLAIMS = {
    "0": "A masked diffusion model answers reverse queries that an autoregressive model of the same facts does not.",
    "1": "Any-order masking alone does not explain the mitigation of the reversal curse.",
    "2": "Shared parameters store token-pair evidence on the value side, independent of position.",
    "3": "Relative position encodings route attention through queries and keys and leave that evidence alone.",
    "4": "Forward masked training strengthens evidence that a reverse query can reuse.",
    "5": "Forward and reverse attention routes are correlated.",
    "6": "The shared-storage gradient is positively aligned and lowers the reverse loss to first order.",
    "7": "These signatures go with better reverse prediction.",
    "8": "Causal attention fails in reverse whatever the objective; bidirectional attention mitigates in part if "
    "trained from left to right, and most if trained in any order.",
    "9": "Attention to the source rises and then falls to a plateau during training, forward and in reverse.",
}
"""The claims of arXiv 2602.02133 as its abstract makes them, after the premise that all of them explain; from 8 on,
what its authors report elsewhere."""
TITLES = {
    "0": "MDMs answer reverse",
    "1": "masking not enough",
    "2": "storage, no position",
    "3": "positions only route",
    "4": "evidence is reused",
    "5": "routes correlate",
    "6": "gradients align",
    "7": "signatures predict",
    "8": "attention decides",
    "9": "attention peaks",
}
"""The same in a few words."""

ALPHA = 0.05
"""False discovery rate over the verdicts that could come out either way."""

Outcome = Literal["holds", "fails", "inconclusive"]
OUTCOMES: tuple[Outcome, ...] = ("holds", "fails", "inconclusive")

Role = Literal["test", "identity", "arm", "untrained"]
ROLES: dict[Role, str] = {
    "test": "could come out either way",
    "identity": "true or false by construction",
    "arm": "control: an ARM, of which the paper says that the claim is false",
    "untrained": "control: before training",
}
"""What a line of the ledger can say. Only `test` counts for or against the paper."""

READINGS: dict[tuple[Role, Outcome], str] = {
    ("test", "holds"): "supports the paper",
    ("test", "fails"): "contradicts the paper",
    ("arm", "fails"): "confirms the paper",
    ("arm", "holds"): "contradicts the paper",
}
"""What a verdict says of the paper; nothing elsewhere."""


@dataclass(frozen=True)
class Line:
    """What a test finds in one scope, before it is adjusted for all the others."""

    scope: dict[str, Any]
    """Setting and training stage."""
    role: Role
    found: Contrast[Estimate]
    p: float
    """That the data would lean this way if the claim were on the edge; NaN for fewer than two observations."""
    leans: Outcome


def role_of(scope: Mapping[str, Any], identity: bool = False, of_arms: bool = False) -> Role:
    """Say what a scope can say of a claim.

    Args:
        identity: Whether the claim is true or false there by construction.
        of_arms: Whether the claim is about ARMs, too.
    """
    if identity:
        return "identity"
    if scope["stage"] == "initial":
        return "untrained"
    return "arm" if scope["objective"] == "causal" and not of_arms else "test"


@dataclass(frozen=True, kw_only=True)
class ClaimTest:
    """A rule, stated in advance, that turns an effect and its null in one setting into a verdict, one observation per
    value of the column `seed`.

    `above`: the claim holds where the effect exceeds `margin` both by itself and over its null; it fails where the
    effect is below `margin` or below its null. `below`: it holds where the effect is less than `margin` and fails where
    it is more, whatever the null, which then only shows what a false claim would look like.
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
    unit: str = "seeds"
    """What the column `seed` counts."""
    identity: Callable[[Mapping[str, Any]], bool] = lambda scope: False
    """Whether the claim is true or false by construction in a scope; default: nowhere."""
    of_arms: bool = False
    """Whether the claim is about ARMs, too, so that they are no control."""

    @property
    def rule(self) -> str:
        """The rule in words."""
        if self.side == "above":
            bar = f"exceeds {self.margin:g} and its null by {self.margin:g}"
            fails = f"is below {self.margin:g} or below its null"
        else:
            bar, fails = f"stays below {self.margin:g}", "does not"
        return (
            f"holds where the effect {bar}, fails where it {fails} (two-sided t-tests over {self.unit}, "
            f"Benjamini-Hochberg at {ALPHA:g} over the lines that could come out either way), inconclusive otherwise"
        )

    def lean(self, rows: pd.DataFrame) -> tuple[float, Outcome]:
        """Return which way one setting's rows lean, one per seed, and how probable that would be on the edge.

        The claim holds if every bar is cleared: p is that of the bar cleared least surely. It fails if one bar of two
        is missed: p is the smaller one's, times two.
        """
        effect = rows[self.effect].to_numpy(dtype=float)
        if self.side == "below":
            to_clear = missed = [self.margin - effect]
        else:
            over_null = effect - rows[self.null].to_numpy(dtype=float)
            to_clear, missed = [effect - self.margin, over_null - self.margin], [effect - self.margin, over_null]
        if len(effect) < 2:
            return float("nan"), "inconclusive"
        if all(excess.mean() > 0 for excess in to_clear):
            return max(map(p_value, to_clear)), "holds"
        below = [p_value(excess) for excess in missed if excess.mean() < 0]
        return (min(1.0, len(missed) * min(below)), "fails") if below else (1.0, "inconclusive")

    def lines(self, result: Result) -> Iterator[Line]:
        """Judge every scope that has rows whose effect and null are defined.

        Raises:
            UserError: the rows lack a column.
        """
        frame, scope, columns = self.rows(result), [*SCOPE, "stage"], [self.effect, self.null]
        _check(self, result.name, frame, (*scope, "seed", *columns))
        defined = frame[[*scope, "seed", *columns]].dropna(subset=columns)
        seeds = defined.groupby([*scope, "seed"], sort=False, dropna=False)[columns].mean().reset_index()
        for _, per_seed in seeds.groupby(scope, sort=False, dropna=False):
            named = {str(name): value for name, value in per_seed[scope].iloc[:1].to_dict("records")[0].items()}
            found = Contrast(mean_estimate(per_seed[self.effect]), mean_estimate(per_seed[self.null]))
            role = role_of(named, self.identity(named), self.of_arms)
            yield Line(named, role, found, *self.lean(per_seed))


FEWEST = 6
"""Settings that it takes to ask whether two quantities go together over them: 720 orders."""
N_PERMUTATIONS = 9999


@dataclass(frozen=True, kw_only=True)
class LinkTest:
    """A rule that asks whether a signature goes with an outcome over settings, one point (mean over seeds) per setting.

    Within a position scheme the signature is dealt to the settings at random. Between schemes, what settings of one
    scheme share is one draw: the schemes' mean signatures are dealt to the schemes, each setting keeping its distance
    from its scheme's mean.
    """

    claim: str
    measure: str
    signature: str
    """Column of the rows."""
    outcome: str
    """Column of the rows."""
    margin: float
    rows: Callable[[Result], pd.DataFrame] = lambda result: result.frame

    null_is = "signatures dealt to the settings (to the schemes) at random"

    @property
    def rule(self) -> str:
        """The rule in words."""
        return (
            f"holds where the rank correlation exceeds {self.margin:g} and what signatures dealt at random give, "
            f"fails where it is below 0 and what they give (two-sided permutation tests, Benjamini-Hochberg at "
            f"{ALPHA:g} over the lines that could come out either way), inconclusive otherwise"
        )

    def lines(self, result: Result) -> Iterator[Line]:
        """Judge every stage: all schemes together, then each that has `FEWEST` settings in which the signature differs.

        Raises:
            UserError: the rows lack a column.
        """
        frame = self.rows(result)
        _check(self, result.name, frame, (*SCOPE, "stage", "seed", self.signature, self.outcome))
        names = [*SCOPE, "stage"]
        points = frame.dropna(subset=[self.signature]).groupby(names, sort=False)[[self.signature, self.outcome]]
        points = points.mean().reset_index()
        for stage, at in points.groupby("stage", sort=False):
            for scheme, settings in [("all schemes", at), *at.groupby("scheme", sort=False)]:
                x, y = settings[self.signature].to_numpy(dtype=float), settings[self.outcome].to_numpy(dtype=float)
                value = rank_correlation(x, y)
                if len(x) < FEWEST or np.isnan(value) or np.ptp(x) < CONSTANT:
                    continue
                groups = settings["scheme"].to_numpy() if scheme == "all schemes" else np.zeros(len(x))
                drawn = _dealt(x, y, groups)
                p = (1 + (np.abs(drawn) >= abs(value) - 1e-12).sum()) / (1 + len(drawn))
                low, high = np.quantile(drawn, [0.025, 0.975])
                null = Estimate(float(drawn.mean()), float(low), float(high), len(x))
                leans: Outcome = "holds" if value > self.margin else "fails" if value < 0 else "inconclusive"
                scope = {**dict.fromkeys(SCOPE), "scheme": str(scheme), "stage": stage}
                found = Contrast(correlation_estimate(value, len(x)), null)
                yield Line(scope, role_of(scope), found, float(p), leans)


CONSTANT = 0.01
"""A signature that varies less than this over what is compared is constant, and has no rank worth correlating."""


def _dealt(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Draw rank correlations of `y` with `x` dealt at random: among all points of one group, or as whole group
    means."""
    generator, members = np.random.default_rng(0), np.unique(groups, return_inverse=True)[1]
    means = np.bincount(members, x) / np.bincount(members)
    if len(means) == 1:
        ranks = generator.permuted(np.tile(rankdata(x.round(12)), (N_PERMUTATIONS, 1)), axis=1)
    else:
        dealt = generator.permuted(np.tile(means, (N_PERMUTATIONS, 1)), axis=1)
        ranks = rankdata((x - means[members] + dealt[:, members]).round(12), axis=1)
    ranks, outcome = ranks - ranks.mean(1, keepdims=True), rankdata(y) - (len(y) + 1) / 2
    sizes = np.linalg.norm(ranks, axis=1) * np.linalg.norm(outcome)
    return np.divide(ranks @ outcome, sizes, out=np.zeros(N_PERMUTATIONS), where=sizes > 0)


Rule = ClaimTest | LinkTest


@dataclass(frozen=True)
class Verdict:
    """One line of the ledger."""

    claim: dict[str, str]
    """id and sentence."""
    scope: dict[str, Any]
    """The columns of `scope.SCOPE` (null: all of them) and the training stage."""
    role: Role
    """What the line can say: a key of :data:`ROLES`."""
    measure: str
    effect: Estimate
    null: Estimate
    null_is: str
    p: float
    """That the data would lean this way if the claim were on the edge, adjusted for the number of lines of its role;
    NaN for a single observation."""
    verdict: Outcome
    reading: str
    """What the verdict says of the paper; empty where it says nothing."""
    rule: str
    figure: str
    """The analysis whose rows it was computed from."""


def p_value(excess: np.ndarray) -> float:
    """Return the p of a two-sided one-sample t-test of a mean of 0; 0 where all agree on one that is not 0."""
    if np.ptp(excess) <= 1e-12 * max(1.0, float(np.abs(excess).max())):
        return float(excess.mean() == 0)
    tested: Any = ttest_1samp(excess, 0.0)
    return float(tested.pvalue)


def judge(tested: Sequence[tuple[Result, Sequence[Rule]]]) -> list[Verdict]:
    """Compute the ledger: every test of every result wherever it has rows.

    Lines are adjusted for how many there are of their role that have several observations.

    Raises:
        UserError: a test names an unknown claim or a column that the rows lack, or the rows are not those of an
            analysis.
    """
    found = list[tuple[str, Rule, Line]]()
    for result, tests in tested:
        with rows_expected(result.name, "judged"):
            found += [(result.name, test, line) for test in tests for line in test.lines(result)]
    adjusted = np.array([line.p for *_, line in found], dtype=float)
    roles = np.array([line.role for *_, line in found], dtype=str)
    for role in ROLES:
        counted = (roles == role) & ~np.isnan(adjusted)
        if counted.any():
            adjusted[counted] = false_discovery_control(adjusted[counted])
    verdicts = []
    for (figure, test, line), p in zip(found, adjusted.tolist(), strict=True):
        outcome: Outcome = line.leans if p < ALPHA else "inconclusive"
        verdicts.append(
            Verdict(
                claim={"id": test.claim, "sentence": CLAIMS[test.claim]},
                scope=line.scope,
                role=line.role,
                measure=test.measure,
                effect=line.found.effect,
                null=line.found.null,
                null_is=test.null_is,
                p=p,
                verdict=outcome,
                reading=READINGS.get((line.role, outcome), ""),
                rule=test.rule,
                figure=figure,
            )
        )
    return verdicts


def _check(test: Rule, figure: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    if test.claim not in CLAIMS:
        raise UserError(f"claim: {test.claim!r} in analysis {figure!r} is not one of {', '.join(CLAIMS)}; correct it")
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise UserError(
            f"rows: analysis {figure!r} lacks column {missing[0]!r}, which claim {test.claim} reads; add it"
        )


def save_ledger(verdicts: Sequence[Verdict], path: str | Path) -> None:
    """Write a ledger as :func:`as_json` has it, atomically."""
    write_text(path, as_json(verdicts))


def as_json(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a JSON list, one per line."""
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in tidy([asdict(verdict) for verdict in verdicts]))
    return f"[\n{lines}\n]\n"


def counts(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Count the lines of each claim that could come out either way by verdict, then those of the other roles: index
    claim id."""
    columns = [*OUTCOMES, *(role for role in ROLES if role != "test")]
    table = pd.DataFrame(
        [
            {"claim": verdict.claim["id"], "counted": verdict.verdict if verdict.role == "test" else verdict.role}
            for verdict in verdicts
        ],
        columns=["claim", "counted"],
    )
    return pd.crosstab(table["claim"], table["counted"]).reindex(columns=columns, fill_value=0)
