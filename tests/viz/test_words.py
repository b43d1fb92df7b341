"""Sentences of figures."""

from __future__ import annotations

import pandas as pd
import pytest

from mdm_interp.stats.estimates import NOTHING, Estimate
from mdm_interp.viz.words import between, listed, of_seeds, opening, told, with_n


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ""),
        (["MDM none"], "MDM NoPE"),
        (["MDM rope", "MDM alibi", "MDM learned"], "MDM RoPE, ALiBi and learned"),
        (["MDM rope", "ARM rope"], "MDM RoPE and the ARM"),
        (["t5_bias", "MDM rope, 4 heads"], "T5 and MDM RoPE, 4 heads"),
    ],
)
def test_names_are_listed_as_figures_call_them(names: list[str], said: str) -> None:
    assert listed(names) == said


def test_answers_are_told_together_and_yes_comes_first() -> None:
    answers = {"MDM rope": "no", "MDM none": "yes", "ARM rope": "no"}
    assert told(answers) == "yes for MDM NoPE, no for MDM RoPE and the ARM"
    assert told(dict.fromkeys(answers, "undecided")) == "undecided for every MDM and the ARM"
    assert told({"MDM rope": "yes"}) == "yes for MDM RoPE", "one is not every"


def test_numbers_lie_between_two_or_are_one() -> None:
    assert between([0.5, 0.701, float("nan"), 0.25]) == "0.25 to 0.70"
    assert between([0.501, 0.502]) == "0.50"
    assert between([-0.001]) == "0.00", "no minus before a zero"
    assert between([]) == "?"


def test_seeds_are_counted() -> None:
    five, ten = (Estimate(0.0, 0.0, 0.0, n) for n in (5, 10))
    assert of_seeds([ten, five, NOTHING]) == "n = 5 to 10 seeds"
    assert of_seeds([Estimate(0.0, 0.0, 0.0, 1)]) == "n = 1 seed"
    rows = pd.DataFrame({"seed": [0, 0, 1, 0], "heads": [1, 1, 1, 4]})
    assert with_n("MDM none", rows) == "MDM NoPE (n = 2)"
    assert with_n("MDM none", rows, "heads") == "MDM NoPE (n = 1 to 2)"


def test_sentences_open_with_a_capital() -> None:
    assert (opening("yes for MDM RoPE"), opening("")) == ("Yes for MDM RoPE", "")
