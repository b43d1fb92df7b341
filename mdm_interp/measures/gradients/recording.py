"""Recording what gradients need, whatever the caller has switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mdm_interp.errors import UserError
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel


@contextmanager
def recording(model: Any) -> Iterator[HookedModel]:
    """Let gradients be taken of a model for a while, also under `torch.no_grad()` or `torch.inference_mode()`: without
    this, all of them would be 0 there.

    Raises:
        UserError: the model itself was made in inference mode, and its weights cannot be differentiated.
    """
    with torch.inference_mode(False), torch.enable_grad():
        model = hooked(model)
        if any(parameter.is_inference() for _, parameter in model.named_parameters()):
            raise UserError(
                "model: it was made under torch.inference_mode(), where weights can have no gradients; make it outside"
            )
        yield model
