"""Weights on disk: safetensors, in one file or in shards with an index.

Tensors are read one by one, each straight onto its device in its dtype, so that no more than the weights themselves and
the shard being read are in memory. Files are only ever mapped and copied from; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mdm_interp.checkpoints.format import Format
from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError, few
from mdm_interp.files import read_text, require_file, write_text
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.tensors import not_finite, save_tensors, saved_digests, tensor_digest

SINGLE, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-[0-9]*-of-[0-9]*.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, from the header of its file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


MOST_TENSORS, MOST_HEADER = 100_000, 2**25


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, too large, nested too deeply, has a field twice, or holds no JSON object.
    """
    try:
        content = json.loads(read_text(path), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); give a checkpoint's folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {content!r:.80}; give a checkpoint's folder")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, of which the parser would keep the last of fields that are alike."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{repeated!r:.80} is there twice")
    return found


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a safetensors file, with one error for all that can be wrong with it."""
    try:
        require_file(path)
        with safe_open(path, "pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); download the file again") from error


def read_headers(folder: Path, file: str | None = None) -> dict[str, StoredTensor]:
    """List every tensor of a checkpoint, by name; no weights are read.

    Args:
        file: Which holds all of them; default: what the folder has.

    Raises:
        UserError: there are no safetensors, a shard is missing or damaged, or index and shards disagree.
    """
    placed: dict[str, str] | None = None
    if file is not None:
        files = [file]
    elif os.path.lexists(folder / SINGLE):  # a link that leads nowhere is a file that cannot be read
        files = [SINGLE]
    elif os.path.lexists(folder / INDEX):
        placed = _read_index(folder)
        files = sorted(set(placed.values()))
    else:
        raise UserError(f"{folder}: {_why_no_weights(folder)}")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        with open_shard(folder / file) as shard:
            names = shard.keys()
            if len(stored) + len(names) > MOST_TENSORS:
                raise UserError(f"{folder}: has more than {MOST_TENSORS} tensors, which is not read; merge them")
            for name in names:
                if name in stored:
                    raise UserError(f"{folder}: tensor {name} is both in {stored[name].path.name} and in {file}")
                header = shard.get_slice(name)
                stored[name] = StoredTensor(folder / file, tuple(header.get_shape()), header.get_dtype())
            _require_once(folder / file)
    astray = [f"{name} is not in {file}" for name, file in (placed or {}).items() if stored.get(name) is None]
    if astray:
        raise UserError(f"{folder / INDEX}: does not fit the shards ({few(astray, '; ')}); download them again")
    return stored


def _require_once(path: Path) -> None:
    """Refuse a header that has a name twice, of which one would be passed over.

    Raises:
        SafetensorError: it has, or is too large to look.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER:
            raise SafetensorError(f"its header has {size} bytes, and at most {MOST_HEADER} are read")
        try:
            json.loads(file.read(size), object_pairs_hook=_once)
        except ValueError as error:
            raise SafetensorError(f"its header: {error}") from error


def _read_index(folder: Path) -> dict[str, str]:
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"{folder / INDEX}: 'weight_map' does not name a file for each tensor; download it again")
    files = sorted(set(placed.values()))
    outside = [
        file for file in files if Path(file).name != file or not file.endswith(".safetensors") or len(file) > 255
    ]
    if outside:
        raise UserError(f"{folder / INDEX}: names {few(outside)}, which are not safetensors files of the folder")
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise UserError(f"{folder / INDEX}: names files that are missing: {few(missing)}; download them")
    return placed


def _why_no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        return (
            f"has only pickled weights ({few(pickled)}), and unpickling can run any code, so it is not done; "
            "convert them to safetensors"
        )
    if any(folder.glob("*.safetensors")):
        return f"has safetensors, but neither {SINGLE} nor {INDEX}; download the one that is missing"
    return f"has neither {SINGLE} nor {INDEX}; give a checkpoint's folder"


def most_common_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return the dtype that most of the weights are stored in.

    Raises:
        UserError: a tensor is not stored in a floating-point type that can be read; all are listed.
    """
    quantised = [f"{name} ({tensor.dtype})" for name, tensor in stored.items() if tensor.dtype not in DTYPES]
    if quantised:
        raise UserError(f"tensors are not stored in one of {', '.join(DTYPES)}: {few(quantised)}")
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]


def check_size(cfg: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Check that the weights can be those of as many layers and about as many numbers as config.json says, before a
    model of them is built.

    Raises:
        UserError: there are fewer tensors than layers, or far fewer numbers than the model has.
    """
    if cfg.n_layers > len(stored):
        raise UserError(
            f"tensors do not fit config.json: it says {cfg.n_layers} layers, and there are {len(stored)} tensors"
        )
    there = sum(math.prod(tensor.shape) for tensor in stored.values())
    if cfg.n_weights > FEWER * max(there, 2**20):
        raise UserError(
            f"tensors do not fit config.json: it says {cfg.n_weights} weights, and the tensors have {there}"
        )


FEWER = 4
"""How many times fewer weights there may be for :func:`match_tensors` to say which are missing."""


