"""Rows of results as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mdm_interp.stats.estimates import Estimate, mean_estimate


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
