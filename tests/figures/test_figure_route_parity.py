"""Route parity's summary follows from its rows, and planted heads come out either way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import random_model, seeded

from analyses import route_parity
from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.grids import OTHER_SCHEMES
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.measures.parity import Parity, rope_parity

WORLD = FactWorld(FactConfig(n_entities=60, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)
FACTS = WORLD.config


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("route_parity")
    last = max(row["step"] for row in result.rows)
    for scheme in route_parity.SCHEMES:
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
        for stage, rows in chosen.items():
            expected = {name: [r[name] for r in rows] for name in ("selectivity", "null", "reverse_probability")}
            expected["selectivity over null"] = [r["selectivity"] - r["null"] for r in rows]
            for name, values in expected.items():
                estimate = result.summary[f"{scheme} / {stage} / {name}"]
                assert estimate.n == (1 if scheme in OTHER_SCHEMES else 2)
                assert estimate.value == pytest.approx(mean(values), rel=1e-4, abs=1e-7)
        for name in ("selectivity", "reverse_probability"):
            change = [e[name] - p[name] for p, e in zip(chosen["reverse peak"], chosen["end"], strict=True)]
            estimate = result.summary[f"{scheme} / change of {name} after the reverse peak"]
            assert estimate.value == pytest.approx(mean(change), rel=1e-4, abs=1e-7)
    for stage, step in (("initial", 0), ("end", last)):
        planes = [row for row in result.rows if row["kind"] == "plane" and row["step"] == step]
        assert len(planes) == 2 * 4
        ratios = [
            sum(row["odd_energy"] for row in planes if row["seed"] == seed)
            / sum(row["odd_uniform"] for row in planes if row["seed"] == seed)
            for seed in (0, 1)
        ]
        key = f"rope / {stage} / odd energy over that of uniform phases"
        assert result.summary[key].value == pytest.approx(mean(ratios), rel=1e-4)
        for plane in range(4):
            shares = [row["energy_share"] for row in planes if row["plane"] == plane]
            assert result.summary[f"rope / {stage} / energy share of plane {plane}"].value == pytest.approx(
                mean(shares), rel=1e-4
            )


def planted(right: torch.Tensor, left: torch.Tensor) -> tuple[float, float]:
    """Selectivity and its null of one head with these scores."""
    parity = Parity(((right + left) / 2)[:, None, None], ((right - left) / 2)[:, None, None])
    null = route_parity.mispaired_selectivity(parity, PAIRS)
    return parity.selectivity().item(), null.item()


def test_selectivity_stands_on_either_side_of_its_null() -> None:
    right, other = torch.randn(2, len(PAIRS), generator=seeded(0), dtype=torch.float64)
    alike, unrelated, opposite = planted(right, right), planted(right, other), planted(right, -right)
    assert alike[0] == 0 and alike[1] == pytest.approx(0.5, abs=0.05)
    assert unrelated[0] == pytest.approx(unrelated[1], abs=0.1)
    assert opposite[0] == 1 and opposite[1] == pytest.approx(0.5, abs=0.05)
    constant = planted(torch.ones(len(PAIRS)).double(), -torch.ones(len(PAIRS)).double())
    assert constant == (1.0, 1.0), "a preference that all facts share is no fact's own"


def test_planes_of_a_random_model_have_uniform_phases_and_a_planted_one_does_not() -> None:
    model = random_model(
        position="rope",
        n_layers=1,
        d_model=64,
        d_head=16,
        d_vocab=FACTS.d_vocab,
        n_ctx=FACTS.seq_len,
        mask_token_id=FACTS.mask_token_id,
        dtype="float64",
    )
    rows = route_parity.measure_planes(model, PAIRS)
    assert [row["plane"] for row in rows] == list(range(8))
    assert rows[0]["wavelength"] == pytest.approx(2 * torch.pi)
    assert sum(row["energy_share"] for row in rows) == pytest.approx(1)
    expected = rope_parity(model, PAIRS).odd.pow(2).mean((0, 1, 2))
    assert [row["odd_energy"] for row in rows] == pytest.approx(expected.tolist())
    ratio = rows[0]["odd_energy"] / rows[0]["odd_uniform"]
    assert 0.3 < ratio < 1.7
    with torch.no_grad():  # keys are the query at the mask, a quarter turn further in plane 0: all of it is odd
        attn = model.blocks[0].attn
        attn.W_Q.zero_(), attn.W_K.zero_()  # type: ignore[func-returns-value]
        attn.W_Q[:, :, 0] = torch.randn(64, generator=seeded(1), dtype=torch.float64)
        attn.W_K[:, :, 8] = torch.randn(64, generator=seeded(2), dtype=torch.float64)
    rows = route_parity.measure_planes(model, PAIRS)
    assert rows[0]["odd_energy"] == pytest.approx(2 * rows[0]["odd_uniform"])
    assert rows[0]["energy_share"] == pytest.approx(1)


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
