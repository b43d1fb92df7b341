"""What rotation lets scores of both sides have in common: predictions for RoPE. Formulas: docs/theory.md, section 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import Query, QueryPair, batches
from mdm_interp.errors import UserError
from mdm_interp.measures.capture import on_cpu
from mdm_interp.measures.nulls import other_facts
from mdm_interp.measures.routes import readout_weights
from mdm_interp.models.bridge import hooked
from mdm_interp.models.layers import content_hooks, per_query_head
from mdm_interp.models.positions import Rope
from mdm_interp.models.protocol import HookedModel
from mdm_interp.shards import shared_out
from mdm_interp.stats.correlations import correlate
from mdm_interp.stats.estimates import Contrast


def require_rope(model: HookedModel) -> Rope:
    """Return the model's rotation, for which closed forms hold: RoPE's own, by any angles.

    Raises:
        UserError: the model has none, or one that turns heads, planes, or queries and keys otherwise, or does more than
            to rotate.
    """
    scheme = hooked(model).pos_embed
    if not isinstance(scheme, Rope) and not scheme.answers("rotate"):
        raise UserError(f"model: position scheme {model.cfg.position!r} has no rotation to predict from; use 'rope'")
    changed = [name for name in METHODS if _own(scheme, name)] if isinstance(scheme, Rope) else ["rotate"]
    if changed or [2 * n for n in scheme.theta.shape] != [scheme.cfg.rotary_dim]:
        raise UserError(
            f"model: {type(scheme).__name__} has its own {', '.join(changed) or 'shape of theta'}, and closed forms "
            "are for Rope's; use score_parity or route_correlation, which evaluate scores"
        )
    return scheme


METHODS = ("rotate", "planes", "_split", "_constant", "embed", "bias")
"""What closed forms take to be Rope's."""


def _own(scheme: Rope, method: str) -> bool:
    return getattr(getattr(scheme, method), "__func__", None) is not getattr(Rope, method)


@dataclass(frozen=True)
class Content:
    """What a route is made of, before any rotation unless asked for otherwise."""

    q: Float[Tensor, "query layer head d_head"]
    """At the readout position, averaged over the answer's tokens."""
    k: Float[Tensor, "query layer head d_head"]
    """At the source, summed over its tokens; grouped keys repeated per query head."""


@shared_out("queries")
@torch.no_grad()
def compute_content(model: HookedModel, queries: Sequence[Query], *, rotated: bool = False) -> Content:
    """Compute the queries at the readout and the keys at the source of every query.

    Args:
        rotated: Take them after the rotation of RoPE, each by its own position.

    Raises:
        UserError: there are no queries, or the model does not show what is asked for, as some bridges do not.
    """
    model = hooked(model)
    cfg: ModelConfig = model.cfg
    kept: dict[str, list[Tensor]] = {"q": [], "k": []}
    hook_of = dict(zip(kept, ("rot_q", "rot_k") if rotated else content_hooks(cfg), strict=True))
    for batch in batches(queries, cfg):
        reduced: dict[str, dict[int, Tensor]] = {kind: {} for kind in kept}

        def reduce(x: Tensor, hook: HookPoint, into: dict, layer: int, weights: Tensor) -> None:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = einsum(x, weights.to(x), "query pos head d_head, query pos -> query head d_head")
            into[layer] = per_query_head(x, cfg.n_heads, dim=1)

        weights = {"q": readout_weights(batch, torch.float64), "k": batch.source}
        hooks = [
            (
                f"blocks.{layer}.attn.hook_{hook_of[kind]}",
                partial(reduce, into=reduced[kind], layer=layer, weights=weights[kind]),
            )
            for kind in kept
            for layer in range(cfg.n_layers)
        ]
        model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=hooks)
        for kind, of_kind in kept.items():
            if len(reduced[kind]) < cfg.n_layers:
                raise UserError(f"model: its hook {hook_of[kind]!r} does not fire in every layer; use load_checkpoint")
            of_kind.append(on_cpu([reduced[kind][layer] for layer in range(cfg.n_layers)], dim=1))
    return Content(torch.cat(kept["q"]), torch.cat(kept["k"]))


