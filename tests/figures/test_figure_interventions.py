"""Interventions: the summary follows from the rows, and each measure can come out the other way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_model

from analyses import interventions
from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.inference.prediction import predict
from mdm_interp.interventions.effects import Effect, transplant_routes

WORLD = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)


def model(**changes: Any) -> Any:
    facts = WORLD.config
    return random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id, **changes)


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("interventions")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result.rows:
        if row["edit"] in interventions.EDITS:
            at = interventions.setting(row["scheme"], row["n_layers"], row["mlp"], row["stage"])
            groups.setdefault((at, row["edit"]), []).append(row)
    expected = {}

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else float("nan")

    for (setting, edit), rows in groups.items():
        if edit == "transplant":
            for query in ("forward", "before"):
                expected[f"{setting} / {query}"] = mean([row[query] for row in rows])
            expected[f"{setting} / {edit} / exact"] = mean([float(row["deviation"] < 1e-4) for row in rows])
            expected[f"{setting} / {edit} / largest deviation"] = mean([row["deviation"] for row in rows])
        for query in ("after", "control"):
            expected[f"{setting} / {edit} / {query}"] = mean([row[query] for row in rows])
            shares = [
                (row[f"log_{query}"] - row["log_before"]) / (row["log_forward"] - row["log_before"])
                for row in rows
                if row["log_forward"] - row["log_before"] > 0.1
            ]
            expected[f"{setting} / {edit} / gap recovered, {query}"] = mean(shares)
    assert set(expected) == set(result.summary)
    for key, value in expected.items():
        assert result.summary[key].value == pytest.approx(value, rel=1e-4, abs=1e-9, nan_ok=True), key


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


def test_the_takeaway_counts_runs_that_are_not_exact(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("interventions")
    told = interventions.takeaway(result)
    n = sum(row["n_layers"] == 1 and row["stage"] == "end" and row["edit"] == "even" for row in result.rows)
    assert f"in {n} of {n} one-layer runs with a relative scheme" in told
    wrong = [{**row, "deviation": 1.0} if row["scheme"] == "rope" else row for row in result.rows]
    changed = interventions.takeaway(replace(result, rows=wrong))
    rope = sum(
        row["n_layers"] == 1 and row["stage"] == "end" and row["edit"] == "even" and row["scheme"] == "rope"
        for row in result.rows
    )
    assert f"in {n - rope} of {n} one-layer runs" in changed


def test_every_position_of_a_reverse_query_has_one_role() -> None:
    roles = interventions.roles(PAIRS)
    assert (torch.stack(list(roles.values())).sum(0) == 1).all()
    for row, pair in enumerate(PAIRS):
        held = {role: [pair.reverse.tokens[at] for at in mask[row].nonzero()[:, 0]] for role, mask in roles.items()}
        assert held["readout"] == [WORLD.config.mask_token_id]
        assert held["source"] == list(pair.reverse.source)
        assert held["relation"] == [WORLD.facts[pair.fact, 1].item()]
        assert len(held["filler"]) == 5


def test_patches_count_as_edits_of_one_layer_and_place() -> None:
    """By hand: the row of a head is the mean over pairs; that of a role, over all of its positions."""
    two = model(position="rope")
    effect = transplant_routes(two, PAIRS)
    rows = tidy(interventions.patch_rows(two, PAIRS, effect))
    assert len(rows) == 2 * (4 + 4)
    before = predict(two, [pair.reverse for pair in PAIRS]).log_probability
    change = interventions.patch_heads(two, PAIRS).change
    (head,) = [row for row in rows if (row["edit"], row["layer"], row["place"]) == ("head", 1, "3")]
    assert head["log_after"] == pytest.approx((before + change[:, 1, 2]).mean().item(), rel=1e-4)
    assert head["after"] == pytest.approx((before + change[:, 1, 2]).exp().mean().item(), rel=1e-4)
    patched = interventions.patch_positions(two, PAIRS).change
    filler = interventions.roles(PAIRS)["filler"]
    told = [
        (before[pair] + patched[pair, 1, at]).item()
        for pair in range(len(PAIRS))
        for at in range(8)
        if filler[pair, at]
    ]
    (role,) = [row for row in rows if (row["edit"], row["layer"], row["place"]) == ("position", 1, "filler")]
    assert role["log_after"] == pytest.approx(sum(told) / len(told), rel=1e-4)


def test_an_effect_that_helps_is_told_from_one_that_does_not() -> None:
    forward, before = torch.tensor([-0.1, -0.2]), torch.tensor([-3.0, -4.0])
    row = interventions.described_as("even", Effect(forward, before, forward, torch.tensor([-3.0, torch.nan])))
    assert (row["deviation"], row["log_after"], row["log_control"]) == (0.0, pytest.approx(-0.15), -3.0)
    assert interventions.described_as("even", Effect(forward, before, before, before))["deviation"] > 3
