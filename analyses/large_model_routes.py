"""Attention routes of natural-language facts in every layer and head: how strong forward and in reverse, how alike, and
how much RoPE alone lets them be alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.bridge import hooked
from mdm_interp.probing import KINDS, CheckpointAnalysis, Probe, demos
from mdm_interp.queries import Query, QueryPair
from mdm_interp.resampling import Draws, FactSample, mean_over, rows_at, summary_of
from mdm_interp.results import Result
from mdm_interp.routing import (
    compute_content,
    compute_routes,
    isotropic_correlation,
    plane_products,
    require_rope,
    score_at_offset,
)
from mdm_interp.stats import Estimate
from mdm_interp.viz.layers import HeadMap, LayerCurves, draw_layers, layers_height, span_of
from mdm_interp.viz.theme import CHANCE, FORWARD, GREEN, ORANGE, PURPLE, REVERSE, SKY, titled

ALIKE = ("correlation", "correlation_null", "selectivity", "selectivity_null")
MEASURES = ("forward", "reverse", *ALIKE, "same_content")
PLAIN = ("uniform_forward", "uniform_reverse", "isotropic", "spectrum")
"""Without intervals."""


def measure(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """Per checkpoint and kind one row per head, one per layer (head null: mean over its heads) and one for the model
    (layer null too).

    `forward` and `reverse` are shares of attention, beside what attention spread evenly would give (`uniform_…`).
    `correlation` is that of forward and reverse scores over facts, `selectivity` the share of the odd part in their
    energy; `…_null` the same with the reverse scores of shuffled facts. Facts are compared with those whose names have
    as many tokens: a longer source has a larger score on either side, whatever a model knows. There are such others for
    `matched` facts. For RoPE models `isotropic`, `spectrum` and `same_content` are the correlation that equal energy in
    all planes, the measured energies, and the forward query's own content would give, at the facts' own distance. Where
    pairs share no source only routes are there.
    """
    rows: list[dict[str, Any]] = []
    for probe in probes:
        for kind in KINDS:
            pairs = probe.pairs(kind)
            sample = same_lengths(pairs, probe.prompts[kind].templates)
            columns: dict[str, Draws | Tensor] = {**routes(probe.model, pairs, sample)}
            columns |= rope_predictions(probe.model, pairs, sample)
            about = {"checkpoint": probe.name, "kind": kind, "layer": None, "head": None, "facts": sample.n_facts}
            about["matched"] = len({pairs[index].fact for members in matched(sample) for index in members.tolist()})
            for axes in (("layer", "head"), ("layer",), ()):
                averaged = 2 - len(axes)
                at = {
                    name: column.over(averaged) if isinstance(column, Draws) else mean_over(column, averaged)
                    for name, column in columns.items()
                }
                rows += rows_at(at, axes, about)
    return rows


def same_lengths(pairs: Sequence[QueryPair], templates: Sequence[int]) -> FactSample:
    """Pairs whose contexts are a template, a side, and the numbers of tokens of both names."""
    lengths = [(len(query.source), len(query.answer)) for query in (pair.forward for pair in pairs)]
    return FactSample.of(pairs, list(zip(templates, lengths, strict=True)))


def matched(sample: FactSample) -> list[Int[Tensor, "member"]]:
    """The pairs of each context that has several."""
    return [members for members in sample.members() if len(members) > 1]


def routes(model: Any, pairs: Sequence[QueryPair], sample: FactSample) -> dict[str, Draws | Tensor]:
    """Routes and how alike they are, `[layer head]`."""
    queries = {side: [getattr(pair, side) for pair in pairs] for side in ("forward", "reverse")}
    forward, reverse = (compute_routes(model, queries[side]) for side in queries)
    measured: dict[str, Draws | Tensor] = {
        "forward": sample.mean(forward.pattern),
        "reverse": sample.mean(reverse.pattern),
    }
    for side, name in zip(queries, PLAIN[:2], strict=True):
        share = torch.tensor([uniform_share(query, model) for query in queries[side]])
        measured[name] = sample.mean(share).value.expand(forward.pattern.shape[1:])
    if not all(pair.shared for pair in pairs):
        return measured | dict.fromkeys(ALIKE, Draws.nothing(forward.scores.shape[1:]))

    def odd_and_even(reverse: Float[Tensor, "pair layer head"]) -> tuple[Tensor, Tensor]:
        return ((forward.scores - reverse) / 2).pow(2), ((forward.scores + reverse) / 2).pow(2)

    odd, even = odd_and_even(reverse.scores)

    def shuffled_selectivity(other: Int[Tensor, "pair"]) -> Float[Tensor, "layer head"]:
        own = (other == torch.arange(len(other)))[:, None, None]
        parts = (part.masked_fill(own, torch.nan) for part in odd_and_even(reverse.scores[other]))
        null_odd, null_even = (sample.per_fact(part).nanmean(0) for part in parts)
        return null_odd / (null_odd + null_even)

    return measured | {
        "correlation": sample.correlation(forward.scores, reverse.scores),
        "correlation_null": sample.null_correlation(forward.scores, reverse.scores),
        "selectivity": sample.ratio(odd, odd + even),
        "selectivity_null": sample.null(shuffled_selectivity),
    }


def uniform_share(query: Query, model: Any) -> float:
    """The share of attention that a source gets from attention spread evenly over what the readout sees; mean over
    answer tokens."""
    seen = [row + 1 if model.cfg.is_causal else len(query.tokens) for row in query.readout(model.cfg)]
    return sum(len(query.source) / count for count in seen) / len(seen)


def rope_predictions(model: Any, pairs: Sequence[QueryPair], sample: FactSample) -> dict[str, Draws | Tensor]:
    """The correlation that RoPE predicts of what varies within contexts, at each one's mean distance, `[layer head]`;
    NaN where there is no RoPE, or where pairs share no source.

    Each name acts as one token in its middle: queries are averaged over the answer, keys summed over the source.

    Source: docs/theory.md, section 4.
    """
    shape, several = (model.cfg.n_layers, model.cfg.n_heads), matched(sample)
    if model.cfg.position != "rope" or not all(pair.shared for pair in pairs) or not several:
        nothing = Draws.nothing(shape)
        return {"isotropic": nothing.value, "spectrum": nothing.value, "same_content": nothing}
    rope, cfg = require_rope(model), hooked(model).cfg
    theta = torch.cat([rope.theta, rope.theta.new_zeros(1)])  # what does not rotate turns by 0
    per_dimension = torch.cat([rope.theta.repeat(2), rope.theta.new_zeros(cfg.head_dim - 2 * len(rope.theta))])
    scores = torch.zeros(2, len(pairs), *shape, dtype=torch.float64)
    even, energy, isotropic = torch.zeros(3, *shape, dtype=torch.float64)
    for members in several:
        asked = [pairs[index].forward for index in members.tolist()]
        distance = torch.tensor([distance_between(query, model) for query in asked]).double().mean(0, keepdim=True)
        content = compute_content(model, asked)
        products = plane_products(content, rope).to(torch.complex128)
        still = (content.q * content.k)[..., cfg.rotary_dim :].double().sum(-1)
        for side, offset in zip(scores, (distance, -distance), strict=True):
            side[members] = score_at_offset(products, rope, offset)[0] + still * cfg.head_dim**-0.5
        # A product of what does not rotate varies in one part only: root of 2.
        products = torch.cat([products, 2**0.5 * still[..., None].to(products.dtype)], dim=-1)
        of_planes = (products - products.mean(0)).abs().pow(2).sum(0)
        even += (of_planes * torch.cos(2 * distance * theta)).sum(-1)
        energy += of_planes.sum(-1)
        isotropic += len(asked) * isotropic_correlation(per_dimension, distance)
    return {
        "isotropic": isotropic / sum(map(len, several)),
        "spectrum": even / energy,
        "same_content": sample.correlation(*scores),
    }


def distance_between(query: Query, model: Any) -> float:
    """Positions from the middle of the readout to the middle of the source."""
    rows, (start, stop) = query.readout(model.cfg), query.source_span
    return abs((start + stop - 1) / 2 - sum(rows) / len(rows))


def summarize(result: Result) -> dict[str, Estimate]:
    """Every measure of every model and kind: the mean over its layers and heads."""
    summary = summary_of(result.frame, ("checkpoint", "kind"), MEASURES)
    for row in result.frame[result.frame["layer"].isna()].to_dict("records"):
        for name in PLAIN:
            if pd.notna(value := row[name]):
                key = f"{row['checkpoint']} / {row['kind']} / {name}"
                summary[key] = Estimate(value, value, value, int(row["facts"]))
    return summary


def takeaway(result: Result) -> str:
    said = []
    for kind in KINDS:

        def of(name: str, kind: str = kind) -> str:
            return span_of(result.summary, f" / {kind} / {name}")

        if not of("forward"):
            continue
        sentence = (
            f"{kind}: {of('forward')} of attention forward, {of('reverse')} in reverse (spread evenly "
            f"{of('uniform_forward')} and {of('uniform_reverse')})"
        )
        if of("correlation"):
            sentence += f", scores correlate {of('correlation')} (null {of('correlation_null')}"
            sentence += f"; equal energy in RoPE predicts {of('isotropic')})" if of("isotropic") else ")"
        said.append(sentence)
    said_of_kinds = "; ".join(said)
    return f"Means over layers and heads, among names of one length. By kind of reverse query, {said_of_kinds}."


PANELS = (
    HeadMap("correlation, each head", "correlation", middle=0.0, limit=1.0),
    LayerCurves(
        "correlation, mean of heads",
        {
            "correlation": ("forward and reverse", GREEN),
            "correlation_null": ("facts shuffled", CHANCE),
            "same_content": ("RoPE, forward content", SKY),
        },
        {"isotropic": ("RoPE, equal energy", ORANGE), "spectrum": ("RoPE, measured energy", PURPLE)},
    ),
    LayerCurves(
        "share of attention",
        {"forward": ("forward", FORWARD), "reverse": ("reverse", REVERSE)},
        {
            "uniform_forward": ("spread evenly, forward", FORWARD),
            "uniform_reverse": ("spread evenly, reverse", REVERSE),
        },
    ),
    LayerCurves(
        "direction selectivity",
        {
            "selectivity": ("odd share of energy", PURPLE),
            "selectivity_null": ("facts shuffled", CHANCE),
        },
    ),
)


def draw(result: Result) -> go.Figure:
    figure = draw_layers(result.frame, PANELS)
    return titled(figure, result.question, takeaway(result), height=layers_height(figure))


ANALYSIS = CheckpointAnalysis(
    name="large_model_routes",
    question="In which layers and heads does a large model attend to a source from either side alike?",
    configs=demos,
    measure=measure,
    summarize=summarize,
    draw=draw,
    order=210,
)

if __name__ == "__main__":
    ANALYSIS.main()
