"""Interventions: the summary follows from the rows, and each measure can come out the other way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers import random_model

from analyses import interventions
from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.inference.prediction import predict
from mdm_interp.interventions import patch_heads, patch_positions, position_roles, transplant_routes

WORLD = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)


def model(**changes: Any) -> Any:
    facts = WORLD.config
    return random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id, **changes)


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("interventions")
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in result.rows:
        if row["edit"] in interventions.EDITS:
            of = {name: row[name] for name in ("scheme", "n_layers", "mlp", "stage")}
            groups.setdefault((frozenset(of.items()), row["edit"]), []).append(row)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else float("nan")

    expected = 0
    for (setting, edit), rows in groups.items():
        of: Any = dict(setting)
        if edit == "transplant":
            planted = {name: [row[name] for row in rows] for name in ("forward", "before", "deviation")}
            planted["exact"] = [float(row["deviation"] < 1e-4) for row in rows]
            for quantity, values in planted.items():
                assert result.summary.at(quantity, **of).value == pytest.approx(mean(values), rel=1e-4, abs=1e-9)
            expected += len(planted)
        of["edit"] = edit
        for query, found in (("after", result.summary.at), ("control", result.summary.null)):
            assert found("after", **of).value == pytest.approx(mean([row[query] for row in rows]), rel=1e-4, abs=1e-9)
            shares = [
                (row[f"log_{query}"] - row["log_before"]) / (row["log_forward"] - row["log_before"])
                for row in rows
                if row["log_forward"] - row["log_before"] > 0.1
            ]
            value = found("recovered", **of).value
            assert value == pytest.approx(mean(shares), rel=1e-4, abs=1e-9, nan_ok=True), of
        expected += 2
    assert expected == len(result.summary)


def test_in_one_layer_the_transplant_is_exact_under_relative_schemes_only(tiny_result: Callable[[str], Result]) -> None:
    """Depth aside, an MLP does not matter. Absolute schemes have no even part."""
    result = tiny_result("interventions")
    one = [row for row in result.rows if row["n_layers"] == 1 and row["edit"] == "transplant"]
    assert {row["mlp"] for row in one} == {False, True}
    for row in one:
        assert (row["deviation"] < 1e-4) == (row["scheme"] in ("rope", "alibi", "none", "t5_bias")), row
    assert {row["scheme"] for row in result.rows if row["edit"] == "even"} == {"rope", "alibi", "none", "t5_bias"}


def test_a_share_is_recovered_only_of_a_gap(tiny_result: Callable[[str], Result]) -> None:
    """Planted: half of a gap of 2 nats, a loss as large as the gap, and no gap to speak of."""
    rows = [row for row in tiny_result("interventions").rows if row["edit"] == "even"][:3]
    planted = [
        {**row, "log_forward": forward, "log_before": -2.0, "log_after": after}
        for row, forward, after in zip(rows, (0.0, 0.0, -1.95), (-1.0, -4.0, -1.0), strict=True)
    ]
    frame = replace(tiny_result("interventions"), rows=planted).frame
    assert interventions.recovered(frame, "log_after").fillna(-9).tolist() == [0.5, -1.0, -9.0]


@pytest.mark.parametrize(
    ("log_before", "log_after", "said"),
    [
        (-2.0, -0.5, "The route: in 1 of 1 settings where runs answer worse in reverse, that of the forward query "),
        (-2.0, -2.5, "Not shown: in 0 of 1 settings "),
        (-0.45, -0.45, "Nothing: no run answers worse in reverse"),
    ],
)
def test_the_takeaway_says_whether_the_route_closes_the_gap(
    tiny_result: Callable[[str], Result], log_before: float, log_after: float, said: str
) -> None:
    """Planted: the forward query's log-probability is -0.4, and three seeds of one model."""
    result = tiny_result("interventions")
    of = {"scheme": "rope", "n_layers": 1, "mlp": False, "stage": "end"}
    rows = [
        {**row, "seed": seed, "log_forward": -0.4, "log_before": log_before, "log_after": log_after - 0.01 * seed}
        for row in result.rows
        if of.items() <= row.items() and row["seed"] == 0 and row["edit"] in ("transplant", "storage")
        for seed in range(3)
    ]
    told = interventions.takeaway(replace(result, rows=rows))
    left = next(row["after"] for row in rows if row["edit"] == "storage")
    assert told.startswith(said)
    assert told.endswith(f"{left:.2f} or less is left of the reverse answer's probability (n = 3 seeds).")
    assert ("closes 0.93 of the gap in nats (in one layer by construction)" in told) == said.startswith("The route")


def test_patches_count_as_edits_of_one_layer_and_place() -> None:
    """By hand: the row of a head is the mean over pairs; that of a role, over all of its positions."""
    two = model(position="rope")
    effect = transplant_routes(two, PAIRS)
    rows = tidy(interventions.patch_rows(two, PAIRS, effect))
    assert len(rows) == 2 * (4 + 4)
    before = predict(two, [pair.reverse for pair in PAIRS]).log_probability
    change = patch_heads(two, PAIRS).effect
    (head,) = [row for row in rows if (row["edit"], row["layer"], row["place"]) == ("head", 1, "3")]
    assert head["log_after"] == pytest.approx((before + change[:, 1, 2]).mean().item(), rel=1e-4)
    assert head["after"] == pytest.approx((before + change[:, 1, 2]).exp().mean().item(), rel=1e-4)
    patched = patch_positions(two, PAIRS).effect
    filler = position_roles(PAIRS)["filler"]
    told = [
        (before[pair] + patched[pair, 1, at]).item()
        for pair in range(len(PAIRS))
        for at in range(8)
        if filler[pair, at]
    ]
    (role,) = [row for row in rows if (row["edit"], row["layer"], row["place"]) == ("position", 1, "filler")]
    assert role["log_after"] == pytest.approx(sum(told) / len(told), rel=1e-4)
