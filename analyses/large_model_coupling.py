"""Alignment of forward and reverse gradients of natural-language facts, layer by layer, against other facts' reverse
gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.experiments.analysis import CheckpointAnalysis
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe, demos
from mdm_interp.measures.gradients.alignment import ROUTING, STORAGE
from mdm_interp.measures.gradients.layers import layer_alignment
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import FactSample, places_above
from mdm_interp.stats.tables import estimate_in, where
from mdm_interp.viz.plots import add_curve, add_level
from mdm_interp.viz.theme import CHANCE, GREEN, ORANGE, SKY, legend_at

GROUPS = {"storage (V, O)": STORAGE, "routing (Q, K)": ROUTING, "MLP": ("MLP",)}
"""What is shown of each layer."""
WHOLE = {
    "embedding": ("embedding",),
    "unembedding": ("unembedding",),
    "all": ("embedding", "position", "Q", "K", "V", "O", "norms", "MLP", "unembedding"),
}
"""What is measured over all layers together."""
COLORS = {"storage (V, O)": GREEN, "routing (Q, K)": ORANGE, "MLP": SKY}


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give one row per checkpoint, kind, layer and group of components, and one per group over all layers (layer null).

    `null` is the cosine with another fact's reverse gradient, `p` the one-sided chance of so large an excess of the
    mean cosine over it if there were none, not adjusted, and `positive` the share of cosines above 0. `n` and `null_n`
    count the independent clusters of facts behind a cosine, and `facts` and `clusters` all there are.
    """
    rows: list[dict[str, Any]] = []
    layers = list(range(probe.model.cfg.n_layers))
    for kind in KINDS:
        pairs = probe.pairs(kind)
        alignment, sample = layer_alignment(probe.model, pairs), FactSample.of(pairs)
        present = {component for _, component in alignment.parts}
        places = [(layer, [layer], name, GROUPS[name]) for layer in layers for name in GROUPS]
        places += [(None, [None, *layers], name, parts) for name, parts in (GROUPS | WHOLE).items()]
        for layer, within, name, components in places:
            if not present & set(components):
                continue
            own, control = alignment.cosine(within, components)
            (matched,), (null,) = sample.mean(own).estimates(), sample.mean(control).estimates()
            rows.append(
                {
                    "kind": kind,
                    "layer": layer,
                    "group": name,
                    "cosine": matched.value,
                    "low": matched.low,
                    "high": matched.high,
                    "null": null.value,
                    "null_low": null.low,
                    "null_high": null.high,
                    **sample.counts,
                    "n": matched.n,
                    "null_n": null.n,
                    "p": sample.mean(own - control).p_above_zero.item(),
                    "positive": sample.mean((own > 0).double()).value.item(),
                }
            )
    return rows


def summarize(result: Result) -> dict[str, Estimate]:
    """Give the cosines of all layers together, and the share of layers in which a group's exceeds its null, all layers
    looked at (:func:`~mdm_interp.stats.resampling.places_above`); a share has no interval."""
    whole = result.frame[result.frame["layer"].isna()]
    summary = {}
    for row in whole.to_dict("records"):
        name = f"{row['checkpoint']} / {row['kind']} / {row['group']}"
        named = {**row, "value": row["cosine"], "null_value": row["null"]}
        summary[name], summary[f"{name} / null"] = estimate_in(named), estimate_in(named, "null_")
    for (checkpoint, kind), layers in result.frame.dropna(subset="layer").groupby(["checkpoint", "kind"], sort=False):
        for group in GROUPS:
            of_group = where(layers, group=group)
            if of_group["p"].notna().any():
                share = float(places_above(of_group["p"]).mean())
                name = f"{checkpoint} / {kind} / {group} / share of layers above the null"
                summary[name] = Estimate(share, np.nan, np.nan, int(of_group["n"].min()))
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary
    said = []
    for name, own in summary.items():
        checkpoint, kind, *what = name.split(" / ")
        if what == ["storage (V, O)"]:
            null, share = summary[f"{name} / null"], summary.get(f"{name} / share of layers above the null")
            layers = f", above it in {share.value:.0%} of layers" if share else ""
            said.append(f"{own.value:.2g} against {null.value:.2g}{layers} ({checkpoint}, {kind})")
    cosines = "; ".join(said)
    return (
        f"Cosine of forward and reverse gradients in V and O of all layers, own fact against another's: {cosines}. Of "
        "the layers counted at most 5 % are expected to be there by chance, all layers looked at."
    )


def panels(result: Result) -> list[tuple[str, str]]:
    """Checkpoint and kind of each panel."""
    return list(dict.fromkeys(zip(result.frame["checkpoint"], result.frame["kind"], strict=True)))


def draw(result: Result) -> go.Figure:
    checkpoints = list(dict.fromkeys(result.frame["checkpoint"]))
    figure = make_subplots(
        len(checkpoints),
        len(KINDS),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[f"{checkpoint}, {kind} reverse" for checkpoint in checkpoints for kind in KINDS],
        horizontal_spacing=0.04,
        vertical_spacing=0.25 / len(checkpoints),
    )
    layered = result.frame.dropna(subset="layer")
    for checkpoint, kind in panels(result):
        row, col = checkpoints.index(checkpoint) + 1, KINDS.index(kind) + 1
        legend = "legend" if (row, col) == (1, 1) else None
        of_panel = where(layered, checkpoint=checkpoint, kind=kind)
        for group, color in COLORS.items():
            of_group = where(of_panel, group=group)
            own = of_group.rename(columns={"cosine": "value"})
            null = of_group[["layer", "null", "null_low", "null_high", "null_n"]].set_axis(
                ["layer", "value", "low", "high", "n"], axis=1
            )
            add_curve(figure, own, "layer", name=group, color=color, row=row, col=col, legend=legend)
            name = f"null: {group} of another fact"
            add_curve(figure, null, "layer", name=name, color=color, row=row, col=col, dash="dot", legend=legend)
        if len(of_panel):
            add_level(figure, of_panel["layer"].tolist(), 0.0, name="zero", color=CHANCE, row=row, col=col)
    figure.update_yaxes(title_text="cosine", col=1)
    figure.update_xaxes(title_text="layer", row=len(checkpoints))
    figure.update_xaxes(dtick=1 if layered["layer"].max() < 12 else 4)
    height = 330 + 330 * len(checkpoints)
    figure.update_layout(legend=legend_at(0.5, -95 / (height - 300)))
    figure.update_layout(height=height)
    return figure


ANALYSIS = CheckpointAnalysis(
    name="large_model_coupling",
    question="In which layers does a step down a fact's forward loss lower its reverse loss?",
    configs=demos,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=230,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
