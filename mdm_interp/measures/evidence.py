"""Storage, the OV side: what a source's value writes toward a token's logit once it is attended.

Evidence is G_h[t, s] = u_t . (gain * W_O^h W_V^h x_hat(s)): the final norm's scale is left out, and divides everything
a readout position receives alike. Positive evidence raises the token's logit. Formulas: docs/theory.md, sections 1, 2
and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query, QueryBatch, QueryPair, batches, require_shared
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError, require_one_of, require_some
from mdm_interp.measures.capture import LayerView, capture, on_cpu
from mdm_interp.measures.nulls import next_answers
from mdm_interp.models.bridge import hooked
from mdm_interp.models.inputs import check_layer, check_token_ids
from mdm_interp.models.layers import per_query_head, precise
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast

Index = TypeVar("Index", float, Tensor)


def readout_directions(
    model: HookedModel, tokens: Int[Tensor, "token"] | None = None
) -> Float[Tensor, "token d_model"]:
    """Return the direction of the residual stream that raises each token's logit (times the final scale); default: all
    tokens.

    The final norm's gain is included and, for LayerNorm, its centering. The directions are in float32 at least.
    """
    model = hooked(model)
    tokens = (
        torch.arange(model.W_U.shape[1], device=model.W_U.device) if tokens is None else tokens.to(model.W_U.device)
    )
    directions = model.residual_directions(tokens)
    return directions - directions.mean(-1, keepdim=True) if model.cfg.normalization_type == "LN" else directions


def _ov(v: Float[Tensor, "*batch kv_head d_head"], W_O: Float[Tensor, "head d_head d_model"]) -> Tensor:
    """Return what each head writes if it attends to these values only, `[*batch head d_model]`."""
    v = per_query_head(v, W_O.shape[0], dim=-2)
    return einsum(v, W_O.to(v), "... head d_head, head d_head d_model -> ... head d_model")


@torch.no_grad()
def evidence_matrix(
    model: HookedModel,
    sources: Int[Tensor, "source"],
    targets: Int[Tensor, "target"],
    positions: Int[Tensor, "position"] | None = None,
    *,
    layer: int = 0,
) -> Float[Tensor, "head target source position"]:
    """Compute evidence G_h[t, s; j] for every source token s at every position j (default: position 0), as a layer
    reads it from the embedding.

    Under a relative scheme all positions are equal. In a layer after the first this is the direct path alone: the
    layer's own norm reads the embedding, without what earlier layers add to it.

    Raises:
        UserError: a token is outside the vocabulary, a position outside the context, or there is no such layer.

    Source: docs/theory.md, section 2.
    """
    model = hooked(model)
    check_layer("layer", layer, -model.cfg.n_layers, model.cfg.n_layers - 1)
    check_token_ids("sources", sources, model.cfg.d_vocab)
    positions = torch.zeros(1, dtype=torch.long, device=sources.device) if positions is None else positions
    outside = positions[(positions < 0) | (positions >= model.cfg.n_ctx)]
    if len(outside):
        raise UserError(f"positions: {int(outside[0])} is outside the context; give 0 to {model.cfg.n_ctx - 1}")
    block = model.blocks[layer]
    directions = readout_directions(model, targets).to(block.attn.W_V.device)
    per_position = []
    for position in positions:
        x, W_V = precise(read_embedding(model, sources, position, layer)), precise(block.attn.W_V)
        v = einsum(x, W_V, "source d_model, kv_head d_model d_head -> source kv_head d_head")
        v = v if block.attn.b_V is None else v + block.attn.b_V
        written = _ov(v, block.attn.W_O)
        per_position.append(einsum(directions, written, "target d_model, source head d_model -> head target source"))
    return torch.stack(per_position, dim=-1)


def read_embedding(
    model: HookedModel, tokens: Int[Tensor, "token"], position: Int[Tensor, ""], layer: int
) -> Float[Tensor, "token d_model"]:
    """Return what a layer's attention reads of tokens that are embedded at a position, with nothing added to them."""
    block, resid = model.blocks[layer], model.W_E[tokens]
    pos_embed = model.pos_embed.embed(position[None])
    return block.ln1((resid if pos_embed is None else resid + pos_embed).to(block.attn.W_V.device))


