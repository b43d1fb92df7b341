"""How much of the evidence in values depends on where its source is, in one layer, over training and under six position
schemes.

Shares are index / (1 + index): position's part in the variance of evidence over tokens and positions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mdm_interp import Analysis, Result, Run, Summary, first_and_last, where
from mdm_interp.experiments.grids import SCHEMES, scheme_grid
from mdm_interp.experiments.scope import second_checkpoints
from mdm_interp.measures.evidence import as_share, evidence_matrix, pair_position_index, position_share
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.stats.estimates import NOTHING, Estimate, mean_estimate
from mdm_interp.viz import (
    CHANCE,
    PROBABILITY,
    SCHEME_COLORS,
    TRAINING_STEPS,
    Panels,
    alike,
    shown,
)
from mdm_interp.viz.words import joined, sample_size

SHARES = (
    ("over all positions", "share", -0.2, "circle"),
    ("between the two places of a pair", "pair_share", 0.0, "diamond-open"),
    ("null: shuffled", "share_null", 0.2, "x-thin"),
)
"""What is drawn of one layer: its name, its column, how far right of the scheme it is, and its mark."""


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give position's share over all positions, and over the two places of a pair."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    entities, positions = torch.arange(run.config.facts.n_entities), torch.arange(run.config.facts.seq_len)
    found = position_share(evidence_matrix(model, entities, entities, positions))
    (index,) = pair_position_index(model, pairs, entities).tolist()
    return [{"share": found.effect, "share_null": found.null, "pair_share": as_share(index)}]


def summarize(result: Result) -> Summary:
    """Give the shares at the first and the last checkpoint, and the largest at any."""
    largest = result.frame.groupby(["scheme", "run"])["share"].max().reset_index(name="largest_share")
    return Summary.of(first_and_last(result.frame), ("scheme", "stage"), ("share", "pair_share")) + Summary.of(
        largest, ("scheme",), ("largest_share",)
    )


def takeaway(result: Result) -> str:
    summary = result.summary
    relative = [scheme for scheme in SCHEMES if POSITION_SCHEMES[scheme].relative]
    absolute = [scheme for scheme in SCHEMES if scheme not in relative]
    largest = max(summary.at("largest_share", scheme=scheme).value for scheme in relative)
    nulls = [summary.null("share", scheme=scheme, stage="end").value for scheme in absolute]
    ends = [summary.at("share", scheme=scheme, stage="end") for scheme in absolute]
    named = joined([shown(scheme) for scheme in relative])
    answer = f"Up to {largest:.2g} of it is position's under {named}" if largest else f"No, in one layer under {named}"
    return (
        f"{answer}; {joined(absolute)} positions end by making {up_to(ends)} of the evidence's variance, shuffled "
        f"{min(nulls):.2f} ({sample_size(ends)})."
    )


def up_to(estimates: Sequence[Estimate]) -> str:
    """Say how large the largest is, and whether that is more than nothing."""
    largest = max(estimates, key=lambda one: one.value)
    return f"up to {largest.value:.2f}" + ("" if largest.side == "above" else " (not surely more than 0)")


def draw(result: Result) -> Panels:
    """Draw position's share at the end of training and over it."""
    panels, frame = Panels(), result.frame
    trained = frame[frame["step"] > 0]
    share = {**PROBABILITY, "title": "position's share of<br>the evidence's variance"}
    size = sample_size([entry.effect for entry in result.summary.where("share", stage="end")])
    titles = [f"end of training ({size})", "over training"]
    ended, over = panels.row(titles, y=share, height=330)
    end = where(frame, step=frame["step"].max())
    for name, quantity, shift, symbol in SHARES:
        found = {shown(scheme): mean_estimate(where(end, scheme=scheme)[quantity]) for scheme in SCHEMES}
        for scheme in SCHEMES:
            color = CHANCE if quantity == "share_null" else SCHEME_COLORS[scheme]
            only = {place: one if place == shown(scheme) else NOTHING for place, one in found.items()}
            ended.estimates(only, name=name, color=color, symbol=symbol, upright=True, shift=shift)
    ended.x(title="position scheme")
    over.x(**TRAINING_STEPS)
    for names, scheme in alike(trained, "share"):
        rows = where(trained, scheme=scheme)
        over.curve(rows, "step", "share", name=names, color=SCHEME_COLORS[scheme])
    over.curve(trained, "step", "share_null", name="null: shuffled", color=CHANCE, dash="dot")
    return panels


ANALYSIS = Analysis(
    name="position_invariance",
    question="Does what is stored know where it is?",
    configs=scheme_grid,
    measure=measure,
    when=second_checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=50,
    detail_of="evidence_growth",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
