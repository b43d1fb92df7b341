"""What a model answers about facts in natural language, forward and in reverse, beside what other facts' answers get.

asked = questions(model, {kind: make_prompts(table, model.tokenizer, model.cfg, kind)})
answers = answer_all(model, asked)
answers["confidence", "known", "rank"].effect    # [question]; `null`: of another fact's answer
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mdm_interp.data.prompts import Kind, Prompts, encode, render, right_answers
from mdm_interp.data.queries import Direction, Query, QueryPair
from mdm_interp.inference.likelihood import bound
from mdm_interp.inference.prediction import Filled, Filling, Order, attempts, fill, orders, settle
from mdm_interp.measures.nulls import draw, of_unrelated_facts
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast, Estimate
from mdm_interp.stats.resampling import FactSample

Side = Literal["left", "right"]
Length = Literal["known", "unknown"]
"""Whether the model is told how many tokens the answer has."""
Measure = Literal["exact match", "log-likelihood", "rank"]
Way = Order | Literal["bound"]
"""An order of filling an answer in, or the masked-diffusion bound, which takes all of them."""
Answers = Contrast[Float[ndarray, "question"]]
"""What each question's answer gets; null: what another fact's answer gets, NaN where there is none."""


@dataclass(frozen=True)
class Question:
    """One query, and what it asks."""

    query: Query
    pair: QueryPair
    """The pair that it is of."""
    kind: Kind
    direction: Direction
    asked: Side
    """Which entity of the fact is the answer."""
    ends: frozenset[int] = frozenset()
    """For a causal model: the tokens that end the answer."""


def questions(model: HookedModel, prompts: Mapping[Kind, Prompts]) -> list[Question]:
    """Return both queries of every pair."""
    model, asked = hooked(model), []
    for kind, of_kind in prompts.items():
        for pair, template in zip(of_kind.pairs, of_kind.templates, strict=True):
            for direction in get_args(Direction):
                query = pair.forward if direction == "forward" else pair.reverse
                swapped = direction == "reverse" and not pair.shared
                side: Side = ("left" if pair.side == "right" else "right") if swapped else pair.side
                ends = sentence_ends(of_kind, model.tokenizer, pair, template, direction) if model.cfg.is_causal else ()
                asked.append(Question(query, pair, kind, direction, side, frozenset(ends)))
    return asked


def sentence_ends(prompts: Prompts, tokenizer: Any, pair: QueryPair, template: int, direction: Direction) -> set[int]:
    """Return the token that follows a causal query's answer in its sentence, and the token that ends a text.

    Args:
        pair: Of the prompts.
        template: The number of its template.
    """
    table = prompts.table
    values, stated = table.rows[pair.fact], table.templates.templates[template]
    sentence, query = (stated.forward, pair.forward) if direction == "forward" else (stated.reverse, pair.reverse)
    if direction == "reverse" and prompts.kind == "positional":
        left, right = table.templates.entities
        sentence, values = stated.forward, {**values, left: values[right], right: values[left]}
    tokens = encode(tokenizer, *render(sentence, values), prompts.chat)[0]["input_ids"]
    after = tokens[query.answer_span[1] : query.answer_span[1] + 1]
    return {*after, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}


def other_answers(asked: Sequence[Question], *, same_length: bool) -> list[list[tuple[int, ...]]]:
    """List for every question the answers that unrelated facts give to other sources. They are the null.

    Args:
        same_length: Whether only those with as many tokens as its own answer are listed.
    """
    given = [(question.query.source, question.query.answer) for question in asked]
    others = of_unrelated_facts([question.pair for question in asked], [question.asked for question in asked], given)
    return [
        [answer for _, answer in of_others if not same_length or len(answer) == len(question.query.answer)]
        for question, of_others in zip(asked, others, strict=True)
    ]


def with_answer(query: Query, answer: tuple[int, ...], causal: bool) -> Query:
    """Return the query with another true answer of the same length; a causal model's holds it unmasked."""
    tokens = (*query.tokens[: query.answer_span[0]], *answer) if causal else query.tokens
    return replace(query, tokens=tokens, answer=answer)


