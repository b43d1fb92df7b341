"""Qwen3 (`Qwen3ForCausalLM`), and the masked diffusion models that have its shape.

A Qwen2 without biases, whose heads normalise their queries and keys before rotation, and whose width times number may
differ from `d_model`. A2D (`a2d-qwen3`; OPDLM's class is another name of it) made its attention bidirectional; SDAR
(arXiv 2510.06303) attends within blocks of `block_size` and to all blocks before.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mdm_interp.checkpoints.huggingface import CONVERTIBLE, MDM, DiffusionFormat
from mdm_interp.checkpoints.llama import Llama
from mdm_interp.checkpoints.qwen2 import Qwen2


class Qwen3(Qwen2):
    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    model_type = "qwen3"
    fixed: ClassVar[dict[str, Any]] = Qwen2.fixed | {"qkv_bias": False, "use_qk_norm": True}
    supported: ClassVar[dict[str, Any]] = Qwen2.supported | {"attention_bias": False}
    documented: ClassVar[dict[str, Any]] = {"head_dim": 128}
    settable: ClassVar[tuple[str, ...]] = CONVERTIBLE


class A2D(DiffusionFormat):
    """What models have in common that A2D turned from ARMs into MDMs."""

    mask_token = "<|mask|>"


class A2DQwen3(A2D, Qwen3):
    name = "a2d-qwen3"
    architecture = "A2DQwen3LMHeadModel"
    aliases: ClassVar[tuple[str, ...]] = ("_A2DQwen3LMHeadModel",)
    model_type = "a2d-qwen3"
    fixed: ClassVar[dict[str, Any]] = Qwen3.fixed | MDM


class A2DQwen2(A2D, Qwen2):
    name = "a2d-qwen2"
    architecture = "A2DQwen2LMHeadModel"
    model_type = "a2d-qwen2"
    fixed: ClassVar[dict[str, Any]] = Qwen2.fixed | MDM


class A2DLlama(A2D, Llama):
    name = "a2d-llama"
    architecture = "A2DLlamaLMHeadModel"
    model_type = "a2d-llama"
    fixed: ClassVar[dict[str, Any]] = Llama.fixed | MDM


class SDAR(A2DQwen3):
    name = "sdar"
    architecture = "SDARForCausalLM"
    aliases: ClassVar[tuple[str, ...]] = ()
    model_type = "sdar"
    fixed: ClassVar[dict[str, Any]] = A2DQwen3.fixed | {"attention": "block_causal"}
    mask_token = "<|MASK|>"
