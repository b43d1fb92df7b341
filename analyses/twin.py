"""A masked diffusion model beside an autoregressive twin: the same head's routes and evidence in both, and what either
predicts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.data.prompts import Kind
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.experiments.analysis import CheckpointAnalysis
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe, demos
from mdm_interp.inference.prediction import predict
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.routes import compute_routes
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import Draws, FactSample, head_agreement, rows_at, summary_of
from mdm_interp.stats.tables import where
from mdm_interp.viz.layers import say, span_of
from mdm_interp.viz.plots import interval_bars
from mdm_interp.viz.theme import BLUE, GREEN, ORANGE, VERMILION, faded, legend_at

DIRECTIONS = ("forward", "reverse")
HEADS = ("route", "evidence")
ASKED = {
    "forward": ("positional", "forward"),
    "reverse, positional": ("positional", "reverse"),
    "reverse, relational": ("relational", "reverse"),
}
"""What is drawn. Forward queries of both kinds are the same, but for what cannot be asked."""
NOTHING = Draws.nothing(())


@dataclass(frozen=True)
class Asked:
    """The same questions in each model's own form."""

    queries: tuple[list[Query], list[Query]]
    """The model's and its twin's."""
    sample: FactSample


def questions(probe: Probe, kind: Kind, direction: str) -> Asked:
    """What both models are asked in the same words: forward for the right entity, in reverse for the left one, which
    stands last there. Facts and templates that one of them cannot be asked are left out."""
    assert probe.twin is not None
    by_place = [_last_answers(side, kind, direction) for side in (probe, probe.twin)]
    common = [place for place in by_place[0] if place in by_place[1]]
    if not common:
        raise UserError(f"facts: {probe.name} and {probe.twin.name} can be asked no {kind} query both; use other facts")
    mine, theirs = ([getattr(pairs[place], direction) for place in common] for pairs in by_place)
    sample = FactSample.of([by_place[0][place] for place in common], [template for _, template in common])
    return Asked((mine, theirs), sample)


def _last_answers(probe: Probe, kind: Kind, direction: str) -> dict[tuple[int, int], QueryPair]:
    """Give by fact and template the pair whose query in this direction has its answer after its source."""
    prompts = probe.prompts[kind]
    return {
        (pair.fact, template): pair
        for pair, template in zip(prompts.pairs, prompts.templates, strict=True)
        if getattr(pair, direction).offset < 0
    }


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give per checkpoint, kind and direction of the query, by `what`: one row for all of the model (layer and head
    null), and of `route` and `evidence` one per head.

    `route` is the share of attention from the readout to the source, `evidence` the share of other facts' answers that
    the source writes less toward than its own, and `layer_evidence` the same of all heads of a layer, mean over layers;
    `exact_match` and `log_probability` (nats) are of the answer. `value` is the model's, `twin_value` the twin's.
    `agreement` is their rank correlation over heads, `null` the same with the twin's heads shuffled within each layer.
    Heads are paired by place: where the two models differ in layers or heads (`paired` is false), no row is a head's
    and no agreement is there. `NAME_n` counts the independent clusters of facts behind a number, and `facts` and
    `clusters` all there are.
    """
    rows: list[dict[str, Any]] = []
    if probe.twin is None:
        raise UserError(f"twin: {probe.name} has none to be compared with; name a second checkpoint")
    models = probe.model, probe.twin.model
    paired = len({(model.cfg.n_layers, model.cfg.n_heads) for model in models}) == 1
    for kind, direction in itertools.product(KINDS, DIRECTIONS):
        asked = questions(probe, kind, direction)
        about = {"twin": probe.twin.name, "paired": paired, "kind": kind}
        about |= {"direction": direction, **asked.sample.counts, "layer": None, "head": None}
        for what, (mine, theirs) in compare(models, asked).items():
            axes = mine.value.ndim
            alike, shuffled = head_agreement(mine, theirs) if axes and paired else (NOTHING, NOTHING)
            whole = {"value": mine.over(axes), "twin_value": theirs.over(axes)}
            rows += rows_at(whole | {"agreement": alike, "null": shuffled}, (), {**about, "what": what})
            if axes and paired:
                blank = dict.fromkeys(("agreement", "null"), Draws.nothing(mine.value.shape))
                of_heads = {"value": mine, "twin_value": theirs, **blank}
                rows += rows_at(of_heads, ("layer", "head"), {**about, "what": what})
    return rows


def compare(models: tuple[Any, Any], asked: Asked) -> dict[str, tuple[Draws, Draws]]:
    """Both models' means over facts, `[layer head]` for what heads do; drawn from the same facts at the same time."""
    sample, measured = asked.sample, []
    for model, queries in zip(models, asked.queries, strict=True):
        predicted = predict(model, queries)
        by_head, by_layer = answer_evidence(model, queries, sample.contexts)
        measured.append(
            {
                "route": sample.mean(compute_routes(model, queries).pattern),
                "evidence": sample.mean(by_head.beaten),
                "layer_evidence": sample.mean(by_layer.beaten.mean(1)),
                "exact_match": sample.mean(predicted.correct.double()),
                "log_probability": sample.mean(predicted.log_probability),
            }
        )
    return {what: (measured[0][what], measured[1][what]) for what in measured[0]}


