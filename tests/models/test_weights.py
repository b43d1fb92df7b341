"""Weights as TransformerLens has them: stacked, multiplied, counted, and what biases add up to."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import random_model, random_tokens, seeded, tiny_config
from model_helpers import with_biases
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.errors import UserError
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.models.transformer import HookedTransformer

close = partial(assert_close, atol=1e-5, rtol=1e-5)

GATED: dict[str, Any] = {"d_mlp": 24, "gated_mlp": True, "act_fn": "silu"}
SHAPES = {
    "W_Q": (2, 4, 16, 6),
    "W_K": (2, 4, 16, 6),
    "W_V": (2, 4, 16, 6),
    "W_O": (2, 4, 6, 16),
    "b_Q": (2, 4, 6),
    "b_K": (2, 4, 6),
    "b_V": (2, 4, 6),
    "b_O": (2, 16),
    "W_in": (2, 16, 24),
    "W_gate": (2, 16, 24),
    "W_out": (2, 24, 16),
    "b_in": (2, 24),
    "b_out": (2, 16),
    "W_E": (13, 16),
    "W_U": (16, 13),
    "b_U": (13,),
    "W_pos": (12, 16),
    "W_E_pos": (25, 16),
}
PART = dict.fromkeys(["W_in", "W_gate", "W_out", "b_in", "b_out"], "mlp")
STACKED = [name for name, shape in SHAPES.items() if shape[0] == 2]
GROUPED = ("W_K", "W_V", "b_K", "b_V")


def grouped_model(**changes: Any) -> HookedTransformer:
    return random_model(**{"n_key_value_heads": 2, "d_head": 6, "position": "learned", **GATED, **changes})


# ---- stacked


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("biases", [False, True])
def test_every_weight_has_its_shape_and_the_models_dtype(dtype: str, biases: bool) -> None:
    model = grouped_model(dtype=dtype)
    model = with_biases(model) if biases else model
    for name, shape in SHAPES.items():
        weight = getattr(model, name)
        assert (tuple(weight.shape), weight.dtype, str(weight.device)) == (shape, getattr(torch, dtype), "cpu"), name


def test_weights_that_are_nowhere_yet_have_shapes() -> None:
    changes: dict[str, Any] = {"n_key_value_heads": 2, "d_head": 6, "position": "learned", **GATED}
    model = HookedTransformer(tiny_config(**changes), init_weights=False)
    for name, shape in SHAPES.items():
        if "pos" not in name:
            weight = getattr(model, name)
            assert tuple(weight.shape) == shape and weight.device.type == "meta", name
    assert model.OV.AB.shape == (2, 4, 16, 16)
    assert model.n_params_total == grouped_model().n_params_total


@pytest.mark.parametrize("name", STACKED)
def test_each_layers_weight_is_its_blocks_own_once_per_query_head(name: str) -> None:
    model = with_biases(grouped_model())
    stacked = getattr(model, name)
    for layer in range(2):
        own = model.get_parameter(f"blocks.{layer}.{PART.get(name, 'attn')}.{name}")
        assert own.abs().min() > 0
        assert torch.equal(stacked[layer], own[[0, 0, 1, 1]] if name in GROUPED else own)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("b_")])
def test_a_bias_that_is_not_there_is_0(name: str) -> None:
    model = grouped_model()
    assert all(not parameter.endswith(f".{name}") for parameter, _ in model.named_parameters())
    assert torch.equal(getattr(model, name), torch.zeros(SHAPES[name]))
    assert torch.equal(model.add_biases() and getattr(model, name), torch.zeros(SHAPES[name]))


def test_biases_of_some_layers_only_stand_beside_zeros() -> None:
    model = random_model(d_mlp=24)
    bias = torch.randn(16, generator=seeded(2))
    model.blocks[1].attn.b_O = torch.nn.Parameter(bias)
    assert torch.equal(model.b_O, torch.stack([torch.zeros(16), bias]))
    close(model.accumulated_bias(2), bias)
    assert not model.accumulated_bias(1).any()


def test_gradients_reach_the_weights_that_were_stacked() -> None:
    model = grouped_model(qkv_bias=True)
    factors = torch.randn(SHAPES["W_K"], generator=seeded(2))
    ((model.W_K * factors).sum() + (3 * model.b_K).sum() + model.W_E_pos.sum()).backward()
    for layer, block in enumerate(model.blocks):
        assert block.attn.W_K.grad is not None and block.attn.b_K is not None
        close(block.attn.W_K.grad, factors[layer].unflatten(0, (2, 2)).sum(1))  # two query heads read each
        assert block.attn.b_K.grad is not None and (block.attn.b_K.grad == 6).all()
    assert model.W_E.grad is not None and model.W_pos.grad is not None


@pytest.mark.parametrize("tied", [False, True])
def test_the_unembedding_of_tied_weights_is_the_embedding(tied: bool) -> None:
    model = random_model(tie_word_embeddings=tied)
    assert torch.equal(model.W_U, model.W_E.T) == tied
    with torch.no_grad():
        model.W_E[3] = 7.0
    assert bool((model.W_U[:, 3] == 7).all()) == tied


def test_tokens_and_positions_are_one_above_the_other() -> None:
    model = random_model(position="learned")
    assert torch.equal(model.W_E_pos[:13], model.W_E) and torch.equal(model.W_E_pos[13:], model.W_pos)


@pytest.mark.parametrize("position", [name for name, scheme in POSITION_SCHEMES.items() if scheme.relative])
def test_a_relative_scheme_has_no_position_embedding_to_stack(position: str) -> None:
    for name in ("W_pos", "W_E_pos"):
        with pytest.raises(AttributeError, match="W_"):
            getattr(random_model(position=position), name)


def test_a_model_without_an_mlp_has_none_of_its_weights_and_one_without_gate_no_gate() -> None:
    model = random_model()
    for name in ("W_in", "W_out", "b_in", "b_out"):
        with pytest.raises(AttributeError):
            getattr(model, name)
    assert random_model(d_mlp=24).W_gate is None and model.W_gate is None


# ---- products


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_circuits_are_the_products_of_each_heads_weights(kv_heads: int) -> None:
    model = random_model(n_key_value_heads=kv_heads, n_layers=3, dtype="float64")
    qk: Any = model.QK
    ov: Any = model.OV
    assert qk.shape == ov.shape == (3, 4, 16, 16)
    for layer in range(3):
        attn = model.blocks[layer].attn
        for head in range(4):
            shared = head * kv_heads // 4
            close(qk.AB[layer, head], attn.W_Q[head] @ attn.W_K[shared].T)
            close(ov.AB[layer, head], attn.W_V[shared] @ attn.W_O[head])
            for circuit in (qk, ov):
                u, s, vh = circuit[layer, head].svd()
                product = circuit.AB[layer, head]
                close(s, torch.linalg.svdvals(product)[: len(s)])
                close(u @ s.diag() @ vh.T, product)
                close(circuit.norm()[layer, head], product.norm())


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_composition_scores_are_those_of_a_loop_over_heads(mode: Any, kv_heads: int) -> None:
    model = random_model(n_layers=3, n_key_value_heads=kv_heads, dtype="float64")
    scores = model.all_composition_scores(mode)
    expected = torch.zeros(3, 4, 3, 4, dtype=torch.float64)
    for layer in range(3):
        for later in range(layer + 1, 3):
            for head in range(4):
                for other in range(4):
                    writes = model.W_V[layer, head] @ model.W_O[layer, head]
                    query_key = model.W_Q[later, other] @ model.W_K[later, other].T
                    value = model.W_V[later, other] @ model.W_O[later, other]
                    reads = {"Q": query_key, "K": query_key.T, "V": value}[mode]
                    expected[layer, head, later, other] = (writes @ reads).norm() / writes.norm() / reads.norm()
    close(scores, expected)
    assert (scores <= 1 + 1e-9).all() and (scores[0, :, 1:] > 0).all()
    assert not scores.requires_grad


def test_composition_of_anything_else_is_refused(unchecked: None) -> None:
    mode: Any = "q"
    with pytest.raises(UserError, match="mode: 'q' is none of Q, K, V; choose one"):
        random_model().all_composition_scores(mode)


def test_heads_are_labelled_in_the_order_of_their_weights() -> None:
    assert random_model().all_head_labels() == [f"L{layer}H{head}" for layer in (0, 1) for head in (0, 1, 2, 3)]


# ---- how many


def test_parameters_are_counted_with_biases_and_norms_and_tied_ones_once() -> None:
    d, heads, d_head, d_mlp, vocab, n_ctx, layers = 16, 4, 6, 24, 13, 12, 2
    attention = layers * (2 * heads + 2 * 2) * d * d_head
    mlp, gate = layers * 2 * d * d_mlp, layers * d * d_mlp
    norms = (2 * layers + 1) * d
    own = {"n_key_value_heads": 2, "d_head": d_head, "d_mlp": d_mlp}
    bare = vocab * d + attention + mlp + norms
    assert random_model(**own).n_params_total == bare + d * vocab
    assert random_model(**own, tie_word_embeddings=True).n_params_total == bare
    assert random_model(**own, tie_word_embeddings=True, normalization_type=None).n_params_total == bare - norms
    assert random_model(**own, tie_word_embeddings=True, normalization_type="LN").n_params_total == bare + norms
    assert random_model(**own, tie_word_embeddings=True, position="learned").n_params_total == bare + n_ctx * d
    gated = random_model(**{**own, **GATED}, tie_word_embeddings=True)
    assert gated.n_params_total == bare + gate
    biased = random_model(**own, qkv_bias=True, tie_word_embeddings=True)
    assert biased.n_params_total == bare + layers * (heads + 2 * 2) * d_head
    biased.add_biases()
    assert biased.n_params_total == bare + layers * ((heads + 2 * 2) * d_head + d + d_mlp + d)


# ---- what biases add up to


@pytest.mark.parametrize("d_mlp", [None, 24])
def test_biases_alone_add_up_to_what_the_residual_stream_gets(d_mlp: int | None) -> None:
    model, tokens = with_biases(random_model(n_layers=3, d_mlp=d_mlp)), random_tokens()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O.zero_()
            if block.mlp is not None:
                block.mlp.W_out.zero_()
        _, cache = model.run_with_cache(tokens)
        for layer in range(3):
            got = cache["resid_pre", layer] - cache["embed"]
            close(got, model.accumulated_bias(layer).expand_as(got))
            after_attention = cache["resid_mid", layer] if d_mlp else cache["resid_post", layer]
            got = after_attention - cache["embed"]
            close(got, model.accumulated_bias(layer, mlp_input=True).expand_as(got))
        final = cache["resid_post", 2] - cache["embed"]
        close(final, model.accumulated_bias(3).expand_as(final))
        assert final.abs().max() > 0.5
    attention_alone = model.accumulated_bias(3, include_mlp_biases=False)
    close(attention_alone, model.b_O.sum(0))
    mlps = torch.zeros(16) if d_mlp is None else model.b_out.sum(0)
    close(model.accumulated_bias(3) - attention_alone, mlps)
    close(model.accumulated_bias(1, mlp_input=True, include_mlp_biases=False), model.b_O[:2].sum(0))


@pytest.mark.parametrize("expand_neurons", [False, True])
@pytest.mark.parametrize("layer", [1, 2, -1])
def test_heads_neurons_embedding_and_biases_add_up_to_the_residual_stream(expand_neurons: bool, layer: int) -> None:
    model = with_biases(random_model(d_mlp=24))
    with torch.no_grad():
        _, cache = model.run_with_cache(random_tokens())
        parts, labels = cache.get_full_resid_decomposition(
            layer=layer, expand_neurons=expand_neurons, return_labels=True
        )
    assert labels[-1] == "bias" and isinstance(parts, Tensor)
    assert parts[-1].abs().max() > 0.1
    assert_close(parts.sum(0), cache["resid_pre", 1] if layer == 1 else cache["resid_post", 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [-1, 3])
def test_biases_before_a_layer_that_is_none_are_refused(layer: int) -> None:
    with pytest.raises(UserError, match=rf"layer: the model has no layer {layer}; give 0 to 2"):
        random_model().accumulated_bias(layer)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_accumulated_biases_have_the_models_dtype(dtype: str) -> None:
    for model in (random_model(dtype=dtype), with_biases(random_model(dtype=dtype))):
        total = model.accumulated_bias(2)
        assert total.dtype == getattr(torch, dtype) and total.shape == (16,)


# ---- directions


@pytest.mark.parametrize("norm", ["RMS", "LN", None])
def test_directions_of_one_token_of_several_and_of_batches_read_their_logits(norm: str | None) -> None:
    model, tokens = random_model(normalization_type=norm), random_tokens()
    single = model.tokens_to_residual_directions(3)
    assert single.shape == (16,)
    for same in (torch.tensor(3), torch.tensor([3]), torch.tensor([[3]])):
        assert torch.equal(model.tokens_to_residual_directions(same), single)
    assert torch.equal(
        model.tokens_to_residual_directions(tokens)[1, 2], model.tokens_to_residual_directions(tokens[1, 2])
    )
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        read = cache["ln_final.hook_normalized"] if norm else cache["resid_post", 1]
        bias = model.get_parameter("ln_final.b") @ model.W_U[:, 3] if norm == "LN" else 0
        close(read @ single + bias, logits[..., 3])
