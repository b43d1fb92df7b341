"""Routes, evidence and gradient alignment layer by layer, in models of 1, 2 and 4 layers with and without MLPs.

Evidence is read along the direct path only: what a source's value writes straight into the logits. A deeper model may
answer by other paths, which these measures do not see.
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

from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import DEPTH_SCHEMES, DEPTHS, depth_grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import STAGES
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.evidence import evidence_scores
from mdm_interp.measures.gradients.alignment import component_of
from mdm_interp.measures.routes import route_correlation
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.resampling import places_above
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import add_level, add_points
from mdm_interp.viz.theme import CHANCE, FORWARD, GREEN, GREY, ORANGE, PURPLE, REVERSE, legend_at

PARTS = {"VO": ("V", "O"), "QK": ("Q", "K"), "MLP": ("MLP",)}
"""The components of a layer whose gradients are compared, by what they do: store, route, transform."""
SIGNATURES = {
    "route": "route correlation",
    "evidence": "evidence for the<br>answer (z-score)",
    "VO": "gradient cosine,<br>V and O",
    "QK": "gradient cosine,<br>Q and K",
    "MLP": "gradient cosine,<br>MLP",
}
"""Columns measured per layer (their nulls: `…_null`), and how the figure calls them."""
COLORS = dict(zip(DEPTHS, (GREEN, ORANGE, PURPLE), strict=True))
SHOWN_STAGES = {"early": "dash", "end": "solid"}


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """One row per layer: every signature and its null; the null of a route correlation is 0, that of keys dealt at
    random."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    measured, reverse = gradient_cosines(model, pairs), [pair.reverse for pair in pairs]
    routes = route_correlation(model, pairs).nanmean(1)
    measured["route"] = (routes, torch.zeros_like(routes))
    measured["evidence"] = evidence_scores(model, reverse, run.facts.candidates(reverse))
    return [
        {
            "layer": layer,
            **{name: values[layer].item() for name, (values, _) in measured.items()},
            **{f"{name}_null": nulls[layer].item() for name, (_, nulls) in measured.items()},
        }
        for layer in range(model.cfg.n_layers)
    ]


Measured = tuple[Float[Tensor, "layer"], Float[Tensor, "layer"]]
"""A signature and its null."""


def gradient_cosines(model: HookedTransformer, pairs: Sequence[QueryPair]) -> dict[str, Measured]:
    """Per part, cosine of the gradients of the mean forward and the mean reverse loss over one half of the facts, mean
    over both halves; null: forward over one half, reverse over the other. NaN where a layer has no such part.

    Source: docs/theory.md, section 5.
    """
    halves = [[pair for pair in pairs if pair.fact % 2 == half] for half in (0, 1)]
    forward = [_layer_gradients(model, [pair.forward for pair in half]) for half in halves]
    reverse = [_layer_gradients(model, [pair.reverse for pair in half]) for half in halves]

    def cosine(part: str, layer: int, crossed: bool) -> float:
        if (part, layer) not in forward[0]:
            return float("nan")
        matched = zip(forward, reversed(reverse) if crossed else reverse, strict=True)
        return sum(_cosine(f[part, layer], r[part, layer]) for f, r in matched) / 2

    layers = range(model.cfg.n_layers)
    return {
        part: (
            torch.tensor([cosine(part, layer, crossed=False) for layer in layers]),
            torch.tensor([cosine(part, layer, crossed=True) for layer in layers]),
        )
        for part in PARTS
    }


def _cosine(x: Float[Tensor, "size"], y: Float[Tensor, "size"]) -> float:
    norms = x.norm() * y.norm()
    return float(x @ y / norms) if norms > 0 else float("nan")


def _layer_gradients(
    model: HookedTransformer, queries: Sequence[Query]
) -> dict[tuple[str, int], Float[Tensor, "size"]]:
    """The gradient of the mean loss in every part of every layer, flattened."""
    batch, named = collate(queries, model.cfg), dict(model.blocks.named_parameters())
    loss = query_loss(model(batch.tokens, attention_mask=batch.attention_mask), batch).mean()
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    parts: dict[tuple[str, int], list[Tensor]] = {}
    for name, gradient in gradients.items():
        for part, components in PARTS.items():
            if component_of(name) in components:
                parts.setdefault((part, int(name.split(".")[0])), []).append(gradient.flatten().double())
    return {key: torch.cat(flat) for key, flat in parts.items()}


def summarize(result: Result) -> dict[str, Estimate]:
    """Per model and stage its probabilities, and per layer how far each signature exceeds its null."""
    summary = {}
    settings = [(scheme, mlp, n_layers) for scheme in DEPTH_SCHEMES for mlp in (False, True) for n_layers in DEPTHS]
    for scheme, mlp, n_layers in settings:
        for stage in STAGES:
            at = where(result.frame, scheme=scheme, mlp=mlp, n_layers=n_layers, stage=stage)
            model, whole = f"{_name(scheme, mlp, n_layers)} / {stage}", where(at, layer=0)
            for quantity in ("forward_probability", "reverse_probability"):
                summary[f"{model} / {quantity}"] = mean_estimate(whole[quantity])
            above = whole["reverse_probability"] - whole["chance"]
            summary[f"{model} / reverse above chance"] = mean_estimate(above)
            for layer in range(n_layers):
                rows = where(at, layer=layer)
                for name in SIGNATURES if mlp else [name for name in SIGNATURES if name != "MLP"]:
                    excess = rows[name].astype(float) - rows[f"{name}_null"].astype(float)
                    summary[f"{model} / layer {layer + 1} / {name} over null"] = mean_estimate(excess)
    return summary


