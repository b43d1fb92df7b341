"""Attention sinks: positions that are read far more than others, whatever is asked.

    found = sinks(model, queries)
    found.share.effect                             # [query layer head]: of all attention, what sinks take
    found.routes                                   # [query layer head]: the source's, of what is left of it
    watched = watch_sinks(model, [source_only(query, model.cfg) for query in queries], steps=4)
    watched.share.effect                           # [query state layer]: while the sentences are denoised

A position is a sink of a head if it receives, summed over the positions that read, at least :data:`THRESHOLD` more than
the others do in the mean; spread evenly each receives 1. Formulas: docs/theory.md, section 16.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.data.queries import Query, QueryBatch, batches
from mdm_interp.errors import UserError
from mdm_interp.inference.denoising import denoise
from mdm_interp.measures.capture import on_cpu
from mdm_interp.measures.routes import readout_weights
from mdm_interp.models.bridge import hooked
from mdm_interp.models.layers import precise
from mdm_interp.models.protocol import HookedModel
from mdm_interp.shards import shared_out
from mdm_interp.stats.estimates import Contrast

THRESHOLD = 3.0
"""As in arXiv 2510.15731."""


@dataclass(frozen=True)
class Sinks:
    """What sinks take, for every query, layer and head."""

    share: Contrast[Float[Tensor, "query layer head"]]
    """Of all attention, mean over the positions that read; null: if each of these read as much, but elsewhere, moved
    along by a random number of positions."""
    count: Float[Tensor, "query layer head"]
    """How many positions are sinks."""
    readout: Float[Tensor, "query layer head"]
    """Of the attention of the readout, mean over the answer's tokens."""
    source: Float[Tensor, "query layer head"]
    """The route: what the source gets of the readout's attention, whether or not it is a sink."""
    routes: Float[Tensor, "query layer head"]
    """What the source gets of the readout's attention with sinks set aside: its share of the attention to positions
    that are no sinks; NaN where the source is one, or nothing else is read."""
    where: Int[Tensor, "query layer"]
    """The position that a layer's heads together read most."""


@shared_out("queries")
@torch.no_grad()
def sinks(model: HookedModel, queries: Sequence[Query], threshold: float = THRESHOLD) -> Sinks:
    """Find the sinks of every head over each query's text.

    Args:
        threshold: How much more a sink receives than other positions in the mean.

    Raises:
        UserError: there are no queries, or the model lacks `hook_pattern`.

    Source: arXiv 2510.15731, section 3.
    """
    if not queries:
        raise UserError("queries: sinks are those of some text, got no queries")
    model = hooked(model)
    parts = [_read(model, batch, threshold) for batch in batches(queries, model.cfg)]
    share, null, *others = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
    return Sinks(Contrast(share, null), *others)


@dataclass(frozen=True)
class WatchedSinks:
    """What sinks take while sentences are denoised: in the state before each step and after the last."""

    share: Contrast[Float[Tensor, "query state layer"]]
    """As of :class:`Sinks`, mean over heads."""
    where: Int[Tensor, "query state layer"]
    """The position that a layer's heads together read most."""


@shared_out("queries")
@torch.no_grad()
def watch_sinks(model: HookedModel, queries: Sequence[Query], steps: int, threshold: float = THRESHOLD) -> WatchedSinks:
    """Fill all the masks of every query in equal parts, the most certain first, and find the sinks of every state.

    Args:
        queries: With any tokens masked besides the answer (:func:`~mdm_interp.measures.trajectory.source_only`).
        steps: In how many steps. A query with fewer masks is done before the last, and stays.

    Raises:
        UserError: as :func:`sinks`; or the model is no MDM, or does not say what its mask token is.
    """
    if not queries:
        raise UserError("queries: sinks are those of some text, got no queries")
    model, parts = hooked(model), []
    for batch in batches(queries, model.cfg):
        states = denoise(model, batch.tokens, steps=steps, attention_mask=batch.attention_mask).tokens
        states = [*states, *[states[-1]] * (steps + 1 - len(states))]
        share, null, *_, where = zip(
            *(_read(model, replace(batch, tokens=tokens), threshold) for tokens in states), strict=True
        )
        parts.append([torch.stack(share, 1).mean(-1), torch.stack(null, 1).mean(-1), torch.stack(where, 1)])
    share, null, where = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
    return WatchedSinks(Contrast(share, null), where)


