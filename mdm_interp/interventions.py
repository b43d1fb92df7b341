"""Interventions: what has to be changed inside a model for its answer to a reverse query to change.

Each exists twice: as a context manager, inside which `model(tokens)` on the pairs' reverse queries is edited through
hooks, and as one call `(model, query_pairs) -> Effect` that asks the reverse queries without the edit, with it, and
with the same edit at random other positions, its control. Formulas: docs/theory.md, sections 9 and 12.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.bridge import hooked
from mdm_interp.config import ModelConfig
from mdm_interp.files import UserError
from mdm_interp.prediction import query_loss
from mdm_interp.queries import Query, QueryBatch, QueryPair, collate, mirrored_positions, require_shared

CHUNK = 256
"""Pairs that are edited in one forward pass."""


@dataclass(frozen=True)
class Effect:
    """Log-probabilities of the answers, in nats."""

    forward: Float[Tensor, "pair"]
    """Of the forward queries."""
    before: Float[Tensor, "pair"]
    """Of the reverse queries, nothing edited."""
    after: Float[Tensor, "pair"]
    """Of the reverse queries, edited."""
    control: Float[Tensor, "pair"]
    """Of the reverse queries, edited alike at as many random other positions (or heads, where heads are chosen; NaN
    where the model has too few others)."""


At = Bool[Tensor, "pair pos"] | None
"""Which positions to edit instead of the source (or the readout row): a control. None edits the real thing."""
EditingAt = Callable[[Any, Sequence[QueryPair], At], AbstractContextManager[None]]
Editing = Callable[[Any, Sequence[QueryPair]], AbstractContextManager[None]]
Head = tuple[int, int]
"""Layer and head."""


# ---- the edits, as context managers. `layers` defaults to all.


@contextmanager
def transplanted_routes(
    model: Any, query_pairs: Sequence[QueryPair], at: At = None, layers: Sequence[int] | None = None
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
    model: Any, query_pairs: Sequence[QueryPair], at: At = None, layers: Sequence[int] | None = None
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
    model: Any,
    query_pairs: Sequence[QueryPair],
    at: At = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[Head] | None = None,
) -> Iterator[None]:
    """Drop the odd part of the readout's scores: each becomes the mean of the score to +delta and to -delta, for the
    content that stands there. With `at`, the scores that those positions read with are projected instead; with `heads`,
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
    _, reverse = _collated(model, query_pairs)
    rows = _readout_rows(reverse) if at is None else at.to(reverse.tokens.device)
    chosen = _chosen(model.cfg, heads).to(reverse.tokens.device)
    content: dict[str, Tensor] = {}

    def keep(kind: str, x: Tensor, hook: HookPoint) -> None:
        content[kind] = x

    def project(scores: Tensor, hook: HookPoint) -> Tensor:
        mirrored = -torch.arange(scores.shape[-1], device=scores.device)
        q, k = (position.rotate(content[kind], mirrored) for kind in ("q", "k"))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        turned = einsum(q, k, "pair query_pos head d, pair key_pos head d -> pair head query_pos key_pos")
        turned = turned * model.cfg.head_dim**-0.5
        bias = position.bias(mirrored, mirrored)
        turned = turned if bias is None else turned + bias.to(turned.dtype)
        masked = scores <= torch.finfo(scores.dtype).min / 2
        edited = rows[:, None, :, None] & chosen[hook.layer()][:, None, None]
        return torch.where(edited & ~masked, (scores + turned) / 2, scores)

    hooks: list[tuple[str, Callable]] = [
        (name, partial(keep, kind)) for kind in ("q", "k") for name in _names(model, f"attn.hook_{kind}", layers)
    ]
    hooks += [(name, project) for name in _names(model, "attn.hook_attn_scores", layers)]
    with model.hooks(fwd_hooks=hooks):
        yield


