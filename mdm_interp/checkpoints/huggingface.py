"""What the formats with Hugging Face's names share: Llama, Qwen2 and Dream.

Source: transformers, `models/llama` and `models/qwen2`; config.json in the spelling of version 4 (`rope_theta`,
`rope_scaling`) and of version 5 (`rope_parameters`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mdm_interp.checkpoints.format import Format
from mdm_interp.config import ModelConfig

TENSORS = {
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

LLAMA_LIKE = {
    "position": "rope",
    "rotary_adjacent_pairs": False,
    "gated_mlp": True,
    "act_fn": "silu",
    "normalization_type": "RMS",
}
"""What Llama, Qwen2, Dream and LLaDA have in common: ModelConfig fields."""

CONVERTIBLE = ("attention", "readout_shift", "mask_token_id")
"""What the class of a causal model does not say of one that was converted to masked diffusion."""


class HuggingFaceFormat(Format):
    fields: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_key_value_heads": "num_key_value_heads",
        "d_mlp": "intermediate_size",
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "eps": "rms_norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    optional: ClassVar[dict[str, str]] = {"d_head": "head_dim", "initializer_range": "initializer_range"}
    required: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}
    tensors: ClassVar[dict[str, str]] = TENSORS
    derived: ClassVar[dict[str, str]] = {"rotary_base": "rope_theta"}
    read: ClassVar[tuple[str, ...]] = ("is_causal", "layer_types")

    def says(self, config: Mapping[str, Any], field: str) -> bool:
        nested = (config.get(name) for name in ("rope_parameters", "rope_scaling"))
        return any(isinstance(rope, Mapping) and field in rope for rope in nested)

    def read_rest(self, config: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        given = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
        for field in ("rope_parameters", "rope_scaling"):
            if isinstance(config.get(field), Mapping) and "rope_theta" in config[field]:
                given[f"{field}.rope_theta"] = config[field]["rope_theta"]
        thetas = list(given.values())
        if not thetas:
            problems.append("rope_theta is missing (at top level or in rope_parameters)")
        elif any(theta != thetas[0] for theta in thetas):
            problems.append(" but ".join(f"{name} is {theta!r}" for name, theta in given.items()))
        else:
            values["rotary_base"] = thetas[0]
        layer_types = config.get("layer_types")
        if layer_types is not None and (not isinstance(layer_types, list) or {*layer_types} - {"full_attention"}):
            problems.append(f"layer_types is {config['layer_types']!r:.80}, and only 'full_attention' is supported")
        causal = values["attention"] == "causal"
        if not self.convertible and config.get("is_causal", causal) is not causal:
            problems.append(f"is_causal is {config['is_causal']!r}, and only {causal} is supported")

    def write_rest(self, cfg: ModelConfig, config: dict[str, Any], problems: list[str]) -> None:
        config |= {"rope_theta": cfg.rotary_base, "rope_scaling": None, "use_cache": True, "attention_dropout": 0.0}
