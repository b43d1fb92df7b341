"""The first figure: which runs it takes, and that its sentence says where reverse queries are answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
from helpers import planted_result

from analyses import reversal_curse
from analyses.reversal_curse import SETTINGS
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.grids import FULL_SEEDS, MANY_HEADS, QUICK_SEEDS, VARIANTS, WORLDS, every_run
from mdm_interp.experiments.results import Result

CONTRAST = f"relation_cycle, {MANY_HEADS} heads"
SEEDS = range(3)
SPREAD = (-0.01, 0.0, 0.01)


def planted(reverse: Mapping[tuple[str, str], float], n_seeds: int = len(SEEDS)) -> Result:
    """A result whose reverse probability at the end is what `reverse` says of setting and variant, else 0.001."""
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        for variant in VARIANTS:
            for seed in range(n_seeds):
                run = {"setting": setting, "variant": variant, "seed": seed, "run": f"{setting} {variant} {seed}"}
                value = reverse.get((setting, variant), 0.001)
                end = value + SPREAD[seed] * value
                for step, probability in ((0, 0.01), (100, 2 * value), (4000, end)):
                    metrics = {f"reverse_{what}": probability for what in ("probability", "accuracy")}
                    metrics |= dict.fromkeys(("forward_probability", "forward_accuracy"), 0.9)
                    rows.append({**run, "chance": 0.05, "step": step, **metrics})
    seeds = list(range(n_seeds))
    return planted_result("reversal_curse", rows, seeds=seeds, summarize=reversal_curse.summarize)


MDMS = [variant for variant in VARIANTS if variant != "ARM rope"]
MITIGATED = {
    **{("relation_cycle", variant): 0.8 + place / 100 for place, variant in enumerate(MDMS)},
    (CONTRAST, "MDM alibi"): 0.9,
    (CONTRAST, "MDM none"): 0.92,
    (CONTRAST, "MDM rope"): 0.02,
}


def test_the_takeaway_says_who_answers_where() -> None:
    sentence = reversal_curse.takeaway(planted(MITIGATED))
    assert sentence.startswith("With 1 head: yes for every MDM, no for the ARM. With 4 heads: ")
    assert "yes for MDM ALiBi and NoPE, no for MDM RoPE, learned and the ARM." in sentence
    assert "In two_role (sources on one side): no for every MDM and the ARM." in sentence
    assert sentence.endswith("n = 3 seeds.)")


def test_the_takeaway_says_the_opposite_of_opposite_rows() -> None:
    sentence = reversal_curse.takeaway(planted({(CONTRAST, variant): 0.7 for variant in VARIANTS}))
    assert sentence.startswith(
        "With 1 head: no for every MDM and the ARM. With 4 heads: yes for every MDM and the ARM."
    )


def test_an_interval_that_includes_chance_and_a_single_seed_decide_nothing() -> None:
    sentence = reversal_curse.takeaway(planted({("relation_cycle", "MDM rope"): 0.0501}))
    assert sentence.startswith("With 1 head: no for MDM ALiBi, NoPE, learned and the ARM, undecided for MDM RoPE.")
    of_one = reversal_curse.takeaway(planted(MITIGATED, n_seeds=1))
    assert of_one.startswith("With 1 head: undecided for every MDM and the ARM.")


def test_heads_are_kept_apart_in_the_summary() -> None:
    summary = planted(MITIGATED).summary
    one, many = ({"setting": setting, "variant": "MDM rope"} for setting in ("relation_cycle", CONTRAST))
    assert summary.at("reverse_probability", **one).value == pytest.approx(0.8)
    assert summary.at("reverse_probability", **many).value == pytest.approx(0.02)
    assert summary.at("highest_reverse", **many).value == pytest.approx(0.04)
    above = summary.at("above_chance", **one)
    half = 4.302653 * 0.008 / 3**0.5  # Student's t at 2 degrees of freedom; the seeds' standard deviation is 0.008
    assert (above.value, above.low, above.high) == pytest.approx((0.75, 0.75 - half, 0.75 + half), rel=1e-4)


@pytest.mark.parametrize("n_seeds", [QUICK_SEEDS, FULL_SEEDS])
def test_every_run_of_it_is_trained_anyway(n_seeds: int) -> None:
    configs = reversal_curse.configs(range(n_seeds))
    digests = [config.digest() for config in configs]
    assert len(set(digests)) == len(digests)
    assert set(digests) <= {config.digest() for config in every_run(range(n_seeds))}


@pytest.mark.usefixtures("real_grid")
def test_the_contrast_is_every_variant_with_the_width_shared_out() -> None:
    contrast = [run for run in reversal_curse.configs(range(FULL_SEEDS)) if run.model.n_heads == MANY_HEADS]
    assert {(run.facts.world, run.model.n_heads, run.model.head_dim) for run in contrast} == {("relation_cycle", 4, 16)}
    seeds = {variant: 0 for variant in VARIANTS}
    for run in contrast:
        seeds[reversal_curse.variant_of(run)] += 1
    assert seeds == {"MDM rope": 10, "MDM alibi": 5, "MDM none": 5, "MDM learned": 10, "ARM rope": 5}


@pytest.mark.parametrize(("world", "on_both"), [("relation_cycle", True), ("two_role", False)])
def test_on_how_many_sides_an_entity_is_a_source(world: str, on_both: bool) -> None:
    facts = FactWorld(WORLDS[world], seed=0).facts
    left, right = set(facts[:, 0].tolist()), set(facts[:, 2].tolist())
    assert (left == right) if on_both else not left & right


def test_rows_tell_heads_apart(tiny_result: Callable[[str], Result]) -> None:
    frame = tiny_result("reversal_curse").frame
    assert set(frame.groupby(["setting", "variant"]).groups) == set(product(SETTINGS, VARIANTS))
    assert set(frame[frame["setting"] == CONTRAST]["n_heads"]) == {MANY_HEADS}
    assert MANY_HEADS not in set(frame[frame["setting"] != CONTRAST]["n_heads"])


def test_the_first_row_shows_where_the_curves_below_end() -> None:
    figure: Any = reversal_curse.draw(planted(MITIGATED)).figure()
    ends = [trace for trace in figure.data if trace.name == "reverse query" and trace.mode == "markers"]
    values = [MITIGATED.get((setting, variant), 0.001) for setting in SETTINGS for variant in VARIANTS]
    assert [value for trace in ends for value in trace.y] == pytest.approx(values)
    curves = [trace for trace in figure.data if trace.name == "reverse query" and trace.line.dash == "dash"]
    assert [trace.y[-1] for trace in curves] == pytest.approx(values)
    assert {label.rpartition("<br>")[2] for label in figure.layout.xaxis.ticktext} == {"n = 3"}
    assert "MDM<br>NoPE<br>n = 3" in figure.layout.xaxis.ticktext
