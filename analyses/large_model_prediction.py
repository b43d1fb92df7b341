"""What checkpoints answer about natural-language facts, forward and in reverse: exact match, log-likelihood and rank of
whole names, in every order of filling them in, whether or not the number of tokens is known."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary, where
from mdm_interp.experiments.subjects import demos_of_several_seeds
from mdm_interp.measures.answers import N_DRAWS, SEED, answer_all, mean_over_facts, questions
from mdm_interp.stats.estimates import NOTHING
from mdm_interp.stats.resampling import FactSample
from mdm_interp.stats.tables import as_columns, estimate_in
from mdm_interp.viz import CHANCE, FORWARD, PROBABILITY, REVERSE, Panels, checkpoints_and_kinds

DIRECTIONS = {"forward": FORWARD, "reverse": REVERSE}
SIDES = {"left": "circle", "right": "diamond-open"}
MEASURES = {
    "exact match": "exact match (share of facts)",
    "log-likelihood": "log-likelihood (nats per answer)",
    "rank": "rank of the worst token (geometric mean)",
}
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
    """Say how often every checkpoint answers exactly in one order, with the length known."""
    said, exact = [], result.summary.where(measure="exact match", length="known")
    for (checkpoint, model), frame in result.frame.groupby(["checkpoint", "model"], sort=False):
        order = USUAL[str(model)]
        found = exact.where(checkpoint=checkpoint, order=order)

        def told(kind: str, direction: str, found: Summary = found) -> str:
            sides = [found.where(kind=kind, direction=direction, asked=side) for side in SIDES]
            return " and ".join(f"{entry.effect.value:.2f}" for of_side in sides for entry in of_side)

        kinds = list(frame["kind"].unique())
        reverse = ", ".join(f"{kind} reverse {told(kind, 'reverse')}" for kind in kinds)
        said.append(f"{checkpoint} ({LABELS[order, 'known']}): forward {told(kinds[0], 'forward')}, {reverse}")
    bounded = (result.frame["order"] == "bound").any()
    return (
        f"Exact matches, number of tokens known. {'; '.join(said)}. Two numbers: asked for the left entity and for the "
        "right one. A causal model has one order and can be asked for the last entity only."
        + f" The bound is masked diffusion's, on the log-likelihood, from {N_DRAWS} draws of masks."
        * bool(bounded)
    )


def draw(result: Result) -> Panels:
    """Draw exact matches of all checkpoints in their usual order, and below them every order and measure of each."""
    panels, frame = Panels(), result.frame
    frame = frame.assign(label=[LABELS[asked] for asked in zip(frame["order"], frame["length"], strict=True)])
    draw_overview(panels, frame)
    places = checkpoints_and_kinds(frame)
    top = None
    for checkpoint, kind in places:
        of_place, last = where(frame, checkpoint=checkpoint, kind=kind), (checkpoint, kind) == places[-1]
        labels = [label for label in reversed(LABELS.values()) if (of_place["label"] == label).any()]
        titles = [f"{checkpoint}, {kind} reverse", "", ""]
        y = {"categoryarray": labels, "range": [-0.5, len(labels) - 0.5]}
        row = panels.row(titles, y=y, height=40 + 34 * len(labels))
        for panel, (measure, title) in zip(row, MEASURES.items(), strict=True):
            panel.x(title=title if last else None)
            for direction, color in DIRECTIONS.items():
                for side, symbol in SIDES.items():
                    rows = where(of_place, measure=measure, direction=direction, asked=side).to_dict("records")
                    for column, name, shade, mark in (
                        ("value_null", "null: another fact's answer", CHANCE, "line-ns"),
                        ("value", f"{direction}, asks for the {side} entity", color, symbol),
                    ):
                        estimates = {of_label["label"]: estimate_in(of_label, column) for of_label in rows}
                        panel.estimates(estimates, name=name, color=shade, symbol=mark)
        top = top or row
        row[0].x(range=[-0.04, 1.04])
        row[2].x(type="log")
        for panel, first in zip(row[1:], top[1:], strict=True):
            panel.x(matches=None if panel is first else f"x{first.axes}")  # one scale for all checkpoints
    return panels


def draw_overview(panels: Panels, frame: pd.DataFrame) -> None:
    """Draw exact matches, the number of tokens known."""
    exact = where(frame, measure="exact match", length="known")
    exact = exact[exact["order"] == exact["model"].map(USUAL)]
    names, kinds = list(dict.fromkeys(frame["checkpoint"])), list(dict.fromkeys(frame["kind"]))
    titles = [f"exact match, {kind} reverse" for kind in kinds]
    row = panels.row(titles, x=PROBABILITY, height=50 + 36 * len(names))
    for panel, kind in zip(row, kinds, strict=True):
        for direction, color in DIRECTIONS.items():
            for side, symbol in SIDES.items():
                of_side = where(exact, kind=kind, direction=direction, asked=side)
                found = {row["checkpoint"]: estimate_in(row, "value") for row in of_side.to_dict("records")}
                estimates = {name: found.get(name, NOTHING) for name in names}
                shift = {"forward": -0.14, "reverse": 0.14}[direction]
                name = f"{direction}, asks for the {side} entity"
                panel.estimates(estimates, name=name, color=color, symbol=symbol, shift=shift)


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