def relation_evidence(
    model: HookedModel, world: FactWorld, relation: int, source: Literal["left", "right"]
) -> list[dict[str, Any]]:
    """Return first-layer evidence (summed over heads) of every source of a relation's facts for every answer, both in
    the order of the facts, as rows with `target`, `source` and `evidence`.

    Args:
        relation: Its token.
        source: The side of a fact that its sources are on; the answers are on the other.

    Raises:
        UserError: `source` is neither side.
    """
    require_one_of("source", source, ("left", "right"))
    facts = world.facts[world.facts[:, 1] == relation]
    sources, targets = (facts[:, 0], facts[:, 2]) if source == "left" else (facts[:, 2], facts[:, 0])
    evidence = evidence_matrix(model, sources, targets).sum(0)[..., 0]
    names = world.token_names
    return [
        {"target": names[target], "source": names[origin], "evidence": evidence[i, j].item()}
        for i, target in enumerate(targets.tolist())
        for j, origin in enumerate(sources.tolist())
    ]


def position_index(evidence: Float[Tensor, "head target source position"]) -> float:
    """Compute how much evidence depends on position: variance over positions over variance over tokens, summed over
    heads.

    It is 0 when what is stored does not know where it is.

    Source: docs/theory.md, section 2.
    """
    summed = precise(evidence).sum(0)
    moved = summed - summed[..., :1]  # exactly 0, not nearly, when all positions agree
    over_positions = moved.var(-1, correction=0).mean()
    return float(over_positions / summed.mean(-1).var(correction=0))


def as_share(index: Index) -> Index:
    """Turn a position index into position's share of the whole variance, 0 to 1."""
    return index / (1 + index)


def position_share(evidence: Float[Tensor, "head target source position"]) -> Contrast[float]:
    """Return the share of position in the variance of evidence (summed over heads), and its null: the same entries at
    random places of the table, so that position does as much as token.

    Source: docs/theory.md, section 2.
    """
    summed = evidence.sum(0, keepdim=True)
    shuffled = summed.flatten()[torch.randperm(summed.numel(), generator=torch.Generator().manual_seed(0))]
    return Contrast(as_share(position_index(summed)), as_share(position_index(shuffled.view_as(summed))))


@torch.no_grad()
def compute_evidence(
    model: HookedModel, queries: Sequence[Query], targets: Int[Tensor, "target"]
) -> Float[Tensor, "query layer head target"]:
    """Compute the evidence that each query's source, where it is, gives for each target token along the direct path;
    summed over source tokens.

    Source: docs/theory.md, section 2.
    """
    model = hooked(model)
    directions, collected = readout_directions(model, targets), []

    def evidence(view: LayerView) -> Float[Tensor, "query head target"]:
        source = view.batch.source.to(view.v)
        v = einsum(view.v, source, "query pos kv_head d_head, query pos -> query kv_head d_head")
        written = _ov(v, model.blocks[view.layer].attn.W_O)
        there = directions.to(written.device)
        return einsum(written, there, "query head d_model, target d_model -> query head target")

    for batch in batches(queries, model.cfg):
        _, per_layer = capture(model, batch, evidence)
        collected.append(on_cpu(per_layer, dim=1))
    return torch.cat(collected)


def pair_position_index(
    model: HookedModel, query_pairs: Sequence[QueryPair], targets: Int[Tensor, "target"]
) -> Float[Tensor, "layer"]:
    """Compute the position index over the two places that a query pair compares, per layer: variance of the source's
    evidence (summed over heads) over where it is in the forward and in the reverse query, mean over pairs and targets,
    over the variance over pairs and targets of the mean of the two.

    It is 0 in the first layer of a relative scheme. In deeper layers it also holds what the changed context does to the
    source's residual, under any scheme but `none`, which cannot see a swap.

    Raises:
        UserError: there are no pairs, or their queries do not share answer and source (an ARM's).

    Source: docs/theory.md, section 7.
    """
    require_shared(query_pairs, "pair position index")
    model = hooked(model)
    forward, reverse = (
        compute_evidence(model, queries, targets).sum(2)  # [pair layer target]
        for queries in ([pair.forward for pair in query_pairs], [pair.reverse for pair in query_pairs])
    )
    return place_index(forward, reverse)


def place_index(
    one: Float[Tensor, "pair layer target"], other: Float[Tensor, "pair layer target"]
) -> Float[Tensor, "layer"]:
    """Divide the variance of evidence over two places, mean over pairs and targets, by its variance over pairs and
    targets.

    Source: docs/theory.md, section 7.
    """
    one, other = precise(one), precise(other)
    return ((one - other) / 2).pow(2).mean((0, 2)) / ((one + other) / 2).var((0, 2), correction=0)


