"""Objective and attention, each with each: what a model answers after `B r` when it learnt `A r B` in any order or from
left to right, with attention to both sides or to the left alone; and what masking at a fixed rate changes.

All are asked the same: B after `A r`, as trained, and A after `B r`, with nothing behind it. A model that sees both
sides can also be asked for B before `r A`, where its answer and source are those of training.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from mdm_interp import Analysis, Result, Run, Summary, predict, where
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.grids import CELLS, MASK_RATES, POOL, attention_grid
from mdm_interp.experiments.scope import trained_stages
from mdm_interp.viz import Panels

ASKED = {"forward": "B after A r,<br>as trained", "reverse": "A after B r", "mirrored": "B before r A"}
"""The questions: what rows and summary call them, and how readers know them."""
AT_RATE = "any order at {:.0%}"
TRAINED = [*CELLS, *map(AT_RATE.format, MASK_RATES)]


def trained_as(run: Run) -> str:
    """Return the name of a run's cell, or of its rate."""
    config = run.config
    if config.mask_rate is not None:
        return AT_RATE.format(config.mask_rate)
    (name,) = [name for name, cell in CELLS.items() if cell == (config.objective, config.model.attention)]
    return name


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Ask every model the same two questions, and one that sees both sides the third; NaN where it does not."""
    model, world = run.model(step), run.facts
    same = world.query_pairs("left_to_right", attention="causal")
    asked = {"forward": [pair.forward for pair in same], "reverse": [pair.reverse for pair in same]}
    if not run.config.model.is_causal:
        asked["mirrored"] = [pair.reverse for pair in world.query_pairs("left_to_right")]
    answered = {name: predict(model, queries).probability.mean().item() for name, queries in asked.items()}
    meaning = "equality" if run.config.facts.world == POOL else "relations"
    return [{"meaning": meaning, "trained": trained_as(run), "mirrored": float("nan"), **answered}]


def summarize(result: Result) -> Summary:
    frame = result.frame.astype({name: float for name in ASKED})
    above = frame.assign(**{f"{name}_above_chance": frame[name] - frame["chance"] for name in ASKED})
    by = ("meaning", "trained", "stage")
    return Summary.of(above, by, (*ASKED, *(f"{name}_above_chance" for name in ASKED))) + Summary.of(
        frame.drop_duplicates(["meaning", "seed"]), ("meaning",), ("chance",)
    )


def takeaway(result: Result) -> str:
    summary = result.summary

    def answered(meaning: str, name: str) -> str:
        """List who answers a question above chance: whose interval lies above it; a single seed decides nothing."""
        found = []
        for trained in TRAINED:
            of = {"meaning": meaning, "trained": trained, "stage": "end"}
            if summary.at(f"{name}_above_chance", **of).side == "above":
                found.append(f"{trained} ({summary.at(name, **of).value:.2f})")
        return ", ".join(found) or "nobody for sure"

    def said(meaning: str) -> str:
        chance, mirrored = summary.at("chance", meaning=meaning).value, answered(meaning, "mirrored")
        both = f"A after `B r` by {answered(meaning, 'reverse')}; and B before `r A` by {mirrored}"
        return f"{meaning} (chance {chance:.2g}): {both}"

    worlds = dict.fromkeys(result.frame["meaning"])
    return f"Answered above chance at the end of training, in {'. In '.join(map(said, worlds))}."


def draw(result: Result) -> Panels:
    panels, worlds = Panels(), list(dict.fromkeys(result.frame["meaning"]))
    for stage, title in {"end": "end of training", "early": "first learnt forward"}.items():
        if not len(at := result.summary.where(stage=stage)):
            continue
        titles = [f"{world}, {title}" for world in worlds]
        row = panels.row(titles, x={"title": "question"}, y={"title": "trained"}, height=300)
        for panel, world in zip(row, worlds, strict=True):
            cells = at.where(meaning=world).frame
            cells = cells[cells["quantity"].isin(list(ASKED))].dropna(subset=["value"])
            cells, scale = cells.assign(asked=cells["quantity"].map(ASKED)), "probability" if panel is row[-1] else None
            panel.probabilities(cells, ("trained", TRAINED), ("asked", list(ASKED.values())), scale)
    return panels


def above_chance(result: Result, attention: str, objective: str | None = None) -> pd.DataFrame:
    """Return by how much the answers of those who were trained at no fixed rate are above chance."""
    frame = where(result.frame, mask_rate=0.0, attention=attention)
    frame = frame if objective is None else where(frame, objective=objective)
    above = {name: frame[name].astype(float) - frame["chance"] for name in ASKED}
    return frame.assign(**above, nothing=0.0)


def both_together(result: Result) -> pd.DataFrame:
    """Return how much more an MDM answers than the model trained from left to right with the same attention."""
    frame, place = where(result.frame, mask_rate=0.0, attention="bidirectional"), ["meaning", "stage", "seed"]
    mixed = where(frame, objective="left_to_right").set_index(place)["reverse"]
    mdm = where(frame, objective="any_order")
    other = mdm[place].apply(lambda row: mixed.get(tuple(row), float("nan")), axis=1)
    return mdm.assign(more=mdm["reverse"] - other, nothing=0.0)


CLAIMS = (
    ClaimTest(
        claim="8",
        measure="with causal attention: probability above chance of A after `B r`",
        effect="reverse",
        null="forward",
        null_is="the same of B after `A r`, as trained",
        side="below",
        margin=0.05,
        rows=lambda result: above_chance(result, "causal"),
        of_arms=True,
    ),
    *(
        ClaimTest(
            claim="8",
            measure=f"from left to right with bidirectional attention: probability above chance of {asked}",
            effect=name,
            null="nothing",
            null_is="0: chance",
            side="above",
            margin=0.05,
            rows=lambda result: above_chance(result, "bidirectional", "left_to_right"),
        )
        for name, asked in (("reverse", "A after `B r`"), ("mirrored", "B before `r A`"))
    ),
    ClaimTest(
        claim="8",
        measure="any-order masking less left to right, both with bidirectional attention: probability of A after `B r`",
        effect="more",
        null="nothing",
        null_is="0: no more",
        side="above",
        margin=0.05,
        rows=both_together,
    ),
)

ANALYSIS = Analysis(
    name="objective_and_attention",
    question="Is it the objective or the attention that makes reverse queries answerable?",
    configs=attention_grid,
    measure=measure,
    when=trained_stages,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=CLAIMS,
    order=16,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
