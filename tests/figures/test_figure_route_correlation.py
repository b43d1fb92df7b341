"""Route correlation: attention that rises and falls, and what the theorem presupposes, follow from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from helpers import planted_result, tiny_run

from analyses.route_correlation import CLAIMS, peaks, takeaway
from mdm_interp.experiments.claims import judge
from mdm_interp.experiments.grids import CYCLE, MDM_SCHEMES
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import scope_of
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Entry, Summary

STEPS = (0, 1, 10, 100, 1000, 2000, 4000)
ABOUT = scope_of(tiny_run(CYCLE, "rope", "any_order", 0).model, "relation_cycle", "any_order")


def planted(curve: Sequence[float], seeds: int = 5) -> Result:
    """Runs whose attention to the source goes so, forward and in reverse."""
    rows: list[dict[str, Any]] = []
    for seed, (step, share) in product(range(seeds), zip(STEPS, curve, strict=True)):
        wobbling = share + 0.001 * seed * (step > 1)
        both = {"forward_attention": wobbling, "reverse_attention": wobbling}
        rows.append({**ABOUT, "seed": seed, "step": step, "kind": "correlation", **both})
    return planted_result("route_correlation", rows)


@pytest.mark.parametrize(
    ("curve", "fall", "verdict"),
    [
        ((0.1, 0.1, 0.2, 0.9, 0.6, 0.5, 0.5), 0.4, "holds"),
        ((0.1, 0.1, 0.2, 0.5, 0.7, 0.8, 0.8), 0.0, "fails"),  # no fall
        ((0.8, 0.8, 0.8, 0.7, 0.4, 0.3, 0.3), 0.0, "fails"),  # no rise before it
        ((0.1, 0.1, 0.2, 0.9, 0.9, 0.9, 0.5), 0.4, "inconclusive"),  # no plateau after it
    ],
)
def test_attention_has_to_rise_then_fall_then_stay(curve: Sequence[float], fall: float, verdict: str) -> None:
    result = planted(curve)
    assert peaks(result)["forward_fall"].mean() == pytest.approx(fall, abs=0.01)
    assert [found.verdict for found in judge([(result, CLAIMS)])] == [verdict] * 2


def test_the_rows_have_the_premise_before_and_after(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("route_correlation")
    premise = result.frame[result.frame["kind"] == "premise"]
    assert premise.groupby("run")["step"].nunique().eq(2).all()
    for name in ("q", "k"):
        values = premise[[name, f"{name}_null"]].to_numpy(dtype=float)
        assert (values > 0).all() and (values <= 1 + 1e-6).all()
    for stage, step in (("initial", 0), ("end", 30)):
        rows = premise[(premise["scheme"] == "rope") & (premise["step"] == step)]
        assert result.summary.at("k", scheme="rope", stage=stage).value == pytest.approx(rows["k"].mean())
    correlations = result.frame[result.frame["kind"] == "correlation"]
    assert np.isfinite(correlations[["forward_attention", "reverse_attention"]].to_numpy(dtype=float)).all()


@pytest.mark.parametrize(
    ("others", "end", "said"),
    [
        (1.0, 0.4, "Wholly under ALiBi and NoPE; else in part. Over training, "),
        (1.0, 1.0, "Wholly under RoPE, ALiBi, NoPE and learned (n = 3 seeds)."),
        (
            0.5,
            0.4,
            "In part. Over training, the correlation of the two sides' scores: under RoPE it falls from 1.00 to ",
        ),
    ],
)
def test_the_takeaway_says_where_it_is_wholly_so(others: float, end: float, said: str) -> None:
    ends = {(scheme, stage): others for scheme in ("alibi", "none") for stage in ("initial", "end")}
    ends |= {(scheme, stage): {"initial": 1.0, "end": end}[stage] for scheme in ("rope", "learned") for stage in STAGES}
    entries = [
        Entry("measured", {"scheme": scheme, "stage": stage}, Estimate(value, value - 0.1, value + 0.1, 3))
        for (scheme, stage), value in ends.items()
    ]
    assert set(MDM_SCHEMES) == {scheme for scheme, _ in ends}
    result = planted_result("route_correlation", [], summarize=lambda result: Summary(entries))
    assert takeaway(result).startswith(said)


STAGES = ("initial", "end")


def test_a_change_within_the_intervals_is_no_sure_one() -> None:
    entries = [
        Entry("measured", {"scheme": scheme, "stage": stage}, Estimate(value, value - 0.2, value + 0.2, 3))
        for scheme in MDM_SCHEMES
        for stage, value in zip(STAGES, (0.5, 0.6), strict=True)
    ]
    result = planted_result("route_correlation", [], summarize=lambda result: Summary(entries))
    assert "under RoPE it goes from 0.50 to 0.60, no sure change" in takeaway(result)
