"""Queries, pairs of queries, and what a model's logits answer to them."""

from __future__ import annotations

from math import log
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from mdm_interp.config import Attention, FactConfig, ModelConfig, Objective, Scheme
from mdm_interp.data.queries import Query, QueryPair, Span, batches, collate, queries_of, require_shared
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import predict, query_loss
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.transformer import HookedTransformer

WORLDS = {
    "two_role bare": FactConfig(world="two_role", n_entities=8, filler="none", seq_len=3),
    "two_role": FactConfig(world="two_role", n_entities=8, filler="constant", seq_len=6, gap=(2, 4)),
    "cycle of 2": FactConfig(n_entities=8, n_roles=2, seq_len=5),
    "cycle of 3": FactConfig(n_entities=12, seq_len=8, gap=(2, 5), reversed_share=0.25),
    "pool": FactConfig(world="symmetric_pool", n_entities=10, seq_len=7, gap=3, reversed_share=0.4),
}
Shift = Literal[0, -1]
MDM_OBJECTIVES: tuple[Objective, ...] = ("any_order", "source_only", "target_only")


def unmasked(query: Query) -> list[int]:
    """The query's sequence with its answer in place."""
    start, stop = query.answer_span
    return [*query.tokens[:start], *query.answer, *query.tokens[stop:]]


def is_training_sequence(tokens: list[int], world: FactWorld) -> bool:
    """Whether training could show `tokens`, read off the definition: one fact, gap in range, filler around it."""
    config, facts = world.config, world.facts.tolist()
    entities = [at for at, token in enumerate(tokens) if token < config.n_entities]
    if len(entities) != 2 or config.mask_token_id in tokens or len(tokens) != config.seq_len:
        return False
    left, right = entities
    fact = [tokens[left], tokens[left + 1], tokens[right]]
    trained = fact in facts or (fact[::-1] in facts and bool(world.reversed[facts.index(fact[::-1])]))
    low, high = config.gaps
    rest = [token for at, token in enumerate(tokens) if at not in (left, left + 1, right)]
    first_filler = config.n_entities + config.n_relations
    return trained and low <= right - left <= high and all(token >= first_filler for token in rest)


def model_config(
    position: Scheme = "rope", attention: Attention = "bidirectional", shift: Shift | None = None, d_vocab: int = 12
) -> ModelConfig:
    return ModelConfig(
        d_model=8,
        n_heads=2,
        n_layers=2,
        d_vocab=d_vocab,
        n_ctx=8,
        position=position,
        attention=attention,
        readout_shift=shift,
    )


class FixedLogits:
    """A model that answers the same logits [pos d_vocab] to every sequence."""

    def __init__(self, logits: Tensor, cfg: ModelConfig) -> None:
        self.logits, self.cfg = logits, cfg

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None, readout: Tensor | None = None) -> Tensor:
        logits = self.logits[: tokens.shape[1]].expand(len(tokens), -1, -1).clone()
        return logits if readout is None else logits[torch.arange(len(tokens))[:, None], readout]


# ---- the pairs of a world


@pytest.mark.parametrize("config", WORLDS.values(), ids=WORLDS.keys())
@pytest.mark.parametrize("objective", MDM_OBJECTIVES)
def test_an_mdm_pair_swaps_its_two_entities_and_only_its_forward_query_was_trained(
    config: FactConfig, objective: Objective
) -> None:
    world = FactWorld(config, seed=4)
    pairs = world.query_pairs(objective, n_contexts=3)
    assert {pair.fact for pair in pairs} == set((~world.reversed).nonzero().flatten().tolist())
    for pair in pairs:
        forward, reverse = pair.forward, pair.reverse
        left, _, right = world.facts[pair.fact].tolist()
        answer, source = (left, right) if pair.side == "left" else (right, left)
        assert forward.answer == reverse.answer == (answer,) and forward.source == reverse.source == (source,)
        assert pair.shared
        assert forward.answer_span == reverse.source_span and forward.source_span == reverse.answer_span
        assert forward.offset == -reverse.offset and (forward.offset > 0) == (pair.side == "left")
        differing = [at for at, (a, b) in enumerate(zip(forward.tokens, reverse.tokens, strict=True)) if a != b]
        assert differing == sorted([forward.answer_span[0], forward.source_span[0]])
        for query in (forward, reverse):
            assert [at for at, token in enumerate(query.tokens) if token == config.mask_token_id] == [
                query.answer_span[0]
            ]
        assert is_training_sequence(unmasked(forward), world)
        assert not is_training_sequence(unmasked(reverse), world)
    require_shared(pairs, "route correlation")


