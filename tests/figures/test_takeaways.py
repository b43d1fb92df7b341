"""What every figure of the committed results says below its title: short enough to be read at a glance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mdm_interp.experiments.analysis import discover
from mdm_interp.viz.theme import title_height

FIGURES = Path(__file__).parents[2] / "figures"
ANALYSES = {analysis.name: analysis for analysis in discover()}
NAMES = [
    *("depth", "evidence_growth", "first_order", "gradient_alignment", "head_specialisation", "influence"),
    *("interventions", "learning_path", "objective_ablation", "objective_and_attention", "one_sided_routes"),
    *("reversal_curse", "two_slots"),
]
MOST_NUMBERS, LONGEST = 5, 290
NAMED = r"\bn = \d+( to \d+)? seeds?|\bT5\b|\d+ heads?\b|`[^`]*`"
"""Numbers that are names, or say of how many seeds the others are."""


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", re.sub(NAMED, "", text))


def test_numbers_in_names_do_not_count() -> None:
    assert numbers("With 4 heads T5 gets 0.86 to 1.00 or 10% (n = 5 to 10 seeds).") == ["0.86", "1.00", "10"]


@pytest.mark.usefixtures("real_grid")
@pytest.mark.parametrize("name", NAMES)
def test_the_takeaway_of_a_committed_result_is_short_and_its_figure_is_drawn(name: str) -> None:
    analysis = ANALYSES[name]
    result = analysis.load(FIGURES / f"{name}.json")
    said = analysis.takeaway(result)
    assert len(said) <= LONGEST
    assert title_height(said) <= title_height("two lines " * 20), "more than two lines"
    assert len(numbers(said)) <= MOST_NUMBERS, numbers(said)
    assert re.search(r"\bn = \d+", said), "it does not say of how many seeds"
    assert not re.search(r"\bnan\b|\?|\b(rope|alibi|none|t5_bias)\b(?! of)", said.replace("in none", "")), said
    drawn: Any = analysis.figure(result).data
    assert len(drawn) > 1
