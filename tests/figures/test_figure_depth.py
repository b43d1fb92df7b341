"""Signatures by depth, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from analyses import depth
from mdm_interp.experiments.results import Result, tidy


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("depth")
    checked = 0
    for row in result.rows:  # the tiny grid has one seed of deep models: each row is its own mean
        of = {column: row[column] for column in depth.BY}
        reverse = result.summary.at("reverse_probability", **of)
        assert reverse.value == pytest.approx(row["reverse_probability"], rel=1e-5)
        above = row["reverse_probability"] - row["chance"]
        assert result.summary.at("above_chance", **of).value == pytest.approx(above, rel=1e-5)
        share = result.summary.at("pair_share", **of, layer=row["layer"])
        assert share.value == pytest.approx(row["pair_share"], rel=1e-4, abs=1e-9)
        assert row["layer"] > 0 or row["pair_share"] == 0, "relative schemes, first layer"
        for name in depth.SIGNATURES:
            excess = result.summary.at(f"{name}_excess", **of, layer=row["layer"])
            assert excess.n == (name != "MLP" or row["mlp"])
            if excess.n:
                assert excess.value == pytest.approx(row[name] - row[f"{name}_null"], rel=1e-5, abs=1e-9)
                checked += 1
    assert checked > 100
    assert len({(row["run"], row["stage"], row["layer"]) for row in result.rows}) == len(result.rows)


def test_intervals_are_over_seeds(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("depth")
    more = [{**row, "seed": 1, "evidence": row["evidence"] + 1.0} for row in result.rows]
    summary = depth.summarize(replace(result, rows=result.rows + more))
    of = {"scheme": "rope", "mlp": False, "n_layers": 2, "stage": "end", "layer": 1}
    one, two = (told.at("evidence_excess", **of) for told in (result.summary, summary))
    assert (two.n, two.value) == (2, pytest.approx(one.value + 0.5, rel=1e-5))


def test_early_layers_and_the_least_aligned_one_are_judged_in_deep_models(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("depth")
    deep = [row for row in result.rows if row["n_layers"] > 1]
    early, least = depth.halves(result), depth.least_coupled(result)
    assert len(early) == len(least) == len({(row["run"], row["stage"]) for row in deep})
    for found in early.to_dict("records"):
        rows = [row for row in deep if all(row[name] == found[name] for name in ("scheme", "n_layers", "mlp", "stage"))]
        half = found["n_layers"] / 2
        for name in ("VO", "VO_null"):
            first, second = (
                sum(row[name] for row in rows if (row["layer"] < half) == is_first) for is_first in (True, False)
            )
            assert found[name] == pytest.approx((first - second) / half, abs=1e-6)
    for found in least.to_dict("records"):
        layers = [row["VO"] for row in deep if (row["run"], row["stage"]) == (found["run"], found["stage"])]
        assert found["VO"] == pytest.approx(min(layers))


def test_the_takeaway_counts_layers_above_the_null(tiny_result: Callable[[str], Result]) -> None:
    """Planted: routes are above their null, evidence under RoPE alone, and gradients are no more than theirs."""
    result = tiny_result("depth")
    rows = []
    for row in result.rows:
        for seed in range(4):
            new: dict[str, Any] = {**row, "seed": seed, "reverse_probability": 0.5}
            for name in depth.SIGNATURES:
                above = name == "route" or (name == "evidence" and row["scheme"] == "rope")
                jitter = 0.01 * (-1) ** seed
                new |= {name: above + jitter, f"{name}_null": 0.0} if name != "MLP" or row["mlp"] else {}
            rows.append(new)
    planted = replace(result, rows=tidy(rows))
    said = depth.takeaway(planted)
    assert "RoPE: routes and evidence in all, V/O and Q/K and MLP gradients in none." in said
    assert "ALiBi: routes in all, evidence and V/O and Q/K and MLP gradients in none." in said
    assert said.endswith("With MLPs the reverse query gets 0.50 (RoPE), 0.50 (ALiBi); n = 4 seeds.")
    few = depth.takeaway(replace(result, rows=[row for row in rows if row["seed"] == 0]))
    assert "RoPE: one seed decides nothing. ALiBi: one seed decides nothing." in few
    drawn: Any = depth.ANALYSIS.figure(planted).data
    assert len(drawn) > 4
