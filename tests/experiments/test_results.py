"""Result files: what is written is what is read, and a file that is no result says so."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage_helpers import damaged
from helpers import planted_result
from hypothesis import given
from hypothesis import strategies as st
from stranger_helpers import outcome_of

from mdm_interp.errors import UserError
from mdm_interp.experiments.results import CheckpointOrigin, Parts, Result, TrainedOrigin, tidy
from mdm_interp.files import json_digest
from mdm_interp.stats.summary import Summary
from mdm_interp.stats.tables import curve, where

NAN = float("nan")
CELLS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
FEW = st.sampled_from([None, True, False, 1, 0, 1.0, 0.0, "", "1", "1.0"])
"""Of which many are equal in Python, and none is another in a file."""
RUNS = TrainedOrigin(kind="runs", runs=["abc"], first_seed=[{"seed": 0, "initializer_range": 0.8 / 32**0.5}])
CHECKPOINT = CheckpointOrigin(
    checkpoint="LLaDA",
    model={"n_layers": 32},
    digest="d1",
    facts=7,
    pairs={"positional": 14},
    skipped={"positional": 1},
    reasons={"positional": ["row 3: “Åsa” is no name"]},
    twin=None,
)
FIELDS = ("name", "question", "origin", "settings", "seeds", "versions", "columns", "n_rows")
TWINS = CHECKPOINT.model_copy(update={"twin": CHECKPOINT.model_copy(update={"checkpoint": "LLaMA"})})


def result(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "question": "Is 1 more than 0?",
        "origin": RUNS,
        "settings": {"distances": [1, 2]},
        "seeds": [0, 1],
        "versions": {"code": "0123", "torch": "2.6"},
    }
    rows = changes.pop("rows", [{"seed": 0, "value": 0.25}, {"seed": 1, "value": None}])
    return replace(planted_result("dummy", [], **fields), rows=rows, **changes)


def summarize(result: Result) -> Summary:
    return Summary.of(result.frame.assign(rows=float(len(result.rows))), (), ("value", "rows"))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def kinds(rows: list[dict[str, Any]]) -> list[dict[str, tuple[type, Any]]]:
    """Rows with their cells' types: to Python, 1 and 1.0 and True are equal."""
    return [{name: (type(value), value) for name, value in row.items()} for row in rows]


# ---- writing and reading


def assert_comes_back(written: Result) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dummy.json"
        written.save(path)
        text = path.read_text(encoding="utf-8")
        read = Result.load(path)
    assert read == written
    assert kinds(read.rows) == kinds(written.rows)
    json.loads(text, parse_constant=refuse)
    return text


@given(st.lists(st.dictionaries(st.text(), CELLS, max_size=4), max_size=4))
def test_tidy_rows_come_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    assert_comes_back(result(rows=tidy(rows)))


@given(st.lists(st.tuples(FEW, st.integers(1, 9)), max_size=12), st.lists(FEW, min_size=1, max_size=3))
def test_columns_that_repeat_themselves_come_back_as_they_were(runs: list[tuple[Any, int]], others: list[Any]) -> None:
    column = [value for value, count in runs for _ in range(count)]
    assert_comes_back(result(rows=[{"one": value, "": others[i % len(others)]} for i, value in enumerate(column)]))


