"""A masked diffusion model beside an autoregressive twin: the same head's routes and evidence in both. What either
answers, `large_model_prediction` says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pandas as pd

from mdm_interp import CheckpointAnalysis, Probe, Query, Result, Summary, where
from mdm_interp.data.queries import Direction
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import NOTHING as NONE
from mdm_interp.stats.estimates import Contrast, Estimate
from mdm_interp.stats.resampling import Draws, FactSample, head_agreement, rows_at
from mdm_interp.viz import CHANCE, CLUSTERS, CORRELATION, GOLD, INDIGO, MAGENTA, OLIVE, PROBABILITY, Panel, Panels
from mdm_interp.viz.words import counted_of, sample_size, side_of, span

HEADS = ("route", "evidence")
ASKED = {
    "forward": ("positional", "forward"),
    "reverse, positional": ("positional", "reverse"),
    "reverse, relational": ("relational", "reverse"),
}
"""What is drawn. Forward queries of both kinds are the same, but for what cannot be asked."""
NOTHING = Draws.nothing(())


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give per checkpoint, kind and direction of the query, by `what`: one row for all of the model (layer and head
    null), and of `route` and `evidence` one per head.

    `route` is the share of attention from the readout to the source, `evidence` the share of other facts' answers that
    the source writes less toward than its own, and `layer_evidence` the same of all heads of a layer, mean over layers.
    `value` is the model's, `twin_value` the twin's.
    `agreement` is their rank correlation over heads, `agreement_null` the same with the twin's heads shuffled within
    each layer. Heads are paired by place: where the two models differ in layers or heads (`paired` is false), no row is
    a head's and no agreement is there. `NAME_n` counts the independent clusters of facts behind a number, and `facts`
    and `clusters` all there are.
    """
    rows: list[dict[str, Any]] = []
    twin = probe.require_twin()
    paired = len({(side.model.cfg.n_layers, side.model.cfg.n_heads) for side in (probe, twin)}) == 1
    for kind, direction in itertools.product(KINDS, get_args(Direction)):
        asked, twin_asked, sample = probe.asked_alike(kind, direction)
        about: dict[str, Any] = {"twin": twin.name, "paired": paired, "kind": kind, "direction": direction}
        about |= {**sample.counts, "layer": None, "head": None}
        mine, theirs = means(probe.model, asked, sample), means(twin.model, twin_asked, sample)
        for what, of_model in mine.items():
            values, about["what"] = {"value": of_model, "twin_value": theirs[what]}, what
            if not paired or what not in HEADS:
                rows += rows_at({**values, "agreement": Contrast(NOTHING, NOTHING)}, (), about)
                continue
            rows += rows_at({**values, "agreement": head_agreement(of_model, theirs[what])}, (), about)
            of_head = Draws.nothing(of_model.value.shape)
            rows += rows_at({**values, "agreement": Contrast(of_head, of_head)}, ("layer", "head"), about)
    return rows


def means(model: HookedModel, queries: Sequence[Query], sample: FactSample) -> dict[str, Draws]:
    """Return a model's means over facts, `[layer head]` for what heads do."""
    by_head, by_layer = answer_evidence(model, queries, sample.contexts)
    return {
        "route": sample.mean(compute_routes(model, queries).pattern),
        "evidence": sample.mean(by_head.beaten.effect),
        "layer_evidence": sample.mean(by_layer.beaten.effect.mean(1)),
    }


def summarize(result: Result) -> Summary:
    """Give both models' means, and their agreement, by kind and direction."""
    by, quantities = ("checkpoint", "kind", "direction", "what"), ("value", "twin_value", "agreement")
    return Summary.read(result.frame[result.frame["layer"].isna()], by, quantities)


def takeaway(result: Result) -> str:
    found = [entry for entry in result.summary.where("agreement") if entry.null]
    if not found:
        return (
            "Unknown: the two differ in layers or heads, or the facts are too few, so no head can be paired with one."
        )
    clear = [side_of(entry.effect, entry.null) for entry in found].count("above")
    answer = "Yes" if clear == len(found) else "Only in part" if clear else "No"

    def told(what: str) -> str:
        of = [entry.effect for entry in found if entry.of["what"] == what and entry.of["direction"] == "forward"]
        return f"{what} by {span(of)}"

    return (
        f"{answer}: they agree surely more than shuffled heads in {counted_of(clear, len(found), 'cases')}; forward, "
        f"the heads of both correlate in {' and in '.join(map(told, HEADS))} "
        f"({sample_size([entry.effect for entry in found], CLUSTERS)})."
    )


