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
from mdm_interp.viz import Panels, between, opening, sample_size, with_n

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


BOTH, ATTENTION, OBJECTIVE, NEITHER = CELLS
REASONS = {
    frozenset({BOTH}): "both: it takes any-order masking and attention to both sides",
    frozenset({BOTH, OBJECTIVE}): "the objective: any-order masking does it, whatever attention sees",
    frozenset({BOTH, ATTENTION}): "the attention: seeing both sides does it, whatever the objective",
    frozenset(CELLS): "neither: every objective does it with every attention",
    frozenset(): "neither: no objective does it with any attention",
}
"""What follows if these cells answer in reverse and no others do."""


def takeaway(result: Result) -> str:
    """Say which cells answer A after `B r` above chance: their whole interval is above it. Cells of which the interval
    holds chance, or of one seed, decide nothing."""
    summary, worlds = result.summary, dict.fromkeys(result.frame["meaning"])

    def reason(meaning: str) -> str:
        of: dict[str, Any] = {"meaning": meaning, "stage": "end"}
        sides = {name: summary.at("reverse_above_chance", trained=name, **of).side for name in CELLS}
        answered = frozenset(name for name, side in sides.items() if side == "above")
        if "undecided" in sides.values() or answered not in REASONS:
            return f"undecided (above chance for sure: {'; '.join(sorted(answered)) or 'none'})"
        return REASONS[answered]

    reasons = {meaning: reason(meaning) for meaning in worlds}
    same, (first, *_) = len(set(reasons.values())) == 1, reasons.values()
    said = first if same else "; ".join(f"in {meaning}, {why}" for meaning, why in reasons.items())
    found = {
        name: [summary.at("reverse", meaning=meaning, trained=name, stage="end").value for meaning in worlds]
        for name in CELLS
    }
    others = between(value for name in CELLS if name != BOTH for value in found[name])
    chances = between((summary.at("chance", meaning=meaning).value for meaning in worlds), ".2g")
    n = sample_size(entry.effect for entry in summary.where("reverse", stage="end"))
    both = " and ".join(f"{value:.2f} in {meaning}" for meaning, value in zip(worlds, found[BOTH], strict=True))
    return (
        f"{opening(said)}. With both, A after `B r` gets {both}; with one or none of them {others} (chance {chances}; "
        f"{n}).{' In equality one relation holds either way.' if 'equality' in worlds else ''}"
    )


def draw(result: Result) -> Panels:
    panels, worlds = Panels(), list(dict.fromkeys(result.frame["meaning"]))
    for stage, title in {"end": "end of training", "early": "first learnt forward"}.items():
        if not len(at := result.summary.where(stage=stage)):
            continue
        blank, height = ("not asked", 340) if stage == "end" else ("not asked, or not learnt", 270)
        at_stage = where(result.frame, stage=stage)
        titles = [with_n(f"{world}, {title}", where(at_stage, meaning=world), "trained") for world in worlds]
        x, y = {"title": f"question (blank: {blank})", "showgrid": False}, {"title": "trained", "showgrid": False}
        row = panels.row(titles, x=x, y=y, height=height)
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
    detail_of="reversal_curse",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
