"""Attention sinks of checkpoints on natural-language facts: what they take, while sentences are denoised too, and what
forward and reverse routes are with sinks set aside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary
from mdm_interp.data.queries import Direction, QueryPair, queries_of
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.nulls import draw as draw_one
from mdm_interp.measures.nulls import of_unrelated_facts
from mdm_interp.measures.sinks import sinks, watch_sinks
from mdm_interp.measures.trajectory import source_only
from mdm_interp.stats.estimates import Contrast
from mdm_interp.stats.resampling import Draws, FactSample, rows_at
from mdm_interp.viz import (
    CHANCE,
    CLUSTERS,
    FORWARD,
    MAGENTA,
    REVERSE,
    SHADES,
    HeadMap,
    LayerCurves,
    Mark,
    Panels,
    draw_answers,
    draw_layers,
)
from mdm_interp.viz.words import counted_of, joined, sample_size, side_of, span

STEPS = 4
"""In how many steps sentences are denoised."""
STATES = {"masked": 0, "half": STEPS // 2, "written": STEPS}
"""Of the denoised sentence, of which a result tells what sinks take."""
SIDES: tuple[Direction, ...] = ("forward", "reverse")
OF_HEADS = ("share", *(f"{side}_{name}" for side in SIDES for name in ("readout", "route", "aside")))
OF_LAYERS = (*STATES, "moved")
MEASURES = (*OF_HEADS, *OF_LAYERS)


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give per checkpoint and kind one row per head, one per layer (head null: mean over its heads) and one for the
    model (layer null too: mean over layers).

    `share` is what sinks take of all attention over the reverse query's text; `…_null` if every row read elsewhere
    (:class:`~mdm_interp.measures.sinks.Sinks`). `…_readout` is what they take of the readout's attention, `…_route`
    what the source gets of it, and `…_aside` what it gets of what sinks leave. Of MDMs' layers `masked`, `half` and
    `written` are the share before, half-way and after the reverse query's sentence is denoised of nothing but its
    source, and `moved` how often the position that a layer reads most has changed from one state to the next; null: to
    the next state of another fact's sentence of as many tokens. `NAME_n` counts the independent clusters of facts
    behind a number, and `facts` and `clusters` all there are.
    """
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        pairs = probe.pairs(kind)
        sample = FactSample.of(pairs, probe.prompts[kind].templates)
        found = {side: sinks(probe.model, queries_of(pairs, side)) for side in SIDES}
        of_heads: dict[str, Any] = {"share": found["reverse"].share.map(sample.mean)}
        for side, of_side in found.items():
            values = {"readout": of_side.readout, "route": of_side.source, "aside": of_side.routes}
            of_heads |= {f"{side}_{name}": sample.mean(value) for name, value in values.items()}
        of_layers = {name: values.map(sample.mean) for name, values in while_denoised(probe, pairs).items()}
        nothing = Draws.nothing(found["reverse"].readout.shape[1:])
        not_of_heads = dict.fromkeys(OF_LAYERS, Contrast(nothing, nothing))
        about = {"kind": kind, "layer": None, "head": None, **sample.counts}
        for axes, others in ((("layer", "head"), not_of_heads), (("layer",), of_layers), ((), of_layers)):
            rows += rows_at(of_heads | others, axes, about)
    return rows


def while_denoised(probe: Probe, pairs: Sequence[QueryPair]) -> dict[str, Contrast[Float[Tensor, "pair layer"]]]:
    """Give what is measured of layers while the reverse queries' sentences are denoised; NaN of a causal model, which
    denoises nothing."""
    cfg, queries = probe.model.cfg, [pair.reverse for pair in pairs]
    if cfg.is_causal:
        nowhere = torch.full((len(pairs), cfg.n_layers), torch.nan)
        return dict.fromkeys(OF_LAYERS, Contrast(nowhere, nowhere))
    special = probe.model.tokenizer.all_special_ids
    watched = watch_sinks(probe.model, [source_only(query, cfg, special) for query in queries], STEPS)
    told = {name: watched.share.map(lambda share, at=at: share[:, at]) for name, at in STATES.items()}
    lengths = [(len(query.tokens), i) for i, query in enumerate(queries)]
    unrelated = of_unrelated_facts(pairs, [pair.side for pair in pairs], lengths)
    alike = [[i for length, i in others if length == own] for (own, _), others in zip(lengths, unrelated, strict=True)]
    other = draw_one(alike, seed=0)
    there = torch.tensor([i is not None for i in other])
    before, after = watched.where[:, :-1], watched.where[:, 1:]
    of_others = after[torch.tensor([i or 0 for i in other])]
    moved, null = ((before != then).double().mean(1) for then in (after, of_others))
    return told | {"moved": Contrast(moved, null.where(there[:, None], torch.nan))}


