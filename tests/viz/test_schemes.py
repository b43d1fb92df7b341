"""Schemes that share one curve."""

from __future__ import annotations

import pandas as pd

from mdm_interp.viz import alike


def rows(**curves: tuple[float, ...]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"scheme": scheme, "step": step, "seed": seed, "share": value + 0.1 * seed}
            for scheme, curve in curves.items()
            for step, value in enumerate(curve)
            for seed in (-1, 1)
        ]
    )


def test_only_means_that_are_equal_at_every_step_share_a_curve() -> None:
    found = alike(rows(none=(0.0, 0.5), rope=(0.0, 0.6), alibi=(0.0, 0.501)), "share")
    assert found == [("RoPE", "rope"), ("ALiBi, NoPE", "alibi")]
