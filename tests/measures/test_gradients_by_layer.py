"""Gradients of the mean losses, layer by layer, against all pairs' gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_model
from torch.testing import assert_close

from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.measures.gradients.gram import gram
from mdm_interp.measures.gradients.layers import layer_cosines
from mdm_interp.models.transformer import HookedTransformer

WORLD = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)
GROUPS = {"VO": ("V", "O"), "QK": ("Q", "K"), "MLP": ("MLP",)}


def model_of_facts(**changes: Any) -> HookedTransformer:
    facts = WORLD.config
    return random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id, **changes)


@pytest.mark.parametrize("mlp", [False, True])
def test_layer_cosines_are_those_of_the_per_query_gradients(mlp: bool) -> None:
    """Parity with `gram`, which takes each query's gradient by itself, in a one-layer model."""
    one = model_of_facts(n_layers=1, d_mlp=24 if mlp else None, dtype="float64")
    measured = layer_cosines(one, PAIRS, GROUPS)
    halves = [[pair for pair in PAIRS if pair.fact % 2 == half] for half in (0, 1)]
    pairs = halves[0] + halves[1]
    whole = gram(one, [pair.forward for pair in pairs] + [pair.reverse for pair in pairs])
    split = len(halves[0])
    quarters = (slice(None, split), slice(split, None))

    def cosine(parts: tuple[str, ...], f: slice, r: slice) -> torch.Tensor:
        inner = whole.within(parts).unflatten(0, (2, -1)).unflatten(2, (2, -1))  # [side pair side pair]
        return inner[0, f, 1, r].mean() / (inner[0, f, 0, f].mean() * inner[1, r, 1, r].mean()).sqrt()

    for part, components in GROUPS.items():
        value, null = measured[part].effect, measured[part].null
        if part == "MLP" and not mlp:
            assert value.isnan().all() and null.isnan().all()
            continue
        same = sum(cosine(components, half, half) for half in quarters) / 2
        crossed = sum(cosine(components, *order) for order in (quarters, quarters[::-1])) / 2
        assert value.item() == pytest.approx(float(same), abs=1e-6)
        assert null.item() == pytest.approx(float(crossed), abs=1e-6)


def test_the_same_query_twice_is_aligned_at_every_layer_and_its_null_is_not() -> None:
    twice = [replace(pair, reverse=pair.forward) for pair in PAIRS]
    for cosines in layer_cosines(model_of_facts(d_mlp=24), twice, GROUPS).values():
        assert_close(cosines.effect, torch.ones(2))
        assert (cosines.null < 0.99).all()
