"""Tiny seeded models for the tests of the model, its parity and its position schemes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdm_interp.config import ModelConfig
from mdm_interp.model import HookedTransformer

TINY: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_layers": 2, "d_vocab": 13, "n_ctx": 12}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


def random_model(*, seed: int = 0, **changes: Any) -> HookedTransformer:
    """A model in which no gain is 1 and no bias 0, so that no term of the computation can be left out unnoticed."""
    generator = seeded(seed)
    model = HookedTransformer(tiny_config(**{"initializer_range": 0.4, **changes}), generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] in ("w", "b", "b_Q", "b_K", "b_V"):
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def random_tokens(*, batch: int = 2, pos: int = 7, d_vocab: int = TINY["d_vocab"], seed: int = 1) -> Tensor:
    return torch.randint(d_vocab, (batch, pos), generator=seeded(seed))
