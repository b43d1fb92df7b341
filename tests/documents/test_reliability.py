"""The table of what faults come to: exactly what the tests promise, and only what passed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reliability_helpers import HEAD, TABLE, Promise, Writer, promises, rows, table


def test_the_table_has_exactly_what_the_tests_promise() -> None:
    written = rows(TABLE.read_text(encoding="utf-8"))
    assert list(written) == promises(), "run those tests with --write-reliability"
    assert len(written) >= 15
    assert min(written.values()) >= 1


def test_promises_are_read_off_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("import pytest\n@pytest.mark.promise('a ' 'b', 'c')\ndef test_it(): pass\n")
    assert promises(tmp_path) == [Promise("a b", "c")]


def test_a_fault_or_an_outcome_stands_in_one_cell() -> None:
    for promise in promises():
        for text in promise:
            assert text == text.strip() and "|" not in text and "\n" not in text
        assert len(promise.fault) <= 100 and len(promise.outcome) <= 100


def report(promise: Promise, outcome: str = "passed", when: str = "call", **properties: object) -> Any:
    said = [("promise", tuple(promise)), *properties.items()]  # as another process sends it
    return SimpleNamespace(user_properties=said, when=when, passed=outcome == "passed", failed=outcome == "failed")


def test_what_ran_is_counted_and_what_failed_has_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, broken, not_run, gone = (Promise(name, "all is well") for name in ("held", "broken", "not run", "gone"))
    monkeypatch.setattr("reliability_helpers.promises", lambda: [held, broken, not_run])
    path = tmp_path / "table.md"
    path.write_text("# Words\n\n" + table({held: 1, broken: 2, not_run: 3, gone: 4}, [held, broken, not_run, gone]))
    writer = Writer(path)
    for one in (
        report(held, times=7),
        report(held),
        report(held, when="setup"),
        report(held, "skipped"),
        report(broken),
        report(broken, "failed", "teardown"),
    ):
        writer.pytest_runtest_logreport(one)
    said = list[str]()
    writer.pytest_terminal_summary(SimpleNamespace(write_line=said.append))  # type: ignore[arg-type]
    assert said == ["8 of 8: held: all is well", "not every time of 1: broken: all is well"]
    writer.pytest_sessionfinish()
    assert path.read_text() == f"# Words\n\n{HEAD}| held | 8 | all is well |\n| not run | 3 | all is well |\n"
