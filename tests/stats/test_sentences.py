"""Words for takeaways: what is said of estimates."""

from __future__ import annotations

import math

import pytest

from mdm_interp.stats.estimates import NOTHING, Estimate
from mdm_interp.stats.sentences import counted_of, listed, number, sample_size, side_of, span


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
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_the_size_is_that_of_what_was_measured() -> None:
    assert sample_size([estimate(1.0, n=5), NOTHING, estimate(1.0, n=10)]) == "n = 5 to 10 seeds"
    assert sample_size([estimate(1.0, n=1)]) == "n = 1 seed"
    assert sample_size([], "clusters of facts") == "n = 0 clusters of facts"
