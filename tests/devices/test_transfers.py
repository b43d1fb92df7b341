"""A call waits for the device as often on a deep model as on a shallow one: per batch, never per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_helpers import CALLS, OWN_MODELS, PAGES, Asked, made
from device_helpers import PRETENDED, accelerator
from helpers import random_model
from model_helpers import mirrored_pairs

from mdm_interp.measures.rope import compute_content
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.transformer import HookedTransformer

pytestmark = pytest.mark.usefixtures("unchecked")

EXCEPTIONS = {"fused_attention": "brings the weights of a model that it makes to the device"}
EXCEPTIONS |= dict.fromkeys(("patch_heads", "patch_positions"), "runs the model once for each layer that it patches")
EXCEPTIONS |= dict.fromkeys(set(PAGES) - {"influence_page"}, "writes each layer's numbers into a page")
EXCEPTIONS |= dict.fromkeys(
    ("mean_gradients", "first_order_steps", "all_signatures", "learning_path"),
    "takes inner products of whole gradients, a number for each parameter",
)
"""Calls that wait more often the more layers there are, and why."""


def waits(call: Callable[[Any, Any], object], model: HookedTransformer, asked: Any) -> Counter[str]:
    with accelerator() as there:
        model.to(PRETENDED)
        there.waits.clear()
        call(model, asked)
        return there.waits


def growth(name: str, kind: str, n_layers: int = 1) -> Counter[str]:
    """Count for what a call waits more often with a layer more."""
    models = [made(kind, torch.float32, n_layers=depth) for depth in (n_layers, n_layers + 1)]
    fewer, more = (waits(CALLS[name][0], model, Asked.of(model)) for model in models)
    return Counter({why: times - fewer[why] for why, times in more.items() if times != fewer[why]})


ASKING = [
    pytest.param(name, marks=[pytest.mark.xfail(reason=EXCEPTIONS[name], strict=True)] if name in EXCEPTIONS else [])
    for name in CALLS
    if name not in OWN_MODELS
]


@pytest.mark.parametrize("name", ASKING)
def test_another_layer_has_nothing_wait(name: str) -> None:
    assert growth(name, CALLS[name][1][0]) == Counter()


def test_nothing_is_excepted_that_is_not_there() -> None:
    assert EXCEPTIONS.keys() <= CALLS.keys()


def test_experts_wait_for_their_counts_alone() -> None:
    """A layer of experts asks which tokens each of them gets."""
    assert growth("found_routes", "experts", n_layers=2) == Counter({"size": 2, "to CPU": 1})


def pairs() -> Any:
    return mirrored_pairs(causal=False)


@pytest.mark.parametrize(
    "changes",
    [
        *({"position": position} for position in ("alibi", "t5_bias", "learned", "sinusoidal")),
        {"attention": "block_causal", "block_size": 2},
    ],
    ids=lambda changes: changes.get("attention") or changes["position"],
)
def test_no_kind_of_attention_waits_in_each_layer(changes: dict[str, Any]) -> None:
    queries = [pair.forward for pair in pairs()]
    two, six = (
        waits(compute_routes, random_model(mask_token_id=0, n_layers=n_layers, **changes), queries)
        for n_layers in (2, 6)
    )
    assert two == six


@pytest.mark.parametrize(("measure", "copies"), [(compute_routes, 2), (compute_content, 3)])
def test_a_batch_comes_back_in_one_copy(measure: Callable[[Any, Any], object], copies: int) -> None:
    """Besides that of the result, or of queries and keys, one copy of the forward pass, which looks at token ids."""
    waited = waits(measure, random_model(mask_token_id=0), [pair.forward for pair in pairs()])
    assert waited == Counter({"to device": 6, "to CPU": copies})  # the batch's 5, and RoPE's angles
