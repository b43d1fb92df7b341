"""Activation patching from the forward query into the reverse query."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.data.queries import QueryPair, mirrored_positions, require_shared
from mdm_interp.errors import require_some
from mdm_interp.interventions.edits import collate_pairs, hook_names, log_probability
from mdm_interp.interventions.effects import Effect
from mdm_interp.measures.nulls import draw_other_facts
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast

Changes = Contrast[Float[Tensor, "pair layer place"]]
"""Of the reverse answer's log-probability, in nats: positive means that the patch helps. Patched from the pair's own
forward run; null, the control: from that of a random pair of another fact, asked for the same side, NaN where none
fits."""


def effect_of_patches(changes: Changes, unpatched: Effect, layer: int, places: Bool[Tensor, "pair place"]) -> Effect:
    """Return what the patches of some places of a layer do, one entry per pair and place.

    Args:
        unpatched: Any effect on the same pairs, for its `forward` and `before`.
        places: Which are taken of each pair.
    """
    forward, before = (log[:, None].expand(places.shape)[places] for log in (unpatched.forward, unpatched.before))
    return Effect(forward, before, changes.map(lambda change: before + change[:, layer][places]))


def patch_heads(model: HookedModel, query_pairs: Sequence[QueryPair], seed: int = 0) -> Changes:
    """Put each head's output at the forward readout into the reverse run's readout, one layer and head (`place`) at a
    time, and return the changes that this makes.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    forward, reverse = collate_pairs(model, query_pairs)
    pairs, spans = reverse.answered.nonzero(as_tuple=True)
    at = pairs, spans, reverse.readout[pairs, spans], forward.readout

    def edit(z: Tensor, given: Tensor, giver: Tensor, head: int) -> Tensor:
        pair, span, readout, forward_readout = (index.to(z.device) for index in at)
        edited, giver = z.clone(), giver[pair]
        edited[pair, readout, head] = given[giver, forward_readout[giver, span], head]
        return edited

    def alike(pair: QueryPair) -> Hashable:
        return pair.side, len(pair.forward.answer)

    return _patch(model, query_pairs, "attn.hook_z", model.cfg.n_heads, edit, alike, seed)


def patch_positions(model: HookedModel, query_pairs: Sequence[QueryPair], seed: int = 0) -> Changes:
    """Put the forward run's residual stream before each layer into the reverse run, one layer and position (`place`) at
    a time, and return the changes that this makes, NaN at padding. Each position takes what is at its mirror image
    about the fact. The control's fact is in the same positions.

    Before the first layer of a relative scheme both hold the same: the change is 0 there.

    Raises:
        UserError: a pair's queries are not mirror images.

    Source: docs/theory.md, section 9.
    """
    model = hooked(model)
    _, reverse = collate_pairs(model, query_pairs)
    n_pos = reverse.tokens.shape[1]
    columns = torch.stack([mirrored_positions(pair, n_pos) for pair in query_pairs]).to(reverse.tokens.device)

    def edit(resid: Tensor, given: Tensor, giver: Tensor, place: int) -> Tensor:
        edited = resid.clone()
        edited[:, place] = given[giver, columns[:, place].to(resid.device)]
        return edited

    def alike(pair: QueryPair) -> Hashable:
        return pair.side, pair.forward.answer_span, pair.forward.source_span, len(pair.forward.tokens)

    patched = _patch(model, query_pairs, "hook_resid_pre", n_pos, edit, alike, seed)
    if reverse.attention_mask is None:
        return patched
    padding = ~reverse.attention_mask[:, None].cpu()
    return patched.map(lambda change: change.masked_fill(padding, torch.nan))


def position_roles(query_pairs: Sequence[QueryPair]) -> dict[str, Bool[Tensor, "pair pos"]]:
    """Return which positions of each reverse query of a :class:`~mdm_interp.data.worlds.FactWorld` hold what: `readout`
    the mask, `source` the source, `relation` the relation, which follows the left entity, and `filler` all else.

    Raises:
        UserError: there are no pairs.
    """
    require_some("query_pairs", query_pairs)
    queries = [pair.reverse for pair in query_pairs]
    positions = torch.arange(len(queries[0].tokens))
    answer, source = torch.tensor([[query.answer_span[0], query.source_span[0]] for query in queries]).T[..., None]
    held = {
        "readout": positions == answer,
        "source": positions == source,
        "relation": positions == torch.minimum(answer, source) + 1,
    }
    return {**held, "filler": ~torch.stack(list(held.values())).any(0)}


@torch.no_grad()
def _patch(
    model: HookedModel,
    query_pairs: Sequence[QueryPair],
    hook: str,
    n_places: int,
    edit: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    alike: Callable[[QueryPair], Hashable],
    seed: int,
) -> Changes:
    """Ask every reverse query under `edit(activation, forward activation, whose forward run, place)`, for every layer
    and place: from the own forward run, and from another fact's pair that is `alike`."""
    require_shared(query_pairs, "activation patching")
    forward, reverse = collate_pairs(model, query_pairs)
    names, others = hook_names(model, hook, None), draw_other_facts(query_pairs, alike, seed)
    _, cache = model.run_with_cache(forward.tokens, attention_mask=forward.attention_mask, names_filter=names)
    before, own = log_probability(model, reverse), list(range(len(query_pairs)))
    alone, changes = torch.tensor([other is None for other in others]), []
    givers = (own, [i if other is None else other for i, other in zip(own, others, strict=True)])
    for giver in map(torch.tensor, givers):
        grid = []
        for name in names:
            for place in range(n_places):
                given = partial(_patched, edit=edit, given=cache[name], giver=giver, place=place)
                with model.hooks(fwd_hooks=[(name, given)]):
                    grid.append(log_probability(model, reverse) - before)
        changes.append(torch.stack(grid, dim=1).unflatten(1, (len(names), n_places)))
    return Contrast(changes[0], changes[1].masked_fill(alone[:, None, None], torch.nan))


def _patched(x: Tensor, hook: HookPoint, edit: Callable, given: Tensor, giver: Tensor, place: int) -> Tensor:
    return edit(x, given, giver.to(x.device), place)
