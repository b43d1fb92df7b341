"""Edits of a model's forward pass on the reverse queries of pairs, as context managers that put hooks on it.

The calls that measure what an edit does, beside the same edit at random other positions, are in
:mod:`~mdm_interp.interventions.effects`. Formulas: docs/theory.md, sections 9 and 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import QueryBatch, QueryPair, collate, mirrored_positions
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.models.bridge import hooked
from mdm_interp.models.inputs import require_numbers
from mdm_interp.models.layers import attention_scores, content_hooks, per_query_head
from mdm_interp.models.protocol import HookedModel

At = Bool[Tensor, "pair pos"] | None
"""Which positions to edit instead of the source (or the readout row): a control. None edits the real thing."""
Editing = Callable[[Any, Sequence[QueryPair]], AbstractContextManager[None]]
Head = tuple[int, int]
"""Layer and head."""


# ---- the edits, as context managers. `layers` defaults to all.


@contextmanager
def transplanted_routes(
    model: HookedModel, query_pairs: Sequence[QueryPair], at: At = None, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Give each reverse query's readout the attention of its forward query, mirrored about the fact: the two entity
    positions swap. With `at`, what the source gets and what those positions get are exchanged.

    Raises:
        UserError: a pair's queries are not mirror images, or the model lacks `hook_pattern`.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    with _attending(model, query_pairs, _mirrored_rows(model, query_pairs, at, layers)):
        yield


@contextmanager
def shared_routes(
    model: HookedModel, query_pairs: Sequence[QueryPair], at: At = None, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Give each head of each reverse query's readout the mean attention of its layer's *other* heads in the forward
    query, mirrored about the fact. Where the answer comes back, what a head stores serves whichever head reads. With
    `at`, what the source gets and what those positions get are exchanged.

    Raises:
        UserError: a layer has one head only, a pair's queries are not mirror images, or the model lacks `hook_pattern`.

    Source: docs/theory.md, section 12.
    """
    model = hooked(model)
    n_heads = model.cfg.n_heads
    if n_heads == 1:
        raise UserError("model: its layers have one head each, and shared routes are other heads'; use more heads")
    rows = _mirrored_rows(model, query_pairs, at, layers)
    others = {name: (own.sum(2, keepdim=True) - own) / (n_heads - 1) for name, own in rows.items()}
    with _attending(model, query_pairs, others):
        yield


