"""The whole way, from configs to summaries, taken twice: what was measured once is measured again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import few_of

from mdm_interp.experiments.analysis import Analysis, discover
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import Lab

ANALYSES = [analysis for analysis in discover() if type(analysis) is Analysis]
"""Those of the grids of runs, which are tiny here."""
FEW = 8
"""How many of its runs each measures again."""
FROM_THE_LAST = [pytest.param(analysis, id=analysis.name) for analysis in reversed(ANALYSES)]
"""Another process may be measuring them from the first, and neither is to wait for the other."""
EXACT = 1e-5
"""Relative and absolute: rows keep 6 digits."""

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty run store: what that of `tiny_result` holds is never seen by it."""
    return tmp_path_factory.mktemp("store")


def of_few_runs(analysis: Analysis, lab: Lab) -> Analysis:
    """An analysis of a part of the runs that `tiny_result` has of it, from all over its grids."""
    every = list(few_of(analysis).configs(lab.seeds))
    return replace(analysis, configs=lambda seeds: every[:: math.ceil(len(every) / FEW)])


def assert_same_rows(rows: Rows, others: Rows) -> None:
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for column, value in row.items():
            assert other[column] == (
                pytest.approx(value, rel=EXACT, abs=EXACT) if isinstance(value, float) else value
            ), column


def defined(rows: Rows) -> Rows:
    """Rows without the columns in which they have nothing, which are there for the sake of other rows."""
    return [{column: value for column, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("analysis", FROM_THE_LAST)
def test_the_same_seeds_trained_and_measured_again_give_the_same_rows_and_summary(
    analysis: Analysis, tiny_result: Callable[[str], Result], store: Path, tmp_path: Path
) -> None:
    lab = Lab(n_seeds=2, root=store)
    again = of_few_runs(analysis, lab).result(lab, tmp_path)
    runs = {row["run"] for row in again.rows}
    assert len(runs) > 3
    first = replace(again, rows=[row for row in tiny_result(analysis.name).rows if row["run"] in runs])
    assert_same_rows(defined(first.rows), defined(again.rows))
    for one, other in zip(first.summary, again.summary, strict=True):
        assert (one.quantity, one.of) == (other.quantity, other.of)
        estimate, repeated, slack = one.effect, other.effect, EXACT * max(1.0, abs(one.effect.value))
        assert repeated.n == estimate.n, one
        low, high = (estimate.low, estimate.high) if estimate.n > 1 else (estimate.value, estimate.value)
        assert not estimate.n or low - slack <= repeated.value <= high + slack, one


@pytest.mark.usefixtures("tiny_result")
def test_another_seed_gives_other_rows(store: Path) -> None:
    (analysis,) = [analysis for analysis in ANALYSES if analysis.name == "reversal_curse"]
    lab = Lab(n_seeds=2, root=store)
    of_seeds = [lab.runs(analysis.configs([seed])) for seed in (0, 1)]
    zero, one = ([row for run in runs for row in analysis.rows(run)] for runs in of_seeds)
    with pytest.raises(AssertionError):
        assert_same_rows(
            [{**row, "seed": 0, "run": ""} for row in zero], [{**row, "seed": 0, "run": ""} for row in one]
        )