@contextmanager
def ablated_storage(
    model: Any, query_pairs: Sequence[QueryPair], at: At = None, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Set the values of each reverse query's source to zero, whoever reads them. With `at`, of those positions.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    _, reverse = _collated(model, query_pairs)
    places = reverse.source if at is None else at.to(reverse.source.device)

    def silence(v: Tensor, hook: HookPoint) -> Tensor:
        return v.masked_fill(places[:, :, None, None], 0)

    with model.hooks(fwd_hooks=[(name, silence) for name in _names(model, "attn.hook_v", layers)]):
        yield


@contextmanager
def ablated_routes(
    model: Any, query_pairs: Sequence[QueryPair], at: At = None, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Cut the edge from each reverse query's readout to its source; the rest of the attention grows to fill its share.
    With `at`, the edges to those positions.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    _, reverse = _collated(model, query_pairs)
    places = reverse.source if at is None else at.to(reverse.source.device)
    edges = _readout_rows(reverse)[:, None, :, None] & places[:, None, None, :]

    def cut(scores: Tensor, hook: HookPoint) -> Tensor:
        return scores.masked_fill(edges, torch.finfo(scores.dtype).min)

    with model.hooks(fwd_hooks=[(name, cut) for name in _names(model, "attn.hook_attn_scores", layers)]):
        yield


# ---- the same in one call


def transplant_routes(model: Any, query_pairs: Sequence[QueryPair], seed: int = 0) -> Effect:
    """Effect of :func:`transplanted_routes`. In a one-layer model with a relative scheme that reads at the mask,
    `after` equals `forward`, with or without MLP: what is stored does not know where it stands, and what the reverse
    query lacks is the route."""
    return _effect(model, query_pairs, transplanted_routes, _elsewhere(transplanted_routes, seed))


def share_routes(model: Any, query_pairs: Sequence[QueryPair], seed: int = 0) -> Effect:
    """Effect of :func:`shared_routes`. Where all heads attend alike it is that of :func:`transplant_routes`."""
    return _effect(model, query_pairs, shared_routes, _elsewhere(shared_routes, seed))


def project_even_routes(
    model: Any, query_pairs: Sequence[QueryPair], seed: int = 0, heads: Sequence[Head] | None = None
) -> Effect:
    """Effect of :func:`even_routes`: nothing under ALiBi and no encoding, whose scores have no odd part. The control of
    chosen `heads` is as many others, drawn at random from all layers."""
    if heads is None:
        return _effect(model, query_pairs, even_routes, _elsewhere(even_routes, seed, like="answer"))
    chosen = _chosen(hooked(model).cfg, heads)
    others, needed = [(layer, head) for layer, head in (~chosen).nonzero().tolist()], int(chosen.sum())
    drawn = random.Random(seed).sample(others, needed) if len(others) >= needed else None
    control = None if drawn is None else partial(even_routes, heads=drawn)
    return _effect(model, query_pairs, partial(even_routes, heads=heads), control)


def ablate_storage(model: Any, query_pairs: Sequence[QueryPair], seed: int = 0) -> Effect:
    """Effect of :func:`ablated_storage`."""
    return _effect(model, query_pairs, ablated_storage, _elsewhere(ablated_storage, seed))


def ablate_routes(model: Any, query_pairs: Sequence[QueryPair], seed: int = 0) -> Effect:
    """Effect of :func:`ablated_routes`."""
    return _effect(model, query_pairs, ablated_routes, _elsewhere(ablated_routes, seed))


@torch.no_grad()
def _effect(model: Any, query_pairs: Sequence[QueryPair], editing: Editing, control: Editing | None) -> Effect:
    """Ask forward, reverse, and reverse under the edit and under its control, if there is one."""
    require_shared(query_pairs, "an intervention between forward and reverse query")
    model, chunks = hooked(model), []
    for start in range(0, len(query_pairs), CHUNK):
        pairs = query_pairs[start : start + CHUNK]
        forward, reverse = _collated(model, pairs)
        asked = [_log_probability(model, forward), _log_probability(model, reverse)]
        for edit in filter(None, (editing, control)):
            with edit(model, pairs):
                asked.append(_log_probability(model, reverse))
        chunks.append(torch.stack(asked if control else [*asked, torch.full_like(asked[0], torch.nan)]))
    return Effect(*torch.cat(chunks, dim=1).unbind(0))


def _elsewhere(editing: EditingAt, seed: int, like: Literal["source", "answer"] = "source") -> Editing:
    """Make the same edit at random other positions, as many as the reverse query's `like` has tokens."""
    chooser = random.Random(seed)

    def edit(model: Any, query_pairs: Sequence[QueryPair]) -> AbstractContextManager[None]:
        others = torch.zeros(len(query_pairs), max(len(pair.reverse.tokens) for pair in query_pairs), dtype=torch.bool)
        for row, pair in enumerate(query_pairs):
            others[row, chooser.sample(*other_positions(pair.reverse, model.cfg, like))] = True
        return editing(model, query_pairs, others)

    return edit


def other_positions(
    query: Query, cfg: ModelConfig, like: Literal["source", "answer"] = "source"
) -> tuple[list[int], int]:
    """Positions of a query that are neither answer, source nor readout, and how many of them a control takes.

    Raises:
        UserError: there are fewer than that.
    """
    taken = {*range(*query.answer_span), *range(*query.source_span), *query.readout(cfg)}
    free, needed = (
        [position for position in range(len(query.tokens)) if position not in taken],
        len(getattr(query, like)),
    )
    if len(free) < needed:
        raise UserError(
            f"query_pairs: the control needs {needed} positions besides answer, source and readout, a query has "
            f"{len(free)}; ask in a longer context"
        )
    return free, needed


# ---- activation patching


@dataclass(frozen=True)
class Patching:
    """Change of the reverse answer's log-probability, in nats; positive means that the patch helps."""

    change: Float[Tensor, "pair layer place"]
    """Patched from the pair's own forward run; NaN at padding."""
    control: Float[Tensor, "pair layer place"]
    """Patched from the forward run of a random pair of another fact, asked for the same side; NaN where none fits."""


def patch_heads(model: Any, query_pairs: Sequence[QueryPair], seed: int = 0) -> Patching:
    """Put each head's output at the forward readout into the reverse run's readout, one layer and head (`place`) at a
    time.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    forward, reverse = _collated(model, query_pairs)
    pair, span = reverse.answered.nonzero(as_tuple=True)

    def edit(z: Tensor, given: Tensor, giver: Tensor, head: int) -> Tensor:
        edited = z.clone()
        edited[pair, reverse.readout[pair, span], head] = given[giver[pair], forward.readout[giver[pair], span], head]
        return edited

    def alike(pair: QueryPair) -> Hashable:
        return pair.side, len(pair.forward.answer)

    return _patch(model, query_pairs, "attn.hook_z", model.cfg.n_heads, edit, alike, seed)


def patch_positions(model: Any, query_pairs: Sequence[QueryPair], seed: int = 0) -> Patching:
    """Put the forward run's residual stream before each layer into the reverse run, one layer and position (`place`) at
    a time; each position takes what stands at its mirror image about the fact. The control's fact stands in the same
    positions.

    Before the first layer of a relative scheme both hold the same: the change is 0 there.

    Raises:
        UserError: a pair's queries are not mirror images.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    _, reverse = _collated(model, query_pairs)
    n_pos = reverse.tokens.shape[1]
    columns = torch.stack([mirrored_positions(pair, n_pos) for pair in query_pairs]).to(reverse.tokens.device)

    def edit(resid: Tensor, given: Tensor, giver: Tensor, place: int) -> Tensor:
        edited = resid.clone()
        edited[:, place] = given[giver, columns[:, place]]
        return edited

    def alike(pair: QueryPair) -> Hashable:
        return pair.side, pair.forward.answer_span, pair.forward.source_span, len(pair.forward.tokens)

    patched = _patch(model, query_pairs, "hook_resid_pre", n_pos, edit, alike, seed)
    if reverse.attention_mask is None:
        return patched
    padding = ~reverse.attention_mask[:, None].cpu()
    return Patching(*(x.masked_fill(padding, torch.nan) for x in (patched.change, patched.control)))


@torch.no_grad()
def _patch(
    model: Any,
    query_pairs: Sequence[QueryPair],
    hook: str,
    n_places: int,
    edit: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    alike: Callable[[QueryPair], Hashable],
    seed: int,
) -> Patching:
    """Ask every reverse query under `edit(activation, forward activation, whose forward run, place)`, for every layer
    and place: from the own forward run, and from another fact's pair that is `alike`."""
    require_shared(query_pairs, "activation patching")
    forward, reverse = _collated(model, query_pairs)
    names, chooser = _names(model, hook, None), random.Random(seed)
    _, cache = model.run_with_cache(forward.tokens, attention_mask=forward.attention_mask, names_filter=names)
    before, own = _log_probability(model, reverse), list(range(len(query_pairs)))
    fitting = [
        [i for i, other in enumerate(query_pairs) if other.fact != pair.fact and alike(other) == alike(pair)]
        for pair in query_pairs
    ]
    others = [chooser.choice(fits) if fits else i for i, fits in enumerate(fitting)]
    changes = []
    for giver in (torch.tensor(own), torch.tensor(others)):
        grid = []
        for name in names:
            for place in range(n_places):
                given = partial(_patched, edit=edit, given=cache[name], giver=giver, place=place)
                with model.hooks(fwd_hooks=[(name, given)]):
                    grid.append(_log_probability(model, reverse) - before)
        changes.append(torch.stack(grid, dim=1).unflatten(1, (len(names), n_places)))
    alone = torch.tensor([not fits for fits in fitting])
    return Patching(changes[0], changes[1].masked_fill(alone[:, None, None], torch.nan))


def _patched(x: Tensor, hook: HookPoint, edit: Callable, given: Tensor, giver: Tensor, place: int) -> Tensor:
    return edit(x, given, giver.to(x.device), place)


# ---- what they share


def _collated(model: Any, query_pairs: Sequence[QueryPair]) -> tuple[QueryBatch, QueryBatch]:
    return collate([pair.forward for pair in query_pairs], model.cfg), collate(
        [pair.reverse for pair in query_pairs], model.cfg
    )


def _log_probability(model: Any, batch: QueryBatch) -> Float[Tensor, "pair"]:
    return -query_loss(model(batch.tokens, attention_mask=batch.attention_mask), batch).cpu()


def _names(model: Any, hook: str, layers: Sequence[int] | None) -> list[str]:
    names = [f"blocks.{layer}.{hook}" for layer in (range(model.cfg.n_layers) if layers is None else layers)]
    for name in names:
        if name not in model.hook_dict:
            raise UserError(f"model: it has no hook {name!r}, which this intervention edits; use a model that has it")
    return names


def _mirrored_rows(
    model: Any, query_pairs: Sequence[QueryPair], at: At, layers: Sequence[int] | None
) -> dict[str, Float[Tensor, "pair span head key_pos"]]:
    """Read what each forward query's readout attends to, mirrored about the fact, by the name of the pattern's hook.
    With `at`, what the source gets and what those positions get are exchanged."""
    forward, _ = _collated(model, query_pairs)
    columns = torch.stack([mirrored_positions(pair, forward.tokens.shape[1]) for pair in query_pairs])
    if at is not None:
        for row, pair in enumerate(query_pairs):
            source, other = torch.arange(*pair.reverse.source_span), at[row].nonzero()[:, 0]
            columns[row, torch.cat([source, other])] = columns[row, torch.cat([other, source])]
    columns = columns.to(forward.tokens.device)
    rows: dict[str, Tensor] = {}

    def keep(name: str, pattern: Tensor, hook: HookPoint) -> None:
        read = forward.at_readout(pattern.transpose(1, 2))  # [pair span head key_pos]
        rows[name] = read.gather(-1, columns[:, None, None].expand_as(read)).clone()

    keeping = [(name, partial(keep, name)) for name in _names(model, "attn.hook_pattern", layers)]
    with torch.no_grad():
        model.run_with_hooks(forward.tokens, attention_mask=forward.attention_mask, fwd_hooks=keeping)
    return rows


@contextmanager
def _attending(
    model: Any, query_pairs: Sequence[QueryPair], rows: dict[str, Float[Tensor, "pair span head key_pos"]]
) -> Iterator[None]:
    """Give each reverse query's readout these rows of attention, by the name of the pattern's hook."""
    _, reverse = _collated(model, query_pairs)

    def replace(name: str, pattern: Tensor, hook: HookPoint) -> Tensor:
        return _at_rows(pattern, reverse, rows[name])

    with model.hooks(fwd_hooks=[(name, partial(replace, name)) for name in rows]):
        yield


def _chosen(cfg: ModelConfig, heads: Sequence[Head] | None) -> Bool[Tensor, "layer head"]:
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


def _at_rows(
    pattern: Float[Tensor, "pair head query_pos key_pos"],
    batch: QueryBatch,
    rows: Float[Tensor, "pair span head key_pos"],
) -> Float[Tensor, "pair head query_pos key_pos"]:
    """The pattern with its readout rows replaced."""
    edited = pattern.clone()
    pair, span = batch.answered.nonzero(as_tuple=True)
    edited[pair, :, batch.readout[pair, span]] = rows[pair, span].to(pattern.dtype)
    return edited
