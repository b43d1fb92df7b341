"""Steps down the forward loss, of the whole model and of its parts: the change of the reverse loss that gradients
predict, the change that comes, and that of a random step of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mdm_interp import Analysis, Contrast, Estimate, Result, Run, Summary, mean_estimate, where
from mdm_interp.experiments.grids import VARIANTS, cycle_grid, variant_of
from mdm_interp.experiments.scope import STAGES
from mdm_interp.measures.gradients import COMPONENTS, ROUTING, STORAGE, FirstOrder, contrast_steps
from mdm_interp.viz import CHANCE, GREEN, ORANGE, PURPLE, Panels

ETAS = [float(f"{eta:.3g}") for eta in np.logspace(-6, 0, 13)]
"""Step sizes, two per decade."""
SMALL = 1e-4
"""The step size at which effects are quoted."""
PART_ETAS = [1e-6, SMALL, 1e-2]
TOLERANCE = 0.1
"""How far actual over predicted may be from 1."""

NAMED = (*STORAGE, *ROUTING, "embedding", "unembedding")
GROUPS = {
    "whole": COMPONENTS,
    "storage": STORAGE,
    "routing": ROUTING,
    "embedding": ("embedding",),
    "unembedding": ("unembedding",),
    "other": tuple(component for component in COMPONENTS if component not in NAMED),
}
"""What moves: everything, or one part alone. The parts make up the whole."""
STAGE_COLORS: dict[str, str] = dict(zip(STAGES, (GREEN, ORANGE, PURPLE), strict=True))


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per group of components that moves, and step size. Changes are in nats, negative is learnt;
    transfers are relative to the first-order drop of the forward loss when everything moves."""
    seed = int(run.folder.name, 16) ^ step  # no two steps share a random direction
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    return [
        {"variant": variant_of(run.config), "group": group, **row}
        for group, members in GROUPS.items()
        for row in step_rows(contrast_steps(model, pairs, ETAS if group == "whole" else PART_ETAS, members, seed))
    ]


def step_rows(steps: Contrast[FirstOrder]) -> list[dict[str, Any]]:
    """Give one row per step size. The transfer of an actual step is there only where the change of the reverse loss is
    to first order, within `TOLERANCE`."""
    taken, random = steps.effect, steps.null
    inside = taken.etas <= taken.regime_end(TOLERANCE)
    columns = {
        "eta": taken.etas,
        "predicted": taken.predicted[-1],
        "reverse": taken.reverse,
        "forward": taken.forward,
        "random": random.reverse,
        "slope": taken.slope(),
        "in_regime": inside.double(),
        "predicted_transfer": taken.predicted_transfer(),
        "transfer": taken.transfer().where(inside, float("nan")),
        "random_transfer": random.transfer(),
    }
    return [
        dict(zip(columns, values, strict=True))
        for values in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]


def summarize(result: Result) -> Summary:
    small = where(result.frame, eta=SMALL)
    small = small.assign(transfer_null=small["random_transfer"])
    return Summary.of(small, ("variant", "stage", "group"), ("predicted_transfer", "transfer", "slope")) + Summary.of(
        last_steps(result.frame), ("variant", "stage"), ("log10_last_step",)
    )


def last_steps(frame: pd.DataFrame) -> pd.DataFrame:
    """Find log10 of the largest step of each run up to which actual over predicted stays near 1."""
    inside = where(frame, group="whole", in_regime=1)
    inside = inside.assign(log10_last_step=np.log10(inside["eta"]))
    return inside.groupby(["variant", "stage", "run"], sort=False)["log10_last_step"].max().reset_index()


