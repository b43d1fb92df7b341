"""Queries: a sequence with a masked answer, its source, and where the prediction is read.

A *forward query* has its mask where training had it; the *reverse query* of the same :class:`QueryPair` has the sides
swapped. Spans are half-open `(start, stop)`: one token for a toy entity, several for a name in a large model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, NoReturn, get_args

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError, require_one_of, require_some
from mdm_interp.models.inputs import check_token_ids, rows_at

Direction = Literal["forward", "reverse"]
"""In which of a pair's two directions a fact is asked."""

Span = tuple[int, int]
MAX_LOGITS = 2**27
"""In one pass over queries: half a GB in float32. That is 53 sentences of 20 tokens in LLaDA's vocabulary."""


@dataclass(frozen=True)
class Query:
    """A sequence whose answer is masked.

    Raises:
        UserError: a token or a position is no integer, a span lies outside the sequence or is empty, the spans overlap,
            or the answer does not fill its span.
    """

    tokens: tuple[int, ...]
    """Token ids, the mask token in place of the answer; a causal model's query holds the answer itself, each token of
    which is read before it is seen."""
    answer: tuple[int, ...]
    """Token ids of the true answer."""
    answer_span: Span
    source_span: Span
    """Where the tokens are that determine the answer."""

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if wrong := [one for one in given if isinstance(one, bool) or not isinstance(one, Integral)]:
                raise UserError(f"{name}: {wrong[0]!r:.80} is no integer, as token ids and positions are; correct it")
        for name, (start, stop) in (("answer_span", self.answer_span), ("source_span", self.source_span)):
            if not 0 <= start < stop <= len(self.tokens):
                raise UserError(f"{name}: ({start}, {stop}) is not a span of the {len(self.tokens)} tokens; correct it")
        if self.answer_span[0] < self.source_span[1] and self.source_span[0] < self.answer_span[1]:
            raise UserError(f"answer_span: {self.answer_span} overlaps source_span {self.source_span}; keep them apart")
        if len(self.answer) != self.answer_span[1] - self.answer_span[0]:
            raise UserError(f"answer: {len(self.answer)} tokens do not fill answer_span {self.answer_span}")

    @property
    def source(self) -> tuple[int, ...]:
        """Token ids of the source."""
        return self.tokens[slice(*self.source_span)]

    @property
    def statement(self) -> tuple[int, ...]:
        """The tokens, with the answer in place."""
        start, stop = self.answer_span
        return (*self.tokens[:start], *self.answer, *self.tokens[stop:])

    @property
    def offset(self) -> int:
        """Positions from the start of the answer to the start of the source; positive if the source is on the right."""
        return self.source_span[0] - self.answer_span[0]

    def __iter__(self) -> NoReturn:
        """Refuse to be taken for a list of queries."""
        raise UserError("queries: got a single query; give a list of them")

    def readout(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Return the positions whose logits predict the answer's tokens in a model with `cfg.readout_shift`.

        Raises:
            UserError: a position has no prediction, or the source cannot be read from there.
        """
        assert cfg.readout_shift is not None
        rows = tuple(position + cfg.readout_shift for position in range(*self.answer_span))
        if rows[0] < 0:
            raise UserError(
                "answer_span: position 0 has no prediction in a shifted model; put the answer further right"
            )
        if self.source_span[1] > cfg.n_readable(rows[0], len(self.tokens)):
            advice = (
                "ask for the query pairs of the 'causal' objective" if cfg.is_causal else "put it in an earlier block"
            )
            raise UserError(
                f"source_span: {self.source_span} lies right of readout position {rows[0]}, where a model with "
                f"{cfg.attention} attention cannot see it; {advice}"
            )
        return rows


@dataclass(frozen=True)
class QueryPair:
    """A forward query and the reverse query of the same fact."""

    forward: Query
    reverse: Query
    fact: int
    """Which fact of its world this is."""
    side: Literal["left", "right"]
    """Which entity of the fact the forward query asks for."""

    @property
    def shared(self) -> bool:
        """Whether both queries have the same answer and the same source. An ARM's pairs do not."""
        return self.forward.answer == self.reverse.answer and self.forward.source == self.reverse.source


def queries_of(pairs: Sequence[QueryPair], direction: Direction) -> list[Query]:
    """Return the forward or the reverse query of each pair, in order.

        predict(model, queries_of(pairs, "reverse"))

    Raises:
        UserError: the direction is unknown.
    """
    require_one_of("direction", direction, get_args(Direction))
    return [getattr(pair, direction) for pair in pairs]


def require_shared(pairs: Sequence[QueryPair], measure: str) -> None:
    """Refuse pairs for which `measure` is undefined.

    Raises:
        UserError: there are no pairs, or a pair's queries differ in answer or source.
    """
    if not pairs:
        raise UserError(f"query_pairs: {measure} needs at least one pair, got none")
    if not all(pair.shared for pair in pairs):
        raise UserError(
            f"query_pairs: {measure} is undefined for pairs that share neither answer nor source (an ARM's); use "
            "an MDM's pairs"
        )


def mirrored_positions(pair: QueryPair, n_pos: int) -> Int[Tensor, "pos"]:
    """Give for each position of the reverse query its counterpart in the forward query: answer and source swap.

    Args:
        n_pos: Positions of the batch that holds both.

    Raises:
        UserError: the two queries are not mirror images of each other.
    """
    forward, reverse = pair.forward, pair.reverse
    if (forward.answer_span, forward.source_span) != (reverse.source_span, reverse.answer_span):
        raise UserError(
            f"query_pairs: fact {pair.fact} has answer and source at {forward.answer_span} and {forward.source_span} "
            f"forward, {reverse.answer_span} and {reverse.source_span} in reverse; only pairs that swap them mirror "
            "each other"
        )
    if len(forward.answer) != len(forward.source):
        raise UserError(
            f"query_pairs: fact {pair.fact} has an answer of {len(forward.answer)} tokens and a source of "
            f"{len(forward.source)}; only spans of one length mirror each other"
        )
    columns = torch.arange(n_pos)
    answer, source = columns[slice(*forward.answer_span)].clone(), columns[slice(*forward.source_span)].clone()
    columns[answer], columns[source] = source, answer
    return columns


@dataclass(frozen=True)
class QueryBatch:
    """Queries as tensors, padded on the right to one length."""

    tokens: Int[Tensor, "query pos"]
    attention_mask: Bool[Tensor, "query pos"] | None
    """False at padding; None when nothing is padded."""
    readout: Int[Tensor, "query span"]
    """Positions whose logits predict the answer; 0 where `answered` is False."""
    answer: Int[Tensor, "query span"]
    answered: Bool[Tensor, "query span"]
    """Which entries of `readout` and `answer` are real."""
    source: Bool[Tensor, "query pos"]

    def at_readout(self, x: Shaped[Tensor, "query pos *rest"]) -> Shaped[Tensor, "query span *rest"]:
        """Return the rows of `x` at the positions whose logits predict the answers."""
        return rows_at(x, self.readout)

    def to(self, device: torch.device) -> QueryBatch:
        """Return the same on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None})


def collate(queries: Sequence[Query], cfg: ModelConfig) -> QueryBatch:
    """Stack queries for the model of `cfg`, on its device.

    Raises:
        UserError: there are no queries, one is none, a token is outside the vocabulary, or a query's answer cannot be
            read (:meth:`Query.readout`).
    """
    require_queries(queries)
    require_some("queries", queries)
    columns = torch.arange(max(len(query.tokens) for query in queries))
    entries = torch.arange(max(len(query.answer) for query in queries))
    tokens = _padded([query.tokens for query in queries])
    answer = _padded([query.answer for query in queries])
    readout = _padded([query.readout(cfg) for query in queries])
    lengths = torch.tensor([(len(query.tokens), len(query.answer), *query.source_span) for query in queries])
    n_tokens, n_answer, first, stop = lengths.T[..., None]
    kept, answered = columns < n_tokens, entries < n_answer
    source = (columns >= first) & (columns < stop)
    check_token_ids("tokens", tokens, cfg.d_vocab)
    check_token_ids("answer", answer, cfg.d_vocab)
    batch = QueryBatch(tokens, None if bool(kept.all()) else kept, readout, answer, answered, source)
    return batch.to(torch.device(cfg.device))


def require_queries(queries: Sequence[Query]) -> None:
    """Refuse what are no queries, such as query pairs.

    Raises:
        UserError: they are none.
    """
    for query in queries:
        if not isinstance(query, Query):
            raise UserError(
                f"queries: got a {type(query).__name__}, which is no query; of query pairs, give "
                "queries_of(pairs, 'forward') or queries_of(pairs, 'reverse')"
            )


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row column"]:
    """Stack rows of integers, with zeros after the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)


