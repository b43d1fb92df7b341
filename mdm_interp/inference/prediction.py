"""What a model answers to a query: log-probability and rank of the true answer, and the answer it fills in itself.

An answer of several tokens is read or filled in one of three orders:

    one_shot        every token from one pass, as if the others were unknown
    confidence      one token per pass, first the one whose likeliest token is most probable
    left_to_right   one token per pass, from the left

A causal model knows the last only, and reads a true answer in one pass: it sees each token after predicting it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import Query, QueryBatch, QueryPair, at_once, batches, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError, require_one_of
from mdm_interp.models.bridge import hooked
from mdm_interp.models.inputs import forbid_mask, require_numbers
from mdm_interp.models.layers import precise
from mdm_interp.models.protocol import HookedModel
from mdm_interp.shards import shared_out

Order = Literal["one_shot", "confidence", "left_to_right"]
ORDERS: tuple[Order, ...] = ("one_shot", "confidence", "left_to_right")


@dataclass(frozen=True)
class Prediction:
    """One entry per query."""

    log_probability: Float[Tensor, "query"]
    """Nats; summed over the answer's tokens."""
    rank: Int[Tensor, "query"]
    """1 is the model's first choice; of several tokens, the worst. Ties count against the answer."""

    @property
    def probability(self) -> Float[Tensor, "query"]:
        return self.log_probability.exp()

    @property
    def correct(self) -> Bool[Tensor, "query"]:
        """Whether every token of the answer is the model's first choice."""
        return self.rank == 1


def orders(cfg: ModelConfig) -> tuple[Order, ...]:
    """Return the orders in which a model can fill an answer in."""
    return ("left_to_right",) if cfg.is_causal else ORDERS


def query_loss(logits: Float[Tensor, "query pos d_vocab"], batch: QueryBatch) -> Float[Tensor, "query"]:
    """Compute the negative log-probability of each answer, in nats, summed over its tokens."""
    return answer_loss(batch.at_readout(logits), batch)


