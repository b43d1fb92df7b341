"""Influence of facts' sentences: what is shown is not what is asked, and planted matrices are read rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import planted_result, seeded
from report_helpers import SETTING

from analyses import influence
from mdm_interp.config import Objective
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.claims import judge
from mdm_interp.experiments.grids import CYCLE, VARIANTS
from mdm_interp.experiments.results import Result
from mdm_interp.viz import shown

WORLD = FactWorld(CYCLE, seed=0)


@pytest.mark.parametrize("objective", ["any_order", "causal"])
def test_every_fact_is_shown_once_in_words_that_no_query_uses(objective: Objective) -> None:
    shown, asked = influence.split_contexts(WORLD.query_pairs(objective))
    assert [pair.fact for pair in shown] == list(range(CYCLE.n_facts))
    assert len(asked) == CYCLE.n_facts * (1 if objective == "causal" else 2)
    sentences = [pair.forward.statement for pair in shown]
    assert WORLD.config.mask_token_id not in {token for sentence in sentences for token in sentence}
    for pair in asked:
        own = sentences[pair.fact]
        assert {pair.reverse.answer[0], pair.reverse.source[0]} <= set(own)
        assert pair.forward.statement != own


def test_comparison_by_plain_loops() -> None:
    shown, asked = influence.split_contexts(WORLD.query_pairs())
    sentences = [pair.forward.statement for pair in shown]
    lowered = torch.randn(len(sentences), len(asked), generator=seeded(0), dtype=torch.float64)
    found = influence.compare(lowered, sentences, [pair.fact for pair in shown], asked, "reverse")
    expected = {"ahead": 0.0, "ahead_null": 0.0, "influence": 0.0, "influence_null": 0.0}
    for column, pair in enumerate(asked):
        answer, source = pair.reverse.answer[0], pair.reverse.source[0]
        own = lowered[pair.fact, column].item()
        (sharing,) = [at for at, one in enumerate(sentences) if answer in one and at != pair.fact]
        others = [
            lowered[at, column].item() for at, one in enumerate(sentences) if answer not in one and source not in one
        ]
        assert len(others) == CYCLE.n_facts - 3
        expected["ahead"] += sum(own > other for other in others) / len(others) - 0.5
        expected["ahead_null"] += sum(lowered[sharing, column].item() > other for other in others) / len(others) - 0.5
        expected["influence"] += own
        expected["influence_null"] += sum(others) / len(others)
    for name, total in expected.items():
        assert found[name] == pytest.approx(total / len(asked), abs=1e-12)


def test_own_sentences_that_always_help_most_are_ahead_of_all() -> None:
    shown, asked = influence.split_contexts(WORLD.query_pairs())
    sentences, facts = [pair.forward.statement for pair in shown], [pair.fact for pair in shown]
    own = torch.tensor([[float(fact == pair.fact) for pair in asked] for fact in facts])
    found = influence.compare(own, sentences, facts, asked, "reverse")
    assert found["ahead"] == 0.5 and found["ahead_null"] == 0


def test_rows_hold_every_variant_and_group(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("influence")
    for variant in VARIANTS:
        rows = [row for row in result.rows if row["variant"] == variant and row["stage"] == "end"]
        assert {(row["direction"], row["group"]) for row in rows} == {
            (direction, group) for direction in influence.DIRECTIONS for group in (*influence.GROUPS, "all")
        }
        for direction in influence.DIRECTIONS:
            of = [row for row in rows if row["direction"] == direction and row["seed"] == 0]
            parts = sum(row["influence"] for row in of if row["group"] != "all")
            (whole,) = [row["influence"] for row in of if row["group"] == "all"]
            assert parts == pytest.approx(whole, abs=1e-4)
    titles: Any = influence.ANALYSIS.figure(result).layout
    assert set(map(shown, VARIANTS)) <= {annotation.text for annotation in titles.annotations}


@pytest.mark.parametrize(
    ("ahead", "null", "said"),
    [
        (0.3, 0.1, "Yes for every MDM and the ARM; "),
        (0.3, 0.4, "No for every MDM and the ARM; "),
        (-0.2, -0.3, "No for every MDM and the ARM; "),
        (0.3, 0.3, "Undecided for every MDM and the ARM; "),
    ],
)
def test_the_takeaway_says_who_is_ahead_of_both(ahead: float, null: float, said: str) -> None:
    of = {"stage": "end", "direction": "reverse", "group": "all"}
    rows = [
        {**of, "variant": variant, "seed": seed, "ahead": ahead + 0.01 * (seed - 1), "ahead_null": null}
        | {"influence": 0.0, "influence_null": 0.0}
        for variant in VARIANTS
        for seed in range(3)
    ]
    told = influence.takeaway(planted_result("influence", rows, summarize=influence.summarize))
    assert told.startswith(said)
    assert f"it beats: {ahead + 0.5:.2f} ({said.split()[0].lower()}); n = 3 seeds." in told


@pytest.mark.parametrize(
    ("ahead", "null", "verdict"), [(0.4, 0.1, "holds"), (0.4, 0.45, "fails"), (-0.2, -0.3, "fails")]
)
def test_the_claim_needs_a_lead_beyond_that_of_the_same_answer(ahead: float, null: float, verdict: str) -> None:
    scope = {**SETTING, "world": "relation_cycle", "stage": "end"}
    rows = [
        {**scope, "step": 9, "seed": seed, "run": f"{seed}", "variant": "MDM rope", "direction": "reverse"}
        | {"group": "storage", "ahead": ahead + 0.005 * seed, "ahead_null": null}
        for seed in range(5)
    ]
    (found,) = judge([(planted_result("influence", rows), influence.ANALYSIS.claims)])
    assert found.verdict == verdict