@dataclass(frozen=True)
class Isotropy:
    """How far queries at the readout and keys at the source are from isotropic and independent ones."""

    q: Contrast[Float[Tensor, "layer head"]]
    """Over what share of a head's dimensions the queries spread; null: draws in random directions, of the same lengths
    and as often the same."""
    k: Contrast[Float[Tensor, "layer head"]]
    """The same of the keys."""
    overlap: Contrast[Float[Tensor, "layer head"]]
    """Mean squared cosine of a fact's query and key, times `d_head`: 1 where directions are random; null: with the keys
    of other facts."""


def isotropy(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Isotropy:
    """Measure what the theorem on correlated routes presupposes, over the forward queries.

    Raises:
        UserError: there are too few pairs.

    Source: docs/theory.md, section 4.
    """
    content = compute_content(model, [pair.forward for pair in query_pairs])
    q, k = content.q.double(), content.k.double()
    squared_cosine = torch.cosine_similarity(q, k, dim=-1) ** 2
    others = torch.stack([torch.cosine_similarity(q, k[other], dim=-1) ** 2 for other in other_facts(query_pairs)])
    d_head = q.shape[-1]
    return Isotropy(spread(q), spread(k), Contrast(d_head * squared_cosine.mean(0), d_head * others.mean((0, 1))))


SAME = 1 - 1e-9
"""From which squared cosine on two vectors are in one direction."""


def spread(x: Float[Tensor, "query layer head d_head"]) -> Contrast[Float[Tensor, "layer head"]]:
    """Measure over what share of their dimensions vectors spread: the participation ratio of their second moment; null:
    that of draws in random directions, of the same lengths and as often the same.

    Source: docs/theory.md, section 4.
    """
    lengths, d_head = x.square().sum(-1), x.shape[-1]
    products = einsum(x, x, "one layer head d_head, other layer head d_head -> one other layer head") ** 2
    sizes = lengths[:, None] * lengths
    random = torch.where(products > SAME * sizes, sizes, sizes / d_head)
    total = lengths.sum(0) ** 2 / d_head
    return Contrast(total / products.sum((0, 1)), total / random.sum((0, 1)))


def plane_products(content: Content, rope: Rope) -> Tensor:
    """Compute conj(q_p) k_p per rotating plane, complex `[query layer head plane]`.

    The score at offset delta is the real part of their sum turned by `exp(i delta theta_p)`, times `score_scale`.
    """
    return rope.planes(content.q).conj() * rope.planes(content.k)


def plane_scores(model: HookedModel, queries: Sequence[Query]) -> Float[Tensor, "query layer head plane"]:
    """Compute what each plane adds to the score from readout to source, where the tokens are: for spans of any length,
    in any layer. Dimensions that do not rotate make one last plane, if there are any. Summed over planes these are the
    scores of :func:`~mdm_interp.measures.routes.compute_routes`.

    Raises:
        UserError: the model has no RoPE.

    Source: docs/theory.md, section 3.
    """
    rope = require_rope(model)
    content = compute_content(model, queries, rotated=True)
    scores = plane_products(content, rope).real
    if 2 * len(rope.theta) < rope.cfg.head_dim:
        still = (content.q * content.k)[..., rope.cfg.rotary_dim :].sum(-1, keepdim=True)
        scores = torch.cat([scores, still], dim=-1)
    return scores * rope.cfg.score_scale


def score_at_offset(
    products: Tensor, rope: Rope, offset: Float[Tensor, "offset"]
) -> Float[Tensor, "offset query layer head"]:
    """Compute scores for fixed content with the source `offset` positions to the right (negative: left) of the readout.

    Planes that do not rotate are left out: they add the same to every offset.

    Source: docs/theory.md, section 3.
    """
    angle = offset.to(torch.float64)[:, None] * rope.theta
    turn = torch.polar(torch.ones_like(angle), angle).to(products.dtype)
    turned = einsum(products, turn, "query layer head plane, offset plane -> offset query layer head")
    return turned.real * rope.cfg.score_scale


def isotropic_correlation(
    theta: Float[Tensor, "plane"], distance: Float[Tensor, "distance"]
) -> Float[Tensor, "distance"]:
    """Predict the correlation of s(distance) and s(-distance) when every plane carries the same energy: the mean over
    planes of cos(2 distance theta_p).

    Source: docs/theory.md, section 4.
    """
    return torch.cos(2 * distance.to(theta.dtype)[:, None] * theta).mean(1)


def energy_shares(products: Tensor) -> Float[Tensor, "layer head plane"]:
    """Compute each plane's share of the energy, the variance over queries of its product conj(q_p) k_p: what all
    queries share shifts every score alike and drops out of a correlation. It is NaN where nothing varies.

    Source: docs/theory.md, section 4.
    """
    energy = (products - products.mean(0)).abs().pow(2).mean(0)
    return energy / energy.sum(-1, keepdim=True)


def spectrum_correlation(
    products: Tensor, theta: Float[Tensor, "plane"], distance: Float[Tensor, "distance"]
) -> Float[Tensor, "distance layer head"]:
    """Make the same prediction with each plane weighted by the energy it was measured to carry, per layer and head.

    Source: docs/theory.md, section 4.
    """
    shares = energy_shares(products).to(theta.dtype)
    kernel = torch.cos(2 * distance.to(theta.dtype)[:, None] * theta)
    return einsum(shares, kernel, "layer head plane, distance plane -> distance layer head")


@dataclass(frozen=True)
class DistanceCorrelation:
    """Correlation over pairs of the score at +distance and at -distance, for the content the model has."""

    distance: Float[Tensor, "distance"]
    """Positions between readout and source."""
    measured: Float[Tensor, "distance layer head"]
    spectrum: Float[Tensor, "distance layer head"]
    """Predicted from the measured energy per plane."""
    isotropic: Float[Tensor, "distance"]
    """Predicted from equal energy per plane."""


def distance_correlation(
    model: HookedModel, query_pairs: Sequence[QueryPair], distance: Float[Tensor, "distance"]
) -> DistanceCorrelation:
    """Measure how alike routes to both sides are at each distance, and predict it in two ways.

    Raises:
        UserError: the model has no RoPE, or there are no pairs.

    Source: docs/theory.md, section 4.
    """
    rope = require_rope(model)
    if not query_pairs:
        raise UserError("query_pairs: a correlation needs several pairs, got none")
    content = compute_content(model, [pair.forward for pair in query_pairs])
    products = plane_products(content, rope).to(torch.complex128)
    still = (content.q * content.k)[..., rope.cfg.rotary_dim :].double().sum(-1)
    right, left = (score_at_offset(products, rope, at) + still * rope.cfg.score_scale for at in (distance, -distance))
    # Dimensions that do not rotate act as planes that turn by 0; a real product varies in one part only: root of 2.
    products = torch.cat([products, 2**0.5 * still[..., None].to(products.dtype)], dim=-1)
    theta = torch.cat([rope.theta, rope.theta.new_zeros(1)])
    per_dimension = torch.cat([rope.theta.repeat(2), rope.theta.new_zeros(rope.cfg.head_dim - 2 * len(rope.theta))])
    return DistanceCorrelation(
        distance=distance,
        measured=correlate(right.transpose(0, 1), left.transpose(0, 1)),
        spectrum=spectrum_correlation(products, theta, distance),
        isotropic=isotropic_correlation(per_dimension, distance),
    )
