"""What a measure returns does not depend on how it is computed: query by query or in batches, beside padding, with
hooks attached, by the fused kernel of attention, on one thread or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import call_helpers
import pytest
import torch
import torch.nn.functional as F
from call_helpers import (
    BIDIRECTIONAL,
    CALLS,
    CASES,
    MODELS,
    OWN_MODELS,
    PAGES,
    WORLD,
    Asked,
    apart,
    asking,
    made,
    named_in,
    returned,
)
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.hook_points import HookPoint

from mdm_interp import interventions
from mdm_interp.data import queries
from mdm_interp.data.queries import QueryPair
from mdm_interp.inference.denoising import denoise
from mdm_interp.inference.likelihood import bound
from mdm_interp.interventions import effects
from mdm_interp.measures import evidence, parity, sinks
from mdm_interp.measures.gradients import asked, backward
from mdm_interp.models import layers
from mdm_interp.models.transformer import HookedTransformer

pytestmark = pytest.mark.usefixtures("unchecked")

NOT_MEASURES = {*PAGES, *OWN_MODELS}
"""Calls that round what they show, or that a model's hooks do not reach."""
UNDIVIDED = {"run_with_cache", "every_switched_hook", "loss", "part_of_the_layers", "fused_attention", "generate"}
UNDIVIDED |= {"processed_weights", "scores_of_tokens", "denoised", "denoised_at_random", "training_steps", "bounds"}
UNDIVIDED |= {"patch_heads", "patch_positions"}
"""Calls that put all they are given into one pass, or nothing."""


def counted(name: str, model: HookedTransformer) -> tuple[dict[str, Tensor], int]:
    """Return what a call returns, and how often it has the model, or a copy of it, embed tokens."""
    passes: list[int] = []
    model.embed.register_forward_pre_hook(lambda *_: passes.append(1))  # `run_with_hooks` passes by the model's own
    return returned(name, model), len(passes)


@cache
def plainly(name: str, kind: str) -> tuple[dict[str, Tensor], int]:
    return counted(name, made(kind, torch.float32))


def check(name: str, kind: str, got: dict[str, Tensor]) -> None:
    """Compare with what the call returns where nothing is special, within 1e-5 of the largest entry or of 1."""
    assert (told := apart(plainly(name, kind)[0], got, torch.float32)) == {}, f"{name} of {kind}: {told}"


