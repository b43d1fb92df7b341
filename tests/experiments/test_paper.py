"""Which rows decide which claim of the paper."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import planted_result

from mdm_interp.experiments import paper
from mdm_interp.experiments.results import Result

PLACE = {"reversed_share": 0.0, "rotary_base": 1e4, "n_layers": 1, "d_head": 64, "mlp": False, "stage": "end"}


def planted(rows: list[dict]) -> Result:
    return planted_result("signatures", [{**PLACE, **row} for row in rows], seeds=[0, 1])


def test_an_mdm_is_held_against_the_arm_of_its_world_and_seed() -> None:
    mdm = {"world": "w", "scheme": "learned", "objective": "any_order", "n_heads": 4}
    arm = {"world": "w", "scheme": "rope", "objective": "causal", "n_heads": 1}
    rows = [{**mdm, "seed": seed, "reverse_probability": 0.5} for seed in (0, 1, 2)]
    rows += [{**arm, "seed": seed, "reverse_probability": 0.01 * (seed + 1)} for seed in (0, 1)]
    rows.append({**arm, "seed": 0, "reverse_probability": 0.9, "world": "another"})
    rows.append({**arm, "seed": 0, "reverse_probability": 0.9, "scheme": "alibi"})
    found = paper.over_the_arm(planted(rows)).sort_values("seed")
    assert found["seed"].tolist() == [0, 1]  # seed 2 has no ARM
    assert found["log_ratio"].tolist() == pytest.approx([np.log(50), np.log(25)])
    assert found["log_ratio_null"].tolist() == pytest.approx([np.log(2), -np.log(2)])


def test_the_rows_that_test_sufficiency_are_those_in_which_sides_may_have_their_own() -> None:
    def row(scheme: str, n_heads: int, **more: object) -> dict:
        asked = {"forward_probability": 0.8, "reverse_probability": 0.2}
        about = {"world": "w", "objective": "any_order", "scheme": scheme, "n_heads": n_heads, "seed": 0}
        return {**about, **asked, **more}

    chosen = [row("rope", 2), row("t5_bias", 4), row("learned", 1), row("sinusoidal", 1), row("learned", 4)]
    others = [row("rope", 1), row("alibi", 4), row("none", 4), row("rope", 4, objective="source_only")]
    others.append(row("learned", 1, reversed_share=0.5))
    found = paper.not_shared(planted([*chosen, *others]))
    assert list(zip(found["scheme"], found["n_heads"], strict=True)) == [(r["scheme"], r["n_heads"]) for r in chosen]
    assert found["kept"].tolist() == pytest.approx([0.25] * 5)


def test_reverse_below_forward_is_asked_of_any_order_mdms() -> None:
    asked = {"forward_probability": 0.8, "reverse_probability": 0.2, "scheme": "rope", "n_heads": 1, "world": "w"}
    rows = [{**asked, "objective": objective, "seed": 0} for objective in ("any_order", "causal", "left_to_right")]
    found = paper.below_forward(planted(rows))
    assert found["objective"].tolist() == ["any_order"] and found["less"].tolist() == pytest.approx([0.6])