def summarize(result: Result) -> Summary:
    """Give every measure of every model and kind: the mean over its layers and heads."""
    return Summary.read(result.frame[result.frame["layer"].isna()], ("checkpoint", "kind"), MEASURES)


def takeaway(result: Result) -> str:
    shares = [entry for entry in result.summary.where("share") if entry.null]
    if not shares:
        return "No pair could be asked."
    taking = [entry for entry in shares if side_of(entry.effect, entry.null) == "above"]
    checkpoints = dict.fromkeys(entry.of["checkpoint"] for entry in shares)
    idle = [name for name in checkpoints if name not in {entry.of["checkpoint"] for entry in taking}]
    named = joined(idle) if len(idle) < 3 else counted_of(len(idle), len(checkpoints), "checkpoints")
    told = "Sinks take no sure share of attention"
    if taking:
        told = (
            f"Sinks take {span(entry.effect for entry in taking)} of all attention (null "
            f"{span(entry.null for entry in taking)})" + (f", not surely more than that in {named}" if idle else "")
        )
    moved = [
        abs(entry.effect.value - route.value)
        for side in SIDES
        for entry in result.summary.where(f"{side}_aside")
        for route in [result.summary.at(f"{side}_route", **entry.of)]
    ]
    aside = f". Setting them aside changes the source's share by at most {max(moved):.2f}" if moved else ""
    return f"{told}{aside} ({sample_size([entry.effect for entry in shares], CLUSTERS)})."


MARKS = (
    Mark("share", "sinks", MAGENTA),
    Mark("share_null", "null: every row reads elsewhere", CHANCE, "x-thin"),
)
ROUTES = tuple(
    Mark(f"{side}_{of}", f"{side}, {name}", color, symbol)
    for side, color in (("forward", FORWARD), ("reverse", REVERSE))
    for of, name, symbol in (("route", "with sinks", "circle-open"), ("aside", "sinks aside", "circle"))
)


SHOWN = (
    HeadMap("share of sinks, each head", "share", middle=0.0, limit=1.0),
    LayerCurves(
        "share of attention on sinks",
        {"share": ("sinks", MAGENTA), "share_null": ("rows moved along", CHANCE)},
    ),
    LayerCurves(
        "while the sentence is denoised",
        {
            "masked": ("all but the source masked", SHADES[0]),
            "half": ("half-way", SHADES[1]),
            "written": ("written", SHADES[-1]),
            "masked_null": ("rows moved along", CHANCE),
        },
        undefined="a causal model<br>denoises nothing",
    ),
    LayerCurves(
        "share on the source",
        {"forward_aside": ("forward, sinks aside", FORWARD), "reverse_aside": ("reverse, sinks aside", REVERSE)},
        {"forward_route": ("forward, with sinks", FORWARD), "reverse_route": ("reverse, with sinks", REVERSE)},
    ),
)


def draw(result: Result) -> Panels:
    panels, summary = Panels(), result.summary
    x = {"rangemode": "tozero", "title": "share of all attention, mean over layers and heads"}
    draw_answers(panels, summary, "what sinks take", MARKS, x)
    draw_answers(panels, summary, "the source's share", ROUTES, {**x, "title": "share of the readout's attention"})
    return draw_layers(result.frame, SHOWN, panels)


ANALYSIS = CheckpointAnalysis(
    name="large_model_sinks",
    question="How much attention do sinks take, and what routes are left without them?",
    configs=demos,
    measure=measure,
    of_twins=True,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=215,
    detail_of="large_model_routes",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
