"""Alignment of forward and reverse gradients over training, per component, against mismatched pairs; and the storage
term that evidence alone passes from one to the other."""

from __future__ import annotations

from typing import Any

from mdm_interp import Analysis, Result, Run, Summary, first_and_last, where
from mdm_interp.experiments.grids import SIDELESS, VARIANTS, cycle_grid, variant_of
from mdm_interp.experiments.scope import second_checkpoints
from mdm_interp.measures.evidence import storage_coupling
from mdm_interp.measures.gradients import direction_cosine, gradient_alignment, mean_gradient
from mdm_interp.stats.tables import curve
from mdm_interp.viz import (
    CHANCE,
    CORRELATION,
    MAGENTA,
    PART_COLORS,
    TRAINING_STEPS,
    VARIANT_COLORS,
    Panels,
    between,
    opening,
    sample_size,
    shown,
    told,
    with_n,
)
from mdm_interp.viz.words import ANSWER

COMPONENTS = {
    "Q": (PART_COLORS["routing"], "solid"),
    "K": (PART_COLORS["routing"], "dash"),
    "V": (PART_COLORS["storage"], "solid"),
    "O": (PART_COLORS["storage"], "dash"),
    "unembedding": (PART_COLORS["unembedding"], "solid"),
}
"""The components that the figure shows, and how."""
SIDED = [variant for variant, (scheme, _) in VARIANTS.items() if scheme not in SIDELESS]
"""Whose forward and reverse gradients differ: without sides both queries are one."""


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
    """Say for whom the cosine of both mean gradients ends above 0, and who comes lowest in between."""
    at_end = {variant: result.summary.at("mean_gradient", variant=variant, stage="end") for variant in VARIANTS}
    mdms = [variant for variant in VARIANTS if variant.startswith("MDM")]
    whole = where(result.frame, component="all")
    lowest = {variant: curve(where(whole, variant=variant), "step", "mean_gradient")["value"].min() for variant in mdms}
    least = min(mdms, key=lambda variant: lowest[variant])
    answers = told({variant: ANSWER[estimate.side] for variant, estimate in at_end.items()})
    return (
        f"{opening(answers)}. At the end of training the cosine of the mean forward and reverse gradient is "
        f"{between(at_end[variant].value for variant in mdms)} in MDMs and {at_end['ARM rope'].value:.2f} in the ARM "
        f"({sample_size(at_end.values())}). Of the MDMs, {shown(least).removeprefix('MDM ')} comes lowest on the way, "
        f"at {lowest[least]:.2f}."
    )


def draw(result: Result) -> Panels:
    panels, frame = Panels(), result.frame[result.frame["step"] > 0]
    (main,) = panels.row(
        ["all parameters"],
        x=TRAINING_STEPS,
        y={**CORRELATION, "title": "cosine of mean forward<br>and reverse gradient"},
        height=330,
    )
    whole = where(frame, component="all")
    for variant, color in VARIANT_COLORS.items():
        group, dash = where(whole, variant=variant), "dash" if variant == "MDM none" else "solid"  # as ALiBi
        main.curve(group, "step", "mean_gradient", name=with_n(variant, group), color=color, dash=dash)
    main.level(0.0, name="unrelated", color=CHANCE)
    highest, untitled = frame["storage_term"].max(), [""] * len(VARIANTS)
    pairs = {"range": [-0.35, 1.05], "title": "mean cosine<br>per pair"}
    term = {"range": [-0.05 * highest, highest], "title": "storage term<br>(nats² / evidence²)"}
    titles = [f"{shown(variant)}, by component" for variant in SIDED]
    by_component = panels.row(titles, x=TRAINING_STEPS, y={**CORRELATION, "title": "cosine"}, height=180)
    for panel, variant in zip(by_component, SIDED, strict=True):
        for component, (color, dash) in COMPONENTS.items():
            rows = where(frame, variant=variant, component=component)
            panel.curve(rows, "step", "mean_gradient", name=component, color=color, dash=dash)
        panel.level(0.0, name="zero", color=CHANCE, listed=False)
    by_pair = panels.row(list(map(shown, VARIANTS)), x=TRAINING_STEPS, y=pairs, ticks=False, height=150)
    storage = panels.row(untitled, x=TRAINING_STEPS, y=term, height=150)
    for pair, stored, variant in zip(by_pair, storage, VARIANTS, strict=True):
        rows, null = where(whole, variant=variant), "null: forward of one fact, reverse of another"
        pair.curve(rows, "step", "matched", name="same fact", color=MAGENTA)
        pair.curve(rows, "step", "mismatched", name=null, color=CHANCE, dash="dash")
        stored.curve(rows, "step", "storage_term", name="storage term", color=PART_COLORS["storage"], listed=False)
        for panel in (pair, stored):
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
