"""Forward and reverse probability over training: MDMs under four position schemes, and an ARM.

In `relation_cycle` every entity is the source on both sides of a mask, in one fact on the left and in another on the
right, so training shows both its routes; in `two_role` it is the source on one side only. With several heads each side
can get a head of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.config import TrainConfig
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import MANY_HEADS, MDM_SCHEMES, VARIANTS, grid, head_grid, variant_of
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import checkpoints, metrics_at
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level
from mdm_interp.viz.theme import CHANCE, FORWARD, REVERSE, legend_at

SETTINGS = {
    "relation_cycle": "relation_cycle, 1 head",
    f"relation_cycle, {MANY_HEADS} heads": f"relation_cycle, {MANY_HEADS} heads",
    "two_role": "two_role, 1 head",
}
"""The rows of panels: what rows and summary call them, and how readers know them."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    """The shared grid of one-head models, and those of `head_grid` that share the width out among `MANY_HEADS`."""
    contrast = [
        config
        for config in head_grid(seeds)
        if config.model.n_heads == MANY_HEADS and MANY_HEADS * config.model.head_dim == config.model.d_model
    ]
    return grid(seeds) + contrast


def setting_of(config: TrainConfig) -> str:
    """The name of a run's setting, as in `SETTINGS`."""
    world = config.facts.world
    return f"{world}, {MANY_HEADS} heads" if config.model.n_heads == MANY_HEADS else world


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """The metrics that training recorded."""
    return [{"setting": setting_of(run.config), "variant": variant_of(run.config), **metrics_at(run, step)}]


def summarize(result: Result) -> dict[str, Estimate]:
    frame = result.frame
    last = frame[frame["step"] == frame.groupby("run")["step"].transform("max")]
    summary = {}
    for setting in SETTINGS:
        for variant in VARIANTS:
            group, key = where(last, setting=setting, variant=variant), f"{setting} / {variant}"
            for quantity in ("forward_probability", "reverse_probability", "forward_accuracy", "reverse_accuracy"):
                summary[f"{key} / {quantity}"] = mean_estimate(group[quantity])
            above = group["reverse_probability"] - group["chance"]
            summary[f"{key} / reverse above chance"] = mean_estimate(above)
            gap = (group["forward_probability"] - group["reverse_probability"]).abs().max()
            summary[f"{key} / largest gap of any seed"] = Estimate(gap, gap, gap, len(group))
            peak = where(frame, setting=setting, variant=variant).groupby("seed")["reverse_probability"].max()
            summary[f"{key} / highest reverse_probability"] = mean_estimate(peak)
        summary[f"{setting} / chance"] = mean_estimate(where(last, setting=setting)["chance"])
    return summary


def takeaway(result: Result) -> str:
    """Say who answers in reverse above chance: yes if the whole interval is above it, no if all of it is below,
    undecided otherwise, as for a single seed."""
    summary = result.summary

    def said(setting: str) -> str:
        found: dict[str, dict[str, float]] = {"yes": {}, "no": {}, "undecided": {}}
        for variant in VARIANTS:
            above = summary[f"{setting} / {variant} / reverse above chance"]
            answer = "yes" if above.low > 0 else "no" if above.high < 0 else "undecided"
            found[answer][variant] = summary[f"{setting} / {variant} / reverse_probability"].value
        listed = ", ".join(f"{answer} for {_listed(values)}" for answer, values in found.items() if values)
        return f"{SETTINGS[setting]}: {listed}"

    return (
        f"{'; '.join(map(said, SETTINGS))} (yes: above chance). "
        "In relation_cycle every entity is a source on both sides, in two_role on one."
    )


def _listed(values: Mapping[str, float]) -> str:
    """Variants and their values; the MDMs, which come first, in one if all are there."""
    listed = [f"{variant} ({value:.2g})" for variant, value in values.items()]
    mdms = [value for variant, value in values.items() if variant.startswith("MDM")]
    if len(mdms) == len(MDM_SCHEMES):
        listed[: len(mdms)] = [f"every MDM ({min(mdms):.2g} to {max(mdms):.2g})"]
    return ", ".join(listed).replace("), MDM ", "), ").replace("ARM rope", "ARM")


def draw(result: Result) -> go.Figure:
    variants = list(VARIANTS)
    figure = make_subplots(
        len(SETTINGS),
        len(variants),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=variants,
        horizontal_spacing=0.02,
        vertical_spacing=0.05,
    )
    frame = result.frame[result.frame["step"] > 0]
    for row, (setting, title) in enumerate(SETTINGS.items(), start=1):
        for col, variant in enumerate(variants, start=1):
            group = where(frame, setting=setting, variant=variant)
            at: dict[str, Any] = {"row": row, "col": col, "legend": "legend" if row == col == 1 else None}
            for side, color, dash in (("forward", FORWARD, "solid"), ("reverse", REVERSE, "dash")):
                points = curve(group, "step", f"{side}_probability")
                add_curve(figure, points, "step", name=f"{side} query", color=color, dash=dash, **at)
            steps, chance = group["step"].tolist(), group["chance"].iloc[0]
            add_level(figure, steps, chance, name="chance: the answer's role known, nothing else", color=CHANCE, **at)
            value = result.summary[f"{setting} / {variant} / reverse_probability"].value
            ends = {"text": f"ends at {value:.2f}", "font": {"color": REVERSE}, "showarrow": False}
            figure.add_annotation(ends, x=0.02, y=0.93, xref="x domain", yref="y domain", row=row, col=col)
        figure.update_yaxes(title_text=f"{title}<br>probability of answer", row=row, col=1)
    figure.update_xaxes(TRAINING_STEPS)
    figure.update_xaxes(title_text="training step", row=len(SETTINGS))
    figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_layout(legend=legend_at(0.5, -0.09))
    figure.update_layout(height=1050)
    return figure


ANALYSIS = Analysis(
    name="reversal_curse",
    question="Does a model that learned facts forward answer them in reverse?",
    configs=configs,
    measure=measure,
    when=checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=10,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