def answer_all(model: HookedModel, asked: Sequence[Question]) -> dict[tuple[Way, Length, Measure], Answers]:
    """Ask all questions in every order of filling in their answers, for every measure: whether the answer is filled in
    if the model is told its length and if it is not, the answer's log-likelihood (nats), and the rank of its worst
    token. The null of an exact match is the share of other facts' answers that were filled in. Of an MDM the bound on
    the log-likelihood is estimated, too (:func:`~mdm_interp.inference.likelihood.bound`).

    Questions that are the same to the model are asked once.
    """
    # Shortest first: neighbours need little padding.
    different = sorted({(q.query, q.ends): q for q in asked}.values(), key=lambda question: len(question.query.tokens))
    place = {(question.query, question.ends): i for i, question in enumerate(different)}
    at = [place[question.query, question.ends] for question in asked]
    return {name: Contrast(found.effect[at], found.null[at]) for name, found in _answered(hooked(model), different)}


N_DRAWS, SEED = 8, 0
"""Of the masks for the bound."""


def _answered(model: HookedModel, asked: Sequence[Question]) -> Iterator[tuple[tuple[Way, Length, Measure], Answers]]:
    alike, every = (other_answers(asked, same_length=same) for same in (True, False))
    controls = {
        i: with_answer(asked[i].query, answer, model.cfg.is_causal)
        for i, answer in enumerate(draw(alike, seed=0))
        if answer is not None
    }
    queries = [question.query for question in asked]
    longest = max(len(query.answer) for query in queries)
    tried = [attempts(query, longest, model.cfg) for query in queries]
    asked_for = (queries, [attempt for of_query in tried for attempt in of_query], [*queries, *controls.values()])
    fillings = [
        Filling(query, order, truth=asked_of is asked_for[2])
        for order in orders(model.cfg)
        for asked_of in asked_for
        for query in asked_of
    ]
    filled = iter(fill(model, fillings))
    for order in orders(model.cfg):
        known = [next(filled) for _ in queries]
        yield (order, "known", "exact match"), matches(known, queries, alike)
        guessed = [
            settle([next(filled) for _ in of_query], question.ends)
            for of_query, question in zip(tried, asked, strict=True)
        ]
        yield (order, "unknown", "exact match"), matches(guessed, queries, every)
        read = [next(filled) for _ in asked_for[2]]
        log_probability = np.array([sum(answer.log_probabilities) for answer in read])
        rank = np.array([float(max(answer.ranks)) for answer in read])
        yield (order, "known", "log-likelihood"), _split(log_probability, list(controls), len(queries))
        yield (order, "known", "rank"), _split(rank, list(controls), len(queries))
    if not model.cfg.is_causal:
        told = [*queries, *controls.values()]
        found = bound(model, [q.statement for q in told], [q.answer_span for q in told], n_draws=N_DRAWS, seed=SEED)
        yield ("bound", "known", "log-likelihood"), _split(found.value.numpy(), list(controls), len(queries))


def _split(values: Float[ndarray, "read"], controlled: Sequence[int], n: int) -> Answers:
    """Split what was read: first of `n` questions, then of the controls of some."""
    null = np.full(n, np.nan)
    null[controlled] = values[n:]
    return Contrast(values[:n], null)


def matches(filled: Sequence[Filled], queries: Sequence[Query], others: Sequence[Sequence[tuple[int, ...]]]) -> Answers:
    """Return whether each filling is the answer, or another that the facts give to the same words; null: the share of
    other facts' answers that it is."""
    own = [float(answer.tokens in right) for answer, right in zip(filled, right_answers(queries), strict=True)]
    share = [
        names.count(answer.tokens) / len(names) if names else np.nan
        for answer, names in zip(filled, others, strict=True)
    ]
    return Contrast(np.array(own), np.array(share))


def mean_over_facts(sample: FactSample, values: Float[ndarray, "question"], measure: Measure) -> Estimate:
    """Estimate the mean over facts of the mean of each fact's questions; of ranks the geometric mean, since a few of
    them are far larger than the others."""
    if measure != "rank":
        return sample.mean(torch.from_numpy(values)).estimates()[0]
    log = sample.mean(torch.from_numpy(values).log()).estimates()[0]
    return Estimate(math.exp(log.value), math.exp(log.low), math.exp(log.high), log.n)
