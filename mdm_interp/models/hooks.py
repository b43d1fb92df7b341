"""Hooks that refuse what does not fit, and caches that own what they hold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookFunction, HookPoint, LensHandle
from transformer_lens.utilities import Slice

from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError

SWITCHES = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}
"""Hooks on what is computed only for them, and the field of `cfg` that puts them into a cache of all hooks."""

_OF_BRIDGES = re.compile(r"\.attn(?=\.hook_([qkv]_input|attn_in)$)")
"""What a `TransformerBridge` has in the names of split inputs, and TransformerLens' patching with it."""

PER_HEAD = {"q", "k", "v", "q_normalized", "k_normalized", "rot_q", "rot_k", "z", "result", "q_input", "k_input"}
PER_HEAD |= {"v_input", "attn_in"}
"""Hooks on activations of shape [batch pos head …]."""

Names = str | Callable[[str], bool] | Iterable[str] | None


class CheckedHookPoint(HookPoint):
    """A hook point that refuses a hook's result unless it is a tensor of the shape that went in."""

    def add_hook(self, hook: HookFunction, dir: Literal["fwd", "bwd"] = "fwd", *args: Any, **kwargs: Any) -> LensHandle:
        def checked(tensor: Tensor, *, hook: HookPoint) -> Any:
            result = user_hook(tensor, hook=hook)
            if dir == "bwd" and isinstance(result, tuple) and len(result) == 1:  # as torch's own hooks return it
                result = result[0]
            if result is not None and getattr(result, "shape", None) != tensor.shape:
                got = f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
                raise UserError(
                    f"hook on {hook.name!r} returned {got}, expected a tensor of shape {list(tensor.shape)}; "
                    "return the edited activation, or None to leave it"
                )
            return result

        user_hook = hook
        handle = super().add_hook(checked, dir, *args, **kwargs)
        handle.user_hook = user_hook
        return handle


def in_use(point: nn.Module) -> bool:
    """Tell whether anything sees or edits what passes a hook point: a hook (torch's own count), or a module in its
    place, such as a sparse autoencoder."""
    if type(point) is not CheckedHookPoint:
        return True
    # torch's records hold the hooks of both, and are quick to ask: seven points in every layer of every pass
    return bool(point._forward_hooks or point._backward_hooks or point._forward_pre_hooks or point._backward_pre_hooks)