# ---- batches


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries go through models one by one; gradients are those of three queries at a time and of a part of the
    vocabulary, from activations that are computed again."""
    monkeypatch.setattr(queries, "MAX_LOGITS", 1)
    monkeypatch.setattr(effects, "CHUNK", 1)
    monkeypatch.setattr(asked, "TOKENS", 30)
    monkeypatch.setattr(backward, "LOGITS", 100)
    monkeypatch.setattr(backward, "ERRORS", 100)
    monkeypatch.setattr(backward, "KEPT", 0)


@pytest.mark.promise("a measure of many queries, few of them at a time", "the same numbers within 1e-5")
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kind in CASES if name not in NOT_MEASURES | UNDIVIDED]
)
def test_a_measure_does_not_depend_on_batches(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    _, together = plainly(name, kind)
    request.getfixturevalue("few_at_a_time")
    got, passes = counted(name, made(kind, torch.float32))
    check(name, kind, got)
    assert passes > together > 0, "nothing was divided"


def test_a_planted_dependence_on_the_batch_is_found(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_readout = queries.QueryBatch.at_readout

    def larger(batch: queries.QueryBatch, x: Tensor) -> Tensor:
        return at_readout(batch, x) * (1 + 1e-4 * (len(x) > 1))

    monkeypatch.setattr(queries.QueryBatch, "at_readout", larger)
    together = returned("found_routes", made("rope", torch.float32))
    request.getfixturevalue("few_at_a_time")
    assert apart(together, returned("found_routes", made("rope", torch.float32)), torch.float32) != {}


Each = Callable[[Any, list[QueryPair]], Tensor]
EACH: dict[str, Each] = {
    "storage_coupling": evidence.storage_coupling,
    "route_coupling": parity.route_coupling,
    "score_parity": lambda model, pairs: torch.stack([*vars(parity.score_parity(model, pairs)).values()], 1),
    "sinks": lambda model, pairs: sinks.sinks(model, [pair.reverse for pair in pairs]).share.null,
    "bound": lambda model, pairs: bound(model, [pair.forward.statement for pair in pairs], n_draws=3).value,
    "ablate_routes": lambda model, pairs: interventions.ablate_routes(model, pairs).after.effect,
    "transplant_routes": lambda model, pairs: interventions.transplant_routes(model, pairs).after.effect,
    "patch_heads": lambda model, pairs: interventions.patch_heads(model, pairs).effect,
    "patch_positions": lambda model, pairs: interventions.patch_positions(model, pairs).effect,
}
"""Measures of each pair, whatever others there are."""


@pytest.mark.promise("a measure of many pairs, each pair alone", "the same numbers within 1e-5")
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kind", ["rope", "learned", "buckets"])
def test_a_pair_is_measured_alone_as_beside_others(name: str, kind: str) -> None:
    model = made(kind, torch.float32)
    pairs = Asked.of(model).pairs
    alone = torch.cat([EACH[name](model, [pair]) for pair in pairs])
    together = EACH[name](model, pairs)
    assert len(together) == len(pairs)
    assert_close(alone, together, atol=1e-5 * max(1.0, together.abs().max().item()), rtol=0)


# ---- padding


def padded(tokens: Tensor, side: str, by: int) -> tuple[Tensor, Tensor]:
    """Tokens with padding on a side, and where they are real."""
    edges = (by, 0) if side == "left" else (0, by)
    return F.pad(tokens, edges, value=2), F.pad(torch.ones_like(tokens), edges).bool()


@pytest.mark.promise("padding on the left or on the right", "the same numbers within 1e-5")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_side_of_padding_does_not_matter(kind: str, side: str) -> None:
    model = made(kind, torch.float32)
    targets = torch.tensor([pair.forward.statement for pair in Asked.of(model).pairs])
    tokens = targets.clone()
    tokens[:, 2:5] = WORLD.config.mask_token_id
    wider, real = padded(tokens, side, by=3)
    masked = {} if model.cfg.is_causal else {"targets": targets}
    masked_wider = {} if model.cfg.is_causal else {"targets": padded(targets, side, by=3)[0]}
    with torch.no_grad():
        logits, activations = model.run_with_cache(tokens)
        logits_wider, activations_wider = model.run_with_cache(wider, attention_mask=real)
        loss, loss_wider = (
            model(given, "loss", attention_mask=mask, **asked)
            for given, mask, asked in ((tokens, None, masked), (wider, real, masked_wider))
        )
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    plain = {"logits": logits, "residual stream": activations[last]}
    beside = {"logits": logits_wider, "residual stream": activations_wider[last]}
    if kind in BIDIRECTIONAL:
        steps = denoise(model, tokens, steps=2), denoise(model, wider, steps=2, attention_mask=real)
        for found, done in zip((plain, beside), steps, strict=True):
            found |= {"filled": done.tokens[-1], "filled at": done.filled_at, "probability": done.probability}
    kept = {name: values[real].view_as(plain[name]) for name, values in beside.items()}
    assert (told := apart({**plain, "loss": loss}, {**kept, "loss": loss_wider}, torch.float32)) == {}, told


# ---- hooks, and the kernel of attention


def unchanged(tensor: Tensor, *, hook: HookPoint) -> Tensor:
    return tensor.clone()


@pytest.mark.promise("hooks on everything in a model that change nothing", "the same numbers within 1e-5")
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in CASES if name not in NOT_MEASURES])
def test_a_measure_does_not_depend_on_hooks_that_change_nothing(name: str, kind: str) -> None:
    model = made(kind, torch.float32)
    for point in model.hook_dict:
        model.add_perma_hook(point, unchanged)
    check(name, kind, returned(name, model))
    assert all(point.has_hooks() for point in model.hook_dict.values()), "a hook was lost"


@pytest.mark.promise("attention computed by a fused kernel", "the same numbers within 1e-5")
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in CASES if name not in NOT_MEASURES])
def test_a_measure_does_not_depend_on_the_kernel_of_attention(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly(name, kind)
    monkeypatch.setattr(layers, "FUSED_FROM", 1)
    check(name, kind, returned(name, made(kind, torch.float32)))


# ---- threads

WIDE: dict[str, Any] = {"d_model": 256, "n_heads": 8, "d_head": 32, "d_mlp": 256, "initializer_range": 0.05}
"""Of a model whose tensors are large enough for torch to share out: more than 32,768 entries."""


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.promise("two threads instead of one", "the same numbers within 1e-5")
@pytest.mark.parametrize("name", [name for name in CALLS if name not in PAGES])
def test_a_call_does_not_depend_on_threads(name: str) -> None:
    _, kinds = CALLS[name]
    kind = "deep" if "deep" in kinds else kinds[0]
    with threads(1):
        one = returned(name, made(kind, torch.float32, **WIDE))
    with threads(2):
        two = returned(name, made(kind, torch.float32, **WIDE))
    assert (told := apart(one, two, torch.float32)) == {}, f"{name} of {kind}: {told}"


# ---- nothing is left out


def test_every_function_of_a_model_is_called() -> None:
    assert len(asking()) > 60
    assert asking() - named_in(Path(call_helpers.__file__)) == set()
