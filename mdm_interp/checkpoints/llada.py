"""LLaDA (`LLaDAModelLM`, arXiv 2502.09992): a Llama whose attention is bidirectional, under OLMo's names.

The gate of an MLP is `ff_proj`, its way down the block's own `ff_out`; the unembedding is the top-level `ff_out`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mdm_interp.checkpoints.format import Format
from mdm_interp.checkpoints.huggingface import LLAMA_LIKE
from mdm_interp.config import ModelConfig

BLOCK = "model.transformer.blocks.*"


class LLaDA(Format):
    name = "llada"
    architecture = "LLaDAModelLM"
    model_type = "llada"
    fixed: ClassVar[dict[str, Any]] = LLAMA_LIKE | {"attention": "bidirectional", "readout_shift": 0, "qkv_bias": False}
    fields: ClassVar[dict[str, str]] = {
        "d_model": "d_model",
        "n_layers": "n_layers",
        "n_heads": "n_heads",
        "n_ctx": "max_sequence_length",
        "rotary_base": "rope_theta",
        "eps": "rms_norm_eps",
        "tie_word_embeddings": "weight_tying",
        "mask_token_id": "mask_token_id",
    }
    optional: ClassVar[dict[str, str]] = {"initializer_range": "init_std"}
    required: ClassVar[dict[str, Any]] = {
        "rope": True,
        "layer_norm_type": "rms",
        "block_type": "llama",
        "block_group_size": 1,
        "activation_type": "silu",
        "include_bias": False,
        "include_qkv_bias": False,
    }
    supported: ClassVar[dict[str, Any]] = {
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "clip_qkv": None,
        "input_emb_norm": False,
        "layer_norm_with_affine": True,
        "scale_logits": False,
    }
    tensors: ClassVar[dict[str, str]] = {
        "embed.W_E": "model.transformer.wte.weight",
        "blocks.*.ln1.w": f"{BLOCK}.attn_norm.weight",
        "blocks.*.attn.W_Q": f"{BLOCK}.q_proj.weight",
        "blocks.*.attn.W_K": f"{BLOCK}.k_proj.weight",
        "blocks.*.attn.W_V": f"{BLOCK}.v_proj.weight",
        "blocks.*.attn.W_O": f"{BLOCK}.attn_out.weight",
        "blocks.*.ln2.w": f"{BLOCK}.ff_norm.weight",
        "blocks.*.mlp.W_gate": f"{BLOCK}.ff_proj.weight",
        "blocks.*.mlp.W_in": f"{BLOCK}.up_proj.weight",
        "blocks.*.mlp.W_out": f"{BLOCK}.ff_out.weight",
        "ln_final.w": "model.transformer.ln_f.weight",
        "unembed.W_U": "model.transformer.ff_out.weight",
    }
    derived: ClassVar[dict[str, str]] = {
        "n_key_value_heads": "n_kv_heads",
        "d_mlp": "mlp_hidden_size",
        "d_vocab": "embedding_size",
    }
    read: ClassVar[tuple[str, ...]] = ("mlp_ratio", "vocab_size", "multi_query_attention")
    mask_token = "<|mdm_mask|>"

    def read_rest(
        self, config: Mapping[str, Any], values: dict[str, Any], asked: Mapping[str, Any], problems: list[str]
    ) -> None:
        """Read three fields that may be null and then follow from others: that is the format's definition, not a
        default."""
        otherwise: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "n_key_value_heads": _kv_heads,
            "d_mlp": lambda config: _number(config["mlp_ratio"]) * _number(config["d_model"]),
            "d_vocab": lambda config: config["vocab_size"],
        }
        for ours, theirs in self.derived.items():
            if theirs not in config:
                problems.append(f"{theirs} is missing")
                continue
            try:
                values[ours] = otherwise[ours](config) if config[theirs] is None else config[theirs]
            except (KeyError, TypeError, OverflowError) as error:
                problems.append(f"{theirs} is null, and what it follows from is not given ({error})")
        rows, vocab = values.get("d_vocab"), config.get("vocab_size")
        if type(vocab) is not int:
            problems.append(
                "vocab_size is missing" if vocab is None else f"vocab_size is {vocab!r:.80}, not a whole number"
            )
        elif isinstance(rows, int) and rows < vocab:
            problems.append(f"embedding_size {rows} is below vocab_size {vocab}")
        grouped = config.get("multi_query_attention")
        if grouped is not None and config.get("n_kv_heads") not in (None, _kv_heads(config)):
            problems.append(
                f"n_kv_heads {config['n_kv_heads']!r:.40} contradicts multi_query_attention {grouped!r:.40}"
            )

    def write_rest(self, cfg: ModelConfig, config: dict[str, Any], problems: list[str]) -> None:
        if cfg.head_dim * cfg.n_heads != cfg.d_model:
            problems.append(f"d_head is {cfg.head_dim}, not d_model / n_heads")
        config |= {"n_kv_heads": cfg.kv_heads, "multi_query_attention": None, "mlp_hidden_size": cfg.d_mlp}
        config |= {"vocab_size": cfg.d_vocab, "embedding_size": cfg.d_vocab, "rope_full_precision": True}
        if cfg.rotary_scaling is not None:
            problems.append("rotary_scaling is set")
        if cfg.d_mlp is None:
            problems.append("d_mlp is not set")


def _number(value: Any) -> int | float:
    """Refuse what times a number is no number: a text would be as often repeated."""
    if type(value) not in (int, float):
        raise TypeError(f"{value!r:.40} is no number")
    return value


def _kv_heads(config: Mapping[str, Any]) -> Any:
    """Return how many key/value heads there are where `n_kv_heads` is null."""
    return 1 if config.get("multi_query_attention") else config.get("n_heads")
