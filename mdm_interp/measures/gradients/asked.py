"""What gradients are of, batch by batch: queries, or sentences in masked copies."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from mdm_interp.data.queries import MAX_LOGITS, Query, QueryBatch, collate, require_queries
from mdm_interp.data.sentences import mask_copies
from mdm_interp.errors import UserError
from mdm_interp.models.bridge import BridgedTransformer
from mdm_interp.models.protocol import HookedModel

Sentence = Sequence[int]
TOKENS = 1024
"""How many tokens a batch has at most, padding included: the products of two batches' tokens are 4 MB in float32, which
stay in a core's cache. One sequence, and all copies of one sentence, may have more."""
BRIDGE_LOGITS = MAX_LOGITS // 4
"""How many logits a bridge's batch has at most: a bridge computes them at all positions, an eighth of a GB."""


@dataclass(frozen=True)
class Asked:
    """One batch of what gradients are asked of."""

    batch: QueryBatch
    place: slice
    """Where its queries or sentences are in the whole list."""
    owner: Int[Tensor, "sequence"]
    """For each sequence, which query or sentence of this batch it is of, counted from 0, in order."""
    weight: Float[Tensor, "sequence"] | None = None
    """What each sequence's loss is multiplied by; None is 1."""

    @property
    def count(self) -> int:
        """How many queries or sentences it has."""
        return self.place.stop - self.place.start

    @property
    def copies(self) -> int:
        """How many sequences each of them has, where all are in this batch."""
        return len(self.owner) // self.count

    def divided(self, at: int) -> Iterator[tuple[slice, slice, Int[Tensor, "sequence"]]]:
        """Split at an index of the whole list, and into pieces of :data:`TOKENS`. For each piece give its place, its
        sequences, and `owner` counted from its first."""
        cut, size = min(max(at, self.place.start), self.place.stop), max(1, TOKENS // self.batch.tokens.shape[1])
        for start, stop in ((self.place.start, cut), (cut, self.place.stop)):
            first, last = ((end - self.place.start) * self.copies for end in (start, stop))
            for row in range(first, last, size):
                yield slice(start, stop), slice(row, min(row + size, last)), self.owner - (start - self.place.start)

    def pieces(self, size: int) -> Iterator[tuple[slice, QueryBatch, Float[Tensor, "sequence"] | None]]:
        """Give so many of its sequences at a time: which, themselves, and their weights."""
        for start in range(0, len(self.owner), size):
            rows = slice(start, start + size)
            given = {name: tensor[rows] for name, tensor in vars(self.batch).items() if tensor is not None}
            yield rows, replace(self.batch, **given), None if self.weight is None else self.weight[rows]


def listed(given: Iterable[Any], name: str) -> list[Any]:
    """List queries, or sentences as token ids.

    Raises:
        UserError: there is nothing, or something that is neither, or there are both.
    """
    found: list[Any] = [one.tolist() if isinstance(one, (Tensor, ndarray)) else one for one in given]
    if not found:
        raise UserError(f"{name}: gradients need at least one query or sentence, got none")
    if any(isinstance(one, (str, bytes)) for one in found):
        raise UserError(
            f"{name}: got text, not token ids; give model.tokenizer(sentence)['input_ids'] of each sentence"
        )
    sentences = [one for one in found if isinstance(one, Sequence)]
    if not sentences:
        require_queries(found)
    elif len(sentences) < len(found):
        raise UserError(f"{name}: holds both sentences and queries; give them one after the other")
    for token in itertools.chain(*sentences):
        if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= int(token) < 2**63:
            raise UserError(f"{name}: {token!r:.80} is no token id; give sentences as lists of integers")
    return [tuple(map(int, one)) for one in sentences] if sentences else found


def ask(
    given: Sequence[Query | Sentence],
    model: HookedModel,
    *,
    n_draws: int,
    seed: int,
    kept: Collection[int],
    whole: bool = True,
) -> list[Asked]:
    """Batch queries, or sentences in masked copies (:func:`~mdm_interp.data.sentences.mask_copies`), in order.

    Args:
        whole: Whether all copies of a sentence are in one batch, however many tokens it has.

    Raises:
        UserError: one cannot be asked.
    """
    cfg = model.cfg
    limit = min(TOKENS, BRIDGE_LOGITS // cfg.d_vocab) if isinstance(model, BridgedTransformer) else TOKENS
    if queries := [one for one in given if isinstance(one, Query)]:
        places = list(_cut([len(query.tokens) for query in queries], limit))
        collated = [collate(queries[place], cfg) for place in places]
        return [
            Asked(batch, place, torch.arange(len(batch.tokens)).to(batch.tokens))
            for place, batch in zip(places, collated, strict=True)
        ]
    sentences = [one for one in given if not isinstance(one, Query)]
    longest, n_copies = max(map(len, sentences)), 1 if cfg.is_causal else n_draws
    most = max(1, limit // max(1, longest))
    if whole and n_copies > 0:
        most = max(most // n_copies, 1) * n_copies
    copies = mask_copies(sentences, cfg, n_draws=n_draws, seed=seed, kept=kept, max_tokens=most * longest)
    sizes = [len(batch.tokens) for batch in copies.batches]
    of_batches = zip(copies.batches, copies.sentence.split(sizes), copies.weight.split(sizes), strict=True)
    return [
        Asked(
            batch,
            slice(int(sentence[0]), int(sentence[-1]) + 1),
            (sentence - sentence[0]).to(batch.tokens),
            weight.to(batch.tokens.device),
        )
        for batch, sentence, weight in of_batches
    ]


def _cut(lengths: Sequence[int], limit: int) -> Iterator[slice]:
    """Cut a list where a batch of what comes would have more tokens than a limit."""
    start = longest = 0
    for at, length in enumerate(lengths):
        if at > start and (at + 1 - start) * max(longest, length) > limit:
            yield slice(start, at)
            start, longest = at, 0
        longest = max(longest, length)
    yield slice(start, len(lengths))


def in_one_batch(given: Sequence[Query | Sentence]) -> bool:
    """Tell whether these are queries that fit into one batch."""
    lengths = [len(one.tokens) for one in given if isinstance(one, Query)]
    return len(lengths) == len(given) and len(lengths) * max(lengths) <= TOKENS


def numbered(*sides: Sequence[Asked]) -> list[Asked]:
    """Return the batches of all sides, with places from 0 on, one side after the other."""
    found: list[Asked] = []
    for one in itertools.chain(*sides):
        start = found[-1].place.stop if found else 0
        found.append(replace(one, place=slice(start, start + one.count)))
    return found
