"""Bridges and Hugging Face models of our models' weights, and what both are asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import boot
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.models.transformer import HookedTransformer

SHAPE: dict[str, Any] = {"d_mlp": 24, "n_layers": 2, "n_key_value_heads": 2, "d_model": 32}


def padded(side: str, lengths: list[int], n_pos: int = 7) -> Tensor:
    """`[batch pos]`, True where a token is real."""
    real = torch.arange(n_pos) < torch.tensor(lengths)[:, None]
    return real if side == "right" else real.flip(1)


def mirrored_pairs(causal: bool, count: int = 4) -> list[QueryPair]:
    """Random contexts in which an answer and its source swap sides; a causal model's share the fact only."""
    generator, pairs = torch.Generator().manual_seed(5), []
    for fact in range(count):
        tokens = torch.randint(1, 12, (6,), generator=generator).tolist()

        def ask(answer_at: int, source_at: int, answer: int, tokens: list[int] = tokens) -> Query:
            asked = list(tokens)
            asked[answer_at], asked[source_at] = 0, tokens[1] + tokens[4] - answer
            return Query(tuple(asked), (answer,), (answer_at, answer_at + 1), (source_at, source_at + 1))

        forward, reverse = ask(4, 1, tokens[4]), ask(1, 4, tokens[4])
        if causal:
            reverse = ask(4, 1, tokens[1])
        pairs.append(QueryPair(forward, reverse, fact, "right"))
    return pairs


# ---- weights


@torch.no_grad()
def with_biases(model: HookedTransformer, seed: int = 8) -> HookedTransformer:
    """The model with every bias that weights can have, none of them 0."""
    model.add_biases()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1].startswith("b_"):
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


# What others call our parameters; `*` stands for the layer.
NATIVE_NAMES = {
    "embed.W_E": "tok_embed.weight",
    "pos_embed.W_pos": "pos.weight",
    "blocks.*.ln1.w": "layers.*.ln1.weight",
    "blocks.*.ln1.b": "layers.*.ln1.bias",
    "blocks.*.attn.W_Q": "layers.*.attn.q.weight",
    "blocks.*.attn.W_K": "layers.*.attn.k.weight",
    "blocks.*.attn.W_V": "layers.*.attn.v.weight",
    "blocks.*.attn.b_Q": "layers.*.attn.q.bias",
    "blocks.*.attn.b_K": "layers.*.attn.k.bias",
    "blocks.*.attn.b_V": "layers.*.attn.v.bias",
    "blocks.*.attn.W_O": "layers.*.attn.o.weight",
    "blocks.*.ln2.w": "layers.*.ln2.weight",
    "blocks.*.ln2.b": "layers.*.ln2.bias",
    "blocks.*.mlp.W_in": "layers.*.mlp.fc_in.weight",
    "blocks.*.mlp.W_out": "layers.*.mlp.fc_out.weight",
    "ln_final.w": "ln_out.weight",
    "ln_final.b": "ln_out.bias",
    "unembed.W_U": "head.weight",
}
NATIVE_GATED_NAMES = NATIVE_NAMES | {
    "blocks.*.mlp.W_gate": "layers.*.mlp.gate.weight",
    "blocks.*.mlp.W_in": "layers.*.mlp.in.weight",
    "blocks.*.mlp.W_out": "layers.*.mlp.out.weight",
}
HUGGING_FACE_NAMES = {
    "embed.W_E": "model.embed_tokens.weight",
    "blocks.*.ln1.w": "model.layers.*.input_layernorm.weight",
    "blocks.*.attn.W_Q": "model.layers.*.self_attn.q_proj.weight",
    "blocks.*.attn.W_K": "model.layers.*.self_attn.k_proj.weight",
    "blocks.*.attn.W_V": "model.layers.*.self_attn.v_proj.weight",
    "blocks.*.attn.b_Q": "model.layers.*.self_attn.q_proj.bias",
    "blocks.*.attn.b_K": "model.layers.*.self_attn.k_proj.bias",
    "blocks.*.attn.b_V": "model.layers.*.self_attn.v_proj.bias",
    "blocks.*.attn.W_O": "model.layers.*.self_attn.o_proj.weight",
    "blocks.*.ln2.w": "model.layers.*.post_attention_layernorm.weight",
    "blocks.*.mlp.W_gate": "model.layers.*.mlp.gate_proj.weight",
    "blocks.*.mlp.W_in": "model.layers.*.mlp.up_proj.weight",
    "blocks.*.mlp.W_out": "model.layers.*.mlp.down_proj.weight",
    "ln_final.w": "model.norm.weight",
    "unembed.W_U": "lm_head.weight",
}


