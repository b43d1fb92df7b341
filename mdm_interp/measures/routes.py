"""Routing, the QK side: how strongly a query's readout position attends to its source, and how alike the forward and
the reverse route are.

A route is read at the readout rows only. For spans it is summed over source tokens and averaged over answer tokens.
Formulas: docs/theory.md, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query, QueryBatch, QueryPair, batches, mirrored_positions, require_shared
from mdm_interp.errors import UserError
from mdm_interp.measures.capture import LayerView, capture, on_cpu
from mdm_interp.measures.evidence import read_embedding
from mdm_interp.measures.nulls import other_facts
from mdm_interp.models.bridge import BridgedTransformer, hooked
from mdm_interp.models.inputs import check_layer, check_token_ids, require_numbers
from mdm_interp.models.layers import per_query_head, precise
from mdm_interp.models.protocol import HookedModel
from mdm_interp.shards import shared_out
from mdm_interp.stats.correlations import correlate
from mdm_interp.stats.estimates import Contrast


@dataclass(frozen=True)
class Routes:
    """Attention from readout to source."""

    scores: Float[Tensor, "query layer head"]
    """Before the softmax; position bias included. Adding to every key of a head what no softmax sees changes them."""
    contrast: Float[Tensor, "query layer head"]
    """Mean score of the source's tokens less that of the other keys the readout may read: what the softmax sees. NaN
    where there are no others."""
    pattern: Float[Tensor, "query layer head"]
    """Share of attention, 0 to 1."""


def readout_weights(batch: QueryBatch, dtype: torch.dtype) -> Float[Tensor, "query pos"]:
    """Return the weights that average over each query's readout positions."""
    weights = torch.zeros(batch.tokens.shape, dtype=dtype, device=batch.tokens.device)
    share = (batch.answered / batch.answered.sum(1, keepdim=True)).to(dtype)
    return weights.scatter_add(1, batch.readout, share)


@shared_out("queries")
@torch.no_grad()
def compute_routes(model: HookedModel, queries: Sequence[Query]) -> Routes:
    """Compute the scores and attention from every query's readout to its source.

    Only the reduced numbers are kept, so memory does not grow with the square of the length.

    Source: docs/theory.md, section 1.
    """
    model, kept = hooked(model), []

    def averaged(rows: Float[Tensor, "query span head"], batch: QueryBatch) -> Float[Tensor, "query head"]:
        total = rows.masked_fill(~batch.answered[..., None], 0).sum(1)
        return total / batch.answered.sum(1, keepdim=True)

    def route(rows: Float[Tensor, "query span head key_pos"], batch: QueryBatch) -> Float[Tensor, "query head"]:
        # Select before adding: a masked score is the most negative number there is, and twice that is infinite.
        return averaged(rows.masked_fill(~batch.source[:, None, None], 0).sum(-1), batch)

    def contrast(view: LayerView) -> Float[Tensor, "query head"]:
        source, readable = view.batch.source[:, None, None], _readable(view.scores)
        at_source, elsewhere = (_masked_mean(view.scores, keys & readable) for keys in (source, ~source))
        return averaged(at_source - elsewhere, view.batch)

    def reduce(view: LayerView) -> Float[Tensor, "measure query head"]:
        return torch.stack([route(view.scores, view.batch), contrast(view), route(view.pattern, view.batch)])

    for batch in batches(queries, model.cfg):
        _, layers = capture(model, batch, reduce)
        kept.append(on_cpu(layers, dim=2))
        require_numbers(kept[-1][2], model.cfg.dtype)  # where shares of attention are not, logits are not
    return Routes(*torch.cat(kept, dim=1))


def _readable(scores: Float[Tensor, "*rows key_pos"]) -> Bool[Tensor, "*rows key_pos"]:
    """Tell which keys a row of attention may read."""
    return scores > torch.finfo(scores.dtype).min / 2


def _masked_mean(scores: Float[Tensor, "*rows key_pos"], keys: Bool[Tensor, "*rows key_pos"]) -> Float[Tensor, "*rows"]:
    """Take the mean over these keys; NaN where there are none."""
    return scores.masked_fill(~keys, 0).sum(-1) / keys.sum(-1)