def _read(model: HookedModel, batch: QueryBatch, threshold: float) -> list[Tensor]:
    """Return the parts of :class:`Sinks` for one batch, each `[query layer ...]`."""
    kept: list[tuple[Tensor, Tensor]] = []
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    if missing := [name for name in names if name not in model.hook_dict]:
        raise UserError(f"model: it has no hook {missing[0]!r}, which sinks are read off; use a model that has it")
    drawn = _drawn(batch.tokens.shape[1]).to(batch.tokens.device)

    def reduce(pattern: Tensor, hook: HookPoint) -> None:
        here = pattern.device  # of a model spread over devices, this layer's
        kept.append(_of_layer(precise(pattern), batch.to(here), drawn.to(here), threshold))

    hooks = [(name, reduce) for name in names]
    model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=hooks, readout=batch.readout)
    by_head, where = (on_cpu(layers, dim=1) for layers in zip(*kept, strict=True))
    return [*by_head.unbind(-1), where]


def _of_layer(
    pattern: Float[Tensor, "query head query_pos key_pos"],
    batch: QueryBatch,
    drawn: Float[Tensor, "query_pos"],
    threshold: float,
) -> tuple[Float[Tensor, "query head part"], Int[Tensor, "query"]]:
    """Return the parts of :class:`Sinks` that are of heads, and `where`."""
    real = batch.attention_mask
    counted = torch.ones_like(batch.tokens, dtype=torch.bool) if real is None else real
    got, elsewhere = (_received(rows, counted) for rows in (pattern, _moved_along(pattern, counted, drawn)))
    found, share = _found(got, counted, threshold)
    read = einsum(pattern, readout_weights(batch, pattern.dtype), "query head i j, query i -> query head j")
    at_sinks, at_source = ((read * at).sum(-1) for at in (found, batch.source[:, None]))
    aside = (found & batch.source[:, None]).any(-1) | (1 - at_sinks < 1e-6)
    routes = (at_source / (1 - at_sinks)).masked_fill(aside, torch.nan)
    null = _found(elsewhere, counted, threshold)[1]
    parts = torch.stack([share, null, found.sum(-1).to(share), at_sinks, at_source, routes], dim=-1)
    return parts, got.sum(1).argmax(-1)


def _received(
    pattern: Float[Tensor, "query head query_pos key_pos"], counted: Bool[Tensor, "query pos"]
) -> Float[Tensor, "query head key_pos"]:
    """Return what each position receives from those that are no padding."""
    return (pattern * counted[:, None, :, None]).sum(2)


def _found(
    got: Float[Tensor, "query head key_pos"], counted: Bool[Tensor, "query pos"], threshold: float
) -> tuple[Bool[Tensor, "query head key_pos"], Float[Tensor, "query head"]]:
    """Return which positions are sinks, and what they take of all attention."""
    n = counted.sum(1)[:, None, None]
    of_others = (n - got) / (n - 1).clamp(min=1)
    found = (got - of_others >= threshold) & counted[:, None]
    return found, (got * found).sum(-1) / n[..., 0]


def _drawn(n_rows: int) -> Float[Tensor, "query_pos"]:
    """Draw a number from 0 to 1 for each row, the same whatever the text."""
    chooser = random.Random(0)
    return torch.tensor([chooser.random() for _ in range(n_rows)])


def _moved_along(
    pattern: Float[Tensor, "query head query_pos key_pos"],
    counted: Bool[Tensor, "query pos"],
    drawn: Float[Tensor, "query_pos"],
) -> Float[Tensor, "query head query_pos key_pos"]:
    """Turn each row around its readable positions, by the share of them that is `drawn` for the row, whatever the
    text."""
    readable = (pattern > 0).any(1) & counted[:, None]
    n = readable.sum(-1, keepdim=True)
    order = (~readable).int().argsort(dim=-1, stable=True)  # readable positions first, from the left
    rank = torch.arange(pattern.shape[2], device=pattern.device)
    turned = torch.where(rank < n, (rank + (drawn[:, None] * n).long()) % n.clamp(min=1), rank)
    source = order.gather(-1, turned)[:, None].expand_as(pattern)
    return torch.zeros_like(pattern).scatter(-1, order[:, None].expand_as(pattern), pattern.gather(-1, source))
