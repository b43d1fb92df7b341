"""What sources of natural-language facts write toward their answers, in every layer and head: forward, in reverse, and
against the answers of other facts."""

from __future__ import annotations

from typing import Any

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary
from mdm_interp.data.queries import Direction, queries_of
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.answer_evidence import answer_evidence, fact_place_index
from mdm_interp.stats.estimates import Contrast, Estimate
from mdm_interp.stats.resampling import Draws, FactSample, rows_at
from mdm_interp.viz import (
    CHANCE,
    CLUSTERS,
    FORWARD,
    MAGENTA,
    PROBABILITY,
    REVERSE,
    HeadMap,
    LayerCurves,
    Mark,
    Panels,
    draw_answers,
    draw_layers,
)
from mdm_interp.viz.words import counted_of, sample_size, side_of, span

SIDES: tuple[Direction, ...] = ("forward", "reverse")
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
        by_side = {side: answer_evidence(probe.model, queries_of(pairs, side), sample.contexts) for side in SIDES}
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
    def of(side: str) -> list[Contrast[Estimate]]:
        found = result.summary.where(f"{side}_beaten")
        return [Contrast(entry.effect, entry.null) for entry in found if entry.null and entry.null.n]

    forward, reverse = of("forward"), of("reverse")
    if not reverse:
        return "Too few facts to compare one with another."
    clear = [side_of(one.effect, one.null) for one in reverse].count("above")
    more = [side_of(one.effect, other.effect) for one, other in zip(forward, reverse, strict=True)].count("above")
    answer = "Yes" if clear == len(reverse) else f"In {counted_of(clear, len(reverse), 'cases')}"
    less = f"surely more in {counted_of(more, len(reverse), 'cases')}" if more else "no sure difference"
    beaten = [span((one.effect for one in side), ".0%") for side in (reverse, forward)]
    both = (*forward, *reverse)
    return (
        f"{answer}: in reverse, a layer's heads write more toward the source's own answer than toward {beaten[0]} of "
        f"others, forward {beaten[1]} ({less}); by chance at most {max(one.null.value for one in both):.0%} "
        f"({sample_size([one.effect for one in both], CLUSTERS)})."
    )


MARKS = (
    Mark("forward_beaten", "forward", FORWARD),
    Mark("reverse_beaten", "reverse", REVERSE),
    Mark("reverse_beaten_null", "null: another fact's answer", CHANCE, "x-thin"),
)


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
    LayerCurves("position index, whole layer", {"place_index": ("over places / over facts", MAGENTA)}),
)


def draw(result: Result) -> Panels:
    panels, x = Panels(), {**PROBABILITY, "title": "share of other facts' answers that are written less"}
    draw_answers(panels, result.summary, "mean over layers", MARKS, x)
    return draw_layers(result.frame, SHOWN, panels)


ANALYSIS = CheckpointAnalysis(
    name="large_model_storage",
    question="Does a source write toward its own answer, whichever side it is on?",
    configs=demos,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=220,
    detail_of="large_model_routes",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