def _name(scheme: str, mlp: bool, n_layers: int) -> str:
    return f"{scheme} {n_layers} layer{'s' if n_layers > 1 else ''}{' with MLP' if mlp else ''}"


def takeaway(result: Result) -> str:
    summary = result.summary
    end = {key: estimate for key, estimate in summary.items() if " / end / " in key}

    def counted(name: str, scheme: str) -> str:
        layers = [e for key, e in end.items() if key.startswith(scheme) and key.endswith(f"/ {name} over null")]
        above = places_above([estimate.p_above_zero for estimate in layers])
        return f"{above.sum()} of {sum(estimate.n > 1 for estimate in layers)}"

    def probability(scheme: str, mlp: bool) -> str:
        values = [end[f"{_name(scheme, mlp, n)} / end / reverse_probability"].value for n in measured]
        return ", ".join(f"{value:.2g}" for value in values)

    measured = [n for n in DEPTHS if end[f"{_name(DEPTH_SCHEMES[0], False, n)} / end / reverse_probability"].n]
    depths = ", ".join(map(str, measured))
    said = [
        f"{scheme}: routes in {counted('route', scheme)}, evidence in {counted('evidence', scheme)}, "
        f"gradients of V and O in {counted('VO', scheme)}, of Q and K in {counted('QK', scheme)}, of MLPs in "
        f"{counted('MLP', scheme)}; reverse probability {probability(scheme, False)} with {depths} layers, "
        f"{probability(scheme, True)} with MLPs"
        for scheme in DEPTH_SCHEMES
    ]
    return f"Layers above the null at the end of training, adjusted for looking at all of them. {'. '.join(said)}."


def draw(result: Result) -> go.Figure:
    frame = result.frame.assign(layer_number=result.frame["layer"] + 1)
    settings = [(scheme, mlp) for scheme in DEPTH_SCHEMES for mlp in (False, True)]
    bottom = [{} if mlp else None for _, mlp in settings]  # without an MLP there is no gradient of it
    figure = make_subplots(
        6,
        len(settings),
        specs=[[{}] * len(settings)] * 5 + [bottom],
        subplot_titles=[f"{scheme}, {'with MLP' if mlp else 'attention only'}" for scheme, mlp in settings],
        horizontal_spacing=0.03,
        vertical_spacing=0.048,
    )
    figure.update_yaxes(range=[-1.05, 1.05])
    figure.update_yaxes(range=[-0.03, 1.03], row=1)
    scores = frame[["evidence", "evidence_null"]]
    figure.update_yaxes(range=[scores.min(axis=None) - 0.2, scores.max(axis=None) + 0.2], row=3)
    layers = list(range(1, max(DEPTHS) + 1))
    for col, (scheme, mlp) in enumerate(settings, start=1):
        group, last = where(frame, scheme=scheme, mlp=mlp), 6 if mlp else 5
        _draw_probabilities(figure, where(group, layer=0), col)
        for row, (signature, name) in enumerate(SIGNATURES.items(), start=2):
            if row <= last:
                first = col == 1 or (row == 6 and col == 2)
                _draw_signature(figure, group, signature, row, col)
                figure.update_yaxes(title_text=name if first else None, showticklabels=first, row=row, col=col)
                at = {"tickvals": layers, "range": [0.6, max(DEPTHS) + 0.4], "showticklabels": row == last}
                figure.update_xaxes(at, title_text="layer" if row == last else None, row=row, col=col)
        figure.update_yaxes(showticklabels=col == 1, row=1, col=col)
    figure.update_xaxes(title_text="layers of the model", tickvals=DEPTHS, row=1)
    figure.update_yaxes(title_text="probability of<br>answer", row=1, col=1)
    figure.update_layout(legend=legend_at(0.5, -0.045), legend2=legend_at(0.5, -0.07))
    figure.update_layout(height=1750)
    return figure


def _draw_probabilities(figure: go.Figure, models: pd.DataFrame, col: int) -> None:
    for side, color, shift in (("forward", FORWARD, 0.0), ("reverse", REVERSE, 0.08)):
        for stage, dash in SHOWN_STAGES.items():
            points = curve(where(models, stage=stage), "n_layers", f"{side}_probability")
            name, legend = f"{side} query, {stage}", "legend" if col == 1 else None
            place: dict[str, Any] = {"row": 1, "col": col, "shift": shift, "legend": legend}
            add_points(figure, points, "n_layers", name=name, color=color, dash=dash, **place)
    legend, chance = "legend" if col == 1 else None, models["chance"].iloc[0]
    add_level(figure, DEPTHS, chance, name="chance", color=CHANCE, row=1, col=col, legend=legend)


def _draw_signature(figure: go.Figure, group: pd.DataFrame, signature: str, row: int, col: int) -> None:
    legend = "legend2" if row == 2 and col == 1 else None
    for i, (n_layers, color) in enumerate(COLORS.items()):
        models = where(group, n_layers=n_layers)
        place: dict[str, Any] = {"row": row, "col": col, "shift": 0.08 * (i - 1), "legend": legend}
        for stage, dash in SHOWN_STAGES.items():
            points, name = curve(where(models, stage=stage), "layer_number", signature), f"{n_layers}-layer, {stage}"
            add_points(figure, points, "layer_number", name=name, color=color, dash=dash, **place)
        place["legend"] = legend if n_layers == max(DEPTHS) else None
        points = curve(where(models, stage="end"), "layer_number", f"{signature}_null")
        add_points(figure, points, "layer_number", name="null at the end", color=GREY, dash="dot", **place)


ANALYSIS = Analysis(
    name="depth",
    question="Do the signatures survive in deeper models with MLPs?",
    configs=depth_grid,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=80,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
