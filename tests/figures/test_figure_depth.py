"""Signatures by depth: per layer they agree with independent references, and can come out either way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_model

from analyses import depth
from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.results import Result
from mdm_interp.measures.gradients.alignment import gradient_alignment
from mdm_interp.models.transformer import HookedTransformer

WORLD = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)


def model(**changes: Any) -> HookedTransformer:
    facts = WORLD.config
    return random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id, **changes)


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("depth")
    checked = 0
    for row in result.rows:  # the tiny grid has one seed of deep models: each row is its own mean
        layers = f"{row['n_layers']} layer{'s' if row['n_layers'] > 1 else ''}{' with MLP' if row['mlp'] else ''}"
        key = f"{row['scheme']} {layers} / {row['stage']}"
        assert result.summary[f"{key} / reverse_probability"].value == pytest.approx(
            row["reverse_probability"], rel=1e-5
        )
        above = row["reverse_probability"] - row["chance"]
        assert result.summary[f"{key} / reverse above chance"].value == pytest.approx(above, rel=1e-5)
        for name in depth.SIGNATURES:
            over = f"{key} / layer {row['layer'] + 1} / {name} over null"
            assert (over in result.summary) == (name != "MLP" or row["mlp"])
            if over in result.summary and row[name] is not None:
                expected = row[name] - row[f"{name}_null"]
                assert result.summary[over].value == pytest.approx(expected, rel=1e-5, abs=1e-9)
                checked += 1
    assert checked > 100
    assert len({(row["run"], row["stage"], row["layer"]) for row in result.rows}) == len(result.rows)


def test_intervals_are_over_seeds(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("depth")
    more = [{**row, "seed": 1, "evidence": row["evidence"] + 1.0} for row in result.rows]
    summary = depth.summarize(replace(result, rows=result.rows + more))
    key = "rope 2 layers / end / layer 2 / evidence over null"
    assert (summary[key].n, summary[key].value) == (2, pytest.approx(result.summary[key].value + 0.5, rel=1e-5))


@pytest.mark.parametrize("mlp", [False, True])
def test_gradient_cosines_are_those_of_the_per_query_gradients(mlp: bool) -> None:
    """Parity with `gradient_alignment`, which takes each query's gradient by itself, in a one-layer model."""
    one = model(n_layers=1, d_mlp=24 if mlp else None, dtype="float64")
    measured = depth.gradient_cosines(one, PAIRS)
    halves = [[pair for pair in PAIRS if pair.fact % 2 == half] for half in (0, 1)]
    whole = gradient_alignment(one, halves[0] + halves[1])
    split = len(halves[0])
    quarters = (slice(None, split), slice(split, None))

    def cosine(parts: tuple[str, ...], f: slice, r: slice) -> torch.Tensor:
        rows = [whole.components.index(part) for part in parts]
        inner, ff, rr = whole.inner[rows].sum(0), whole.forward_square[rows].sum(0), whole.reverse_square[rows].sum(0)
        return inner[f, r].mean() / (ff[f, f].mean() * rr[r, r].mean()).sqrt()

    for part, components in depth.PARTS.items():
        value, null = measured[part]
        if part == "MLP" and not mlp:
            assert value.isnan().all() and null.isnan().all()
            continue
        same = sum(cosine(components, half, half) for half in quarters) / 2
        crossed = sum(cosine(components, *order) for order in (quarters, quarters[::-1])) / 2
        assert value.item() == pytest.approx(float(same), abs=1e-6)
        assert null.item() == pytest.approx(float(crossed), abs=1e-6)


def test_the_same_query_twice_is_aligned_at_every_layer_and_its_null_is_not() -> None:
    twice = [replace(pair, reverse=pair.forward) for pair in PAIRS]
    for value, null in depth.gradient_cosines(model(d_mlp=24), twice).values():
        torch.testing.assert_close(value, torch.ones(2))
        assert (null < 0.99).all()
