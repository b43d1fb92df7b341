"""Head specialisation's rows are there, its summary follows from them, and each answer can come out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from analyses import head_specialisation
from mdm_interp.experiments.grids import MANY_HEADS
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.experiments.scope import SCOPE, STAGES, scope_label


def test_every_run_has_a_row_per_stage_and_one_per_head_unless_it_is_an_arm(
    tiny_result: Callable[[str], Result],
) -> None:
    result = tiny_result("head_specialisation")
    assert result.settings == {"n_contexts": 1, "n_exchanges": 200, "gap": 0.1}
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in result.rows:
        runs.setdefault(row["run"], []).append(row)
    assert {row["n_heads"] for row in result.rows} == {1, 2, 4, 8}
    for rows in runs.values():
        models, stages = [row for row in rows if row["kind"] == "model"], {row["stage"] for row in rows}
        assert {"initial", "end"} <= stages <= set(STAGES)
        arm, n_heads = models[0]["objective"] == "causal", models[0]["n_heads"]
        assert len(rows) == len(models) * (1 if arm else 1 + n_heads)
        for row in models:
            assert 0 < row["reverse_probability"] < row["reverse_role"] <= 1
            assert (row["index"] is None) == arm and row["head"] is None
            assert (row["shared_after"] is None) == (arm or n_heads == 1)
            assert (row["even_after"] is None) == (arm or row["scheme"] == "learned")
            if not arm:
                of_stage = [head for head in rows if head["kind"] == "head" and head["stage"] == row["stage"]]
                n_twice = sum(model["stage"] == row["stage"] for model in models)  # a run may be listed twice
                found = sum(head["specific"] for head in of_stage) / n_twice
                assert row["specific_heads"] == pytest.approx(found, rel=1e-4)


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("head_specialisation")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result.rows:
        if row["kind"] == "model":
            groups.setdefault(tuple(row[name] for name in (*SCOPE, "stage")), []).append(row)
    quantities = head_specialisation.OF_MODELS
    for group, rows in groups.items():
        of = dict(zip((*SCOPE, "stage"), group, strict=True))
        expected = {name: mean([row[name] for row in rows]) for name in quantities}
        total = [row["gap_role"] + row["gap_in_role"] for row in rows]
        shares = [row["gap_role"] / gap for row, gap in zip(rows, total, strict=True) if gap > 0.1]
        expected["lost_in_role"] = mean(shares)  # type: ignore[arg-type]
        known = [row for row in rows if row["even_after"] is not None]
        expected["even_gain"] = mean([row["even_after"] - row["reverse_probability"] for row in known])
        for name, value in expected.items():
            estimate = result.summary.at(name, **of)
            assert estimate.value == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), (name, of)
        for name in ("index", "rival_index"):
            null = mean([row[f"{name}_null"] for row in rows])
            assert result.summary.null(name, **of).value == pytest.approx(null, rel=1e-4, nan_ok=True), (name, of)
    assert len(result.summary) == len(groups) * (len(quantities) + 2) + 4
    lost = []
    for seed in (0, 1):
        by_heads = {
            n_heads: mean(
                [
                    row["reverse_probability"]
                    for row in result.rows
                    if (row["kind"], row["stage"], row["objective"]) == ("model", "end", "any_order")
                    and (row["scheme"], row["seed"], row["n_heads"]) == ("rope", seed, n_heads)
                    and n_heads * row["d_head"] == row["d_model"]
                ]
            )
            for n_heads in (1, MANY_HEADS)
        }
        lost.append(by_heads[1] - by_heads[MANY_HEADS])
    assert result.summary.at("lost_by_heads", scheme="rope").value == pytest.approx(mean(lost), rel=1e-4, abs=1e-7)


def planted(result: Result, n_seeds: int = 3, **many: dict[str, float]) -> str:
    """The takeaway if one head answers in reverse, and models of many heads, by scheme, have these columns."""
    rows = []
    for row in result.rows:
        if row["kind"] == "model" and row["seed"] == 0 and row["objective"] == "any_order":
            for seed in range(n_seeds):
                new = {**row, "seed": seed, "reverse_probability": 0.9 - 0.01 * seed, "even_after": 0.9}
                if row["scheme"] in many and row["n_heads"] == MANY_HEADS:
                    new |= {name: value * (1 + 0.01 * seed) for name, value in many[row["scheme"]].items()}
                rows.append(new)
    changed = replace(result, rows=tidy(rows))
    return head_specialisation.takeaway(changed)


LOST = {
    "reverse_probability": 0.05,
    "rival_probability": 0.5,
    "gap_role": 5.0,
    "gap_in_role": 0.5,
    "even_after": 0.6,
}
STORED = {**LOST, "gap_role": 0.5, "gap_in_role": 5.0}
KEPT = {"reverse_probability": 0.87, "even_after": 0.87}


def test_the_takeaway_names_what_is_lost_or_that_nothing_is(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("head_specialisation")
    choice = planted(result, rope=LOST, learned=LOST)
    assert choice.startswith("It is lost, mostly because the source's side decides which of its two partners")
    assert "Under RoPE the right answer gets 0.89 with 1 head and 0.05 with 4; " in choice
    assert "brings back 0.61 (n = 3 seeds)." in choice
    elsewhere = {**LOST, "rival_probability": 0.01}
    told = planted(result, rope=elsewhere, learned=elsewhere)
    assert told.startswith("It is lost, mostly because an answer of another role is given.")
    storage = planted(result, rope=STORED, learned=STORED)
    assert storage.startswith("It is lost, mostly because heads no longer share what they store.")
    equal = {**LOST, "gap_role": 2.0, "gap_in_role": 2.0}
    assert planted(result, rope=equal, learned=equal).startswith("It is lost, and no single part of the answer")
    assert planted(result, rope=KEPT, learned=KEPT).startswith("It is not lost.")
    assert planted(result, n_seeds=1, rope=LOST, learned=LOST).startswith("Too few runs to say")
    both = planted(result, rope=LOST, learned=STORED)
    assert (
        both.startswith("RoPE: it is lost, mostly because the source's") and "; learned: it is lost, mostly be" in both
    )
    in_vain = {**LOST, "even_after": 0.05}
    assert "does not measurably change that: 0.05 (" in planted(result, rope=in_vain, learned=LOST)


def test_the_figure_draws_what_the_summary_says(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("head_specialisation")
    traces: Any = head_specialisation.draw(result).figure().data
    reverse = next(trace for trace in traces if trace.name == "reverse query")
    drawn = dict(zip([1, 2, 4, 8], reverse.y, strict=True))
    for n_heads, value in drawn.items():
        of = {"scheme": "rope", "objective": "any_order", "n_layers": 1, "n_heads": n_heads, "d_head": 16 // n_heads}
        (shown,) = result.summary.where("reverse_probability", stage="end", **of)
        assert value == pytest.approx(shown.effect.value, rel=1e-4)
    names = {"within the answer's role", "against the other partner", "null of either: sides exchanged"}
    settings = [trace for trace in traces if trace.name in names]
    labels = {scope_label({name: x for name, x in row.items() if name != "stage"}) for row in result.rows}
    expected = {label for label in labels if "any_order" in label}
    assert len(settings) == 4 and all({label for (label,) in trace.customdata} == expected for trace in settings)
