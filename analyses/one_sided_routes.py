"""Reverse probability of facts whose source training shows on one side only, against the share of other facts that it
shows both ways.

In `relation_cycle` every entity is on the left in one relation and on the right in another, which trains the routes to
it from both sides. In `symmetric_pool` every entity is in one fact: only other facts can teach a model to look for a
source on the side where training never showed this one. As gaps are free, an ARM cannot know where the answer comes,
so its forward probability stays well below 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, all_checkpoints, metrics_at, stages, where
from mdm_interp.experiments.grids import BOTH_WAYS, POOL_CONTRASTS, POOL_MODELS, pool_grid
from mdm_interp.experiments.scope import LEARNT, Moment
from mdm_interp.viz import (
    CHANCE,
    PROBABILITY,
    PURPLE,
    SAND,
    TRAINING_STEPS,
    VIOLET,
    Panel,
    Panels,
    between,
    opening,
    sample_size,
    shown,
    with_n,
)

LOOKS = dict(zip(POOL_MODELS, ((VIOLET, "solid"), (VIOLET, "dash"), (PURPLE, "solid"), (SAND, "solid")), strict=True))
"""How each model is drawn: in the colour of its scheme."""
MDMS = [name for name, (_, objective, *_) in POOL_MODELS.items() if objective != "causal"]
(ARM,) = POOL_MODELS.keys() - MDMS
ROPE, LEARNED = POOL_CONTRASTS
MOST = BOTH_WAYS[-1]


def model_of(config: TrainConfig) -> str:
    """Return the name of a run's model, as in `POOL_MODELS`."""
    shape = (config.model.position, config.objective, config.model.head_dim, config.model.rotary_base)
    return next(name for name, settings in POOL_MODELS.items() if settings == shape)


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give the metrics that training recorded."""
    return [{"model": model_of(run.config), **metrics_at(run, step)}]


def when(run: Run) -> list[Moment]:
    """Give every checkpoint, and the stages."""
    return [*all_checkpoints(run), *stages(run)]


def summarize(result: Result) -> Summary:
    """Summarize both probabilities, and the reverse one against chance, the forward one, that of the same seed's run in
    which no fact is shown both ways, its ARM's (as the logarithm of their ratio) and its rope model's."""
    frame = result.frame
    staged = frame[frame["stage"].isin(["early", "end"])]
    forward, reverse = staged["forward_probability"], staged["reverse_probability"]

    def other(**changed: Any) -> pd.Series:
        """Return the reverse probability of the run that differs in nothing but what is changed."""
        alike = [column for column in ("seed", "reversed_share", "model", "stage") if column not in changed]
        others = where(staged, **changed).set_index(alike)["reverse_probability"]
        return staged[alike].join(others, on=alike)["reverse_probability"]

    staged = staged.assign(
        above_chance=reverse - staged["chance"],
        below_forward=forward - reverse,
        gained=reverse - other(reversed_share=0.0),
        log_of_arm=np.log(reverse / other(model=ARM)),
        above_rope=reverse - other(model=ROPE),
    )
    by = ("model", "reversed_share", "stage")
    return (
        Summary.of(frame.drop_duplicates("seed"), (), ("chance",))
        + Summary.of(staged, by, ("forward_probability", "reverse_probability", "above_chance", "below_forward"))
        + Summary.of(staged[staged["reversed_share"] > 0], by, ("gained",))
        + Summary.of(staged[staged["model"] != ARM], by, ("log_of_arm",))
        + Summary.of(where(staged, model=LEARNED), by, ("above_rope",))
    )


def takeaway(result: Result) -> str:
    """Say what the intervals over seeds say: an effect is there if its whole interval is on one side of 0."""
    return f"{_suffices(result.summary)} {_gained(result.summary)}"


def agreed(sides: Iterable[str]) -> str:
    """Return the side that all are on, if they are on one."""
    (first, *others) = set(sides)
    return "undecided" if others else first


def answered(summary: Summary, name: str) -> str:
    """Say whether a model answers in reverse though no fact is shown both ways: above chance and, unless the answer is
    only "in part", not below its forward probability."""
    of = {"model": name, "reversed_share": 0.0, "stage": "end"}
    above_chance = summary.at("above_chance", **of).side
    if above_chance == "above":
        return "in part" if summary.at("below_forward", **of).side == "above" else "yes"
    return "no" if above_chance == "below" else "undecided"


def _suffices(summary: Summary) -> str:
    """Say whether it suffices to show a source on one side."""
    answers = {name: answered(summary, name) for name in MDMS}
    of = {"reversed_share": 0.0, "stage": "end"}
    reverse = [summary.at("reverse_probability", model=name, **of) for name in MDMS]
    found = f"at {between(estimate.value for estimate in reverse)} (chance {summary.at('chance').value:.2g})"
    if (answer := agreed(answers.values())) == "undecided":
        each = ", ".join(f"{answer} for {shown(name)}" for name, answer in answers.items())
        return f"{opening(each)}, {found}."
    how = {"in part": "above chance but below forward", "no": "below chance", "yes": "not measurably below forward"}[
        answer
    ]
    return f"{opening(answer)}: every MDM answers {how}, {found}."


def _gained(summary: Summary) -> str:
    """Say what it brings to show most other facts both ways, and whether RoPE or learned positions are better then."""
    of = {"reversed_share": MOST, "stage": "end"}
    gains = [summary.at("gained", model=name, **of) for name in POOL_CONTRASTS]
    rope, learned = (summary.at("reverse_probability", model=name, **of) for name in POOL_CONTRASTS)
    n = sample_size(entry.effect for entry in summary.where("reverse_probability", stage="end"))
    verb = {"above": "raises", "below": "lowers"}.get(agreed(gain.side for gain in gains), "may change")
    side = summary.at("above_rope", model=LEARNED, **of).side
    than = {"above": "less than", "below": "more than"}.get(side, "not measurably apart from")
    return (
        f"Showing most other facts both ways {verb} that, to {rope.value:.2f} under RoPE, {than} the "
        f"{learned.value:.2f} with learned positions ({n})."
    )


def draw(result: Result) -> Panels:
    panels, frame, chance = Panels(), result.frame, result.summary.at("chance").value
    ends = {
        "reverse query, end of training": ("end", "reverse"),
        "forward query, end": ("end", "forward"),
        f"reverse, when forward is {LEARNT}": ("early", "reverse"),
    }
    both_ways = {"title": "other facts shown both ways", "tickvals": list(BOTH_WAYS), "tickformat": ".0%"}
    y = {**PROBABILITY, "title": "probability of answer"}
    x = {**both_ways, "range": [-0.06, 0.86]}
    row = panels.row(list(ends), x=x, y=y, height=360, widths=[1.7, 1.0, 1.0])
    for panel, (stage, query) in zip(row, ends.values(), strict=True):
        _draw_ends(panel, where(frame, stage=stage), f"{query}_probability")
        panel.level(chance, name="chance", color=CHANCE, x=(-0.05, 0.85))
    trained = where(frame[frame["step"] > 0], stage="checkpoint")
    shares = sorted(set(trained["reversed_share"]))
    titles = [
        with_n(f"reverse, {share:.0%} both ways", where(trained, reversed_share=share), "model") for share in shares
    ]
    row = panels.row(titles, x=TRAINING_STEPS, y=y, height=200)
    for panel, share in zip(row, shares, strict=True):
        for name, (color, dash) in LOOKS.items():
            of_model = where(trained, model=name, reversed_share=share)
            panel.curve(of_model, "step", "reverse_probability", name=shown(name), color=color, dash=dash, listed=False)
        panel.level(chance, name="chance", color=CHANCE, listed=False)
    return panels


def _draw_ends(panel: Panel, staged: pd.DataFrame, quantity: str) -> None:
    """Draw means over seeds against the share shown both ways, and the seeds as dots."""
    for place, (model, (color, dash)) in enumerate(LOOKS.items()):
        group, name, shift = where(staged, model=model), shown(model), 0.018 * (place - 1.5)
        beside, seeds = group.assign(at=group["reversed_share"] + shift + 0.007), group["seed"].map("seed {}".format)
        panel.dots(beside, "at", quantity, name=name, label=list(seeds), color=color, size=6, opacity=0.4, listed=False)
        panel.points(group, "reversed_share", quantity, name=name, color=color, dash=dash, shift=shift)


ANALYSIS = Analysis(
    name="one_sided_routes",
    question="Is a fact answered in reverse if training showed its source on one side only?",
    configs=pool_grid,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=14,
    detail_of="phase_diagram",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