@pytest.mark.parametrize("config", WORLDS.values(), ids=WORLDS.keys())
def test_an_arm_pair_shares_its_fact_but_neither_answer_nor_source(config: FactConfig) -> None:
    world = FactWorld(config, seed=4)
    pairs = world.query_pairs("causal")
    assert pairs
    for pair in pairs:
        left, relation, right = world.facts[pair.fact].tolist()
        assert pair.side == "right" and not pair.shared
        assert (pair.forward.source, pair.forward.answer) == ((left,), (right,))
        assert (pair.reverse.source, pair.reverse.answer) == ((right,), (left,))
        for query in (pair.forward, pair.reverse):  # `source relation … [M]`, so a causal model can see the source
            assert query.offset < 0 and query.tokens[query.source_span[1]] == relation
        assert is_training_sequence(unmasked(pair.forward), world)
        assert not is_training_sequence(unmasked(pair.reverse), world)


@pytest.mark.parametrize(
    ("objective", "sides"),
    [
        ("any_order", {"left", "right"}),
        ("source_only", {"left"}),
        ("target_only", {"right"}),
        ("causal", {"right"}),
    ],
)
def test_an_objective_is_asked_for_what_it_may_mask(objective: Objective, sides: set[str]) -> None:
    pairs = FactWorld(FactConfig(n_entities=6), 0).query_pairs(objective)
    assert {pair.side for pair in pairs} == sides
    assert len(pairs) == 6 * 2 * len(sides)  # facts, contexts, sides


@pytest.mark.parametrize(("n_contexts", "expected"), [(1, 1), (2, 2), (5, 5)])
def test_each_fact_is_asked_in_n_contexts(n_contexts: int, expected: int) -> None:
    pairs = FactWorld(FactConfig(n_entities=6, n_filler=50), 0).query_pairs(n_contexts=n_contexts)
    for fact in range(6):
        for side in ("left", "right"):
            asked = [pair.forward for pair in pairs if (pair.fact, pair.side) == (fact, side)]
            assert len(asked) == len(set(asked)) == expected


def test_there_are_no_more_contexts_than_the_world_has() -> None:
    bare = FactWorld(FactConfig(n_entities=6, filler="none", seq_len=3), 0)
    assert len(bare.query_pairs("source_only", n_contexts=5)) == 6
    two_places = FactWorld(FactConfig(n_entities=6, filler="constant", seq_len=4), 0)
    assert len(two_places.query_pairs("source_only", n_contexts=10)) == 6 * 2


def test_contexts_differ_in_what_is_seen() -> None:
    """The fact fills the whole sequence, so there is one context, however much filler the vocabulary holds."""
    pairs = FactWorld(FactConfig(n_entities=6, filler="random", seq_len=3), 0).query_pairs("source_only")
    assert len(pairs) == len({pair.forward for pair in pairs}) == 6


def test_require_shared_says_what_is_undefined_and_why() -> None:
    with pytest.raises(UserError, match=r"query_pairs: route correlation needs at least one pair, got none"):
        require_shared([], "route correlation")
    world = FactWorld(FactConfig(n_entities=6), 0)
    mixed = [*world.query_pairs(), world.query_pairs("causal")[0]]
    with pytest.raises(UserError, match=r"query_pairs: transplant is undefined .* \(an ARM's\); use an MDM's pairs"):
        require_shared(mixed, "transplant")


def test_a_pair_that_shares_its_answer_only_is_not_shared() -> None:
    first, other = Query((9, 1, 2), (5,), (0, 1), (2, 3)), Query((3, 1, 9), (5,), (2, 3), (0, 1))
    assert not QueryPair(first, other, fact=0, side="left").shared


# ---- one query