def require_mask(cfg: ModelConfig) -> None:
    """Refuse a model that is asked with masks and has none.

    Raises:
        UserError: it is not causal, and its config names no mask token.
    """
    if not cfg.is_causal and cfg.mask_token_id is None:
        raise UserError("mask_token_id: None, and a bidirectional model is asked with masks; set it in the config")


def answer_positions(batch: QueryBatch, cfg: ModelConfig) -> Int[Tensor, "query span"]:
    """Return where the answers' tokens are; any place where `answered` is False."""
    return batch.readout - (cfg.readout_shift or 0)


def at_once(logits: int) -> int:
    """Return how many sequences, of `logits` logits each, are one batch."""
    return max(1, min(512, MAX_LOGITS // logits))


def batches(queries: Sequence[Query], cfg: ModelConfig, size: int | None = None) -> Iterator[QueryBatch]:
    """Return the queries in order, `size` at a time; by default 512, or fewer to keep to :data:`MAX_LOGITS`.

    Raises:
        UserError: as :func:`collate`.
    """
    require_queries(queries)
    if size is None:
        size = at_once(max((len(query.tokens) for query in queries), default=1) * cfg.d_vocab)
    for start in range(0, max(len(queries), 1), size):  # none are refused, too
        yield collate(queries[start : start + size], cfg)
