"""In which layer a checkpoint's answers to natural-language facts appear at the mask, forward and in reverse, and which
heads and MLPs write them."""

from __future__ import annotations

from typing import Any

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary, where
from mdm_interp.data.queries import Direction, queries_of
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.lens import lens, other_answers
from mdm_interp.stats.estimates import Contrast, Estimate
from mdm_interp.stats.resampling import Draws, FactSample, rows_at
from mdm_interp.viz import (
    CHANCE,
    CLUSTERS,
    FORWARD,
    PROBABILITY,
    REVERSE,
    HeadMap,
    LayerCurves,
    Mark,
    Panels,
    draw_answers,
    draw_layers,
    draw_threads,
)
from mdm_interp.viz.words import counted_of, sample_size, side_of, span

SIDES: tuple[Direction, ...] = ("forward", "reverse")
NAMES = ("probability", "correct", "heads", "mlp", "appears")
MEASURES = tuple(f"{side}_{name}" for side in SIDES for name in NAMES)


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give per checkpoint and kind one row per head, one per layer (head null) and one for the model (layer null too).

    Of a layer `…_probability` is what its residual stream gives the answer's tokens, mean over them, `…_null` an
    unrelated fact's answer of as many tokens, `…_correct` the share of tokens that are the likeliest there, `…_heads`
    the nats that its heads together add to the answer's logits beyond that other answer's, `…_mlp` those of its MLP. A
    head has its own `…_heads`. Of the model they are those of the last layer, and of all layers together; `…_appears`
    is the layer from which on the answer is the likeliest, of facts whose answer is so in the end. `NAME_n` counts the
    independent clusters of facts behind a number, and `facts` and `clusters` all there are.
    """
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        pairs = probe.pairs(kind)
        sample = FactSample.of(pairs, probe.prompts[kind].templates)
        levels = [dict[str, Any](), dict[str, Any](), dict[str, Any]()]
        for side in SIDES:
            queries = queries_of(pairs, side)
            seen = lens(probe.model, queries, other_answers(pairs, queries))
            last = Contrast(seen.probability.effect[:, -1], seen.probability.null[:, -1])
            of_each = (
                {"heads": seen.heads},
                {"correct": seen.correct, "heads": seen.heads.sum(2), "mlp": seen.mlps},
                {
                    "correct": seen.correct[:, -1],
                    "heads": seen.heads.sum((1, 2)),
                    "mlp": seen.mlps.sum(1),
                    "appears": seen.appears,
                },
            )
            for columns, values, probability in zip(levels, of_each, (None, seen.probability, last), strict=True):
                shape = next(iter(values.values())).shape[1:]
                nothing = Draws.nothing(shape)
                told: dict[str, Any] = dict.fromkeys(NAMES, nothing) | {"probability": Contrast(nothing, nothing)}
                told |= {name: sample.mean(of) for name, of in values.items()}
                told |= {} if probability is None else {"probability": probability.map(sample.mean)}
                columns |= {f"{side}_{name}": of for name, of in told.items()}
        about = {"kind": kind, "layer": None, "head": None, **sample.counts}
        for columns, axes in zip(levels, (("layer", "head"), ("layer",), ()), strict=True):
            rows += rows_at(columns, axes, about)
    return rows


def summarize(result: Result) -> Summary:
    """Give every measure of every model and kind."""
    return Summary.read(result.frame[result.frame["layer"].isna()], ("checkpoint", "kind"), MEASURES)


def takeaway(result: Result) -> str:
    def of(quantity: str) -> list[Estimate]:
        return [entry.effect for entry in result.summary.where(quantity)]

    size = sample_size(of("forward_probability"), CLUSTERS)
    if not of("forward_appears"):
        return f"Nowhere: no fact's answer is the likeliest token after any layer ({size})."
    more = [side_of(mlp, heads) for mlp, heads in zip(of("forward_mlp"), of("forward_heads"), strict=True)]
    writes = f"MLPs write more of it than heads in {counted_of(more.count('above'), len(more), 'cases')}"
    return (
        f"Forward, the answer is the likeliest token from layer {span(of('forward_appears'), '.1f')} on (the last "
        f"is {result.frame['layer'].max():.0f}){'; ' + writes if more else ''}. In reverse, at most "
        f"{max(one.value for one in of('reverse_correct')):.0%} of its tokens are in the end ({size})."
    )


DETAIL = (
    LayerCurves("nats from heads", {"forward_heads": ("forward", FORWARD), "reverse_heads": ("reverse", REVERSE)}),
    LayerCurves("nats from the MLP", {"forward_mlp": ("forward", FORWARD), "reverse_mlp": ("reverse", REVERSE)}),
    HeadMap("each head, forward", "forward_heads", middle=0.0, limit=1.0),
    HeadMap("each head, reverse", "reverse_heads", middle=0.0, limit=1.0),
)
ANSWERS = {
    "forward_probability": ("forward", FORWARD),
    "reverse_probability": ("reverse", REVERSE),
    "reverse_probability_null": ("null: another fact's answer", CHANCE),
}


def draw(result: Result) -> Panels:
    """Draw the answer's probability after each layer, all checkpoints in one panel, and what heads and MLPs write."""
    panels, frame = Panels(), result.frame
    layers = frame[frame["layer"].notna() & frame["head"].isna()]
    kinds, of = list(dict.fromkeys(frame["kind"])), result.summary.where("forward_probability")
    size = sample_size((entry.effect for entry in of), CLUSTERS)
    titles = [f"{kind} reverse, a line per checkpoint<br>{size}" for kind in kinds]
    y = {**PROBABILITY, "title": "probability of the answer<br>after the layer"}
    row = panels.row(titles, x={"title": "layer", "dtick": 1 if layers["layer"].max() < 9 else 8}, y=y, height=330)
    for panel, kind in zip(row, kinds, strict=True):
        for measure, (name, color) in ANSWERS.items():
            draw_threads(panel, where(layers, kind=kind), "layer", measure, name=name, color=color)
    marks = [
        Mark(f"{side}_{part}", f"{side}, {name}", color, symbol)
        for side, color in (("forward", FORWARD), ("reverse", REVERSE))
        for part, name, symbol in (("mlp", "MLPs", "circle"), ("heads", "heads", "diamond-open"))
    ]
    draw_answers(panels, result.summary, "written by all layers", marks, {"title": "nats beyond another answer"})
    return draw_layers(frame, DETAIL, panels)


ANALYSIS = CheckpointAnalysis(
    name="large_model_lens",
    question="In which layer does the answer appear at the mask, and what writes it there?",
    configs=demos,
    measure=measure,
    of_twins=True,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=205,
    detail_of="large_model_prediction",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
