"""Learning paths: the parts of a run add up to its change, and planted runs are read rightly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers import planted_result
from report_helpers import SETTING

from analyses import learning_path
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.claims import judge
from mdm_interp.experiments.grids import CYCLE
from mdm_interp.experiments.results import Result
from mdm_interp.viz import shown


@pytest.fixture(scope="module")
def result(tiny_result: Callable[[str], Result]) -> Result:
    return tiny_result("learning_path")


def test_the_parts_of_every_loss_add_up(result: Result) -> None:
    assert {row["setting"] for row in result.rows} == set(learning_path.SETTINGS)
    for row in result.rows:
        for ending in ("", "_null"):
            if row[f"fall{ending}"] is None:
                assert (ending, row["loss"]) == ("_null", "forward")
                continue
            parts = sum(row[f"{group}{ending}"] for group in learning_path.GROUPS)
            assert parts + row[f"missing{ending}"] == pytest.approx(row[f"fall{ending}"], abs=1e-5)
            assert abs(row[f"missing{ending}"]) <= 0.02 * abs(row[f"fall{ending}"]) + 1e-3
        assert (row["trained"] > 0) or row["fall"] == 0


def test_the_end_of_the_way_is_the_end_of_the_run(result: Result) -> None:
    for run in {row["run"] for row in result.rows}:
        rows = [row for row in result.rows if row["run"] == run and row["loss"] == "forward"]
        assert max(row["trained"] for row in rows) == rows[0]["step"]


def test_a_null_asks_the_same_for_another_entity_of_the_role() -> None:
    world = FactWorld(CYCLE, seed=0)
    reverse = [pair.reverse for pair in world.query_pairs()]
    for own, other in zip(reverse, learning_path.other_answers(reverse, world), strict=True):
        assert (own.tokens, own.answer_span, own.source_span) == (other.tokens, other.answer_span, other.source_span)
        assert own.answer != other.answer
        assert other.answer[0] in world.role(own.answer[0])


SCOPE = {**SETTING, "world": "relation_cycle", "stage": "end", "step": 10, "setting": "MDM rope"}


def planted(storage: float, null: float, later: float = 0.0) -> Result:
    """Five runs whose storage takes `storage` nats off their reverse loss up to step 5, and `later` after it."""
    rows: list[dict[str, Any]] = []
    for seed in range(5):
        jitter = 0.01 * seed
        for trained, size in ((0, 0.0), (5, storage + jitter), (10, storage + later + jitter)):
            size = size if trained else 0.0
            parts = {"storage": size, "routing": 0.0, "embedding": 0.0, "unembedding": 0.0, "other": 0.0}
            nulls = {f"{name}_null": null * (trained > 0) * (name == "storage") for name in parts}
            row = {**SCOPE, "seed": seed, "run": f"{seed:x}", "trained": trained, "fall": size, "missing": 0.0, **parts}
            row |= {"fall_null": nulls["storage_null"], "missing_null": 0.0}
            rows += [{**row, "loss": "forward"}, {**row, **nulls, "loss": "reverse"}]
    return planted_result("learning_path", rows, summarize=learning_path.summarize)


def test_phases_part_the_fall_from_the_rise() -> None:
    summary = planted(2.0, 0.0, later=-0.5).summary
    found = {
        phase: summary.at("storage", setting="MDM rope", loss="reverse", phase=phase) for phase in ("fall", "rise")
    }
    assert found["fall"].value == pytest.approx(2.02)
    assert found["rise"].value == pytest.approx(-0.5)
    assert summary.at("storage", setting="MDM rope", loss="reverse", phase="all").value == pytest.approx(1.52)
    only = planted(2.0, 0.0, later=0.1).summary
    assert only.at("storage", setting="MDM rope", loss="reverse", phase="rise").n == 0


@pytest.mark.parametrize(
    ("storage", "null", "verdict"), [(1.0, -0.5, "holds"), (-1.0, -2.0, "fails"), (1.0, 2.0, "fails")]
)
def test_the_claim_needs_a_fall_through_storage_beyond_that_of_another_answer(
    storage: float, null: float, verdict: str
) -> None:
    result = planted(storage, null)
    (found,) = judge([(result, learning_path.ANALYSIS.claims)])
    assert found.verdict == verdict
    said = learning_path.takeaway(result)
    if verdict == "holds":
        assert said.startswith(
            "Storage is one: it took 1.02 of 1.02 nats off the reverse loss of MDM RoPE, more than off"
        )
        assert " another answer's (n = 5 seeds). The parts add up" in said
    else:
        assert said.startswith("In no model do the intervals show") and " (n = 5 seeds). The parts" in said


def test_what_the_parts_leave_out_is_said() -> None:
    result = planted(2.0, 0.0, later=-0.5)
    assert learning_path.takeaway(result).endswith("The parts add up within 0 nats.")
    for row in result.rows:
        row["missing"] = {0: 0.0, 5: 0.0, 10: 0.03}[row["trained"]]
    assert learning_path.takeaway(replace(result)).endswith("The parts add up within 0.03 nats.")


def test_the_figure_shows_every_setting(result: Result) -> None:
    figure = learning_path.ANALYSIS.figure(result)
    layout: Any = figure.layout
    titles = {annotation.text for annotation in layout.annotations}
    assert set(map(shown, learning_path.SETTINGS)) <= titles
