"""What the two slots' summary and takeaway say of one entry, and of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from helpers import seeded
from representation_helpers import compared, entries

from analyses import two_slots
from mdm_interp.experiments.results import Result, tidy


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("two_slots")
    columns = [*two_slots.COSINES, *two_slots.PROBES, *two_slots.ANSWERS]
    nulls = {"same_fact": "same_relation", **{probe: f"{probe}_null" for probe in two_slots.PROBES}}
    for variant in {row["variant"] for row in result.rows}:
        for stage in ("initial", "early", "end"):
            rows = [row for row in result.rows if (row["variant"], row["stage"]) == (variant, stage)]
            expected = {column: [row[column] for row in rows] for column in columns}
            found = {column: result.summary.at(column, variant=variant, stage=stage) for column in columns}
            for name, null in nulls.items():
                expected[null] = [row[null] for row in rows]
                found[null] = result.summary.null(name, variant=variant, stage=stage)
                expected[f"{name}_over_null"] = [row[name] - row[null] for row in rows]
                found[f"{name}_over_null"] = result.summary.at(f"{name}_over_null", variant=variant, stage=stage)
            for name, values in expected.items():
                estimate = found[name]
                assert estimate.n == len(values)
                if values:
                    assert estimate.value == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-9)
    assert result.summary.at("chance").value == pytest.approx(1 / 3)


def test_the_verdict_tells_one_entry_from_two(tiny_result: Callable[[str], Result]) -> None:
    """Rows of ten planted seeds in place of the measured ones."""
    result = tiny_result("two_slots")
    row = next(row for row in result.rows if row["variant"] == "MDM rope" and row["stage"] == "end")
    kinds = {
        "MDM rope": lambda seed: (entries(seeded(seed)), entries(seeded(100 + seed))),
        "MDM alibi": lambda seed: (entries(seeded(seed)), entries(seeded(seed))),
    }
    rows = [
        {**row, "variant": variant, "seed": seed, "stage": stage, **compared(*make(seed))}
        for variant, make in kinds.items()
        for seed in range(6)
        for stage in ("initial", "end")
    ]
    planted = replace(result, rows=tidy(rows))
    assert [two_slots.two_entries(planted.summary, variant) for variant in kinds] == [True, False]
    said = two_slots.takeaway(planted)
    assert said.startswith("Yes for MDM ALiBi, undecided for MDM RoPE: ") and "(n = 6 seeds)" in said
    assert said.endswith(" As two entries predict: MDM RoPE.")
    one_entry = replace(planted, rows=[row for row in planted.rows if row["variant"] == "MDM alibi"])
    assert "two entries" not in two_slots.takeaway(one_entry)
