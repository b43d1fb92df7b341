"""What a row says of the run it was measured on: its setting and its stage of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from mdm_interp.config import ModelConfig, Objective
from mdm_interp.training.runs import Run
from mdm_interp.viz.theme import shown
from mdm_interp.viz.words import counted

LEARNT = 0.5
"""Forward probability from which a model counts as having learnt its facts: the stage `early` is there."""
STAGES = ("initial", "early", "end")

SCOPE = (
    "world",
    "reversed_share",
    "scheme",
    "rotary_base",
    "objective",
    "mask_rate",
    "attention",
    "n_layers",
    "n_heads",
    "d_head",
    "mlp",
)
"""The columns that say in which setting something was measured; a claim is judged in each by itself."""


def scope_label(scope: Mapping[str, Any]) -> str:
    """Name a setting in a few words, and its training stage if it has one.

    A scope without a world is that of all settings.
    """
    stage = [str(scope["stage"])] if "stage" in scope else []
    if scope["world"] is None:
        return ", ".join(["all settings", scope["scheme"], *stage])
    world, scheme, objective, depth, heads = setting_labels(scope)
    return ", ".join([world, f"{objective} {scheme}", depth, heads, *stage])


def shown_label(scope: Mapping[str, Any]) -> str:
    """Name a setting as figures do, its scheme as readers know it, and otherwise as :func:`scope_label`."""
    return scope_label({**scope, "scheme": shown(scope["scheme"])})


def scope_key(scope: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a setting from others: its columns of :data:`SCOPE`."""
    return tuple(scope[column] for column in SCOPE)


def setting_labels(scope: Mapping[str, Any]) -> list[str]:
    """Name a setting's world, scheme, objective, depth and heads."""
    world = scope["world"] + (f" {scope['reversed_share']:.0%} both ways" if scope["reversed_share"] else "")
    base = f" base {scope['rotary_base']:.0e}" if scope["rotary_base"] not in (0, 10_000) else ""
    depth = counted(scope["n_layers"], "layer") + (" + MLP" if scope["mlp"] else "")
    heads = f"{counted(scope['n_heads'], 'head')} of {scope['d_head']}"
    objective = scope["objective"] + (f" at {scope['mask_rate']:.0%}" if scope["mask_rate"] else "")
    if scope["attention"] == "causal" and scope["objective"] != "causal":
        objective += " with causal attention"
    return [world, scope["scheme"] + base, objective, depth, heads]


def scope_of(
    model: ModelConfig,
    world: str,
    objective: Objective,
    *,
    reversed_share: float = 0.0,
    mask_rate: float | None = None,
) -> dict[str, Any]:
    """Return the columns of :data:`SCOPE`; a rate of 0 is one that is drawn anew for each sequence."""
    return {
        "world": world,
        "reversed_share": reversed_share,
        "scheme": model.position,
        "rotary_base": model.rotary_base if model.turns_planes else 0.0,  # nothing rotates
        "objective": objective,
        "mask_rate": mask_rate or 0.0,
        "attention": model.attention,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "d_head": model.head_dim,
        "mlp": not model.attn_only,
    }


def about(run: Run) -> dict[str, Any]:
    """Return the columns that every row begins with: the scope, seed and run."""
    facts, config = run.config.facts, run.config
    scope = scope_of(
        config.model,
        facts.world,
        config.objective,
        reversed_share=facts.reversed_share,
        mask_rate=config.mask_rate,
    )
    return {**scope, "seed": config.seed, "run": run.folder.name}


Moment = tuple[str, dict[int, float]]
"""A moment of training: the name of its stage, and the checkpoints that it lies between, each with its weight."""


def stages(run: Run, which: Sequence[str] = STAGES) -> list[Moment]:
    """Return the stages of training: `initial`, `early`, `end`.

    `early` is where forward probability first reaches `LEARNT`, between two checkpoints, so that settings are compared
    at one forward probability; absent if it never does.

    Args:
        which: Those that are wanted.
    """
    found: dict[str, dict[int, float]] = {"initial": {run.steps[0]: 1.0}}
    if learnt := reaching(run, LEARNT):
        found["early"] = learnt
    found["end"] = {run.steps[-1]: 1.0}
    return [(stage, weights) for stage, weights in found.items() if stage in which]


def reaching(run: Run, probability: float) -> dict[int, float]:
    """Return the checkpoints between which forward probability first reaches `probability`, each with its weight; none
    if it never does."""
    metrics = run.metrics()
    reached = next((i for i, row in enumerate(metrics) if row["forward_probability"] >= probability), None)
    if reached is None:
        return {}
    before, after = metrics[max(reached - 1, 0)], metrics[reached]
    rise = after["forward_probability"] - before["forward_probability"]
    share = (probability - before["forward_probability"]) / rise if rise > 0 else 1.0
    return {before["step"]: 1 - share, after["step"]: share}


def trained_stages(run: Run) -> list[Moment]:
    """Return the stages but the first."""
    return stages(run, STAGES[1:])


def all_checkpoints(run: Run) -> list[Moment]:
    """Return every checkpoint, as stage `checkpoint`."""
    return [("checkpoint", {step: 1.0}) for step in run.steps]


def second_checkpoints(run: Run) -> list[Moment]:
    """Return every second checkpoint, first and last among them, as stage `checkpoint`."""
    return [("checkpoint", {step: 1.0}) for step in sorted({run.steps[0], *run.steps[::-2]})]


def first_and_last(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the first and of the last step, as those of the stages `initial` and `end`."""
    ends = {frame["step"].min(): STAGES[0], frame["step"].max(): STAGES[-1]}
    return frame.assign(stage=frame["step"].map(ends)).dropna(subset="stage")


def metrics_at(run: Run, step: int) -> dict[str, Any]:
    """Return what training recorded at a checkpoint."""
    (found,) = [row for row in run.metrics() if row["step"] == step]
    return {name: value for name, value in found.items() if name != "step"}


def rows_of(
    run: Run, moments: Sequence[Moment], measure: Callable[[Run, int], Iterable[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return what `measure` finds at each moment, with the columns of :func:`about`, `stage` and `step`, chance and
    both probabilities that training recorded.

    Between two checkpoints, floats that differ are interpolated; whatever else they hold is the later one's.

    Args:
        measure: Takes a run and a step, and gives rows in the same order for every step.
    """
    rows = []
    for stage, weights in moments:
        step = round(sum(step * weight for step, weight in weights.items()))
        weights = {step: weight for step, weight in weights.items() if weight}
        found = []
        for at in weights:
            recorded = metrics_at(run, at)
            asked = {name: recorded[name] for name in ("forward_probability", "reverse_probability")}
            found.append([{**asked, **row} for row in measure(run, at)])
        for measured in zip(*found, strict=True):
            row = dict(measured[-1])
            for name, value in row.items():
                if isinstance(value, float) and any(one[name] != value for one in measured):
                    row[name] = sum(one[name] * weight for one, weight in zip(measured, weights.values(), strict=True))
            rows.append({**about(run), "chance": run.facts.chance, "stage": stage, "step": step, **row})
    return rows
