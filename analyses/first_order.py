"""Steps down the forward loss, of the whole model and of its parts: the change of the reverse loss that gradients
predict, the change that comes, and that of a random step of the same size."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from mdm_interp import Analysis, Contrast, Estimate, Result, Run, Summary, mean_estimate, where
from mdm_interp.experiments.grids import VARIANTS, cycle_grid, variant_of
from mdm_interp.experiments.scope import STAGES
from mdm_interp.measures.gradients import COMPONENTS, ROUTING, STORAGE, FirstOrder, contrast_steps
from mdm_interp.viz import CHANCE, MAGENTA, SHADES, Panels, between, opening, sample_size, told, with_n
from mdm_interp.viz.words import ANSWER

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
STAGE_COLORS: dict[str, str] = dict(zip(STAGES, SHADES[1:], strict=True))


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
    """Say whether small steps do what is predicted, and for whom they lower the reverse loss at every stage."""

    def at(quantity: str, variant: str, **group: str) -> list[Estimate]:
        found = [result.summary.at(quantity, variant=variant, stage=stage, **group) for stage in STAGES]
        return [estimate for estimate in found if estimate.n]

    transfers = {variant: at("transfer", variant, group="whole") for variant in VARIANTS}
    sides = {variant: {estimate.side for estimate in found} for variant, found in transfers.items() if found}
    answers = {variant: ANSWER[next(iter(of)) if len(of) == 1 else "undecided"] for variant, of in sides.items()}
    slopes = [estimate.value for variant in sides for estimate in at("slope", variant, group="whole")]
    ends = [10**estimate.value for variant in sides for estimate in at("log10_last_step", variant)]
    as_predicted = all(abs(slope - 1) <= TOLERANCE for slope in slopes)
    return (
        f"{opening(told(answers))}, at every stage. {'As' if as_predicted else 'Not as'} predicted: at step {SMALL:g} "
        f"the reverse loss changes by {between(slopes)} times the prediction, and it stays within {TOLERANCE:.0%} of "
        f"that up to steps of {min(ends, default=0.0):.1g} or more ({sample_size(chain(*transfers.values()))})."
    )


STEP_AXIS = {"title": "step size η", "type": "log", "tickvals": [1e-5, 1e-3, 1e-1], "ticktext": ["1e-5", "1e-3", "0.1"]}
TRANSFER_TICKS = [-1000, -100, -10, 0, 1, 10, 100, 1000]
MOVED = {
    "predicted_transfer": ("predicted", MAGENTA, "circle", -0.15),
    "random_transfer": ("random step", CHANCE, "x-thin-open", 0.15),
}


def draw(result: Result) -> Panels:
    panels, frame, transfers = Panels(), result.frame, result.summary.frame.set_index("quantity")
    farthest = transfers.loc[["transfer", "predicted_transfer"]].filter(regex="value|low|high").abs().max(axis=None)
    ratios = where(frame, group="whole")["slope"]
    slope = {"range": [1.1 * ratios.min(), 1.1 * ratios.max()], "tickvals": [-5, -2, -1, 0, 1, 2, 5, 10]}
    slope["title"] = "actual / predicted<br>change of reverse loss"
    drop = {"range": [-1.5 * farthest, 1.5 * farthest], "tickvals": TRANSFER_TICKS}
    drop["title"] = f"drop of reverse loss per drop<br>of forward (end of<br>training, step {SMALL:g})"
    titles = [with_n(variant, where(frame, variant=variant)) for variant in VARIANTS]
    groups = {"title": "what moves", "tickangle": 60}
    rows = zip(
        VARIANTS,
        panels.row(titles, x=STEP_AXIS, y=slope, warp=np.arcsinh, height=320),  # linear below about 1
        panels.row([""] * len(VARIANTS), x=groups, y=drop, warp=np.arcsinh, ticks_height=110, height=200),
        strict=True,
    )
    for variant, slopes, by_group in rows:
        of_variant = where(frame, variant=variant)
        for stage, color in STAGE_COLORS.items():
            slopes.curve(where(of_variant, stage=stage, group="whole"), "eta", "slope", name=stage, color=color)
        slopes.level(np.arcsinh(1.0), name="as predicted", color=CHANCE, x=ETAS)
        small = where(of_variant, stage="end", eta=SMALL)
        for quantity, (name, color, symbol, shift) in MOVED.items():
            found = {group: mean_estimate(where(small, group=group)[quantity]) for group in GROUPS}
            by_group.estimates(found, name=name, color=color, symbol=symbol, shift=shift, upright=True)
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
    detail_of="gradient_alignment",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
