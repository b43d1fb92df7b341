"""A `HookedTransformer`'s own format: its ModelConfig as config.json, its parameters under their own names.

The one format that holds every model of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mdm_interp.checkpoints.format import Format
from mdm_interp.config import ModelConfig

IDENTITY = ("architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id")


class Native(Format):
    name = "mdm_interp"
    architecture = "HookedTransformer"
    model_type = "mdm_interp"

    def read_config(self, config: Mapping[str, Any], asked: Mapping[str, Any] | None = None) -> ModelConfig:
        self.check_settable(asked or {})
        return self.make_config({name: value for name, value in config.items() if name not in IDENTITY})

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **cfg.model_dump(mode="json"),
        }

    def tensor_name(self, parameter: str) -> str:
        return parameter

    def to_stored(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        return tensor

    def from_stored(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        return tensor
