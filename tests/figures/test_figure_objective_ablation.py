"""The objective ablation: its summary follows from its rows, and its sentence can come out either way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from helpers import with_summary

from analyses import objective_ablation
from mdm_interp.config import Objective
from mdm_interp.experiments.grids import MDM_SCHEMES, OBJECTIVES, objective_grid
from mdm_interp.experiments.results import Result
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Entry


@pytest.fixture(scope="module")
def result(tiny_result: Callable[[str], Result]) -> Result:
    return tiny_result("objective_ablation")


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def test_every_setting_is_measured_at_every_checkpoint(result: Result) -> None:
    grid = objective_grid(range(2), ["relation_cycle"])
    assert {(run.objective, run.model.position) for run in grid} == set(product(OBJECTIVES, MDM_SCHEMES))
    settings = {(row["objective"], row["scheme"], row["seed"]) for row in result.rows}
    assert settings == {(run.objective, run.model.position, run.seed) for run in grid}
    assert result.frame.groupby("run")["step"].agg(["min", "max"]).drop_duplicates().values.tolist() == [[0, 30]]


def test_the_summary_follows_from_the_rows(result: Result) -> None:
    expected: dict[tuple[str, ...], float] = {("chance",): result.rows[0]["chance"]}
    for setting in product(OBJECTIVES, MDM_SCHEMES):
        rows = [row for row in result.rows if (row["objective"], row["scheme"]) == setting]
        for stage in ("early", "end"):
            if at := [row for row in rows if row["stage"] == stage]:
                for side in ("forward", "reverse"):
                    name = f"{side}_probability"
                    expected[(name, *setting, stage)] = mean([row[name] for row in at])
                above = [row["reverse_probability"] - row["chance"] for row in at]
                expected[("above_chance", *setting, stage)] = mean(above)
        seeds = {row["seed"] for row in rows}
        peaks = [max(row["reverse_probability"] for row in rows if row["seed"] == seed) for seed in seeds]
        expected[("reverse_probability", *setting, "highest")] = mean(peaks)
    summary = {(entry.quantity, *entry.of.values()): entry.effect.value for entry in result.summary}
    assert summary == pytest.approx(expected, rel=1e-5)


def test_early_is_where_forward_probability_is_that_of_every_other_run(result: Result) -> None:
    for run in {row["run"] for row in result.rows}:
        rows = [row for row in result.rows if row["run"] == run]
        learnt = [row["step"] for row in rows if row["stage"] == "checkpoint" and row["forward_probability"] >= 0.15]
        early = [row for row in rows if row["stage"] == "early"]
        assert len(early) == bool(learnt), run
        if early:
            assert early[0]["forward_probability"] == pytest.approx(0.15, rel=1e-5)
            assert early[0]["step"] <= min(learnt)


def planted(result: Result, above: dict[Objective, bool]) -> Result:
    """A result with a summary in which the objectives are answered in reverse, or not."""
    entries = []
    for objective, answered in above.items():
        for scheme in MDM_SCHEMES:
            excess, of = 0.7 if answered else -0.01, {"objective": objective, "scheme": scheme, "stage": "end"}
            entries += [
                Entry("above_chance", of, Estimate(excess, excess - 0.005, excess + 0.02, 2)),
                Entry("reverse_probability", of, Estimate(0.25 + excess, 0.2, 0.9, 2)),
            ]
    return with_summary(result, *entries)


@pytest.mark.parametrize("any_order", [True, False])
def test_the_takeaway_says_which_objectives_answer_in_reverse(result: Result, any_order: bool) -> None:
    """An interval that includes chance does not count as above it."""
    single = not any_order
    above: dict[Objective, bool] = {
        "any_order": any_order,
        "source_only": single,
        "target_only": single,
        "causal": False,
    }
    said = objective_ablation.takeaway(planted(result, above))
    assert said.startswith(
        "Yes: masking only one side does not." if any_order else "No: masking only one side does so, too."
    )
    everywhere, nowhere = "under every scheme (0.95)", "in no setting"
    assert f"{everywhere if any_order else nowhere} with any-order masking" in said
    assert f"{everywhere if single else nowhere} with one side masked" in said
    assert "in no setting if predicted from left to right" in said


def test_the_takeaway_says_in_how_many_settings_or_that_nothing_is_shown(result: Result) -> None:
    above: dict[Objective, bool] = {"any_order": True, "source_only": True, "target_only": False, "causal": False}
    said = objective_ablation.takeaway(planted(result, above))
    assert said.startswith("In part: ") and "in 4 of 8 settings (0.95) with one side masked" in said
    none = objective_ablation.takeaway(planted(result, dict.fromkeys(above, False)))
    assert none.startswith("Not shown: ")


def test_a_stage_that_no_run_reached_has_no_panel(result: Result) -> None:
    unlearnt = replace(result, rows=[row for row in result.rows if row["stage"] != "early"])
    assert not len(unlearnt.summary.where("reverse_probability", stage="early"))
    figures: list[Any] = [objective_ablation.draw(one).figure() for one in (result, unlearnt)]
    drawn = [sum(trace.type == "heatmap" for trace in figure.data) for figure in figures]
    assert drawn == [3, 2]
