"""Patches as effects: every position has one role, and an effect's columns are means by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_model

from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.inference.prediction import predict
from mdm_interp.interventions import (
    Effect,
    effect_of_patches,
    patch_heads,
    patch_positions,
    position_roles,
    transplant_routes,
)
from mdm_interp.stats.estimates import Contrast

WORLD = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)


def model() -> Any:
    facts = WORLD.config
    return random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id, position="rope")


def test_every_position_of_a_reverse_query_has_one_role() -> None:
    roles = position_roles(PAIRS)
    assert (torch.stack(list(roles.values())).sum(0) == 1).all()
    for row, pair in enumerate(PAIRS):
        held = {role: [pair.reverse.tokens[at] for at in mask[row].nonzero()[:, 0]] for role, mask in roles.items()}
        assert held["readout"] == [WORLD.config.mask_token_id]
        assert held["source"] == list(pair.reverse.source)
        assert held["relation"] == [WORLD.facts[pair.fact, 1].item()]
        assert len(held["filler"]) == 5


def test_patches_of_some_places_are_an_effect_on_each_pair_and_place() -> None:
    unpatched = transplant_routes(model(), PAIRS)
    before = predict(model(), [pair.reverse for pair in PAIRS]).log_probability
    changes = patch_positions(model(), PAIRS)
    filler = position_roles(PAIRS)["filler"]
    effect = effect_of_patches(changes, unpatched, 1, filler)
    taken = [(pair, at) for pair in range(len(PAIRS)) for at in range(8) if filler[pair, at]]
    for after, change in ((effect.after.effect, changes.effect), (effect.after.null, changes.null)):
        expected = [(before[pair] + change[pair, 1, at]).item() for pair, at in taken]
        assert after.tolist() == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert effect.before.tolist() == pytest.approx([before[pair].item() for pair, _ in taken], rel=1e-4)
    assert effect.forward.tolist() == [unpatched.forward[pair].item() for pair, _ in taken]
    heads = torch.zeros(len(PAIRS), 4, dtype=torch.bool)
    heads[:, 2] = True
    changes = patch_heads(model(), PAIRS)
    effect = effect_of_patches(changes, unpatched, 0, heads)
    assert effect.after.effect.tolist() == pytest.approx((before + changes.effect[:, 0, 2]).tolist(), rel=1e-4)


def test_an_effect_that_helps_is_told_from_one_that_does_not() -> None:
    forward, before = torch.tensor([-0.1, -0.2]), torch.tensor([-3.0, -4.0])
    columns = Effect(forward, before, Contrast(forward, torch.tensor([-3.0, torch.nan]))).columns
    assert list(columns) == [
        *("forward", "before", "after", "control"),
        *("log_forward", "log_before", "log_after", "log_control"),
        "deviation",
    ]
    assert (columns["deviation"], columns["log_after"]) == (0.0, pytest.approx(-0.15))
    assert (columns["log_control"], columns["control"]) == (-3.0, pytest.approx(torch.tensor(-3.0).exp().item()))
    assert columns["after"] == pytest.approx(forward.exp().mean().item())
    assert Effect(forward, before, Contrast(before, before)).columns["deviation"] > 3
