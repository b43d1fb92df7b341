"""SMDM (arXiv 2410.18514): a TinyLlama whose attention is bidirectional, one safetensors file without a config.json.

Shapes say all but the number of heads; context, base and eps are TinyLlama's. Queries, keys and values lie in one
tensor, group by group: the queries that share a key, the key, the value. The mask is the last row of the embedding, and
is never predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mdm_interp.checkpoints.format import Format
from mdm_interp.checkpoints.huggingface import LLAMA_LIKE, MDM
from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError

BLOCK = "transformer.h.*"
FUSED = ("W_Q", "W_K", "W_V")


class SMDM(Format):
    name = "smdm"
    architecture = "SMDM"
    model_type = "smdm"
    fixed: ClassVar[dict[str, Any]] = {
        **{field: value for field, value in LLAMA_LIKE.items() if field != "d_vocab_out"},
        **MDM,
        "qkv_bias": False,
        "tie_word_embeddings": False,
    }
    fields: ClassVar[dict[str, str]] = {
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "n_key_value_heads": "n_query_groups",
        "d_mlp": "intermediate_size",
        "d_vocab": "padded_vocab_size",
        "d_vocab_out": "vocab_size",
        "n_ctx": "context_length",
        "eps": "norm_eps",
        "rotary_base": "rope_base",
        "mask_token_id": "mask_token_id",
    }
    tensors: ClassVar[dict[str, str]] = {
        "embed.W_E": "transformer.wte.weight",
        "blocks.*.ln1.w": f"{BLOCK}.norm_1.weight",
        **{f"blocks.*.attn.{name}": f"{BLOCK}.attn.attn.weight" for name in FUSED},
        "blocks.*.attn.W_O": f"{BLOCK}.attn.proj.weight",
        "blocks.*.ln2.w": f"{BLOCK}.norm_2.weight",
        "blocks.*.mlp.W_gate": f"{BLOCK}.mlp.swiglu.w1.weight",
        "blocks.*.mlp.W_in": f"{BLOCK}.mlp.swiglu.w2.weight",
        "blocks.*.mlp.W_out": f"{BLOCK}.mlp.swiglu.w3.weight",
        "ln_final.w": "transformer.ln_f.weight",
        "unembed.W_U": "lm_head.weight",
    }

    def complete(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        names = ("transformer.wte.weight", "lm_head.weight", *(self.tensor_name(f"blocks.0.{of}") for of in OF_LAYER))
        if missing := [name for name in names if len(shapes.get(name, ())) != 2 or 0 in shapes[name]]:
            raise UserError(f"{missing[0]} is missing, which a checkpoint of SMDM has; name another model_type")
        heads = config.get("n_head")
        if type(heads) is not int or heads < 1:
            raise UserError(f"n_head: {heads!r}, and no file of SMDM says how many heads there are; give n_head")
        (rows, d_model), (columns, _), (fused, _), (d_mlp, _) = (shapes[name] for name in names)
        groups = fused * heads // d_model - heads
        if d_model % heads or groups < 2 or groups % 2 or (heads + groups) * d_model != fused * heads:
            raise UserError(
                f"n_head: {heads} heads of {d_model / heads:g} dimensions do not make the {fused} rows of {names[2]}; "
                "give another number"
            )
        layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.h.")}
        found = {"n_embd": d_model, "n_layer": len(layers), "n_query_groups": groups // 2, "intermediate_size": d_mlp}
        found |= {"padded_vocab_size": rows, "vocab_size": columns, "mask_token_id": rows - 1}
        return found | TINY_LLAMA | dict(config)

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        raise UserError("format: 'smdm' has no config.json and is only read; use 'mdm_interp'")

    def part(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        leaf = parameter.rsplit(".", 1)[-1]
        if leaf not in FUSED:
            return tensor
        shared = cfg.n_heads // cfg.kv_heads
        grouped = tensor.unflatten(0, (cfg.kv_heads, shared + 2, cfg.head_dim))
        which = {"W_Q": slice(shared), "W_K": slice(shared, shared + 1), "W_V": slice(shared + 1, shared + 2)}[leaf]
        return grouped[:, which].flatten(0, 2)


OF_LAYER = ("attn.W_Q", "mlp.W_in")
TINY_LLAMA = {"context_length": 2048, "norm_eps": 1e-5, "rope_base": 10_000.0}
