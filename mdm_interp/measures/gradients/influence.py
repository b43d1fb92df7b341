"""Influence: which training sentences make a model answer a query. Formulas: docs/theory.md, section 5."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.measures.gradients.asked import Asked, Sentence, ask, listed
from mdm_interp.measures.gradients.components import GROUPS, Part, part_of, parts_of
from mdm_interp.measures.gradients.gram import BLOCK, blocks, gradients_of, largest
from mdm_interp.measures.gradients.recording import recording
from mdm_interp.measures.gradients.terms import PackedFound, Sums, pack, token_products
from mdm_interp.models.inputs import require_numbers
from mdm_interp.shards import shared_out


@dataclass(frozen=True)
class Influence:
    """Inner products of training sentences' gradients with queries' gradients. Positive: a gradient step on the
    sentence lowers the query's loss, per unit of step by so much, to first order.

    In nats^2 per squared unit of the parameters, or traced over a run in nats.
    """

    parts: tuple[Part, ...]
    """All that the model has: what lies outside of layers, then layer by layer."""
    inner: Float[Tensor, "part sentence query"]
    by_token: Float[Tensor, "sentence pos query"]
    """What each position of a sentence gives, over all parts: what enters a linear map there, and the gradient at what
    leaves it. Biases, norms' gains and what a position scheme learns are of no position, so the sum over positions is
    less than the whole by their share."""

    @property
    def total(self) -> Float[Tensor, "sentence query"]:
        return self.inner.sum(0)

    def group(self, name: str) -> Float[Tensor, "sentence query"]:
        """Sum over layers what one of :data:`~mdm_interp.measures.gradients.components.GROUPS` gives."""
        return self.inner[[component in GROUPS[name] for _, component in self.parts]].sum(0)

    def top(self, query: int, count: int) -> tuple[list[int], list[int]]:
        """Return the sentences that help a query most, and those that hurt it most, the strongest first; no more than
        there are of either."""
        total = self.total[:, query]
        order = total.argsort(descending=True, stable=True).tolist()
        helping = [sentence for sentence in order if total[sentence] > 0]
        hurting = [sentence for sentence in reversed(order) if total[sentence] < 0]
        return helping[:count], hurting[:count]

    def rows(self, top: int) -> list[dict[str, Any]]:
        """Give one row per query, sentence, layer and group for the sentences of :meth:`top`; `layer` is None outside
        of all layers, and `rank` is 1 for the strongest, -1 for the one that hurts most."""
        places = {
            (layer, group): [i for i, (at, component) in enumerate(self.parts) if at == layer and component in members]
            for layer in dict.fromkeys(layer for layer, _ in self.parts)
            for group, members in GROUPS.items()
        }
        return [
            {
                "query": query,
                "sentence": sentence,
                "rank": sign * rank,
                "layer": layer,
                "group": group,
                "influence": self.inner[chosen, sentence, query].sum().item(),
            }
            for query in range(self.inner.shape[2])
            for sign, sentences in zip((1, -1), self.top(query, top), strict=True)
            for rank, sentence in enumerate(sentences, start=1)
            for (layer, group), chosen in places.items()
            if chosen
        ]


def _joined(parts: Sequence[Influence], order: Tensor) -> Influence:
    """Put together what some sentences each do to all queries."""
    inner = torch.cat([part.inner for part in parts], 1)[:, order]
    longest = max(part.by_token.shape[1] for part in parts)
    padded = [torch.nn.functional.pad(of, (0, 0, 0, longest - of.shape[1])) for of in (p.by_token for p in parts)]
    return Influence(parts[0].parts, inner, torch.cat(padded)[order])


def influence(
    model: Any,
    training: Iterable[Query | Sentence] | Int[Tensor, "sentence pos"],
    queries: Iterable[Query],
    *,
    n_draws: int = 16,
    seed: int = 0,
    kept: Collection[int] = (),
) -> Influence:
    """Compute how a gradient step on each training sentence, or query, moves each query's loss, to first order.

    A sentence's loss is the denoising bound on its negative log-probability, in nats, estimated from masked copies; a
    causal model's is that of each next token. A training query's loss is that of its answer. Memory is bounded as in
    :func:`~mdm_interp.measures.gradients.gram.gram`: all queries, or a block of them, beside one batch of copies.

    Args:
        training: Sentences as token ids, or queries.
        n_draws: How many masked copies of each sentence there are
            (:func:`~mdm_interp.data.sentences.mask_copies`).
        seed: Draws the masks.
        kept: Tokens that are never masked.

    Raises:
        UserError: there is nothing on one of the sides, a sentence cannot be masked, or the model was made in inference
            mode.

    Source: docs/theory.md, section 5.
    """
    given = listed(training, "training")
    return _influence(model, given, listed(queries, "queries"), {"n_draws": n_draws, "seed": seed, "kept": tuple(kept)})


@shared_out("training", merge=_joined)
def _influence(
    model: Any, training: Sequence[Query | Sentence], queries: Sequence[Query], drawn: Mapping[str, Any]
) -> Influence:
    with recording(model) as model:
        left, right = (ask(side, model, whole=False, **drawn) for side in (training, queries))
        n_left, n_right = (side[-1].place.stop for side in (left, right))
        n_pos = max(one.batch.tokens.shape[1] for one in left)
        inner, by_token = Sums(n_left, n_right), Sums(n_left, n_pos, n_right)
        for rows, columns in blocks(BLOCK // largest(model, [*left, *right]), len(left), len(right)):
            asked, n_held = [*right[columns], *left[rows]], columns.stop - columns.start
            held: list[tuple[Asked, PackedFound]] = []
            for i, found in gradients_of(model, asked, answer_loss, n_held):
                one, packed = asked[i], pack(found, asked[i].owner)
                if i < n_held:
                    held.append((one, packed))
                for other, of_other in held if i >= n_held and found else ():
                    products, tokens = token_products(packed, of_other, one.count, other.count, n_pos)
                    for (name, _), product in products:
                        inner.add(part_of(name), product, one.place, other.place)
                    by_token.add("all", tokens, one.place, slice(None), other.place)
                del found, packed  # before the next are computed
                if i == len(asked) - 1:
                    held = []
        parts = parts_of(name for name, _ in model.named_parameters())
        found_inner = require_numbers(inner.read(parts), model.cfg.dtype)
        return Influence(parts, found_inner, by_token.read(["all"])[0])


def traced_influence(
    checkpoints: Iterable[tuple[Any, float]],
    training: Iterable[Query | Sentence] | Int[Tensor, "sentence pos"],
    queries: Iterable[Query],
    **options: Any,
) -> Influence:
    """Sum the influence over checkpoints, each weighted with its learning rate, in nats: what one gradient step on the
    sentence at each of them lowers the query's loss by, to first order.

        traced_influence(((run.model(step), run.config.learning_rate(step)) for step in run.steps), sentences, queries)

    A run's own optimiser takes batches, and clips and rescales their gradients; of that, this knows nothing.

    Args:
        checkpoints: Models and learning rates.
        options: As of :func:`influence`. Every checkpoint sees the same masks.

    Raises:
        UserError: there are no checkpoints.

    Source: TracInCP, arXiv 2002.08484.
    """
    given: Any = list(training)  # which may come only once
    queries = list(queries)
    traced: Influence | None = None
    for model, rate in checkpoints:
        here = influence(model, given, queries, **options)
        inner, by_token = rate * here.inner, rate * here.by_token
        if traced is not None:
            inner, by_token = traced.inner + inner, traced.by_token + by_token
        traced = Influence(here.parts, inner, by_token)
    if traced is None:
        raise UserError("checkpoints: there are none; give at least one model and its learning rate")
    return traced
