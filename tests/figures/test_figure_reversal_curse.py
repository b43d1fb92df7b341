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
    assert "relation_cycle, 1 head: yes for every MDM (0.8 to 0.83), no for ARM (0.001);" in sentence
    many = "yes for MDM alibi (0.9), none (0.92), no for MDM rope (0.02), learned (0.001), ARM (0.001);"
    assert f"relation_cycle, 4 heads: {many}" in sentence
    assert "two_role, 1 head: no for every MDM (0.001 to 0.001), ARM (0.001) (" in sentence


def test_the_takeaway_says_the_opposite_of_opposite_rows() -> None:
    opposite = {(CONTRAST, variant): 0.7 for variant in VARIANTS}
    sentence = reversal_curse.takeaway(planted(opposite))
    assert "relation_cycle, 1 head: no for every MDM (0.001 to 0.001), ARM (0.001);" in sentence
    assert "relation_cycle, 4 heads: yes for every MDM (0.7 to 0.7), ARM (0.7);" in sentence


def test_an_interval_that_includes_chance_and_a_single_seed_decide_nothing() -> None:
    sentence = reversal_curse.takeaway(planted({("relation_cycle", "MDM rope"): 0.0501}))
    assert "undecided for MDM rope (0.05)" in sentence
    of_one = reversal_curse.takeaway(planted(MITIGATED, n_seeds=1))
    assert "relation_cycle, 1 head: undecided for every MDM (0.79 to 0.82), ARM (0.00099);" in of_one


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


def test_each_panel_shows_where_its_reverse_curve_ends() -> None:
    result = planted(MITIGATED)
    figure: Any = reversal_curse.draw(result).figure()
    ends = [note.text for note in figure.layout.annotations if note.text.startswith("ends at")]
    values = [MITIGATED.get((setting, variant), 0.001) for setting in SETTINGS for variant in VARIANTS]
    assert ends == [f"ends at {value:.2f}" for value in values]
    curves = [trace for trace in figure.data if trace.name == "reverse query" and trace.line.dash == "dash"]
    assert [trace.y[-1] for trace in curves] == pytest.approx(values)
    labels = [axis.title.text for axis in figure.select_yaxes() if axis.title.text]
    assert labels == [f"{title}<br>probability of answer" for title in SETTINGS.values()]
