"""Which measure decides which claim of the paper, in which rows, and by which margin.

The rows are those of an analysis that measures the signatures (:mod:`mdm_interp.measures.signatures`) of every run: one
per run and stage, with a column `NAME` and a column `NAME_null` for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from mdm_interp.experiments.claims import CONSTANT, ClaimTest, LinkTest, Rule
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import SCOPE
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.stats.correlations import correlation_estimate, partial_rank_correlation, rank_correlation
from mdm_interp.stats.tables import as_columns, where

SINGLE_SIDED = ("source_only", "target_only")

LINKED = {
    "alignment": "gradient alignment (cosine of pairs, V and O)",
    "route": "route correlation",
    "evidence": "evidence for the answer (z-score)",
}
"""The signatures that are held against reverse prediction over settings."""


def mirrored(scope: Mapping[str, Any]) -> bool:
    """Say whether a reverse query is a mirror image of its forward query to the model: one layer that sees both sides,
    and scores that do not tell them apart."""
    return scope["n_layers"] == 1 and scope["scheme"] in ("alibi", "none") and scope["objective"] != "causal"


def same_values(scope: Mapping[str, Any]) -> bool:
    """Say whether values cannot depend on position: one layer under a relative scheme."""
    return scope["n_layers"] == 1 and POSITION_SCHEMES[scope["scheme"]].relative


def over_the_arm(result: Result) -> pd.DataFrame:
    """Return the log ratio of an any-order MDM's reverse probability to that of the ARM of its world and seed, which
    has RoPE and the fewest heads (one); null: of another seed's ARM to that of this one."""
    frame, place = result.frame, ["world", "reversed_share", "stage", "seed"]
    arms = where(frame, objective="causal", scheme="rope")
    arms = where(arms, n_heads=arms["n_heads"].min())[[*place, "reverse_probability"]]
    arms = arms.rename(columns={"reverse_probability": "arm"})
    others = arms.groupby(place[:3], sort=False)["arm"].transform(lambda column: np.roll(column.to_numpy(), -1))
    joined = where(frame, objective="any_order").merge(arms.assign(other=others), on=place)
    return joined.assign(
        log_ratio=np.log(joined["reverse_probability"] / joined["arm"]),
        log_ratio_null=np.log(joined["other"] / joined["arm"]),
    )


def below_forward(result: Result) -> pd.DataFrame:
    """Return by how much any-order MDMs answer forward queries better than reverse ones."""
    frame = where(result.frame, objective="any_order")
    return frame.assign(less=frame["forward_probability"] - frame["reverse_probability"], less_null=0.0)


def not_shared(result: Result) -> pd.DataFrame:
    """Return what an any-order MDM keeps in reverse of its forward probability, where each side can have heads or
    values of its own: several heads whose scores tell sides apart, or absolute positions."""
    frame = where(result.frame, objective="any_order", reversed_share=0.0)
    absolute = ~frame["scheme"].map(lambda scheme: POSITION_SCHEMES[str(scheme)].relative).to_numpy(dtype=bool)
    told_apart = ~frame["scheme"].isin(["alibi", "none"]).to_numpy() & (frame["n_heads"].to_numpy() > 1)
    chosen = pd.DataFrame(frame[absolute | told_apart])
    return chosen.assign(kept=chosen["reverse_probability"] / chosen["forward_probability"], kept_null=1.0)


def single_sided(result: Result) -> pd.DataFrame:
    """Return the rows of models that were never trained in any order."""
    return pd.DataFrame(result.frame[result.frame["objective"].isin(SINGLE_SIDED)])


