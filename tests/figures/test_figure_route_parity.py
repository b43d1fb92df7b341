"""Route parity's summary and its sentence follow from its rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import planted_result

from analyses import route_parity
from mdm_interp.experiments.grids import OF_FEW_SEEDS, SCHEMES
from mdm_interp.experiments.results import Result


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


SELECTIVE, BLIND = {1: 0.1, 2: 0.7, 3: 0.0}, {1: 0.1, 2: 0.15, 3: 0.0}


@pytest.mark.parametrize(
    ("selectivity", "reverse", "said"),
    [
        (
            SELECTIVE,
            (0.1, 0.6, 0.9),
            "RoPE heads do for a while: 0.70 of their energy is odd at step 2, 0.00 in the end; ",
        ),
        (
            BLIND,
            (0.1, 0.6, 0.9),
            "RoPE heads do not for sure: 0.15 of their energy is odd at step 2, 0.00 in the end; ",
        ),
        (SELECTIVE, (0.1, 0.9, 0.4), "RoPE heads do for a while: "),
    ],
)
def test_the_takeaway_follows_planted_rows(
    selectivity: dict[int, float], reverse: tuple[float, ...], said: str
) -> None:
    rows = [
        {
            **{"kind": "run", "scheme": scheme, "run": f"{scheme}{seed}", "seed": seed, "step": step, "null": 0.2},
            **{"selectivity": value + 0.01 * seed, "reverse_probability": probability - 0.01 * seed * (step == 3)},
        }
        for scheme in SCHEMES
        for seed in (-1, 0, 1)
        for (step, value), probability in zip(selectivity.items(), reverse, strict=True)
    ]
    planes = {"plane": 0, "energy_share": 1.0, "odd_energy": 1.0, "odd_uniform": 1.0}
    rows += [{**rows[0], **planes, "kind": "plane", "step": step, "run": "rope0"} for step in (1, 3)]
    found = route_parity.takeaway(planted_result("route_parity", rows, summarize=route_parity.summarize))
    assert found.startswith(said)
    falls = "reverse probability falls by 0.50 under RoPE, ALiBi, NoPE, learned, T5 and sinusoidal"
    assert (
        falls if reverse[1] > reverse[2] else "reverse probability surely falls from its best under no scheme"
    ) in found
