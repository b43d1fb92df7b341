"""Alignment of forward and reverse gradients over training, per component, against mismatched pairs; and the storage
term that evidence alone passes from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.config import TrainConfig
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import VARIANTS, grid, variant_of
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import second_checkpoints
from mdm_interp.measures.evidence import storage_coupling
from mdm_interp.measures.gradients.alignment import gradient_alignment
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level
from mdm_interp.viz.theme import BLUE, CHANCE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, legend_at

SHOWN = {"Q": ORANGE, "K": SKY, "V": GREEN, "O": PURPLE, "unembedding": VERMILION, "all": BLUE}


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return grid(seeds, ["relation_cycle"])


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """One row per component; the storage term is in the rows of `all`."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    alignment = gradient_alignment(model, pairs)
    mean, matched, mismatched = alignment.mean_cosine(), alignment.matched(), alignment.mismatched()
    storage = storage_coupling(model, pairs).sum(2)[:, -1].mean().item()
    return [
        {
            "variant": variant_of(run.config),
            "component": component,
            "mean_gradient": mean[i].item(),
            "matched": matched[i].nanmean().item(),
            "mismatched": mismatched[i].nanmean().item(),
            "storage_term": storage if component == "all" else float("nan"),
        }
        for i, component in enumerate(alignment.components)
    ]


def summarize(result: Result) -> dict[str, Estimate]:
    frame = result.frame
    summary = {}
    for variant in VARIANTS:
        whole = where(frame, variant=variant, component="all")
        for stage, step in (("initial", frame["step"].min()), ("final", frame["step"].max())):
            at = where(whole, step=step)
            for quantity in ("mean_gradient", "matched", "mismatched", "storage_term"):
                summary[f"{variant} / {stage} {quantity}"] = mean_estimate(at[quantity])
        positive = whole[whole["step"] > 0].groupby("seed").apply(last_aligned_step, include_groups=False)
        summary[f"{variant} / last step before mean_gradient first falls below 0.5"] = mean_estimate(positive)
    return summary


def last_aligned_step(run: Any) -> float:
    """The last measured step up to which the cosine of the mean gradients has stayed at 0.5 or above."""
    ordered = run.sort_values("step")
    aligned = (ordered["mean_gradient"] >= 0.5).cumprod().astype(bool)
    return float(ordered.loc[aligned, "step"].max()) if aligned.any() else 0.0


def takeaway(result: Result) -> str:
    summary = result.summary

    def moved(variant: str) -> str:
        initial, final = (summary[f"{variant} / {stage} mean_gradient"].value for stage in ("initial", "final"))
        return f"{initial:.2f} to {final:.2f} ({variant})"

    least = min(summary[f"{variant} / final storage_term"].value for variant in VARIANTS if variant.startswith("MDM"))
    cosines, arm = ", ".join(map(moved, VARIANTS)), summary["ARM rope / final storage_term"].value
    return (
        f"The cosine of forward and reverse mean gradients goes from {cosines}. "
        f"The storage term ends at {least:.2g} or more in every MDM, at {arm:.2g} in the ARM."
    )


def draw(result: Result) -> go.Figure:
    variants = list(VARIANTS)
    figure = make_subplots(
        3,
        len(variants),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=variants,
        horizontal_spacing=0.02,
        vertical_spacing=0.11,
    )
    frame = result.frame[result.frame["step"] > 0]
    for col, variant in enumerate(variants, start=1):
        of_variant = where(frame, variant=variant)
        steps = of_variant["step"].tolist()
        legends = ("legend", "legend2") if col == 1 else (None, None)
        for component, color in SHOWN.items():
            points = curve(where(of_variant, component=component), "step", "mean_gradient")
            add_curve(figure, points, "step", name=component, color=color, row=1, col=col, legend=legends[0])
        whole = where(of_variant, component="all")
        for quantity, name, color in (
            ("matched", "same fact", BLUE),
            ("mismatched", "null: forward of one fact, reverse of another", GREY),
        ):
            points = curve(whole, "step", quantity)
            add_curve(figure, points, "step", name=name, color=color, row=2, col=col, legend=legends[1])
        points = curve(whole, "step", "storage_term")
        add_curve(figure, points, "step", name="storage term", color=GREEN, row=3, col=col)
        for row in (1, 2, 3):
            add_level(figure, steps, 0.0, name="zero", color=CHANCE, row=row, col=col)
    figure.update_yaxes(title_text="cosine of mean<br>gradients", range=[-1.05, 1.05], row=1, col=1)
    figure.update_yaxes(title_text="mean cosine per pair,<br>all parameters", range=[-0.35, 1.05], row=2, col=1)
    highest = frame["storage_term"].max()
    figure.update_yaxes(
        title_text="storage term<br>(nats² / evidence²)", range=[-0.05 * highest, highest], row=3, col=1
    )
    figure.update_xaxes(TRAINING_STEPS)
    figure.update_xaxes(title_text="training step", row=3)
    figure.update_layout(legend=legend_at(0.5, 0.705), legend2=legend_at(0.5, 0.34))
    figure.update_layout(height=1150)
    return figure


ANALYSIS = Analysis(
    name="gradient_alignment",
    question="Does a step down the forward loss lower the reverse loss?",
    configs=configs,
    measure=measure,
    when=second_checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=40,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
