"""Attention routes of natural-language facts in every layer and head: how strong forward and in reverse, how alike, and
how much RoPE alone lets them be alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.experiments.analysis import CheckpointAnalysis
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe, demos
from mdm_interp.measures.rope import (
    compute_content,
    isotropic_correlation,
    plane_products,
    require_rope,
    score_at_offset,
)
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.bridge import hooked
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import Draws, FactSample, mean_over, rows_at, summary_of
from mdm_interp.viz.layers import HeadMap, LayerCurves, draw_layers, layers_height, span_of
from mdm_interp.viz.theme import CHANCE, FORWARD, GREEN, ORANGE, PURPLE, REVERSE, SKY

ALIKE = ("correlation", "correlation_null", "score_correlation", "selectivity", "selectivity_null")
MEASURES = ("forward", "reverse", *ALIKE, "same_content")
PLAIN = ("uniform_forward", "uniform_reverse", "isotropic", "spectrum")
"""Without intervals."""


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
        columns: dict[str, Draws | Tensor] = {**routes(probe.model, pairs, sample)}
        columns |= rope_predictions(probe.model, pairs, sample)
        about = {"kind": kind, "layer": None, "head": None, **sample.counts}
        about["matched"] = len({pairs[index].fact for members in sample.matched() for index in members.tolist()})
        about["mirrored"] = len({pair.fact for pair in pairs if is_mirrored(pair, probe.model)})
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
    at_forward, at_reverse = (offsets_of(queries[side], model) for side in queries)

    def odd_and_even(other: Int[Tensor, "pair"], kept: Bool[Tensor, "pair"]) -> tuple[Tensor, Tensor]:
        """Energies of each pair's forward contrast with another pair's reverse contrast."""
        left_out = ~(kept & (at_forward == -at_reverse[other]))[:, None, None]
        odd, even = ((forward.contrast + sign * reverse.contrast[other]) / 2 for sign in (-1, 1))
        return odd.pow(2).masked_fill(left_out, torch.nan), even.pow(2).masked_fill(left_out, torch.nan)

    odd, even = odd_and_even(torch.arange(len(pairs)), torch.ones(len(pairs), dtype=torch.bool))

    def shuffled_selectivity(other: Int[Tensor, "pair"]) -> Float[Tensor, "layer head"]:
        parts = odd_and_even(other, sample.clusters[other] != sample.clusters)
        null_odd, null_even = (sample.per_fact(part).nanmean(0) for part in parts)
        return null_odd / (null_odd + null_even)

    return measured | {
        "correlation": sample.correlation(forward.contrast, reverse.contrast),
        "correlation_null": sample.null_correlation(forward.contrast, reverse.contrast),
        "score_correlation": sample.correlation(forward.scores, reverse.scores),
        "selectivity": sample.ratio(odd, odd + even),
        "selectivity_null": sample.null(shuffled_selectivity),
    }


def uniform_share(query: Query, model: Any) -> float:
    """The share of attention that a source gets from attention spread evenly over what the readout sees; mean over
    answer tokens."""
    seen = [row + 1 if model.cfg.is_causal else len(query.tokens) for row in query.readout(model.cfg)]
    return sum(len(query.source) / count for count in seen) / len(seen)


def rope_predictions(model: Any, pairs: Sequence[QueryPair], sample: FactSample) -> dict[str, Draws | Tensor]:
    """Predict from RoPE the correlation of raw scores within contexts, `[layer head]`; NaN where there is no RoPE, or
    where pairs share no source.

    With the source at offset d of the readout forward and e in reverse, plane p of equal content turns by
    (d - e) theta_p between the two: `isotropic` is the mean over planes of cos((d - e) theta_p), `spectrum` that mean
    weighted by their energies, and `same_content` correlates the scores that the forward query's content has at d and
    at e. At mirrored offsets d - e is twice the distance. The mean of a row of scores, which a contrast subtracts, is
    not predicted.

    Each name acts as one token in its middle: queries are averaged over the answer, keys summed over the source.

    Source: docs/theory.md, sections 4 and 11.
    """
    shape, several = (model.cfg.n_layers, model.cfg.n_heads), sample.matched()
    if model.cfg.position != "rope" or not all(pair.shared for pair in pairs) or not several:
        nothing = Draws.nothing(shape)
        return {"isotropic": nothing.value, "spectrum": nothing.value, "same_content": nothing}
    rope, cfg = require_rope(model), hooked(model).cfg
    theta = torch.cat([rope.theta, rope.theta.new_zeros(1)])  # what does not rotate turns by 0
    per_dimension = torch.cat([rope.theta.repeat(2), rope.theta.new_zeros(cfg.head_dim - 2 * len(rope.theta))])
    offsets = [offsets_of([getattr(pair, side) for pair in pairs], model) for side in ("forward", "reverse")]
    distance = (offsets[0] - offsets[1]) / 2  # of mirrored sources that are as far apart
    scores = torch.zeros(2, len(pairs), *shape, dtype=torch.float64)
    even, energy, isotropic = torch.zeros(3, *shape, dtype=torch.float64)
    for members in several:
        content = compute_content(model, [pairs[index].forward for index in members.tolist()])
        products = plane_products(content, rope).to(torch.complex128)
        still = (content.q * content.k)[..., cfg.rotary_dim :].double().sum(-1)
        for side, offset in zip(scores, offsets, strict=True):
            different, which = offset[members].unique(return_inverse=True)
            at_own = score_at_offset(products, rope, different)[which, torch.arange(len(members))]
            side[members] = at_own + still * cfg.head_dim**-0.5
        # A product of what does not rotate varies in one part only: root of 2.
        products = torch.cat([products, 2**0.5 * still[..., None].to(products.dtype)], dim=-1)
        of_planes = (products - products.mean(0)).abs().pow(2)
        turned = torch.cos(2 * distance[members, None] * theta)[:, None, None]
        even += (of_planes * turned).sum((0, -1))
        energy += of_planes.sum((0, -1))
        isotropic += isotropic_correlation(per_dimension, distance[members]).sum()
    return {
        "isotropic": isotropic / sum(map(len, several)),
        "spectrum": even / energy,
        "same_content": sample.correlation(*scores),
    }


def offsets_of(queries: Sequence[Query], model: Any) -> Float[Tensor, "query"]:
    """Positions from the middle of each readout to the middle of its source; positive when the source stands right."""
    middles = [
        (sum(query.source_span) - 1 - query.readout(model.cfg)[0] - query.readout(model.cfg)[-1]) / 2
        for query in queries
    ]
    return torch.tensor(middles, dtype=torch.float64)


def is_mirrored(pair: QueryPair, model: Any) -> bool:
    """Whether the two sources of a pair are at opposite offsets of the readout."""
    forward, reverse = offsets_of([pair.forward, pair.reverse], model).tolist()
    return forward == -reverse


def summarize(result: Result) -> dict[str, Estimate]:
    """Give every measure of every model and kind: the mean over its layers and heads."""
    summary = summary_of(result.frame, ("checkpoint", "kind"), MEASURES)
    for row in result.frame[result.frame["layer"].isna()].to_dict("records"):
        for name in PLAIN:
            if pd.notna(value := row[name]):
                key = f"{row['checkpoint']} / {row['kind']} / {name}"
                summary[key] = Estimate(value, value, value, int(row["clusters"]))
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
            sentence += f", correlation {of('correlation')} (null {of('correlation_null')})"
            sentence += f", of raw scores {of('score_correlation')}"
            sentence += f" where equal energy in RoPE predicts {of('isotropic')}" if of("isotropic") else ""
        said.append(sentence)
    said_of_kinds = "; ".join(said)
    return (
        "Means over layers and heads. The correlation is that of the source's score less the mean of the other keys', "
        f"among names of one length. By kind of reverse query, {said_of_kinds}. Selectivity is of pairs whose sources "
        "are at mirrored offsets of the readout."
    )


PANELS = (
    HeadMap("correlation, each head", "correlation", middle=0.0, limit=1.0),
    LayerCurves(
        "correlation, mean of heads",
        {"correlation": ("forward and reverse", GREEN), "correlation_null": ("facts shuffled", CHANCE)},
    ),
    LayerCurves(
        "correlation of raw scores",
        {"score_correlation": ("forward and reverse", GREEN), "same_content": ("RoPE, forward content", SKY)},
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
        "selectivity, mirrored pairs",
        {
            "selectivity": ("odd share of energy", PURPLE),
            "selectivity_null": ("facts shuffled", CHANCE),
        },
    ),
)


def draw(result: Result) -> go.Figure:
    figure = draw_layers(result.frame, PANELS)
    figure.update_layout(height=layers_height(figure))
    return figure


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
