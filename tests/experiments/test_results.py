"""Result files: what is written is what is read, and a file that is no result says so."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm_interp.errors import UserError
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where

NAN = float("nan")
ESTIMATE = Estimate(0.5, 0.25, 0.75, 3)
CELLS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


def result(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "name": "dummy",
        "question": "Is 1 more than 0?",
        "config": {"settings": {"distances": [1, 2]}, "runs": ["abc"]},
        "seeds": [0, 1],
        "versions": {"code": "0123", "torch": "2.6"},
        "rows": [{"seed": 0, "value": 0.25}, {"seed": 1, "value": None}],
        "summary": {"value": ESTIMATE},
    }
    return Result(**{**fields, **changes})


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


# ---- writing and reading


@given(st.lists(st.dictionaries(st.text(), CELLS, max_size=4), max_size=4))
def test_tidy_rows_come_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    written = result(rows=tidy(rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dummy.json"
        written.save(path)
        text = path.read_text(encoding="utf-8")
        assert Result.load(path) == written
    json.loads(text, parse_constant=refuse)
    lines = text.splitlines()
    first = lines.index('  "rows": [') + 1
    assert [json.loads(line.removesuffix(",")) for line in lines[first:-2] if line.strip()] == written.rows


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([float, np.float64, torch.tensor]))
def test_tidy_keeps_six_digits_of_any_kind_of_number(number: float, kind: Any) -> None:
    if kind is torch.tensor:
        kind = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    ((row,),) = [tidy([{"value": kind(number)}])]
    assert type(row["value"]) is float
    assert math.isclose(row["value"], number, rel_tol=5.000001e-6, abs_tol=5e-324)


def test_tidy_makes_plain_python_values() -> None:
    row = {"int": np.int64(3), "bool": np.bool_(True), "nan": NAN, "infinite": -math.inf, "text": "ü", "none": None}
    (tidied,) = tidy([row])
    assert tidied == {"int": 3, "bool": True, "nan": None, "infinite": None, "text": "ü", "none": None}
    assert [type(tidied[name]) for name in ("int", "bool")] == [int, bool]
    assert math.isnan(row["nan"]), "the row given was changed"


def test_a_summary_without_a_value_is_null_on_disk_and_nan_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "dummy.json"
    result(summary={"absent": mean_estimate([]), "value": ESTIMATE}).save(path)
    stored = json.loads(path.read_text(), parse_constant=refuse)["summary"]
    assert stored["absent"] == {"value": None, "low": None, "high": None, "n": 0}
    summary = Result.load(path).summary
    assert summary["value"] == ESTIMATE
    assert summary["absent"].n == 0
    assert all(math.isnan(number) for number in (summary["absent"].value, summary["absent"].low))


def test_a_file_that_is_replaced_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "dummy.json"
    result().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        result(rows=[{"value": NAN}]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"summary"', '"sumary"'),
        lambda text: text.replace('"seeds"', '"sedes"'),
        lambda text: text.replace('"low"', '"lowest"'),
    ],
    ids=["truncated", "empty", "a list", "no fields", "no summary", "a field renamed", "an estimate renamed"],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "dummy.json"
    result().save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"not a result file .*; measure it again") as caught:
        Result.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: not a result file"):
        Result.load(tmp_path / "nowhere.json")


# ---- what makes two measurements the same


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [0, 1, 2]},
        {"config": {"settings": {"distances": [1, 3]}, "runs": ["abc"]}},
        {"config": {"settings": {"distances": [1, 2]}, "runs": ["abd"]}},
        {"versions": {"code": "0124", "torch": "2.6"}},
        {"versions": {"code": "0123", "torch": "2.7"}},
        {"question": "Is 1 less than 0?"},
    ],
    ids=lambda change: " ".join(change),
)
def test_anything_a_measurement_depends_on_makes_it_another(change: dict[str, Any]) -> None:
    assert not result().same_measurement(result(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [], "summary": {}},
        {"machine": {"cpu": "Another", "threads": 9}},
        {"made_with": [{"runs": 1, "by": [{"torch": "2.7"}]}]},
    ],
    ids=lambda change: " ".join(change),
)
def test_numbers_machines_and_what_trained_the_runs_do_not_make_it_another(change: dict[str, Any]) -> None:
    assert result().same_measurement(result(**change))


def test_a_result_from_before_machines_were_recorded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "dummy.json"
    result(machine={"threads": 1}, made_with=[{"runs": 1, "by": [{}]}]).save(path)
    content = json.loads(path.read_text())
    del content["machine"], content["made_with"]
    path.write_text(json.dumps(content))
    assert Result.load(path) == result()


def test_settings_that_json_changes_are_still_the_same_measurement(tmp_path: Path) -> None:
    """A tuple, and a float of more digits than rows keep, such as the default standard deviation of the weights."""
    written = result(config={"pair": (1, 2), "initializer_range": 0.8 / 32**0.5})
    written.save(tmp_path / "dummy.json")
    assert Result.load(tmp_path / "dummy.json").same_measurement(written)


# ---- tables


def test_the_frame_holds_the_rows() -> None:
    frame = result().frame
    assert list(frame.columns) == ["seed", "value"]
    assert frame["seed"].tolist() == [0, 1]
    assert frame["value"].isna().tolist() == [False, True]


def test_where_keeps_rows_that_equal_all_values() -> None:
    rows = [{"a": a, "b": b, "value": 10.0 * a + b} for a in (0, 1) for b in (0, 1)]
    assert where(replace(result(), rows=rows).frame, a=1, b=0)["value"].tolist() == [10.0]


def test_a_curve_averages_over_seeds_at_each_x() -> None:
    rows = [{"step": step, "value": step + offset} for step in (1, 10) for offset in (0.0, 2.0)]
    points = curve(replace(result(), rows=rows).frame, "step", "value")
    assert points["step"].tolist() == [1, 10]
    assert points["value"].tolist() == [2.0, 11.0]
    half = 12.7062  # the 97.5 % point of Student's t with 1 degree of freedom; the standard error is 1
    assert points["low"].tolist() == pytest.approx([2 - half, 11 - half], abs=1e-4)
    assert points["high"].tolist() == pytest.approx([2 + half, 11 + half], abs=1e-4)
    assert points["n"].tolist() == [2, 2]
