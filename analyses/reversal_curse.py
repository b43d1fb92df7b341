"""Forward and reverse probability over training: MDMs under four position schemes, and an ARM.

In `relation_cycle` every entity is the source on both sides of a mask, in one fact on the left and in another on the
right, so training shows both its routes; in `two_role` it is the source on one side only. With several heads each side
can get a head of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, all_checkpoints, metrics_at, where
from mdm_interp.experiments.grids import MANY_HEADS, MDM_SCHEMES, VARIANTS, grid, head_grid, variant_of
from mdm_interp.viz import CHANCE, FORWARD, PROBABILITY, REVERSE, TRAINING_STEPS, Panels

SETTINGS = {
    "relation_cycle": "relation_cycle, 1 head",
    f"relation_cycle, {MANY_HEADS} heads": f"relation_cycle, {MANY_HEADS} heads",
    "two_role": "two_role, 1 head",
}
"""The rows of panels: what rows and summary call them, and how readers know them."""


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

    def said(setting: str) -> str:
        found: dict[str, dict[str, float]] = {"yes": {}, "no": {}, "undecided": {}}
        for variant in VARIANTS:
            of = {"setting": setting, "variant": variant}
            above = result.summary.at("above_chance", **of)
            answer = {"above": "yes", "below": "no"}.get(above.side, "undecided")
            found[answer][variant] = result.summary.at("reverse_probability", **of).value
        listed = ", ".join(f"{answer} for {_listed(values)}" for answer, values in found.items() if values)
        return f"{SETTINGS[setting]}: {listed}"

    return (
        f"{'; '.join(map(said, SETTINGS))} (yes: above chance). "
        "In relation_cycle every entity is a source on both sides, in two_role on one."
    )


def _listed(values: Mapping[str, float]) -> str:
    """List variants and their values; the MDMs, which come first, in one if all are there."""
    listed = [f"{variant} ({value:.2g})" for variant, value in values.items()]
    mdms = [value for variant, value in values.items() if variant.startswith("MDM")]
    if len(mdms) == len(MDM_SCHEMES):
        listed[: len(mdms)] = [f"every MDM ({min(mdms):.2g} to {max(mdms):.2g})"]
    return ", ".join(listed).replace("), MDM ", "), ").replace("ARM rope", "ARM")


def draw(result: Result) -> Panels:
    panels, frame = Panels(), result.frame[result.frame["step"] > 0]
    for setting, title in SETTINGS.items():
        first, last = setting == next(iter(SETTINGS)), setting == list(SETTINGS)[-1]
        y = {**PROBABILITY, "title": f"{title}<br>probability of answer"}
        row = panels.row(list(VARIANTS) if first else [""] * len(VARIANTS), x=TRAINING_STEPS, y=y, ticks=last)
        for panel, variant in zip(row, VARIANTS, strict=True):
            group = where(frame, setting=setting, variant=variant)
            for side, color, dash in (("forward", FORWARD, "solid"), ("reverse", REVERSE, "dash")):
                panel.curve(group, "step", f"{side}_probability", name=f"{side} query", color=color, dash=dash)
            panel.level(group["chance"].max(), name="chance: the answer's role known, nothing else", color=CHANCE)
            value = result.summary.at("reverse_probability", setting=setting, variant=variant).value
            panel.note(f"ends at {value:.2f}", 0.02, 0.93, font={"color": REVERSE}, xanchor="left")
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