@pytest.mark.parametrize(
    ("answer", "answer_span", "source_span", "message"),
    [
        ((1,), (4, 5), (0, 1), r"answer_span: \(4, 5\) is not a span of the 4 tokens"),
        ((1,), (-1, 0), (0, 1), r"answer_span: \(-1, 0\) is not a span of the 4 tokens"),
        ((), (2, 2), (0, 1), r"answer_span: \(2, 2\) is not a span"),
        ((1,), (0, 1), (3, 1), r"source_span: \(3, 1\) is not a span"),
        ((1,), (0, 1), (2, 5), r"source_span: \(2, 5\) is not a span of the 4 tokens"),
        ((1, 2), (0, 2), (1, 3), r"answer_span: \(0, 2\) overlaps source_span \(1, 3\)"),
        ((1,), (1, 2), (0, 4), r"answer_span: \(1, 2\) overlaps source_span \(0, 4\)"),
        ((1,), (0, 2), (2, 3), r"answer: 1 tokens do not fill answer_span \(0, 2\)"),
        ((1, 2, 3), (0, 2), (2, 3), r"answer: 3 tokens do not fill answer_span \(0, 2\)"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(
    answer: tuple[int, ...], answer_span: Span, source_span: Span, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Query((9, 9, 7, 8), answer, answer_span, source_span)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [0.5, 1.0, True, "1", None, torch.tensor(1)], ids=repr)
@pytest.mark.parametrize("name", ["tokens", "answer", "answer_span", "source_span"])
def test_ids_and_positions_are_integers(name: str, wrong: Any) -> None:
    given: dict[str, Any] = {"tokens": (9, 9, 7, 8), "answer": (1,), "answer_span": (0, 1), "source_span": (2, 3)}
    assert Query(**{**given, "tokens": tuple(np.array(given["tokens"]))})
    with pytest.raises(UserError, match=rf"^{name}: .* is no integer, as token ids and positions are"):
        Query(**{**given, name: (wrong, *given[name][1:])})


def test_source_and_offset_follow_from_the_spans() -> None:
    source_right = Query((9, 9, 7, 8), (1, 2), (0, 2), (2, 4))  # spans that touch do not overlap
    assert source_right.source == (7, 8) and source_right.offset == 2
    assert Query((7, 5, 5, 9), (1,), (3, 4), (0, 1)).offset == -3


@pytest.mark.parametrize(("shift", "expected"), [(0, (2, 3)), (-1, (1, 2))])
def test_readout_applies_the_models_shift(shift: Shift, expected: tuple[int, ...]) -> None:
    query = Query((7, 8, 9, 9, 6), (1, 2), (2, 4), (0, 1))
    assert query.readout(model_config(shift=shift)) == expected


def test_position_0_has_no_readout_in_a_shifted_model() -> None:
    query = Query((9, 8, 7), (1,), (0, 1), (2, 3))
    assert query.readout(model_config(shift=0)) == (0,)
    with pytest.raises(UserError, match=r"answer_span: position 0 has no prediction in a shifted model"):
        query.readout(model_config(shift=-1))


@pytest.mark.parametrize(
    ("source_span", "visible"), [((0, 1), True), ((1, 2), True), ((0, 2), True), ((3, 4), False), ((3, 5), False)]
)
def test_a_causal_readout_must_see_the_source(source_span: Span, visible: bool) -> None:
    query = Query((7, 8, 9, 6, 5), (1,), (2, 3), source_span)
    causal = model_config(attention="causal")
    if visible:
        assert query.readout(causal) == (1,)
    else:
        with pytest.raises(UserError, match=rf"source_span: \({source_span[0]}, .* lies right of readout position 1"):
            query.readout(causal)
    assert query.readout(model_config(shift=-1)) == (1,)  # the bidirectional model sees both sides


# ---- batches of queries

SHORT = Query((7, 8, 9), (1,), (2, 3), (0, 1))
LONG = Query((5, 9, 9, 6, 8), (2, 3), (1, 3), (3, 5))


def test_queries_of_one_direction_are_in_the_order_of_their_pairs() -> None:
    pairs = [QueryPair(SHORT, LONG, 0, "left"), QueryPair(LONG, SHORT, 1, "right")]
    assert queries_of(pairs, "forward") == [SHORT, LONG] and queries_of(pairs, "reverse") == [LONG, SHORT]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("call", [predict, compute_routes, lambda model, queries: collate(queries, model.cfg)])
def test_what_are_no_queries_is_refused_by_name(call: Any) -> None:
    model, pair = HookedTransformer(model_config()), QueryPair(SHORT, LONG, 0, "left")
    advice = r"give queries_of\(pairs, 'forward'\) or queries_of\(pairs, 'reverse'\)$"
    with pytest.raises(UserError, match=r"^queries: got a QueryPair, which is no query; of query pairs, " + advice):
        call(model, [pair])
    with pytest.raises(UserError, match=r"^queries: got a single query; give a list of them$"):
        call(model, SHORT)
    with pytest.raises(UserError, match=r"^direction: 'backward' is none of forward, reverse; choose one$"):
        queries_of([pair], "backward")  # pyright: ignore[reportArgumentType]


def test_collate_pads_on_the_right_and_marks_what_is_real() -> None:
    batch = collate([SHORT, LONG], model_config())
    assert batch.tokens.tolist() == [[7, 8, 9, 0, 0], [5, 9, 9, 6, 8]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.readout.tolist() == [[2, 0], [1, 2]]
    assert batch.answer.tolist() == [[1, 0], [2, 3]]
    assert batch.answered.int().tolist() == [[1, 0], [1, 1]]
    assert batch.source.int().tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert collate([SHORT, LONG], model_config(shift=-1)).readout.tolist() == [[1, 0], [0, 1]]
    assert collate([SHORT, SHORT], model_config()).attention_mask is None


def test_batches_keep_every_query_in_order() -> None:
    queries = [SHORT, LONG, SHORT, SHORT, LONG]
    made = list(batches(queries, model_config(), size=2))
    assert [len(batch.tokens) for batch in made] == [2, 2, 1]
    assert [int(row[0]) for batch in made for row in batch.tokens] == [7, 5, 7, 7, 5]
    assert made[0].tokens.shape[1] == 5 and made[1].tokens.shape[1] == 3  # each padded to its own longest


@pytest.mark.parametrize(
    ("d_vocab", "sizes"), [(10, [512, 88]), (2**27 // (5 * 250), [250, 250, 100]), (2**24, [1] * 600)]
)
def test_a_large_vocabulary_makes_batches_small(d_vocab: int, sizes: list[int]) -> None:
    made = batches([LONG, *[SHORT] * 599], model_config(d_vocab=d_vocab))
    assert [len(batch.tokens) for batch in made] == sizes


@pytest.mark.parametrize("position", get_args(Scheme))
@pytest.mark.parametrize(
    ("attention", "shift"), [("bidirectional", 0), ("bidirectional", -1), ("causal", -1)], ids=["MDM", "Dream", "ARM"]
)
def test_a_padded_batch_predicts_what_each_query_alone_does(
    position: Scheme, attention: Attention, shift: Shift
) -> None:
    model = HookedTransformer(model_config(position, attention, shift), generator=torch.Generator().manual_seed(0))
    queries = [
        SHORT,
        Query((5, 6, 9, 9, 8), (2, 3), (2, 4), (0, 2)),
        Query((4, 9), (1,), (1, 2), (0, 1)),
        Query((4, 5, 6, 7, 9, 9, 9), (3, 2, 1), (4, 7), (1, 3)),
    ]
    together, alone = predict(model, queries), [predict(model, [query]) for query in queries]
    expected = torch.cat([prediction.log_probability for prediction in alone])
    assert torch.allclose(together.log_probability, expected, rtol=0, atol=1e-5)
    assert together.rank.tolist() == [int(prediction.rank) for prediction in alone]
    assert len({round(value, 4) for value in expected.tolist()}) == 4  # four different questions


def test_predict_is_the_softmax_at_the_readout_of_the_unpadded_sequence() -> None:
    """Recomputed from the model alone, without the query machinery, also past the first batch of 512."""
    model = HookedTransformer(model_config("alibi"), generator=torch.Generator().manual_seed(0))
    made = torch.Generator().manual_seed(1)
    queries = []
    for _ in range(600):
        tokens = torch.randint(12, (4,), generator=made).tolist()
        queries.append(Query(tuple(tokens), (tokens[3],), (1, 2), (2, 4)))
    logits = model(torch.tensor([query.tokens for query in queries]))[:, 1]
    answer = torch.tensor([query.answer for query in queries])
    expected = logits.softmax(-1).gather(1, answer)[:, 0]
    prediction = predict(model, queries)
    assert torch.allclose(prediction.probability, expected, atol=1e-6)
    rank = (logits > logits.gather(1, answer)).sum(1) + 1  # no ties among random logits
    assert torch.equal(prediction.rank, rank)
    assert torch.equal(prediction.correct, logits.argmax(1) == answer[:, 0])


# ---- loss and rank by hand


def by_hand(probabilities: list[list[float]], shift: Shift = 0) -> FixedLogits:
    """A model that gives these probabilities at every position, its logits off by an arbitrary 7."""
    logits = torch.tensor(probabilities).log() + 7
    return FixedLogits(logits, model_config(shift=shift, d_vocab=logits.shape[1]))


@pytest.mark.parametrize(
    ("answer", "probability", "rank"), [((0,), 0.5, 1), ((1,), 0.3, 2), ((2,), 0.2, 3)], ids=["first", "second", "last"]
)
def test_loss_and_rank_of_one_token(answer: tuple[int, ...], probability: float, rank: int) -> None:
    model = by_hand([[0.1, 0.1, 0.8], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    query = Query((0, 2, 1), answer, (1, 2), (0, 1))
    batch = collate([query], model.cfg)
    assert query_loss(model(batch.tokens), batch).tolist() == pytest.approx([-log(probability)])
    prediction = predict(model, [query])  # pyright: ignore[reportArgumentType]
    assert prediction.probability.tolist() == pytest.approx([probability])
    assert prediction.rank.tolist() == [rank]
    assert prediction.correct.tolist() == [rank == 1]


@pytest.mark.parametrize(
    ("logits", "rank"),
    [([1.0, 1.0, 0.0], 2), ([1.0, 1.0, 1.0], 3), ([1.0, 0.0, 2.0], 2), ([0.0, 1.0, 0.0], 3), ([2.0, 0.0, 1.0], 1)],
)
def test_ties_count_against_the_answer(logits: list[float], rank: int) -> None:
    """The answer is token 0."""
    model = FixedLogits(torch.tensor([logits, logits]), model_config(d_vocab=3))
    prediction = predict(model, [Query((2, 1), (0,), (0, 1), (1, 2))])  # pyright: ignore[reportArgumentType]
    assert prediction.rank.tolist() == [rank] and prediction.correct.tolist() == [rank == 1]


def test_several_tokens_add_their_log_probabilities_and_take_the_worst_rank() -> None:
    """Beside a one-token query, whose padded entry must add nothing and rank nowhere."""
    model = by_hand([[0.25, 0.25, 0.5], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    several = Query((0, 2, 2, 1), (0, 1), (1, 3), (3, 4))
    single = Query((0, 2, 2, 1), (0,), (3, 4), (0, 1))
    batch = collate([several, single], model.cfg)
    loss = query_loss(model(batch.tokens), batch)
    assert loss.tolist() == pytest.approx([-log(0.5) - log(0.2), -log(0.6)])
    prediction = predict(model, [several, single])  # pyright: ignore[reportArgumentType]
    assert prediction.probability.tolist() == pytest.approx([0.5 * 0.2, 0.6])
    assert prediction.rank.tolist() == [2, 1] and prediction.correct.tolist() == [False, True]


@pytest.mark.parametrize(("shift", "expected"), [(0, 0.6), (-1, 0.2)])
def test_a_shifted_model_is_read_one_position_earlier(shift: Shift, expected: float) -> None:
    rows = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]
    query = Query((0, 2, 1), (1,), (1, 2), (0, 1))
    model = by_hand(rows, shift)
    batch = collate([query], model.cfg)
    read = batch.at_readout(model(batch.tokens)).softmax(-1)
    assert read.flatten().tolist() == pytest.approx(rows[1 + shift])
    assert predict(model, [query]).probability.tolist() == pytest.approx([expected])  # pyright: ignore[reportArgumentType]
