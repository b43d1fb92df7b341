"""What an edit does to reverse prediction, beside the same edit at random other positions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import Query, QueryPair, require_shared
from mdm_interp.errors import UserError
from mdm_interp.interventions.edits import (
    CHUNK,
    At,
    Editing,
    Head,
    ablated_routes,
    ablated_storage,
    chosen_heads,
    collate_pairs,
    even_routes,
    log_probability,
    shared_routes,
    transplanted_routes,
)
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast


@dataclass(frozen=True)
class Effect:
    """Log-probabilities of the answers, in nats."""

    forward: Float[Tensor, "pair"]
    """Of the forward queries."""
    before: Float[Tensor, "pair"]
    """Of the reverse queries, nothing edited."""
    after: Contrast[Float[Tensor, "pair"]]
    """Of the reverse queries, edited; null, the *control*: edited alike at as many random other positions (or heads,
    where heads are chosen; NaN where the model has too few others)."""

    @property
    def columns(self) -> dict[str, float]:
        """The effect as columns of a row: the mean probabilities `forward`, `before`, `after` and `control`; their mean
        logarithms, as `log_forward`; and `deviation`, how far `after` is from `forward` at most, in nats."""
        logs = {"forward": self.forward, "before": self.before}
        logs |= {"after": self.after.effect, "control": self.after.null}
        return {
            **{name: log.exp().nanmean().item() for name, log in logs.items()},
            **{f"log_{name}": log.nanmean().item() for name, log in logs.items()},
            "deviation": (self.after.effect - self.forward).abs().max().item(),
        }

    def distance(self) -> Contrast[float]:
        """Return how far the edited reverse answers are from the forward ones (mean absolute difference), relative to
        how far the control's are; null: the same for reverse answers that were not edited."""

        def away(answers: Float[Tensor, "pair"]) -> float:
            return (answers - self.forward).abs().mean().item()

        return Contrast(self.after.effect, self.before).map(lambda answers: away(answers) / away(self.after.null))


Edit = Editing | Sequence[tuple[str, Callable]]
"""A function that edits a model while its context lasts, or names of hooks with what each does to its activation."""
EditingAt = Callable[[Any, Sequence[QueryPair], At], AbstractContextManager[None]]


def transplant_routes(model: HookedModel, query_pairs: Sequence[QueryPair], seed: int = 0) -> Effect:
    """Return the effect of :func:`transplanted_routes`. In a one-layer model with a relative scheme that reads at the
    mask, `after` equals `forward`, with or without MLP: what is stored does not know where it is, and what the reverse
    query lacks is the route."""
    return _effect(model, query_pairs, transplanted_routes, _elsewhere(transplanted_routes, seed))


def share_routes(model: HookedModel, query_pairs: Sequence[QueryPair], seed: int = 0) -> Effect:
    """Return the effect of :func:`shared_routes`. Where all heads attend alike it is that of
    :func:`transplant_routes`."""
    return _effect(model, query_pairs, shared_routes, _elsewhere(shared_routes, seed))


def project_even_routes(
    model: HookedModel, query_pairs: Sequence[QueryPair], seed: int = 0, heads: Sequence[Head] | None = None
) -> Effect:
    """Return the effect of :func:`even_routes`: nothing under ALiBi and no encoding, whose scores have no odd part. The
    control of chosen `heads` is as many others, drawn at random from all layers."""
    if heads is None:
        return _effect(model, query_pairs, even_routes, _elsewhere(even_routes, seed, like="answer"))
    chosen = chosen_heads(hooked(model).cfg, heads)
    others, needed = [(layer, head) for layer, head in (~chosen).nonzero().tolist()], int(chosen.sum())
    drawn = random.Random(seed).sample(others, needed) if len(others) >= needed else None
    control = None if drawn is None else partial(even_routes, heads=drawn)
    return _effect(model, query_pairs, partial(even_routes, heads=heads), control)