def summarize(result: Result) -> dict[str, Estimate]:
    """Agreement and its null, and both models' means and predictions, by kind and direction."""
    places, names = ("checkpoint", "kind", "direction", "what"), ("value", "twin_value", "agreement", "null")
    return summary_of(result.frame, places, names)


def takeaway(result: Result) -> str:
    def of(kind: str, direction: str, what: str, name: str) -> str:
        return span_of(result.summary, f" / {kind} / {direction} / {what} / {name}")

    if of("positional", "forward", "route", "agreement"):
        heads = " and ".join(
            f"forward {what} {of('positional', 'forward', what, 'agreement')} (shuffled within layers "
            f"{of('positional', 'forward', what, 'null')})"
            for what in HEADS
        )
        heads = f"Rank correlation over heads of the two models: {heads}."
    else:
        heads = "The two differ in layers or heads, so no head can be followed from one to the other."
    both = {
        what: ", ".join(
            f"{name} {of(*place, what, 'value')} against {of(*place, what, 'twin_value')}"
            for name, place in ASKED.items()
        )
        for what in COMPARED
    }
    return (
        f"{heads} Other answers beaten by what a layer writes, model against twin: {both['layer_evidence']}; exact "
        f"match {both['exact_match']} (a masked model fills all tokens of a name at once, a causal one is given each "
        "token before the next)."
    )


SCATTERED = {"route": "share of attention, forward", "evidence": "answers beaten, forward"}
COMPARED = {"layer_evidence": "answers beaten, layers", "exact_match": "exact match"}
ROW, HEAD, FOOT = 280, 160, 140
"""Pixels: a row of panels, the panels' titles, and legends below the panels."""


def draw(result: Result) -> go.Figure:
    frame = result.frame
    checkpoints = list(dict.fromkeys(frame["checkpoint"]))
    height = HEAD + ROW * len(checkpoints)
    figure = make_subplots(
        len(checkpoints),
        5,
        column_titles=[*SCATTERED.values(), "agreement over heads", *COMPARED.values()],
        horizontal_spacing=0.07,
        vertical_spacing=0.0 if len(checkpoints) == 1 else 105 / height,
    )
    for row, checkpoint in enumerate(checkpoints, start=1):
        of_checkpoint = where(frame, checkpoint=checkpoint, kind="positional", direction="forward")
        for col, what in enumerate(SCATTERED, start=1):
            add_heads(figure, where(of_checkpoint, what=what), row, col)
            figure.update_xaxes(title_text=f"in {checkpoint}", row=row, col=col)
        figure.update_yaxes(title_text=f"in {of_checkpoint['twin'].iloc[0]}", row=row, col=1)
        add_agreement(figure, result.summary, checkpoint, row)
        add_comparison(figure, result.summary, checkpoint, row)
    below = -75 / height
    bar = {"orientation": "h", "x": 0.17, "y": below - 45 / height, "yanchor": "top", "len": 0.3, "thickness": 14}
    bar["title"] = {"text": "layer", "side": "right"}
    figure.update_layout(
        coloraxis={"colorscale": "Viridis", "colorbar": bar},
        legend=legend_at(0.52, below) | {"orientation": "v"},
        legend2=legend_at(0.83, below),
    )
    figure.update_layout(height=height + FOOT)
    return figure


