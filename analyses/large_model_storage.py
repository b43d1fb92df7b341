"""What sources of natural-language facts write toward their answers, in every layer and head: forward, in reverse, and
against the answers of other facts."""

from __future__ import annotations

from functools import partial
from typing import Any

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.answer_evidence import answer_evidence, fact_place_index
from mdm_interp.stats.resampling import Draws, FactSample, rows_at
from mdm_interp.viz import CHANCE, FORWARD, PURPLE, REVERSE, HeadMap, LayerCurves, Panels, draw_layers

SIDES = ("forward", "reverse")
MEASURES = ("forward_specific", "forward_beaten", "reverse_specific", "reverse_beaten", "place_index")


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give per checkpoint and kind one row per head, one per layer (head null: what all its heads write, summed) and
    one for the model (layer null too: mean over layers).

    `…_specific` is evidence, `…_beaten` the share of other answers beaten, `…_null` the same for another fact's answer,
    as :class:`~mdm_interp.measures.answer_evidence.AnswerEvidence` has them; each source is compared within its
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
        heads, layers = (
            {
                f"{side}_{name}": getattr(by_side[side][level], name).map(sample.mean)
                for side in SIDES
                for name in ("specific", "beaten")
            }
            for level in (0, 1)
        )
        forward, reverse = (by_side[side][1].own for side in SIDES)
        heads["place_index"] = Draws.nothing(by_side["forward"][0].own.shape[1:])
        layers["place_index"] = fact_place_index(forward, reverse, pairs, sample)
        about = {"kind": kind, "layer": None, "head": None, **sample.counts}
        for columns, axes in ((heads, ("layer", "head")), (layers, ("layer",)), (layers, ())):
            rows += rows_at(columns, axes, about)
    return rows


def summarize(result: Result) -> Summary:
    """Give every measure of every model and kind: the mean over its layers, heads summed."""
    return Summary.read(result.frame[result.frame["layer"].isna()], ("checkpoint", "kind"), MEASURES)


def takeaway(result: Result) -> str:
    said = []
    for kind in KINDS:
        of = partial(result.summary.span, kind=kind)
        if not of("forward_beaten"):
            continue
        sentence = (
            f"{kind}: {of('forward_beaten')} of other facts' answers beaten forward, {of('reverse_beaten')} in reverse "
            f"(another fact's answer: {of('forward_beaten', null=True)} and {of('reverse_beaten', null=True)})"
        )
        sentence += f", position index {of('place_index')}" if of("place_index") else ""
        said.append(sentence)
    return f"What a layer's heads write from the source, mean over layers. By kind of reverse query, {'; '.join(said)}."


SHOWN = (
    HeadMap("others beaten, forward", "forward_beaten", middle=0.5, limit=0.5),
    HeadMap("others beaten, reverse", "reverse_beaten", middle=0.5, limit=0.5),
    LayerCurves(
        "others beaten, whole layer",
        {
            "forward_beaten": ("forward", FORWARD),
            "reverse_beaten": ("reverse", REVERSE),
            "forward_beaten_null": ("another fact's answer", CHANCE),
        },
    ),
    LayerCurves("position index, whole layer", {"place_index": ("over places / over facts", PURPLE)}),
)


def draw(result: Result) -> Panels:
    return draw_layers(result.frame, SHOWN)


ANALYSIS = CheckpointAnalysis(
    name="large_model_storage",
    question="Does a source write toward its own answer, whichever side it is on?",
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
