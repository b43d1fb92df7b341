"""A masked diffusion model beside an autoregressive twin: the same head's routes and evidence in both, and what either
predicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import pandas as pd

from mdm_interp import CheckpointAnalysis, Probe, Query, Result, Summary, predict, where
from mdm_interp.data.queries import Direction
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast, Estimate
from mdm_interp.stats.resampling import Draws, FactSample, head_agreement, rows_at
from mdm_interp.viz import BLUE, CORRELATION, GREEN, ORANGE, VERMILION, Panel, Panels, faded

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
    the source writes less toward than its own, and `layer_evidence` the same of all heads of a layer, mean over layers;
    `exact_match` and `log_probability` (nats) are of the answer. `value` is the model's, `twin_value` the twin's.
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
    predicted = predict(model, queries)
    by_head, by_layer = answer_evidence(model, queries, sample.contexts)
    return {
        "route": sample.mean(compute_routes(model, queries).pattern),
        "evidence": sample.mean(by_head.beaten.effect),
        "layer_evidence": sample.mean(by_layer.beaten.effect.mean(1)),
        "exact_match": sample.mean(predicted.correct.double()),
        "log_probability": sample.mean(predicted.log_probability),
    }


def summarize(result: Result) -> Summary:
    """Give both models' means and predictions, and their agreement, by kind and direction."""
    by, quantities = ("checkpoint", "kind", "direction", "what"), ("value", "twin_value", "agreement")
    return Summary.read(result.frame[result.frame["layer"].isna()], by, quantities)


def takeaway(result: Result) -> str:
    def agreement(what: str, null: bool = False) -> str:
        return result.summary.span("agreement", null, kind="positional", direction="forward", what=what)

    def both(what: str) -> str:
        """Give the model's numbers against the twin's."""
        said = []
        for name, (kind, direction) in ASKED.items():
            of = partial(result.summary.span, kind=kind, direction=direction, what=what)
            said.append(f"{name} {of('value')} against {of('twin_value')}")
        return ", ".join(said)

    heads = "The two differ in layers or heads, so no head can be followed from one to the other."
    if agreement("route"):
        said = [f"forward {what} {agreement(what)} (shuffled within layers {agreement(what, True)})" for what in HEADS]
        heads = f"Rank correlation over heads of the two models: {' and '.join(said)}."
    return (
        f"{heads} Other answers beaten by what a layer writes, model against twin: {both('layer_evidence')}; exact "
        f"match {both('exact_match')} (a masked model fills all tokens of a name at once, a causal one is given each "
        "token before the next)."
    )


SCATTERED = {"route": "share of attention,<br>forward", "evidence": "answers beaten,<br>forward"}
COMPARED = {"layer_evidence": "answers beaten, layers", "exact_match": "exact match"}
NOT_PAIRED = "other layers or<br>heads (or too few<br>facts): not paired"
MODELS = {"value": ("model", BLUE, -0.12), "twin_value": ("twin", VERMILION, 0.12)}


def draw(result: Result) -> Panels:
    panels, summary = Panels(), result.summary
    for checkpoint in dict.fromkeys(result.frame["checkpoint"]):
        titles = [*SCATTERED.values(), "agreement over heads", *COMPARED.values()]
        *scattered, agreeing, beaten, matched = panels.row(titles, one_y=False)
        draw_heads(scattered, result.frame, checkpoint)
        draw_agreement(agreeing, summary.where(checkpoint=checkpoint), checkpoint)
        for panel, what in zip((beaten, matched), COMPARED, strict=True):
            panel.x(range=[-0.05, 1.05])
            for quantity, (name, color, shift) in MODELS.items():
                found = of_asked(summary, quantity, checkpoint=checkpoint, what=what)
                panel.estimates(found, name=name, color=color, shift=shift)
    return panels


def draw_heads(panels: Sequence[Panel], frame: pd.DataFrame, checkpoint: str) -> None:
    """Draw every head's number in both models, or say that heads cannot be paired."""
    of_checkpoint = where(frame, checkpoint=checkpoint, kind="positional", direction="forward")
    panels[0].y(title=f"in {of_checkpoint['twin'].iloc[0]}")
    colors: dict[str, Any] = {"colorscale": "Viridis", "cmin": 0, "cmax": frame["layer"].max(), "opacity": 0.8}
    for panel, what in zip(panels, SCATTERED, strict=True):
        panel.x(title=f"in {checkpoint}")
        heads = where(of_checkpoint, what=what).dropna(subset=["head", "value", "twin_value"])
        if heads.empty:
            panel.say(NOT_PAIRED)
        places = [f"layer {layer:.0f}, head {head:.0f}" for layer, head in heads[["layer", "head"]].to_numpy(float)]
        marks = colors | {"color": heads["layer"], "size": 8 if len(heads) < 100 else 5}
        scale = "layer" if panel is panels[-1] else None
        panel.dots(heads, "value", "twin_value", name=what, label=places, scale=scale, listed=False, **marks)


def draw_agreement(panel: Panel, summary: Summary, checkpoint: str) -> None:
    """Draw both agreements over heads beside their nulls, or say that heads cannot be paired."""
    if not summary.where("agreement"):
        panel.say(NOT_PAIRED)
        return
    panel.x(**CORRELATION)
    for what, color, shift in (("route", GREEN, -0.12), ("evidence", ORANGE, 0.12)):
        of: dict[str, Any] = {"checkpoint": checkpoint, "what": what}
        null: dict[str, Any] = {"name": f"{what}, heads shuffled", "color": faded(color, 0.5), "symbol": "x-thin"}
        panel.estimates(of_asked(summary, "agreement", null=True, **of), shift=shift, **null)
        panel.estimates(of_asked(summary, "agreement", **of), name=what, color=color, shift=shift)


def of_asked(summary: Summary, quantity: str, null: bool = False, **of: Any) -> dict[str, Estimate]:
    """Return the estimates of everything in :data:`ASKED`, by its name in two lines."""
    read = summary.null if null else summary.at
    return {
        name.replace(", ", ",<br>"): read(quantity, kind=kind, direction=direction, **of)
        for name, (kind, direction) in ASKED.items()
    }


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
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