def match_tensors(
    model: HookedTransformer, format: Format, stored: Mapping[str, StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    """Return which tensors each parameter and buffer of `model` takes, by name; the model may be on `meta`.

    Raises:
        UserError: tensors are missing, unknown or of another shape than config.json says; all are listed.
    """
    cfg, found, problems = model.cfg, dict[str, dict[str, StoredTensor]](), list[str]()
    unknown = {name for name in stored if not re.search(format.ignored, name)}
    for parameter, weight in model.state_dict(keep_vars=True).items():
        names = format.tensor_names(parameter, cfg)
        unknown -= set(names)
        found[parameter] = {name: stored[name] for name in names if name in stored}
        problems += [f"{name} is missing" for name in names if name not in stored]
        shape = tuple(format.to_stored(parameter, weight.to("meta"), cfg).shape)[len(names) > 1 :]
        for name, tensor in found[parameter].items():
            try:
                got = tuple(format.part(parameter, torch.empty(tensor.shape, device="meta"), cfg).shape)
            except (RuntimeError, IndexError):  # it cannot be divided into what it should hold
                got = tensor.shape
            if got != shape:
                held = "" if got == tensor.shape else f" and holds {list(got)!r:.80}"
                problems.append(f"{name} is {list(tensor.shape)!r:.80}{held}, not {list(shape)}")
    if cfg.tie_word_embeddings:
        unknown.discard(format.tensor_name("unembed.W_U"))  # a copy that `check_tied` compares
    problems += [f"{name} is unknown" for name in sorted(unknown)]
    if problems:
        raise UserError(f"tensors do not fit config.json: {few(problems, '; ')}{_wrapped(stored)}")
    return found


WRAPPERS = {
    "_orig_mod.": "torch.compile put before them; save the state_dict of the model that it wraps, `model._orig_mod`",
    "base_model.model.": "PEFT put before them; merge the adapter first: `model.merge_and_unload().save_pretrained(…)`",
    "module.": "DataParallel put before them; save the state_dict of the model that it wraps, `model.module`",
}
"""What stands before the names of tensors that were saved of a wrapped model."""


def _wrapped(stored: Mapping[str, StoredTensor]) -> str:
    """Say what stands before the names of all tensors, if it is something that is known."""
    for prefix, said in WRAPPERS.items():
        if all(name.startswith(prefix) for name in stored):
            return f". All names begin with {prefix!r}, which {said}"
    return ""


def check_tied(format: Format, stored: Mapping[str, StoredTensor]) -> None:
    """Check that the unembedding is the embedding, where the file has both though they are tied.

    Raises:
        UserError: they differ.
    """
    embedding, unembedding = format.tensor_name("embed.W_E"), format.tensor_name("unembed.W_U")
    if unembedding not in stored:
        return
    with open_shard(stored[embedding].path) as first, open_shard(stored[unembedding].path) as second:
        one, other = first.get_tensor(embedding), second.get_tensor(unembedding)
        if one.dtype != other.dtype or not torch.equal(one, other):
            raise UserError(f"config.json ties {unembedding} to {embedding}, but the two differ; correct config.json")


def load_weights(
    model: HookedTransformer,
    format: Format,
    found: Mapping[str, Mapping[str, StoredTensor]],
    devices: Mapping[str, torch.device],
    dtype: torch.dtype,
) -> None:
    """Replace the parameters of `model` by those on disk, one after the other, shard by shard.

    Raises:
        UserError: a tensor is not as this package saved it, or holds numbers that are not finite.
    """
    by_shard: dict[Path, list[tuple[str, str, int]]] = {}
    for parameter, tensors in found.items():
        for index, (name, tensor) in enumerate(tensors.items()):
            by_shard.setdefault(tensor.path, []).append((parameter, name, index))
    stacks: dict[str, Tensor] = {}
    for path, wanted in by_shard.items():
        with open_shard(path) as shard:
            digests = saved_digests(shard.metadata())
            for parameter, name, index in wanted:
                stored, device = shard.get_tensor(name), _device_of(parameter, devices)
                if name in digests and digests[name] != tensor_digest(stored):
                    raise UserError(f"{path}: {name} is not as it was saved; train it again, or get another copy")
                part = format.part(parameter, stored, model.cfg)
                # The tensor read is a view of the mapped file: without a copy it would keep all of the file mapped.
                if len(found[parameter]) == 1:
                    placed = part.to(device, dtype, copy=True)
                    _set(model, format, parameter, placed)
                else:
                    if parameter not in stacks:
                        shape = (len(found[parameter]), *part.shape)
                        stacks[parameter] = torch.empty(shape, dtype=dtype, device=device)
                    placed = stacks[parameter][index].copy_(part)
                if not_finite({name: placed}):
                    raise UserError(
                        f"{path}: tensor {name} has NaN or infinite numbers in {str(dtype).removeprefix('torch.')}; "
                        "load it in another dtype, or download the file again"
                    )
    for parameter, stack in stacks.items():
        _set(model, format, parameter, stack)


def _device_of(name: str, devices: Mapping[str, torch.device]) -> torch.device:
    """Return where a parameter goes; a buffer goes with the parameters of its module, or else with the embedding."""
    module = name.rpartition(".")[0]
    beside = (device for other, device in devices.items() if other.startswith(f"{module}."))
    return devices.get(name) or next(beside, devices["embed.W_E"])


def _set(model: HookedTransformer, format: Format, parameter: str, weight: Tensor) -> None:
    module, _, leaf = parameter.rpartition(".")
    weight, owner = format.from_stored(parameter, weight, model.cfg), model.get_submodule(module)
    setattr(owner, leaf, weight if leaf in dict(owner.named_buffers(recurse=False)) else nn.Parameter(weight))


def save_weights(model: HookedTransformer, format: Format, folder: Path, max_shard_size: int | str) -> None:
    """Write all parameters under the format's names, and an index if they take more than one file."""
    tensors: dict[str, Tensor] = {
        format.tensor_name(name): format.to_stored(name, weight.detach(), model.cfg)
        for name, weight in model.state_dict(keep_vars=True).items()
    }
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_tensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
