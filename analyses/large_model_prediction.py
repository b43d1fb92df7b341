"""What checkpoints answer about natural-language facts, forward and in reverse: exact match, log-likelihood and rank of
whole names, in every order of filling them in, whether or not the number of tokens is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary, where
from mdm_interp.experiments.subjects import demos_of_several_seeds
from mdm_interp.measures.answers import N_DRAWS, SEED, answer_all, mean_over_facts, questions
from mdm_interp.stats.estimates import NOTHING, Contrast, Estimate
from mdm_interp.stats.resampling import FactSample
from mdm_interp.stats.tables import as_columns, estimate_in
from mdm_interp.viz import CHANCE, CLUSTERS, FORWARD, REVERSE, Panel, Panels
from mdm_interp.viz.words import counted_of, sample_size, side_of

DIRECTIONS = {"forward": FORWARD, "reverse": REVERSE}
SIDES = {"left": "circle", "right": "diamond-open"}
SHIFTS = {
    (direction, side): -0.27 + 0.18 * place
    for place, (direction, side) in enumerate((direction, side) for direction in DIRECTIONS for side in SIDES)
}
MEASURES = {
    "exact match": "exact match (share of facts)",
    "log-likelihood": "log-likelihood (nats per answer)",
}
"""What is drawn of each order; the rank of the worst token is in the table."""
LABELS = {
    ("one_shot", "known"): "one shot",
    ("confidence", "known"): "confidence",
    ("left_to_right", "known"): "left to right",
    ("bound", "known"): "bound",
    ("one_shot", "unknown"): "one shot, length unknown",
    ("confidence", "unknown"): "confidence, length unknown",
    ("left_to_right", "unknown"): "left to right, length unknown",
}
USUAL = {"MDM": "confidence", "ARM": "left_to_right"}
"""The order in which each kind of model is quoted."""
BY = ("checkpoint", "kind", "direction", "asked", "order", "length", "measure")


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give one row per checkpoint, kind, direction, side asked for, order, length and measure. Twins are checkpoints
    too.

    `value_n` and `value_null_n` count the independent clusters of facts behind a number, and `facts` and `clusters` all
    there are.
    """
    asked, groups = questions(probe.model, probe.prompts), {}
    for i, question in enumerate(asked):
        groups.setdefault((question.kind, question.direction, question.asked), []).append(i)
    samples = {group: FactSample.of([asked[i].pair for i in members]) for group, members in groups.items()}
    return [
        {
            "model": "ARM" if probe.model.cfg.is_causal else "MDM",
            **dict(zip(("kind", "direction", "asked"), group, strict=True)),
            "order": order,
            "length": length,
            "measure": measure,
            "queries": len(members),
            **samples[group].counts,
            **as_columns("value", mean_over_facts(samples[group], values.effect[members], measure)),
            **as_columns("value_null", mean_over_facts(samples[group], values.null[members], measure)),
        }
        for (order, length, measure), values in answer_all(probe.model, asked).items()
        for group, members in groups.items()
    ]


def summarize(result: Result) -> Summary:
    return Summary.read(result.frame, BY, ("value",))


def takeaway(result: Result) -> str:
    """Say how often checkpoints answer exactly in their usual order, with the length known."""
    exact = usual(result.frame)

    def of(direction: str) -> list[Contrast[Estimate]]:
        rows = where(exact, direction=direction).to_dict("records")
        return [Contrast(estimate_in(row, "value"), estimate_in(row, "value_null")) for row in rows]

    forward, reverse = of("forward"), of("reverse")
    least, most = min(one.effect.value for one in forward), max(one.effect.value for one in reverse)
    answer = "Forward yes" if least > 0.5 else "Forward not always"
    answer += ", in reverse seldom" if most < 0.5 else ", in reverse it depends"
    sides = [side_of(one.effect, one.null) for one in reverse]
    return (
        f"{answer}: forward, at least {least:.0%} of the names are exactly right, in reverse at most {most:.0%}, "
        f"surely more than other facts' answers are, in {counted_of(sides.count('above'), len(sides), 'cases')} "
        f"({sample_size([one.effect for one in (*forward, *reverse)], CLUSTERS)}; length known)."
    )


