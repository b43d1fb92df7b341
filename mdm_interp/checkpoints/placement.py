"""Which device each parameter lies on, for models larger than one GPU.

accelerate decides what fits where; blocks then fetch the residual stream to their own device
(:class:`mdm_interp.models.layers.Block`), so nothing is wrapped, and hooks, gradients and copies work as on one device.
Activations stay where they were computed, and logits come on the embedding's device, which is `cfg.device`. Blocks that
go to the CPU are computed there; nothing is offloaded to the disk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mdm_interp.devices import check_device
from mdm_interp.errors import UserError
from mdm_interp.models.transformer import HookedTransformer

DeviceMap = str | Mapping[str, int | str | torch.device]


def place(
    model: HookedTransformer, device: str | torch.device, device_map: DeviceMap | None, dtype: torch.dtype
) -> dict[str, torch.device]:
    """Return the device of each parameter.

    Args:
        device_map: `auto`, or module names (`embed`, `blocks.0`, `blocks`, `ln_final`, `unembed`, or "" for all) with
            their devices; the longest name that a parameter begins with counts.

    Raises:
        UserError: a device cannot be used, the map leaves parameters out or names unknown modules, a block would be
            split, or the model does not fit into memory.
    """
    if device_map is None:
        return dict.fromkeys(dict(model.named_parameters()), torch.device(check_device(str(device))))
    if isinstance(device_map, str):
        device_map = _infer(model, device_map, dtype)
    known = dict(model.named_modules()).keys() | dict(model.named_parameters()).keys()
    unknown = sorted(set(device_map) - known)
    if unknown:
        raise UserError(f"device_map: the model has no module {unknown[0]!r}; name embed, blocks.0, … or unembed")
    usable = {name: _device(chosen) for name, chosen in device_map.items()}
    placed = {}
    for parameter, _ in model.named_parameters():
        prefixes = [name for name in usable if f"{parameter}.".startswith(name and f"{name}.")]
        if not prefixes:
            raise UserError(f"device_map: says nothing of {parameter}; name its module, or '' for all the rest")
        placed[parameter] = usable[max(prefixes, key=len)]
    return _keep_together(model, placed)


def _infer(model: HookedTransformer, device_map: str, dtype: torch.dtype) -> dict[str, int | str | torch.device]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if device_map != "auto":
        raise UserError(f"device_map: {device_map!r} is not known; give 'auto', or a device for each module")
    memory = get_balanced_memory(model, dtype=dtype, no_split_module_classes=["Block"])
    inferred = infer_auto_device_map(model, max_memory=memory, dtype=dtype, no_split_module_classes=["Block"])
    if "disk" in inferred.values():
        raise UserError("device_map: the model does not fit into the memory of all devices; load it in a smaller dtype")
    return dict(inferred)


def _device(chosen: int | str | torch.device) -> torch.device:
    return torch.device(check_device(f"cuda:{chosen}" if isinstance(chosen, int) else str(chosen)))


def _keep_together(model: HookedTransformer, placed: dict[str, torch.device]) -> dict[str, torch.device]:
    """Return the final norm with the unembedding, and every block on one device."""
    unembedding = placed["embed.W_E" if model.cfg.tie_word_embeddings else "unembed.W_U"]
    placed |= {name: unembedding for name in placed if name.startswith("ln_final.")}
    for layer in range(model.cfg.n_layers):
        devices = {device for name, device in placed.items() if name.startswith(f"blocks.{layer}.")}
        if len(devices) > 1:
            raise UserError(f"device_map: splits blocks.{layer}; give the block one device")
    in_layers = model.pos_embed.answers("rotate") or model.pos_embed.answers("bias")
    if in_layers and list(model.pos_embed.parameters()) and len(set(placed.values())) > 1:
        raise UserError(
            f"device_map: what position scheme {model.cfg.position!r} learns serves all layers; give one device to all"
        )
    return placed
