"""The link between signatures and reverse prediction, recomputed from the rows, and planted both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import pytest

from analyses import prediction_link
from mdm_interp.claims import judge
from mdm_interp.presets import SCOPE
from mdm_interp.results import Result

PLACE = {"world": "relation_cycle", "objective": "any_order", "n_layers": 1, "mlp": False}
STEPS = range(8)


def planted(signature: Callable[[int, int], float]) -> Result:
    """Runs whose forward probability rises evenly and whose reverse probability comes and goes, by seed."""
    rows = []
    for seed in range(6):
        for step in STEPS:
            wave = ((step * (seed + 2)) % 7) / 10
            about = {**PLACE, "scheme": "rope", "seed": seed, "run": f"r{seed}", "step": step, "stage": None}
            chances = {"forward_probability": step / 10, "reverse_probability": wave}
            rows.append({**about, **chances, **dict.fromkeys(prediction_link.SIGNATURES, signature(seed, step))})
    return Result("prediction_link", "?", {}, list(range(6)), {}, rows, {})


def judged(result: Result) -> Sequence[str]:
    over_training = prediction_link.CLAIMS[: len(prediction_link.SIGNATURES)]
    return [verdict.verdict for verdict in judge([(result, over_training)], (*SCOPE, "stage"))]


def test_a_signature_that_is_the_reverse_probability_holds_and_its_opposite_fails() -> None:
    assert judged(planted(lambda seed, step: ((step * (seed + 2)) % 7) / 10)) == ["holds"] * 3
    assert judged(planted(lambda seed, step: -((step * (seed + 2)) % 7) / 10)) == ["fails"] * 3


def test_a_signature_that_only_follows_the_course_of_training_fails() -> None:
    found = judged(planted(lambda seed, step: step / 10 + 0.01 * (seed % 2) * (step % 2)))
    assert "holds" not in found


def test_a_constant_signature_is_left_out() -> None:
    assert judged(planted(lambda seed, step: 1.0)) == []


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("prediction_link")
    frame = result.frame
    assert set(frame["objective"]) == {"any_order"}
    last = frame[frame["stage"] == "end"]
    for world in last["world"].unique():
        for signature in prediction_link.SIGNATURES:
            at = pd.DataFrame(last[last["world"] == world])
            per_seed = [
                runs[signature].rank().corr(runs["reverse_probability"].rank()) for _, runs in at.groupby("seed")
            ]
            key = f"{signature} / {world} / across schemes, end, effect"
            assert result.summary[key].value == pytest.approx(pd.Series(per_seed).mean(), abs=1e-6, nan_ok=True)
