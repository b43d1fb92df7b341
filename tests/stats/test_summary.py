"""Summaries: estimates by named columns, each beside its null."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdm_interp.errors import UserError
from mdm_interp.stats.estimates import NOTHING, Contrast, Estimate, mean_estimate
from mdm_interp.stats.summary import Entry, Summary
from mdm_interp.stats.tables import as_columns, estimate_in, estimates_in

ROWS = pd.DataFrame(
    {
        "scheme": ["rope", "rope", "alibi", "alibi"],
        "stage": ["end", "end", "end", "end"],
        "share": [0.1, 0.3, 0.5, None],
        "share_null": [0.0, 0.1, 0.2, 0.2],
        "loss": [1.0, 2.0, 3.0, 4.0],
    }
)
SUMMARY = Summary.of(ROWS, by=("scheme", "stage"), quantities=("share", "loss"))


def test_it_is_the_mean_of_each_group_beside_that_of_its_null() -> None:
    of: dict[str, Any] = {"scheme": "rope", "stage": "end"}
    assert SUMMARY.at("share", **of) == mean_estimate([0.1, 0.3])
    assert SUMMARY.null("share", **of) == mean_estimate([0.0, 0.1])
    assert SUMMARY.contrast("share", **of) == Contrast(mean_estimate([0.1, 0.3]), mean_estimate([0.0, 0.1]))
    assert SUMMARY.at("loss", scheme="alibi", stage="end") == mean_estimate([3.0, 4.0])
    assert SUMMARY.at("loss", **of) == mean_estimate([1.0, 2.0])
    assert SUMMARY.null("loss", **of).n == 0, "it has none"


def test_without_columns_all_rows_are_one_group() -> None:
    assert Summary.of(ROWS, by=(), quantities=("loss",)).at("loss") == mean_estimate([1.0, 2.0, 3.0, 4.0])


def test_nothing_is_there_where_nothing_was_measured() -> None:
    assert SUMMARY.at("share", scheme="learned", stage="end").n == 0


@pytest.mark.parametrize(
    ("quantity", "of"), [("shar", {"scheme": "rope", "stage": "end"}), ("share", {"scheme": "rope"})]
)
def test_an_unknown_quantity_or_other_columns_are_errors_that_say_what_there_is(
    quantity: str, of: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"^quantity: the summary has no .+; ask for one of .*share by scheme, stage"):
        SUMMARY.at(quantity, **of)


def test_an_estimate_is_never_there_twice() -> None:
    with pytest.raises(UserError, match="'loss' of rope, end twice"):
        (SUMMARY + SUMMARY.where("loss")).at("loss", scheme="rope", stage="end")


def test_it_is_a_table() -> None:
    columns = ["scheme", "stage", "quantity", "value", "low", "high", "n"]
    assert list(SUMMARY.frame.columns) == [*columns, *(f"null_{name}" for name in columns[3:])]
    assert SUMMARY.frame["value"].tolist() == pytest.approx([0.2, 1.5, 0.5, 3.5])
    assert len(SUMMARY.where(scheme="rope").frame) == 2
    assert "rope" in repr(SUMMARY)


NUMBER = st.floats(-1e6, 1e6)


@given(value=NUMBER, half=st.floats(0, 1e6), n=st.integers(1, 99))
def test_what_a_row_holds_is_read_as_it_was_written(value: float, half: float, n: int) -> None:
    estimate, null = Estimate(value, value - half, value + half, n), Estimate(0.5, 0.0, 1.0, 3)
    row = {"kind": "a", **as_columns("share", estimate), **as_columns("share_null", null)}
    assert estimate_in(row, "share") == estimate
    assert Summary.read(pd.DataFrame([row]), ("kind",), ("share",)).entries == [
        Entry("share", {"kind": "a"}, estimate, null)
    ]


def test_estimates_of_nothing_are_not_read() -> None:
    rows = pd.DataFrame(
        [{"layer": 0, **as_columns("x", NOTHING)}, {"layer": 1, **as_columns("x", Estimate(1.0, 0.0, 2.0, 3))}]
    )
    rows = rows.astype(object).where(rows.notna(), None)  # as a result holds them
    assert len(Summary.read(rows, ("layer",), ("x",))) == 1
    undefined = Estimate(float("nan"), float("nan"), float("nan"), 3)
    assert estimate_in(as_columns("x", undefined), "x").n == 0, "there were observations, and they say nothing"
    read = estimates_in(rows, "x")
    assert read[["layer", "value", "low", "high", "n"]].to_numpy().tolist() == [[1, 1, 0, 2, 3]]


def test_a_bare_number_has_no_interval() -> None:
    estimate = estimate_in({"x": 0.5}, "x")
    assert (estimate.value, estimate.n) == (0.5, 1) and str(estimate) == "0.5"