def usual(frame: pd.DataFrame) -> pd.DataFrame:
    """Return exact matches in each model's usual order, the number of tokens known."""
    exact = where(frame, measure="exact match", length="known")
    return pd.DataFrame(exact[exact["order"] == exact["model"].map(USUAL)])


def draw(result: Result) -> Panels:
    """Draw exact matches of all checkpoints in their usual order, and below them each order of each."""
    panels, frame = Panels(), result.frame
    frame = frame.assign(label=[LABELS[asked] for asked in zip(frame["order"], frame["length"], strict=True)])
    draw_overview(panels, frame)
    checkpoints, kinds = list(dict.fromkeys(frame["checkpoint"])), list(dict.fromkeys(frame["kind"]))
    top: list[Panel] = []
    for checkpoint in checkpoints:
        of_checkpoint = where(frame, checkpoint=checkpoint)
        labels = [label for label in LABELS.values() if (of_checkpoint["label"] == label).any()]
        titles = [f"{checkpoint}, {kind}" if not at else "" for kind in kinds for at in range(len(MEASURES))]
        y = {"tickfont": {"size": 14}}
        row = panels.row(titles, y=y, height=30 + 30 * len(labels))
        places = [(kind, measure) for kind in kinds for measure in MEASURES]
        for panel, (kind, measure) in zip(row, places, strict=True):
            of_panel = where(of_checkpoint, kind=kind, measure=measure)
            panel.x(title={"text": MEASURES[measure], "font": {"size": 15}} if checkpoint == checkpoints[-1] else None)
            panel.x(nticks=4, rangemode="normal")
            draw_orders(panel, of_panel, labels)
        top = top or row
        for panel, first in zip(row, top, strict=True):
            panel.x(matches=None if panel is first else f"x{first.axes}")  # one scale for all checkpoints
    return panels


def draw_orders(panel: Panel, frame: pd.DataFrame, labels: Sequence[str]) -> None:
    """Draw one measure in every order, and what another fact's answer gets of likelihood."""
    for direction, color in DIRECTIONS.items():
        for side, symbol in SIDES.items():
            rows = {row["label"]: row for row in where(frame, direction=direction, asked=side).to_dict("records")}
            found = {label: estimate_in(rows[label], "value") if label in rows else NOTHING for label in labels}
            name, shift = f"{direction}, asks for the {side} entity", SHIFTS[direction, side]
            panel.estimates(found, name=name, color=color, symbol=symbol, size=6, shift=shift)
    nulls = where(frame, measure="log-likelihood", direction="reverse")
    for side, shift in (("left", SHIFTS["reverse", "left"]), ("right", SHIFTS["reverse", "right"])):
        rows = {row["label"]: row for row in where(nulls, asked=side).to_dict("records")}
        found = {label: estimate_in(rows[label], "value_null") if label in rows else NOTHING for label in labels}
        panel.estimates(
            found, name="null: another fact's answer, in reverse", color=CHANCE, symbol="x-thin", shift=shift
        )


def draw_overview(panels: Panels, frame: pd.DataFrame) -> None:
    """Draw exact matches, the number of tokens known."""
    exact = usual(frame)
    names, kinds = list(dict.fromkeys(frame["checkpoint"])), list(dict.fromkeys(frame["kind"]))
    size = sample_size([estimate_in(row, "value") for row in exact.to_dict("records")], CLUSTERS)
    titles = [f"{kind} reverse<br>{size}" for kind in kinds]
    x = {"range": [-0.1, 1.1], "title": "exact match (share of facts)"}
    row = panels.row(titles, x=x, height=40 + 52 * len(names))
    for panel, kind in zip(row, kinds, strict=True):
        for (direction, side), shift in SHIFTS.items():
            of_side = where(exact, kind=kind, direction=direction, asked=side)
            found = {row["checkpoint"]: estimate_in(row, "value") for row in of_side.to_dict("records")}
            estimates = {name: found.get(name, NOTHING) for name in names}
            look = {"color": DIRECTIONS[direction], "symbol": SIDES[side], "shift": shift}
            panel.estimates(estimates, name=f"{direction}, for the {side} entity", **look)


ANALYSIS = CheckpointAnalysis(
    name="large_model_prediction",
    question="Can a checkpoint name the other entity, forward and in reverse?",
    configs=demos_of_several_seeds,
    measure=measure,
    of_twins=True,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"draws": N_DRAWS, "seed": SEED},
    order=240,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
