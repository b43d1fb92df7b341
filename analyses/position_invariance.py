"""How much of the evidence in values depends on where its source stands, over training and under six position schemes;
and layer by layer in deeper models, where evidence also holds what the context made of the source.

Shares are index / (1 + index): position's part in the variance of evidence over tokens and positions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from mdm_interp.config import TrainConfig
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import DEPTH_SCHEMES, SCHEMES, depth_grid, scheme_grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import STAGES, Moment, second_checkpoints, stages
from mdm_interp.measures.evidence import evidence_matrix, pair_position_index, position_index
from mdm_interp.models.positions import SCHEMES as POSITIONS
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level, add_points
from mdm_interp.viz.theme import CHANCE, GREEN, GREY, PURPLE, legend_at
from mdm_interp.viz.theme import SCHEMES as COLORS

UNRELATED = 0.5
"""The pair share when evidence in the two places has equal variance and is uncorrelated: half of it is position's."""
QUANTITIES = {"share": "over all positions", "pair_share": "over the two places of a pair"}
DEEP = {2: GREEN, 4: PURPLE}
UNMEASURED = {"share": float("nan"), "share_null": float("nan")}


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [*scheme_grid(seeds), *(config for config in depth_grid(seeds) if config.model.n_layers in DEEP)]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """One row per layer; of models of several layers the pair share only."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    entities, positions = torch.arange(run.config.facts.n_entities), torch.arange(run.config.facts.seq_len)
    per_layer, shares = pair_position_index(model, pairs, entities).tolist(), UNMEASURED
    if model.cfg.n_layers == 1:
        shares = first_layer(evidence_matrix(model, entities, entities, positions))
    return [{"layer": layer, **shares, "pair_share": as_share(index)} for layer, index in enumerate(per_layer)]


def when(run: Run) -> list[Moment]:
    """Every second checkpoint of a model of one layer, the stages of a deeper one."""
    return second_checkpoints(run) if run.config.model.n_layers == 1 else stages(run)


def as_share(index: float) -> float:
    """Position's part in the whole variance."""
    return index / (1 + index)


def first_layer(evidence: Float[Tensor, "head target source position"]) -> dict[str, float]:
    """The share of position in first-layer evidence, and its null: the same entries in random places of the table, so
    that position does as much as token."""
    summed = evidence.sum(0, keepdim=True)
    shuffled = summed.flatten()[torch.randperm(summed.numel(), generator=torch.Generator().manual_seed(0))]
    shares = {"share": summed, "share_null": shuffled.view_as(summed)}
    return {name: as_share(position_index(table)) for name, table in shares.items()}


def summarize(result: Result) -> dict[str, Estimate]:
    frame, summary = result.frame, {}
    for scheme in SCHEMES:
        one = where(frame, scheme=scheme, n_layers=1)
        for stage, step in (("initial", one["step"].min()), ("end", one["step"].max())):
            at = where(one, step=step)
            for quantity in ("share", "share_null", "pair_share"):
                summary[f"{scheme} / {stage} / {quantity}"] = mean_estimate(at[quantity])
        peaks = one.groupby("run")["share"].max()
        summary[f"{scheme} / largest share at any checkpoint"] = mean_estimate(peaks)
    for (scheme, n_layers, mlp), group in frame[frame["n_layers"] > 1].groupby(["scheme", "n_layers", "mlp"]):
        for stage in STAGES:
            at = where(group, stage=stage)
            for layer in range(int(n_layers)):
                key = f"{scheme} {n_layers} layers{' with MLP' if mlp else ''} / {stage} / layer {layer + 1}"
                summary[f"{key} / pair_share"] = mean_estimate(where(at, layer=layer)["pair_share"])
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary
    relative = [scheme for scheme in SCHEMES if POSITIONS[scheme].relative]
    largest = max(summary[f"{scheme} / largest share at any checkpoint"].value for scheme in relative)
    moved = [
        f"{scheme} {summary[f'{scheme} / initial / share'].value:.2f} to {summary[f'{scheme} / end / share'].value:.2f}"
        for scheme in SCHEMES
        if scheme not in relative
    ]
    null = min(summary[f"{scheme} / end / share_null"].value for scheme in SCHEMES)
    above = [
        estimate.value
        for key, estimate in summary.items()
        if " layers" in key and "/ end /" in key and "/ layer 1 /" not in key and estimate.n
    ]
    deeper = f"between {min(above):.2g} and {max(above):.2g}" if above else "unmeasured"
    return (
        f"Position's share in first-layer evidence is at most {largest:.2g} under {', '.join(relative)}; training "
        f"moves it from {', '.join(moved)} (shuffled: {null:.2f} or more). In the upper layers of deeper models, the "
        f"share between the two places of a pair, context included, ends {deeper}."
    )


