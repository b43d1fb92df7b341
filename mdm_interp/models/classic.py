"""Configs of TransformerLens' classic `HookedTransformer`, read as ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from mdm_interp.config import ModelConfig, one_line
from mdm_interp.errors import UserError

POSITIONS = {
    "standard": "learned",
    "rotary": "rope",
    "alibi": "alibi",
    "relative_positional_bias": "t5_bias",
    "none": "none",
}
"""TransformerLens' names of position schemes, and ours."""

NORMS = {"LN": "LN", "LNPre": "LN", "RMS": "RMS", "RMSPre": "RMS", None: None}
"""Norms; those whose gain and bias were folded into the weights are the same with gain 1 and bias 0."""

ACTIVATIONS = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}
"""Other names of the tanh approximation of GELU."""

OWN = {"attention", "block_size", "experts", "position", "qkv_bias", "readout_shift", "rotary_scaling"}
SAME = ModelConfig.model_fields.keys() - OWN
"""Fields of ours that the classic config has by the same name, or could."""

VARIANTS: dict[str, Any] = {
    "use_attn_scale": True,
    "attn_scores_soft_cap": -1.0,
    "output_logits_soft_cap": -1.0,
    "rotary_scaling_factor": 1.0,
    "init_mode": "gpt2",
    "n_devices": 1,
    **dict.fromkeys(("rotary_base_local", "clip_qkv", "num_experts", "quantization_method")),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "use_local_attn", "use_logn_attn"), False),
    **dict.fromkeys(("use_attention_sinks", "ungroup_grouped_query_attention", "use_dynamic_ntk_rope"), False),
    **dict.fromkeys(("use_NTK_by_parts_rope", "use_yarn_rope", "parallel_attn_mlp", "post_embedding_ln"), False),
    **dict.fromkeys(("use_normalization_before_and_after", "use_hook_tokens", "load_in_4bit"), False),
}
"""Fields of variants that are not implemented here, and what they are set to where the model is not one."""

NOTED = {
    *("model_name", "original_architecture", "from_checkpoint", "checkpoint_index", "checkpoint_label_type"),
    *("checkpoint_value", "tokenizer_name", "tokenizer_prepends_bos", "trust_remote_code", "decoder_start_token_id"),
    *("n_params", "init_weights", "layer_norm_folding", "uses_rms_norm", "train_seq_length", "window_size"),
    *("attn_types", "experts_per_token", "norm_topk_prob", "NTK_by_parts_low_freq_factor", "NTK_by_parts_factor"),
    *("NTK_by_parts_high_freq_factor", "NTK_original_ctx_len", "yarn_factor", "yarn_attention_factor"),
    *("yarn_beta_fast", "yarn_beta_slow", "yarn_original_max_position_embeddings", "yarn_truncate"),
    "yarn_global_attn_only",
}
"""Fields that say where a model comes from, or are read only if one of the variants is on."""

READ = {"positional_embedding_type", "attention_dir", "attn_only", "seed", "attn_scale", "final_rms"}
"""Fields that are read by rules of their own."""

_TABLES = re.compile(r"\.attn\.(mask|IGNORE|rotary_sin|rotary_cos)$")
_GROUPED = re.compile(r"(?<=\.attn\.)_(?=[Wb]_[KV]$)")


class ClassicConfig(NamedTuple):
    """What a classic config says."""

    model: ModelConfig
    seed: int | None = None
    """Draws the initial weights."""
    biases: bool = False
    """Whether every weight has a bias."""


