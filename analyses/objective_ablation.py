"""Forward and reverse probability when training masks any entity, only one of the two, or predicts from left to right:
every objective under every position scheme.

In this world every entity is in two facts. Under single-sided masking a source has one answer only; under any-order
masking it has two, which the model may tell apart by the relation or by the side of the mask. A reverse query that is
answered under one and not under the other may owe it to that, not to the number of orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, all_checkpoints, metrics_at, where
from mdm_interp.config import Objective
from mdm_interp.experiments.grids import MDM_SCHEMES, objective_grid
from mdm_interp.experiments.scope import Moment, trained_stages
from mdm_interp.viz import (
    CHANCE,
    GOLD,
    INDIGO,
    MAGENTA,
    OLIVE,
    PROBABILITY,
    TRAINING_STEPS,
    Panel,
    Panels,
    between,
    sample_size,
    shown,
    with_n,
)

NAMES: dict[Objective, tuple[str, str, str]] = {
    "any_order": ("any order", MAGENTA, "solid"),
    "source_only": ("left entity masked", OLIVE, "solid"),
    "target_only": ("right entity masked", INDIGO, "dash"),  # often as the one before
    "causal": ("left to right", GOLD, "solid"),
}
"""What figures call objectives, and how they draw them."""
SINGLE_SIDED: tuple[Objective, ...] = ("source_only", "target_only")
EARLIER = {"early": "when first learnt forward", "highest": "highest of training"}
"""Heat maps beside that of the end: of which stage they are, and the panel's title."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return objective_grid(seeds, ["relation_cycle"])


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give the metrics that training recorded."""
    return [metrics_at(run, step)]


def when(run: Run) -> list[Moment]:
    """Give every checkpoint, and the trained stages."""
    return [*all_checkpoints(run), *trained_stages(run)]


def summarize(result: Result) -> Summary:
    """Summarise each stage, and as stage `highest` the highest reverse probability of any checkpoint."""
    frame, by = result.frame, ("objective", "scheme", "stage")
    staged = frame[frame["stage"] != "checkpoint"]
    staged = staged.assign(above_chance=staged["reverse_probability"] - staged["chance"])
    peaks = where(frame, stage="checkpoint").groupby(["objective", "scheme", "seed"], as_index=False)
    highest = peaks["reverse_probability"].max().assign(stage="highest")
    return (
        Summary.of(staged, by, ("forward_probability", "reverse_probability", "above_chance"))
        + Summary.of(highest, by, ("reverse_probability",))
        + Summary.of(frame.drop_duplicates("seed"), (), ("chance",))
    )


def takeaway(result: Result) -> str:
    """Say whether others than any-order masking answer above chance: by the whole interval, at the end of training."""
    summary = result.summary

    def answered(*objectives: Objective) -> tuple[str, str]:
        """Tell whether all settings are, some or none, and how well."""
        of = [{"objective": name, "scheme": scheme, "stage": "end"} for name in objectives for scheme in MDM_SCHEMES]
        of = [one for one in of if summary.at("above_chance", **one).n]  # a quick run has fewer schemes
        above = [one for one in of if summary.at("above_chance", **one).side == "above"]
        values = between(summary.at("reverse_probability", **one).value for one in above)
        if not above:
            return "none", "in no setting"
        if len(above) == len(of):
            return "all", f"under every scheme ({values})"
        return "some", f"in {len(above)} of {len(of)} settings ({values})"

    single, with_one = answered(*SINGLE_SIDED)
    any_order, with_any = answered("any_order")
    _, with_arm = answered("causal")
    begin = {
        "all": "No: masking only one side does so, too",
        "some": "In part: masking only one side does so in places",
    }
    yes = (
        "Yes: masking only one side does not"
        if any_order == "all"
        else "Not shown: masking only one side does not, either"
    )
    n = sample_size(entry.effect for entry in summary.where("above_chance", stage="end"))
    return (
        f"{begin.get(single, yes)}. Reverse queries end above chance ({summary.at('chance').value:.2g}) {with_one} "
        f"with one side masked, {with_any} with any-order masking, {with_arm} if predicted from left to right ({n})."
    )


def draw(result: Result) -> Panels:
    panels, frame = Panels(), where(result.frame[result.frame["step"] > 0], stage="checkpoint")
    (main,) = panels.row(
        ["reverse probability, end of training"],
        x={"title": "position scheme"},
        y={"title": "trained with"},
        height=300,
    )
    _draw_table(main, result, "end", "probability")
    for side in ("reverse", "forward"):
        first = side == "reverse"
        y = {**PROBABILITY, "title": f"{side} query:<br>probability of answer"}
        titles = [with_n(scheme, where(frame, scheme=scheme), "objective") if first else "" for scheme in MDM_SCHEMES]
        row = panels.row(titles, x=TRAINING_STEPS, y=y, ticks=not first, height=190)
        for panel, scheme in zip(row, MDM_SCHEMES, strict=True):
            for objective, (name, color, dash) in NAMES.items():
                group = where(frame, objective=objective, scheme=scheme)
                panel.curve(group, "step", f"{side}_probability", name=name, color=color, dash=dash)
            panel.level(frame["chance"].iloc[0], name="chance: the answer's role known, nothing else", color=CHANCE)
    earlier = {stage: title for stage, title in EARLIER.items() if len(result.summary.where(stage=stage))}
    titles = [f"reverse probability, {title}" for title in earlier.values()]
    row = panels.row(titles, x={"title": "position scheme"}, y={"title": "trained with"}, height=200)
    for panel, stage in zip(row, earlier, strict=True):
        _draw_table(panel, result, stage, None)
    return panels


def _draw_table(panel: Panel, result: Result, stage: str, scale: str | None) -> None:
    """Draw reverse probability by objective and scheme."""
    cells = result.summary.where("reverse_probability", stage=stage).frame
    named = cells.assign(
        objective=[NAMES[name][0] for name in cells["objective"]], scheme=[shown(name) for name in cells["scheme"]]
    )
    rows, columns = [name for name, *_ in NAMES.values()], list(map(shown, MDM_SCHEMES))
    panel.probabilities(named, ("objective", rows), ("scheme", columns), scale)


ANALYSIS = Analysis(
    name="objective_ablation",
    question="Is any-order masking what makes reverse queries answerable?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=15,
    detail_of="reversal_curse",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
