"""Curves of position schemes that lie on each other."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mdm_interp.viz.theme import SCHEME_COLORS, shown

SAME = 0.004
"""Difference that no eye sees on an axis from 0 to 1."""


def alike(rows: pd.DataFrame, measure: str) -> list[tuple[str, str]]:
    """Return the schemes of which a curve is drawn over steps, each with the names of all whose means it shows: those
    that are as good as equal at every step share one curve."""
    means = rows.astype({measure: float}).groupby(["scheme", "step"])[measure].mean()
    groups: list[list[str]] = []
    for scheme in (name for name in SCHEME_COLORS if name in set(rows["scheme"])):
        same = [group for group in groups if _same(means[group[0]], means[scheme])]
        if same:
            same[0].append(scheme)
        else:
            groups.append([scheme])
    return [(", ".join(map(shown, group)), group[0]) for group in groups]


def _same(one: pd.Series, other: pd.Series) -> bool:
    return one.index.equals(other.index) and bool(np.allclose(one, other, rtol=0, atol=SAME))