def read_classic_config(config: Mapping[str, Any] | Any, tokenizer: Any = None) -> ClassicConfig:
    """Read a `HookedTransformerConfig`, or a dict of its fields, with the classic defaults: learned positions, causal
    attention, LayerNorm, biases everywhere, an MLP of 4 d_model unless `attn_only`.

    Args:
        tokenizer: Gives `d_vocab` where the config leaves it out.

    Raises:
        UserError: a field is missing or not valid, or asks for what is not implemented here.
    """
    values = _fields(config)
    _require_plain(values)
    fields = {name: value for name, value in values.items() if name in SAME and value is not None and value != -1}
    scheme, norm = values.get("positional_embedding_type", "standard"), values.get("normalization_type", "LN")
    for name, value, known in (("positional_embedding_type", scheme, POSITIONS), ("normalization_type", norm, NORMS)):
        if value not in known:
            raise UserError(f"{name}: {value!r} is not known here; use one of {', '.join(map(str, known))}")
    fields |= {
        "position": POSITIONS[scheme],
        "attention": values.get("attention_dir", "causal"),
        "normalization_type": NORMS[norm],
        "qkv_bias": True,
        "device": str(fields.get("device", "cpu")),
        "default_prepend_bos": values.get("default_prepend_bos", True),
    }
    if POSITIONS[scheme] != "rope":
        fields = {name: value for name, value in fields.items() if not name.startswith("rotary")}
    if "n_heads" not in fields and {"d_model", "d_head"} <= fields.keys():
        fields["n_heads"] = fields["d_model"] // fields["d_head"]
    if "d_vocab" not in fields and tokenizer is not None:
        fields["d_vocab"] = max(tokenizer.get_vocab().values()) + 1
    if values.get("attn_only"):
        fields.pop("d_mlp", None)
    elif "d_model" in fields:
        fields.setdefault("d_mlp", 4 * fields["d_model"])
        if "act_fn" not in fields:
            raise UserError("act_fn: missing; add it, or set attn_only")
    if "act_fn" in fields:
        fields["act_fn"] = ACTIVATIONS.get(fields["act_fn"], fields["act_fn"])
    try:
        model = ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"cfg: {one_line(error)}") from error
    _require_same_maths(values, model)
    return ClassicConfig(model, values.get("seed"), biases=True)


def _fields(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if dataclasses.is_dataclass(config):
        return vars(config).copy()
    raise UserError(
        f"cfg: {type(config).__name__} is no config; give a ModelConfig, a HookedTransformerConfig or a dict of "
        "its fields"
    )


def _require_plain(values: Mapping[str, Any]) -> None:
    """Refuse unknown fields, and variants that are not implemented here."""
    for name, value in values.items():
        if name in VARIANTS and value is not None and value != VARIANTS[name]:
            raise UserError(f"{name}: {value!r} is not implemented here; leave it out, or set it to {VARIANTS[name]!r}")
        if name not in SAME | NOTED | READ | VARIANTS.keys():
            raise UserError(f"{name}: no such field of a classic config; remove it or correct its spelling")


def _require_same_maths(values: Mapping[str, Any], model: ModelConfig) -> None:
    """Refuse values by which the classic model would compute something else."""
    scale, final_rms = values.get("attn_scale", -1), values.get("final_rms", False)
    if scale not in (-1, None) and abs(scale - model.head_dim**0.5) > 1e-6:
        raise UserError(
            f"attn_scale: scores are divided by sqrt(d_head) {model.head_dim**0.5:.6g} here, not by {scale}; leave it "
            "out"
        )
    if final_rms and model.normalization_type != "RMS":
        raise UserError("final_rms: all norms are of one kind here; leave it out, or set normalization_type to 'RMS'")


def read_classic_weights(state_dict: Mapping[str, Tensor], *, relative: bool, gated: bool) -> dict[str, Tensor]:
    """Return a state dict under our names: without the classic model's masks and rotary tables, and with keys and
    values of grouped heads by the names of all others.

    A classic gated MLP adds `b_in` after the gate, ours before it; what it adds to the residual stream is in `b_out`
    then.

    Args:
        relative: Whether the model has no position embedding, though the classic one holds one that it never reads.
        gated: Whether its MLPs have gates.
    """
    named = {_GROUPED.sub("", name): tensor for name, tensor in state_dict.items()}
    kept = {name: tensor for name, tensor in named.items() if not _TABLES.search(name)}
    if gated and len(kept) < len(named):  # only the classic model keeps tables
        for name in [name for name in kept if name.endswith(".mlp.b_in")]:
            mlp = name.removesuffix("b_in")
            kept[f"{mlp}b_out"] = kept[f"{mlp}b_out"] + kept[name] @ kept[f"{mlp}W_out"]
            kept[name] = torch.zeros_like(kept[name])
    return {name: tensor for name, tensor in kept.items() if not (relative and name == "pos_embed.W_pos")}