@dataclass(frozen=True)
class LogitParts:
    """The parts of the logits at the readout positions, in logits; with frozen norm scales they add up exactly."""

    embedding: Float[Tensor, "query span target"]
    """Token and position embedding of the readout position itself."""
    heads: Float[Tensor, "query span layer head key_pos target"]
    """Route times evidence, per key position."""
    mlps: Float[Tensor, "query span layer target"]
    bias: Float[Tensor, "query span target"]
    """The final norm's bias read by the unembedding, and output biases (which only a bridge has)."""
    scale: Float[Tensor, "query span"]
    """The final norm's scale sigma, which the parts were divided by."""

    def total(self) -> Float[Tensor, "query span target"]:
        """Sum all parts: the logits."""
        return self.embedding + self.heads.sum((2, 3, 4)) + self.mlps.sum(2) + self.bias


@torch.no_grad()
def decompose_logits(model: HookedModel, batch: QueryBatch, targets: Int[Tensor, "target"]) -> LogitParts:
    """Split the readout logits of `targets` into embedding, routes times evidence, MLPs and bias.

    Source: docs/theory.md, section 1.
    """
    model = hooked(model)
    cfg, directions = model.cfg, readout_directions(model, targets).to(batch.tokens.device)

    def read(view: LayerView) -> Float[Tensor, "query span head key_pos target"]:
        written = _ov(view.v, model.blocks[view.layer].attn.W_O)
        there = directions.to(written.device)
        written = einsum(written, there, "query key_pos head d_model, target d_model -> query head key_pos target")
        return view.pattern.to(written)[..., None] * written[:, None]

    position = ["hook_pos_embed"] if model.pos_embed.answers("embed") else []
    mlps = [] if cfg.attn_only else [f"blocks.{layer}.hook_mlp_out" for layer in range(cfg.n_layers)]
    scales = [] if cfg.normalization_type is None else ["ln_final.hook_scale"]
    with _at_readout(model, batch, ["hook_embed", *position, *mlps, *scales]) as kept:
        _, heads = capture(model, batch, read)
    embedding = kept["hook_embed"] + kept[position[0]] if position else kept["hook_embed"]
    sigma = kept[scales[0]] if scales else torch.ones_like(embedding[..., :1])
    silent = embedding.new_zeros(*sigma.shape[:2], cfg.n_layers, len(targets))
    written = torch.stack([kept[name] @ directions.T for name in mlps], dim=2) if mlps else silent
    out_bias = precise(model.accumulated_bias(cfg.n_layers, include_mlp_biases=False)) @ directions.T
    return LogitParts(
        embedding=embedding @ directions.T / sigma,
        heads=torch.stack([of_layer.to(sigma.device) for of_layer in heads], dim=2) / sigma[:, :, None, None, None],
        mlps=written / sigma[:, :, None],
        bias=_logit_bias(model, targets).to(sigma.device) + out_bias / sigma,
        scale=sigma.squeeze(-1),
    )