RULES: tuple[Rule, ...] = (
    ClaimTest(
        claim="0",
        measure="log ratio of an any-order MDM's reverse probability to the ARM's of the same world and seed",
        effect="log_ratio",
        null="log_ratio_null",
        null_is="the ARM of another seed",
        side="above",
        margin=0.7,
        rows=over_the_arm,
        identity=mirrored,
    ),
    ClaimTest(
        claim="0",
        measure="forward less reverse probability of an any-order MDM, which remains below",
        effect="less",
        null="less_null",
        null_is="0: both alike",
        side="above",
        margin=0.0,
        rows=below_forward,
        identity=mirrored,
    ),
    ClaimTest(
        claim="1",
        measure="not sufficient: reverse over forward probability of an any-order MDM in which each side can have "
        "heads or values of its own",
        effect="kept",
        null="kept_null",
        null_is="forward and reverse answered alike",
        side="below",
        margin=0.5,
        rows=not_shared,
    ),
    ClaimTest(
        claim="1",
        measure="not necessary: reverse probability of an MDM in which only one side was ever masked",
        effect="reverse_probability",
        null="chance",
        null_is="chance: the answer's role known, nothing else",
        side="above",
        margin=0.05,
        rows=single_sided,
        identity=mirrored,
    ),
    ClaimTest(
        claim="2",
        measure="share of the variance of evidence made by where the source is (largest over layers)",
        effect="position",
        null="position_null",
        null_is="the reverse query of another source",
        side="below",
        margin=0.05,
        identity=same_values,
    ),
    ClaimTest(
        claim="3",
        measure="distance from the forward prediction left when the reverse query is given the forward route, "
        "relative to a random route's",
        effect="transplant",
        null="transplant_null",
        null_is="the reverse query's own route",
        side="below",
        margin=0.05,
        identity=same_values,
    ),
    ClaimTest(
        claim="4",
        measure="evidence for the true answer in the reverse query (standard deviations above its role's mean, largest "
        "over layers)",
        effect="evidence",
        null="evidence_null",
        null_is="the answer of another fact",
        side="above",
        margin=0.5,
    ),
    ClaimTest(
        claim="5",
        measure="correlation of forward and mirrored reverse rows of scores over all keys, row means subtracted (mean "
        "over layers and heads)",
        effect="route",
        null="route_null",
        null_is="keys dealt at random: 0",
        side="above",
        margin=0.3,
        identity=mirrored,
    ),
    ClaimTest(
        claim="5",
        measure="correlation over facts of raw forward and reverse scores at the source (mean over layers and heads), "
        "which the theorem takes to exceed 0.4",
        effect="score",
        null="score_null",
        null_is="the reverse scores of other facts",
        side="above",
        margin=0.4,
        identity=mirrored,
    ),
    ClaimTest(
        claim="6",
        measure="cosine of a pair's forward and reverse gradients in V and O",
        effect="alignment",
        null="alignment_null",
        null_is="the reverse gradient of another fact",
        side="above",
        margin=0.1,
        identity=mirrored,
    ),
    ClaimTest(
        claim="6",
        measure="cosine of the gradients of the mean forward and the mean reverse loss in V and O",
        effect="mean_alignment",
        null="mean_alignment_null",
        null_is="0: unrelated directions",
        side="above",
        margin=0.1,
        identity=mirrored,
    ),
    *(
        LinkTest(
            claim="7",
            measure=f"rank correlation over settings of {label} with reverse probability",
            signature=signature,
            outcome="reverse_probability",
            margin=0.1,
        )
        for signature, label in LINKED.items()
    ),
)
"""Margins are conventional small or medium effects (a correlation of 0.1 or 0.3, half a standard deviation, 5 %, a
factor of 2), the same in every setting. When they were stated: those of claims 1 (not necessary) to 6 before the first
ledger was computed, though earlier figures of some quantities had been seen by then. Changed after a look at results:
the second measure of claim 6 (twice), the measure of claim 5, and the rule that an effect has to clear its margin by
itself. Claim 0, `not sufficient` and the rank correlations over settings were added after that look."""


# ---- claim 7 over training and across seeds

SIGNATURES = {**LINKED, "alignment": "gradient alignment (cosine, V and O)"}
"""What is held against it over training: the alignment there is that of the mean losses' gradients."""

Correlation = Literal["plain", "partial"]
CORRELATIONS: tuple[Correlation, ...] = ("plain", "partial")
"""Rank correlation with reverse probability, and the same given forward probability."""


def correlation(rows: pd.DataFrame, signature: str, kind: Correlation) -> float:
    """Return the rank correlation over rows of a signature with reverse probability; NaN where the signature is
    constant, or where forward probability leaves nothing."""
    x, reverse, forward = rows[[signature, "reverse_probability", "forward_probability"]].to_numpy(dtype=float).T
    if np.ptp(x) < CONSTANT:
        return float("nan")
    return rank_correlation(x, reverse) if kind == "plain" else partial_rank_correlation(x, reverse, given=forward)


def over_training(frame: pd.DataFrame, signature: str) -> pd.DataFrame:
    """Return for each run its correlations over checkpoints, and (`…_null`) those of the next seed's signature at the
    same steps, which shares the course of training and nothing else."""
    rows = []
    for scope, group in where(frame, stage="checkpoint").groupby(list(SCOPE), sort=False):
        runs = [run.sort_values("step") for _, run in group.groupby("seed")]
        for run, other in zip(runs, [*runs[1:], *runs[:1]], strict=True):
            same = run.merge(other[["step", signature]], on="step", suffixes=("", "_other"))
            found = {kind: correlation(same, signature, kind) for kind in CORRELATIONS}
            found |= {f"{kind}_null": correlation(same, f"{signature}_other", kind) for kind in CORRELATIONS}
            place = {**dict(zip(SCOPE, scope, strict=True)), "stage": "over training", "seed": run["seed"].iloc[0]}
            rows.append({**place, "signature": signature, **found})
    return pd.DataFrame(rows)


def across_seeds(frame: pd.DataFrame, signature: str, stage: str) -> pd.DataFrame:
    """Return for each world and scheme the correlations over the seeds at a stage."""
    rows = []
    for (world, scheme), runs in where(frame, stage=stage).groupby(["world", "scheme"], sort=False):
        row = {"world": world, "scheme": scheme, "stage": f"across seeds, {stage}", "signature": signature}
        for kind in CORRELATIONS:
            value, n_given = correlation(runs, signature, kind), int(kind == "partial")
            row |= as_columns(kind, correlation_estimate(value, len(runs), n_given=n_given))
        rows.append(row)
    return pd.DataFrame(rows)


LINK_RULES = tuple(
    ClaimTest(
        claim="7",
        measure=f"partial rank correlation over training of {label} with reverse probability, given forward "
        "probability",
        effect="partial",
        null="partial_null",
        null_is="the signature of another seed at the same steps",
        side="above",
        margin=0.1,
        rows=lambda result, signature=signature: over_training(result.frame, signature),
    )
    for signature, label in SIGNATURES.items()
)
