"""The map: its columns are those of the sweep's file, what it says follows from the rows, and a predictor is found
where one was planted and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import REAL_MAP, planted_result

from analyses import phase_diagram
from analyses.phase_diagram import AXES, EXPLAINING, HEADS, KNOWN, coarse, columns_of, settings_of, share
from mdm_interp.experiments.results import Result
from mdm_interp.stats import held_out

COLUMNS = columns_of(REAL_MAP)


@pytest.fixture(autouse=True)
def few_halvings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "N_HALVINGS", 100)


def planted(reverse: Callable[[int, int], float], told: str | None, *, unlearnt: str = "") -> Result:
    """A map on which `reverse` gives the outcome of each column and number of heads, and `told` is it, rising or
    falling at random otherwise."""
    chooser, rows = np.random.default_rng(0), []
    for at, column in enumerate(COLUMNS):
        for run, n_heads in column.runs.items():
            if any(row["run"] == run for row in rows):
                continue
            value = reverse(at, n_heads)
            numbers: dict[str, Any] = {name: chooser.uniform() for name in EXPLAINING}
            numbers |= {f"{name}_null": 0.0 for name in EXPLAINING} | ({told: value**2} if told in EXPLAINING else {})
            for stage, forward in {"early": 0.5, "learnt": 0.9, "end": 0.95}.items():
                if stage == "learnt" and run == unlearnt:
                    continue
                answered = {"early": chooser.uniform(), "learnt": value, "end": 0.9 * value}[stage]
                asked = {"forward_probability": forward + (stage == "end") * 0.04 * chooser.uniform()}
                asked |= {"reverse_probability": answered, "exposures": chooser.uniform()}
                rows.append({"run": run, "stage": stage, "seed": 0, **numbers, **asked})
    rows = [{name: round(x, 6) if isinstance(x, float) else x for name, x in row.items()} for row in rows]
    return planted_result("phase_diagram", rows, summarize=phase_diagram.summarize)


def gradual(at: int, n_heads: int) -> float:
    return ((7 * at + n_heads) % 31) / 31


def test_every_point_of_the_file_is_a_column_of_one_axis_with_a_name_of_its_own() -> None:
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names) == len(REAL_MAP.points or ())
    assert [column.axis for column in COLUMNS if not column.axis] == [""]
    assert {column.axis for column in COLUMNS} == {"", *AXES}
    fields = {field for fields in AXES.values() for field in fields}
    assert {field for point in REAL_MAP.points or () for field in point} == fields
    digests = {config.digest() for config in REAL_MAP.configs}
    assert {run for column in COLUMNS for run in column.runs} == digests
    assert all(sorted(set(column.runs.values())) == HEADS for column in COLUMNS)


def test_the_coarse_map_is_part_of_the_whole_one(real_grid: None) -> None:
    whole = {run for column in COLUMNS for run in column.runs}
    assert {config.digest() for config in coarse(range(3))} <= whole
    assert len(coarse(range(3))) == 5 and len(coarse(range(10))) == 30


def test_a_setting_is_the_mean_of_its_seeds_and_left_out_unless_all_learnt_it() -> None:
    first, *_ = COLUMNS[0].runs
    result = planted(gradual, None)
    table = settings_of(result)
    row = table[(table["axis"] == "") & (table["n_heads"] == 1)].iloc[0]
    assert (row["reverse"], len(row["runs"])) == (pytest.approx(gradual(0, 1), abs=1e-6), 2)
    early = result.frame[(result.frame["stage"] == "early") & result.frame["run"].isin(COLUMNS[0].runs)]
    of_one = early[early["run"].map(COLUMNS[0].runs) == 1]
    assert row["alignment"] == pytest.approx(of_one["alignment"].mean())
    assert row["reverse_early"] == pytest.approx(of_one["reverse_probability"].mean())
    without = settings_of(planted(gradual, None, unlearnt=first))
    row = without[(without["axis"] == "") & (without["n_heads"] == COLUMNS[0].runs[first])].iloc[0]
    assert np.isnan(row["reverse"]) and row["reverse_end"] > 0


@pytest.mark.parametrize("told", EXPLAINING)
def test_what_predicts_the_border_is_found(told: str) -> None:
    result = planted(gradual, told)
    assert result.summary.at("explained", by=told).low > 0.8
    assert all(result.summary.at("explained_more", by=told, than=known).side == "above" for known in KNOWN)
    said = phase_diagram.takeaway(result)
    assert f"“{EXPLAINING[told]}” predicts it best" in said and "not surely" not in said


def test_where_nothing_predicts_it_the_sentence_says_so() -> None:
    said = phase_diagram.takeaway(planted(gradual, None))
    assert "not surely better than without looking inside" in said


def test_a_coarse_map_says_where_it_holds_and_no_more(real_grid: None) -> None:
    whole = planted(lambda at, n_heads: 0.9 if n_heads == 1 else 0.1, None)
    kept = {config.digest() for config in coarse(range(3))}
    rows = [row for row in whole.rows if row["run"] in kept]
    result = planted_result("phase_diagram", rows, summarize=phase_diagram.summarize)
    said = phase_diagram.takeaway(result)
    assert "in all 4 settings with 1 head and in none of 1 settings with 4 heads (n = 1 seed each)" in said
    assert "too few to tell" in said


def test_a_share_counts_signs() -> None:
    assert share(3.0, 1.0) == 0.75 and share(-3.0, 1.0) == -0.75 and share(1.0, -3.0) == 0.25
    assert np.isnan(share(0.0, 0.0))