@contextmanager
def even_routes(
    model: HookedModel,
    query_pairs: Sequence[QueryPair],
    at: At = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[Head] | None = None,
) -> Iterator[None]:
    """Drop the odd part of the readout's scores: each becomes the mean of the score to +delta and to -delta, for the
    content that is there. With `at`, the scores that those positions read with are projected instead; with `heads`,
    those of these heads only.

    Raises:
        UserError: the scheme is absolute (its scores have no mirror image for fixed content), the model has no such
            head, or a hook is missing.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    position = model.pos_embed
    if not position.relative:
        raise UserError(
            f"model: position scheme {model.cfg.position!r} is absolute, so content cannot be held fixed while sides "
            "swap; use a relative scheme"
        )
    _, reverse = collate_pairs(model, query_pairs)
    rows = _readout_rows(reverse) if at is None else at.to(reverse.tokens.device)
    chosen = chosen_heads(model.cfg, heads).to(reverse.tokens.device)
    content: dict[str, Tensor] = {}

    def keep(kind: str, x: Tensor, hook: HookPoint) -> None:
        content[kind] = x

    def project(scores: Tensor, hook: HookPoint) -> Tensor:
        mirrored = -torch.arange(scores.shape[-1], device=scores.device)
        rotated = (position.rotate(content[kind], mirrored, kind) for kind in ("q", "k"))
        q, k = (per_query_head(x, model.cfg.n_heads, dim=2).transpose(1, 2) for x in rotated)
        turned = attention_scores(q, k, position.bias(mirrored, mirrored), model.cfg.score_scale)
        masked = scores <= torch.finfo(scores.dtype).min / 2
        edited = (rows[:, None, :, None] & chosen[hook.layer()][:, None, None]).to(scores.device)
        return torch.where(edited & ~masked, (scores + turned) / 2, scores)

    hooks: list[tuple[str, Callable]] = [
        (name, partial(keep, kind))
        for kind, hook in zip(("q", "k"), content_hooks(model.cfg), strict=True)
        for name in hook_names(model, f"attn.hook_{hook}", layers)
    ]
    hooks += [(name, project) for name in hook_names(model, "attn.hook_attn_scores", layers)]
    with model.hooks(fwd_hooks=hooks):
        yield


@contextmanager
def ablated_storage(
    model: HookedModel, query_pairs: Sequence[QueryPair], at: At = None, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Set the values of each reverse query's source to zero, whoever reads them; with `at`, the values of those
    positions.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    _, reverse = collate_pairs(model, query_pairs)
    places = reverse.source if at is None else at.to(reverse.source.device)

    def silence(v: Tensor, hook: HookPoint) -> Tensor:
        return v.masked_fill(places[:, :, None, None].to(v.device), 0)

    with model.hooks(fwd_hooks=[(name, silence) for name in hook_names(model, "attn.hook_v", layers)]):
        yield


@contextmanager
def ablated_routes(
    model: HookedModel, query_pairs: Sequence[QueryPair], at: At = None, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Cut the edge from each reverse query's readout to its source; the rest of the attention grows to fill its share.
    With `at`, the edges to those positions are cut instead.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    _, reverse = collate_pairs(model, query_pairs)
    places = reverse.source if at is None else at.to(reverse.source.device)
    edges = _readout_rows(reverse)[:, None, :, None] & places[:, None, None, :]

    def cut(scores: Tensor, hook: HookPoint) -> Tensor:
        return scores.masked_fill(edges.to(scores.device), torch.finfo(scores.dtype).min)

    with model.hooks(fwd_hooks=[(name, cut) for name in hook_names(model, "attn.hook_attn_scores", layers)]):
        yield


def log_probability(model: HookedModel, batch: QueryBatch) -> Float[Tensor, "pair"]:
    """Compute the log-probability of each answer, in nats, summed over its tokens."""
    rows = model(batch.tokens, attention_mask=batch.attention_mask, readout=batch.readout)
    return -require_numbers(answer_loss(rows, batch), model.cfg.dtype)


def hook_names(model: HookedModel, hook: str, layers: Sequence[int] | None) -> list[str]:
    """Return the full names of a hook in some layers (None: all).

    Raises:
        UserError: the model lacks one.
    """
    names = [f"blocks.{layer}.{hook}" for layer in (range(model.cfg.n_layers) if layers is None else layers)]
    for name in names:
        if name not in model.hook_dict:
            raise UserError(f"model: it has no hook {name!r}, which this intervention edits; use a model that has it")
    return names


def _mirrored_rows(
    model: HookedModel, query_pairs: Sequence[QueryPair], at: At, layers: Sequence[int] | None
) -> dict[str, Float[Tensor, "pair span head key_pos"]]:
    """Read what each forward query's readout attends to, mirrored about the fact, by the name of the pattern's hook.
    With `at`, what the source gets and what those positions get are exchanged."""
    forward, _ = collate_pairs(model, query_pairs)
    columns = torch.stack([mirrored_positions(pair, forward.tokens.shape[1]) for pair in query_pairs])
    if at is not None:
        for row, pair in enumerate(query_pairs):
            source, other = torch.arange(*pair.reverse.source_span), at[row].nonzero()[:, 0]
            columns[row, torch.cat([source, other])] = columns[row, torch.cat([other, source])]
    columns = columns.to(forward.tokens.device)
    rows: dict[str, Tensor] = {}

    def keep(name: str, pattern: Tensor, hook: HookPoint) -> None:
        read = forward.at_readout(pattern.transpose(1, 2))  # [pair span head key_pos]
        rows[name] = read.gather(-1, columns[:, None, None].expand_as(read).to(read.device)).clone()

    keeping = [(name, partial(keep, name)) for name in hook_names(model, "attn.hook_pattern", layers)]
    with torch.no_grad():
        model.run_with_hooks(forward.tokens, attention_mask=forward.attention_mask, fwd_hooks=keeping)
    return rows


@contextmanager
def _attending(
    model: HookedModel, query_pairs: Sequence[QueryPair], rows: dict[str, Float[Tensor, "pair span head key_pos"]]
) -> Iterator[None]:
    """Give each reverse query's readout these rows of attention, by the name of the pattern's hook."""
    _, reverse = collate_pairs(model, query_pairs)
    pair, span = reverse.answered.nonzero(as_tuple=True)
    at = pair, span, reverse.readout[pair, span]

    def replace(name: str, pattern: Tensor, hook: HookPoint) -> Tensor:
        pair, span, readout = (index.to(pattern.device) for index in at)
        edited = pattern.clone()
        edited[pair, :, readout] = rows[name][pair, span].to(pattern.dtype)
        return edited

    with model.hooks(fwd_hooks=[(name, partial(replace, name)) for name in rows]):
        yield


def chosen_heads(cfg: ModelConfig, heads: Sequence[Head] | None) -> Bool[Tensor, "layer head"]:
    """Mark the heads that are among `heads`; all of them if there is no choice."""
    chosen = torch.full((cfg.n_layers, cfg.n_heads), heads is None)
    for layer, head in heads or ():
        if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
            raise UserError(
                f"heads: ({layer}, {head}) is no head of the model; give a layer below {cfg.n_layers} and a head below "
                f"{cfg.n_heads}"
            )
        chosen[layer, head] = True
    return chosen


def _readout_rows(batch: QueryBatch) -> Bool[Tensor, "pair query_pos"]:
    rows = torch.zeros_like(batch.tokens, dtype=torch.long)
    return rows.scatter_add(1, batch.readout, batch.answered.long()) > 0


CHUNK = 256
"""Pairs that are edited in one forward pass."""


def collate_pairs(model: HookedModel, query_pairs: Sequence[QueryPair]) -> tuple[QueryBatch, QueryBatch]:
    """Return the forward and the reverse queries of the pairs as two batches."""
    return collate([pair.forward for pair in query_pairs], model.cfg), collate(
        [pair.reverse for pair in query_pairs], model.cfg
    )
