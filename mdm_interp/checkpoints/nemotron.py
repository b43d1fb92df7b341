"""Nemotron-Labs-Diffusion (`NemotronLabsDiffusionModel`): a Ministral 3, trained on as a masked diffusion model.

One set of weights attends to everything, within blocks, or causally, as `dlm_paradigm` says; the first two are read.
From `original_max_position_embeddings` on its queries grow with their position; up to there, which is how far it is
read, they do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from mdm_interp.checkpoints.huggingface import MDM, TENSORS, DiffusionFormat
from mdm_interp.checkpoints.llama import Llama
from mdm_interp.config import Attention, ModelConfig

PARADIGMS: dict[str, Attention] = {"bidirectional": "bidirectional", "block_diff": "block_causal"}
GROWTH = "llama_4_scaling_beta"


class Nemotron(DiffusionFormat):
    name = "nemotron_labs_diffusion"
    architecture = "NemotronLabsDiffusionModel"
    model_type = "nemotron_labs_diffusion"
    fixed: ClassVar[dict[str, Any]] = {
        field: value for field, value in (Llama.fixed | MDM).items() if field != "attention"
    }
    supported: ClassVar[dict[str, Any]] = Llama.supported
    read: ClassVar[tuple[str, ...]] = (*DiffusionFormat.read, "dlm_paradigm")
    rope_keys: ClassVar[dict[str, tuple[str, ...]]] = DiffusionFormat.rope_keys | {
        "yarn": (*DiffusionFormat.rope_keys["yarn"], GROWTH)
    }
    tensors: ClassVar[dict[str, str]] = {
        parameter: name.replace("model.", "encoder.").replace("lm_head.", "diffusion_head.")
        for parameter, name in TENSORS.items()
    }

    def read_rest(
        self, config: Mapping[str, Any], values: dict[str, Any], asked: Mapping[str, Any], problems: list[str]
    ) -> None:
        paradigm = config.get("dlm_paradigm")
        said = PARADIGMS.get(paradigm) if isinstance(paradigm, str) else None
        if "attention" not in asked and said is None:
            got = f"{paradigm!r:.40}" if "dlm_paradigm" in config else "missing"
            problems.append(
                f"dlm_paradigm is {got}, and only {' and '.join(PARADIGMS)} are read (or give "
                "attention='bidirectional' or 'block_causal', --attention)"
            )
        values.setdefault("attention", said or "bidirectional")
        super().read_rest(config, values, {**asked, "attention": values["attention"]}, problems)

    def read_rope(self, config: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        super().read_rope(config, values, problems)
        ropes = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
        scaling = values.get("rotary_scaling")
        if scaling is not None and any(isinstance(rope, Mapping) and rope.get(GROWTH) for rope in ropes):
            longest = scaling.original_max_position_embeddings
            if isinstance(n_ctx := values.get("n_ctx"), int) and n_ctx > longest:
                values["n_ctx"] = longest
                warnings.warn(
                    f"config.json lets queries grow from position {longest} on ({GROWTH}), which is not computed; "
                    "n_ctx is that",
                    stacklevel=5,
                )

    def own_scaling(self, given: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in given.items() if key != GROWTH}

    def write_rest(self, cfg: ModelConfig, config: dict[str, Any], problems: list[str]) -> None:
        super().write_rest(cfg, config, problems)
        if cfg.attention not in PARADIGMS.values():
            problems.append(f"attention is {cfg.attention!r}")
        config["dlm_paradigm"] = next((name for name, kind in PARADIGMS.items() if kind == cfg.attention), None)
