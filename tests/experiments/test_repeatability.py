"""The whole way, from configs to summaries, taken twice: what was measured once is measured again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_grid

from mdm_interp.experiments.analysis import Analysis, discover
from mdm_interp.experiments.subjects import Lab

ANALYSES = [analysis for analysis in discover() if type(analysis) is Analysis]
"""Those of the grids of runs, which are tiny here."""
SLOW = {"interventions", "first_order", "depth"}
FEW = 8
"""Of how many runs each is measured."""
EVERY = [
    pytest.param(analysis, id=analysis.name, marks=[pytest.mark.slow] if analysis.name in SLOW else [])
    for analysis in ANALYSES
]
EXACT = 1e-5
"""Relative and absolute: rows keep 6 digits."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two empty run stores: what one holds is never seen by the other."""
    with tiny_grid():
        yield [tmp_path_factory.mktemp("store") for _ in range(2)]


def of_few_runs(analysis: Analysis) -> Analysis:
    """An analysis of a part of its runs, from all over its grids."""

    def configs(seeds: Sequence[int]) -> list[Any]:
        every = list(analysis.configs(seeds))
        return every[:: math.ceil(len(every) / FEW)]

    return replace(analysis, configs=configs)


def assert_same_rows(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for column, value in row.items():
            assert other[column] == (
                pytest.approx(value, rel=EXACT, abs=EXACT) if isinstance(value, float) else value
            ), column


@pytest.mark.parametrize("analysis", EVERY)
def test_the_same_seeds_trained_and_measured_again_give_the_same_rows_and_summary(
    analysis: Analysis, stores: list[Path], tmp_path: Path
) -> None:
    few = of_few_runs(analysis)
    first, again = (few.result(Lab(n_seeds=2, root=store), tmp_path / store.name) for store in stores)
    assert len({row["run"] for row in first.rows}) > 3
    assert_same_rows(first.rows, again.rows)
    for one, other in zip(first.summary, again.summary, strict=True):
        assert (one.quantity, one.of) == (other.quantity, other.of)
        estimate, repeated, slack = one.effect, other.effect, EXACT * max(1.0, abs(one.effect.value))
        assert repeated.n == estimate.n, one
        low, high = (estimate.low, estimate.high) if estimate.n > 1 else (estimate.value, estimate.value)
        assert not estimate.n or low - slack <= repeated.value <= high + slack, one


def test_another_seed_gives_other_rows(stores: list[Path]) -> None:
    (analysis,) = [analysis for analysis in ANALYSES if analysis.name == "reversal_curse"]
    lab = Lab(n_seeds=2, root=stores[0])
    of_seeds = [lab.runs(analysis.configs([seed])) for seed in (0, 1)]
    zero, one = ([row for run in runs for row in analysis.rows(run)] for runs in of_seeds)
    with pytest.raises(AssertionError):
        assert_same_rows(
            [{**row, "seed": 0, "run": ""} for row in zero], [{**row, "seed": 0, "run": ""} for row in one]
        )