def draw(result: Result) -> go.Figure:
    frame = result.frame
    settings = [(scheme, mlp) for scheme in DEPTH_SCHEMES for mlp in (False, True)]
    figure = make_subplots(
        2,
        4,
        specs=[[{"colspan": 2}, None, {}, {}], [{}] * 4],
        subplot_titles=[
            "one layer, over all positions",
            "one layer, within pairs",
            "one layer, end of training",
            *[f"{scheme}, {'with MLP' if mlp else 'attention only'}" for scheme, mlp in settings],
        ],
        horizontal_spacing=0.07,
        vertical_spacing=0.29,
    )
    one = where(frame, n_layers=1)
    trained = pd.DataFrame(one[one["step"] > 0])
    for scheme, color in COLORS.items():
        group = where(trained, scheme=scheme)
        dash = {"alibi": "dash", "none": "dot", "t5_bias": "dashdot"}.get(scheme, "solid")  # they lie on rope
        for col, quantity in ((1, "share"), (3, "pair_share")):
            measured = group[group[quantity].notna()]
            if len(measured):
                legend = "legend" if col == 1 else None
                mark: dict[str, Any] = {"name": scheme, "color": color, "dash": dash, "legend": legend}
                add_curve(figure, curve(measured, "step", quantity), "step", row=1, col=col, **mark)
    null = curve(trained, "step", "share_null")
    shuffled: dict[str, Any] = {"name": "null: shuffled", "color": GREY}
    add_curve(figure, null, "step", row=1, col=1, dash="dot", legend="legend", **shuffled)
    unrelated: dict[str, Any] = {"name": "unrelated evidence in the two places", "color": CHANCE}
    add_level(figure, trained["step"].tolist(), UNRELATED, row=1, col=3, legend="legend", **unrelated)
    _draw_end(figure, one)
    for col, (scheme, mlp) in enumerate(settings, start=1):
        group = where(frame, scheme=scheme, mlp=mlp)
        _draw_layers(figure, group.assign(layer_number=group["layer"] + 1), col)
        add_level(figure, (1, max(DEEP)), UNRELATED, row=2, col=col, **unrelated)
    figure.update_yaxes(range=[-0.03, 1.03])
    for row, col in ((1, 1), (2, 1)):
        figure.update_yaxes(title_text="position's share of<br>the evidence's variance", row=row, col=col)
    for col in (3, 4):
        figure.update_yaxes(title_text="share", row=1, col=col)
    figure.update_yaxes(title_text="share", row=2, matches=None)
    for col in (1, 3):
        figure.update_xaxes(TRAINING_STEPS, title_text="training step", row=1, col=col)
    at = {"tickvals": list(range(1, max(DEEP) + 1)), "range": [0.7, max(DEEP) + 0.3]}
    figure.update_xaxes(at, title_text="layer", row=2)
    figure.update_layout(legend=legend_at(0.5, 0.475), legend2=legend_at(0.5, -0.11))
    figure.update_layout(height=1100)
    return figure


def _draw_end(figure: go.Figure, one: pd.DataFrame) -> None:
    """Both shares of every scheme at the last checkpoint."""
    end = where(one, step=one["step"].max())
    for place, scheme in enumerate(SCHEMES):
        for shift, quantity in zip((-0.12, 0.12), QUANTITIES, strict=True):
            points = curve(where(end, scheme=scheme).assign(place=place), "place", quantity)
            add_points(figure, points, "place", name=scheme, color=COLORS[scheme], shift=shift, row=1, col=4)
    figure.update_xaxes(tickvals=list(range(len(SCHEMES))), ticktext=list(SCHEMES), tickangle=45, row=1, col=4)
    figure.update_xaxes(title_text="left: all positions; right: pairs", row=1, col=4)


def _draw_layers(figure: go.Figure, group: pd.DataFrame, col: int) -> None:
    for n_layers, color in DEEP.items():
        for stage, dash in zip(STAGES, ("dot", "dash", "solid"), strict=True):
            points = curve(where(group, n_layers=n_layers, stage=stage), "layer_number", "pair_share")
            name, legend = f"{n_layers}-layer, {stage}", "legend2" if col == 1 else None
            place: dict[str, Any] = {"row": 2, "col": col, "legend": legend}
            add_points(figure, points, "layer_number", name=name, color=color, dash=dash, **place)


ANALYSIS = Analysis(
    name="position_invariance",
    question="Does what is stored know where it stands?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=50,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
