"""Checkpoints of masked diffusion models, of the ARMs beside them, and of any `HookedTransformer`, to and from disk.

    model = load_checkpoint("GSAI-ML/LLaDA-8B-Base", device="cuda", dtype="bfloat16")
    model.tokenizer, model.cfg.mask_token_id, model.cfg.readout_shift
    save_checkpoint(model, "folder", format="llada")
    from_module(own, cfg, names)                   # a torch module that computes the same

Read are config.json, safetensors and the tokenizer's files. No code from a checkpoint is run, whatever its `auto_map`
asks for, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mdm_interp.checkpoints.dream import Dream
from mdm_interp.checkpoints.format import Format, find_format
from mdm_interp.checkpoints.llada import LLaDA
from mdm_interp.checkpoints.llada2 import LLaDA2
from mdm_interp.checkpoints.llama import Llama
from mdm_interp.checkpoints.module import from_module
from mdm_interp.checkpoints.native import Native
from mdm_interp.checkpoints.nemotron import Nemotron
from mdm_interp.checkpoints.placement import DeviceMap, place
from mdm_interp.checkpoints.qwen2 import Qwen2
from mdm_interp.checkpoints.qwen3 import SDAR, A2DLlama, A2DQwen2, A2DQwen3, Qwen3
from mdm_interp.checkpoints.smdm import SMDM
from mdm_interp.checkpoints.tokenizers import FILES, find_added_mask, find_mask, load_tokenizer, save_tokenizer
from mdm_interp.checkpoints.weights import (
    DTYPES,
    INDEX,
    SHARDS,
    SINGLE,
    check_size,
    check_tied,
    load_weights,
    match_tensors,
    most_common_dtype,
    read_headers,
    read_json,
    save_weights,
)
from mdm_interp.config import Attention, ModelConfig
from mdm_interp.errors import UserError, few
from mdm_interp.files import DIGESTS, all_of, check_digests, replacing_all, write_digests, write_text
from mdm_interp.models.positions import POSITION_SCHEMES, PositionScheme
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.tensors import not_finite

__all__ = ["FORMATS", "from_module", "load_checkpoint", "save_checkpoint"]

OF_MDMS = (LLaDA(), Dream(), A2DQwen3(), A2DQwen2(), A2DLlama(), SDAR(), Nemotron(), SMDM(), LLaDA2())
FORMATS: dict[str, Format] = {format.name: format for format in (*OF_MDMS, Llama(), Qwen2(), Qwen3(), Native())}

ADAPTER = "adapter_config.json"
DOWNLOADED = ["config.json", ADAPTER, "model*.safetensors", "model.safetensors.index.json", *FILES]
"""What is fetched of a hub id; its other files hold pickles, code and other libraries' formats."""


def load_checkpoint(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    *,
    attention: Attention | None = None,
    readout_shift: int | None = None,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
) -> HookedTransformer:
    """Load a checkpoint as a `HookedTransformer`, with `.tokenizer` if it has a tokenizer's files.

    Weights go straight from the file to their device in their dtype: the host holds them at most once, plus the shard
    that is being read.

    Args:
        source: A folder, a Hugging Face hub id (`HF_HUB_OFFLINE=1` keeps to what huggingface_hub has cached), or with
            `config` a safetensors file.
        device: `cpu`, `cuda`, … or `auto`.
        dtype: `float32`, `bfloat16`, … Default: what most of the weights are stored in.
        device_map: In place of `device`, for models larger than one GPU: `auto`, or a device for each module (see
            :mod:`mdm_interp.checkpoints.placement`).
        revision: Branch, tag or commit of a hub id.
        attention: `bidirectional` for a Llama, Qwen2 or Qwen3 that was converted to masked diffusion and kept its
            class' name, `causal` for one that only looks like it; `block_causal` for a model that reads its own block
            and all before it.
        readout_shift: Of a converted model: 0 if a mask's token is predicted at the mask, -1 if one position before.
        mask_token_id: Where no file says it; default: that of config.json, of added_tokens.json, or of the tokenizer.
        block_size: Of block-causal attention; default: that of config.json.
        config: What config.json would say, for a checkpoint without one: its fields, or a JSON file. Of SMDM:
            `{"model_type": "smdm", "n_head": …}`.

    Raises:
        UserError: the source cannot be found, is not a checkpoint of a format in :data:`FORMATS`, is damaged, as far as
            digests tell, or contradicts itself; the device cannot be used; or no file says how a model attends or which
            token is its mask.
    """
    folder, weights = _find(source, revision, config is not None)
    check_digests(folder)
    said, place_of = _read_config(folder, config)
    options = {"attention": attention, "readout_shift": readout_shift, "mask_token_id": mask_token_id}
    options["block_size"] = block_size
    asked = {name: value for name, value in options.items() if value is not None}
    try:
        format = find_format(said, FORMATS.values())
        if config is not None:
            said = format.complete(said, {name: of.shape for name, of in read_headers(folder, weights).items()})
        cfg = format.read_config(said, asked)
    except UserError as error:
        raise UserError(f"{place_of}: {error}") from error
    cfg, tokenizer = _read_tokenizer(folder, format, said, cfg)
    if format.convertible:
        _check_direction(folder, said, asked, cfg, tokenizer)
    stored = read_headers(folder, weights)
    try:
        check_size(cfg, stored)
        model = HookedTransformer(cfg, init_weights=False)
        common = most_common_dtype(stored)
        found = match_tensors(model, format, stored)
        if cfg.tie_word_embeddings:
            check_tied(format, stored)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    loaded_dtype = common if dtype is None else _dtype(dtype)
    devices = place(model, device, device_map, loaded_dtype)
    model.tokenizer = tokenizer
    load_weights(model, format, found, devices, loaded_dtype)
    model.pos_embed.to(devices["embed.W_E"])
    return model.to(loaded_dtype)  # type: ignore[return-value]