def is_watched(model: HookedRootModule) -> bool:
    """Tell whether anything sees or edits what passes the model: at a hook point, or by torch's own hooks at any other
    module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(map(in_use, model.hook_dict.values())) or any(
        getattr(module, kind) for module in model.modules() for kind in kinds
    )


class CheckedHooks(HookedRootModule):
    """TransformerLens' `HookedRootModule`, with unknown names and empty filters refused."""

    cfg: ModelConfig

    def _match(self, names: Names) -> list[str]:
        """Return the hook points that a name, a list of names or a predicate selects, in the model's order.

        None selects all but those of :data:`SWITCHES` that are switched off. The names that bridges have for split
        inputs count as ours.

        Raises:
            UserError: a name does not exist, or nothing is selected.
        """
        if names is None:
            return [name for name in self.hook_dict if self._switched_on(name)]
        if callable(names):
            matched = [name for name in self.hook_dict if names(name)]
            if not matched:
                raise UserError(
                    f"hook filter {getattr(names, '__name__', names)!r} selects none of the {len(self.hook_dict)} "
                    "hooks, "
                    f"which are named like {', '.join(list(self.hook_dict)[:4])}; correct the filter"
                )
            return matched
        wanted = [_OF_BRIDGES.sub("", name) for name in ([names] if isinstance(names, str) else names)]
        if not wanted:
            raise UserError("hook filter is an empty list; name at least one hook, or give None for all")
        for name in wanted:
            if name not in self.hook_dict:
                near = difflib.get_close_matches(name, self.hook_dict, n=4, cutoff=0.3)
                raise UserError(f"unknown hook {name!r}; did you mean {', '.join(near) or 'one of model.hook_dict'}?")
        return [name for name in self.hook_dict if name in set(wanted)]

    def _switched_on(self, name: str) -> bool:
        switch = SWITCHES.get(name.rsplit(".", 1)[-1])
        return switch is None or getattr(self.cfg, switch)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook as TransformerLens does.

        Raises:
            UserError: the name is unknown, or a predicate selects nothing.
        """
        for matched in self._match(name):
            super().add_hook(matched, hook, dir, is_permanent, level, prepend)

    def _enable_hook(self, name: str | Callable[[str], bool], hook: Callable, dir: Literal["fwd", "bwd"]) -> None:
        for matched in self._match(name):
            super()._enable_hook(matched, hook, dir)

    def get_caching_hooks(
        self,
        names_filter: Names = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
        pos_slice: Any = None,
        *,
        unedited: bool = False,
    ) -> tuple[dict, list, list]:
        """Do as TransformerLens, but every entry owns its memory, so no later edit can change it, and `pos_slice` takes
        the position axis of every activation that has one per head, of rotated queries and keys too.

        Args:
            unedited: Whether nothing else is hooked, so that whole forward activations can be kept as they are, without
                a copy; of two that are one tensor in the model the second is copied.
        """
        chosen, taken = Slice.unwrap(pos_slice), set()

        def sliced(name: str, save: Callable, copied: bool) -> tuple[str, Callable]:
            axis = -3 if name.rsplit("hook_", 1)[-1] in PER_HEAD else -2

            def keep(tensor: Tensor, hook: HookPoint) -> None:
                kept, storage = chosen.apply(tensor, dim=axis), tensor.untyped_storage()._cdata
                save(kept.clone() if copied or storage in taken else kept, hook=hook)
                taken.add(storage)

            return name, keep

        matched = set(self._match(names_filter))
        cache, fwd, bwd = super().get_caching_hooks(matched.__contains__, incl_bwd, device, remove_batch_dim, cache)
        copied = not unedited or pos_slice is not None
        return (
            cache,
            [sliced(name, save, copied) for name, save in fwd],
            [sliced(name, save, True) for name, save in bwd],
        )

    def add_caching_hooks(self, *args: Any, **kwargs: Any) -> dict:
        """Do as TransformerLens, with entries that own their memory."""
        cache, fwd, bwd = self.get_caching_hooks(*args, **kwargs)
        for name, save in fwd:
            self.add_hook(name, save, "fwd")
        for name, save in bwd:
            self.add_hook(name, save, "bwd")
        return cache

    @overload
    def run_with_cache(
        self, *model_args: Any, return_cache_object: Literal[True] = True, **kwargs: Any
    ) -> tuple[Any, ActivationCache]: ...

    @overload
    def run_with_cache(
        self, *model_args: Any, return_cache_object: Literal[False], **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]: ...

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *model_args: Any,
        names_filter: Names = None,
        device: Any = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """Run the model, and cache the activations that `names_filter` selects (default: all but those that are
        computed only for their hooks, see `cfg.use_attn_result` and its kin).

        Other arguments are those of the model and of `HookedRootModule.run_with_cache`. No entry shares its memory with
        another. While anything else is hooked, and could edit an activation in place, entries are copies.

        Args:
            return_cache_object: False gives a dict from hook names to activations, True an `ActivationCache`.

        Raises:
            UserError: no hook is selected, or there is no batch dimension of one sequence to remove.
        """
        given = model_args[0] if model_args else model_kwargs.get("input")
        if remove_batch_dim and isinstance(given, Tensor) and len(given) != 1:
            raise UserError(f"remove_batch_dim: the batch has {len(given)} sequences; give one, or leave it out")
        alone = reset_hooks_end and not any(map(in_use, self.hook_dict.values()))
        cache, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice, unedited=alone
        )
        with self.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                out.backward()
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim) if return_cache_object else cache
