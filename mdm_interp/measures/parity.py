"""Parity: what of a route is the same to both sides and what tells left from right, and how far learning the one side's
route moves the other's.

Sign: a positive odd part means that the source draws more attention when it is to the right of the readout.
Formulas: docs/theory.md, sections 3, 4 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Direction, Query, QueryPair, batches, queries_of, require_shared
from mdm_interp.errors import UserError
from mdm_interp.measures.nulls import other_facts
from mdm_interp.measures.rope import compute_content, energy_shares, plane_products, plane_scores, require_rope
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast


@dataclass(frozen=True)
class Parity:
    """Scores split by what swapping the sides does to them: s(+delta) = even + odd, s(-delta) = even - odd."""

    even: Float[Tensor, "pair layer head *plane"]
    """The same to both sides."""
    odd: Float[Tensor, "pair layer head *plane"]
    """Positive when the source draws more attention from the right of the readout."""

    def selectivity(self) -> Float[Tensor, "layer head *plane"]:
        """Compute the share of the odd part in the energy (mean square over pairs), 0 to 1: 0 when sides do not matter,
        1 when the two scores are opposite. It is NaN where all scores are 0."""
        even, odd = self.even.pow(2).mean(0), self.odd.pow(2).mean(0)
        return odd / (even + odd)


def score_parity(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Parity:
    """Compute parity by evaluation, under any position scheme and in any layer: from the scores of each pair's two
    queries, the one whose source is on the right and the one whose source is on the left.

    Whatever makes the two differ counts as odd: in the first layer of a relative scheme that is the offset alone, in an
    absolute scheme also the places themselves, in deeper layers also what earlier ones made of the changed context.

    Raises:
        UserError: there are no pairs, their queries do not share answer and source (an ARM's), or a pair's source
            is on one side in both.

    Source: docs/theory.md, section 3.
    """
    model = hooked(model)
    return _evaluated(query_pairs, lambda queries: compute_routes(model, queries).scores)


def plane_parity(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Parity:
    """Compute :func:`score_parity` plane by plane of RoPE, as :func:`~mdm_interp.measures.rope.plane_scores` evaluates
    them: summed over planes this is it, for spans of any length and in any layer.

    Raises:
        UserError: the model has no RoPE, or as :func:`score_parity`.

    Source: docs/theory.md, section 3.
    """
    model = hooked(model)
    return _evaluated(query_pairs, lambda queries: plane_scores(model, queries))


def _evaluated(
    query_pairs: Sequence[QueryPair], scores: Callable[[Sequence[Query]], Float[Tensor, "query layer head *plane"]]
) -> Parity:
    require_shared(query_pairs, "score parity")
    if any(pair.forward.offset * pair.reverse.offset > 0 for pair in query_pairs):
        raise UserError("query_pairs: a source is on one side in both queries of a pair; swap the sides in one")
    forward, reverse = (
        scores(queries) for queries in ([pair.forward for pair in query_pairs], [pair.reverse for pair in query_pairs])
    )
    forward_is_right = torch.tensor([pair.forward.offset > 0 for pair in query_pairs])
    forward_is_right = forward_is_right.view(-1, *[1] * (forward.ndim - 1))
    difference = torch.where(forward_is_right, forward - reverse, reverse - forward)
    return Parity(even=(forward + reverse) / 2, odd=difference / 2)


def direction_selectivity(parity: Parity, query_pairs: Sequence[QueryPair]) -> Contrast[Float[Tensor, "layer head"]]:
    """Return a parity's selectivity, and its null: selectivity when one fact's score with the source on the right meets
    another fact's score with the source on the left, mean over all rotations.

    Where sides share nothing but what all facts share, the null is the measured one; it lies above where a source draws
    attention from both sides alike.

    Args:
        query_pairs: Those of the parity: one context per fact, and of each side two facts or more.

    Raises:
        UserError: a side has one fact only.

    Source: docs/theory.md, section 7.
    """
    right, left = parity.even + parity.odd, parity.even - parity.odd
    mispaired = [Parity((right + left[other]) / 2, (right - left[other]) / 2) for other in other_facts(query_pairs)]
    return Contrast(parity.selectivity(), torch.stack([pairs.selectivity() for pairs in mispaired]).mean(0))


def _distances(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Float[Tensor, "pair"]:
    """Return the positions from readout to source, the same in both queries of a pair, for which closed forms hold.

    Raises:
        UserError: a span has several tokens, or the two sources do not mirror each other about the readout.
    """
    offsets = []
    for pair in query_pairs:
        if len(pair.forward.answer) > 1 or len(pair.forward.source) > 1:
            raise UserError("query_pairs: closed forms need one-token spans; use score_parity, which evaluates scores")
        forward, reverse = (
            query.source_span[0] - query.readout(model.cfg)[0] for query in (pair.forward, pair.reverse)
        )
        if forward != -reverse:
            raise UserError(
                f"query_pairs: sources at offsets {forward} and {reverse} of the readout do not mirror each other; "
                "use score_parity, which evaluates scores"
            )
        offsets.append(abs(forward))
    return torch.tensor(offsets, dtype=torch.float64)


def rope_parity(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Parity:
    """Compute parity per plane in closed form, from the forward query's content and the distance alone:

        even  a_p cos(phi_p) cos(delta theta_p) c,  odd  -a_p sin(phi_p) sin(delta theta_p) c,

    with c = 1 / sqrt(d_head), times yarn's factor (`ModelConfig.score_scale`). Queries and keys are those that rotate,
    after their norms if there are any. Dimensions that do not rotate make one last plane, which is all even. Summed
    over planes this is `score_parity` in the first layer; in deeper ones the reverse query has other content.

    Raises:
        UserError: the model has no RoPE, there are no pairs or none shared, a span has several tokens, or the sources
            do not mirror each other about the readout.

    Source: docs/theory.md, section 3.
    """
    require_shared(query_pairs, "rope parity")
    model = hooked(model)
    rope = require_rope(model)
    content = compute_content(model, [pair.forward for pair in query_pairs])
    products = plane_products(content, rope).to(torch.complex128)
    angle = (_distances(model, query_pairs)[:, None] * rope.theta)[:, None, None]
    even, odd = products.real * angle.cos(), -products.imag * angle.sin()
    if 2 * len(rope.theta) < rope.cfg.head_dim:
        still = (content.q * content.k)[..., rope.cfg.rotary_dim :].double().sum(-1, keepdim=True)
        even, odd = torch.cat([even, still], dim=-1), torch.cat([odd, torch.zeros_like(still)], dim=-1)
    return Parity(even * rope.cfg.score_scale, odd * rope.cfg.score_scale)


def plane_spectrum(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Float[Tensor, "layer head plane"]:
    """Compute each rotating plane's share of the energy E|z_p - E z_p|^2 with which scores vary over the forward
    queries: 1 over the number of planes for isotropic content, NaN where nothing varies.

    Raises:
        UserError: the model has no RoPE, or there are no pairs.

    Source: docs/theory.md, section 4.
    """
    rope = require_rope(model)
    if not query_pairs:
        raise UserError("query_pairs: a spectrum needs several pairs, got none")
    content = compute_content(model, [pair.forward for pair in query_pairs])
    return energy_shares(plane_products(content, rope).to(torch.complex128))


@dataclass(frozen=True)
class PlaneEnergy:
    """Energy of the first layer's scores in each rotating plane, mean over heads."""

    wavelength: Float[Tensor, "plane"]
    """Positions after which the plane has turned once."""
    energy_share: Float[Tensor, "plane"]
    """The plane's share in how scores vary over queries (:func:`plane_spectrum`)."""
    odd_energy: Float[Tensor, "plane"]
    """Mean square of the odd part."""
    odd_uniform: Float[Tensor, "plane"]
    """What that would be for products of the same size with uniformly distributed phases."""


def plane_energy(model: HookedModel, query_pairs: Sequence[QueryPair]) -> PlaneEnergy:
    """Compute each plane's energy, and how much of it tells left from right. If the phases of the products z_p were
    uniformly distributed, the odd part's mean square would be the mean of

        |z_p|^2 sin^2(delta theta_p) c^2 / 2,  c as in :func:`rope_parity`.

    Raises:
        UserError: as in :func:`rope_parity`.

    Source: docs/theory.md, sections 3 and 4.
    """
    rope = require_rope(model)
    odd = rope_parity(model, query_pairs).odd[:, 0, :, : len(rope.theta)].pow(2).mean((0, 1))
    content = compute_content(model, [pair.forward for pair in query_pairs])
    z = plane_products(content, rope)[:, 0].to(torch.complex128)
    turned = (_distances(model, query_pairs)[:, None] * rope.theta).sin().pow(2)[:, None]
    return PlaneEnergy(
        wavelength=2 * torch.pi / rope.theta,
        energy_share=plane_spectrum(model, query_pairs)[0].mean(0),
        odd_energy=odd,
        odd_uniform=(z.abs().pow(2) * turned / 2 * rope.cfg.score_scale**2).mean((0, 1)),
    )


def route_coupling(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Float[Tensor, "pair layer head"]:
    """Compute the inner product of the gradients of s(+delta) and s(-delta) with respect to (W_Q, W_K) of one head, the
    attention's normalised inputs x held fixed. With equal content in both queries it is

        [|x_i|^2 sum_p |k_p|^2 cos(2 delta theta_p) + |x_j|^2 sum_p |q_p|^2 cos(2 delta theta_p)] c^2,

    with c as in :func:`rope_parity`, where dimensions that do not rotate (all of them outside RoPE) have theta 0. Where
    it is positive, raising the score on one side raises it on the other. Where content differs (absolute schemes,
    deeper layers), each square is the inner product of the two queries' own.

    Raises:
        UserError: there are no pairs or none shared, a span has several tokens, the sources do not mirror each other
            about the readout, the model rotates otherwise than RoPE, or it normalises queries and keys, so that scores
            are no longer products of (W_Q, W_K) with the inputs.

    Source: docs/theory.md, section 7.
    """
    require_shared(query_pairs, "route coupling")
    model = hooked(model)
    if model.cfg.use_qk_norm:
        raise UserError(
            "model: it normalises queries and keys (use_qk_norm), for which route_coupling has no closed form; use "
            "gram with SourceAttention, which differentiates through the norms"
        )
    distance, queries = _distances(model, query_pairs), [queries_of(query_pairs, way) for way in get_args(Direction)]
    forward, reverse = (compute_content(model, of_side) for of_side in queries)
    (at_f, from_f), (at_r, from_r) = (_attention_inputs(model, of_side) for of_side in queries)
    # The forward query's offset less the reverse query's.
    turn = torch.tensor([1.0 if query.offset > 0 else -1.0 for query in queries[0]]) * 2 * distance
    inputs_i, inputs_j = (at_f * at_r).sum(-1)[..., None], (from_f * from_r).sum(-1)[..., None]  # [pair layer 1]
    by_query = inputs_i * _turned_product(model, forward.k, reverse.k, -turn)
    by_key = inputs_j * _turned_product(model, forward.q, reverse.q, turn)
    return (by_query + by_key) * model.cfg.score_scale**2


def _turned_product(
    model: HookedModel,
    x: Float[Tensor, "pair layer head d_head"],
    y: Float[Tensor, "pair layer head d_head"],
    turn: Float[Tensor, "pair"],
) -> Float[Tensor, "pair layer head"]:
    """Compute the inner product of `x` with `y` rotated by as many positions as `turn` says."""
    x, y = x.double(), y.double()
    if not model.pos_embed.answers("rotate"):
        return (x * y).sum(-1)
    rope = require_rope(model)
    angle = turn[:, None] * rope.theta
    products = rope.planes(x).conj() * rope.planes(y) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    return products.real.sum(-1) + (x * y)[..., rope.cfg.rotary_dim :].sum(-1)


@torch.no_grad()
def _attention_inputs(
    model: HookedModel, queries: Sequence[Query]
) -> tuple[Float[Tensor, "query layer d_model"], Float[Tensor, "query layer d_model"]]:
    """Return what the attention of every layer reads at each query's readout and at its source, gain and bias of the
    norm included; one-token spans."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
    readout, source = [], []
    for batch in batches(queries, model.cfg):
        _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask, names_filter=names)
        per_layer = [model.blocks[layer].ln1(cache[name]) for layer, name in enumerate(names)]
        read = torch.stack([x.to(batch.tokens.device) for x in per_layer], dim=2).double()
        readout.append(batch.at_readout(read)[:, 0].cpu())
        stands = batch.source.to(read.dtype)
        source.append(einsum(read, stands, "query pos layer d_model, query pos -> query layer d_model").cpu())
    return torch.cat(readout), torch.cat(source)
