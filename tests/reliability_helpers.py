"""Promises: what faults and bad inputs come to, as tests find it, and the table of docs/reliability.md.

    @pytest.mark.promise("a fault, or an input", "what comes of it")

A test that tries it more than once says how often: `record_property("times", n)`. `pytest --write-reliability` writes
the row of every promise whose tests ran; the other rows stay.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "reliability.md"
HEAD = "| fault or input | times tried | outcome |\n|---|---|---|\n"


class Promise(NamedTuple):
    fault: str
    outcome: str


def promises(folder: Path = TESTS) -> list[Promise]:
    """What the tests of a folder promise, in the order of their files."""
    found = []
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
                found.append(Promise(*map(ast.literal_eval, node.args)))
    return list(dict.fromkeys(found))


def rows(text: str) -> dict[Promise, int]:
    """How often each promise of a table was tried."""
    found = re.findall(r"^\| (.+) \| (\d+) \| (.+) \|$", text.partition(HEAD)[2], re.MULTILINE)
    return {Promise(fault, outcome): int(times) for fault, times, outcome in found}


def table(tried: Mapping[Promise, int], known: Iterable[Promise]) -> str:
    """The rows of those known promises that were tried."""
    return HEAD + "".join(f"| {one.fault} | {tried[one]} | {one.outcome} |\n" for one in known if one in tried)


def mark(item: pytest.Item) -> None:
    """Have the reports of a test say what it promises, also those of another process."""
    for marker in item.iter_markers("promise"):
        item.user_properties.append(("promise", marker.args))  # as a tuple: xdist sends no classes


class Writer:
    """Counts what was tried, and when all tests are done writes the table, and says how often each promise held."""

    def __init__(self, path: Path = TABLE) -> None:
        self.path, self.tried, self.broken = path, defaultdict[Promise, int](int), set[Promise]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = list(report.user_properties)
        for made in (Promise(*value) for name, value in properties if name == "promise"):  # type: ignore[misc]
            if report.failed:
                self.broken.add(made)
            elif report.when == "call" and report.passed:
                self.tried[made] += int(dict(properties).get("times", 1))  # type: ignore[call-overload]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for made, times in self.tried.items():
            held = "not every time of" if made in self.broken else f"{times} of"
            terminalreporter.write_line(f"{held} {times}: {made.fault}: {made.outcome}")

    def pytest_sessionfinish(self) -> None:
        before = self.path.read_text(encoding="utf-8")
        kept = {made: times for made, times in {**rows(before), **self.tried}.items() if made not in self.broken}
        prose = before.partition(HEAD)[0]
        self.path.write_text(prose + table(kept, promises()), encoding="utf-8")
