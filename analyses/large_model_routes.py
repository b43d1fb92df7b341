"""Attention routes of natural-language facts in every layer and head: how strong forward and in reverse, how alike, and
how much RoPE alone lets them be alike."""

from __future__ import annotations

from typing import Any

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.fact_routes import compute_fact_routes, is_mirrored, rope_predictions, same_lengths
from mdm_interp.stats.estimates import Contrast
from mdm_interp.stats.resampling import rows_at
from mdm_interp.stats.tables import estimate_in
from mdm_interp.viz import (
    CHANCE,
    CLUSTERS,
    CORRELATION,
    FORWARD,
    GOLD,
    INDIGO,
    MAGENTA,
    OLIVE,
    REVERSE,
    HeadMap,
    LayerCurves,
    Mark,
    Panels,
    draw_answers,
    draw_layers,
)
from mdm_interp.viz.words import counted_of, number, sample_size, side_of, span

MEASURES = ("forward", "reverse", "correlation", "score_correlation", "selectivity", "same_content")
PLAIN = ("uniform_forward", "uniform_reverse", "isotropic", "spectrum")
"""Without intervals."""
ALIKE = 0.8
"""Correlation from which routes are called largely alike."""


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give per checkpoint and kind one row per head, one per layer (head null: mean over its heads) and one for the
    model (layer null too).

    `forward` and `reverse` are shares of attention, beside what attention spread evenly would give (`uniform_…`).
    `correlation` is that over facts of the forward and the reverse contrast, the source's score less the mean of the
    other keys' (`routes.Routes`); `…_null` is the same with shuffled facts' reverse contrasts. Facts are compared with
    those whose names have as many tokens: a longer source may draw more on either side, whatever a model knows. There
    are such others for `matched` facts. `selectivity` is the share of the odd part in the energy of the contrasts. It
    is of pairs whose two sources are at mirrored offsets of the readout only (`mirrored` facts have some): elsewhere
    the distances differ as well as the sides. Where the readout is one before the answer, as in Dream, no positional
    pair is mirrored. For RoPE models `isotropic`, `spectrum` and `same_content` are the correlation that equal energy
    in all planes, the measured energies, and the forward query's own content would give at the two queries' own
    offsets. They are predictions of the raw score, from which no mean of other keys is subtracted: `score_correlation`,
    which changes with what no softmax sees, is there to be compared with them. Where pairs share no source only shares
    of attention are given. `NAME_n` counts the independent clusters of facts behind a number, and `facts` and
    `clusters` all there are.
    """
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        pairs = probe.pairs(kind)
        sample = same_lengths(pairs, probe.prompts[kind].templates)
        routes = compute_fact_routes(probe.model, pairs, sample)
        columns = {**vars(routes), **vars(rope_predictions(probe.model, pairs, sample))}
        about = {"kind": kind, "layer": None, "head": None, **sample.counts}
        about["matched"] = len({pairs[index].fact for members in sample.matched() for index in members.tolist()})
        about["mirrored"] = len({pair.fact for pair in pairs if is_mirrored(probe.model, pair)})
        for axes in (("layer", "head"), ("layer",), ()):
            rows += rows_at(columns, axes, about)
    return rows


def summarize(result: Result) -> Summary:
    """Give every measure of every model and kind: the mean over its layers and heads."""
    of_models = result.frame[result.frame["layer"].isna()]
    return Summary.read(of_models, ("checkpoint", "kind"), (*MEASURES, *PLAIN))


def takeaway(result: Result) -> str:
    found = [Contrast(one.effect, one.null) for one in result.summary.where("correlation") if one.null]
    if not found:
        return "Undefined: the forward and the reverse query share no source, or the facts are too few."
    layers = result.frame[result.frame["layer"].notna() & result.frame["head"].isna()].to_dict("records")
    sides = [side_of(estimate_in(row, "correlation"), estimate_in(row, "correlation_null")) for row in layers]
    clear, least = sides.count("above"), min(one.effect.value for one in found)
    part = "In part" if least < ALIKE else "Largely"
    answer = f"{part}, in {counted_of(clear, len(sides), 'layers')}" if clear else "In no layer for sure"
    return (
        f"{answer}: over facts, forward and reverse routes correlate by {span(one.effect for one in found)} in the "
        f"mean over heads, shuffled facts' by at most {number(max(one.null.value for one in found))} "
        f"({sample_size([one.effect for one in found], CLUSTERS)})."
    )


MARKS = (
    Mark("correlation", "a fact's forward and reverse route", OLIVE),
    Mark("correlation_null", "null: facts shuffled", CHANCE, "x-thin"),
)


SHOWN = (
    HeadMap("correlation, each head", "correlation", middle=0.0, limit=1.0),
    LayerCurves(
        "correlation, mean of heads",
        {"correlation": ("forward and reverse", OLIVE), "correlation_null": ("facts shuffled", CHANCE)},
    ),
    LayerCurves(
        "correlation of raw scores",
        {"score_correlation": ("forward and reverse", OLIVE), "same_content": ("RoPE, forward content", INDIGO)},
        {"isotropic": ("RoPE, equal energy", GOLD), "spectrum": ("RoPE, measured energy", MAGENTA)},
    ),
    LayerCurves(
        "share of attention",
        {"forward": ("forward", FORWARD), "reverse": ("reverse", REVERSE)},
        {"uniform_reverse": ("spread evenly, reverse", CHANCE)},
    ),
    LayerCurves(
        "selectivity",
        {"selectivity": ("odd, mirrored pairs", MAGENTA), "selectivity_null": ("facts shuffled", CHANCE)},
    ),
)


def draw(result: Result) -> Panels:
    panels = Panels()
    x = {**CORRELATION, "title": "correlation over facts", "zeroline": True}
    draw_answers(panels, result.summary, "mean over layers and heads", MARKS, x)
    return draw_layers(result.frame, SHOWN, panels)


ANALYSIS = CheckpointAnalysis(
    name="large_model_routes",
    question="In which layers and heads does a large model attend to a source from either side alike?",
    configs=demos,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=210,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
