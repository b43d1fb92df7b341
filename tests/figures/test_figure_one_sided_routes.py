"""One-sided routes: the summary follows from hand-made rows by paired seeds; the sentence can come out either way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from math import exp, log
from typing import Any

import numpy as np
import pytest
from helpers import planted_result
from scipy.stats import ttest_rel

from analyses import one_sided_routes
from analyses.one_sided_routes import ARM, LEARNED, MDMS, ROPE
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.grids import BOTH_WAYS, POOL_MODELS, every_run, pool_grid, pool_world
from mdm_interp.experiments.results import Result
from mdm_interp.viz import shown as shown_name

SEEDS = range(4)
CHANCE = 1 / 60
LUCK = (0.9, 1.2, 1.0, 0.7)
"""By how much a seed is better than others, in every model."""


def planted(reverse: Callable[[str, float, int], float], seeds: range = SEEDS) -> Result:
    """A result in which the end's reverse probability is a function of model, share and seed."""
    rows: list[dict[str, Any]] = []
    for name, (scheme, objective, d_head, base) in POOL_MODELS.items():
        for share in BOTH_WAYS:
            for seed in seeds:
                model = {"model": name, "scheme": scheme, "objective": objective, "d_head": d_head, "rotary_base": base}
                run = {
                    **model,
                    "reversed_share": share,
                    "seed": seed,
                    "run": f"{name} {share} {seed}",
                    "chance": CHANCE,
                }
                end = {"forward_probability": 0.9 + seed / 100, "reverse_probability": reverse(name, share, seed)}
                early = {"forward_probability": 0.5, "reverse_probability": end["reverse_probability"] / 2}
                start = {"forward_probability": 0.01, "reverse_probability": 0.01}
                for step, metrics in ((0, start), (150, early), (300, end)):
                    rows.append({**run, "stage": "checkpoint", "step": step, **metrics})
                for stage, step, metrics in (("initial", 0, start), ("early", 150, early), ("end", 300, end)):
                    rows.append({**run, "stage": stage, "step": step, **metrics})
    return planted_result("one_sided_routes", rows, seeds=list(seeds), summarize=one_sided_routes.summarize)


def needs_others(name: str, share: float, seed: int) -> float:
    """Nothing without other facts both ways; then rope and learned positions alike, but for a seed's luck."""
    if name == ARM:
        return 0.0005 * LUCK[seed]
    return (0.005 + 0.7 * share) * LUCK[seed] * (1 + 0.02 * (-1) ** seed * (name == LEARNED))


def said(reverse: Callable[[str, float, int], float], seeds: range = SEEDS) -> str:
    return one_sided_routes.takeaway(planted(reverse, seeds))


def test_differences_and_ratios_are_of_one_seed() -> None:
    summary = planted(needs_others).summary
    for share in BOTH_WAYS:
        rope, learned, arm = ([needs_others(name, share, seed) for seed in SEEDS] for name in (ROPE, LEARNED, ARM))
        difference = summary.at("above_rope", model=LEARNED, reversed_share=share, stage="end")
        assert difference.value == pytest.approx(np.mean(learned) - np.mean(rope), rel=1e-4)
        expected: Any = ttest_rel(learned, rope)
        interval = expected.confidence_interval(0.95)
        assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high), rel=1e-3)
        ratio = summary.at("log_of_arm", model=ROPE, reversed_share=share, stage="end")
        assert exp(ratio.value) == pytest.approx(rope[0] / arm[0], rel=1e-4)
        assert ratio.high - ratio.low < 1e-3 < log(2), "seeds are paired: what they share is no spread"
    for share in BOTH_WAYS[1:]:
        gained = summary.at("gained", model=ROPE, reversed_share=share, stage="end")
        assert gained.value == pytest.approx(0.7 * share * np.mean(LUCK), rel=1e-4)


def test_seeds_that_only_one_model_has_are_left_out_of_a_difference() -> None:
    result = planted(needs_others)
    kept = [row for row in result.rows if row["model"] != LEARNED or row["seed"] < 2]
    summary = one_sided_routes.summarize(replace(result, rows=kept))
    of = {"reversed_share": 0.8, "stage": "end"}
    difference = summary.at("above_rope", model=LEARNED, **of)
    expected = np.mean([needs_others(LEARNED, 0.8, seed) - needs_others(ROPE, 0.8, seed) for seed in (0, 1)])
    assert (difference.n, difference.value) == (2, pytest.approx(expected, rel=1e-3))
    assert summary.at("reverse_probability", model=ROPE, **of).n == len(SEEDS)


def test_the_takeaway_says_that_one_side_does_not_suffice_and_what_other_facts_bring() -> None:
    sentence = said(needs_others)
    assert sentence.startswith("No: every MDM answers below chance, at 0.00 (chance 0.017). ")
    assert "Showing most other facts both ways raises that, to 0.54 under RoPE" in sentence


