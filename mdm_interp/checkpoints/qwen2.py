"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): causal, biases on queries, keys and values.

Its sliding window, if switched on, is refused. A `sliding_window` beside `use_sliding_window: false` is not in use.
Models that were converted to be bidirectional may keep the class' name, so `load_checkpoint` has options for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mdm_interp.checkpoints.huggingface import CONVERTIBLE, LLAMA_LIKE, HuggingFaceFormat


class Qwen2(HuggingFaceFormat):
    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    model_type = "qwen2"
    fixed: ClassVar[dict[str, Any]] = LLAMA_LIKE | {"attention": "causal", "readout_shift": -1, "qkv_bias": True}
    tokenizer_class = "Qwen2Tokenizer"
    supported: ClassVar[dict[str, Any]] = {"use_sliding_window": False, "use_mrope": False}
    read: ClassVar[tuple[str, ...]] = (*HuggingFaceFormat.read, "sliding_window")
    settable: ClassVar[tuple[str, ...]] = CONVERTIBLE

    def read_rest(
        self, config: Mapping[str, Any], values: dict[str, Any], asked: Mapping[str, Any], problems: list[str]
    ) -> None:
        super().read_rest(config, values, asked, problems)
        if config.get("sliding_window") is not None and "use_sliding_window" not in config:
            problems.append("use_sliding_window is missing, so whether sliding_window is in use is not known")