def edit_heads(
    model: HookedModel, query_pairs: Sequence[QueryPair], side_specific: Bool[Tensor, "layer head"]
) -> dict[str, Effect]:
    """Return the effects of both edits that several heads allow: of :func:`share_routes`, as `shared`, if there are
    several; and of :func:`project_even_routes` of the side-specific heads only, as `even`, if the scheme is
    relative."""
    model = hooked(model)
    effects = {"shared": share_routes(model, query_pairs)} if model.cfg.n_heads > 1 else {}
    if model.pos_embed.relative:
        heads = [(layer, head) for layer, head in side_specific.nonzero().tolist()]
        effects["even"] = project_even_routes(model, query_pairs, heads=heads)
    return effects


def ablate_storage(model: HookedModel, query_pairs: Sequence[QueryPair], seed: int = 0) -> Effect:
    """Return the effect of :func:`ablated_storage`."""
    return _effect(model, query_pairs, ablated_storage, _elsewhere(ablated_storage, seed))


def ablate_routes(model: HookedModel, query_pairs: Sequence[QueryPair], seed: int = 0) -> Effect:
    """Return the effect of :func:`ablated_routes`."""
    return _effect(model, query_pairs, ablated_routes, _elsewhere(ablated_routes, seed))


def effect(model: HookedModel, query_pairs: Sequence[QueryPair], edit: Edit, control: Edit | None = None) -> Effect:
    """Return the effect of any edit on the reverse answers.

    Args:
        edit: Hooks, as `model.hooks(fwd_hooks=...)` takes them; or, where the edit depends on the pairs, a function of
            model and pairs that returns a context manager, like :func:`even_routes`. It edits passes on the pairs'
            reverse queries, :data:`~mdm_interp.interventions.edits.CHUNK` at a time, in their order.
        control: The same edit where it should not matter: at another place, of another head, of the same size. Without
            one, its log-probabilities are NaN, and nothing says what any edit of this size would do.

    Raises:
        UserError: there are no pairs, their queries do not share answer and source (an ARM's), or a hook is not there.
    """
    return _effect(model, query_pairs, _editing(edit), None if control is None else _editing(control))


def _editing(edit: Edit) -> Editing:
    if callable(edit):
        return edit
    return lambda model, query_pairs: model.hooks(fwd_hooks=list(edit))


@torch.no_grad()
def _effect(model: HookedModel, query_pairs: Sequence[QueryPair], editing: Editing, control: Editing | None) -> Effect:
    """Ask forward, reverse, and reverse under the edit and under its control, if there is one."""
    require_shared(query_pairs, "an intervention between forward and reverse query")
    model, chunks = hooked(model), []
    for start in range(0, len(query_pairs), CHUNK):
        pairs = query_pairs[start : start + CHUNK]
        forward, reverse = collate_pairs(model, pairs)
        asked = [log_probability(model, forward), log_probability(model, reverse)]
        for edit in filter(None, (editing, control)):
            with edit(model, pairs):
                asked.append(log_probability(model, reverse))
        chunks.append(torch.stack(asked if control else [*asked, torch.full_like(asked[0], torch.nan)]))
    of_forward, before, after, of_control = torch.cat(chunks, dim=1)
    return Effect(of_forward, before, Contrast(after, of_control))


def _elsewhere(editing: EditingAt, seed: int, like: Literal["source", "answer"] = "source") -> Editing:
    """Make the same edit at random other positions, as many as the reverse query's `like` has tokens."""
    chooser = random.Random(seed)

    def edit(model: HookedModel, query_pairs: Sequence[QueryPair]) -> AbstractContextManager[None]:
        others = torch.zeros(len(query_pairs), max(len(pair.reverse.tokens) for pair in query_pairs), dtype=torch.bool)
        for row, pair in enumerate(query_pairs):
            others[row, chooser.sample(*other_positions(pair.reverse, model.cfg, like))] = True
        return editing(model, query_pairs, others)

    return edit


def other_positions(
    query: Query, cfg: ModelConfig, like: Literal["source", "answer"] = "source"
) -> tuple[list[int], int]:
    """Return the positions of a query that are neither answer, source nor readout, and how many of them a control
    takes.

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
