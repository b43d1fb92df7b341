"""Steps down the forward loss: rows agree with each other, and planted models that gain or lose are told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from analyses import first_order
from mdm_interp.experiments.grids import VARIANTS
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.experiments.scope import STAGES


@pytest.fixture(scope="module")
def result(tiny_result: Callable[[str], Result]) -> Result:
    return tiny_result("first_order")


def rows_at(result: Result, **equal: Any) -> list[dict[str, Any]]:
    return [row for row in result.rows if all(row[column] == value for column, value in equal.items())]


def test_the_summary_follows_from_the_rows(result: Result) -> None:
    quantities = ("predicted_transfer", "transfer", "slope")
    for variant in VARIANTS:
        for stage in STAGES:
            for group in first_order.GROUPS:
                rows = rows_at(result, variant=variant, stage=stage, group=group, eta=first_order.SMALL)
                of = {"variant": variant, "stage": stage, "group": group}
                found = {quantity: result.summary.at(quantity, **of) for quantity in quantities}
                found["random_transfer"] = result.summary.null("transfer", **of)
                for quantity, estimate in found.items():
                    values = [row[quantity] for row in rows if row[quantity] is not None]
                    assert estimate.n == len(values)
                    if values:
                        assert estimate.value == pytest.approx(np.mean(values), rel=1e-5)
            ends: dict[str, float] = {}
            for row in rows_at(result, variant=variant, stage=stage, group="whole", in_regime=1):
                ends[row["run"]] = max(row["eta"], ends.get(row["run"], 0.0))
            estimate = result.summary.at("log10_last_step", variant=variant, stage=stage)
            assert estimate.n == len(ends)
            if ends:
                assert estimate.value == pytest.approx(np.log10(list(ends.values())).mean(), rel=1e-5)


def test_the_parts_add_up_and_steps_of_nearly_no_size_do_what_is_predicted(result: Result) -> None:
    least = first_order.ETAS[0]
    wholes = rows_at(result, group="whole", eta=least)
    assert {row["variant"] for row in wholes} == set(VARIANTS)
    for whole in wholes:
        parts = [row for row in rows_at(result, run=whole["run"], stage=whole["stage"], eta=least)]
        assert {row["group"] for row in parts} == set(first_order.GROUPS)
        size = max(abs(row["predicted"]) for row in parts)
        summed = sum(row["predicted"] for row in parts if row["group"] != "whole")
        assert summed == pytest.approx(whole["predicted"], abs=1e-4 * size)
        for row in parts:
            assert row["reverse"] == pytest.approx(row["predicted"], rel=1e-3, abs=1e-3 * size)
            assert row["forward"] < 0
            drop = whole["forward"]
            assert row["transfer"] == pytest.approx(row["reverse"] / drop, rel=1e-3, abs=1e-3)
            assert row["random_transfer"] == pytest.approx(row["random"] / drop, rel=1e-3, abs=1e-3)


def test_without_positions_a_reverse_query_learns_what_its_forward_query_does(result: Result) -> None:
    """They are the same question, so all of the drop carries over; between an ARM's two questions it need not."""
    same = [row["predicted_transfer"] for row in rows_at(result, variant="MDM none", group="whole")]
    assert same == pytest.approx([1.0] * len(same), abs=1e-3)
    other = [row["predicted_transfer"] for row in rows_at(result, variant="ARM rope", group="whole")]
    assert min(abs(value - 1) for value in other) > 0.05


def test_the_takeaway_says_where_the_reverse_loss_rises(result: Result) -> None:
    """Planted: learnt everywhere, but unlearnt by MDM rope's whole step; what a part does is not what is asked."""
    losing = {("MDM rope", "whole"), ("MDM learned", "storage")}
    rows = [
        {
            **row,
            "transfer": -1.0 if (row["variant"], row["group"]) in losing else 1.0,
            "in_regime": int(row["eta"] < 2e-3),
        }
        for row in result.rows
        if row["stage"] == "end"
    ]
    planted = replace(result, rows=tidy(rows))
    said = first_order.takeaway(planted)
    assert said.startswith(
        "Yes for MDM learned and the ARM, no for MDM RoPE, undecided for MDM ALiBi and NoPE, at every"
    )
    assert "As predicted: " in said, "of two models there is one seed"
    assert "up to steps of 0.001 or more" in said
    astray = replace(result, rows=tidy([{**row, "slope": 1.5} for row in rows]))
    assert "Not as predicted: at step 0.0001 the reverse loss changes by 1.50 times" in first_order.takeaway(astray)
    drawn: Any = first_order.draw(planted).figure().data
    points = [trace for trace in drawn if trace.mode == "markers" and "triangle" not in str(trace.marker.symbol)]
    assert {trace.name for trace in points} == {"predicted", "random step"}