def answer_loss(rows: Float[Tensor, "query span d_vocab"], batch: QueryBatch) -> Float[Tensor, "query"]:
    """Do as :func:`query_loss`, from the logits at readout positions."""
    log_probs = rows.log_softmax(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    chosen = log_probs.gather(-1, batch.answer[..., None]).squeeze(-1)
    return -chosen.masked_fill(~batch.answered, 0).sum(-1)


def predict(model: HookedModel, queries: Sequence[Query], order: Order = "one_shot") -> Prediction:
    """Ask `model` every query.

    Beyond `one_shot`, each token is read when its turn comes, beside the true tokens of the turns before it. In order
    of `confidence` the turn goes to where the model's own likeliest token is most probable. So the answer is `correct`
    if :func:`infill` in the same order fills it in, unless it is in a tie or the mask token is likelier still.

    Raises:
        UserError: there are no queries, the order is unknown, or a causal model is asked in order of confidence.
    """
    model = hooked(model)
    require_one_of("order", order, ORDERS)
    if model.cfg.is_causal and order == "confidence":
        raise UserError("order: 'confidence' needs bidirectional attention; read a causal model 'left_to_right'")
    read = fill(model, [Filling(query, order, truth=True) for query in queries])
    dtype = torch.promote_types(model.cfg.dtype, torch.float32)
    return Prediction(
        torch.tensor([sum(answer.log_probabilities) for answer in read], dtype=dtype),
        torch.tensor([max(answer.ranks) for answer in read]),
    )


@torch.no_grad()
def token_log_probabilities(
    model: HookedModel, queries: Sequence[Query], tokens: Int[Tensor, "query token"]
) -> Float[Tensor, "query token"]:
    """Read how likely each query's tokens are as its answer, in nats; where answers have several, as their first."""
    model, read = hooked(model), []
    for batch in batches(queries, model.cfg):
        chosen, tokens = tokens[: len(batch.tokens)], tokens[len(batch.tokens) :]
        first = batch.readout[:, :1]
        rows = model(batch.tokens, attention_mask=batch.attention_mask, readout=first).squeeze(1)
        told = rows.log_softmax(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        read.append(require_numbers(told.gather(1, chosen.to(told.device)), model.cfg.dtype))
    return torch.cat(read)


@dataclass(frozen=True)
class RoleSplit:
    """Log-probabilities of answers in two parts, in nats: that of the answer's role, and its own within the role."""

    answer: Float[Tensor, "query"]
    """The sum of both."""
    role: Float[Tensor, "query"]
    """That any entity of the role is the answer."""

    @property
    def in_role(self) -> Float[Tensor, "query"]:
        return self.answer - self.role


def split_by_role(
    model: HookedModel, queries: Sequence[Query], candidates: Int[Tensor, "query candidate"]
) -> RoleSplit:
    """Split what each query is answered into the choice of a role and that of an entity within it.

    Args:
        queries: Of one answer token each.
        candidates: The tokens of the answer's role, the answer among them (`FactWorld.candidates`).

    Source: docs/theory.md, section 12.
    """
    answers = torch.tensor([query.answer for query in queries])
    told = token_log_probabilities(model, queries, torch.cat([answers, candidates], dim=1))
    return RoleSplit(told[:, 0], told[:, 1:].logsumexp(1))


def compare_answers(model: HookedModel, query_pairs: Sequence[QueryPair], world: FactWorld) -> dict[str, float]:
    """Measure what forward and reverse queries are answered: mean probabilities of the answer, of its role, and of the
    answer within its role (`forward_probability`, `forward_role`, `forward_in_role`, and the same in reverse), that of
    the reverse queries' rivals (`rival_probability`), and how many nats the role and the answer within it lose from
    forward to reverse (`gap_role`, `gap_in_role`).

    Args:
        query_pairs: Of `world`, a relation_cycle (:meth:`~mdm_interp.data.worlds.FactWorld.rivals`).

    Source: docs/theory.md, section 12.
    """
    asked = {"forward": [pair.forward for pair in query_pairs], "reverse": [pair.reverse for pair in query_pairs]}
    split = {kind: split_by_role(model, queries, world.candidates(queries)) for kind, queries in asked.items()}
    found: dict[str, float] = {}
    for name, part in {"probability": "answer", "role": "role", "in_role": "in_role"}.items():
        found |= {f"{kind}_{name}": getattr(logs, part).exp().mean().item() for kind, logs in split.items()}
    rival = token_log_probabilities(model, asked["reverse"], world.rivals(asked["reverse"]))
    found["rival_probability"] = rival.exp().mean().item()
    forward, reverse = split.values()
    found["gap_role"] = (forward.role - reverse.role).mean().item()
    found["gap_in_role"] = (forward.in_role - reverse.in_role).mean().item()
    return found


@dataclass(frozen=True)
class Filling:
    """An answer to be filled in."""

    query: Query
    order: Order
    truth: bool = False
    """Whether the true tokens are filled in, and read, instead of the model's choice; the order stays that of its
    choices."""


@dataclass(frozen=True)
class Filled:
    """An answer, filled in."""

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    """Nats; of each token when it was filled in. The mask token is no choice, so those of a model's own tokens leave it
    out."""
    ranks: tuple[int, ...] = ()
    """Of true tokens; 1 is the model's first choice."""


def _around(filling: Filling) -> Hashable:
    """Return the words around the answer: fillings of the same words go through the model together."""
    tokens, (start, stop) = filling.query.tokens, filling.query.answer_span
    return tokens[:start], tokens[stop:]


@shared_out("fillings", together=_around)
@torch.no_grad()
def fill(model: HookedModel, fillings: Sequence[Filling]) -> list[Filled]:
    """Fill in all answers side by side. A sequence that several of them have become passes through the model once, and
    logits are computed only where they are read.

    Sequences are put into batches by their length, so hooks that are on the model must treat all rows of a batch alike.

    Raises:
        UserError: as :func:`~mdm_interp.data.queries.collate`.
    """
    model = hooked(model)
    cfg, shift = model.cfg, model.cfg.readout_shift
    collate(list(dict.fromkeys(filling.query for filling in fillings)), cfg)  # refuses what cannot be asked
    answers = [_Answer(filling, cfg.is_causal) for filling in fillings]
    while any(answer.blanks for answer in answers):
        asking: dict[tuple[int, ...], list[_Answer]] = {}
        for answer in answers:
            if answer.blanks:
                seen = answer.wanted[-1] + shift + 1 if cfg.is_causal else None
                asking.setdefault(tuple(answer.tokens[:seen]), []).append(answer)
        size = at_once(max(len(answer.wanted) for answer in answers) * cfg.d_vocab)
        sequences = sorted(asking, key=len)
        for start in range(0, len(sequences), size):
            _pass(model, {tokens: asking[tokens] for tokens in sequences[start : start + size]})
    return [answer.filled() for answer in answers]


class _Answer:
    """An answer that is being filled in."""

    def __init__(self, filling: Filling, causal: bool) -> None:
        self.query, self.truth = filling.query, filling.truth
        # A causal model sees each true token only after it has predicted it, so one pass reads all of them.
        self.order: Order = "one_shot" if causal and filling.truth else filling.order
        self.tokens, self.blanks = list(filling.query.tokens), list(range(*filling.query.answer_span))
        self.read: dict[int, tuple[float, int]] = {}
        """Log-probability and rank of what was filled in, by position."""

    @property
    def wanted(self) -> list[int]:
        """The blanks whose logits decide the next turn."""
        return self.blanks[:1] if self.order == "left_to_right" else self.blanks

    def turn(self, probability: dict[int, float]) -> list[int]:
        """Return the blanks that are filled in next.

        Args:
            probability: That of the model's choice at each blank in `wanted`.
        """
        return [max(self.blanks, key=probability.__getitem__)] if self.order == "confidence" else list(self.wanted)

    def true_token(self, position: int) -> int:
        return self.query.answer[position - self.query.answer_span[0]]

    def fill(self, position: int, token: int, log_probability: float, rank: int) -> None:
        self.blanks.remove(position)
        self.tokens[position], self.read[position] = token, (log_probability, rank)

    def filled(self) -> Filled:
        span = self.query.answer_span
        logs, ranks = zip(*(self.read[position] for position in range(*span)), strict=True)
        return Filled(tuple(self.tokens[slice(*span)]), logs, ranks if self.truth else ())


def _pass(model: HookedModel, asking: dict[tuple[int, ...], list[_Answer]]) -> None:
    """Run the model on some sequences, and give each answer its next turn."""
    cfg = model.cfg
    wanted = [sorted({at for answer in answers for at in answer.wanted}) for answers in asking.values()]
    tokens, places = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(cfg.device)
        for rows in (list(asking), wanted)
    )
    lengths = torch.tensor([len(sequence) for sequence in asking])
    real = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(cfg.device)
    padding = None if bool((lengths == tokens.shape[1]).all()) else real
    rows = precise(model(tokens, attention_mask=padding, readout=(places + cfg.readout_shift).clamp(min=0)))

    allowed = forbid_mask(rows.clone(), cfg.mask_token_id)
    certainties, choices = allowed.softmax(-1).max(-1)
    probability, choice = require_numbers(certainties, cfg.dtype).tolist(), choices.tolist()
    turns: list[tuple[_Answer, int, tuple[int, int]]] = []  # whose, at which position, and where in `rows`
    for i, answers in enumerate(asking.values()):
        row = {at: (i, k) for k, at in enumerate(wanted[i])}
        certainty = dict(zip(wanted[i], probability[i], strict=False))  # without the padding
        turns += [(answer, at, row[at]) for answer in answers for at in answer.turn(certainty)]
    read = _read(rows, {(*row, answer.true_token(at)) for answer, at, row in turns if answer.truth})
    for answer, at, (i, k) in turns:
        if answer.truth:
            answer.fill(at, answer.true_token(at), *read[i, k, answer.true_token(at)])
        else:
            answer.fill(at, choice[i][k], math.log(probability[i][k]), 0)


def _read(
    rows: Float[Tensor, "sequence row d_vocab"], tokens: Collection[tuple[int, int, int]]
) -> dict[tuple[int, int, int], tuple[float, int]]:
    """Return the log-probability and the rank of some tokens, each given as (sequence, row, token)."""
    if not tokens:
        return {}
    sequence, row, token = torch.tensor(list(tokens), device=rows.device).T
    logits = rows[sequence, row]
    log_probability = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    beaten_by = (logits >= logits.gather(1, token[:, None])).sum(1)  # the token itself included
    return dict(zip(tokens, zip(log_probability.tolist(), beaten_by.tolist(), strict=True), strict=True))


def infill(model: HookedModel, queries: Sequence[Query], order: Order = "confidence") -> list[Filled]:
    """Fill in the likeliest tokens in place of every query's answer, as many as the answer has. What a causal model's
    query holds there is not read.

    Raises:
        UserError: there are no queries, the order is unknown, or a causal model is to fill in another order than from
            the left.
    """
    model = hooked(model)
    require_one_of("order", order, ORDERS)
    if order not in orders(model.cfg):
        raise UserError(f"order: {order!r} needs bidirectional attention; fill a causal model's answer 'left_to_right'")
    return fill(model, [Filling(query, order) for query in queries])


def infill_any_length(
    model: HookedModel,
    queries: Sequence[Query],
    order: Order = "confidence",
    *,
    longest: int,
    ends: Sequence[Collection[int]] = (),
) -> list[Filled]:
    """Return what a model fills in when the answer's number of tokens is not known.

    An MDM fills in every number of masks from 1 to `longest`, and the filling with the highest mean log-probability per
    token is taken (each token's as it was filled in; the shortest of equals). A causal model goes on until the end of
    the answer, or until `longest` tokens and one more. Only what the context holds is tried.

    Args:
        ends: For each query of a causal model, the tokens that end the answer: what follows it in the sentence.

    Raises:
        UserError: as :func:`infill`; `longest` is below 1, or a causal model is not told the ends.
    """
    model = hooked(model)
    if longest < 1:
        raise UserError(f"longest: {longest} tokens are no answer; use at least 1")
    if model.cfg.is_causal and len(ends) != len(queries):
        raise UserError(f"ends: {len(ends)} for {len(queries)} queries of a causal model; give one for each")
    tried = [attempts(query, longest, model.cfg) for query in queries]
    filled = iter(infill(model, [attempt for of_query in tried for attempt in of_query], order))
    ends = ends if model.cfg.is_causal else [()] * len(queries)
    return [
        settle(list(itertools.islice(filled, len(of_query))), end) for of_query, end in zip(tried, ends, strict=True)
    ]


def attempts(query: Query, longest: int, cfg: ModelConfig) -> list[Query]:
    """Return what is filled in where the answer's number of tokens, at most `longest`, is not known: every number of
    masks that the context holds, or, in a causal model, one more than the longest."""
    if cfg.is_causal:
        return [_resized(query, min(longest + 1, cfg.n_ctx - query.answer_span[0]))]
    room = cfg.n_ctx - len(query.tokens) + len(query.answer)
    return [_resized(query, length) for length in range(1, min(longest, room) + 1)]


def settle(filled: Sequence[Filled], ends: Collection[int] = ()) -> Filled:
    """Return the answer that :func:`attempts` came to: the one with the highest mean log-probability per token, the
    shortest of equals, up to the first token that ends it."""
    best = max(filled, key=lambda answer: sum(answer.log_probabilities) / len(answer.log_probabilities))
    length = next((i for i, token in enumerate(best.tokens) if token in ends), len(best.tokens))
    return Filled(best.tokens[:length], best.log_probabilities[:length])


def _resized(query: Query, length: int) -> Query:
    """Return the query with `length` tokens to answer, all of them what its answer's first place holds: the mask, or
    what a causal model does not see."""
    (start, stop), (first, last) = query.answer_span, query.source_span
    moved = length - (stop - start) if first >= stop else 0
    blanks = (query.tokens[start],) * length
    tokens = (*query.tokens[:start], *blanks, *query.tokens[stop:])
    return Query(tokens, blanks, (start, start + length), (first + moved, last + moved))
