"""Llama (`LlamaForCausalLM`): causal, no biases; grouped-query attention from LLaMA-2-70B and LLaMA-3 on."""

from __future__ import annotations

from typing import Any, ClassVar

from mdm_interp.checkpoints.huggingface import LLAMA_LIKE, HuggingFaceFormat


class Llama(HuggingFaceFormat):
    name = "llama"
    architecture = "LlamaForCausalLM"
    model_type = "llama"
    fixed: ClassVar[dict[str, Any]] = LLAMA_LIKE | {"attention": "causal", "readout_shift": -1, "qkv_bias": False}
    supported: ClassVar[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False}
