"""How well one number predicts another in cases that the prediction was not fitted to."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression
from scipy.stats import rankdata

from mdm_interp.errors import UserError
from mdm_interp.stats.estimates import LEVEL, Estimate

N_HALVINGS = 1000
FEWEST = 8
"""Cases from which a prediction is fitted to one half and tested on the other."""


def held_out_r2(
    x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0
) -> Float[np.ndarray, "halving"]:
    """Compute which share of the variance of `y` a monotone function of `x` explains in cases it was not fitted to.

    For each random halving, the function is fitted to one half by isotonic regression, rising or falling as the rank
    correlation there says, and read between its points by straight lines; R^2 is that of the other half, against the
    mean of the first. It is 0 where `x` says nothing, and below where what it says is wrong. The same seed halves
    equally many cases alike, so predictors can be compared halving by halving.

    Args:
        groups: Of the cases; those of a group, which are like each other, are in the same half, and half of the groups
            are fitted. Default: each case by itself.

    Raises:
        UserError: there are fewer than :data:`FEWEST` cases, not as many of one as of the other, a number is missing,
            or there is one group only.

    Source: docs/theory.md, section 14.
    """
    cases = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(cases[0]) != len(cases[1]) or len(cases[0]) < FEWEST or not np.isfinite(cases).all():
        raise UserError(
            f"x, y: {len(cases[0])} and {len(cases[1])} numbers, or some are not finite; give at least {FEWEST} cases "
            "that have both"
        )
    chooser, n = np.random.default_rng(seed), len(cases[0])
    group = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n_groups = int(group.max()) + 1
    if n_groups < 2:
        raise UserError("groups: all cases are of one, and half of the groups are fitted; give two or more")
    halvings = (chooser.permutation(n_groups)[: n_groups // 2] for _ in range(N_HALVINGS))
    return np.array([_r2(*cases, np.isin(group, fitted)) for fitted in halvings])


def halvings_estimate(values: Float[np.ndarray, "halving"], n: int) -> Estimate:
    """Return the mean over halvings, and between which values 95 % of them are: how a statistic varies over halves of
    the cases is how it varies over samples of all of them.

    Args:
        n: How many cases there are, or groups of them.

    Source: Shao and Wu, A general theory for jackknife variance estimation, 1989.
    """
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high), n)


def _r2(x: np.ndarray, y: np.ndarray, fitted: np.ndarray) -> float:
    held = ~fitted
    mean = y[fitted].mean()
    around = np.square(y[held] - mean).sum()
    missed = np.square(y[held] - _monotone(x[fitted], y[fitted], x[held])).sum()
    return float(1 - missed / around) if around > 0 else 0.0


def _monotone(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Fit a monotone function, and return its values."""
    x_ranks, y_ranks = (rankdata(side) - (len(side) + 1) / 2 for side in (x, y))
    direction = float(x_ranks @ y_ranks)
    if direction == 0:
        return np.full(len(at), y.mean())
    places, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(which, y) / counts
    return np.interp(at, places, isotonic_regression(means, weights=counts, increasing=direction > 0).x)
