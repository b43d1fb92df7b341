"""Alignment of forward and reverse gradients over training, per component, against mismatched pairs; and the storage
term that evidence alone passes from one to the other."""

from __future__ import annotations

from typing import Any

from mdm_interp import Analysis, Result, Run, Summary, first_and_last, where
from mdm_interp.experiments.grids import VARIANTS, cycle_grid, variant_of
from mdm_interp.experiments.scope import second_checkpoints
from mdm_interp.measures.evidence import storage_coupling
from mdm_interp.measures.gradients import direction_cosine, gradient_alignment, mean_gradient
from mdm_interp.viz import (
    BLUE,
    CHANCE,
    CORRELATION,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TRAINING_STEPS,
    VERMILION,
    Panels,
)

SHOWN = {"Q": ORANGE, "K": SKY, "V": GREEN, "O": PURPLE, "unembedding": VERMILION, "all": BLUE}


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per component; the storage term is in the rows of `all`."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    alignment = gradient_alignment(model, pairs)
    forward = mean_gradient(model, [pair.forward for pair in pairs])
    reverse = mean_gradient(model, [pair.reverse for pair in pairs])
    storage = storage_coupling(model, pairs).sum(2)[:, -1].mean().item()
    rows: list[dict[str, Any]] = []
    for component in (*alignment.components, "all"):
        within = None if component == "all" else [component]
        cosine = alignment.pair_cosine(within).map(lambda cosine: cosine.nanmean().item())
        rows.append(
            {
                "variant": variant_of(run.config),
                "component": component,
                "mean_gradient": direction_cosine(forward, reverse, within or alignment.components),
                "matched": cosine.effect,
                "mismatched": cosine.null,
                "storage_term": storage if component == "all" else float("nan"),
            }
        )
    return rows


def summarize(result: Result) -> Summary:
    whole = where(result.frame, component="all")
    whole = whole.assign(matched_null=whole["mismatched"])
    trained = whole[whole["step"] > 0].groupby(["variant", "seed"])
    aligned = trained.apply(last_aligned_step, include_groups=False).reset_index(name="last_aligned_step")
    return Summary.of(
        first_and_last(whole), ("variant", "stage"), ("mean_gradient", "matched", "storage_term")
    ) + Summary.of(aligned, ("variant",), ("last_aligned_step",))


def last_aligned_step(run: Any) -> float:
    """Return the last measured step up to which the cosine of the mean gradients has stayed at 0.5 or above."""
    ordered = run.sort_values("step")
    aligned = (ordered["mean_gradient"] >= 0.5).cumprod().astype(bool)
    return float(ordered.loc[aligned, "step"].max()) if aligned.any() else 0.0


def takeaway(result: Result) -> str:
    def value(variant: str, stage: str, quantity: str) -> float:
        return result.summary.at(quantity, variant=variant, stage=stage).value

    def moved(variant: str) -> str:
        initial, end = (value(variant, stage, "mean_gradient") for stage in ("initial", "end"))
        return f"{initial:.2f} to {end:.2f} ({variant})"

    least = min(value(variant, "end", "storage_term") for variant in VARIANTS if variant.startswith("MDM"))
    return (
        f"The cosine of forward and reverse mean gradients goes from {', '.join(map(moved, VARIANTS))}. "
        f"The storage term ends at {least:.2g} or more in every MDM, at "
        f"{value('ARM rope', 'end', 'storage_term'):.2g} in the ARM."
    )


def draw(result: Result) -> Panels:
    panels, frame = Panels(), result.frame[result.frame["step"] > 0]
    untitled, highest = [""] * len(VARIANTS), frame["storage_term"].max()
    axes = (
        {**CORRELATION, "title": "cosine of mean<br>gradients"},
        {"range": [-0.35, 1.05], "title": "mean cosine per pair,<br>all parameters"},
        {"range": [-0.05 * highest, highest], "title": "storage term<br>(nats² / evidence²)"},
    )
    by_component = panels.row(list(VARIANTS), x=TRAINING_STEPS, y=axes[0], ticks=False)
    by_pair = panels.row(untitled, x=TRAINING_STEPS, y=axes[1], ticks=False)
    storage = panels.row(untitled, x=TRAINING_STEPS, y=axes[2])
    for i, variant in enumerate(VARIANTS):
        of_variant = where(frame, variant=variant)
        for component, color in SHOWN.items():
            rows = where(of_variant, component=component)
            by_component[i].curve(rows, "step", "mean_gradient", name=component, color=color)
        whole, null = where(of_variant, component="all"), "null: forward of one fact, reverse of another"
        by_pair[i].curve(whole, "step", "matched", name="same fact", color=BLUE)
        by_pair[i].curve(whole, "step", "mismatched", name=null, color=GREY)
        storage[i].curve(whole, "step", "storage_term", name="storage term", color=GREEN, listed=False)
        for panel in (by_component[i], by_pair[i], storage[i]):
            panel.level(0.0, name="zero", color=CHANCE, listed=False)
    return panels


ANALYSIS = Analysis(
    name="gradient_alignment",
    question="Does a step down the forward loss lower the reverse loss?",
    configs=cycle_grid,
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
