"""Gradient alignment: its sentence says for whom the cosine ends above 0, and who comes lowest on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers import with_summary

from analyses import gradient_alignment
from mdm_interp.experiments.grids import VARIANTS
from mdm_interp.experiments.results import Result
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Entry


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.8, 0.9, "Yes for every MDM, undecided for the ARM."),
        (-0.9, -0.8, "No for every MDM, undecided for the ARM."),
        (-0.1, 0.9, "Undecided for every MDM and the ARM."),
    ],
)
def test_the_takeaway_says_for_whom_gradients_agree(
    tiny_result: Callable[[str], Result], low: float, high: float, said: str
) -> None:
    ends = {variant: Estimate((low + high) / 2, low, high, 3) for variant in VARIANTS}
    ends["ARM rope"] = Estimate(0.02, -0.1, 0.14, 3)
    result = tiny_result("gradient_alignment")
    entries = [Entry("mean_gradient", {"variant": name, "stage": "end"}, one) for name, one in ends.items()]
    told = gradient_alignment.takeaway(with_summary(result, *entries))
    assert told.startswith(said)
    assert f"is {(low + high) / 2:.2f} in MDMs and 0.02 in the ARM (n = 3 seeds)" in told


def test_the_takeaway_says_who_comes_lowest_on_the_way(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("gradient_alignment")
    middle = sorted({row["step"] for row in result.rows})[1]
    rows: list[dict[str, Any]] = [
        {**row, "mean_gradient": -0.97} if (row["variant"], row["step"]) == ("MDM learned", middle) else row
        for row in result.rows
    ]
    assert "learned comes lowest on the way, at -0.97." in gradient_alignment.takeaway(replace(result, rows=rows))
