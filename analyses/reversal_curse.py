"""Forward and reverse probability over training: MDMs under four position schemes, and an ARM, in two worlds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.analysis import Analysis
from mdm_interp.presets import VARIANTS, WORLDS, grid, variant_of
from mdm_interp.results import Result
from mdm_interp.runs import Run
from mdm_interp.stats import Estimate, bootstrap_mean, curve, where
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level
from mdm_interp.viz.theme import CHANCE, FORWARD, REVERSE, legend_at, titled

TITLES = {"relation_cycle": "relation_cycle, random filler", "two_role": "two_role, no filler"}


def measure(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The metrics that training recorded, one row per run and checkpoint."""
    return [
        {
            "world": run.config.facts.world,
            "variant": variant_of(run.config),
            "seed": run.config.seed,
            "run": run.folder.name,
            "chance": run.facts.chance,
            **metrics,
        }
        for run in runs
        for metrics in run.metrics()
    ]


def summarize(result: Result) -> dict[str, Estimate]:
    frame = result.frame
    last = frame[frame["step"] == frame.groupby("run")["step"].transform("max")]
    summary = {}
    for world in WORLDS:
        for variant in VARIANTS:
            group = where(last, world=world, variant=variant)
            for quantity in ("forward_probability", "reverse_probability", "forward_accuracy", "reverse_accuracy"):
                summary[f"{world} / {variant} / {quantity}"] = bootstrap_mean(group[quantity])
            gap = (group["forward_probability"] - group["reverse_probability"]).abs().max()
            summary[f"{world} / {variant} / largest gap of any seed"] = Estimate(gap, gap, gap, len(group))
            path = where(frame, world=world, variant=variant)
            peak = path.groupby("seed")["reverse_probability"].max()
            summary[f"{world} / {variant} / highest reverse_probability"] = bootstrap_mean(peak)
        summary[f"{world} / chance"] = bootstrap_mean(where(last, world=world)["chance"])
    return summary


def takeaway(summary: dict[str, Estimate]) -> str:
    def reverse(variant: str) -> str:
        return f"{summary[f'relation_cycle / {variant} / reverse_probability'].value:.2g}"

    listed = ", ".join(f"{reverse(variant)} ({variant})" for variant in VARIANTS)
    peak = summary["relation_cycle / MDM rope / highest reverse_probability"].value
    chance = summary["relation_cycle / chance"].value
    return (
        f"relation_cycle, end of training: reverse probability is {listed}; chance is {chance:.2g}. "
        f"MDM rope's reverse probability rose to {peak:.2g} on its way."
    )


def draw(result: Result) -> go.Figure:
    worlds, variants = list(WORLDS), list(VARIANTS)
    titles = [f"{variant}" for variant in variants] + [""] * len(variants)
    figure = make_subplots(
        len(worlds),
        len(variants),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=titles,
        horizontal_spacing=0.02,
        vertical_spacing=0.07,
    )
    frame = result.frame[result.frame["step"] > 0]
    for row, world in enumerate(worlds, start=1):
        for col, variant in enumerate(variants, start=1):
            group = where(frame, world=world, variant=variant)
            legend = "legend" if row == col == 1 else None
            for side, color, dash in (("forward", FORWARD, "solid"), ("reverse", REVERSE, "dash")):
                points = curve(group, "step", f"{side}_probability")
                add_curve(
                    figure,
                    points,
                    "step",
                    name=f"{side} query",
                    color=color,
                    row=row,
                    col=col,
                    dash=dash,
                    legend=legend,
                )
            add_level(
                figure,
                group["step"].tolist(),
                group["chance"].iloc[0],
                name="chance: the answer's role known, nothing else",
                color=CHANCE,
                row=row,
                col=col,
                legend=legend,
            )
        figure.update_yaxes(title_text=f"{TITLES[world]}<br>probability of answer", row=row, col=1)
    figure.update_xaxes(TRAINING_STEPS)
    figure.update_xaxes(title_text="training step", row=len(worlds))
    figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_layout(legend=legend_at(0.5, -0.13))
    return titled(figure, result.question, takeaway(result.summary), height=800)


ANALYSIS = Analysis(
    name="reversal_curse",
    question="Does a model that learned facts forward answer them in reverse?",
    configs=grid,
    measure=measure,
    summarize=summarize,
    draw=draw,
    order=10,
)

if __name__ == "__main__":
    ANALYSIS.main()
