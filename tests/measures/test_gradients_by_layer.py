"""Streamed gradients, layer by layer, against all gradients at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_model
from model_helpers import SHAPE, mirrored_pairs, native_peer
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.config import FactConfig
from mdm_interp.data.queries import Query, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.gradients import layers
from mdm_interp.measures.gradients.alignment import COMPONENTS, component_of, gradient_alignment
from mdm_interp.measures.gradients.layers import layer_alignment, layer_cosines
from mdm_interp.models.transformer import HookedTransformer


def gradient_of(model: HookedTransformer, query: Query) -> dict[str, Tensor]:
    batch = collate([query], model.cfg)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = query_loss(model(batch.tokens), batch).sum()
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_inner_products_are_autograds(tied: bool) -> None:
    model = random_model(**SHAPE, dtype="float64", tie_word_embeddings=tied, qkv_bias=True)
    pairs = mirrored_pairs(causal=False)
    streamed = layer_alignment(model, pairs)
    for row, pair in enumerate(pairs):
        forward, reverse = gradient_of(model, pair.forward), gradient_of(model, pair.reverse)
        for column, (layer, component) in enumerate(streamed.parts):
            names = [
                name
                for name in forward
                if component_of(name) == component
                and (f"blocks.{layer}." in name if layer is not None else "blocks" not in name)
            ]
            inner = sum((forward[name] * reverse[name]).sum() for name in names)
            square = sum(reverse[name].pow(2).sum() for name in names)
            assert_close(streamed.inner.effect[row, column], inner, atol=1e-12, rtol=1e-10)
            assert_close(streamed.reverse_square.effect[row, column], square, atol=1e-12, rtol=1e-10)


def test_all_layers_together_are_the_alignment_of_the_whole_model() -> None:
    model = random_model(**SHAPE, dtype="float64")
    pairs = mirrored_pairs(causal=False)
    streamed, whole = layer_alignment(model, pairs), gradient_alignment(model, pairs)
    everywhere = [None, *range(model.cfg.n_layers)]
    for component in whole.components[:-1]:
        expected = whole.pair_cosine().effect[whole.components.index(component)]
        assert_close(streamed.cosine(everywhere, [component]).effect, expected, atol=1e-9, rtol=0)
    assert_close(streamed.cosine(everywhere, COMPONENTS).effect, whole.pair_cosine().effect[-1], atol=1e-9, rtol=0)


def test_the_null_is_another_facts_reverse_gradient() -> None:
    model = random_model(**SHAPE, dtype="float64")
    pairs = mirrored_pairs(causal=False)
    streamed, whole = layer_alignment(model, pairs), gradient_alignment(model, pairs)
    null = streamed.inner.null.sum(1)
    for row in range(len(pairs)):
        others = [whole.inner[-1, row, other] for other in range(len(pairs)) if other != row]
        assert min((null[row] - other).abs() for other in others) < 1e-9
        assert (null[row] - whole.inner[-1, row, row]).abs() > 1e-6


def test_one_fact_alone_has_no_null() -> None:
    streamed = layer_alignment(random_model(**SHAPE), mirrored_pairs(causal=False, count=1))
    cosine = streamed.cosine([0], ["V", "O"])
    assert cosine.effect.isfinite().all()
    assert cosine.null.isnan().all()


def test_the_model_is_left_as_it_was() -> None:
    model = random_model(**SHAPE)
    first, *_ = model.parameters()
    first.grad = torch.ones_like(first)
    for parameter in list(model.parameters())[1:]:
        parameter.requires_grad_(False)
    layer_alignment(model, mirrored_pairs(causal=False))
    assert torch.equal(first.grad, torch.ones_like(first))
    assert [parameter.requires_grad for parameter in model.parameters()].count(True) == 1
    assert all("forward" not in vars(block) for block in model.blocks)


def test_one_gradient_of_each_parameter_is_held_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a gradient is looked at, none is left on the parameters: each was taken as it came."""
    model, left, inner = random_model(**SHAPE), [], layers._inner

    def looked_at(one: Tensor, other: Tensor) -> float:
        left.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return inner(one, other)

    monkeypatch.setattr(layers, "_inner", looked_at)
    layer_alignment(model, mirrored_pairs(causal=False, count=2))
    assert len(left) == 2 * (1 + 2 + 2) * len(list(model.parameters()))
    assert max(left) == 0


@pytest.mark.parametrize("layout", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("other_layout", [(0, 1, 2), (2, 1, 0)])
def test_an_inner_product_is_of_entries_wherever_they_lie_in_memory(
    monkeypatch: pytest.MonkeyPatch, layout: tuple[int, ...], other_layout: tuple[int, ...]
) -> None:
    monkeypatch.setattr(layers, "CHUNK", 7)
    left, right = torch.randn(2, 3, 4, 5, dtype=torch.float64)

    def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
        back = [order.index(dim) for dim in range(x.ndim)]
        return x.permute(order).contiguous().permute(back)

    inner = layers._inner(laid_out(left, layout), laid_out(right, other_layout))
    assert inner == pytest.approx((left * right).sum().item(), abs=1e-12)


def test_on_a_bridge() -> None:
    model = random_model(**SHAPE, rotary_adjacent_pairs=True, qkv_bias=True)
    pairs = mirrored_pairs(causal=False)
    ours, theirs = layer_alignment(model, pairs), layer_alignment(native_peer(model), pairs)
    for layer, component in [(0, "V"), (1, "Q"), (None, "unembedding")]:
        got, expected = theirs.cosine([layer], [component]), ours.cosine([layer], [component])
        assert_close(got.effect, expected.effect, atol=1e-4, rtol=0)
        assert_close(got.null, expected.null, atol=1e-4, rtol=0)


def test_parts_that_are_not_there_are_named() -> None:
    streamed = layer_alignment(random_model(**SHAPE), mirrored_pairs(causal=False))
    with pytest.raises(UserError, match=r"the model has no \['position'\] in layers \[0\]"):
        streamed.cosine([0], ["position"])
    with pytest.raises(UserError, match="gradients need at least one pair"):
        layer_alignment(random_model(**SHAPE), [])


# ---- of the mean losses

WORLD = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)
GROUPS = {"VO": ("V", "O"), "QK": ("Q", "K"), "MLP": ("MLP",)}


def model_of_facts(**changes: Any) -> HookedTransformer:
    facts = WORLD.config
    return random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id, **changes)


@pytest.mark.parametrize("mlp", [False, True])
def test_layer_cosines_are_those_of_the_per_query_gradients(mlp: bool) -> None:
    """Parity with `gradient_alignment`, which takes each query's gradient by itself, in a one-layer model."""
    one = model_of_facts(n_layers=1, d_mlp=24 if mlp else None, dtype="float64")
    measured = layer_cosines(one, PAIRS, GROUPS)
    halves = [[pair for pair in PAIRS if pair.fact % 2 == half] for half in (0, 1)]
    whole = gradient_alignment(one, halves[0] + halves[1])
    split = len(halves[0])
    quarters = (slice(None, split), slice(split, None))

    def cosine(parts: tuple[str, ...], f: slice, r: slice) -> torch.Tensor:
        rows = [whole.components.index(part) for part in parts]
        inner, ff, rr = whole.inner[rows].sum(0), whole.forward_square[rows].sum(0), whole.reverse_square[rows].sum(0)
        return inner[f, r].mean() / (ff[f, f].mean() * rr[r, r].mean()).sqrt()

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
