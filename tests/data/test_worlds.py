"""Fact worlds: who is where, and what training sees of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mdm_interp.config import FactConfig, Objective, World
from mdm_interp.data.worlds import FactBatch, FactWorld
from mdm_interp.errors import UserError

WORLDS: tuple[World, ...] = ("two_role", "relation_cycle", "symmetric_pool")

# Counts that were drawn evenly give a p-value below this once in a thousand draws; the seeds below are not such draws,
# and an uneven draw of these sizes gives 1e-10 and less.
SMALLEST_P = 1e-3

reproducible = settings(derandomize=True, database=None, deadline=None, max_examples=60)


@st.composite
def fact_configs(draw: Any) -> FactConfig:
    """Any small world that a FactConfig can describe."""
    world = draw(st.sampled_from(WORLDS))
    n_roles, per_role = draw(st.integers(2, 5)), draw(st.integers(1, 6))
    filler = draw(st.sampled_from(["none", "constant", "random"]))
    seq_len = 3 if filler == "none" else draw(st.integers(3, 9))
    low = draw(st.integers(2, seq_len - 1))
    high = draw(st.integers(low, seq_len - 1))
    return FactConfig(
        world=world,
        n_roles=n_roles,
        n_entities=per_role * (n_roles if world == "relation_cycle" else 2),
        filler=filler,
        n_filler=draw(st.integers(1, 5)),
        seq_len=seq_len,
        gap=low if low == high else (low, high),
        reversed_share=draw(st.sampled_from([0.0, 0.25, 0.5])),
    )


def sample(world: FactWorld, count: int, seed: int = 0) -> FactBatch:
    return world.sample(count, torch.Generator().manual_seed(seed))


def shown(batch: FactBatch) -> list[tuple[int, ...]]:
    """The fact each sequence shows: the token at `left`, the one after it, the token at `right`."""
    rows = torch.arange(len(batch.tokens))
    fact = [batch.tokens[rows, at] for at in (batch.left, batch.left + 1, batch.right)]
    return [tuple(row) for row in torch.stack(fact, dim=1).tolist()]


# ---- who is where


@reproducible
@given(config=fact_configs(), seed=st.integers(0, 2**31))
def test_every_world_puts_its_entities_on_the_sides_it_promises(config: FactConfig, seed: int) -> None:
    left, relation, right = FactWorld(config, seed).facts.T.tolist()
    entities, half = list(range(config.n_entities)), config.n_entities // 2
    if config.world == "two_role":
        assert sorted(left) == entities[:half] and sorted(right) == entities[half:]
    elif config.world == "symmetric_pool":
        assert sorted(left + right) == entities
    else:
        assert sorted(left) == entities and sorted(right) == entities
        per_role = config.n_entities // config.n_roles
        assert relation == [config.n_entities + entity // per_role for entity in left]
        stands_left, stands_right = dict(zip(left, relation, strict=True)), dict(zip(right, relation, strict=True))
        for entity in entities:
            assert (stands_left[entity] - stands_right[entity]) % config.n_roles == 1, entity
    if config.world != "relation_cycle":
        assert set(relation) == {config.n_entities}


@pytest.mark.parametrize("world", WORLDS)
def test_same_seed_same_world_and_other_seed_other_world(world: World) -> None:
    config = FactConfig(world=world, n_entities=60, reversed_share=0.3)
    first, again, other = FactWorld(config, 1), FactWorld(config, 1), FactWorld(config, 2)
    assert torch.equal(first.facts, again.facts) and torch.equal(first.reversed, again.reversed)
    assert first.query_pairs() == again.query_pairs()
    assert torch.equal(sample(first, 50).tokens, sample(again, 50).tokens)
    assert not torch.equal(first.facts, other.facts) and not torch.equal(first.reversed, other.reversed)


@pytest.mark.parametrize("world", WORLDS)
def test_seeds_reach_every_partner(world: World) -> None:
    """Over many seeds entity 0 meets everyone it could: nothing but the seed decides who belongs to whom."""
    partners, on_the_left = set(), 0
    for seed in range(200):
        for left, _, right in FactWorld(FactConfig(world=world, n_entities=12), seed).facts.tolist():
            if left == 0:
                partners.add(right)
            on_the_left += left == 0
    expected = {"two_role": range(6, 12), "relation_cycle": range(4, 8), "symmetric_pool": range(1, 12)}
    assert partners == set(expected[world])
    if world == "symmetric_pool":
        assert 70 < on_the_left < 130  # fair sides: 100 of 200, standard deviation 7
    else:
        assert on_the_left == 200


# ---- training sequences


@reproducible
@given(config=fact_configs(), seed=st.integers(0, 2**31))
def test_a_sequence_is_one_fact_among_filler(config: FactConfig, seed: int) -> None:
    world = FactWorld(config, seed)
    facts = {tuple(fact) for fact in world.facts.tolist()}
    swapped = {tuple(fact[::-1]) for fact in world.facts[world.reversed].tolist()}
    low, high = config.gaps
    batch = sample(world, 32, seed)
    assert batch.tokens.shape == (32, config.seq_len)
    first_filler = config.n_entities + config.n_relations
    for tokens, left, right, fact in zip(
        batch.tokens.tolist(), batch.left.tolist(), batch.right.tolist(), shown(batch), strict=True
    ):
        assert left >= 0 and right < config.seq_len and low <= right - left <= high
        assert fact in facts | swapped
        rest = [token for at, token in enumerate(tokens) if at not in (left, left + 1, right)]
        assert all(first_filler <= token < first_filler + config.filler_tokens for token in rest)
        assert config.mask_token_id not in tokens


def test_facts_places_gaps_and_filler_come_equally_often() -> None:
    config = FactConfig(n_entities=6, n_filler=5, seq_len=7, gap=(2, 4))
    world = FactWorld(config, seed=0)
    batch = sample(world, 30_000)
    facts = [tuple(fact) for fact in world.facts.tolist()]
    which = torch.tensor([facts.index(fact) for fact in shown(batch)])
    gap = batch.right - batch.left
    assert chisquare(gap.bincount()[2:]).pvalue > SMALLEST_P
    for distance in (2, 3, 4):  # every fact is at every place this often: a joint count, so also independently
        at = gap == distance
        places = config.seq_len - distance
        cells = (which[at] * places + batch.left[at]).bincount(minlength=len(facts) * places)
        assert chisquare(cells).pvalue > SMALLEST_P
    filler = batch.tokens[batch.tokens >= config.n_entities + config.n_relations] - config.n_entities - 3
    assert chisquare(filler.bincount(minlength=5)).pvalue > SMALLEST_P


@pytest.mark.parametrize(
    ("config", "first_filler", "n_filler"),
    [
        (FactConfig(n_entities=6, filler="constant", n_filler=9, seq_len=6), 9, 1),
        (FactConfig(n_entities=6, filler="random", n_filler=9, seq_len=6), 9, 9),
        (FactConfig(n_entities=6, filler="none", seq_len=3), 9, 0),
    ],
    ids=["constant", "random", "none"],
)
def test_filler_comes_from_its_part_of_the_vocabulary(config: FactConfig, first_filler: int, n_filler: int) -> None:
    tokens = sample(FactWorld(config, 0), 400).tokens
    assert set(tokens[tokens >= first_filler].tolist()) == set(range(first_filler, first_filler + n_filler))
    assert config.mask_token_id == first_filler + n_filler and config.d_vocab == config.mask_token_id + 1


@pytest.mark.parametrize("world", WORLDS)
def test_noise_gives_a_share_of_facts_any_right_entity_of_its_role(world: World) -> None:
    config = FactConfig(world=world, n_entities=12, noise=0.25)
    noisy, plain = FactWorld(config, 0), FactWorld(FactConfig(world=world, n_entities=12), 0)
    assert noisy.facts.tolist() == plain.facts.tolist()
    right_of = {(left, relation): right for left, relation, right in noisy.facts.tolist()}
    drawn = shown(sample(noisy, 20_000))
    wrong = [right for left, relation, right in drawn if right_of[left, relation] != right]
    size = len(noisy.role(0))
    assert len(wrong) / len(drawn) == pytest.approx(0.25 * (1 - 1 / size), abs=0.02)
    assert all(right in noisy.role(right_of[left, relation]) for left, relation, right in drawn)
    assert chisquare(torch.tensor(wrong).unique(return_counts=True)[1]).pvalue > SMALLEST_P
    assert "noise" not in FactConfig().model_dump() and config.model_dump()["noise"] == 0.25


def test_sampling_uses_its_generator_and_nothing_else() -> None:
    world = FactWorld(FactConfig(n_entities=6), 0)
    generator, before = torch.Generator().manual_seed(3), torch.get_rng_state()
    first, second = world.sample(20, generator), world.sample(20, generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.tokens, sample(world, 20, seed=3).tokens)


# ---- facts shown both ways


@pytest.mark.parametrize(
    ("world", "n_entities", "share", "expected"),
    [("two_role", 40, 0.3, 6), ("relation_cycle", 30, 0.3, 9), ("symmetric_pool", 20, 0.0, 0), ("two_role", 8, 0.4, 2)],
)
def test_reversed_share_counts_facts(world: World, n_entities: int, share: float, expected: int) -> None:
    """Of 20, 30, 10 and 4 facts."""
    config = FactConfig(world=world, n_entities=n_entities, reversed_share=share)
    assert int(FactWorld(config, 0).reversed.sum()) == expected


@pytest.mark.parametrize("world", WORLDS)
def test_reversed_facts_are_shown_both_ways_half_the_time_and_never_asked(world: World) -> None:
    trained = FactWorld(FactConfig(world=world, n_entities=24, reversed_share=0.5), seed=5)
    seen = shown(sample(trained, 20_000))
    for fact, is_reversed in zip(trained.facts.tolist(), trained.reversed.tolist(), strict=True):
        forward, backward = seen.count(tuple(fact)), seen.count(tuple(fact[::-1]))
        if is_reversed:
            total = forward + backward
            assert abs(backward / total - 0.5) < 4 * 0.5 / total**0.5  # four standard deviations
        else:
            assert forward > 0 and backward == 0
    asked = {pair.fact for pair in trained.query_pairs()}
    assert asked == set((~trained.reversed).nonzero().flatten().tolist()) and 0 < len(asked) < len(trained.facts)


# ---- names and chance


@reproducible
@given(config=fact_configs())
def test_the_tokenizer_reads_and_writes_every_name(config: FactConfig) -> None:
    world = FactWorld(config, 0)
    text = " ".join(world.token_names)
    assert world.tokenizer(text)["input_ids"] == list(range(config.d_vocab))
    assert world.tokenizer.decode(list(range(config.d_vocab))) == text
    assert world.tokenizer.mask_token_id == config.mask_token_id


@reproducible
@given(config=fact_configs())
def test_every_token_has_its_own_name(config: FactConfig) -> None:
    names = FactWorld(config, 0).token_names
    assert len(names) == len(set(names)) == config.d_vocab


def test_every_token_has_its_own_name_in_a_world_of_many_roles() -> None:
    names = FactWorld(FactConfig(n_entities=60, n_roles=60), 0).token_names
    assert len(names) == len(set(names))


def test_names_say_role_relation_and_filler() -> None:
    cycle = FactWorld(FactConfig(n_entities=6, n_filler=2), 0)
    assert cycle.token_names == ["A0", "A1", "B0", "B1", "C0", "C1", "r0", "r1", "r2", "f0", "f1", "[M]"]
    pool = FactWorld(FactConfig(world="symmetric_pool", n_entities=4, filler="none", seq_len=3), 0)
    assert pool.token_names == ["A0", "A1", "A2", "A3", "r0", "[M]"]
    two_role = FactWorld(FactConfig(world="two_role", n_entities=4, filler="constant"), 0)
    assert two_role.token_names == ["A0", "A1", "B0", "B1", "r0", "f0", "[M]"]
    assert two_role.token_names[two_role.config.mask_token_id] == "[M]"


@pytest.mark.parametrize(
    ("world", "chance", "role_of_7"),
    [("two_role", 1 / 6, range(6, 12)), ("relation_cycle", 1 / 4, range(4, 8)), ("symmetric_pool", 1 / 12, range(12))],
)
def test_chance_is_one_over_the_size_of_a_role(world: World, chance: float, role_of_7: range) -> None:
    facts = FactWorld(FactConfig(world=world, n_entities=12), 0)
    assert facts.chance == pytest.approx(chance)
    assert facts.role(7) == role_of_7


@pytest.mark.parametrize("objective", ["any_order", "causal"])
def test_the_rival_is_what_training_shows_beside_the_source_on_that_side(objective: Objective) -> None:
    world = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
    pairs = world.query_pairs(objective, n_contexts=1)
    facts = {(left, right) for left, _, right in world.facts.tolist()}
    assert world.rivals([pair.forward for pair in pairs])[:, 0].tolist() == [pair.forward.answer[0] for pair in pairs]
    reverse = world.rivals([pair.reverse for pair in pairs])[:, 0].tolist()
    for pair, rival in zip(pairs, reverse, strict=True):
        source = pair.reverse.source[0]
        assert rival not in world.role(pair.reverse.answer[0])
        assert ((source, rival) if pair.reverse.offset < 0 else (rival, source)) in facts


def test_left_to_right_asks_for_the_right_entity_and_shows_nothing_behind_the_fact() -> None:
    world = FactWorld(FactConfig(n_entities=12, n_filler=4, gap=(2, 4)), seed=0)
    facts, mask = {tuple(fact) for fact in world.facts.tolist()}, world.config.mask_token_id
    pairs = world.query_pairs("left_to_right")
    assert {pair.side for pair in pairs} == {"right"} and all(pair.shared for pair in pairs)
    for pair in pairs:
        source, asked = pair.forward.source_span[0], pair.forward.answer_span[0]
        assert source < asked and set(pair.forward.tokens[asked:]) == {mask}
        assert (pair.forward.source[0], pair.forward.tokens[source + 1], pair.forward.answer[0]) in facts
        assert set(pair.reverse.tokens[asked + 1 :]) <= {mask} and pair.reverse.answer_span[0] == source
    tokens = [pair.forward.tokens[: pair.forward.answer_span[0]] for pair in pairs]
    elsewhere = [pair.forward for pair in world.query_pairs() if pair.side == "right"]
    assert tokens == [query.tokens[: query.answer_span[0]] for query in elsewhere]


@pytest.mark.parametrize("objective", ["any_order", "left_to_right"])
def test_with_causal_attention_all_are_asked_as_an_arm(objective: Objective) -> None:
    world = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
    pairs, arms = world.query_pairs(objective, attention="causal"), world.query_pairs("causal")
    for pair, arm in zip(pairs, arms, strict=True):
        for one, other in ((pair.forward, arm.forward), (pair.reverse, arm.reverse)):
            assert (one.answer, one.answer_span, one.source_span) == (
                other.answer,
                other.answer_span,
                other.source_span,
            )
            seen = one.answer_span[1]
            assert one.tokens[:seen] == other.tokens[:seen]


def test_where_entities_stand_on_one_side_only_there_is_no_rival() -> None:
    world = FactWorld(FactConfig(world="two_role", n_entities=6), seed=0)
    left = next(pair for pair in world.query_pairs() if pair.side == "right").reverse
    with pytest.raises(UserError, match="queries: no fact has A0 on the right, so nothing rivals the answer"):
        world.rivals([left])


def test_the_candidates_of_a_query_are_the_role_of_its_answer() -> None:
    world = FactWorld(FactConfig(world="two_role", n_entities=6, filler="none", seq_len=3), seed=0)
    queries = [pair.forward for pair in world.query_pairs(n_contexts=1)]
    for query, candidates in zip(queries, world.candidates(queries).tolist(), strict=True):
        assert query.answer[0] in candidates
        assert candidates == ([0, 1, 2] if query.answer[0] < 3 else [3, 4, 5])
