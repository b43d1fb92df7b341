"""Answers read and filled in, in every order, against loops over one query at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import SHAPE, native_peer

from mdm_interp.config import FactConfig
from mdm_interp.data.queries import Query, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import (
    ORDERS,
    Filled,
    Filling,
    Order,
    attempts,
    compare_answers,
    fill,
    infill,
    infill_any_length,
    orders,
    predict,
    query_loss,
    split_by_role,
    token_log_probabilities,
)
from mdm_interp.measures.gradients.gram import gram
from mdm_interp.models.transformer import HookedTransformer

MASK = 12


def mdm(shift: int = 0, **changes: Any) -> HookedTransformer:
    return random_model(mask_token_id=MASK, readout_shift=shift, dtype="float64", d_mlp=24, **changes)


def arm(**changes: Any) -> HookedTransformer:
    return random_model(attention="causal", dtype="float64", d_mlp=24, **changes)


def ask(
    seed: int, *, length: int = 9, start: int = 3, span: int = 3, source: int | None = None, mask: bool = True
) -> Query:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(12, (length,), generator=generator).tolist()
    answer = tokens[start : start + span]
    if mask:
        tokens[start : start + span] = [MASK] * span
    at = (start - 2 if start >= 2 else start + span) if source is None else source
    return Query(tuple(tokens), tuple(answer), (start, start + span), (at, at + 1))


MIXED = [
    ask(0),
    ask(1, length=6, start=1, span=2, source=4),
    ask(2, length=11, start=6, span=4, source=1),
    ask(3, length=5, start=2, span=1),
    ask(4, length=7, start=5, span=2, source=0),
]
CAUSAL = [
    ask(seed, length=start + span, start=start, span=span, source=0, mask=False)
    for seed, (start, span) in enumerate([(3, 3), (2, 1), (5, 4), (1, 2)])
]


def log_probs(model: HookedTransformer, tokens: list[int], at: int) -> torch.Tensor:
    """Of the token at one position, every token in the vocabulary."""
    shift = model.cfg.readout_shift
    assert shift is not None
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, at + shift].log_softmax(-1)


def by_hand(
    model: HookedTransformer, query: Query, order: Order, truth: bool
) -> tuple[tuple[int, ...], list[float], list[int]]:
    """Tokens, log-probabilities and ranks of the answer, filled in by the model or with the truth."""
    tokens, left = list(query.tokens), list(range(*query.answer_span))
    done: dict[int, tuple[int, float, int]] = {}
    while left:
        seen = {at: log_probs(model, tokens, at) for at in left}
        allowed = {at: row.clone() for at, row in seen.items()}
        if not truth or order == "confidence":
            for row in allowed.values():
                if model.cfg.mask_token_id is not None:
                    row[MASK] = -torch.inf
        renormalised = {at: row.log_softmax(-1) for at, row in allowed.items()}
        turn = list(left)
        if order != "one_shot":
            turn = [max(left, key=lambda at: float(renormalised[at].max()))] if order == "confidence" else [left[0]]
        for at in turn:
            true = query.answer[at - query.answer_span[0]]
            token = true if truth else int(renormalised[at].argmax())
            rank = int((seen[at] >= seen[at][token]).sum())
            done[at] = token, float(seen[at][token] if truth else renormalised[at][token]), rank
            left.remove(at)
        for at in turn:
            tokens[at] = done[at][0]
    answers = [done[at] for at in sorted(done)]
    return tuple(a[0] for a in answers), [a[1] for a in answers], [a[2] for a in answers]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shift", [0, -1])
def test_an_mdms_answers_are_read_as_by_hand(order: Order, shift: int) -> None:
    """Batched and padded, against one query at a time."""
    model = mdm(shift)
    read = predict(model, MIXED, order)
    for row, query in enumerate(MIXED):
        _, logs, ranks = by_hand(model, query, order, truth=True)
        assert float(read.log_probability[row]) == pytest.approx(sum(logs), abs=1e-9)
        assert int(read.rank[row]) == max(ranks)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shift", [0, -1])
def test_an_mdm_fills_in_as_by_hand(order: Order, shift: int) -> None:
    model = mdm(shift)
    for query, filled in zip(MIXED, infill(model, MIXED, order), strict=True):
        tokens, logs, _ = by_hand(model, query, order, truth=False)
        assert filled.tokens == tokens
        assert filled.log_probabilities == pytest.approx(logs, abs=1e-5)


def test_a_causal_model_is_read_in_one_pass_and_continues_greedily() -> None:
    model = arm()
    read = predict(model, CAUSAL, "left_to_right")
    assert torch.equal(read.log_probability, predict(model, CAUSAL).log_probability)
    for row, (query, filled) in enumerate(zip(CAUSAL, infill(model, CAUSAL, "left_to_right"), strict=True)):
        _, logs, ranks = by_hand(model, query, "left_to_right", truth=True)
        assert float(read.log_probability[row]) == pytest.approx(sum(logs), abs=1e-9)
        assert int(read.rank[row]) == max(ranks)
        tokens, logs, _ = by_hand(model, query, "left_to_right", truth=False)
        assert filled.tokens == tokens
        assert filled.log_probabilities == pytest.approx(logs, abs=1e-5)


def test_a_causal_model_does_not_see_the_answer_it_is_asked_for() -> None:
    model, query = arm(), CAUSAL[0]
    start, _ = query.answer_span
    other = Query((*query.tokens[:start], 0, 0, 0), (0, 0, 0), query.answer_span, query.source_span)
    assert infill(model, [query], "left_to_right") == infill(model, [other], "left_to_right")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    start=st.integers(1, 5),
    span=st.integers(1, 4),
    after=st.integers(0, 3),
    order=st.sampled_from(ORDERS),
    shift=st.sampled_from([0, -1]),
)
def test_an_answer_is_correct_exactly_if_it_is_filled_in(
    seed: int, start: int, span: int, after: int, order: Order, shift: int
) -> None:
    """A model's own answer has rank 1 in the order it was filled in, and as much log-probability."""
    model = random_model(readout_shift=shift, dtype="float64")  # knows no mask, so that every token is a choice
    query = ask(seed, length=start + span + after, start=start, span=span, source=0)
    (own,) = infill(model, [query], order)
    told = Query(query.tokens, own.tokens, query.answer_span, query.source_span)
    read = predict(model, [told, query], order)
    assert read.correct.tolist() == [True, own.tokens == query.answer]
    assert float(read.log_probability[0]) == pytest.approx(sum(own.log_probabilities), abs=1e-4)


