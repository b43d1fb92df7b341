"""Estimates with intervals: thin wrappers on scipy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

LEVEL = 0.95

Measured = TypeVar("Measured")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Contrast(Generic[Measured]):
    """An effect beside its null: what the same measurement gives where the effect cannot be."""

    effect: Measured
    null: Measured

    def map(self, function: Callable[[Measured], Made]) -> Contrast[Made]:
        """Apply a function to both."""
        return Contrast(function(self.effect), function(self.null))


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; a single observation has none (NaN)."""

    value: float
    low: float
    high: float
    n: int
    """How many independent observations (seeds, unless said otherwise)."""

    @property
    def side(self) -> Literal["above", "below", "undecided"]:
        """The side of 0 on which the whole interval is, if it is on one; a single observation has no interval."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "undecided"

    @property
    def p_above_zero(self) -> float:
        """The one-sided chance of so large a mean if the true one were 0, of a :func:`mean_estimate`; NaN of a single
        observation."""
        if self.n < 2:
            return float("nan")
        error = (self.high - self.value) / student_t.ppf((1 + LEVEL) / 2, self.n - 1)
        return float(student_t.sf(self.value / error, self.n - 1)) if error > 0 else float(self.value <= 0)

    def __str__(self) -> str:
        interval = "" if np.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0)
"""What is estimated where nothing was measured."""


def mean_estimate(values: Sequence[float] | np.ndarray | pd.Series) -> Estimate:
    """Return the mean and its 95 % t interval over independent observations. NaNs are left out.

    With three observations as with many the interval covers 95 % if they are normal, within 2 % of that if their
    skewness is at most 0.8, and 88 to 92 % if they are exponential (skewness 2). It is undefined (NaN) for a single
    one.

    Source: Student, The probable error of a mean, 1908; docs/theory.md, section 10.
    """
    observed = np.asarray(values, dtype=float)
    observed = observed[~np.isnan(observed)]
    if not len(observed):
        return NOTHING
    mean = float(observed.mean())
    if len(observed) == 1:
        return Estimate(mean, float("nan"), float("nan"), 1)
    half = float(student_t.ppf((1 + LEVEL) / 2, len(observed) - 1) * observed.std(ddof=1) / len(observed) ** 0.5)
    return Estimate(mean, mean - half, mean + half, len(observed))
