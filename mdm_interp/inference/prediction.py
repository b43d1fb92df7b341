"""What a model answers to a query: log-probability and rank of the true answer, and the answer it fills in itself.

An answer of several tokens is read or filled in one of three orders:

    one_shot        every token from one pass, as if the others were unknown
    confidence      one token per pass, first the one whose likeliest token is most probable
    left_to_right   one token per pass, from the left

A causal model knows the last only, and reads a true answer in one pass: it sees each token after predicting it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import Query, QueryBatch, QueryPair, answer_positions, batches
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.inference.denoising import FillOrder, fill_blanks
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel

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
    return -(chosen * batch.answered).sum(-1)


@torch.no_grad()
def predict(model: HookedModel, queries: Sequence[Query], order: Order = "one_shot") -> Prediction:
    """Ask `model` every query.

    Beyond `one_shot`, each token is read when its turn comes, beside the true tokens of the turns before it. In order
    of `confidence` the turn goes to where the model's own likeliest token is most probable. So the answer is `correct`
    if :func:`infill` in the same order fills it in, unless it is in a tie or the mask token is likelier still.

    Raises:
        UserError: a causal model is asked in order of confidence.
    """
    model = hooked(model)
    if model.cfg.is_causal and order == "confidence":
        raise UserError("order: 'confidence' needs bidirectional attention; read a causal model 'left_to_right'")
    log_probability, rank = [], []
    for batch in batches(queries, model.cfg):
        total, worst = torch.zeros(len(batch.tokens)), torch.zeros(len(batch.tokens), dtype=torch.long)
        for logits, read in _readings(model, batch, order):
            total = total - query_loss(logits, replace(batch, answered=read)).cpu()
            rows = batch.at_readout(logits)
            beaten_by = (rows >= rows.gather(-1, batch.answer[..., None])).sum(-1)  # the answer itself included
            worst = torch.maximum(worst, (beaten_by * read).amax(-1).cpu())
        log_probability.append(total)
        rank.append(worst)
    return Prediction(torch.cat(log_probability), torch.cat(rank))


@torch.no_grad()
def token_log_probabilities(
    model: HookedModel, queries: Sequence[Query], tokens: Int[Tensor, "query token"]
) -> Float[Tensor, "query token"]:
    """Read how likely each query's tokens are as its answer, in nats; where answers have several, as their first."""
    model, read = hooked(model), []
    for batch in batches(queries, model.cfg):
        chosen, tokens = tokens[: len(batch.tokens)], tokens[len(batch.tokens) :]
        rows = batch.at_readout(model(batch.tokens, attention_mask=batch.attention_mask))[:, 0]
        told = rows.log_softmax(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        read.append(told.gather(1, chosen.to(told.device)).cpu())
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


def _readings(
    model: HookedModel, batch: QueryBatch, order: Order
) -> Iterator[tuple[Tensor, Bool[Tensor, "query span"]]]:
    """Give the logits of each pass, and the answer tokens that are read from it."""
    if order == "one_shot" or model.cfg.is_causal:
        yield model(batch.tokens, attention_mask=batch.attention_mask), batch.answered
        return
    blank, truth = _blanks(batch, model.cfg)
    for step in fill_blanks(
        model,
        batch.tokens,
        blank,
        steps=batch.answer.shape[1],
        order=order,
        truth=truth,
        attention_mask=batch.attention_mask,
    ):
        yield step.logits, step.filled.gather(1, answer_positions(batch, model.cfg)) & batch.answered


def _blanks(batch: QueryBatch, cfg: ModelConfig) -> tuple[Bool[Tensor, "query pos"], Int[Tensor, "query pos"]]:
    """Return where answers are, and the sequences with the true answers in place."""
    rows, _ = batch.answered.nonzero(as_tuple=True)
    at = rows, answer_positions(batch, cfg)[batch.answered]
    blank, truth = torch.zeros_like(batch.tokens, dtype=torch.bool), batch.tokens.clone()
    blank[at], truth[at] = True, batch.answer[batch.answered]
    return blank, truth


@dataclass(frozen=True)
class Filled:
    """A model's own answer to one query."""

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    """Nats; of each token when it was filled in, the mask token being no choice."""


@torch.no_grad()
def infill(model: HookedModel, queries: Sequence[Query], order: Order = "confidence") -> list[Filled]:
    """Fill in the likeliest tokens in place of every query's answer, as many as the answer has. What a causal model's
    query holds there is not read.

    Raises:
        UserError: a causal model is to fill in another order than from the left.
    """
    model = hooked(model)
    cfg: ModelConfig = model.cfg
    if order not in orders(cfg):
        raise UserError(f"order: {order!r} needs bidirectional attention; fill a causal model's answer 'left_to_right'")
    fill_order: FillOrder = "left_to_right" if order == "left_to_right" else "confidence"
    answers: list[Filled] = []
    for batch in batches(queries, cfg):
        blank, _ = _blanks(batch, cfg)
        tokens, log_probs = batch.tokens, torch.zeros(blank.shape, device=blank.device)
        steps = 1 if order == "one_shot" else batch.answer.shape[1]
        for step in fill_blanks(
            model, tokens, blank, steps=steps, order=fill_order, attention_mask=batch.attention_mask
        ):
            tokens, log_probs = step.tokens, torch.where(step.filled, step.probability.log(), log_probs)
        filled, logs = (of_all.gather(1, answer_positions(batch, cfg)).tolist() for of_all in (tokens, log_probs))
        for answer, log_prob, length in zip(filled, logs, batch.answered.sum(1).tolist(), strict=True):
            answers.append(Filled(tuple(answer[:length]), tuple(log_prob[:length])))
    return answers


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
    cfg: ModelConfig = model.cfg
    if longest < 1:
        raise UserError(f"longest: {longest} tokens are no answer; use at least 1")
    if cfg.is_causal:
        if len(ends) != len(queries):
            raise UserError(f"ends: {len(ends)} for {len(queries)} queries of a causal model; give one for each")
        room = [min(longest + 1, cfg.n_ctx - query.answer_span[0]) for query in queries]
        written = infill(model, [_resized(*asked) for asked in zip(queries, room, strict=True)], order)
        return [_until(answer, end) for answer, end in zip(written, ends, strict=True)]
    best: list[Filled | None] = [None] * len(queries)
    for length in range(1, longest + 1):
        fitting = [i for i, query in enumerate(queries) if len(query.tokens) - len(query.answer) + length <= cfg.n_ctx]
        filled = infill(model, [_resized(queries[i], length) for i in fitting], order)
        for i, answer in zip(fitting, filled, strict=True):
            known = best[i]
            if known is None or _mean(answer) > _mean(known):
                best[i] = answer
    return [answer for answer in best if answer is not None]  # all of them: one mask always fits


def _mean(answer: Filled) -> float:
    return sum(answer.log_probabilities) / len(answer.log_probabilities)


def _until(answer: Filled, ends: Collection[int]) -> Filled:
    """Return the answer before the first token that ends it."""
    length = next((i for i, token in enumerate(answer.tokens) if token in ends), len(answer.tokens))
    return Filled(answer.tokens[:length], answer.log_probabilities[:length])


def _resized(query: Query, length: int) -> Query:
    """Return the query with `length` tokens to answer, all of them what its answer's first place holds: the mask, or
    what a causal model does not see."""
    (start, stop), (first, last) = query.answer_span, query.source_span
    moved = length - (stop - start) if first >= stop else 0
    blanks = (query.tokens[start],) * length
    tokens = (*query.tokens[:start], *blanks, *query.tokens[stop:])
    return Query(tokens, blanks, (start, start + length), (first + moved, last + moved))
