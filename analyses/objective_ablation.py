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
from mdm_interp.experiments.grids import MDM_SCHEMES, OBJECTIVES, objective_grid
from mdm_interp.experiments.scope import Moment, trained_stages
from mdm_interp.viz import BLUE, CHANCE, GREEN, ORANGE, PROBABILITY, TRAINING_STEPS, VERMILION, Panels

COLORS: dict[Objective, str] = {
    "any_order": BLUE,
    "source_only": GREEN,
    "target_only": ORANGE,
    "causal": VERMILION,
}
SINGLE_SIDED: tuple[Objective, ...] = ("source_only", "target_only")
TABLES = {"early": "first learnt forward", "highest": "highest of training", "end": "end of training"}
"""The heat maps: of which stage they are, and the panel's title."""


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
    summary = result.summary

    def split(objectives: Sequence[Objective]) -> str:
        above, failing = [], []
        for objective in objectives:
            for scheme in MDM_SCHEMES:
                of = {"objective": objective, "scheme": scheme, "stage": "end"}
                value = summary.at("reverse_probability", **of).value
                cleared = summary.at("above_chance", **of).side == "above"
                (above if cleared else failing).append((value, f"{objective} {scheme} ({value:.2g})"))
        values = [value for value, _ in above]
        between = f" ({min(values):.3g} to {max(values):.3g})" if values else ""
        exceptions = (
            f", not in {', '.join(name for _, name in failing)}" if 0 < len(failing) <= len(MDM_SCHEMES) else ""
        )
        return f"in {len(above)} of {len(above) + len(failing)} settings{between}{exceptions}"

    return (
        f"At the end of training, reverse queries are answered above chance ({summary.at('chance').value:.2g}) by "
        f"single-sided masking {split(SINGLE_SIDED)}; by any-order masking {split(['any_order'])}; "
        f"by left-to-right prediction {split(['causal'])}."
    )


def draw(result: Result) -> Panels:
    panels, frame = Panels(), where(result.frame[result.frame["step"] > 0], stage="checkpoint")
    for side in ("forward", "reverse"):
        first = side == "forward"
        y = {**PROBABILITY, "title": f"{side} query:<br>probability of answer"}
        row = panels.row(MDM_SCHEMES if first else [""] * len(MDM_SCHEMES), x=TRAINING_STEPS, y=y, ticks=not first)
        for panel, scheme in zip(row, MDM_SCHEMES, strict=True):
            for objective, color in COLORS.items():
                group = where(frame, objective=objective, scheme=scheme)
                panel.curve(group, "step", f"{side}_probability", name=objective, color=color)
            panel.level(frame["chance"].iloc[0], name="chance: the answer's role known, nothing else", color=CHANCE)
    shown = {stage: title for stage, title in TABLES.items() if len(result.summary.where(stage=stage))}
    titles = [f"reverse probability, {title}" for title in shown.values()]
    row = panels.row(titles, x={"title": "position scheme"}, y={"title": "objective"})
    for panel, stage in zip(row, shown, strict=True):
        cells = result.summary.where("reverse_probability", stage=stage).frame
        scale = "probability" if panel is row[-1] else None
        panel.probabilities(cells, ("objective", OBJECTIVES), ("scheme", MDM_SCHEMES), scale)
    return panels


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
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