def linear_layout(name: str, weight: Tensor) -> Tensor:
    """A parameter of ours as torch.nn.Linear keeps it, `[output input]`."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("W_Q", "W_K", "W_V"):
        return rearrange(weight, "head d_model d_head -> (head d_head) d_model")
    if leaf == "W_O":
        return rearrange(weight, "head d_head d_model -> d_model (head d_head)")
    if leaf in ("b_Q", "b_K", "b_V"):
        return weight.flatten()
    return weight.T if leaf in ("W_in", "W_out", "W_gate", "W_U") else weight


@torch.no_grad()
def copy_weights(model: HookedTransformer, peer: nn.Module, names: dict[str, str]) -> None:
    """Set every parameter of `peer` to ours, and to zero where we have none."""
    theirs = {name.replace("_original_component.", ""): parameter for name, parameter in peer.named_parameters()}
    for parameter in theirs.values():
        parameter.zero_()
    for name, weight in model.named_parameters():
        layer = re.search(r"\d+", name)
        pattern = re.sub(r"\d+", "*", name, count=1) if name.startswith("blocks") else name
        target = theirs[names[pattern].replace("*", layer[0] if layer else "")]
        converted = linear_layout(name, weight)
        assert target.shape == converted.shape, name
        target.copy_(converted)


# ---- peers


def native_peer(model: HookedTransformer) -> TransformerBridge:
    cfg = model.cfg
    peer = boot(  # what TransformerLens attaches as TransformerBridge.boot_native
        TransformerBridgeConfig(
            d_model=cfg.d_model,
            d_head=cfg.head_dim,
            n_heads=cfg.n_heads,
            n_key_value_heads=cfg.kv_heads,
            n_layers=cfg.n_layers,
            n_ctx=cfg.n_ctx,
            d_vocab=cfg.d_vocab,
            d_mlp=cfg.d_mlp,
            act_fn=cfg.act_fn,
            gated_mlp=cfg.gated_mlp,
            attn_only=cfg.attn_only,
            normalization_type=cfg.normalization_type,
            eps=cfg.eps,
            positional_embedding_type="rotary" if cfg.position == "rope" else "standard",
            rotary_dim=cfg.rotary_dim,
            rotary_base=int(cfg.rotary_base),
            attention_dir=cfg.attention,
        )
    )
    copy_weights(model, peer, NATIVE_GATED_NAMES if cfg.gated_mlp else NATIVE_NAMES)
    return peer


def hugging_face_peer(model: HookedTransformer, family: str = "llama", **settings: Any) -> Any:
    """A Llama or Qwen2 of the model's shape, with weights of its own (`copy_weights` gives it the model's).

    Args:
        settings: More fields of its config.
    """
    cfg = model.cfg
    families: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }
    config_class, model_class = families[family]
    config = config_class(
        vocab_size=cfg.d_vocab,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_mlp or 0,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.kv_heads,
        max_position_embeddings=cfg.n_ctx,
        rms_norm_eps=cfg.eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rotary_base},
        tie_word_embeddings=cfg.tie_word_embeddings,
        **settings,
    )
    return model_class(config).eval()


def llama_bridge(model: HookedTransformer, folder: Path) -> TransformerBridge:
    """A Llama of the model's weights, saved as Hugging Face saves it and booted from there."""
    peer = hugging_face_peer(model)
    copy_weights(model, peer, HUGGING_FACE_NAMES)
    return boot_from(folder, peer)


def boot_from(folder: Path, peer: PreTrainedModel) -> TransformerBridge:
    """A bridge booted from a folder that a Hugging Face model was saved to, with a tokenizer of 13 words."""
    peer.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(13)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")
