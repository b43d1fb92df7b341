"""Checkpoints of LLaDA, Dream, Llama and Qwen2, and a `HookedTransformer`'s own, to and from disk.

    model = load_checkpoint("GSAI-ML/LLaDA-8B-Base", device="cuda", dtype="bfloat16")
    model.tokenizer, model.cfg.mask_token_id, model.cfg.readout_shift
    save_checkpoint(model, "folder", format="llada")

Read are config.json, safetensors and the tokenizer's files. No code from a checkpoint is run, whatever its `auto_map`
asks for, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mdm_interp.checkpoints.dream import Dream
from mdm_interp.checkpoints.format import Format, find_format
from mdm_interp.checkpoints.llada import LLaDA
from mdm_interp.checkpoints.llama import Llama
from mdm_interp.checkpoints.native import Native
from mdm_interp.checkpoints.placement import DeviceMap, place
from mdm_interp.checkpoints.qwen2 import Qwen2
from mdm_interp.checkpoints.tokenizers import FILES, load_tokenizer, save_tokenizer
from mdm_interp.checkpoints.weights import (
    DTYPES,
    check_tied,
    load_weights,
    match_tensors,
    most_common_dtype,
    read_headers,
    read_json,
    save_weights,
)
from mdm_interp.errors import UserError
from mdm_interp.files import write_text
from mdm_interp.models.positions import POSITION_SCHEMES, PositionScheme
from mdm_interp.models.transformer import HookedTransformer

__all__ = ["FORMATS", "load_checkpoint", "save_checkpoint"]

FORMATS: dict[str, Format] = {format.name: format for format in (LLaDA(), Dream(), Llama(), Qwen2(), Native())}

DOWNLOADED = ["config.json", "model*.safetensors", "model.safetensors.index.json", *FILES]
"""What is fetched of a hub id; its other files hold pickles, code and other libraries' formats."""


def load_checkpoint(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    revision: str | None = None,
) -> HookedTransformer:
    """Load a checkpoint as a `HookedTransformer`, with `.tokenizer` if it has a tokenizer's files.

    Weights go straight from the file to their device in their dtype: the host holds them at most once, plus the shard
    that is being read.

    Args:
        source: A folder, or a Hugging Face hub id (`HF_HUB_OFFLINE=1` keeps to what huggingface_hub has cached).
        device: `cpu`, `cuda`, … or `auto`.
        dtype: `float32`, `bfloat16`, … Default: what most of the weights are stored in.
        device_map: In place of `device`, for models larger than one GPU: `auto`, or a device for each module (see
            :mod:`mdm_interp.checkpoints.placement`).
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: the source cannot be found, is not a checkpoint of a format in :data:`FORMATS`, is damaged, or
            contradicts itself; or the device cannot be used.
    """
    folder = _find(source, revision)
    config = read_json(folder / "config.json")
    try:
        format = find_format(config, FORMATS.values())
        cfg = format.read_config(config)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    stored = read_headers(folder)
    model = HookedTransformer(cfg, init_weights=False)
    try:
        common = most_common_dtype(stored)
        found = match_tensors(model, format, stored)
        if cfg.tie_word_embeddings:
            check_tied(format, stored)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    loaded_dtype = common if dtype is None else _dtype(dtype)
    devices = place(model, device, device_map, loaded_dtype)
    model.tokenizer = load_tokenizer(folder, config, cfg.d_vocab, format.mask_token)
    load_weights(model, format, found, devices, loaded_dtype)
    model.pos_embed.to(devices["embed.W_E"])
    return model.to(loaded_dtype)  # type: ignore[return-value]


def save_checkpoint(
    model: HookedTransformer, folder: str | Path, format: str, max_shard_size: int | str = "5GB"
) -> None:
    """Write a model as config.json, safetensors and its tokenizer's files, as released checkpoints have them.

    config.json is written last: a folder without one is not whole. Files of a checkpoint that was there are replaced.

    Args:
        format: `llada`, `dream`, `llama`, `qwen2`, or `mdm_interp`, which holds every model.
        max_shard_size: Bytes, or a string like `5GB`, from which on weights are split over several files.

    Raises:
        UserError: the format is unknown or does not have such a model, or the model's position scheme or parameters are
            not those that its config names.
    """
    if format not in FORMATS:
        raise UserError(f"format: {format!r} is unknown; choose among {', '.join(FORMATS)}")
    chosen, folder = FORMATS[format], Path(folder)
    _require_own_positions(model)
    _require_own_parameters(model)
    config = chosen.write_config(model.cfg)
    if model.tokenizer is not None and not isinstance(model.tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"model.tokenizer: {type(model.tokenizer).__name__} is no PreTrainedTokenizerFast; give one")
    if model.tokenizer is not None:
        ids = {f"{name}_token_id": getattr(model.tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
        config |= {name: index for name, index in ids.items() if index is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *FILES):
        (folder / name).unlink(missing_ok=True)
    save_weights(model, chosen, folder, max_shard_size)
    if model.tokenizer is not None:
        save_tokenizer(model.tokenizer, folder, chosen.tokenizer_class, split=chosen.split_tokenizer)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _require_own_positions(model: HookedTransformer) -> None:
    """Refuse a position scheme that no file would bring back: files hold its name, its settings and what it learned."""
    scheme, own = model.pos_embed, POSITION_SCHEMES[model.cfg.position](model.cfg)
    if type(scheme) is not type(own) or not _same_constants(scheme, own):
        raise UserError(
            f"model.pos_embed: this {type(scheme).__name__} is not the position scheme {model.cfg.position!r} that "
            "config.json names, and no file holds code; save a model of that scheme, and set this one after loading"
        )


def _require_own_parameters(model: HookedTransformer) -> None:
    """Refuse parameters that no file would bring back: weight processing adds biases that a config does not name."""
    own = {name for name, _ in HookedTransformer(model.cfg, init_weights=False).named_parameters()}
    added = [name for name, _ in model.named_parameters() if name not in own]
    if added:
        raise UserError(
            f"model: {added[0]} is no parameter of a model of this config; weights that were processed, or of a "
            "classic config, have biases that no format holds. Save the model before, and process it after loading"
        )


def _same_constants(scheme: PositionScheme, own: PositionScheme) -> bool:
    """Tell whether what two schemes compute with and do not learn is the same, up to rounding to the model's dtype."""
    found, expected = (
        {name: x.cpu().double() for name, x in (*vars(of).items(), *of.named_buffers()) if isinstance(x, Tensor)}
        for of in (scheme, own)
    )
    return found.keys() == expected.keys() and all(
        x.shape == expected[name].shape and torch.allclose(x, expected[name], rtol=2**-8, atol=1e-6)
        for name, x in found.items()
    )


def _find(source: str | Path, revision: str | None) -> Path:
    """Return the folder of a checkpoint, downloaded if `source` is a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision: {revision!r} is for hub ids, and {source} is a folder; leave it out")
        return folder
    if not isinstance(source, str) or folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise UserError(f"{source}: not a folder, nor a Hugging Face hub id; give one of them")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns="*/*"))
    except Exception as error:  # of huggingface_hub, of the network or of the disk: there is no common base
        reason = " ".join(str(error).split())
        raise UserError(
            f"{source}: not a folder, and not to be had from the Hugging Face hub ({reason}); correct the name, or "
            "download it first"
        ) from error


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    named = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    if str(dtype).removeprefix("torch.") not in named:
        raise UserError(f"dtype: {str(dtype)!r} is not one of {', '.join(named)}")
    return named[str(dtype).removeprefix("torch.")]
