"""Llama (`LlamaForCausalLM`): causal, no biases; grouped-query attention from LLaMA-2-70B and LLaMA-3 on.

Files from before these came lack fields, which have what transformers documents for `LlamaConfig`. Models that were
converted to be bidirectional keep the class' name, so `load_checkpoint` has options for that.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mdm_interp.checkpoints.huggingface import CONVERTIBLE, LLAMA_LIKE, HuggingFaceFormat


class Llama(HuggingFaceFormat):
    name = "llama"
    architecture = "LlamaForCausalLM"
    model_type = "llama"
    fixed: ClassVar[dict[str, Any]] = LLAMA_LIKE | {"attention": "causal", "readout_shift": -1, "qkv_bias": False}
    supported: ClassVar[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False}
    documented: ClassVar[dict[str, Any]] = {
        "rope_theta": 10_000.0,
        "num_key_value_heads": "num_attention_heads",
        "tie_word_embeddings": False,
    }
    settable: ClassVar[tuple[str, ...]] = CONVERTIBLE