@pytest.mark.parametrize(
    ("below_forward", "answer"),
    [(0.0, "Yes: every MDM answers not measurably below"), (0.26, "In part: every MDM answers above")],
)
def test_the_takeaway_says_that_one_side_suffices_where_it_does(below_forward: float, answer: str) -> None:
    """Forward probability is 0.9 and a hundredth per seed."""
    sentence = said(lambda name, share, seed: 0.0005 if name == ARM else 0.9 + seed / 100 - below_forward)
    assert sentence.startswith(answer)
    reverse = 0.915 - below_forward
    assert f"forward, at {reverse:.2f} (chance" in sentence
    assert "both ways may change that, " in sentence


def test_the_takeaway_names_each_model_where_they_differ() -> None:
    sentence = said(lambda name, share, seed: 0.6 * LUCK[seed] if name == LEARNED else 0.001)
    assert sentence.startswith(
        "No for MDM RoPE, d_head 64, base 1e6, no for MDM RoPE, d_head 16, base 1e4, in part for "
    )
    assert "MDM learned, d_head 64, at 0.00 to 0.57 (chance 0.017)." in sentence


@pytest.mark.parametrize(
    ("shift", "found"), [(0.0, "not measurably apart from"), (0.1, "less than"), (-0.1, "more than")]
)
def test_rope_and_learned_differ_only_if_the_interval_says_so(shift: float, found: str) -> None:
    def reverse(name: str, share: float, seed: int) -> float:
        return needs_others(name, share, seed) + shift * share * (name == LEARNED)

    assert f" under RoPE, {found} the " in said(reverse)


def test_one_seed_tells_nothing() -> None:
    sentence = said(needs_others, range(1))
    assert sentence.startswith("Undecided for MDM RoPE, d_head 64, base 1e6, undecided for ")
    assert "may change that" in sentence and "not measurably apart from" in sentence


def test_a_source_is_shown_on_one_side_only_unless_its_fact_is_shown_both_ways() -> None:
    for share in BOTH_WAYS:
        world = FactWorld(pool_world(share), seed=0)
        entities = world.facts[:, [0, 2]].flatten().tolist()
        assert len(entities) == len(set(entities)), "an entity is in two facts"
        tested = {entity for pair in world.query_pairs() for entity in (*pair.forward.answer, *pair.forward.source)}
        both = set(world.facts[world.reversed][:, [0, 2]].flatten().tolist())
        assert not tested & both
        assert len(both) == pytest.approx(share * len(entities))


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_every_run_of_it_is_trained_anyway(n_seeds: int) -> None:
    configs = pool_grid(range(n_seeds))
    assert {config.digest() for config in configs} <= {config.digest() for config in every_run(range(n_seeds))}
    assert {one_sided_routes.model_of(config) for config in configs} == set(POOL_MODELS) == {*MDMS, ARM}


def test_rows_are_every_checkpoint_and_the_stages(tiny_result: Callable[[str], Result]) -> None:
    frame = tiny_result("one_sided_routes").frame
    assert set(frame["model"]) == set(POOL_MODELS)
    assert {BOTH_WAYS[0], BOTH_WAYS[-1]} <= set(frame["reversed_share"]) <= set(BOTH_WAYS)
    for _, run in frame.groupby("run"):
        checkpoints, end = run[run["stage"] == "checkpoint"], run[run["stage"] == "end"]
        last = checkpoints[checkpoints["step"] == checkpoints["step"].max()]
        assert len(checkpoints) == len(set(checkpoints["step"])) > 3
        assert end["reverse_probability"].tolist() == last["reverse_probability"].tolist()


def drawn(result: Result) -> dict[tuple[str, str, str], list[float]]:
    """Values by trace name, mode and axis."""
    data: Any = one_sided_routes.draw(result).figure().data
    return {(trace.name, trace.mode, trace.yaxis): list(trace.y) for trace in data if trace.name}


def test_the_figure_shows_each_mean_its_seeds_and_chance() -> None:
    shown = drawn(planted(needs_others))
    for model in POOL_MODELS:
        name = shown_name(model)
        seeds = [[needs_others(model, share, seed) for seed in SEEDS] for share in BOTH_WAYS]
        assert shown[name, "lines+markers", "y"] == pytest.approx([np.mean(values) for values in seeds], rel=1e-4)
        assert sorted(shown[name, "markers", "y"]) == pytest.approx(sorted(chain(*seeds)), rel=1e-4)
        assert shown[name, "markers", "y2"] == pytest.approx([0.9 + seed / 100 for seed in SEEDS] * len(BOTH_WAYS))
        for place, values in enumerate(seeds):
            assert shown[name, "lines", f"y{4 + place}"][-1] == pytest.approx(np.mean(values), rel=1e-4)
    assert shown["chance", "lines", "y"] == pytest.approx([CHANCE, CHANCE], rel=1e-4)
