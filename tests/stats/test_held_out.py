"""How well one number predicts another out of sample: what it says of numbers that do and do not, and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from mdm_interp.errors import UserError
from mdm_interp.stats import held_out
from mdm_interp.stats.held_out import N_HALVINGS, halvings_estimate, held_out_r2


def by_brute_force(x: np.ndarray, y: np.ndarray, order: np.ndarray) -> float:
    """R^2 by the minimax formula of isotonic regression, for different `x` that rise with `y`."""
    fitted, held = order[: len(order) // 2], order[len(order) // 2 :]
    fitted = fitted[np.argsort(x[fitted])]
    n, values = len(fitted), y[fitted]
    function = [max(min(values[a : b + 1].mean() for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    predicted = np.interp(x[held], x[fitted], function)
    return float(1 - ((y[held] - predicted) ** 2).sum() / ((y[held] - values.mean()) ** 2).sum())


def test_each_halving_is_that_of_an_independent_computation() -> None:
    chooser = np.random.default_rng(1)
    x = chooser.normal(size=24)
    y = x + 0.5 * chooser.normal(size=24)
    halve = np.random.default_rng(0)
    expected = [by_brute_force(x, y, halve.permutation(24)) for _ in range(20)]
    assert held_out_r2(x, y)[:20] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_any_monotone_function_is_found_and_what_says_nothing_explains_nothing(sign: float) -> None:
    chooser = np.random.default_rng(0)
    x = chooser.uniform(size=80)
    assert held_out_r2(sign * x, np.exp(5 * x)).mean() > 0.9
    assert held_out_r2(sign * chooser.normal(size=80), x).mean() < 0.05
    assert held_out_r2(np.ones(80), x).mean() == pytest.approx(0.0, abs=0.05)
    assert held_out_r2(x, np.ones(80)).tolist() == [0.0] * N_HALVINGS


def test_equal_numbers_of_x_have_one_prediction() -> None:
    """With two places, that is the mean of each in the fitting half."""
    x, y = np.repeat([0.0, 1.0], 20), np.arange(40) % 7 + np.repeat([0.0, 50.0], 20)
    order = np.random.default_rng(0).permutation(40)
    fitted, held = order[:20], order[20:]
    means = np.array([y[fitted][x[fitted] == place].mean() for place in (0.0, 1.0)])
    missed = ((y[held] - means[x[held].astype(int)]) ** 2).sum() / ((y[held] - y[fitted].mean()) ** 2).sum()
    assert held_out_r2(x, y)[0] == pytest.approx(1 - missed, abs=1e-12)


def test_copies_on_both_sides_would_flatter_and_groups_keep_them_apart() -> None:
    """Of numbers that say nothing, copies of a case tell its copies; where they are in one half, nothing is told."""
    chooser = np.random.default_rng(2)
    x, y = (np.repeat(chooser.normal(size=12), 6) for _ in range(2))
    assert held_out_r2(x, y).mean() > held_out_r2(x, y, np.repeat(np.arange(12), 6)).mean() + 0.2


def test_a_group_is_in_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[np.ndarray]()
    monkeypatch.setattr(held_out, "_r2", lambda x, y, fitted: seen.append(fitted) or 0.0)
    groups = np.array(list("aabbbbcddddeee"))
    held_out_r2(np.arange(14), np.arange(14), groups)
    for fitted in seen:
        halves = {group: set(fitted[groups == group]) for group in "abcde"}
        assert all(len(of) == 1 for of in halves.values())
        assert sum(True in of for of in halves.values()) == 2
    with pytest.raises(UserError, match="groups: all cases are of one"):
        held_out_r2(np.arange(14), np.arange(14), np.zeros(14))


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_its_interval_covers_what_the_mean_over_samples_is(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 samples of 60 cases, the intervals of 93 or more hold the mean over many others."""
    monkeypatch.setattr(held_out, "N_HALVINGS", 60)
    chooser = np.random.default_rng(5)

    def sampled() -> np.ndarray:
        x = chooser.normal(size=60)
        return held_out_r2(x, np.tanh(x) + noise * chooser.normal(size=60))

    truth = np.mean([sampled().mean() for _ in range(100)])
    intervals = [halvings_estimate(sampled(), 60) for _ in range(100)]
    assert sum(one.low <= truth <= one.high for one in intervals) >= 93


def test_what_cannot_be_predicted_is_refused() -> None:
    for x, y in (([1.0] * 7, [1.0] * 7), ([1.0] * 9, [1.0] * 8), ([float("nan")] * 9, [1.0] * 9)):
        with pytest.raises(UserError, match="give at least 8 cases that have both"):
            held_out_r2(x, y)
