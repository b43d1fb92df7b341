"""Estimates with intervals: thin wrappers on scipy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import norm, pearsonr, rankdata
from scipy.stats import t as student_t

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; a single observation has none (NaN)."""

    value: float
    low: float
    high: float
    n: int
    """How many independent observations (seeds, unless said otherwise)."""

    def __str__(self) -> str:
        interval = "" if np.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


def mean_estimate(values: Sequence[float] | np.ndarray | pd.Series) -> Estimate:
    """Return the mean and its 95 % t interval over independent observations. NaNs are left out.

    With three observations as with many it covers 95 % if they are normal, that within 2 % if their skewness is at most
    0.8, and 88 to 92 % if they are exponential (skewness 2). It is undefined (NaN) for a single one.

    Source: Student, The probable error of a mean, 1908; docs/theory.md, section 10.
    """
    observed = np.asarray(values, dtype=float)
    observed = observed[~np.isnan(observed)]
    if not len(observed):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean = float(observed.mean())
    if len(observed) == 1:
        return Estimate(mean, float("nan"), float("nan"), 1)
    half = float(student_t.ppf((1 + LEVEL) / 2, len(observed) - 1) * observed.std(ddof=1) / len(observed) ** 0.5)
    return Estimate(mean, mean - half, mean + half, len(observed))


def estimate_in(row: Mapping[Any, Any], prefix: str = "") -> Estimate:
    """The estimate in a row's columns `value`, `low`, `high` and `n`, each after `prefix`; a result holds what is
    missing as null."""
    value, low, high = (
        np.nan if row[f"{prefix}{x}"] is None else row[f"{prefix}{x}"] for x in ("value", "low", "high")
    )
    return Estimate(value, low, high, int(row[f"{prefix}n"]))


def where(frame: pd.DataFrame, **equal: Any) -> pd.DataFrame:
    """The rows whose columns have the given values."""
    kept = np.ones(len(frame), dtype=bool)
    for column, value in equal.items():
        kept &= (frame[column] == value).to_numpy()
    return pd.DataFrame(frame[kept])


def curve(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Mean of `y` over seeds and its interval at every `x`: columns x, value, low, high, n."""
    estimates = {at: mean_estimate(group.to_numpy()) for at, group in frame.groupby(x)[y]}
    return pd.DataFrame([{x: at, **vars(estimate)} for at, estimate in estimates.items()])


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman correlation, with average ranks for ties; NaN where a side is constant or holds a NaN."""
    ranks = rankdata(np.asarray([x, y], dtype=float), axis=1)
    return _pearson(*ranks)


def partial_rank_correlation(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float:
    """Spearman correlation of what a line in the ranks of `given` leaves of the ranks of `x` and `y`; NaN where it
    leaves nothing of one."""
    ranks = rankdata(np.asarray([x, y, given], dtype=float), axis=1)
    x_ranks, y_ranks, control = ranks - ranks.mean(1, keepdims=True)
    if not control.any():
        return _pearson(x_ranks, y_ranks)
    left = [side - control * (side @ control) / (control @ control) for side in (x_ranks, y_ranks)]
    return _pearson(*left)


def correlation_estimate(value: float, n: int, n_given: int = 0) -> Estimate:
    """A rank correlation of `n` independent observations, `n_given` columns held still, with its 95 % interval:
    Fisher's z with variance (1 + value^2 / 2) / (n - 3 - n_given). All of [-1, 1] for too few observations.

    Source: Bonett and Wright, Sample size requirements for estimating Pearson, Kendall and Spearman correlations, 2000.
    """
    if np.isnan(value):
        return Estimate(value, value, value, 0)
    freedom = n - 3 - n_given
    if freedom <= 0:
        return Estimate(value, -1.0, 1.0, n)
    z = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    half = norm.ppf((1 + LEVEL) / 2) * ((1 + value**2 / 2) / freedom) ** 0.5
    return Estimate(value, float(np.tanh(z - half)), float(np.tanh(z + half)), n)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    # Ranks differ by halves: what is left of less than that is rounding.
    if len(x) < 2 or min(np.ptp(x), np.ptp(y)) <= 1e-9 * len(x):
        return float("nan")
    correlation: Any = pearsonr(x, y)
    return float(correlation.statistic)
