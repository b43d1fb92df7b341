"""Sentences of figures."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from mdm_interp.stats.estimates import NOTHING, Estimate
from mdm_interp.viz.words import (
    between,
    counted_of,
    joined,
    listed,
    number,
    opening,
    sample_size,
    side_of,
    span,
    told,
    with_n,
)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ""),
        (["MDM none"], "MDM NoPE"),
        (["MDM rope", "MDM alibi", "MDM learned"], "MDM RoPE, ALiBi and learned"),
        (["MDM rope", "ARM rope"], "MDM RoPE and the ARM"),
        (["t5_bias", "MDM rope, 4 heads"], "T5 and MDM RoPE, 4 heads"),
    ],
)
def test_names_are_listed_as_figures_call_them(names: list[str], said: str) -> None:
    assert listed(names) == said


def test_answers_are_told_together_and_yes_comes_first() -> None:
    answers = {"MDM rope": "no", "MDM none": "yes", "ARM rope": "no"}
    assert told(answers) == "yes for MDM NoPE, no for MDM RoPE and the ARM"
    assert told(dict.fromkeys(answers, "undecided")) == "undecided for every MDM and the ARM"
    assert told({"MDM rope": "yes"}) == "yes for MDM RoPE", "one is not every"


def test_numbers_lie_between_two_or_are_one() -> None:
    assert between([0.5, 0.701, float("nan"), 0.25]) == "0.25 to 0.70"
    assert between([0.501, 0.502]) == "0.50"
    assert between([-0.001]) == "0.00", "no minus before a zero"
    assert between([]) == "?"


def test_seeds_are_counted() -> None:
    five, ten = (Estimate(0.0, 0.0, 0.0, n) for n in (5, 10))
    assert sample_size([ten, five, NOTHING]) == "n = 5 to 10 seeds"
    assert sample_size([Estimate(0.0, 0.0, 0.0, 1)]) == "n = 1 seed"
    rows = pd.DataFrame({"seed": [0, 0, 1, 0], "heads": [1, 1, 1, 4]})
    assert with_n("MDM none", rows) == "MDM NoPE (n = 2)"
    assert with_n("MDM none", rows, "heads") == "MDM NoPE (n = 1 to 2)"


def test_sentences_open_with_a_capital() -> None:
    assert (opening("yes for MDM RoPE"), opening("")) == ("Yes for MDM RoPE", "")


def estimate(value: float, half: float = 0.1, n: int = 3) -> Estimate:
    return Estimate(value, value - half, value + half, n)


@pytest.mark.parametrize(
    ("effect", "side"),
    [(0.5, "above"), (-0.5, "below"), (0.15, "undecided"), (-0.15, "undecided")],
)
def test_an_effect_is_beside_its_null_only_where_intervals_are_apart(effect: float, side: str) -> None:
    assert side_of(estimate(effect), estimate(0.0)) == side


def test_what_has_no_interval_or_no_null_is_undecided() -> None:
    alone = Estimate(9.0, math.nan, math.nan, 1)
    assert {side_of(alone, estimate(0.0)), side_of(estimate(9.0), alone), side_of(estimate(9.0), None)} == {"undecided"}


def test_numbers_are_said_as_readers_read_them() -> None:
    assert [number(-0.001), number(-0.01), number(0.0), number(-0.001, ".0%")] == ["0.00", "-0.01", "0.00", "0%"]
    assert span([estimate(0.214), NOTHING, None, estimate(0.341)]) == "0.21 to 0.34"
    assert span([estimate(-0.001), estimate(0.002)]) == "0.00" and span([NOTHING]) == ""
    assert [counted_of(count, 6, "cases") for count in (0, 4, 6)] == ["none of 6 cases", "4 of 6 cases", "all 6 cases"]
    assert [joined(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_the_size_is_that_of_what_was_measured() -> None:
    assert sample_size([estimate(1.0, n=5), NOTHING, estimate(1.0, n=10)]) == "n = 5 to 10 seeds"
    assert sample_size([estimate(1.0, n=1)]) == "n = 1 seed"
    assert sample_size([], "clusters of facts") == "n = 0 clusters of facts"
