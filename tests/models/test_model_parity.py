"""The model against implementations of others: TransformerLens' native bridge, Hugging Face's Llama and Qwen2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_model, random_tokens, tiny_config
from model_helpers import HUGGING_FACE_NAMES, copy_weights, hugging_face_peer, native_peer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding

from mdm_interp.models.transformer import HookedTransformer

# ---- TransformerLens' native bridge


def assert_same_logits(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert theirs.std() > 0.3  # logits near zero would agree whatever the model did
    assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("norm", ["RMS", "LN"])
@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mlp", [{}, {"d_mlp": 24}, {"d_mlp": 24, "gated_mlp": True, "act_fn": "silu"}])
def test_logits_equal_the_native_bridge(
    attention: str, norm: str, position: str, kv_heads: int, mlp: dict[str, Any]
) -> None:
    model = random_model(
        attention=attention,
        normalization_type=norm,
        position=position,
        rotary_adjacent_pairs=True,
        n_key_value_heads=kv_heads,
        **mlp,
    )
    tokens = random_tokens()
    with torch.no_grad():
        assert_same_logits(model(tokens), native_peer(model)(tokens), 1e-5)


@pytest.mark.parametrize("act_fn", ["relu", "gelu", "gelu_new", "silu"])
def test_activations_biases_and_partial_rotary_equal_the_native_bridge(act_fn: str) -> None:
    model = random_model(d_mlp=24, act_fn=act_fn, qkv_bias=True, d_head=8, rotary_dim=4, rotary_adjacent_pairs=True)
    tokens = random_tokens()
    with torch.no_grad():
        assert_same_logits(model(tokens), native_peer(model)(tokens), 1e-5)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_logits_equal_the_native_bridge_where_tokens_are_real(attention: str, position: str, side: str) -> None:
    model = random_model(attention=attention, position=position, rotary_adjacent_pairs=True, d_mlp=24)
    tokens = random_tokens(batch=3)
    real = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    real = real if side == "right" else real.flip(1)
    with torch.no_grad():
        positions = (real.cumsum(1) - 1).clamp(min=0)  # from the first real token on, as ours
        theirs = native_peer(model)(tokens, attention_mask=real.long(), position_ids=positions)
        assert_same_logits(model(tokens, attention_mask=real)[real], theirs[real], 1e-5)


def test_parity_notices_the_other_pairing_of_dimensions() -> None:
    model, tokens = random_model(rotary_adjacent_pairs=False), random_tokens()
    with torch.no_grad():
        assert (model(tokens) - native_peer(model)(tokens)).abs().max() > 1e-2


# ---- Hugging Face


class DoubleRotary(nn.Module):
    """Cosines and sines of Hugging Face's layout, in float64 throughout."""

    def __init__(self, d_head: int, base: float) -> None:
        super().__init__()
        self.d_head, self.base = d_head, base

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rates = self.base ** -(torch.arange(0, self.d_head, 2).double() / self.d_head)
        angle = (position_ids[..., None].double() * rates).repeat(1, 1, 2)
        return angle.cos(), angle.sin()


def make_double(peer: nn.Module, base: float) -> None:
    """Hugging Face's norm and rotary embedding compute in float32 even in a float64 model, which would drown a
    difference below 1e-7. Put float64 versions in the place of these two; all else stays theirs."""
    peer.double()
    for name, module in list(peer.named_modules()):
        parent = peer.get_submodule(name.rpartition(".")[0])
        if isinstance(module, (LlamaRMSNorm, Qwen2RMSNorm)):
            double = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon, dtype=torch.float64)
            double.weight = module.weight
            setattr(parent, name.rpartition(".")[2], double)
        elif isinstance(module, (LlamaRotaryEmbedding, Qwen2RotaryEmbedding)):
            config = module.config
            setattr(
                parent, name.rpartition(".")[2], DoubleRotary(config.hidden_size // config.num_attention_heads, base)
            )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize(("kv_heads", "tied", "base"), [(4, False, 1e4), (2, True, 5e5), (1, False, 5e5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_logits_equal_hugging_face(
    family: str, attention: str, kv_heads: int, tied: bool, base: float, dtype: str, tolerance: float
) -> None:
    model = random_model(
        attention=attention,
        n_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rotary_base=base,
        qkv_bias=family == "qwen2",
        d_mlp=24,
        gated_mlp=True,
        act_fn="silu",
        eps=1e-6,
        dtype=dtype,
    )
    peer = hugging_face_peer(model, family, attn_implementation="sdpa")
    if dtype == "float64":
        make_double(peer, base)
    copy_weights(model, peer, HUGGING_FACE_NAMES)
    tokens = random_tokens(pos=12)
    # Both are causal by nature; a 4-D mask that hides nothing is taken as it is and makes them bidirectional.
    mask = torch.zeros(2, 1, 12, 12, dtype=model.W_E.dtype) if attention == "bidirectional" else None
    with torch.no_grad():
        theirs = peer(input_ids=tokens, attention_mask=mask).logits
        assert theirs.dtype == model.W_E.dtype
        assert_same_logits(model(tokens), theirs, tolerance)


def test_grouped_query_heads_read_their_own_key_value_head() -> None:
    """A grouped model equals an ungrouped one whose key and value weights are repeated, head by head."""
    grouped = random_model(n_key_value_heads=2, d_mlp=24)
    full = HookedTransformer(tiny_config(d_mlp=24))
    weights = grouped.state_dict()
    for layer in range(grouped.cfg.n_layers):
        for name in ("W_K", "W_V"):
            first, second = weights[f"blocks.{layer}.attn.{name}"]
            weights[f"blocks.{layer}.attn.{name}"] = torch.stack([first, first, second, second])
    full.load_state_dict(weights)
    tokens = random_tokens()
    with torch.no_grad():
        assert_close(grouped(tokens), full(tokens), atol=1e-5, rtol=1e-5)
