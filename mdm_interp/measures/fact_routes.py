"""Routes of facts in natural language, whose names have several tokens and are at any distance: how strong they are
forward and in reverse, how alike, and how alike RoPE alone lets them be.

What is given of facts comes with its draws, one without each cluster of facts (:mod:`mdm_interp.stats.resampling`).
Formulas: docs/theory.md, section 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query, QueryPair, queries_of
from mdm_interp.measures.rope import (
    compute_content,
    isotropic_correlation,
    plane_products,
    require_rope,
    score_at_offset,
)
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast
from mdm_interp.stats.resampling import Draws, FactSample


@dataclass(frozen=True)
class FactRoutes:
    """Routes and how alike they are, `[layer head]`. Where pairs share no source, only the shares are defined."""

    forward: Draws
    """Share of attention, 0 to 1."""
    reverse: Draws
    uniform_forward: Float[Tensor, "layer head"]
    """What attention spread evenly would give (:func:`uniform_share`)."""
    uniform_reverse: Float[Tensor, "layer head"]
    correlation: Contrast[Draws]
    """Of the forward and the reverse contrast (:class:`~mdm_interp.measures.routes.Routes`); null: facts shuffled."""
    score_correlation: Draws
    """The same of raw scores, which change with what no softmax sees."""
    selectivity: Contrast[Draws]
    """Share of the odd part in the energy of the contrasts, of mirrored pairs only (:func:`is_mirrored`); null: with
    another cluster's reverse contrast."""


@dataclass(frozen=True)
class RopePredictions:
    """What RoPE predicts of the correlation of raw scores, `[layer head]`."""

    isotropic: Float[Tensor, "layer head"]
    """From equal energy in all planes."""
    spectrum: Float[Tensor, "layer head"]
    """From the measured energies."""
    same_content: Draws
    """From the forward query's own content at both offsets."""


def same_lengths(query_pairs: Sequence[QueryPair], templates: Sequence[int]) -> FactSample:
    """Return the sample whose contexts are a template, a side, and the numbers of tokens of both names: a longer source
    may draw more on either side, whatever a model knows."""
    lengths = [(len(query.source), len(query.answer)) for query in (pair.forward for pair in query_pairs)]
    return FactSample.of(query_pairs, list(zip(templates, lengths, strict=True)))


def compute_fact_routes(model: HookedModel, query_pairs: Sequence[QueryPair], sample: FactSample) -> FactRoutes:
    """Compute routes over facts: shares of attention, and how alike the two sides' are within the sample's contexts.

    Source: docs/theory.md, sections 7 and 11.
    """
    model = hooked(model)
    asked = [pair.forward for pair in query_pairs], [pair.reverse for pair in query_pairs]
    forward, reverse = (compute_routes(model, queries) for queries in asked)
    shape = forward.pattern.shape[1:]
    uniform = [torch.tensor([uniform_share(model, query) for query in queries]) for queries in asked]
    uniform_forward, uniform_reverse = (sample.mean(share).value.expand(shape) for share in uniform)
    shares = (sample.mean(forward.pattern), sample.mean(reverse.pattern), uniform_forward, uniform_reverse)
    if not all(pair.shared for pair in query_pairs):
        nothing = Draws.nothing(shape)
        return FactRoutes(*shares, Contrast(nothing, nothing), nothing, Contrast(nothing, nothing))
    contrasts = forward.contrast, reverse.contrast
    at_forward, at_reverse = (offsets_of(model, queries) for queries in asked)
    return FactRoutes(
        *shares,
        correlation=Contrast(sample.correlation(*contrasts), sample.null_correlation(*contrasts)),
        score_correlation=sample.correlation(forward.scores, reverse.scores),
        selectivity=_selectivity(*contrasts, at_forward, at_reverse, sample),
    )


def _selectivity(
    forward: Float[Tensor, "pair layer head"],
    reverse: Float[Tensor, "pair layer head"],
    at_forward: Float[Tensor, "pair"],
    at_reverse: Float[Tensor, "pair"],
    sample: FactSample,
) -> Contrast[Draws]:
    def energies(other: Int[Tensor, "pair"], kept: Bool[Tensor, "pair"]) -> tuple[Tensor, Tensor]:
        """Compute the odd and even energy of each pair's forward contrast with another pair's reverse contrast."""
        left_out = ~(kept & (at_forward == -at_reverse[other]))[:, None, None]
        odd, even = ((forward + sign * reverse[other]) / 2 for sign in (-1, 1))
        return odd.pow(2).masked_fill(left_out, torch.nan), even.pow(2).masked_fill(left_out, torch.nan)

    def shuffled(other: Int[Tensor, "pair"]) -> Float[Tensor, "layer head"]:
        parts = energies(other, sample.clusters[other] != sample.clusters)
        odd, even = (sample.per_fact(part).nanmean(0) for part in parts)
        return odd / (odd + even)

    odd, even = energies(torch.arange(len(forward)), torch.ones(len(forward), dtype=torch.bool))
    return Contrast(sample.ratio(odd, odd + even), sample.null(shuffled))