@contextmanager
def _at_readout(model: HookedModel, batch: QueryBatch, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep these activations at the readouts of every forward pass on `batch` inside, in float32 at least and where the
    batch is."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> tuple[str, Callable]:
        return name, lambda x, hook: kept.update({name: precise(batch.at_readout(x)).to(batch.tokens.device)})

    with model.hooks(fwd_hooks=[keep(name) for name in names]):
        yield kept


def _logit_bias(model: HookedModel, targets: Int[Tensor, "target"]) -> Float[Tensor, "target"]:
    """Return what the final norm's and the unembedding's biases add to the logits of `targets`."""
    targets = targets.to(model.W_U.device)
    W_U = precise(model.W_U[:, targets])
    norm_bias, bias = getattr(model.ln_final, "b", None), getattr(model, "b_U", None)
    total = W_U.new_zeros(len(targets)) if norm_bias is None else norm_bias.to(W_U) @ W_U
    return total if bias is None else total + bias[targets]


@torch.no_grad()
def storage_coupling(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Float[Tensor, "pair layer head"]:
    """Compute the inner product of the forward and the reverse loss's gradients with respect to the evidence in the
    source's column, routes frozen: what the value side alone passes from one to the other.

    For queries with one answer A and one source it is

        alpha_f alpha_r / (sigma_f sigma_r) [(1 - p_f(A)) (1 - p_r(A)) + sum over t != A of p_f(t) p_r(t)],

    never negative. An ARM's forward query does not read the column of its reverse query's source: 0. Deeper layers are
    coupled through their direct path to the logits.

    Raises:
        UserError: there are no pairs.

    Source: docs/theory.md, section 6.
    """
    require_some("query_pairs", query_pairs)
    model, coupled = hooked(model), []
    size = 256
    for start in range(0, len(query_pairs), size):
        chunk = query_pairs[start : start + size]
        wanted = [tuple(dict.fromkeys(pair.reverse.source)) for pair in chunk]  # each token once
        forward_route, forward_error = _evidence_gradient(model, [pair.forward for pair in chunk], wanted)
        reverse_route, reverse_error = _evidence_gradient(model, [pair.reverse for pair in chunk], wanted)
        # Errors are multiplied before routes are: heads times vocabulary would not fit into memory.
        errors = einsum(forward_error, reverse_error, "pair span t, pair other t -> pair span other")
        routes = "pair span column layer head, pair other column layer head, pair span other -> pair layer head"
        coupled.append(einsum(forward_route, reverse_route, errors, routes).cpu())
    return torch.cat(coupled)


def _evidence_gradient(
    model: HookedModel, queries: Sequence[Query], columns: Sequence[tuple[int, ...]]
) -> tuple[Float[Tensor, "query span column layer head"], Float[Tensor, "query span d_vocab"]]:
    """Compute the two factors of dL/dG_h[:, s] for the tokens s in `columns`, wherever they are in the query: how much
    attention they get at each readout, and the loss's gradient with respect to the logits there, over the norm's scale.
    Summed over readouts, their product is that gradient."""
    (batch,) = batches(queries, model.cfg, size=len(queries))
    width = max(map(len, columns))
    padded = torch.tensor([[*column, *[-1] * (width - len(column))] for column in columns], device=batch.tokens.device)
    stands = batch.tokens[:, None, :] == padded[:, :, None]

    def route(view: LayerView) -> Float[Tensor, "query span column head"]:
        at = stands.to(view.pattern)
        return einsum(view.pattern, at, "query span head key_pos, query column key_pos -> query span column head")

    scales = [] if model.cfg.normalization_type is None else ["ln_final.hook_scale"]
    with _at_readout(model, batch, scales) as kept:
        logits, routes = capture(model, batch, route)
    error = precise(logits).softmax(-1)
    error = (error - torch.nn.functional.one_hot(batch.answer, error.shape[-1])) * batch.answered[..., None]
    error = error / kept[scales[0]] if scales else error
    return torch.stack([of_layer.to(error) for of_layer in routes], dim=3), error


def evidence_scores(
    model: HookedModel, queries: Sequence[Query], candidates: Int[Tensor, "query candidate"]
) -> Contrast[Float[Tensor, "layer"]]:
    """Return how many standard deviations the true answer's evidence (summed over heads, unrouted) lies above the mean
    of the candidates, mean over queries; null: the same of the next candidate, another fact's answer.

    Args:
        queries: Of one answer token each.
        candidates: The tokens that could be the answer, the true one among them (`FactWorld.candidates`).

    Source: docs/theory.md, section 2.
    """
    targets, column = candidates.unique(return_inverse=True)
    evidence = compute_evidence(model, queries, targets).sum(2)  # [query layer target]
    among = evidence.gather(2, column[:, None].expand(-1, evidence.shape[1], -1))
    z = (among - among.mean(-1, keepdim=True)) / among.std(-1, correction=0, keepdim=True)
    is_true = candidates == torch.tensor([query.answer for query in queries])
    true, each = is_true.int().argmax(1), torch.arange(len(queries))
    return Contrast(true, next_answers(true, ~is_true)).map(lambda answer: z[each, :, answer].mean(0))


def margin_and_rank(
    model: HookedModel, queries: Sequence[Query], candidates: Int[Tensor, "query candidate"]
) -> tuple[Float[Tensor, "query"], Int[Tensor, "query"]]:
    """Return how far the true answer's evidence (summed over layers and heads, unrouted) is above that of the strongest
    other candidate, and its rank among all candidates (1 is best).

    Args:
        queries: Of one answer token each.
        candidates: As of :func:`evidence_scores`.
    """
    targets, column = candidates.unique(return_inverse=True)
    among = compute_evidence(model, queries, targets).sum((1, 2)).gather(1, column)
    is_true = candidates == torch.tensor([query.answer for query in queries])
    true, others = among[is_true], among.masked_fill(is_true, float("-inf"))
    return true - others.amax(1), 1 + (others >= true[:, None]).sum(1)