SCATTERED = {"route": "share of attention", "evidence": "share of other answers beaten"}
NOT_PAIRED = "other layers or<br>heads (or too few<br>facts): not paired"
MODELS = {"value": ("masked model", MAGENTA, -0.12), "twin_value": ("its twin", INDIGO, 0.12)}
LOOKS = {"route": (OLIVE, "circle", -0.12), "evidence": (GOLD, "diamond", 0.12)}


def draw(result: Result) -> Panels:
    """Draw agreement over heads, what both models do, and every head of both."""
    panels, summary = Panels(), result.summary
    checkpoints = list(dict.fromkeys(result.frame["checkpoint"]))
    size = sample_size([entry.effect for entry in summary], CLUSTERS)
    x = {**CORRELATION, "title": "rank correlation over heads", "zeroline": True}
    titles = [f"{name}<br>{size}" for name in ASKED]
    for panel, asked in zip(panels.row(titles, x=x, height=60 + 70 * len(checkpoints)), ASKED.values(), strict=True):
        draw_agreement(panel, summary, asked, checkpoints)
    x = {**PROBABILITY, "title": "share of other answers beaten by a layer"}
    row = panels.row([""] * len(ASKED), x=x, height=30 + 44 * len(checkpoints))
    for panel, asked in zip(row, ASKED.values(), strict=True):
        for quantity, (name, color, shift) in MODELS.items():
            found = of_asked(summary.where(what="layer_evidence"), quantity, asked, checkpoints)
            panel.estimates(found, name=name, color=color, shift=shift)
    for what in SCATTERED:
        row = panels.row([""] * len(checkpoints), x=PROBABILITY, y=PROBABILITY, one_y=False)
        for panel, checkpoint in zip(row, checkpoints, strict=True):
            draw_heads(panel, where(result.frame, checkpoint=checkpoint), what, checkpoint == checkpoints[-1])
    return panels


def draw_heads(panel: Panel, frame: pd.DataFrame, what: str, last: bool) -> None:
    """Draw every head's number in both models, or say that heads cannot be paired."""
    heads = where(frame, kind="positional", direction="forward", what=what)
    heads = heads.dropna(subset=["head", "value", "twin_value"])
    title = f"{SCATTERED[what]}, forward,<br>in {frame['checkpoint'].iloc[0]}"
    panel.x(title={"text": title, "font": {"size": 15}})
    panel.y(title={"text": f"in {frame['twin'].iloc[0]}", "font": {"size": 15}})
    if heads.empty:
        panel.say(NOT_PAIRED)
        return
    places = [f"layer {layer:.0f}, head {head:.0f}" for layer, head in heads[["layer", "head"]].to_numpy(float)]
    marks: dict[str, Any] = {"colorscale": "Viridis", "cmin": 0, "cmax": heads["layer"].max(), "opacity": 0.8}
    marks |= {"color": heads["layer"], "size": 8 if len(heads) < 100 else 5}
    scale = "layer" if last else None
    panel.dots(heads, "value", "twin_value", name=what, label=places, scale=scale, listed=False, **marks)


def draw_agreement(panel: Panel, summary: Summary, asked: tuple[str, str], checkpoints: Sequence[str]) -> None:
    """Draw both agreements over heads beside their nulls, or say that heads cannot be paired."""
    if not summary.where("agreement"):
        panel.say(NOT_PAIRED)
        return
    for what, (color, symbol, shift) in LOOKS.items():
        of_what = summary.where(what=what)
        nulls = of_asked(of_what, "agreement", asked, checkpoints, null=True)
        panel.estimates(nulls, name="null: heads shuffled", color=CHANCE, symbol="x-thin", shift=shift + 0.08)
        found = of_asked(of_what, "agreement", asked, checkpoints)
        panel.estimates(found, name=what, color=color, symbol=symbol, shift=shift - 0.08)


def of_asked(
    summary: Summary, quantity: str, asked: tuple[str, str], checkpoints: Sequence[str], null: bool = False
) -> dict[str, Estimate]:
    """Return the estimates of every checkpoint, correlations with intervals that end where correlations do."""
    kind, direction = asked
    entries = {one.of["checkpoint"]: one for one in summary.where(quantity, kind=kind, direction=direction)}
    found = {name: (entry.null if null else entry.effect) or NONE for name, entry in entries.items()}
    within = {name: replace(one, low=max(one.low, -1.0), high=min(one.high, 1.0)) for name, one in found.items()}
    return {name: within.get(name, NONE) for name in checkpoints}


ANALYSIS = CheckpointAnalysis(
    name="twin",
    question="Do the heads of a masked model do what the same heads of its autoregressive twin do?",
    configs=demos,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    needs_twin=True,
    order=260,
    detail_of="large_model_prediction",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
