"""Hook points that refuse what does not fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookFunction, HookPoint, LensHandle

from mdm_interp.errors import UserError


class CheckedHookPoint(HookPoint):
    """A hook point that refuses a hook's result unless it is a tensor of the shape that went in."""

    def add_hook(self, hook: HookFunction, *args: Any, **kwargs: Any) -> LensHandle:
        def checked(tensor: Tensor, *, hook: HookPoint) -> Any:
            result = user_hook(tensor, hook=hook)
            if result is not None and getattr(result, "shape", None) != tensor.shape:
                got = f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
                raise UserError(
                    f"hook on {hook.name!r} returned {got}, expected a tensor of shape {list(tensor.shape)}; "
                    "return the edited activation, or None to leave it"
                )
            return result

        user_hook = hook
        handle = super().add_hook(checked, *args, **kwargs)
        handle.user_hook = user_hook
        return handle
