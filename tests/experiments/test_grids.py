"""The grids of runs, how a setting is called, and what a stage of training is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdm_interp.experiments import grids
from mdm_interp.experiments.grids import (
    BOTH_WAYS,
    CYCLE,
    FULL_SEEDS,
    POOL,
    QUICK_SEEDS,
    every_run,
    head_grid,
    pool_grid,
)
from mdm_interp.experiments.scope import (
    about,
    all_checkpoints,
    metrics_at,
    rows_of,
    scope_label,
    second_checkpoints,
    stages,
    trained_stages,
)
from mdm_interp.training.runs import RECORDED, Run

pytestmark = pytest.mark.usefixtures("real_grid")


class Recorded(Run):
    """A run whose checkpoints are where its metrics are."""

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.metrics()]


NOTHING = dict.fromkeys(RECORDED, 0.0)
"""What training records, where all of it is 0."""


def run_with(metrics: dict[int, float], folder: Path, **model: Any) -> Run:
    """A run of which only the metrics are there: the forward probability at every checkpoint."""
    run = Recorded.of(grids.small_model(CYCLE, "rope", "any_order", 0, **model), folder)
    run.folder.mkdir(parents=True)
    rows = [
        {"step": step, **NOTHING, "forward_probability": value, "reverse_probability": value / 2}
        for step, value in metrics.items()
    ]
    run.record(rows)
    return run


def test_early_lies_between_the_checkpoints_around_a_forward_probability_of_a_half(tmp_path: Path) -> None:
    run = run_with({0: 0.0, 10: 0.4, 20: 0.8, 30: 0.3, 40: 0.9}, tmp_path)
    found = dict(stages(run))
    assert list(found) == ["initial", "early", "end"]
    assert found["initial"] == {0: 1.0} and found["end"] == {40: 1.0}
    assert found["early"] == {10: pytest.approx(0.75), 20: pytest.approx(0.25)}


def test_a_run_that_does_not_learn_has_no_early_stage(tmp_path: Path) -> None:
    assert [stage for stage, _ in stages(run_with({0: 0.0, 10: 0.4}, tmp_path))] == ["initial", "end"]


@pytest.mark.parametrize("metrics", [{0: 0.6, 10: 0.9}, {0: 0.1, 10: 0.5}])
def test_a_checkpoint_at_a_half_is_the_early_stage_itself(metrics: dict[int, float], tmp_path: Path) -> None:
    run = run_with(metrics, tmp_path)
    at = 0 if metrics[0] > 0.5 else 10
    assert {step for step, weight in dict(stages(run))["early"].items() if weight} == {at}


def test_other_moments_are_every_checkpoint_or_a_part_of_them(tmp_path: Path) -> None:
    run = run_with({0: 0.0, 10: 0.4, 20: 0.8, 30: 0.9}, tmp_path)
    assert all_checkpoints(run) == [("checkpoint", {step: 1.0}) for step in (0, 10, 20, 30)]
    assert second_checkpoints(run) == [("checkpoint", {step: 1.0}) for step in (0, 10, 30)]
    assert trained_stages(run) == stages(run)[1:] == stages(run, ("early", "end"))
    assert [stage for stage, _ in stages(run, ("end",))] == ["end"]


def test_rows_are_interpolated_at_one_forward_probability(tmp_path: Path) -> None:
    run = run_with({0: 0.0, 10: 0.4, 20: 0.8}, tmp_path)

    def measure(run: Run, step: int) -> list[dict[str, Any]]:
        return [{"layer": layer, "x": float(step + layer), "same": 1e-6, "name": f"at {step}"} for layer in (0, 1)]

    rows = rows_of(run, stages(run), measure)
    assert [(row["stage"], row["step"], row["layer"]) for row in rows] == [
        ("initial", 0, 0), ("initial", 0, 1), ("early", 12, 0), ("early", 12, 1), ("end", 20, 0), ("end", 20, 1),
    ]  # fmt: skip
    early = rows[2:4]
    assert [row["forward_probability"] for row in early] == pytest.approx([0.5, 0.5])
    assert [row["reverse_probability"] for row in early] == pytest.approx([0.25, 0.25])
    assert [row["x"] for row in early] == pytest.approx([12.5, 13.5])
    assert {row["same"] for row in rows} == {1e-6}
    assert [row["name"] for row in early] == ["at 20", "at 20"], "the later one's"


def test_rows_say_of_which_run_and_when_and_what_chance_is(tmp_path: Path) -> None:
    run, asked = run_with({0: 0.0, 10: 0.4}, tmp_path), []

    def measure(run: Run, step: int) -> list[dict[str, Any]]:
        asked.append(step)
        return [{"value": step, "forward_probability": 0.125}] if step else []

    (row,) = rows_of(run, all_checkpoints(run), measure)
    assert asked == [0, 10]
    assert row == {
        **about(run),
        "chance": run.facts.chance,
        "stage": "checkpoint",
        "step": 10,
        "value": 10,
        "forward_probability": 0.125,  # what is measured takes the place of what training recorded
        "reverse_probability": 0.2,
    }
    assert metrics_at(run, 10) == {**NOTHING, "forward_probability": 0.4, "reverse_probability": 0.2}


def test_settings_are_called_by_what_sets_them_apart(tmp_path: Path) -> None:
    one, four = about(run_with({0: 0.0}, tmp_path)), about(run_with({0: 0.0}, tmp_path, n_heads=4))
    assert scope_label(one) == "relation_cycle, any_order rope, 1 layer, 1 head of 64"
    assert scope_label({**four, "stage": "end"}) == "relation_cycle, any_order rope, 1 layer, 4 heads of 16, end"
    pool = grids.small_model(grids.pool_world(0.8), "rope", "any_order", 0, d_head=64, rotary_base=1e6)
    said = scope_label(about(Run.of(pool, tmp_path)))
    assert said == "symmetric_pool 80% both ways, any_order rope base 1e+06, 1 layer, 1 head of 64"
    changed = {"any_order at 15%": {"mask_rate": 0.15}, "any_order with causal attention": {"attention": "causal"}}
    for name, settings in changed.items():
        run = Run.of(grids.small_model(CYCLE, "rope", "any_order", 0, **settings), tmp_path)
        assert scope_label(about(run)) == f"relation_cycle, {name} rope, 1 layer, 1 head of 64"
    assert scope_label({"world": None, "scheme": "all schemes", "stage": "end"}) == "all settings, all schemes, end"


def test_the_default_model_has_one_head() -> None:
    assert (grids.small_model(CYCLE, "rope", "any_order", 0).model.n_heads, grids.HEADS) == (1, (1, 2, 4, 8))


@pytest.mark.parametrize("n_seeds", [1, QUICK_SEEDS, FULL_SEEDS])
def test_no_run_is_listed_twice_and_every_setting_has_the_first_seed(n_seeds: int) -> None:
    seeds = range(n_seeds)
    for grid in (every_run, head_grid, pool_grid, grids.grid, grids.depth_grid, grids.objective_grid, grids.path_grid):
        digests = [config.digest() for config in grid(seeds)]
        assert len(digests) == len(set(digests))
        settings = {config.model_copy(update={"seed": 0}).digest() for config in grid(seeds)}
        assert settings == {config.digest() for config in grid(seeds) if config.seed == 0}


def test_heads_are_an_axis_at_equal_width_and_at_equal_head_dimension() -> None:
    shapes = {(c.model.n_heads, c.model.head_dim) for c in head_grid(range(FULL_SEEDS)) if c.model.position == "rope"}
    assert shapes == {(1, 64), (2, 32), (4, 16), (8, 8), (1, 16), (4, 64)}
    contrast = {(c.model.position, c.objective) for c in head_grid(range(FULL_SEEDS)) if c.model.n_heads == 4}
    assert contrast == set(grids.VARIANTS.values())


def test_the_pool_is_shown_both_ways_in_part_and_never_where_it_is_tested() -> None:
    configs = pool_grid(range(FULL_SEEDS))
    assert {config.facts.reversed_share for config in configs} == set(BOTH_WAYS)
    assert {config.facts.world for config in configs} == {POOL}
    run = Run.of(next(config for config in configs if config.facts.reversed_share == 0.8))
    tested = {pair.fact for pair in run.query_pairs()}
    assert tested == {fact for fact, both in enumerate(run.facts.reversed.tolist()) if not both} and len(tested) == 6
