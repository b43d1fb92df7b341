"""How much of the evidence in values depends on where its source is, over training and under six position schemes; and
layer by layer in deeper models, where evidence also holds what the context made of the source.

Shares are index / (1 + index): position's part in the variance of evidence over tokens and positions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, first_and_last, stages, where
from mdm_interp.experiments.grids import SCHEMES, depth_grid, scheme_grid
from mdm_interp.experiments.scope import STAGES, Moment, second_checkpoints
from mdm_interp.measures.evidence import as_share, evidence_matrix, pair_position_index, position_share
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.stats.estimates import NOTHING, Estimate, mean_estimate
from mdm_interp.stats.tables import curve
from mdm_interp.viz import (
    CHANCE,
    GREEN,
    PROBABILITY,
    PURPLE,
    SCHEME_COLORS,
    TRAINING_STEPS,
    Panel,
    Panels,
    alike,
    shown,
)
from mdm_interp.viz.words import counted, joined, sample_size

UNRELATED = 0.5
"""The pair share when evidence in the two places has equal variance and is uncorrelated: half of it is position's."""
DEEP = {2: GREEN, 4: PURPLE}
SHARES = (
    ("over all positions", "share", -0.2, "circle"),
    ("between the two places of a pair", "pair_share", 0.0, "diamond-open"),
    ("null: shuffled", "share_null", 0.2, "x-thin"),
)
"""What is drawn of one layer: its name, its column, how far right of the scheme it is, and its mark."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [*scheme_grid(seeds), *(config for config in depth_grid(seeds) if config.model.n_layers in DEEP)]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per layer; of models of several layers the pair share only."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    entities, positions = torch.arange(run.config.facts.n_entities), torch.arange(run.config.facts.seq_len)
    shares = {"share": float("nan"), "share_null": float("nan")}
    if model.cfg.n_layers == 1:
        found = position_share(evidence_matrix(model, entities, entities, positions))
        shares = {"share": found.effect, "share_null": found.null}
    per_layer = pair_position_index(model, pairs, entities).tolist()
    return [{"layer": layer, **shares, "pair_share": as_share(index)} for layer, index in enumerate(per_layer)]


def when(run: Run) -> list[Moment]:
    """Give every second checkpoint of a model of one layer, the stages of a deeper one."""
    return second_checkpoints(run) if run.config.model.n_layers == 1 else stages(run)


def summarize(result: Result) -> Summary:
    """Summarise one-layer models at their first and last checkpoint, and deeper ones by layer."""
    one, deep = where(result.frame, n_layers=1), result.frame[result.frame["n_layers"] > 1]
    largest = one.groupby(["scheme", "run"])["share"].max().reset_index(name="largest_share")
    return (
        Summary.of(first_and_last(one), ("scheme", "stage"), ("share", "pair_share"))
        + Summary.of(largest, ("scheme",), ("largest_share",))
        + Summary.of(deep, ("scheme", "n_layers", "mlp", "stage", "layer"), ("pair_share",))
    )


def takeaway(result: Result) -> str:
    summary = result.summary
    relative = [scheme for scheme in SCHEMES if POSITION_SCHEMES[scheme].relative]
    absolute = [scheme for scheme in SCHEMES if scheme not in relative]
    largest = max(summary.at("largest_share", scheme=scheme).value for scheme in relative)
    nulls = [summary.null("share", scheme=scheme, stage="end").value for scheme in absolute]
    ends = [summary.at("share", scheme=scheme, stage="end") for scheme in absolute]
    deep = [entry.effect for entry in summary.where("pair_share", stage="end") if entry.of.get("layer", 0) > 0]
    named = joined([shown(scheme) for scheme in relative])
    answer = f"Up to {largest:.2g} of it is position's under {named}" if largest else f"No, in one layer under {named}"
    upper = f"in upper layers {up_to(deep)}" if deep else "deeper models are unmeasured"
    return (
        f"{answer}; {joined(absolute)} positions end by making {up_to(ends)} of the evidence's variance, shuffled "
        f"{min(nulls):.2f}; {upper} ({sample_size([*ends, *deep])})."
    )


def up_to(estimates: Sequence[Estimate]) -> str:
    """Say how large the largest is, and whether that is more than nothing."""
    largest = max(estimates, key=lambda one: one.value)
    return f"up to {largest.value:.2f}" + ("" if largest.side == "above" else " (not surely more than 0)")


def draw(result: Result) -> Panels:
    """Draw position's share at the end of training and over it, and by layer of deeper models."""
    panels, one = Panels(), where(result.frame, n_layers=1)
    trained, share = one[one["step"] > 0], {**PROBABILITY, "title": "position's share of<br>the evidence's variance"}
    size = sample_size([entry.effect for entry in result.summary.where("share", stage="end")])
    titles = [f"one layer, end of training ({size})", "one layer, over training"]
    ended, over = panels.row(titles, y=share, height=330)
    end = where(one, step=one["step"].max())
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
    layers = {"title": "layer", "tickvals": list(range(max(DEEP))), "range": [-0.3, max(DEEP) - 0.7]}
    deep = result.frame[result.frame["n_layers"] > 1]
    settings = {
        f"{shown(scheme)}, {'with MLP' if mlp else 'attention only'}": where(deep, scheme=scheme, mlp=mlp)
        for scheme in dict.fromkeys(deep["scheme"])
        for mlp in (False, True)
    }
    settings = {
        f"{name}<br>n = {counted(group['seed'].nunique(), 'seed')}": group
        for name, group in settings.items()
        if len(group)
    }
    row = panels.row(list(settings), x=layers, y=share) if settings else []
    for panel, group in zip(row, settings.values(), strict=True):
        _draw_layers(panel, group)
    return panels


def _draw_layers(panel: Panel, group: pd.DataFrame) -> None:
    """Draw the pair share of deeper models at every stage. What an interval has beyond 0 and 1 no share can be."""
    for n_layers, color in DEEP.items():
        for stage, dash in zip(STAGES, ("dot", "dash", "solid"), strict=True):
            rows = where(group, n_layers=n_layers, stage=stage)
            if rows.empty:
                continue
            points = curve(rows.astype({"pair_share": float}), "layer", "pair_share")
            points = points.assign(low=points["low"].clip(0, 1), high=points["high"].clip(0, 1))
            panel.points(points, "layer", name=f"{n_layers} layers, {stage}", color=color, dash=dash)
    panel.level(UNRELATED, name="unrelated evidence in the two places", color=CHANCE, x=(0, max(DEEP) - 1))


ANALYSIS = Analysis(
    name="position_invariance",
    question="Does what is stored know where it is?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=50,
    detail_of="evidence_growth",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
