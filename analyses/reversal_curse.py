"""Forward and reverse probability over training: MDMs under four position schemes, and an ARM.

In `relation_cycle` every entity is the source on both sides of a mask, in one fact on the left and in another on the
right, so training shows both its routes; in `two_role` it is the source on one side only. With several heads each side
can get a head of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, all_checkpoints, metrics_at, where
from mdm_interp.experiments.grids import MANY_HEADS, VARIANTS, grid, head_grid, variant_of
from mdm_interp.viz import CHANCE, FORWARD, PROBABILITY, REVERSE, TRAINING_STEPS, Panels, sample_size, shown, told
from mdm_interp.viz.words import ANSWER

SETTINGS = {
    "relation_cycle": "relation_cycle, 1 head",
    f"relation_cycle, {MANY_HEADS} heads": f"relation_cycle, {MANY_HEADS} heads",
    "two_role": "two_role, 1 head",
}
"""The rows of panels: what rows and summary call them, and how readers know them."""
PLACES = ("With 1 head", f"With {MANY_HEADS} heads", "In two_role (sources on one side)")
"""How sentences know them."""


PROBABILITIES = ("forward_probability", "reverse_probability", "forward_accuracy", "reverse_accuracy")


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    """Give the shared grid of one-head models, and those of `head_grid` that share the width out among `MANY_HEADS`."""
    contrast = [
        config
        for config in head_grid(seeds)
        if config.model.n_heads == MANY_HEADS and MANY_HEADS * config.model.head_dim == config.model.d_model
    ]
    return grid(seeds) + contrast


def setting_of(config: TrainConfig) -> str:
    """Return the name of a run's setting, as in `SETTINGS`."""
    world = config.facts.world
    return f"{world}, {MANY_HEADS} heads" if config.model.n_heads == MANY_HEADS else world


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give the metrics that training recorded."""
    return [{"setting": setting_of(run.config), "variant": variant_of(run.config), **metrics_at(run, step)}]


def summarize(result: Result) -> Summary:
    frame, by = result.frame, ("setting", "variant")
    last = frame[frame["step"] == frame.groupby("run")["step"].transform("max")]
    last = last.assign(above_chance=last["reverse_probability"] - last["chance"])
    peaks = frame.groupby([*by, "seed"], sort=False)["reverse_probability"].max().reset_index(name="highest_reverse")
    return Summary.of(last, by, (*PROBABILITIES, "above_chance")) + Summary.of(peaks, by, ("highest_reverse",))


def takeaway(result: Result) -> str:
    """Say who answers in reverse above chance: yes if the whole interval is above it, no if all of it is below,
    undecided otherwise, as for a single seed."""
    summary, said = result.summary, []
    for setting, place in zip(SETTINGS, PLACES, strict=True):
        above = {variant: summary.at("above_chance", setting=setting, variant=variant) for variant in VARIANTS}
        answers = told({variant: ANSWER[estimate.side] for variant, estimate in above.items() if estimate.n})
        said.append(f"{place}: {answers}.")
    n = sample_size(entry.effect for entry in summary.where("above_chance"))
    return f"{' '.join(said)} (Yes: above chance; {n}.)"


QUERIES = {"forward": (FORWARD, "solid", -0.14), "reverse": (REVERSE, "dash", 0.14)}


def draw(result: Result) -> Panels:
    panels, chance = Panels(), "chance: the answer's role known, nothing else"
    frame = result.frame[result.frame["step"] > 0]
    row = panels.row(
        list(SETTINGS.values()),
        y={**PROBABILITY, "title": "probability of answer,<br>end of training"},
        x={"title": "model (n: seeds)"},
        height=330,
        ticks_height=3 * 26,
    )
    for panel, setting in zip(row, SETTINGS, strict=True):
        group = where(frame, setting=setting)
        for side, (color, _, shift) in QUERIES.items():
            found = {}
            for variant in VARIANTS:
                estimate = result.summary.at(f"{side}_probability", setting=setting, variant=variant)
                found[f"{shown(variant).replace(' ', '<br>')}<br>n = {estimate.n}"] = estimate
            panel.estimates(found, name=f"{side} query", color=color, shift=shift, size=12, upright=True)
        panel.level(group["chance"].max(), name=chance, color=CHANCE, x=[-0.5, len(VARIANTS) - 0.5])
    for setting, title in SETTINGS.items():
        first, last = setting == next(iter(SETTINGS)), setting == list(SETTINGS)[-1]
        y = {**PROBABILITY, "title": title.replace(", ", ",<br>")}
        titles = [shown(variant) if first else "" for variant in VARIANTS]
        row = panels.row(titles, x=TRAINING_STEPS, y=y, ticks=last, height=140)
        for panel, variant in zip(row, VARIANTS, strict=True):
            group = where(frame, setting=setting, variant=variant)
            for side, (color, dash, _) in QUERIES.items():
                name, y = f"{side} query", f"{side}_probability"
                panel.curve(group, "step", y, name=name, color=color, dash=dash, listed=False)
            panel.level(group["chance"].max(), name=chance, color=CHANCE, listed=False)
    return panels


ANALYSIS = Analysis(
    name="reversal_curse",
    question="Does a model that learned facts forward answer them in reverse?",
    configs=configs,
    measure=measure,
    when=all_checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=10,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
