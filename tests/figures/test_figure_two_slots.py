"""One entry or two: planted representations of either kind are told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import random_model, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analyses import two_slots
from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.measures.evidence import readout_directions

WORLD = FactWorld(FactConfig(n_entities=30, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=two_slots.N_CONTEXTS)
D = 60


def entries(generator: torch.Generator, noise: float = 0.02) -> Tensor:
    """A random vector per question, the same in each context but for noise, centred."""
    each = torch.randn(len(WORLD.facts), 1, 2, D, generator=generator, dtype=torch.float64)
    all_contexts = each.expand(-1, two_slots.N_CONTEXTS, -1, -1).reshape(-1, D)
    read = all_contexts + noise * torch.randn(len(PAIRS), D, generator=generator, dtype=torch.float64)
    return read - read.mean(0)


def measured(forward: Tensor, reverse: Tensor) -> dict[str, float]:
    return {
        **two_slots.mean_cosines(forward, reverse, PAIRS, WORLD),
        **two_slots.probe_accuracies(forward, reverse, PAIRS, WORLD),
    }


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("two_slots")
    columns = [*two_slots.COSINES, *two_slots.PROBES, *two_slots.ANSWERS]
    columns += [f"{probe}_null" for probe in two_slots.PROBES]
    for variant in {row["variant"] for row in result.rows}:
        for stage in ("initial", "early", "end"):
            rows = [row for row in result.rows if (row["variant"], row["stage"]) == (variant, stage)]
            expected = {column: [row[column] for row in rows] for column in columns}
            excess = [row["same_fact"] - row["same_relation"] for row in rows]
            expected["same_fact over same_relation"] = excess
            for probe in two_slots.PROBES:
                expected[f"{probe} over null"] = [row[probe] - row[f"{probe}_null"] for row in rows]
            for name, values in expected.items():
                estimate = result.summary[f"{variant} / {stage} / {name}"]
                assert estimate.n == len(values)
                if values:
                    assert estimate.value == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-9)
    assert result.summary["chance"].value == pytest.approx(1 / 3)


def test_one_entry_is_close_and_carries_over() -> None:
    seen = entries(seeded(0))
    one = measured(seen, seen + 0.05 * torch.randn(seen.shape, generator=seeded(1), dtype=seen.dtype))
    assert one["same_fact"] > 0.95 and abs(one["same_relation"]) < 0.1 and one["other_context"] > 0.95
    assert one["forward_to_forward"] == one["forward_to_reverse"] == one["reverse_to_reverse"] == 1.0
    for probe in two_slots.PROBES:
        assert one[f"{probe}_null"] == pytest.approx(WORLD.chance, abs=0.05)


def test_two_entries_are_apart_and_carry_nothing_over() -> None:
    two = measured(entries(seeded(0)), entries(seeded(1)))
    assert two["same_fact"] == pytest.approx(two["same_relation"], abs=0.06)
    assert two["forward_to_forward"] == two["reverse_to_reverse"] == 1.0, "each is readable by itself"
    assert two["forward_to_reverse"] == pytest.approx(WORLD.chance, abs=0.12)


def test_the_verdict_tells_one_entry_from_two(tiny_result: Callable[[str], Result]) -> None:
    """Rows of ten planted seeds in place of the measured ones."""
    result = tiny_result("two_slots")
    row = next(row for row in result.rows if row["variant"] == "MDM rope" and row["stage"] == "end")
    kinds = {
        "MDM rope": lambda seed: (entries(seeded(seed)), entries(seeded(100 + seed))),
        "MDM alibi": lambda seed: (entries(seeded(seed)), entries(seeded(seed))),
    }
    rows = [
        {**row, "variant": variant, "seed": seed, "stage": stage, **measured(*make(seed))}
        for variant, make in kinds.items()
        for seed in range(6)
        for stage in ("initial", "end")
    ]
    planted = replace(result, rows=tidy(rows))
    assert [two_slots.two_entries(planted.summary, variant) for variant in kinds] == [True, False]
    assert "As two entries predict: MDM rope." in two_slots.takeaway(planted)


def test_what_questions_share_by_plain_loops() -> None:
    questions = two_slots._questions(PAIRS)
    assert [(pair.fact, pair.side) for pair in questions] == [(f, s) for f in range(30) for s in ("left", "right")]
    masks = two_slots.relations(questions, WORLD)
    for i, one in enumerate(questions):
        for j, other in enumerate(questions):
            elsewhere = one.fact != other.fact
            same_relation = WORLD.facts[one.fact, 1] == WORLD.facts[other.fact, 1] and one.side == other.side
            assert masks["same_fact"][i, j] == (i == j)
            assert masks["same_answer"][i, j] == (elsewhere and one.forward.answer == other.forward.answer)
            assert masks["same_source"][i, j] == (elsewhere and one.forward.source == other.forward.source)
            assert masks["same_relation"][i, j] == (elsewhere and bool(same_relation))
    assert (masks["same_source"].sum(1) == 1).all(), "an entity stands in two facts"


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100), n_questions=st.integers(2, 6), n_classes=st.integers(2, 5))
def test_ridge_solves_the_augmented_least_squares(seed: int, n_questions: int, n_classes: int) -> None:
    x = torch.randn(n_questions, 3, 4, generator=seeded(seed), dtype=torch.float64)
    labels = torch.randint(n_classes, (2, n_questions), generator=seeded(seed))
    flat = x.reshape(-1, 4)
    penalty = two_slots.RIDGE * flat.pow(2).sum() / 4
    stacked = torch.cat([flat, penalty.sqrt() * torch.eye(4, dtype=x.dtype)])
    for labelling, weights in zip(labels, two_slots.ridge(x, labels, n_classes), strict=True):
        hot = torch.zeros(n_questions, 3, n_classes, dtype=x.dtype)
        for question, label in enumerate(labelling.tolist()):
            hot[question, :, label] = 1
        target = torch.cat([hot.reshape(-1, n_classes), torch.zeros(4, n_classes, dtype=x.dtype)])
        torch.testing.assert_close(weights, torch.linalg.lstsq(stacked, target).solution)


def test_representations_give_the_logits_back_up_to_their_mean() -> None:
    """They stand at the readout row: read by the unembedding they are the centred logits."""
    facts = WORLD.config
    model = random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id)
    queries = [pair.reverse for pair in PAIRS[:40]]
    read = two_slots.representations(model, queries)
    tokens = torch.tensor([query.tokens for query in queries])
    with torch.no_grad():
        logits = torch.stack([row[q.answer_span[0]] for row, q in zip(model(tokens), queries, strict=True)])
        directions = readout_directions(model).double()
    torch.testing.assert_close(read @ directions.T, (logits - logits.mean(0)).double(), atol=1e-4, rtol=0)
