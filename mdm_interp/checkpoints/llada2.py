"""LLaDA2 (`LLaDA2MoeModelLM`): a mixture of experts that attends within blocks and to all before them.

Queries, keys and values lie in one tensor, in this order; each expert has tensors of its own. Queries and keys are
normalised, half of each head rotates, and the first layers have an MLP in place of experts.

Source: `modeling_llada2_moe` and `configuration_llada2_moe` beside the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mdm_interp.checkpoints.huggingface import LLAMA_LIKE, DiffusionFormat
from mdm_interp.config import Experts, ModelConfig
from mdm_interp.errors import UserError

BLOCK = "model.layers.*"
FUSED = ("W_Q", "W_K", "W_V")
OF_EXPERTS = {"W_gate": "gate_proj", "W_in": "up_proj", "W_out": "down_proj"}
EXPERTS = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "d_expert": "moe_intermediate_size",
    "n_shared": "num_shared_experts",
    "n_groups": "n_group",
    "topk_groups": "topk_group",
    "n_dense_layers": "first_k_dense_replace",
    "routed_scale": "routed_scaling_factor",
}
"""Fields of `Experts`, and what config.json calls them."""


class LLaDA2(DiffusionFormat):
    name = "llada2_moe"
    architecture = "LLaDA2MoeModelLM"
    model_type = "llada2_moe"
    fixed: ClassVar[dict[str, Any]] = {
        **LLAMA_LIKE,
        "attention": "block_causal",
        "readout_shift": 0,
        "qkv_bias": False,
        "use_qk_norm": True,
    }
    supported: ClassVar[dict[str, Any]] = {
        "use_qk_norm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_sliding_window": False,
        "score_function": "sigmoid",
        "norm_topk_prob": True,
        "moe_router_enable_expert_bias": True,
    }
    documented: ClassVar[dict[str, Any]] = {"block_size": 32}
    read: ClassVar[tuple[str, ...]] = (
        *DiffusionFormat.read,
        *EXPERTS.values(),
        *(
            "partial_rotary_factor",
            "rotary_dim",
            "router_dtype",
            "sliding_window",
            "moe_shared_expert_intermediate_size",
        ),
    )
    mask_token = "<|mask|>"
    tensors: ClassVar[dict[str, str]] = {
        "embed.W_E": "model.word_embeddings.weight",
        "blocks.*.ln1.w": f"{BLOCK}.input_layernorm.weight",
        **{f"blocks.*.attn.{name}": f"{BLOCK}.attention.query_key_value.weight" for name in FUSED},
        "blocks.*.attn.q_norm.w": f"{BLOCK}.attention.query_layernorm.weight",
        "blocks.*.attn.k_norm.w": f"{BLOCK}.attention.key_layernorm.weight",
        "blocks.*.attn.W_O": f"{BLOCK}.attention.dense.weight",
        "blocks.*.ln2.w": f"{BLOCK}.post_attention_layernorm.weight",
        **{f"blocks.*.mlp.{ours}": f"{BLOCK}.mlp.{theirs}.weight" for ours, theirs in OF_EXPERTS.items()},
        **{
            f"blocks.*.mlp.shared.{ours}": f"{BLOCK}.mlp.shared_experts.{theirs}.weight"
            for ours, theirs in OF_EXPERTS.items()
        },
        "blocks.*.mlp.W_router": f"{BLOCK}.mlp.gate.weight",
        "blocks.*.mlp.expert_bias": f"{BLOCK}.mlp.gate.expert_bias",
        "ln_final.w": "model.norm.weight",
        "unembed.W_U": "lm_head.weight",
    }

    def read_rest(
        self, config: Mapping[str, Any], values: dict[str, Any], asked: Mapping[str, Any], problems: list[str]
    ) -> None:
        super().read_rest(config, values, asked, problems)
        if missing := [theirs for theirs in EXPERTS.values() if config.get(theirs) is None]:
            problems += [f"{theirs} is missing" for theirs in missing]
        else:
            values["experts"] = {ours: config[theirs] for ours, theirs in EXPERTS.items()}
        share, d_head = config.get("partial_rotary_factor"), values.get("d_head")
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            problems.append(f"partial_rotary_factor is {share!r:.40}, not a number between 0 and 1")
        elif isinstance(d_head, int) and d_head <= 2**20:  # a larger one is refused as what it is
            values["rotary_dim"] = int(d_head * share)
            if config.get("rotary_dim") not in (None, values["rotary_dim"]):
                problems.append(f"rotary_dim is {config['rotary_dim']!r:.40}, not head_dim times {share}")

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        raise UserError("format: 'llada2_moe' is only read; use 'mdm_interp'")

    def tensor_names(self, parameter: str, cfg: ModelConfig) -> list[str]:
        if (of := _expert_weight(parameter, cfg)) is None:
            return super().tensor_names(parameter, cfg)
        layer, leaf, experts = of
        named = "model.layers.{}.mlp.experts.{}.{}.weight"
        return [named.format(layer, expert, OF_EXPERTS[leaf]) for expert in range(experts.num_experts)]

    def part(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        leaf = parameter.rsplit(".", 1)[-1]
        if leaf not in FUSED:
            return tensor
        sizes = [heads * cfg.head_dim for heads in (cfg.n_heads, cfg.kv_heads, cfg.kv_heads)]
        return tensor.split(sizes)[FUSED.index(leaf)]

    def to_stored(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        return tensor.mT if _is_flipped(parameter, cfg) else super().to_stored(parameter, tensor, cfg)

    def from_stored(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        return tensor.mT if _is_flipped(parameter, cfg) else super().from_stored(parameter, tensor, cfg)


def _is_flipped(parameter: str, cfg: ModelConfig) -> bool:
    return parameter.endswith("W_router") or _expert_weight(parameter, cfg) is not None


def _expert_weight(parameter: str, cfg: ModelConfig) -> tuple[int, str, Experts] | None:
    """Return layer and name of a weight that all experts of a layer have, and what they are; None of another."""
    path, _, leaf = parameter.rpartition(".")
    if cfg.experts is None or leaf not in OF_EXPERTS or not path.endswith(".mlp"):
        return None
    layer = int(path.split(".")[1])
    return None if layer < cfg.experts.n_dense_layers else (layer, leaf, cfg.experts)