def add_heads(figure: go.Figure, frame: pd.DataFrame, row: int, col: int) -> None:
    """Every head's number in both models, or that they cannot be paired."""
    heads = frame.dropna(subset=["head", "value", "twin_value"])
    if heads.empty:
        say(figure, NOT_PAIRED, row, col)
        return
    marker = {"size": 8 if len(heads) < 100 else 5, "opacity": 0.8, "color": heads["layer"], "coloraxis": "coloraxis"}
    trace = go.Scatter(
        x=heads["value"],
        y=heads["twin_value"],
        mode="markers",
        marker=marker,
        showlegend=False,
        customdata=heads[["layer", "head"]],
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>%{x:.3g}, twin %{y:.3g}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=col)


NOT_PAIRED = "other layers or<br>heads (or too few<br>facts): not paired"


def add_agreement(figure: go.Figure, summary: Mapping[str, Estimate], checkpoint: str, row: int) -> None:
    shown = False
    for shift, (what, color) in zip((-0.12, 0.12), (("route", GREEN), ("evidence", ORANGE)), strict=True):
        for name, label, mark in (("null", f"{what}, heads shuffled", "x-thin"), ("agreement", what, "circle")):
            style = {"name": label, "color": faded(color, 0.5) if name == "null" else color, "symbol": mark}
            shown |= add_marks(figure, estimates(summary, checkpoint, what, name), shift, style, "legend", row, 3)
    if shown:
        figure.update_xaxes(range=[-1.05, 1.05], row=row, col=3)
    else:
        say(figure, NOT_PAIRED, row, 3)


def add_comparison(figure: go.Figure, summary: Mapping[str, Estimate], checkpoint: str, row: int) -> None:
    """What both models store and predict."""
    for col, what in enumerate(COMPARED, start=4):
        for shift, name, label, color in ((-0.12, "value", "model", BLUE), (0.12, "twin_value", "twin", VERMILION)):
            style = {"name": label, "color": color, "symbol": "circle"}
            add_marks(figure, estimates(summary, checkpoint, what, name), shift, style, "legend2", row, col)
        figure.update_xaxes(range=[-0.05, 1.05], row=row, col=col)


def estimates(summary: Mapping[str, Estimate], checkpoint: str, what: str, name: str) -> list[Estimate | None]:
    """Of everything in :data:`ASKED`."""
    return [summary.get(f"{checkpoint} / {kind} / {direction} / {what} / {name}") for kind, direction in ASKED.values()]


def add_marks(
    figure: go.Figure,
    measured: Sequence[Estimate | None],
    shift: float,
    style: Mapping[str, str],
    legend: str,
    row: int,
    col: int,
) -> bool:
    """Estimates one below the other, with their intervals; whether there were any."""
    points = pd.DataFrame([{"at": at, **vars(one)} for at, one in enumerate(measured) if one is not None])
    if points.empty:
        return False
    name, color = style["name"], style["color"]
    listed = any(True for _ in figure.select_traces({"legendgroup": name}))
    trace = go.Scatter(
        x=points["value"],
        y=points["at"] + shift,
        error_x=interval_bars(points),
        mode="markers",
        marker={"color": color, "symbol": style["symbol"], "size": 9, "line": {"color": color, "width": 2}},
        name=name,
        legendgroup=name,
        legend=legend,
        showlegend=not listed,
        hovertemplate=f"{name}: %{{x:.3g}}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=col)
    ticks = {"tickvals": list(range(len(ASKED))), "ticktext": [asked.replace(", ", ",<br>") for asked in ASKED]}
    figure.update_yaxes(ticks, range=[len(ASKED) - 0.5, -0.5], showticklabels=col == 3 or col == 4, row=row, col=col)
    return True


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