@pytest.mark.parametrize(
    "changes",
    [
        {"origin": TWINS},
        {"origin": CHECKPOINT, "seeds": []},
        {"origin": RUNS.model_copy(update={"kind": "demos"})},
        {"rows": []},
        {"settings": {}},
        {"name": 'ü\n"', "question": "Ist „ü“\\n?"},
        {"measured_with": {"cpu": "One", "threads": 3}, "made_with": [{"runs": 2, "by": [{"torch": "2.6"}, {}]}]},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_all_that_a_result_says_of_itself_comes_back(changes: dict[str, Any]) -> None:
    assert_comes_back(result(**changes))


def test_a_file_has_a_line_per_field_and_per_column() -> None:
    text = assert_comes_back(result(rows=[{"seed": i // 500, "run": f"r{i // 500}", "value": i} for i in range(1000)]))
    fields = {line.split(":")[0].strip(' "{') for line in text.splitlines()}
    assert {"name", "question", "origin", "settings", "seeds", "versions", "measured_with", "made_with"} <= fields
    assert {"seed", "run", "value"} <= fields
    assert len(text.splitlines()) == len(fields) + 1, "and one for the end"
    assert json.loads(text)["n_rows"] == 1000


@pytest.mark.parametrize("value", ["a long text, as the name of a run is", 0.123456, None, True])
def test_a_column_that_repeats_itself_costs_little(value: Any) -> None:
    def size(rows: list[dict[str, Any]]) -> int:
        return len(assert_comes_back(result(rows=rows)))

    varied = [{"value": i / 1000} for i in range(1000)]
    assert size([{**row, "same": value} for row in varied]) - size(varied) < 100
    blocks = [{**row, "block": f"{value} {i // 100}"} for i, row in enumerate(varied)]
    assert size(blocks) - size(varied) < 1000


def test_a_row_lacks_a_column_only_until_it_is_read(tmp_path: Path) -> None:
    """`tidy` gives every row all columns; where somebody does not call it, what is missing is read as None."""
    result(rows=[{"a": 1}, {"b": 2}]).save(tmp_path / "dummy.json")
    assert Result.load(tmp_path / "dummy.json").rows == [{"a": 1, "b": None}, {"a": None, "b": 2}]


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


def test_tidy_gives_every_row_every_column_in_one_order() -> None:
    assert [list(row) for row in tidy([{"b": 1, "a": 2}, {"c": 3}, {"a": 4, "b": 5}])] == [["b", "a", "c"]] * 3
    assert tidy([{"b": 1}, {"c": 3}]) == [{"b": 1, "c": None}, {"b": None, "c": 3}]


def test_a_summary_is_computed_from_the_rows_and_never_stored(tmp_path: Path) -> None:
    path = tmp_path / "dummy.json"
    written = result(summarize=summarize)
    assert written.summary.at("value").value == 0.25
    written.save(path)
    assert "summary" not in json.loads(path.read_text())
    assert len(Result.load(path).summary) == 0
    assert Result.load(path, summarize).summary.at("value").value == 0.25
    content = json.loads(path.read_text())
    content["columns"]["value"] = [0.5, 0.75]
    del content["digest"]
    path.write_text(json.dumps({**content, "digest": json_digest(content)}))
    assert Result.load(path, summarize).summary.at("value").value == 0.625
    more = replace(written, rows=[*written.rows, {"seed": 2, "value": 0.75}])
    assert (more.summary.at("rows").value, more.summary.at("value").value) == (3, 0.5), "nor kept from other rows"


def test_a_file_that_is_replaced_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "dummy.json"
    result().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        result(rows=[{"value": NAN}]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def changed(**changes: Any) -> Any:
    """A file with some fields replaced, or left out where a change is `...`."""

    def damage(text: str) -> str:
        content = {name: value for name, value in {**json.loads(text), **changes}.items() if value is not ...}
        return json.dumps(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "null",
        lambda text: "\udcff",
        *(
            changed(**{field: ...})
            for field in ("name", "origin", "settings", "seeds", "versions", "columns", "n_rows")
        ),
        changed(summary={}),
        changed(n_rows=3),
        changed(columns={"seed": [0, 1], "value": [0.25]}),
        changed(columns={"value": {"values": [0.25], "runs": [[0, 3]]}}),
        changed(columns={"value": {"values": [0.25], "runs": [[1, 2]]}}),
        changed(columns={"value": {"values": [0.25]}}),
        changed(columns={"value": 3}),
        changed(columns=[[0, 1]]),
        changed(origin={}),
        changed(origin={"kind": "guesses", "runs": [], "first_seed": []}),
        changed(origin={"kind": "runs", "runs": ["abc"]}),
        changed(origin={"kind": "runs", "runs": ["abc"], "first_seed": [], "more": 1}),
        changed(origin={**CHECKPOINT.model_dump(), "facts": "many"}),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "dummy.json"
    result().save(path)
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"not a result file .*; measure it again") as caught:
        Result.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "edited",
    [
        {"columns": {"seed": [0, 1], "value": [0.26, None]}},
        {"columns": {"seed": [0, 1], "value": {"values": [0.25, None], "runs": [[1, 1], [0, 1]]}}},
        {"seeds": [0, 2]},
        {"settings": {"distances": [1, 3]}},
        {"question": "Is 1 less than 0?"},
        {"origin": {**RUNS.model_dump(), "runs": ["abd"]}},
        {"versions": {"code": "0124", "torch": "2.6"}},
        {"made_with": [{"runs": 9, "by": []}]},
        {"digest": "0123456789abcdef"},
        {"digest": 7},
    ],
    ids=lambda edited: " ".join(edited),
)
def test_a_result_that_was_edited_is_refused_by_name(tmp_path: Path, edited: dict[str, Any]) -> None:
    path = tmp_path / "dummy.json"
    result().save(path)
    path.write_text(changed(**edited)(path.read_text()))
    with pytest.raises(UserError) as caught:
        Result.load(path)
    assert str(caught.value) == (
        f"{path}: is not as it was measured, but edited or damaged; delete it, and measure it again"
    )


@pytest.mark.promise("a flipped bit or a lost end, anywhere in a result", "noticed and named, or nothing is changed")
def test_damage_anywhere_in_a_result_is_noticed_or_changes_nothing(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    path, times, noticed = tmp_path / "dummy.json", 0, 0
    result(rows=[{"seed": i // 9, "value": i / 7} for i in range(99)]).save(path)
    whole = Result.load(path)
    for how in damaged(path, 400):
        times += 1
        try:
            assert Result.load(path) == whole, how
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 500, how
            noticed += 1
    assert noticed > 0.95 * times
    record_property("times", times)


@pytest.mark.promise("a flipped bit or a lost end in rows of an interrupted measurement", "they are measured again")
def test_damage_anywhere_in_kept_rows_is_noticed_or_changes_nothing(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    parts, rows, times, noticed = Parts(tmp_path, result()), [{"value": i / 7} for i in range(20)], 0, 0
    parts.save("abc", rows)
    for how in damaged(parts.folder / "abc.json", 400):
        found = parts.load("abc")
        assert found in (None, rows), how
        times, noticed = times + 1, noticed + (found is None)
    assert noticed > 0.9 * times
    record_property("times", times)


@pytest.mark.promise("a result of the wrong shape, or of no end", "refused by name on one line, in 10 s and 2 GiB")
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "[" * 10**6,
        lambda text: '{"a":' * 10**5 + "1" + "}" * 10**5,
        changed(seeds="01"),
        changed(seeds=["0", "1"]),
        changed(seeds=[True]),
        changed(settings=[]),
        changed(versions=[]),
        changed(versions={"code": 3}),
        changed(measured_with=[]),
        changed(made_with={}),
        changed(made_with=[3]),
        changed(name=["dummy"]),
        changed(question=None),
        changed(n_rows="2"),
        changed(n_rows=-1),
        changed(n_rows=10**12, columns={}),
        changed(n_rows=10**12, columns={"value": {"values": [1], "runs": [[0, 10**12]]}}),
        changed(columns={"value": {"values": [1], "runs": [[0, 10**12]]}}),
        changed(columns={"value": {"values": [1], "runs": [3]}}),
        changed(columns={"value": {"values": [1], "runs": [[0, "2"]]}}),
        changed(columns={"value": {"values": 3, "runs": [[0, 2]]}}),
    ],
)
def test_a_result_of_the_wrong_shape_is_refused_in_time_and_memory(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "dummy.json"
    result().save(path)
    path.write_text(damage(path.read_text()))
    outcome = outcome_of(lambda: Result.load(path))
    assert outcome.startswith(f"{path}: not a result file (") and outcome.endswith("; measure it again"), outcome


def test_a_result_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dummy.json")
    assert "it is no regular file" in outcome_of(lambda: Result.load(tmp_path / "dummy.json"))


def test_rows_that_are_not_those_of_the_analysis_are_one_line(tmp_path: Path) -> None:
    """Of a stranger's file, or of a version in which the analysis measured something else."""
    result(rows=[{"other": "x"}]).save(tmp_path / "dummy.json")
    read = Result.load(tmp_path / "dummy.json", summarize)
    with pytest.raises(UserError, match=r"^dummy\.json: its rows cannot be summed up \(\w+: .+\); measure it again$"):
        _ = read.summary


def test_a_result_that_was_only_laid_out_anew_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "dummy.json"
    result(settings={"ü": 1e-7, "range": 0.8 / 32**0.5}).save(path)
    before = Result.load(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=4))
    assert Result.load(path) == before


def test_a_result_without_a_digest_is_read_with_a_warning_and_rows_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "dummy.json"
    result().save(path)
    path.write_text(changed(digest=..., seeds=[0, 2])(path.read_text()))
    with pytest.warns(UserWarning, match=rf"^{path}: has no digest: it cannot be checked; measure it again$"):
        assert Result.load(path).seeds == [0, 2]
    parts = Parts(tmp_path, result())
    parts.save("abc", [{"value": 1.5}])
    kept = parts.folder / "abc.json"
    kept.write_text(changed(digest=...)(kept.read_text()))
    assert parts.load("abc") is None


@pytest.mark.parametrize("edited", [{"rows": [{"value": 1.6}]}, {"digest": "0" * 16}, {"rows": ...}])
def test_kept_rows_that_were_edited_are_measured_again(tmp_path: Path, edited: dict[str, Any]) -> None:
    parts = Parts(tmp_path, result())
    parts.save("abc", [{"value": 1.5}])
    assert parts.load("abc") == [{"value": 1.5}]
    kept = parts.folder / "abc.json"
    kept.write_text(changed(**edited)(kept.read_text()))
    assert parts.load("abc") is None
    kept.write_text("[]")
    assert parts.load("abc") is None


def test_a_result_of_an_earlier_layout_is_named(tmp_path: Path) -> None:
    """With a row per line, a summary, and one dictionary for settings and runs."""
    path = tmp_path / "old.json"
    old = {"name": "old", "question": "?", "config": {"settings": {}, "runs": []}, "seeds": [0], "versions": {}}
    path.write_text(json.dumps({**old, "rows": [{"value": 1}], "summary": {}, "machine": {}, "made_with": []}))
    with pytest.raises(UserError, match=r"old\.json: not a result file .*; measure it again"):
        Result.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: not a result file"):
        Result.load(tmp_path / "nowhere.json")


# ---- what makes two measurements the same


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"seeds": [0, 1, 2]},
        {"seeds": [1, 0]},
        {"settings": {"distances": [1, 3]}},
        {"settings": {}},
        {"origin": RUNS.model_copy(update={"runs": ["abd"]})},
        {"origin": RUNS.model_copy(update={"kind": "demos"})},
        {"origin": RUNS.model_copy(update={"first_seed": [{"seed": 0}]})},
        {"origin": CHECKPOINT},
        {"versions": {"code": "0124", "torch": "2.6"}},
        {"versions": {"code": "0123", "torch": "2.7"}},
        {"versions": {"code": "0123"}},
    ],
    ids=lambda change: " ".join(change),
)
def test_anything_a_measurement_depends_on_makes_it_another(change: dict[str, Any]) -> None:
    assert not result().same_measurement(result(**change))
    assert not result(**change).same_measurement(result())


@pytest.mark.parametrize("field", ["checkpoint", "digest", "facts", "pairs", "skipped", "model", "twin"])
def test_another_checkpoint_or_twin_makes_it_another(field: str) -> None:
    other: Any = {"facts": 8, "twin": CHECKPOINT}.get(field, "x" if field in ("checkpoint", "digest") else {"x": 1})
    twin = TWINS.twin
    assert twin
    for changed in (
        TWINS.model_copy(update={field: other}),
        TWINS.model_copy(update={"twin": twin.model_copy(update={field: other})}),
    ):
        assert not result(origin=TWINS).same_measurement(result(origin=changed))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"measured_with": {"cpu": "Another", "threads": 9}},
        {"made_with": [{"runs": 1, "by": [{"torch": "2.7"}]}]},
        {"question": "Is 1 less than 0?"},
        {"summarize": summarize},
    ],
    ids=lambda change: " ".join(change),
)
def test_numbers_wordings_machines_and_what_trained_the_runs_do_not_make_it_another(change: dict[str, Any]) -> None:
    assert result().same_measurement(result(**change))


def test_what_json_changes_is_still_the_same_measurement(tmp_path: Path) -> None:
    """A tuple, a key that is no text, and a float of more digits than rows keep, such as the default standard deviation
    of the weights."""
    written = result(settings={"pair": (1, 2), "initializer_range": 0.8 / 32**0.5, "by layer": {1: "x"}})
    written.save(tmp_path / "dummy.json")
    assert Result.load(tmp_path / "dummy.json").same_measurement(written)
    assert written.same_measurement(Result.load(tmp_path / "dummy.json"))


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
