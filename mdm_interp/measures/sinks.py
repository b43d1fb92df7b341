"""Attention sinks: positions that are read far more than others, whatever is asked.

    found = sinks(model, queries)
    found.share                                    # [query layer head]: of all attention, what sinks take
    found.routes                                   # [query layer head]: the source's, of what is left of it

A position is a sink of a head if it receives, summed over the positions that read, at least :data:`THRESHOLD` more than
the others do in the mean; spread evenly each receives 1. Formulas: docs/theory.md, section 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.data.queries import Query, QueryBatch, batches
from mdm_interp.errors import UserError
from mdm_interp.measures.routes import readout_weights
from mdm_interp.models.bridge import hooked
from mdm_interp.models.layers import precise
from mdm_interp.models.protocol import HookedModel

THRESHOLD = 3.0
"""As in arXiv 2510.15731."""


@dataclass(frozen=True)
class Sinks:
    """What sinks take, for every query, layer and head."""

    share: Float[Tensor, "query layer head"]
    """Of all attention, mean over the positions that read."""
    count: Float[Tensor, "query layer head"]
    """How many positions are sinks."""
    readout: Float[Tensor, "query layer head"]
    """Of the attention of the readout, mean over the answer's tokens."""
    routes: Float[Tensor, "query layer head"]
    """What the source gets of the readout's attention with sinks set aside: its share of the attention to positions
    that are no sinks; NaN where the source is one, or nothing else is read."""
    where: Int[Tensor, "query layer"]
    """The position that a layer's heads together read most."""


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
    model, parts = hooked(model), []
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    if missing := [name for name in names if name not in model.hook_dict]:
        raise UserError(f"model: it has no hook {missing[0]!r}, which sinks are read off; use a model that has it")
    for batch in batches(queries, model.cfg):
        kept: list[tuple[Tensor, ...]] = []

        def reduce(pattern: Tensor, hook: HookPoint, batch: QueryBatch, kept: list[tuple[Tensor, ...]]) -> None:
            kept.append(_of_layer(precise(pattern), batch.to(pattern.device), threshold))

        hooks = [(name, partial(reduce, batch=batch, kept=kept)) for name in names]
        model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=hooks, readout=batch.readout)
        parts.append(
            [torch.stack([of_layer.cpu() for of_layer in layers], dim=1) for layers in zip(*kept, strict=True)]
        )
    return Sinks(*(torch.cat(of_all) for of_all in zip(*parts, strict=True)))


def _of_layer(
    pattern: Float[Tensor, "query head query_pos key_pos"], batch: QueryBatch, threshold: float
) -> tuple[Tensor, ...]:
    real = batch.attention_mask
    counted = torch.ones_like(batch.tokens, dtype=torch.bool) if real is None else real
    n = counted.sum(1)[:, None, None]
    got = (pattern * counted[:, None, :, None]).sum(2)  # by each position, from those that are no padding
    of_others = (n - got) / (n - 1).clamp(min=1)
    found = (got - of_others >= threshold) & counted[:, None]
    read = einsum(pattern, readout_weights(batch, pattern.dtype), "query head i j, query i -> query head j")
    at_sinks, at_source = ((read * at).sum(-1) for at in (found, batch.source[:, None]))
    aside = (found & batch.source[:, None]).any(-1) | (1 - at_sinks < 1e-6)
    routes = (at_source / (1 - at_sinks)).masked_fill(aside, torch.nan)
    return (got * found).sum(-1) / n[..., 0], found.sum(-1).to(got), at_sinks, routes, got.sum(1).argmax(-1)