@pytest.mark.parametrize("shift", [0, -1])
def test_one_token_is_the_same_in_every_order(shift: int) -> None:
    model, query = mdm(shift), ask(3, start=4, span=1)
    reads = [predict(model, [query], order) for order in ORDERS]
    assert len({float(read.log_probability) for read in reads}) == 1
    assert len({infill(model, [query], order)[0] for order in ORDERS}) == 1


@pytest.mark.parametrize("make", [mdm, arm])
def test_what_is_the_same_to_the_model_is_asked_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all orders and lengths, beside a second answer to the same words; nothing that is filled is asked again."""
    model = make()
    (query,), known = (CAUSAL[:1] if make is arm else MIXED[:1]), orders(model.cfg)
    other = replace(query, answer=(1, 1, 1), tokens=(*query.tokens[:3], 1, 1, 1) if make is arm else query.tokens)
    asked = [Filling(one, order, truth) for one in (query, other) for order in known for truth in (True, False)]
    asked += [Filling(tried, order) for order in known for tried in attempts(query, 3, model.cfg)]
    expected, passed = [fill(model, [filling])[0] for filling in asked], []
    forward = type(model).forward

    def counting(self: Any, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None, **given: Any) -> Any:
        lengths = attention_mask.sum(1) if attention_mask is not None else [tokens.shape[1]] * len(tokens)
        passed.extend(tuple(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True))
        return forward(self, tokens, attention_mask=attention_mask, **given)

    monkeypatch.setattr(type(model), "forward", counting)
    for found, alone in zip(fill(model, asked), expected, strict=True):
        assert (found.tokens, found.ranks) == (alone.tokens, alone.ranks)
        assert found.log_probabilities == pytest.approx(alone.log_probabilities, abs=1e-9)
    assert len(passed) == len(set(passed))


# ---- the number of tokens unknown


def resized(query: Query, length: int) -> Query:
    start, stop = query.answer_span
    tokens = (*query.tokens[:start], *[MASK] * length, *query.tokens[stop:])
    moved = length - (stop - start) if query.source_span[0] >= stop else 0
    source = (query.source_span[0] + moved, query.source_span[1] + moved)
    return Query(tokens, (0,) * length, (start, start + length), source)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shift", [0, -1])
def test_every_length_is_tried_and_the_likeliest_per_token_is_taken(order: Order, shift: int) -> None:
    model = mdm(shift, n_ctx=16)
    found = infill_any_length(model, MIXED, order, longest=4)
    lengths = set()
    for query, filled in zip(MIXED, found, strict=True):
        tried = [by_hand(model, resized(query, length), order, truth=False) for length in range(1, 5)]
        tokens, logs, _ = max(tried, key=lambda answer: sum(answer[1]) / len(answer[1]))
        assert filled.tokens == tokens
        assert filled.log_probabilities == pytest.approx(logs, abs=1e-5)
        lengths.add(len(tokens))
    assert len(lengths) > 1


def test_lengths_that_the_context_does_not_hold_are_not_tried() -> None:
    model = mdm(n_ctx=9)
    query = ask(0)  # 6 tokens beside its answer
    assert infill_any_length(model, [query], longest=20) == infill_any_length(model, [query], longest=3)
    causal = arm(n_ctx=8)
    (written,) = infill_any_length(causal, CAUSAL[:1], "left_to_right", longest=20, ends=[()])
    assert len(written.tokens) == 5  # from position 3


def test_a_causal_model_goes_on_until_the_end_of_the_answer() -> None:
    model = arm(n_ctx=16)
    query = CAUSAL[0]
    (whole,) = infill_any_length(model, [query], "left_to_right", longest=5, ends=[()])
    assert len(whole.tokens) == 6
    tokens = list(query.tokens[:3])
    for token in whole.tokens:
        assert token == int(log_probs(model, [*tokens, 0], len(tokens)).argmax())
        tokens.append(token)
    for end in set(whole.tokens):
        (cut,) = infill_any_length(model, [query], "left_to_right", longest=5, ends=[{end}])
        at = whole.tokens.index(end)
        assert cut == Filled(whole.tokens[:at], whole.log_probabilities[:at])


# ---- precision, bridges, and what is refused


def test_half_precision_logits_are_normalised_in_full_precision() -> None:
    model = random_model(mask_token_id=MASK)
    batch = collate([MIXED[0]], model.cfg)
    logits = model(batch.tokens).detach().bfloat16()
    assert query_loss(logits, batch).dtype == torch.float32
    torch.testing.assert_close(query_loss(logits, batch), query_loss(logits.double(), batch).float())


@pytest.mark.parametrize("order", ORDERS)
def test_a_bridge_answers_alike(order: Order) -> None:
    model = random_model(**SHAPE, rotary_adjacent_pairs=True)
    bridge = native_peer(model)
    ours, theirs = predict(model, MIXED, order), predict(bridge, MIXED, order)
    torch.testing.assert_close(ours.log_probability, theirs.log_probability, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.rank, theirs.rank)
    assert [a.tokens for a in infill(model, MIXED, order)] == [a.tokens for a in infill(bridge, MIXED, order)]


def test_what_cannot_be_asked_is_refused() -> None:
    assert orders(arm().cfg) == ("left_to_right",) and orders(mdm().cfg) == ORDERS
    with pytest.raises(UserError, match=r"order: 'confidence' needs bidirectional attention"):
        predict(arm(), CAUSAL, "confidence")
    for order in ("one_shot", "confidence"):
        with pytest.raises(UserError, match=f"order: '{order}' needs bidirectional attention"):
            infill(arm(), CAUSAL, order)
    with pytest.raises(UserError, match=r"longest: 0 tokens are no answer; use at least 1"):
        infill_any_length(mdm(), MIXED, longest=0)
    with pytest.raises(UserError, match=r"ends: 0 for 4 queries of a causal model"):
        infill_any_length(arm(), CAUSAL, "left_to_right", longest=2)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query((1, 2, MASK), (13,), (2, 3), (0, 1)), r"answer: id 13 at \[1, 0\] is outside the vocabulary of 13"),
        (Query((1, 2, MASK), (-1,), (2, 3), (0, 1)), r"answer: id -1 at \[1, 0\] is outside the vocabulary of 13"),
        (Query((1, 40, MASK), (3,), (2, 3), (0, 1)), r"tokens: id 40 at \[1, 1\] is outside the vocabulary of 13"),
    ],
)
def test_a_query_of_another_vocabulary_is_refused_wherever_it_is_asked(query: Query, message: str) -> None:
    """Where gradients are asked for, too."""
    model, asked = mdm(), [MIXED[3], query]
    for measure in (predict, gram):
        with pytest.raises(UserError, match=message):
            measure(model, asked)


# ---- tokens of one's choice


@pytest.mark.parametrize(("model", "queries"), [(mdm(-1), MIXED), (arm(), CAUSAL)], ids=["MDM", "ARM"])
def test_how_likely_tokens_are_is_read_where_the_answer_starts(model: HookedTransformer, queries: list[Query]) -> None:
    """Batched and padded, against one query at a time."""
    tokens = torch.tensor([[3, 11, query.answer[0]] for query in queries])
    read = token_log_probabilities(model, queries, tokens)
    for row, query, chosen in zip(read, queries, tokens, strict=True):
        told = log_probs(model, list(query.tokens), query.answer_span[0])
        torch.testing.assert_close(row, told[chosen], atol=1e-9, rtol=0)


def test_tokens_stay_with_their_queries_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = mdm(), torch.arange(len(MIXED))[:, None]
    whole = token_log_probabilities(model, MIXED, tokens)
    monkeypatch.setattr("mdm_interp.data.queries.MAX_LOGITS", 2 * 11 * 13)  # two queries at a time
    torch.testing.assert_close(token_log_probabilities(model, MIXED, tokens), whole)


@pytest.mark.parametrize("objective", ["any_order", "causal"])
def test_an_answer_is_split_into_its_role_and_itself_within_it(objective: Any) -> None:
    """By hand from whole predictions: a role is all its entities' probabilities."""
    world = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
    facts, causal = world.config, objective == "causal"
    shape = {"d_vocab": facts.d_vocab, "n_ctx": facts.seq_len, "mask_token_id": facts.mask_token_id}
    model = random_model(**shape, attention="causal" if causal else "bidirectional")
    for kind in ("forward", "reverse"):
        queries = [getattr(pair, kind) for pair in world.query_pairs(objective, n_contexts=1)]
        among = [
            predict(model, [replace(query, answer=(entity,)) for entity in world.role(query.answer[0])]).probability
            for query in queries
        ]
        role, answer = torch.stack(among).sum(1), predict(model, queries).probability
        found = split_by_role(model, queries, world.candidates(queries))
        torch.testing.assert_close(found.role.exp(), role)
        torch.testing.assert_close(found.answer.exp(), answer)
        torch.testing.assert_close(found.in_role.exp(), answer / role)


