"""How much of the fall of the reverse loss went through storage, routing and the rest, over the whole of training.

Every run is trained once more, and the gradients of the mean losses are summed along the way its weights take. The null
asks the same queries for another entity that could be the answer: what is learnt of roles and places alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from mdm_interp import Analysis, Estimate, Result, Run, Summary, TrainConfig, where
from mdm_interp.config import Objective
from mdm_interp.data.queries import Query
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.grids import MANY_HEADS, VARIANTS, path_grid, variant_of
from mdm_interp.experiments.paper import mirrored
from mdm_interp.experiments.scope import Moment, stages
from mdm_interp.measures.gradients import COMPONENTS, ROUTING, STORAGE, LearningPath
from mdm_interp.measures.nulls import next_answers
from mdm_interp.training.loop import checkpoint_steps, retrace
from mdm_interp.viz import (
    CHANCE,
    PART_COLORS,
    REVERSE,
    TRAINING_STEPS,
    Panels,
    between,
    listed,
    sample_size,
    shown,
)

EVERY = 2
"""Of the tested facts every so-manyth is asked."""
NAMED = (*STORAGE, *ROUTING, "embedding", "unembedding")
GROUPS = {
    "storage": STORAGE,
    "routing": ROUTING,
    "embedding": ("embedding",),
    "unembedding": ("unembedding",),
    "other": tuple(component for component in COMPONENTS if component not in NAMED),
}
"""The parts that make up the whole; `other` is gains and what a position scheme learns."""
MANY = f"MDM rope, {MANY_HEADS} heads"
ONE_SIDED: dict[Objective, str] = {"source_only": "MDM rope, left masked", "target_only": "MDM rope, right masked"}
"""Objectives that mask one entity only, and what their models are called."""
SETTINGS = (*VARIANTS, MANY, *ONE_SIDED.values())
IN_A_ROW = 4
"""How many settings the figure has side by side."""


def setting_of(config: TrainConfig) -> str:
    """Name what a run is compared as."""
    if config.objective in ONE_SIDED:
        return ONE_SIDED[config.objective]
    return MANY if config.model.n_heads == MANY_HEADS else variant_of(config)


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per loss and checkpoint: by how many nats it has fallen since the start, all in all (`fall`) and
    through each group of components; what is missing from their sum. `…_null`: of the reverse loss, the same for
    another answer."""
    pairs = [pair for pair in run.query_pairs(n_contexts=1) if pair.fact % EVERY == 0]
    forward, reverse = [pair.forward for pair in pairs], [pair.reverse for pair in pairs]
    models = retrace(run.config)
    path = LearningPath(next(models), {"forward": forward, "reverse": reverse, NULL: other_answers(reverse, run.facts)})
    rows, recorded = rows_of_path(path, 0), set(checkpoint_steps(run.config))
    for trained, _ in enumerate(models, start=1):
        path.advance()
        if trained in recorded:
            rows += rows_of_path(path, trained)
    return [{"setting": setting_of(run.config), **row} for row in rows]


NULL = "another answer"


def rows_of_path(path: LearningPath, trained: int) -> list[dict[str, Any]]:
    """Give one row per loss."""

    def fallen(loss: str, ending: str = "") -> dict[str, float]:
        parts = {group: -path.within(loss, members) for group, members in GROUPS.items()}
        fall = -path.change[loss]
        found = {"fall": fall, **parts, "missing": fall - sum(parts.values())}
        return {f"{quantity}{ending}": value for quantity, value in found.items()}

    return [
        {"trained": trained, "loss": "forward", **fallen("forward")},
        {"trained": trained, "loss": "reverse", **fallen("reverse"), **fallen(NULL, "_null")},
    ]


def other_answers(queries: Sequence[Query], world: FactWorld) -> list[Query]:
    """Ask each query for the entity that comes after its answer in the answer's role."""
    candidates, answers = world.candidates(queries), [query.answer[0] for query in queries]
    own = (candidates == torch.tensor(answers)[:, None]).long().argmax(1)
    rivals = torch.ones_like(candidates, dtype=torch.bool).scatter_(1, own[:, None], False)
    others = candidates.gather(1, next_answers(own, rivals)[:, None])[:, 0]
    return [replace(query, answer=(other,)) for query, other in zip(queries, others.tolist(), strict=True)]


def when(run: Run) -> list[Moment]:
    """Give the end: one way through training holds all that comes before."""
    return stages(run, ["end"])


BY = ("setting", "loss", "phase")
QUANTITIES = ("fall", *GROUPS, "missing")


