"""The link between signatures and reverse prediction, recomputed from the rows, and planted both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import planted_result
from scipy.stats import spearmanr

from analyses import prediction_link
from mdm_interp.config import TrainConfig
from mdm_interp.experiments import paper
from mdm_interp.experiments.claims import judge
from mdm_interp.experiments.grids import MDM_SCHEMES
from mdm_interp.experiments.results import Result
from mdm_interp.inference.prediction import predict
from mdm_interp.measures.routes import route_correlation
from mdm_interp.stats.tables import where
from mdm_interp.training.runs import Run

PLACE = {
    "world": "relation_cycle",
    "reversed_share": 0.0,
    "rotary_base": 1e4,
    "objective": "any_order",
    "n_layers": 1,
    "n_heads": 1,
    "d_head": 64,
    "mlp": False,
    "mask_rate": 0.0,
    "attention": "bidirectional",
}
STEPS = range(8)


def planted(signature: Callable[[int, int], float]) -> Result:
    """Runs whose forward probability rises evenly and whose reverse probability comes and goes, by seed."""
    rows = []
    for seed in range(6):
        for step in STEPS:
            wave = ((step * (seed + 2)) % 7) / 10
            about = {**PLACE, "scheme": "rope", "seed": seed, "run": f"r{seed}", "step": step, "stage": "checkpoint"}
            chances = {"forward_probability": step / 10, "reverse_probability": wave}
            rows.append({**about, **chances, **dict.fromkeys(prediction_link.SIGNATURES, signature(seed, step))})
    return planted_result("prediction_link", rows, seeds=list(range(6)))


def judged(result: Result) -> Sequence[str]:
    return [verdict.verdict for verdict in judge([(result, paper.LINK_RULES)])]


def test_a_signature_that_is_the_reverse_probability_holds_and_its_opposite_fails() -> None:
    assert judged(planted(lambda seed, step: ((step * (seed + 2)) % 7) / 10)) == ["holds"] * 3
    assert judged(planted(lambda seed, step: -((step * (seed + 2)) % 7) / 10)) == ["fails"] * 3


def test_a_signature_that_only_follows_the_course_of_training_fails() -> None:
    found = judged(planted(lambda seed, step: step / 10 + 0.01 * (seed % 2) * (step % 2)))
    assert "holds" not in found


def test_a_constant_signature_is_left_out() -> None:
    assert judged(planted(lambda seed, step: 1.0)) == []


def told(result: Result) -> str:
    return prediction_link.takeaway(replace(result, summarize=prediction_link.summarize))


def test_the_takeaway_says_which_signatures_say_more_than_forward_probability() -> None:
    found = told(planted(lambda seed, step: ((step * (seed + 2)) % 7) / 10))
    assert found.startswith("In part, alignment, route and evidence: ") and "in all 3 cases; it is 1.00" in found
    follows = told(planted(lambda seed, step: -((step * (seed + 2)) % 7) / 10))
    assert follows.startswith("Not beyond what forward probability says: ") and "in none of 3 cases" in follows
    assert told(planted(lambda seed, step: 1.0)).startswith("Unknown: ")


def test_what_is_correlated_comes_from_the_same_queries(tiny_result: Any) -> None:
    """Probabilities and signatures of the last checkpoint, measured again on one set of pairs."""
    frame, store = tiny_result("prediction_link").frame, tiny_result.lab.root
    assert set(frame["objective"]) == {"any_order"}
    for name, rows in list(frame.groupby("run"))[:4]:
        run = Run(TrainConfig.from_yaml(store / str(name) / "config.yaml"), store / str(name))
        pairs, last = run.query_pairs(), rows.sort_values("step").iloc[-1]
        for side in ("forward", "reverse"):
            asked = predict(run.model(), [getattr(pair, side) for pair in pairs])
            assert last[f"{side}_probability"] == pytest.approx(float(asked.probability.mean()), rel=1e-4)
        route = route_correlation(run.model(), pairs).nanmean().item()
        assert last["route"] == pytest.approx(route, rel=1e-4, abs=1e-5)


def reference(x: pd.Series, y: pd.Series, given: pd.Series | None) -> float:
    """Spearman's coefficient, or the partial one by its formula from the three plain ones."""

    def plain(x: pd.Series, y: pd.Series) -> float:
        found: Any = spearmanr(x, y)
        return found.statistic

    if given is None:
        return plain(x, y)
    xg, yg = plain(x, given), plain(y, given)
    left = (1 - xg**2) * (1 - yg**2)
    return (plain(x, y) - xg * yg) / left**0.5 if left > 1e-9 else float("nan")


def random_result(seeds: int = 6) -> Result:
    """Rows in which nothing is tied or constant, at the stages `early` and `end` of every setting."""
    generator, rows = np.random.default_rng(0), []
    names = [*prediction_link.SIGNATURES, "forward_probability", "reverse_probability"]
    for world, scheme, seed, step in product(("relation_cycle", "two_role"), MDM_SCHEMES, range(seeds), range(9)):
        about = {**PLACE, "world": world, "scheme": scheme, "seed": seed, "run": f"{world}{scheme}{seed}"}
        drawn = dict(zip(names, generator.random(len(names)), strict=True))
        stages = {4: ("checkpoint", "early"), 8: ("checkpoint", "end")}.get(step, ("checkpoint",))
        rows += [{**about, "step": step, "stage": stage, **drawn} for stage in stages]
    return planted_result("prediction_link", rows, seeds=list(range(seeds)))


@pytest.mark.parametrize("kind", prediction_link.CORRELATIONS)
def test_both_correlations_are_summarized_over_training_and_across_seeds(kind: Any) -> None:
    result = random_result()
    summary, at = prediction_link.summarize(result), where(result.frame, world="two_role")

    def of(rows: pd.DataFrame, signature: str) -> float:
        given = rows["forward_probability"] if kind == "partial" else None
        return reference(rows[signature], rows["reverse_probability"], given)

    rope, end = where(at, scheme="rope"), where(at, stage="end")
    for signature in prediction_link.SIGNATURES:
        over = where(rope, stage="checkpoint")
        expected = np.nanmean([of(run, signature) for _, run in over.groupby("seed")])
        about = {"signature": signature, "world": "two_role", "scheme": "rope"}
        assert summary.at(kind, **about, stage="over training").value == pytest.approx(expected)
        estimate = summary.at(kind, **about, stage="across seeds, end")
        assert estimate.value == pytest.approx(of(where(end, scheme="rope"), signature))
        assert (estimate.n, estimate.low < estimate.value < estimate.high) == (6, True)
