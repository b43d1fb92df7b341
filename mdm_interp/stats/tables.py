"""Rows of results as tables, and estimates in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mdm_interp.stats.estimates import NOTHING, Estimate, mean_estimate


def as_columns(name: str, estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as columns of a row: `NAME`, `NAME_low`, `NAME_high` and `NAME_n`."""
    return {name: estimate.value, **{f"{name}_{part}": getattr(estimate, part) for part in ("low", "high", "n")}}


def estimate_in(row: Mapping[Any, Any], name: str) -> Estimate:
    """Read an estimate that :func:`as_columns` wrote; a result holds what is missing as null. A number of which nothing
    but the value was written has no interval, and `n` is 1; without a value, nothing was measured."""
    value, low, high = (
        np.nan if pd.isna(number) else float(number)
        for number in (row[name], row.get(f"{name}_low"), row.get(f"{name}_high"))
    )
    return NOTHING if np.isnan(value) else Estimate(value, low, high, int(row.get(f"{name}_n", 1)))


def estimates_in(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the estimates that :func:`as_columns` wrote in each row as columns `value`, `low`, `high` and `n`, in
    place of any others of these names; rows without a value are left out."""
    parts, read = ["value", "low", "high", "n"], [vars(estimate_in(row, name)) for row in rows.to_dict("records")]
    estimates = pd.DataFrame(read, index=rows.index, columns=parts)
    return rows.drop(columns=parts, errors="ignore").join(estimates).dropna(subset="value")


def where(frame: pd.DataFrame, **equal: Any) -> pd.DataFrame:
    """Return the rows whose columns have the given values."""
    kept = np.ones(len(frame), dtype=bool)
    for column, value in equal.items():
        kept &= (frame[column] == value).to_numpy()
    return pd.DataFrame(frame[kept])


def curve(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Return the mean of `y` over seeds and its interval at every `x`: columns x, value, low, high, n."""
    estimates = {at: mean_estimate(group.to_numpy()) for at, group in frame.groupby(x)[y]}
    return pd.DataFrame([{x: at, **vars(estimate)} for at, estimate in estimates.items()])
