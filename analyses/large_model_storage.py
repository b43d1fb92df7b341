"""What sources of natural-language facts write toward their answers, in every layer and head: forward, in reverse, and
against the answers of other facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from mdm_interp.data.queries import QueryPair
from mdm_interp.experiments.analysis import CheckpointAnalysis
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe, demos
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import Draws, FactSample, rows_at, summary_of
from mdm_interp.viz.layers import HeadMap, LayerCurves, draw_layers, layers_height, span_of
from mdm_interp.viz.theme import CHANCE, FORWARD, PURPLE, REVERSE

SIDES = ("forward", "reverse")
COMPARED = ("specific", "beaten", "null_specific", "null_beaten")
MEASURES = (*(f"{side}_{name}" for side in SIDES for name in COMPARED), "place_index")


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give per checkpoint and kind one row per head, one per layer (head null: what all its heads write, summed) and
    one for the model (layer null too: mean over layers).

    `…_specific` is evidence, `…_beaten` the share of other answers beaten, `…_null_…` the same for another fact's
    answer, as :class:`~mdm_interp.measures.answer_evidence.AnswerEvidence` has them; each source is compared within its
    context. `place_index` is the variance of the layer's own-answer evidence over the two places of a pair over its
    variance over facts; null for heads, and where pairs share no source. `NAME_n` counts the independent clusters of
    facts behind a number, and `facts` and `clusters` all there are.
    """
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        pairs = probe.pairs(kind)
        sample = FactSample.of(pairs, probe.prompts[kind].templates)
        by_side = {
            side: answer_evidence(probe.model, [getattr(pair, side) for pair in pairs], sample.contexts)
            for side in SIDES
        }
        about = {"kind": kind, "layer": None, "head": None, **sample.counts}
        heads, layers = (
            {f"{side}_{name}": sample.mean(getattr(by_side[side][level], name)) for side in SIDES for name in COMPARED}
            for level in (0, 1)
        )
        forward, reverse = (by_side[side][1].own for side in SIDES)
        layers["place_index"] = place_index(forward, reverse, pairs, sample)
        heads["place_index"] = Draws.nothing(heads["forward_specific"].value.shape)
        rows += rows_at(heads, ("layer", "head"), about)
        rows += rows_at(layers, ("layer",), about)
        rows += rows_at({name: column.over(1) for name, column in layers.items()}, (), about)
    return rows


def place_index(forward: Tensor, reverse: Tensor, pairs: Sequence[QueryPair], sample: FactSample) -> Draws:
    """As `evidence.place_index`, of own-answer evidence `[pair layer]` and with the variance over facts taken within
    contexts."""
    if not all(pair.shared for pair in pairs):
        return Draws.nothing(forward.shape[1:])
    middle = (forward + reverse) / 2
    for context in sample.members():
        middle[context] -= middle[context].mean(0)
    return sample.ratio(((forward - reverse) / 2).pow(2), middle.pow(2))


def summarize(result: Result) -> dict[str, Estimate]:
    """Give every measure of every model and kind: the mean over its layers, heads summed."""
    return summary_of(result.frame, ("checkpoint", "kind"), MEASURES)


def takeaway(result: Result) -> str:
    said = []
    for kind in KINDS:

        def of(name: str, kind: str = kind) -> str:
            return span_of(result.summary, f" / {kind} / {name}")

        if not of("forward_beaten"):
            continue
        sentence = (
            f"{kind}: {of('forward_beaten')} of other facts' answers beaten forward, {of('reverse_beaten')} in reverse "
            f"(another fact's answer: {of('forward_null_beaten')} and {of('reverse_null_beaten')})"
        )
        sentence += f", position index {of('place_index')}" if of("place_index") else ""
        said.append(sentence)
    return f"What a layer's heads write from the source, mean over layers. By kind of reverse query, {'; '.join(said)}."


PANELS = (
    HeadMap("others beaten, forward", "forward_beaten", middle=0.5, limit=0.5),
    HeadMap("others beaten, reverse", "reverse_beaten", middle=0.5, limit=0.5),
    LayerCurves(
        "others beaten, whole layer",
        {
            "forward_beaten": ("forward", FORWARD),
            "reverse_beaten": ("reverse", REVERSE),
            "forward_null_beaten": ("another fact's answer", CHANCE),
        },
    ),
    LayerCurves("position index, whole layer", {"place_index": ("over places / over facts", PURPLE)}),
)


def draw(result: Result) -> go.Figure:
    figure = draw_layers(result.frame, PANELS)
    figure.update_layout(height=layers_height(figure))
    return figure


ANALYSIS = CheckpointAnalysis(
    name="large_model_storage",
    question="Does a source write toward its own answer, whichever side it stands on?",
    configs=demos,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=220,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