def test_what_both_queries_are_answered_is_compared() -> None:
    """By hand from whole predictions; what is lost adds up over both parts."""
    world = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
    facts, pairs, logs = world.config, world.query_pairs(n_contexts=1), {}
    shape = {"d_vocab": facts.d_vocab, "n_ctx": facts.seq_len, "mask_token_id": facts.mask_token_id}
    model = random_model(**shape, position="rope")
    found = compare_answers(model, pairs, world)
    for kind in ("forward", "reverse"):
        queries = [getattr(pair, kind) for pair in pairs]
        split = split_by_role(model, queries, world.candidates(queries))
        answer = predict(model, queries).probability
        assert found[f"{kind}_probability"] == pytest.approx(answer.mean().item(), rel=1e-5)
        assert found[f"{kind}_role"] == pytest.approx(split.role.exp().mean().item(), rel=1e-5)
        assert found[f"{kind}_in_role"] == pytest.approx((answer / split.role.exp()).mean().item(), rel=1e-5)
        logs[kind] = split.role.mean().item(), answer.log().mean().item()
    assert found["gap_role"] == pytest.approx(logs["forward"][0] - logs["reverse"][0], abs=1e-5)
    assert found["gap_role"] + found["gap_in_role"] == pytest.approx(logs["forward"][1] - logs["reverse"][1], abs=1e-5)
    reverse = [pair.reverse for pair in pairs]
    rivals = world.rivals(reverse).tolist()
    instead = [replace(query, answer=tuple(rival)) for query, rival in zip(reverse, rivals, strict=True)]
    assert found["rival_probability"] == pytest.approx(predict(model, instead).probability.mean().item(), rel=1e-5)
