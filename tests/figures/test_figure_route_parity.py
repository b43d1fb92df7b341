"""Route parity's summary and its sentence follow from its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from analyses import route_parity
from mdm_interp.experiments.grids import OF_FEW_SEEDS, SCHEMES
from mdm_interp.experiments.results import Result, tidy


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("route_parity")
    summary, last = result.summary, max(row["step"] for row in result.rows)
    for scheme in SCHEMES:
        per_run: dict[str, list[dict]] = {}
        for row in result.rows:
            if row["kind"] == "run" and row["scheme"] == scheme:
                per_run.setdefault(row["run"], []).append(row)
        chosen = {
            "initial": [next(r for r in rows if r["step"] == 0) for rows in per_run.values()],
            "reverse peak": [
                max((r for r in rows if r["step"] > 0), key=lambda r: r["reverse_probability"])
                for rows in per_run.values()
            ],
            "end": [next(r for r in rows if r["step"] == last) for rows in per_run.values()],
        }
        assert tuple(chosen) == route_parity.MOMENTS
        for moment, rows in chosen.items():
            of = {"scheme": scheme, "moment": moment}
            found = {
                "selectivity": summary.at("selectivity", **of),
                "null": summary.null("selectivity", **of),
                "reverse_probability": summary.at("reverse_probability", **of),
            }
            for name, estimate in found.items():
                assert estimate.n == (1 if scheme in OF_FEW_SEEDS else 2)
                assert estimate.value == pytest.approx(mean([r[name] for r in rows]), rel=1e-4, abs=1e-7)
            over_null = mean([r["selectivity"] - r["null"] for r in rows])
            assert summary.at("over_null", **of).value == pytest.approx(over_null, rel=1e-4, abs=1e-7)
        for name in ("selectivity", "reverse_probability"):
            change = [e[name] - p[name] for p, e in zip(chosen["reverse peak"], chosen["end"], strict=True)]
            estimate = summary.at(f"change_of_{name}", scheme=scheme)
            assert estimate.value == pytest.approx(mean(change), rel=1e-4, abs=1e-7)
    for moment, step in (("initial", 0), ("end", last)):
        planes = [row for row in result.rows if row["kind"] == "plane" and row["step"] == step]
        assert len(planes) == 2 * 4
        ratios = [
            sum(row["odd_energy"] for row in planes if row["seed"] == seed)
            / sum(row["odd_uniform"] for row in planes if row["seed"] == seed)
            for seed in (0, 1)
        ]
        assert summary.at("odd_over_uniform", stage=moment).value == pytest.approx(mean(ratios), rel=1e-4)
        for plane in range(4):
            shares = [row["energy_share"] for row in planes if row["plane"] == plane]
            estimate = summary.at("energy_share", stage=moment, plane=plane)
            assert estimate.value == pytest.approx(mean(shares), rel=1e-4)


def test_the_takeaway_follows_planted_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("route_parity")
    rows = [
        {**row, "selectivity": 0.25 if row["step"] else 0.0, "reverse_probability": 0.75}
        if row["kind"] == "run"
        else row
        for row in result.rows
    ]
    said = route_parity.takeaway(replace(result, rows=tidy(rows)))
    assert "rope 0.25 to 0.25 (0.75 to 0.75)" in said
    assert said != route_parity.takeaway(result)