def uniform_share(model: HookedModel, query: Query) -> float:
    """Return the share of attention that a source gets from attention spread evenly over what the readout sees; mean
    over answer tokens."""
    cfg = hooked(model).cfg
    seen = [cfg.n_readable(row, len(query.tokens)) for row in query.readout(cfg)]
    return sum(len(query.source) / count for count in seen) / len(seen)


def offsets_of(model: HookedModel, queries: Sequence[Query]) -> Float[Tensor, "query"]:
    """Return how many positions each source's middle is right of its readout's middle; negative where it is left."""
    cfg = hooked(model).cfg
    middles = [(sum(query.source_span) - 1 - query.readout(cfg)[0] - query.readout(cfg)[-1]) / 2 for query in queries]
    return torch.tensor(middles, dtype=torch.float64)


def is_mirrored(model: HookedModel, pair: QueryPair) -> bool:
    """Tell whether the two sources of a pair are at opposite offsets of the readout."""
    forward, reverse = offsets_of(model, [pair.forward, pair.reverse]).tolist()
    return forward == -reverse


def rope_predictions(model: HookedModel, query_pairs: Sequence[QueryPair], sample: FactSample) -> RopePredictions:
    """Predict from RoPE the correlation of raw scores within contexts; NaN where there is no RoPE, or where pairs share
    no source.

    With the source at offset d of the readout forward and e in reverse, plane p of equal content turns by
    (d - e) theta_p between the two: `isotropic` is the mean over planes of cos((d - e) theta_p), `spectrum` that mean
    weighted by their energies, and `same_content` correlates the scores that the forward query's content has at d and
    at e. At mirrored offsets d - e is twice the distance. The mean of a row of scores, which a contrast subtracts, is
    not predicted.

    Each name acts as one token in its middle: queries are averaged over the answer, keys summed over the source.

    Source: docs/theory.md, sections 4 and 11.
    """
    model, several = hooked(model), sample.matched()
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    if not model.cfg.turns_planes or not all(pair.shared for pair in query_pairs) or not several:
        nothing = Draws.nothing(shape)
        return RopePredictions(nothing.value, nothing.value, nothing)
    rope, cfg = require_rope(model), model.cfg
    theta = torch.cat([rope.theta, rope.theta.new_zeros(1)])  # what does not rotate turns by 0
    per_dimension = torch.cat([rope.theta.repeat(2), rope.theta.new_zeros(cfg.head_dim - 2 * len(rope.theta))])
    offsets = [offsets_of(model, queries_of(query_pairs, side)) for side in ("forward", "reverse")]
    distance = (offsets[0] - offsets[1]) / 2  # of mirrored sources that are as far apart
    scores = torch.zeros(2, len(query_pairs), *shape, dtype=torch.float64)
    even, energy, isotropic = torch.zeros(3, *shape, dtype=torch.float64)
    for members in several:
        content = compute_content(model, [query_pairs[index].forward for index in members.tolist()])
        products = plane_products(content, rope).to(torch.complex128)
        still = (content.q * content.k)[..., cfg.rotary_dim :].double().sum(-1)
        for side, offset in zip(scores, offsets, strict=True):
            different, which = offset[members].unique(return_inverse=True)
            at_own = score_at_offset(products, rope, different)[which, torch.arange(len(members))]
            side[members] = at_own + still * cfg.score_scale
        # A product of what does not rotate varies in one part only: root of 2.
        products = torch.cat([products, 2**0.5 * still[..., None].to(products.dtype)], dim=-1)
        of_planes = (products - products.mean(0)).abs().pow(2)
        turned = torch.cos(2 * distance[members, None] * theta)[:, None, None]
        even += (of_planes * turned).sum((0, -1))
        energy += of_planes.sum((0, -1))
        isotropic += isotropic_correlation(per_dimension, distance[members]).sum()
    return RopePredictions(
        isotropic=isotropic / sum(map(len, several)),
        spectrum=even / energy,
        same_content=sample.correlation(*scores),
    )
