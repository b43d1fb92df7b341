"""Objective and attention: all are asked the same, the summary follows from the rows, and verdicts can come out either
way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from helpers import planted_result, tiny_grid, tiny_run, with_summary

from analyses import objective_and_attention
from analyses.objective_and_attention import ASKED, CLAIMS, TRAINED, trained_as
from mdm_interp.experiments.claims import Verdict, judge
from mdm_interp.experiments.grids import CELLS, CYCLE, attention_grid, pool_world
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import scope_of
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Entry


@pytest.fixture(scope="module")
def result(tiny_result: Callable[[str], Result]) -> Result:
    return tiny_result("objective_and_attention")


def test_every_objective_is_measured_with_every_attention_in_both_worlds(result: Result) -> None:
    end = result.frame[result.frame["stage"] == "end"]
    assert set(zip(end["meaning"], end["trained"], strict=True)) == set(product(("relations", "equality"), TRAINED))
    assert end["run"].nunique() == len(end)
    causal = end["attention"] == "causal"
    assert end.loc[causal, "mirrored"].isna().all() and end.loc[~causal, "mirrored"].notna().all()


def test_what_was_recorded_of_an_arm_is_what_it_is_asked_here(result: Result) -> None:
    """Nothing behind the answer reaches an ARM: the same questions, whatever is there."""
    arms = result.frame[result.frame["objective"] == "causal"]
    for direction in ("forward", "reverse"):
        assert arms[direction].tolist() == pytest.approx(arms[f"{direction}_probability"].tolist(), rel=1e-4)
    mixed = result.frame[result.frame["objective"] == "left_to_right"]
    assert mixed["forward"].tolist() == pytest.approx(mixed["forward_probability"].tolist(), rel=1e-4)
    assert mixed["mirrored"].tolist() == pytest.approx(mixed["reverse_probability"].tolist(), rel=1e-4)


def test_the_summary_follows_from_the_rows(result: Result) -> None:
    for meaning, trained, name in product(("relations", "equality"), TRAINED, ASKED):
        of = {"meaning": meaning, "trained": trained, "stage": "end"}
        rows = [row for row in result.rows if all(row[column] == value for column, value in of.items())]
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            assert result.summary.at(name, **of).value == pytest.approx(sum(values) / len(values))
            above = [row[name] - row["chance"] for row in rows]
            assert result.summary.at(f"{name}_above_chance", **of).value == pytest.approx(sum(above) / len(above))


@pytest.mark.parametrize(
    ("answered", "said"),
    [
        ([0], "Both: it takes any-order masking and attention to both sides."),
        ([0, 2], "The objective: "),
        ([0, 1], "The attention: "),
        ([0, 1, 2, 3], "Neither: every objective "),
        ([], "Neither: no objective "),
        ([2], "Undecided (above chance for sure: any order, causal)."),
    ],
)
def test_the_sentence_says_what_it_takes(result: Result, answered: list[int], said: str) -> None:
    told = objective_and_attention.takeaway(with_summary(result, *sides(answered)))
    assert told.startswith(said)
    assert ("holds either way" in told) and "(chance " in told


def sides(answered: list[int], meanings: tuple[str, ...] = ("relations", "equality")) -> list[Entry]:
    """Which cells answer above chance for sure; the others are below."""
    return [
        Entry(
            "reverse_above_chance",
            {"meaning": meaning, "trained": trained, "stage": "end"},
            Estimate(0.4, 0.3, 0.5, 3) if i in answered else Estimate(-0.04, -0.05, -0.03, 3),
        )
        for meaning in meanings
        for i, trained in enumerate(CELLS)
    ]


def test_the_sentence_tells_worlds_apart_and_an_interval_that_holds_chance_decides_nothing(result: Result) -> None:
    told = objective_and_attention.takeaway(
        with_summary(result, *sides([0], ("relations",)), *sides([], ("equality",)))
    )
    assert told.startswith("In relations, both: ") and "; in equality, neither: no " in told
    of = {"meaning": "relations", "trained": next(iter(CELLS)), "stage": "end"}
    entry = Entry("reverse_above_chance", of, Estimate(0.4, -0.1, 0.9, 3))
    kept = [one for one in sides([]) if one.of != of]
    told = objective_and_attention.takeaway(with_summary(result, entry, *kept))
    assert told.startswith("In relations, undecided (above chance for sure: none); in equality, neither")


def planted(reverse: dict[str, float], seeds: int = 5) -> list[Verdict]:
    """The verdicts on a world in which each cell answers so in reverse, give or take."""
    rows: list[dict[str, Any]] = []
    for trained, value in reverse.items():
        objective, attention = CELLS[trained]
        model = tiny_run(CYCLE, "rope", objective, 0, attention=attention).model
        for seed in range(seeds):
            answered = value + 0.002 * seed
            asked = {"forward": 0.9, "reverse": answered, "mirrored": answered if attention != "causal" else None}
            about = {**scope_of(model, "relation_cycle", objective), "seed": seed, "stage": "end", "chance": 0.05}
            rows.append({**about, "meaning": "relations", "trained": trained, **asked})
    return judge([(planted_result("objective_and_attention", rows), CLAIMS)])


AS_REPORTED = dict(zip(CELLS, (0.9, 0.4, 0.01, 0.0), strict=True))
OTHERWISE = dict(zip(CELLS, (0.3, 0.3, 0.5, 0.4), strict=True))


def test_the_authors_report_is_judged_cell_by_cell() -> None:
    holds = planted(AS_REPORTED)
    assert [verdict.verdict for verdict in holds] == ["holds"] * 5 and {verdict.role for verdict in holds} == {"test"}
    fails = planted(OTHERWISE)
    causal = [verdict for verdict in fails if verdict.scope["attention"] == "causal"]
    assert [verdict.reading for verdict in causal] == ["contradicts the paper"] * 2
    (more,) = [verdict for verdict in fails if "less left to right" in verdict.measure]
    assert more.verdict != "holds"


def test_every_run_has_the_name_of_its_cell_or_rate() -> None:
    with tiny_grid():
        configs = attention_grid(range(2))
        worlds = {config.facts.world for config in configs}
    assert len(configs) == 2 * len(TRAINED) and len(worlds) == 2

    class Stub:
        def __init__(self, config: Any) -> None:
            self.config = config

    assert [trained_as(Stub(config)) for config in configs] == [*TRAINED, *TRAINED]  # type: ignore[arg-type]
    assert pool_world(0.5).reversed_share == 0.5
