"""Bootstrap intervals against exact distributions, and the frames made of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from mdm_interp.stats import (
    LEVEL,
    Estimate,
    bootstrap_mean,
    correlation_estimate,
    curve,
    partial_rank_correlation,
    rank_correlation,
    where,
)


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, count)


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


# ---- bootstrap_mean


def test_two_observations_give_the_whole_range() -> None:
    """Resampled means are 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4: both ends lie within 95 %."""
    assert bootstrap_mean([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0, 2)


def test_coin_flips_give_binomial_quantiles() -> None:
    """40 ones in 80: resampled counts are binomial(80, 1/2), whose 2.5 % and 97.5 % points are 31 and 49."""
    estimate = bootstrap_mean(np.array([0, 1] * 40))
    assert (estimate.value, estimate.n) == (0.5, 80)
    assert estimate.low == pytest.approx(31 / 80, abs=1.01 / 80)
    assert estimate.high == pytest.approx(49 / 80, abs=1.01 / 80)


@pytest.mark.parametrize("count", [50, 200, 800])
def test_normal_observations_give_the_normal_interval(count: int) -> None:
    """1.96 standard errors to either side, within the spread of 2000 resamples; so four times as many halve it."""
    values = normal(count)
    estimate, half = bootstrap_mean(values), 1.96 * values.std() / math.sqrt(count)
    assert estimate.value == pytest.approx(values.mean()) and estimate.n == count
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = [estimate.low <= 3.0 <= estimate.high for estimate in (bootstrap_mean(normal(40, s)) for s in range(200))]
    assert np.mean(covered) == pytest.approx(LEVEL, abs=0.05)


def test_a_skewed_sample_has_a_skewed_interval() -> None:
    estimate = bootstrap_mean([0.0] * 9 + [10.0])
    assert estimate.value == 1.0 and estimate.low == 0.0 and estimate.high == pytest.approx(3.0)


def test_the_interval_depends_on_the_seed_alone() -> None:
    values = normal(30)
    assert bootstrap_mean(values) == bootstrap_mean(pd.Series(values)) == bootstrap_mean(list(values), seed=0)
    other = bootstrap_mean(values, seed=1)
    assert other != bootstrap_mean(values)
    assert width(other) == pytest.approx(width(bootstrap_mean(values)), rel=0.1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0], Estimate(4.0, 4.0, 4.0, 1)),
        ([0.1] * 5, Estimate(0.1, 0.1, 0.1, 5)),
        (np.array([2, 2]), Estimate(2.0, 2.0, 2.0, 2)),
    ],
    ids=["one", "constant", "integers"],
)
def test_what_does_not_vary_has_an_interval_without_width(values: list[float] | np.ndarray, expected: Estimate) -> None:
    assert vars(bootstrap_mean(values)) == pytest.approx(vars(expected))
    assert width(bootstrap_mean(values)) == 0


def test_nans_are_left_out() -> None:
    assert bootstrap_mean([math.nan, 0.0, math.nan, 1.0]) == bootstrap_mean([0.0, 1.0])
    assert bootstrap_mean([math.nan, 4.0]) == Estimate(4.0, 4.0, 4.0, 1)


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]], ids=["none", "only NaN"])
def test_nothing_observed_is_nothing_known(values: list[float]) -> None:
    estimate = bootstrap_mean(values)
    assert estimate.n == 0
    assert all(math.isnan(number) for number in (estimate.value, estimate.low, estimate.high))


def test_an_estimate_reads_as_a_mean_and_its_interval() -> None:
    assert str(Estimate(0.12345, -1.0, 2345.6, 3)) == "0.123 [-1, 2.35e+03]"


# ---- frames

FRAME = pd.DataFrame(
    {
        "scheme": ["rope", "rope", "alibi", "rope", "rope", "alibi"],
        "step": [20, 10, 10, 20, 10, 20],
        "seed": [0, 0, 0, 1, 1, 0],
        "value": [5.0, 0.0, 7.0, 5.0, 1.0, math.nan],
    }
)


def test_where_keeps_the_rows_that_agree_in_every_column() -> None:
    assert where(FRAME, scheme="rope", step=10)["seed"].tolist() == [0, 1]
    assert where(FRAME, scheme="rope").index.tolist() == [0, 1, 3, 4]
    assert where(FRAME, scheme="none").empty
    assert where(FRAME).equals(FRAME)
    with pytest.raises(KeyError, match="layer"):
        where(FRAME, layer=0)


def test_where_leaves_the_frame_as_it_was() -> None:
    kept = where(FRAME, seed=0)
    kept["value"] = 0.0
    assert FRAME["value"].tolist()[0] == 5.0


def test_curve_is_an_estimate_at_every_x() -> None:
    got = curve(where(FRAME, scheme="rope"), "step", "value")
    assert got.columns.tolist() == ["step", "value", "low", "high", "n"]
    assert got.to_numpy().tolist() == [[10, 0.5, 0.0, 1.0, 2], [20, 5.0, 5.0, 5.0, 2]]


def test_curve_counts_what_was_observed() -> None:
    got = curve(FRAME, "step", "value")
    assert got["n"].tolist() == [3, 2]
    assert got["value"].tolist() == pytest.approx([8 / 3, 5.0])
    unseen = curve(where(FRAME, scheme="alibi"), "step", "value")
    assert unseen["n"].tolist() == [1, 0] and unseen["value"].isna().tolist() == [False, True]


# ---- rank correlations


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [-1, -8, -9]) == pytest.approx(-1)
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert rank_correlation([1, 2, 3, 4], [5, 4, 9, 7]) == pytest.approx(0.6)
    # tied ranks 1.5 1.5 3: covariance 1.5 over sqrt(1.5 * 2)
    assert rank_correlation([0, 0, 1], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)


def test_rank_correlation_is_that_of_pandas_and_scipy() -> None:
    x, y = normal(30).round(), normal(30, seed=1).round() + normal(30)
    assert rank_correlation(x, y) == pytest.approx(pd.Series(x).corr(pd.Series(y), method="spearman"))
    expected: Any = spearmanr(x, y)
    assert rank_correlation(x, y) == pytest.approx(expected.statistic)


def test_partial_rank_correlation_is_that_of_the_three_plain_ones() -> None:
    """(r_xy - r_xg r_yg) / sqrt((1 - r_xg^2) (1 - r_yg^2))."""
    given_ = normal(40)
    x, y = given_ + normal(40, seed=1), given_ + normal(40, seed=2)
    xy, xg, yg = (rank_correlation(*pair) for pair in ((x, y), (x, given_), (y, given_)))
    expected = (xy - xg * yg) / math.sqrt((1 - xg**2) * (1 - yg**2))
    assert partial_rank_correlation(x, y, given_) == pytest.approx(expected)
    assert abs(expected) < xy - 0.2, "the shared part is taken out"


def test_what_a_side_leaves_nothing_of_has_no_correlation() -> None:
    varied, other = [3.0, 1.0, 2.0, 5.0], [1.0, 4.0, 2.0, 3.0]
    assert math.isnan(rank_correlation([1.0] * 4, varied)) and math.isnan(rank_correlation(varied, [0.5] * 4))
    assert math.isnan(partial_rank_correlation(varied, other, varied))
    assert math.isnan(partial_rank_correlation(other, np.exp(varied), varied))
    assert partial_rank_correlation(varied, other, [7.0] * 4) == pytest.approx(rank_correlation(varied, other))
    assert math.isnan(rank_correlation([1.0], [2.0]))
    assert math.isnan(rank_correlation([], []))


@given(st.lists(st.tuples(*[st.integers(-5, 5)] * 3), min_size=3, max_size=12))
def test_ranks_alone_count(rows: list[tuple[int, int, int]]) -> None:
    x, y, control = np.array(rows, dtype=float).T
    for got, same in (
        (rank_correlation(x, y), rank_correlation(np.exp(y), x**3)),
        (partial_rank_correlation(x, y, control), partial_rank_correlation(y**3, np.exp(x), -control)),
    ):
        assert got == pytest.approx(same, abs=1e-9, nan_ok=True)
        assert math.isnan(got) or -1 <= got <= 1


def test_the_interval_of_a_rank_correlation_covers_the_true_one_as_often_as_it_says() -> None:
    """In normal samples: Spearman's of the population is 6 / pi asin(rho / 2)."""
    for rho in (0.0, 0.6):
        true = 6 / math.pi * math.asin(rho / 2)
        generator, n, covered = np.random.default_rng(0), 15, 0
        for _ in range(600):
            x, noise = generator.standard_normal((2, n))
            estimate = correlation_estimate(rank_correlation(x, rho * x + (1 - rho**2) ** 0.5 * noise), n)
            covered += estimate.low <= true <= estimate.high
        assert 0.92 < covered / 600 < 0.985
    assert correlation_estimate(0.5, 15, 1).high > correlation_estimate(0.5, 15).high
    assert (correlation_estimate(0.5, 4, 1).low, correlation_estimate(1.0, 3).high) == (-1, 1)
    assert correlation_estimate(float("nan"), 9).n == 0
