"""Evidence growth: its sentence says who reads evidence, and nobody for sure where the interval holds chance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import with_summary

from analyses import evidence_growth
from mdm_interp.experiments.grids import VARIANTS
from mdm_interp.experiments.results import Result
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Entry


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1.0, 1.4, "Yes for every MDM and the ARM. "),
        (10.8, 11.0, "No for every MDM and the ARM. "),
        (1.0, 11.0, "Undecided for every MDM and the ARM. "),
    ],
)
def test_the_takeaway_says_who_reads_evidence(
    tiny_result: Callable[[str], Result], low: float, high: float, said: str
) -> None:
    ranks = [
        Entry(
            "rank", {"variant": variant, "query": "reverse", "stage": "end"}, Estimate((low + high) / 2, low, high, 3)
        )
        for variant in VARIANTS
    ]
    chance = Entry("chance_rank", {}, Estimate(10.5, 10.5, 10.5, 3))
    told = evidence_growth.takeaway(with_summary(tiny_result("evidence_growth"), *ranks, chance))
    assert told.startswith(f"{said}Among 20 entities of its role")
    assert f"mean rank {(low + high) / 2:.1f} in MDMs" in told and "by chance 10.5; n = 3 seeds" in told
