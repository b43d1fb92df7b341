"""Devices: what a user names, and whether it is there."""

from __future__ import annotations

import torch

from mdm_interp.errors import UserError


def check_device(device: str) -> str:
    """Return `device`, with `auto` resolved to cuda where there is one.

    Raises:
        UserError: torch does not know the device, or cannot use it here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # `meta` has tensors, but nothing in them
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: {device!r} cannot be used here ({str(error).splitlines()[0]}); use 'cpu' or 'auto'"
        ) from error
    return device
