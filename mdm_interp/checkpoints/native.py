"""A `HookedTransformer`'s own format: its ModelConfig as config.json, its parameters under their own names.

The one format that holds every model of this package. Of a registered position scheme it holds the name, and a few
numbers by which another class of that name is told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mdm_interp.checkpoints.format import Format
from mdm_interp.config import ModelConfig
from mdm_interp.models.positions import SAMPLE, check_answers, sample_answers

IDENTITY = ("architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", SAMPLE)


class Native(Format):
    name = "mdm_interp"
    architecture = "HookedTransformer"
    model_type = "mdm_interp"

    def read_config(self, config: Mapping[str, Any], asked: Mapping[str, Any] | None = None) -> ModelConfig:
        self.check_settable(asked or {})
        cfg = self.make_config({name: value for name, value in config.items() if name not in IDENTITY})
        check_answers(cfg, config.get(SAMPLE))
        return cfg

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        sample = sample_answers(cfg)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **cfg.model_dump(mode="json"),
            **({SAMPLE: sample} if sample else {}),
        }

    def tensor_name(self, parameter: str) -> str:
        return parameter

    def to_stored(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        return tensor

    def from_stored(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        return tensor
