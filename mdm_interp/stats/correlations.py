"""Correlations, of values and of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.stats import norm, pearsonr, rankdata
from torch import Tensor

from mdm_interp.stats.estimates import LEVEL, Estimate


def correlate(x: Float[Tensor, "sample *rest"], y: Float[Tensor, "sample *rest"]) -> Float[Tensor, "*rest"]:
    """Compute the Pearson correlation over the first axis; NaN where either side does not vary."""
    x, y = x - x[:1], y - y[:1]  # what does not vary is then exactly 0
    x, y = x - x.mean(0), y - y.mean(0)
    spread = x.pow(2).mean(0).sqrt() * y.pow(2).mean(0).sqrt()
    return torch.where(spread > 0, (x * y).mean(0) / spread, torch.nan)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Compute the Spearman correlation, with average ranks for ties; NaN where a side is constant or holds a NaN."""
    ranks = rankdata(np.asarray([x, y], dtype=float), axis=1)
    return _pearson(*ranks)


def partial_rank_correlation(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float:
    """Compute the Spearman correlation of what a line in the ranks of `given` leaves of the ranks of `x` and `y`; NaN
    where it leaves nothing of one."""
    ranks = rankdata(np.asarray([x, y, given], dtype=float), axis=1)
    x_ranks, y_ranks, control = ranks - ranks.mean(1, keepdims=True)
    if not control.any():
        return _pearson(x_ranks, y_ranks)
    left = [side - control * (side @ control) / (control @ control) for side in (x_ranks, y_ranks)]
    return _pearson(*left)


def correlation_estimate(value: float, n: int, n_given: int = 0) -> Estimate:
    """Return a rank correlation of `n` independent observations, `n_given` columns held still, with its 95 % interval:
    Fisher's z with variance (1 + value^2 / 2) / (n - 3 - n_given). The interval is all of [-1, 1] for too few
    observations.

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
