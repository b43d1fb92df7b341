"""Intervals against scipy and by simulation, and the frames made of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from scipy.stats import spearmanr

from mdm_interp.stats.correlations import correlation_estimate, partial_rank_correlation, rank_correlation
from mdm_interp.stats.estimates import LEVEL, Contrast, Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, count)


def test_what_is_done_to_an_effect_is_done_to_its_null() -> None:
    assert Contrast([3, 1], [2]).map(sum) == Contrast(4, 2)


# ---- mean_estimate


def test_two_observations_give_students_interval() -> None:
    """t of one degree of freedom is 12.706 at 97.5 %; the standard error of 0 and 1 is 1/2."""
    estimate = mean_estimate([0.0, 1.0])
    assert (estimate.value, estimate.n) == (0.5, 2)
    assert [estimate.low, estimate.high] == pytest.approx([0.5 - 12.7062 / 2, 0.5 + 12.7062 / 2], rel=1e-5)


@pytest.mark.parametrize("count", [3, 10, 200])
def test_the_interval_is_scipys(count: int) -> None:
    values = normal(count)
    expected = scipy_stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    estimate = mean_estimate(values)
    assert estimate.value == pytest.approx(values.mean()) and estimate.n == count
    assert [estimate.low, estimate.high] == pytest.approx([expected.low, expected.high])
    assert mean_estimate(pd.Series(values)) == mean_estimate(list(values)) == estimate


@pytest.mark.parametrize("count", [3, 5, 10, 24])
@pytest.mark.parametrize("skewness", [0.0, 0.8])
def test_the_interval_covers_the_truth_as_often_as_it_says(count: int, skewness: float) -> None:
    """Within 2 %, for normal observations and for skewed ones (gamma). A percentile bootstrap covers 75 % at 3."""
    generator, shape = np.random.default_rng(0), 4 / max(skewness, 1e-9) ** 2
    drawn = generator.gamma(shape, size=(4000, count)) if skewness else generator.normal(size=(4000, count))
    truth = shape if skewness else 0.0
    covered = [estimate.low <= truth <= estimate.high for estimate in map(mean_estimate, drawn)]
    assert np.mean(covered) == pytest.approx(LEVEL, abs=0.02)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1] * 5, Estimate(0.1, 0.1, 0.1, 5)),
        (np.array([2, 2]), Estimate(2.0, 2.0, 2.0, 2)),
    ],
    ids=["constant", "integers"],
)
def test_what_does_not_vary_has_an_interval_without_width(values: list[float] | np.ndarray, expected: Estimate) -> None:
    assert vars(mean_estimate(values)) == pytest.approx(vars(expected))


def test_a_single_observation_has_no_interval() -> None:
    estimate = mean_estimate([4.0])
    assert (estimate.value, estimate.n) == (4.0, 1)
    assert math.isnan(estimate.low) and math.isnan(estimate.high)
    assert str(estimate) == "4"


def test_nans_are_left_out() -> None:
    assert mean_estimate([math.nan, 0.0, math.nan, 1.0]) == mean_estimate([0.0, 1.0])
    assert mean_estimate([math.nan, 4.0]).n == 1


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]], ids=["none", "only NaN"])
def test_nothing_observed_is_nothing_known(values: list[float]) -> None:
    estimate = mean_estimate(values)
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
    half = scipy_stats.t.ppf(0.975, 1) / 2
    assert got.to_numpy().tolist() == [
        [10, 0.5, pytest.approx(0.5 - half), pytest.approx(0.5 + half), 2],
        [20, 5.0, 5.0, 5.0, 2],
    ]


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