def _read_config(folder: Path, given: Mapping[str, Any] | str | Path | None) -> tuple[dict[str, Any], str]:
    """Return what config.json says, or what is given in its place, and what messages call it."""
    if given is not None:
        if (folder / "config.json").exists():
            raise UserError(f"config: {folder} has a config.json of its own; leave config out, or correct that file")
        return (dict(given), "config") if isinstance(given, Mapping) else (read_json(Path(given)), str(given))
    if (folder / ADAPTER).exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{folder}: holds a PEFT adapter ({ADAPTER}) and no model; merge it into its base model "
            "(`model.merge_and_unload().save_pretrained(…)`) and load that"
        )
    return read_json(folder / "config.json"), str(folder / "config.json")


def _read_tokenizer(
    folder: Path, format: Format, config: Mapping[str, Any], cfg: ModelConfig
) -> tuple[ModelConfig, PreTrainedTokenizerFast | None]:
    """Load the tokenizer, and complete the config of an MDM by its mask where config.json does not say it.

    Raises:
        UserError: a file is damaged, or none says which token is the mask.
    """
    known, token = cfg.mask_token_id, format.mask_token
    asked_with_masks = not cfg.is_causal and "mask_token_id" in format.settable
    if known is None and asked_with_masks and (added := find_added_mask(folder)):
        token, known = added
    tokenizer = load_tokenizer(folder, config.get("pad_token_id"), known, cfg.d_vocab, token)
    if known is None and asked_with_masks:
        mask = find_mask(tokenizer)
        if tokenizer is None or mask is None:
            raise UserError(
                f"mask_token_id: neither config.json nor the tokenizer of {folder} says which it is; give it "
                "(mask_token_id=…, --mask-token-id)"
            )
        tokenizer.mask_token, known = mask, tokenizer.convert_tokens_to_ids(mask)
    if known is not None and known not in range(cfg.d_vocab):
        raise UserError(f"{folder}: mask_token_id {known} is outside the vocabulary of {cfg.d_vocab}; correct it")
    return cfg.model_copy(update={"mask_token_id": known}), tokenizer


