"""Planted rows with an effect and its null, and rules that judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from helpers import planted_result

from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.results import Result

PLACE = {
    "world": "planted",
    "reversed_share": 0.0,
    "scheme": "rope",
    "rotary_base": 10_000.0,
    "objective": "any_order",
    "mask_rate": 0.0,
    "attention": "bidirectional",
    "n_layers": 1,
    "n_heads": 2,
    "d_head": 16,
    "mlp": False,
    "stage": "end",
}
ABOVE = ClaimTest(claim="5", measure="m", null_is="none", effect="effect", null="null", side="above", margin=0.3)
BELOW = replace(ABOVE, side="below", margin=0.05)


def result_of(rows: Sequence[dict[str, Any]], name: str = "planted") -> Result:
    return planted_result(name, [{**PLACE, **row} for row in rows], seeds=list(range(20)))


def rows_of(effects: Sequence[float], null: float = 0.0, **where: Any) -> list[dict[str, Any]]:
    return [{"seed": seed, "effect": effect, "null": null, **where} for seed, effect in enumerate(effects)]
