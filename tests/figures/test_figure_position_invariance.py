"""Position invariance's summary and its sentence follow from its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean as mean

import pytest

from analyses import position_invariance
from mdm_interp.experiments.grids import OF_FEW_SEEDS
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.stats.estimates import Estimate


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("position_invariance")
    summary, last = result.summary, max(row["step"] for row in result.rows)
    for scheme in POSITION_SCHEMES:
        one = [row for row in result.rows if row["scheme"] == scheme]
        seeds = (0,) if scheme in OF_FEW_SEEDS else (0, 1)
        for stage, step in (("initial", 0), ("end", last)):
            of = {"scheme": scheme, "stage": stage}
            estimates = {name: summary.at(name, **of) for name in ("share", "pair_share")}
            estimates["share_null"] = summary.null("share", **of)
            for name, estimate in estimates.items():
                values = [row[name] for row in one if row["step"] == step]
                assert estimate.n == len(values) == len(seeds)
                assert estimate.value == pytest.approx(mean(values), rel=1e-4)
        largest = [max(row["share"] for row in one if row["seed"] == seed) for seed in seeds]
        assert summary.at("largest_share", scheme=scheme).value == pytest.approx(mean(largest), rel=1e-4)
    assert len({(row["run"], row["step"]) for row in result.rows}) == len(result.rows)


def test_relative_schemes_are_at_0_and_absolute_ones_are_not(tiny_result: Callable[[str], Result]) -> None:
    for row in tiny_result("position_invariance").rows:
        assert (row["pair_share"] == 0) == (row["share"] == 0) == POSITION_SCHEMES[row["scheme"]].relative


def test_the_takeaway_follows_planted_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("position_invariance")
    rows = [{**row, "share": 0.25} if row["scheme"] == "t5_bias" else row for row in result.rows]
    said = position_invariance.takeaway(replace(result, rows=tidy(rows)))
    assert said.startswith("Up to 0.25 of it is position's under RoPE, ALiBi, NoPE and T5;")
    assert position_invariance.takeaway(result).startswith("No, in one layer under RoPE, ALiBi, NoPE and T5;")


@pytest.mark.parametrize(("low", "said"), [(0.2, "up to 0.30"), (-0.1, "up to 0.30 (not surely more than 0)")])
def test_a_share_is_said_to_be_more_than_nothing_only_if_it_surely_is(low: float, said: str) -> None:
    smaller = Estimate(0.1, 0.05, 0.15, 3)
    assert position_invariance.up_to([smaller, Estimate(0.3, low, 0.4, 3)]) == said