def _check_direction(
    folder: Path,
    config: Mapping[str, Any],
    asked: Mapping[str, Any],
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Check what is known of a model whose class is causal, which a converted one may have kept.

    Raises:
        UserError: something says that it was converted, and the options do not say whether; or they leave out what no
            file says.
    """
    mask = find_mask(tokenizer)
    if "attention" not in asked:
        signs = {
            "auto_map": config.get("auto_map") is not None,
            "mask_token_id": config.get("mask_token_id") is not None,
            "is_causal": config.get("is_causal") is False,
            f"a tokenizer with {mask!r}": mask is not None,
        }
        if found := [sign for sign, there in signs.items() if there]:
            raise UserError(
                f"{folder}: has {few(found)}, so it may be a causal model that was made bidirectional; say so with "
                "attention='bidirectional', readout_shift=0 or -1 and mask_token_id=…, or attention='causal' if it was "
                "not (--attention, --readout-shift, --mask-token-id)"
            )
        if asked:
            raise UserError(f"{next(iter(asked))}: is of a bidirectional model; give attention='bidirectional', too")
    elif not cfg.is_causal and "readout_shift" not in asked:
        raise UserError(
            "readout_shift: no file says where a converted model predicts a mask's token; give 0 (at the mask) or -1 "
            "(one position before)"
        )


def save_checkpoint(
    model: HookedTransformer, folder: str | Path, format: str, max_shard_size: int | str = "5GB"
) -> None:
    """Write a model as config.json, safetensors and its tokenizer's files, as released checkpoints have them.

    Digests of these files are written beside them, in digests.json. Files of a checkpoint that was there are replaced,
    all at once: until then, and if anything goes wrong, it is as it was.

    Args:
        format: One of :data:`FORMATS`: `llada`, `dream`, `qwen3`, …, or `mdm_interp`, which holds every model.
        max_shard_size: Bytes, or a string like `5GB`, from which on weights are split over several files.

    Raises:
        UserError: the format is unknown or does not have such a model, the model's position scheme or parameters are
            not those that its config names, or weights are not finite.
    """
    if format not in FORMATS:
        raise UserError(f"format: {format!r} is unknown; choose among {', '.join(FORMATS)}")
    chosen, folder = FORMATS[format], Path(folder)
    _require_own_positions(model)
    _require_own_parameters(model)
    if name := not_finite(model.state_dict()):
        raise UserError(
            f"model: {name} has NaN or infinite numbers, which are not loaded again; correct it, and save then"
        )
    config = chosen.write_config(model.cfg)
    if model.tokenizer is not None and not isinstance(model.tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"model.tokenizer: {type(model.tokenizer).__name__} is no PreTrainedTokenizerFast; give one")
    if model.tokenizer is not None:
        ids = {f"{name}_token_id": getattr(model.tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
        config |= {name: index for name, index in ids.items() if index is not None}
    with replacing_all(folder, (DIGESTS, "config.json", SINGLE, INDEX, SHARDS, *FILES)) as whole:
        save_weights(model, chosen, whole, max_shard_size)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, whole, chosen.tokenizer_class, split=chosen.split_tokenizer)
        write_text(whole / "config.json", json.dumps(config, indent=2) + "\n")
        write_digests(whole)


def _require_own_positions(model: HookedTransformer) -> None:
    """Refuse a position scheme that no file would bring back: files hold its name, its settings and what it learned."""
    scheme, own = model.pos_embed, POSITION_SCHEMES[model.cfg.position](model.cfg)
    if type(scheme) is not type(own) or not _same_constants(scheme, own):
        raise UserError(
            f"model.pos_embed: this {type(scheme).__name__} is not the position scheme {model.cfg.position!r} that "
            "config.json names, and no file holds code; register its class (register_scheme) and build the model with "
            "that name, or set it after loading"
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
    """Tell whether what two schemes compute with and no file holds is the same, up to rounding to the model's dtype:
    tensors, numbers, texts, and which methods were put in the place of the class's."""
    of_all = {"name", *vars(PositionScheme(own.cfg)), *own.state_dict()}  # TransformerLens names each module
    found, expected = (
        {name: value for name, value in (*vars(of).items(), *of.named_buffers()) if name not in of_all}
        for of in (scheme, own)
    )
    return found.keys() == expected.keys() and all(_same(value, expected[name]) for name, value in found.items())


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        value, other = value.cpu().double(), other.cpu().double()
        return value.shape == other.shape and torch.allclose(value, other, rtol=2**-8, atol=1e-6)
    return type(value) is type(other) and (not isinstance(value, (bool, int, float, str)) or value == other)


def _find(source: str | Path, revision: str | None, configured: bool) -> tuple[Path, str | None]:
    """Return the folder of a checkpoint, downloaded if `source` is a hub id, and the name of its file if it is one."""
    folder = Path(os.path.expanduser(source))  # Path's own fails where nobody has that name
    if folder.is_dir() or (configured and folder.suffix == ".safetensors" and folder.is_file()):
        if revision is not None:
            raise UserError(f"revision: {revision!r} is for hub ids, and {source} is a path; leave it out")
        return (all_of(folder), None) if folder.is_dir() else (folder.parent, folder.name)
    if not isinstance(source, str) or folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise UserError(f"{source}: not a folder, nor a Hugging Face hub id; give one of them")
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns="*/*")
        ), None
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