@torch.no_grad()
def score_matrix(
    model: HookedModel, queries: Int[Tensor, "query_token"], keys: Int[Tensor, "key_token"], offset: int, layer: int = 0
) -> Float[Tensor, "head query_token key_token"]:
    """Compute the score with which every query token would read every key token `offset` positions right of it (left,
    if negative), as a layer reads both from the embedding; position bias included.

    In a layer after the first this is the direct path alone: the layer's own norm reads the embedding, without what
    earlier layers add to it.

    Raises:
        UserError: a token is outside the vocabulary, the offset is longer than the context, there is no such layer, or
            the model is a bridge, whose rotation cannot be asked for.

    Source: docs/theory.md, section 3.
    """
    model = hooked(model)
    if isinstance(model, BridgedTransformer):
        raise UserError("model: scores of tokens by themselves need a HookedTransformer; use load_checkpoint")
    check_layer("layer", layer, -model.cfg.n_layers, model.cfg.n_layers - 1)
    cfg, attn, n_ctx = model.cfg, model.blocks[layer].attn, model.cfg.n_ctx
    for name, tokens in (("queries", queries), ("keys", keys)):
        check_token_ids(name, tokens, cfg.d_vocab)
    if abs(offset) >= n_ctx:
        raise UserError(f"offset: {offset} is longer than the context; give {1 - n_ctx} to {n_ctx - 1}")
    at = {"query": torch.tensor(max(-offset, 0)), "key": torch.tensor(max(offset, 0))}
    read = []
    for which, tokens, position, weight, bias in (
        ("q", queries, at["query"], attn.W_Q, attn.b_Q),
        ("k", keys, at["key"], attn.W_K, attn.b_K),
    ):
        x = read_embedding(model, tokens.to(model.W_E.device), position.to(model.W_E.device), layer)
        x = einsum(precise(x), precise(weight), "token d_model, head d_model d_head -> token head d_head")
        x = x if bias is None else x + bias
        x = getattr(attn, f"{which}_norm")(x) if cfg.use_qk_norm else x
        # Each token as a sequence of its own, all of them where the query or the key stands.
        read.append(model.pos_embed.rotate(x[:, None], position[None].to(x.device), which)[:, 0])
    q, k = read[0], per_query_head(read[1], cfg.n_heads, dim=1)
    bias = model.pos_embed.bias(at["query"][None].to(q.device), at["key"][None].to(q.device))
    scores = einsum(q, k, "query head d_head, key head d_head -> head query key") * cfg.score_scale
    return scores if bias is None else scores + bias.to(scores)


def score_correlation(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Contrast[Float[Tensor, "layer head"]]:
    """Correlate over pairs the raw forward score at the source with the raw reverse score, per layer and head; null:
    with the reverse scores of other facts that are asked for the same side, mean over all rotations of the facts.

    1 means that what sets one source apart from another does so from either side; 0 that the sides are unrelated. It
    says nothing of how sources differ from other tokens, and changes with what no softmax sees
    (:func:`route_correlation` does not).

    Args:
        query_pairs: Of each side two facts or more.

    Raises:
        UserError: there are too few pairs, or their queries do not share answer and source (an ARM's).

    Source: docs/theory.md, section 3.
    """
    require_shared(query_pairs, "score correlation")
    model = hooked(model)
    forward = compute_routes(model, [pair.forward for pair in query_pairs]).scores
    reverse = compute_routes(model, [pair.reverse for pair in query_pairs]).scores
    nulls = [correlate(forward, reverse[other]) for other in other_facts(query_pairs)]
    return Contrast(correlate(forward, reverse), torch.stack(nulls).nanmean(0))


def route_correlation(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Float[Tensor, "layer head"]:
    """Correlate the forward query's row of scores with the reverse query's, per layer and head.

    Every key that a readout may read counts: source, relation, filler and the mask itself. The reverse row is mirrored
    about the fact, so that each token meets itself, and each row's mean is subtracted, which no softmax sees. 1 means
    that attention prefers the same tokens from either side; 0 is what keys dealt at random give; -1 that it prefers
    from one side what it avoids from the other. It is NaN where a head prefers nothing.

    Raises:
        UserError: there are no pairs, their queries do not share answer and source (an ARM's), or are not mirror
            images of each other.

    Source: docs/theory.md, section 3.
    """
    require_shared(query_pairs, "route correlation")
    model = hooked(model)
    forward = _centred_rows(model, [pair.forward for pair in query_pairs])
    reverse = _centred_rows(model, [pair.reverse for pair in query_pairs])
    columns = torch.stack([mirrored_positions(pair, forward.shape[-1]) for pair in query_pairs])
    reverse = reverse.gather(-1, columns[:, None, None].expand_as(reverse))
    product, forward_square, reverse_square = (
        (one * other).sum((0, 3)) for one, other in ((forward, reverse), (forward, forward), (reverse, reverse))
    )
    size = (forward_square * reverse_square).sqrt()
    return torch.where(size > 0, product / size, torch.nan)


@torch.no_grad()
def _centred_rows(model: HookedModel, queries: Sequence[Query]) -> Float[Tensor, "query layer head key_pos"]:
    """Return the scores from the readout to every key less their mean over the keys it may read, in float64; 0 at the
    others."""

    def centred(view: LayerView) -> Float[Tensor, "query head key_pos"]:
        scores, readable = view.scores.double(), _readable(view.scores)
        scores = (scores - _masked_mean(scores, readable)[..., None]).masked_fill(~readable, 0)
        answered = view.batch.answered
        return scores.masked_fill(~answered[..., None, None], 0).sum(1) / answered.sum(1)[:, None, None]

    longest, rows = max(len(query.tokens) for query in queries), []
    for batch in batches(queries, model.cfg):
        stacked = on_cpu(capture(model, batch, centred)[1], dim=1)
        rows.append(torch.nn.functional.pad(stacked, (0, longest - stacked.shape[-1])))
    return torch.cat(rows)