def by_phase(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what each run's losses fell by in every phase of its reverse loss; a phase of no length is left out."""
    rows = []
    for _, run in frame.groupby("run", sort=False):
        lowest = where(run, loss="reverse").sort_values("fall")["trained"].iloc[-1]
        first, last = run["trained"].min(), run["trained"].max()
        ends = {"all": (first, last), "fall": (first, lowest), "rise": (lowest, last)}
        for phase, (start, stop) in ends.items():
            if start < stop:
                before, after = (where(run, trained=at).set_index("loss") for at in (start, stop))
                numbers = [f"{quantity}{null}" for quantity in QUANTITIES for null in ("", "_null")]
                fallen = after.assign(**(after[numbers].astype(float) - before[numbers].astype(float)), phase=phase)
                rows.append(fallen.reset_index())
    return pd.concat(rows)


def summarize(result: Result) -> Summary:
    phases = by_phase(result.frame)
    phases = phases.assign(beyond=phases["storage"] - phases["storage_null"])
    phases = phases.assign(missing_share=(phases["missing"] / phases["fall"]).abs())
    return Summary.of(phases, BY, (*QUANTITIES, "beyond", "missing_share"))


def takeaway(result: Result) -> str:
    """Say in whom storage lowered the reverse loss, and by more than that of another answer: both whole intervals are
    above 0."""
    of, known = {"loss": "reverse", "phase": "all"}, dict.fromkeys(result.frame["setting"])
    settings = [setting for setting in SETTINGS if setting in known]

    def found(name: str, among: Sequence[str]) -> list[Estimate]:
        return [result.summary.at(name, setting=setting, **of) for setting in among]

    of_storage = dict(
        zip(settings, zip(found("storage", settings), found("beyond", settings), strict=True), strict=True)
    )
    lowered = [setting for setting, both in of_storage.items() if {one.side for one in both} == {"above"}]
    single = [setting for setting, (storage, _) in of_storage.items() if storage.n == 1]
    n = sample_size(storage for storage, _ in of_storage.values())
    begin = "In no model do the intervals show that storage lowered the reverse loss more than another answer's"
    if lowered:
        by, fall = (between(estimate.value for estimate in found(name, lowered)) for name in ("storage", "fall"))
        begin = f"Storage is one: it took {by} of {fall} nats off the reverse loss of {listed(lowered)}, more than off "
        begin += "another answer's" + "; the intervals do not show that of others" * (len(lowered) < len(settings))
    doubt = f"; one seed decides nothing: {listed(single)}" if single else ""
    missing = by_phase(result.frame)["missing"].abs().max()  # in nats: of a small change no share says much
    return f"{begin} ({n}{doubt}). The parts add up within {missing:.2g} nats."


TICKS = [-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100]
MAIN = {
    ("storage", "effect"): ("through storage", PART_COLORS["storage"], "circle"),
    ("storage", "null"): ("null of the part to its left: another answer's loss", CHANCE, "x-thin-open"),
    ("routing", "effect"): ("through routing", PART_COLORS["routing"], "circle"),
    ("routing", "null"): ("null of the part to its left: another answer's loss", CHANCE, "x-thin-open"),
}
"""What the first panel shows side by side: name, colour and mark."""


def draw(result: Result) -> Panels:
    panels, frame, summary = Panels(), result.frame, result.summary
    known = [setting for setting in SETTINGS if len(where(frame, setting=setting))]
    farthest = summary.where(phase="all").frame.filter(regex="value|low|high").abs().max(axis=None)
    nats = {"range": [-1.2 * farthest, 1.2 * farthest], "tickvals": TICKS}
    y = {**nats, "title": "nats taken off the reverse<br>loss in all of training"}
    look: dict[str, Any] = {"y": y, "warp": np.arcsinh, "height": 340, "ticks_height": 3 * 26}  # linear below about 1
    (main,) = panels.row([""], x={"title": "model"}, **look)
    for i, ((part, which), (name, color, symbol)) in enumerate(MAIN.items()):
        found = {}
        for setting in known:
            one = summary.contrast(part, setting=setting, loss="reverse", phase="all")
            label = shown(setting).replace(", ", "<br>").replace(" ", "<br>", 1)
            found[f"{label}<br>n = {one.effect.n}"] = one.effect if which == "effect" else one.null
        main.estimates(found, name=name, color=color, symbol=symbol, shift=0.16 * (i - 1.5), upright=True)
    main.level(0.0, name="no change", color=CHANCE, x=[-0.5, len(known) - 0.5], listed=False)
    reverse = where(frame[frame["trained"] > 0], loss="reverse")
    for start in range(0, len(known), IN_A_ROW):
        some, last = known[start : start + IN_A_ROW], start + IN_A_ROW >= len(known)
        y = {**nats, "tickvals": TICKS[::2], "title": "nats off<br>since the start"}
        row = panels.row(list(map(shown, some)), x=TRAINING_STEPS, y=y, warp=np.arcsinh, height=170, ticks=last)
        for panel, setting in zip(row, some, strict=True):
            group = where(reverse, setting=setting)
            panel.curve(group, "trained", "fall", name="reverse loss, all parts", color=REVERSE)
            for part in GROUPS:
                dash = "dash" if part == "other" else "solid"
                panel.curve(group, "trained", part, name=part, color=PART_COLORS[part], dash=dash)
            panel.level(0.0, name="no change", color=CHANCE, listed=False)
    return panels


def over_training(result: Result) -> pd.DataFrame:
    """Return what each run took off its reverse loss through storage, over all of training."""
    return where(by_phase(result.frame), loss="reverse", phase="all")


ANALYSIS = Analysis(
    name="learning_path",
    question="Through which parts of the model does training lower the reverse loss?",
    configs=path_grid,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=[
        ClaimTest(
            claim="6",
            measure="nats that all of training took off the reverse loss through V and O",
            effect="storage",
            null="storage_null",
            null_is="the same queries asked for another entity of the answer's role",
            side="above",
            margin=0.1,
            rows=over_training,
            identity=mirrored,
        )
    ],
    settings={"every": EVERY, "groups": GROUPS},
    order=65,
    slow=True,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
