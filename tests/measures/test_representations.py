"""One entry or two: planted representations of either kind are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_model, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from representation_helpers import N_CONTEXTS, PAIRS, PROBES, QUESTIONS, WORLD, compared, entries

from mdm_interp.data.queries import QueryPair
from mdm_interp.errors import UserError
from mdm_interp.measures.evidence import readout_directions
from mdm_interp.measures.representations import (
    RIDGE,
    Questions,
    compute_representations,
    mean_cosines,
    probe_accuracy,
    ridge_weights,
)


def test_one_entry_is_close_and_carries_over() -> None:
    seen = entries(seeded(0))
    one = compared(seen, seen + 0.05 * torch.randn(seen.shape, generator=seeded(1), dtype=seen.dtype))
    assert one["same_fact"] > 0.95 and abs(one["same_relation"]) < 0.1 and one["other_context"] > 0.95
    assert one["forward_to_forward"] == one["forward_to_reverse"] == one["reverse_to_reverse"] == 1.0
    for probe in PROBES:
        assert one[f"{probe}_null"] == pytest.approx(WORLD.chance, abs=0.05)


def test_two_entries_are_apart_and_carry_nothing_over() -> None:
    two = compared(entries(seeded(0)), entries(seeded(1)))
    assert two["same_fact"] == pytest.approx(two["same_relation"], abs=0.06)
    assert two["forward_to_forward"] == two["reverse_to_reverse"] == 1.0, "each is readable by itself"
    assert two["forward_to_reverse"] == pytest.approx(WORLD.chance, abs=0.12)


def test_mean_cosines_by_plain_loops() -> None:
    """Each forward representation of the first four contexts with each reverse one of the last four."""
    few = PAIRS[: 4 * 2 * N_CONTEXTS]  # four facts
    forward, reverse = torch.randn(2, len(few), 5, generator=seeded(0), dtype=torch.float64)
    found = mean_cosines(forward, reverse, Questions(few, WORLD))
    context = [place // 2 % N_CONTEXTS for place in range(len(few))]
    pairs = [(i, j) for i in range(len(few)) for j in range(len(few)) if context[i] < 4 <= context[j]]
    alike = {
        "other_context": lambda one, other: (one.fact, one.side) == (other.fact, other.side),
        "same_fact": lambda one, other: (one.fact, one.side) == (other.fact, other.side),
        "same_relation": lambda one, other: one.fact != other.fact and one.side == other.side,
    }
    assert len({int(WORLD.facts[pair.fact, 1]) for pair in few}) == 1
    for name, agree in alike.items():
        of = forward if name == "other_context" else reverse
        cosines = [torch.cosine_similarity(forward[i], of[j], dim=0) for i, j in pairs if agree(few[i], few[j])]
        assert found[name] == pytest.approx(torch.stack(cosines).mean().item()), name


def test_what_questions_share_by_plain_loops() -> None:
    asked = [PAIRS[place] for place in QUESTIONS.places[:, 0].tolist()]
    assert [(pair.fact, pair.side) for pair in asked] == [(f, s) for f in range(30) for s in ("left", "right")]
    for pair, places in zip(asked, QUESTIONS.places.tolist(), strict=True):
        assert {(PAIRS[place].fact, PAIRS[place].side) for place in places} == {(pair.fact, pair.side)}
    assert sorted(QUESTIONS.places.flatten().tolist()) == list(range(len(PAIRS)))
    shared = QUESTIONS.shared()
    for i, one in enumerate(asked):
        for j, other in enumerate(asked):
            elsewhere = one.fact != other.fact
            same_relation = WORLD.facts[one.fact, 1] == WORLD.facts[other.fact, 1] and one.side == other.side
            assert shared["same_fact"][i, j] == (i == j)
            assert shared["same_answer"][i, j] == (elsewhere and one.forward.answer == other.forward.answer)
            assert shared["same_source"][i, j] == (elsewhere and one.forward.source == other.forward.source)
            assert shared["same_relation"][i, j] == (elsewhere and bool(same_relation))
    assert (shared["same_source"].sum(1) == 1).all(), "an entity is in two facts"


def test_a_probe_is_tested_in_contexts_it_was_not_trained_on() -> None:
    """A vector of each query's own: what it was trained on it would read, of the others it knows nothing."""
    own = torch.randn(len(PAIRS), 600, generator=seeded(2), dtype=torch.float64)
    assert probe_accuracy(own, own, QUESTIONS).effect == pytest.approx(WORLD.chance, abs=0.1)
    half = N_CONTEXTS // 2
    early, late = QUESTIONS.places[:, :half].flatten(), QUESTIONS.places[:, half:].flatten()
    own[late] = own[early]
    assert probe_accuracy(own, own, QUESTIONS).effect == 1.0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100), n_questions=st.integers(2, 6), n_classes=st.integers(2, 5))
def test_ridge_solves_the_augmented_least_squares(seed: int, n_questions: int, n_classes: int) -> None:
    x = torch.randn(n_questions, 3, 4, generator=seeded(seed), dtype=torch.float64)
    labels = torch.randint(n_classes, (2, n_questions), generator=seeded(seed))
    flat = x.reshape(-1, 4)
    penalty = RIDGE * flat.pow(2).sum() / 4
    stacked = torch.cat([flat, penalty.sqrt() * torch.eye(4, dtype=x.dtype)])
    for labelling, weights in zip(labels, ridge_weights(x, labels, n_classes), strict=True):
        hot = torch.zeros(n_questions, 3, n_classes, dtype=x.dtype)
        for question, label in enumerate(labelling.tolist()):
            hot[question, :, label] = 1
        target = torch.cat([hot.reshape(-1, n_classes), torch.zeros(4, n_classes, dtype=x.dtype)])
        torch.testing.assert_close(weights, torch.linalg.lstsq(stacked, target).solution)


@pytest.mark.parametrize("changes", [{}, {"normalization_type": None}], ids=["normalised", "no norm"])
def test_representations_give_the_logits_back_up_to_their_mean(changes: dict[str, Any]) -> None:
    """They are at the readout row: read by the unembedding they are the centred logits."""
    facts = WORLD.config
    model = random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id, **changes)
    queries = [pair.reverse for pair in PAIRS[:40]]
    read = compute_representations(model, queries)
    tokens = torch.tensor([query.tokens for query in queries])
    with torch.no_grad():
        logits = torch.stack([row[q.answer_span[0]] for row, q in zip(model(tokens), queries, strict=True)])
        directions = readout_directions(model).double()
    torch.testing.assert_close(read @ directions.T, (logits - logits.mean(0)).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "query_pairs: what two questions share needs at least one pair"),
        (
            WORLD.query_pairs("causal"),
            "query_pairs: what two questions share is undefined for pairs",
        ),
        (PAIRS[:2], "query_pairs: questions are asked in 1 to 1 contexts; ask each in as many as the others"),
        (PAIRS[:-1], "query_pairs: questions are asked in 7 to 8 contexts"),
    ],
    ids=["no pairs", "an ARM's", "one context", "one context less"],
)
def test_what_cannot_be_compared_is_named(pairs: list[QueryPair], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Questions(pairs, WORLD)
