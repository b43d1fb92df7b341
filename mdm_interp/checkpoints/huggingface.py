"""What the formats with Hugging Face's names share: Llama, Qwen2, Qwen3 and what grew from them.

Source: transformers, `models/llama`, `models/qwen2`, `models/qwen3` and `modeling_rope_utils`; config.json in the
spelling of version 4 (`rope_theta`, `rope_scaling`) and of version 5 (`rope_parameters`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationError

from mdm_interp.checkpoints.format import Format, is_plain
from mdm_interp.config import ModelConfig, RotaryScaling, one_line

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
    "blocks.*.attn.q_norm.w": "model.layers.*.self_attn.q_norm.weight",
    "blocks.*.attn.k_norm.w": "model.layers.*.self_attn.k_norm.weight",
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
    "use_qk_norm": False,
    "d_vocab_out": None,
}
"""What Llama, Qwen2, Dream and LLaDA have in common: ModelConfig fields."""

MDM = {"attention": "bidirectional", "readout_shift": 0}
UNSAID = ("attention", "block_size", "mask_token_id")
"""What an MDM's files may leave out, or leave to the code that samples from it."""
CONVERTIBLE = (*UNSAID, "readout_shift")
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
    read: ClassVar[tuple[str, ...]] = ("is_causal", "layer_types", "block_size")

    rope_keys: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": (
            *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    }
    """Kinds of scaled rotary embedding, and what config.json says of each."""

    def says(self, config: Mapping[str, Any], field: str) -> bool:
        nested = (config.get(name) for name in ("rope_parameters", "rope_scaling"))
        return any(isinstance(rope, Mapping) and field in rope for rope in nested)

    def read_rest(
        self, config: Mapping[str, Any], values: dict[str, Any], asked: Mapping[str, Any], problems: list[str]
    ) -> None:
        given = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
        for field in ("rope_parameters", "rope_scaling"):
            if isinstance(config.get(field), Mapping) and "rope_theta" in config[field]:
                given[f"{field}.rope_theta"] = config[field]["rope_theta"]
        thetas = list(given.values())
        if not thetas:
            problems.append("rope_theta is missing (at top level or in rope_parameters)")
        elif any(theta != thetas[0] for theta in thetas):
            problems.append(" but ".join(f"{name} is {theta!r:.80}" for name, theta in given.items()))
        else:
            values["rotary_base"] = thetas[0]
        layer_types = config.get("layer_types")
        if layer_types is not None and (
            not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
        ):
            problems.append(f"layer_types is {config['layer_types']!r:.80}, and only 'full_attention' is supported")
        causal = values["attention"] == "causal"
        if asked.get("attention") == "causal" and not self.convertible:
            problems.append("attention is to be 'causal', and the format's models are bidirectional")
        if not causal and config.get("mask_token_id") is not None:
            values.setdefault("mask_token_id", config["mask_token_id"])
        size = config.get("block_size")
        if values["attention"] == "block_causal":
            values["block_size"] = asked.get("block_size", size)
            if values["block_size"] is None:
                problems.append("block_size is missing, so give it (block_size=…, --block-size)")
        elif size is not None and "attention" not in asked:
            said = "attention='block_causal' or 'bidirectional'"
            problems.append(f"block_size is {size!r:.80}, so say whether attention is in blocks ({said}, --attention)")
        if not self.convertible and config.get("is_causal", causal) is not causal:
            problems.append(f"is_causal is {config['is_causal']!r:.80}, and only {causal} is supported")

    def read_rope(self, config: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        found = {}
        for field in ("rope_parameters", "rope_scaling"):
            if not is_plain(rope := config.get(field)):
                found[field] = self._read_scaling(field, rope, config, problems)
        scalings = [scaling for scaling in found.values() if scaling is not None]
        if any(scaling != scalings[0] for scaling in scalings):
            problems.append("rope_parameters and rope_scaling differ")
        elif scalings:
            values["rotary_scaling"] = scalings[0]

    def _read_scaling(
        self, field: str, rope: Any, config: Mapping[str, Any], problems: list[str]
    ) -> RotaryScaling | None:
        """Return what a field says of how rotary embedding is scaled, with the defaults of transformers."""
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        keys = self.rope_keys.get(kind) if isinstance(kind, str) else None
        unknown = [key for key in rope if key not in ("type", "rope_type", "rope_theta", *keys)] if keys else []
        if keys is None or unknown:
            reason = (
                f"{unknown[0]} in it is not known" if unknown else f"only {', '.join(self.rope_keys)} are supported"
            )
            problems.append(f"{field} is {rope!r:.120}, and {reason}")
            return None
        given = {key: rope[key] for key in keys if rope.get(key) is not None}
        if kind != "linear":
            given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
            if config.get("original_max_position_embeddings") is not None:  # comes first in transformers, too
                given["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        try:
            if kind == "yarn":
                scales = [
                    float(given.get("factor", 0)),
                    *(float(given.pop(name, 0)) for name in ("mscale", "mscale_all_dim")),
                ]
                given.setdefault("attention_factor", yarn_attention_factor(*scales))
                given = {"beta_fast": 32.0, "beta_slow": 1.0, **given}
            return RotaryScaling(rope_type=kind, **self.own_scaling(given))  # type: ignore[arg-type]
        except ValidationError as error:
            problems.append(f"{field}.{one_line(error)}")
        except (TypeError, ValueError, ArithmeticError) as error:
            problems.append(f"{field} is {rope!r:.120}, and not all that should be numbers are ({error})")
        return None

    def own_scaling(self, given: dict[str, Any]) -> dict[str, Any]:
        """Leave out what a format says beside what all do."""
        return given

    def write_rest(self, cfg: ModelConfig, config: dict[str, Any], problems: list[str]) -> None:
        scaling = cfg.rotary_scaling
        if scaling is not None:
            keys = ("rope_type", *self.rope_keys[scaling.rope_type])
            scaling = {key: value for key, value in scaling.model_dump().items() if key in keys}
        config |= {} if cfg.block_size is None else {"block_size": cfg.block_size}
        config |= {"rope_theta": cfg.rotary_base, "rope_scaling": scaling, "use_cache": True, "attention_dropout": 0.0}


class DiffusionFormat(HuggingFaceFormat):
    """What the formats of masked diffusion models share: config.json may say the mask, and others leave it out."""

    optional: ClassVar[dict[str, str]] = HuggingFaceFormat.optional | {"mask_token_id": "mask_token_id"}
    settable: ClassVar[tuple[str, ...]] = UNSAID


def yarn_attention_factor(factor: float, mscale: float = 0, mscale_all_dim: float = 0) -> float:
    """Compute what queries and keys are multiplied by where a config does not say: 1 + 0.1 log(factor), or the ratio of
    two such terms.

    Source: arXiv 2309.00071, eq. 22; transformers, `modeling_rope_utils`.
    """

    def term(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

    return term(mscale) / term(mscale_all_dim) if mscale and mscale_all_dim else term(1.0)
