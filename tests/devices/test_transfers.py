"""The capture path waits for the device as often in a deep model as in a shallow one: per batch, never per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_helpers import PRETENDED, accelerator
from helpers import random_model
from model_helpers import mirrored_pairs

from mdm_interp.data.queries import QueryPair
from mdm_interp.measures import answer_evidence, evidence, fact_routes, heads, rope, routes, trajectory

Measure = Callable[[Any, list[QueryPair]], object]
TARGETS = torch.arange(4)

MEASURES: dict[str, Measure] = {
    "run_with_cache": lambda model, pairs: model.run_with_cache(torch.tensor([pairs[0].forward.tokens])),
    "compute_routes": lambda model, pairs: routes.compute_routes(model, [pair.forward for pair in pairs]),
    "route_correlation": routes.route_correlation,
    "compute_evidence": lambda model, pairs: evidence.compute_evidence(
        model, [pair.forward for pair in pairs], TARGETS
    ),
    "compute_contributions": lambda model, pairs: heads.compute_contributions(model, pairs, TARGETS.expand(4, -1)),
    "storage_coupling": evidence.storage_coupling,
    "answer_evidence": lambda model, pairs: answer_evidence.answer_evidence(model, [pair.reverse for pair in pairs]),
    "compute_fact_routes": lambda model, pairs: fact_routes.compute_fact_routes(
        model, pairs, fact_routes.same_lengths(pairs, [0] * 4)
    ),
    "compute_content": lambda model, pairs: rope.compute_content(model, [pair.forward for pair in pairs]),
    "denoise_answers": lambda model, pairs: trajectory.denoise_answers(model, [p.forward for p in pairs], stages=2),
}


def waits(measure: Measure, **shape: Any) -> Counter[str]:
    model = random_model(mask_token_id=0, **shape)
    with accelerator() as there:
        model.to(PRETENDED)
        there.waits.clear()
        measure(model, mirrored_pairs(causal=False))
        return there.waits


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("measure", MEASURES)
def test_six_layers_wait_as_often_as_two(measure: str) -> None:
    two, six = (waits(MEASURES[measure], n_layers=n_layers) for n_layers in (2, 6))
    assert two == six


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("position", ["alibi", "t5_bias", "learned", "sinusoidal"])
def test_no_position_scheme_waits_in_each_layer(position: str) -> None:
    two, six = (waits(MEASURES["compute_routes"], position=position, n_layers=n_layers) for n_layers in (2, 6))
    assert two == six


@pytest.mark.parametrize(("measure", "copies"), [("compute_routes", 2), ("compute_content", 3)])
def test_a_batch_comes_back_in_one_copy(measure: str, copies: int) -> None:
    """Besides that of the result, or of queries and keys, one copy of the forward pass, which looks at token ids."""
    assert waits(MEASURES[measure]) == Counter({"to device": 6, "to CPU": copies})  # the batch's 5, and RoPE's angles
