"""Dream (`DreamModel`): a Qwen2 whose attention is bidirectional, trained on from Qwen2.5-7B (arXiv 2508.15487).

It kept the shift of the ARM it grew from: the prediction for position i is in the logits at i - 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mdm_interp.checkpoints.qwen2 import Qwen2


class Dream(Qwen2):
    name = "dream"
    architecture = "DreamModel"
    model_type = "Dream"
    fixed: ClassVar[dict[str, Any]] = Qwen2.fixed | {"attention": "bidirectional", "readout_shift": -1}
    fields: ClassVar[dict[str, str]] = Qwen2.fields | {"mask_token_id": "mask_token_id"}
    settable: ClassVar[tuple[str, ...]] = ()
    mask_token = "<|mask|>"
    tokenizer_class = "DreamTokenizer"
    split_tokenizer = True
