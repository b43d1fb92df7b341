"""Influence: which training sentences make a model answer a query. Formulas: docs/theory.md, section 5."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query, batches
from mdm_interp.data.sentences import mask_copies
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.measures.gradients.components import GROUPS, Part, part_of, parts_of
from mdm_interp.measures.gradients.gram import BLOCK, TOKENS, blocks, entries, gradients_of
from mdm_interp.measures.gradients.recording import recording
from mdm_interp.measures.gradients.terms import Sums, token_products
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
    training: Iterable[Sequence[int]] | Iterable[Query] | Int[Tensor, "sentence pos"],
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
    listed: Any = [one.tolist() if isinstance(one, Tensor) else one for one in training]
    return _influence(model, listed, list(queries), n_draws, seed, kept)


@shared_out("training", merge=_joined)
def _influence(
    model: Any,
    training: Sequence[Sequence[int]] | Sequence[Query],
    queries: Sequence[Query],
    n_draws: int,
    seed: int,
    kept: Collection[int],
) -> Influence:
    if not training or not queries:
        raise UserError(f"training, queries: got {len(training)} and {len(queries)}; give at least one of each")
    with recording(model) as model:
        asked = [one for one in training if isinstance(one, Query)]
        sentences = [one for one in training if not isinstance(one, Query)]
        if asked:
            if sentences:
                raise UserError("training: holds both sentences and queries; give them one after the other")
            left, sentence = list(batches(asked, model.cfg, _batch_size(asked))), torch.arange(len(asked))
            weight = torch.ones(len(asked), dtype=torch.float64)
        else:
            copies = mask_copies(sentences, model.cfg, n_draws=n_draws, seed=seed, kept=kept, max_tokens=TOKENS)
            left, sentence, weight = list(copies.batches), copies.sentence, copies.weight
        sizes = [len(batch.tokens) for batch in left]
        summed = [
            _Summed.of(sentences, weights, batch.tokens.device)
            for sentences, weights, batch in zip(sentence.split(sizes), weight.split(sizes), left, strict=True)
        ]
        right, size = list(batches(queries, model.cfg, _batch_size(queries))), _batch_size(queries)
        n_pos = max(batch.tokens.shape[1] for batch in left)
        inner, by_token = Sums(len(training), len(queries)), Sums(len(training), n_pos, len(queries))
        largest = max(
            len(batch.tokens) * entries(model, batch.tokens.shape[1], batch.readout.shape[1])
            for batch in [*left, *right]
        )
        for rows, columns in blocks(BLOCK // largest, len(left), len(right)):
            of_block, places = [*right[columns], *left[rows]], range(columns.start * size, len(queries), size)
            n_right = columns.stop - columns.start
            for i, found, held in gradients_of(model, of_block, answer_loss, n_right):
                if i < n_right or not found:
                    continue
                copies = summed[rows.start + i - n_right]
                for of_right, place in zip(held, places, strict=False):
                    column = slice(place, place + size)
                    products, tokens = token_products(found, of_right, n_pos)
                    for (name, _), product in products:
                        inner.add(part_of(name), copies(product), copies.at, column)
                    by_token.add("all", copies(tokens), copies.at, slice(None), column)
                del found, held
        parts = parts_of(name for name, _ in model.named_parameters())
        found_inner = require_numbers(inner.read(parts), model.cfg.dtype)
        return Influence(parts, found_inner, by_token.read(["all"])[0])


@dataclass(frozen=True)
class _Summed:
    """Sums what is found of a batch's copies to what their sentences have."""

    at: slice
    """Which sentences these are."""
    weights: Float[Tensor, "sentence copy"]

    @classmethod
    def of(cls, sentence: Int[Tensor, "copy"], weight: Float[Tensor, "copy"], device: torch.device) -> _Summed:
        first, last = int(sentence[0]), int(sentence[-1])
        own = sentence == torch.arange(first, last + 1)[:, None]
        return cls(slice(first, last + 1), (own * weight).to(device))

    def __call__(self, found: Float[Tensor, "copy *rest"]) -> Float[Tensor, "sentence *rest"]:
        return torch.tensordot(self.weights.to(found.device), found.double(), 1)


def _batch_size(queries: Sequence[Query]) -> int:
    return max(1, TOKENS // max(len(query.tokens) for query in queries))


def traced_influence(
    checkpoints: Iterable[tuple[Any, float]],
    training: Iterable[Sequence[int]] | Iterable[Query] | Int[Tensor, "sentence pos"],
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
