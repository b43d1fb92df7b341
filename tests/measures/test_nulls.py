"""Which other fact a null takes, by each rule, and never the own where there is another."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm_interp.config import FactConfig
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.measures.nulls import draw, draw_other_facts, next_answers, of_unrelated_facts, other_facts, two_before

FACTS = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)


@pytest.mark.parametrize("objective", ["any_order", "source_only", "target_only"])
def test_other_facts_meet_every_other_fact_of_a_side_once(objective: Any) -> None:
    pairs = FACTS.query_pairs(objective, n_contexts=1)
    met = [(i, j) for other in other_facts(pairs) for i, j in enumerate(other.tolist())]
    expected = {
        (i, j)
        for i, one in enumerate(pairs)
        for j, two in enumerate(pairs)
        if one.side == two.side and one.fact != two.fact
    }
    assert len(met) == len(expected) and set(met) == expected


def test_other_facts_never_gives_a_pair_its_own_where_sides_are_unequal() -> None:
    pairs = [*FACTS.query_pairs("source_only", n_contexts=1)[:2], *FACTS.query_pairs("target_only", n_contexts=1)[:5]]
    drawn = list(other_facts(pairs))
    assert len(drawn) == 4
    for other in drawn:
        assert all(pairs[at].fact != pair.fact for pair, at in zip(pairs, other.tolist(), strict=True))
        assert all(pairs[at].side == pair.side for pair, at in zip(pairs, other.tolist(), strict=True))


def test_other_facts_of_several_contexts_meet_in_the_same_context() -> None:
    """Contexts come one after the other, fact by fact."""
    pairs = FACTS.query_pairs(n_contexts=3)
    first = next(iter(other_facts(pairs))).tolist()
    assert first == [(i - 6) % len(pairs) for i in range(len(pairs))]
    for other in other_facts(pairs):
        assert sorted(other.tolist()) == list(range(len(pairs)))
        assert all(pairs[at].fact != pair.fact for pair, at in zip(pairs, other.tolist(), strict=True))
        assert all(pairs[at].side == pair.side for pair, at in zip(pairs, other.tolist(), strict=True))


def test_other_facts_need_another_fact_of_each_side() -> None:
    pairs = [*FACTS.query_pairs("source_only", n_contexts=1)[:1], *FACTS.query_pairs("target_only", n_contexts=1)[:3]]
    with pytest.raises(UserError, match="query_pairs: one fact is asked for its left entity"):
        list(other_facts(pairs))


@given(seed=st.integers(0, 99))
def test_a_drawn_fact_is_another_and_alike(seed: int) -> None:
    pairs = FACTS.query_pairs(n_contexts=2)
    drawn = draw_other_facts(pairs, lambda pair: pair.side, seed)
    assert drawn == draw_other_facts(pairs, lambda pair: pair.side, seed)
    for pair, other in zip(pairs, drawn, strict=True):
        assert other is not None
        assert pairs[other].fact != pair.fact and pairs[other].side == pair.side


def test_every_fact_that_is_alike_is_drawn_at_some_time_and_none_where_there_is_none() -> None:
    pairs = FACTS.query_pairs("source_only", n_contexts=1)[:4]
    met = {draw_other_facts(pairs, lambda pair: pair.side, seed)[0] for seed in range(100)}
    assert met == {1, 2, 3}
    assert draw_other_facts(pairs, lambda pair: pair.fact, seed=0) == [None] * 4


def test_one_of_each_is_drawn_from_what_there_is() -> None:
    drawn = [draw([[1, 2, 3], [], [4]], seed) for seed in range(50)]
    assert {first for first, _, _ in drawn} == {1, 2, 3}
    assert all(rest == [None, 4] for _, *rest in drawn)
    assert draw([[1, 2, 3], [], [4]], seed=7) == drawn[7]


@pytest.mark.parametrize(("objective", "facts_before"), [("any_order", 1), ("source_only", 2), ("target_only", 2)])
def test_two_pairs_before_is_another_fact_asked_for_the_same_side(objective: Any, facts_before: int) -> None:
    pairs = FACTS.query_pairs(objective, n_contexts=1)
    for pair, other in zip(pairs, two_before(pairs).tolist(), strict=True):
        assert pairs[other].side == pair.side
        assert (pair.fact - pairs[other].fact) % len(FACTS.facts) == facts_before


def test_the_next_answer_is_the_first_rival_after_the_own_and_starts_again() -> None:
    rivals = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert next_answers(torch.tensor([1, 2, 0, 2]), rivals).tolist() == [3, 0, 3, 2]


def test_unrelated_facts_share_no_name_even_through_others_and_answer_for_the_same_side() -> None:
    """The first three connect through 5 and 1, the last two through 8; what a cluster has twice is listed once."""
    asked: list[tuple[int, int, Literal["left", "right"]]]
    asked = [(1, 5, "left"), (2, 5, "left"), (1, 6, "left"), (3, 7, "right"), (9, 8, "left"), (8, 10, "left")]
    pairs = [
        QueryPair(query, query, fact, side)
        for fact, (answer, source, side) in enumerate(asked)
        for query in [Query((source, 4, 0), (answer,), (2, 3), (0, 1))]
    ]
    listed = of_unrelated_facts(pairs, [pair.side for pair in pairs], [pair.forward.source for pair in pairs])
    assert listed == [[(8,), (10,)]] * 3 + [[]] + [[(5,), (6,)]] * 2