def takeaway(result: Result) -> str:
    def at(place: tuple[str, str], quantity: str, **group: str) -> Estimate:
        return result.summary.at(quantity, variant=place[0], stage=place[1], **group)

    def said(places: Sequence[tuple[str, str]], nowhere: str) -> str:
        return ", ".join(f"{variant} at {stage}" for variant, stage in places) or nowhere

    def rises(group: str) -> str:
        return said([place for place in places if at(place, "transfer", group=group).side == "below"], "nowhere")

    places = [(variant, stage) for variant in VARIANTS for stage in STAGES]
    whole = {place: at(place, "transfer", group="whole") for place in places}
    places = [place for place in places if whole[place].n]
    slopes = [at(place, "slope", group="whole").value for place in places]
    reached = [10**end.value for place in places if (end := at(place, "log10_last_step")).n] or [float("nan")]
    undecided = [place for place in places if whole[place].low <= 0 <= whole[place].high]
    return (
        f"At step {SMALL:g} the reverse loss changes by {min(slopes):.2f} to {max(slopes):.2f} times that predicted; "
        f"it stays within {TOLERANCE:.0%} of that up to steps of {min(reached):.1g} to {max(reached):.1g} (means over "
        f"seeds). There a step down the forward loss raises the reverse loss: {rises('whole')} (interval holds 0: "
        f"{said(undecided, 'none')}); a step of storage alone: {rises('storage')}; of routing alone: "
        f"{rises('routing')}."
    )


STEP_AXIS = {"title": "step size η", "type": "log", "tickvals": [1e-5, 1e-3, 1e-1], "ticktext": ["1e-5", "1e-3", "0.1"]}
TRANSFER_TICKS = [-1000, -100, -10, -1, 0, 1, 10, 100, 1000]
BY_STEP = {"transfer": ("gradient steps", "solid"), "random_transfer": ("random steps", "dot")}
BY_GROUP = {"predicted_transfer": ("predicted", "circle"), "random_transfer": ("random step", "x-thin-open")}


def draw(result: Result) -> Panels:
    panels, frame, transfers = Panels(), result.frame, result.summary.frame.set_index("quantity")
    farthest = transfers.loc[["transfer", "predicted_transfer"]].filter(regex="value|low|high").abs().max(axis=None)
    transfer = {"range": [-1.5 * farthest, 1.5 * farthest], "tickvals": TRANSFER_TICKS}
    slope = {"range": [-0.6, 2.1], "title": "actual / predicted<br>change of reverse loss"}
    drop = {**transfer, "title": "drop of reverse loss per<br>first-order drop of forward"}
    same = {**transfer, "title": f"the same by what moves,<br>step {SMALL:g}"}
    groups, untitled = {"title": "what moves", "tickangle": 60}, [""] * len(VARIANTS)
    rows = zip(
        VARIANTS,
        panels.row(list(VARIANTS), x=STEP_AXIS, y=slope, ticks=False),
        panels.row(untitled, x=STEP_AXIS, y=drop, warp=np.arcsinh),  # linear below about 1, logarithmic beyond
        panels.row(untitled, x=groups, y=same, warp=np.arcsinh, ticks_height=110),
        strict=True,
    )
    for variant, slopes, by_step, by_group in rows:
        for place, (stage, color) in enumerate(STAGE_COLORS.items()):
            at = where(frame, variant=variant, stage=stage)
            whole, small = where(at, group="whole"), where(at, eta=SMALL)
            slopes.curve(whole, "eta", "slope", name=stage, color=color)
            for quantity, (name, dash) in BY_STEP.items():
                by_step.curve(whole, "eta", quantity, name=f"{stage}, {name}", color=color, dash=dash)
            for quantity, (name, symbol) in BY_GROUP.items():
                found = {group: mean_estimate(where(small, group=group)[quantity]) for group in GROUPS}
                look: dict[str, Any] = {"color": color, "symbol": symbol, "shift": 0.22 * (place - 1), "upright": True}
                by_group.estimates(found, name=f"{stage}, {name}", **look)
        slopes.level(1.0, name="level 1", color=CHANCE, x=ETAS, listed=False)
        by_step.level(0.0, name="level 0", color=CHANCE, x=ETAS, listed=False)
        by_group.level(0.0, name="level 0", color=CHANCE, x=[-0.5, len(GROUPS) - 0.5], listed=False)
    return panels


ANALYSIS = Analysis(
    name="first_order",
    question="Does a real step down the forward loss lower the reverse loss as the gradients predict?",
    configs=cycle_grid,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"etas": ETAS, "part_etas": PART_ETAS, "tolerance": TOLERANCE},
    order=60,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
