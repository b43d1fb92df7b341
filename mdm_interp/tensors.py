"""Tensors in safetensors files, each with a digest in the file's metadata, which have one of their own; all of them are
checked when they are read."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdm_interp.errors import UserError
from mdm_interp.files import json_digest, parse_json, replacing, require_file

DIGESTS, DIGEST = "digests", "digest"
"""Where metadata have the tensors' digests, a JSON object by their names, and that of all that they say themselves.
Files of before have none, or only the first."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically. The same tensors and metadata give the same bytes."""
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = {name: tensor_digest(tensor) for name, tensor in sorted(saved.items())}
    said = {**(metadata or {}), DIGESTS: json.dumps(digests)}
    with replacing(path) as temporary:
        save_file(saved, temporary, {**said, DIGEST: json_digest(said)})
        _sort_metadata(temporary)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        UserError: it is missing, truncated or not safetensors, or tensors are not as they were saved.
    """
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    try:
        require_file(path)
        with safe_open(path, "pt") as opened:
            metadata, names = opened.metadata() or {}, list(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names}
        digests = saved_digests(metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); delete the folder {folder} to train the run again"
        ) from error
    for name in digests and sorted(digests.keys() | tensors.keys()):
        if name not in tensors or digests.get(name) != tensor_digest(tensors[name]):
            raise UserError(f"{path}: {name} is not as it was saved; delete the folder {folder} to train the run again")
    return tensors, metadata


def saved_digests(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the digests that metadata have, by the tensors' names.

    Raises:
        SafetensorError: the metadata are not as they were saved, and so is the file.
    """
    said = dict(metadata or {})
    try:
        if said.pop(DIGEST, None) not in (None, json_digest(said)):
            raise ValueError("what it says of itself is not as it was saved")
        return dict(parse_json(said.get(DIGESTS, "{}")))
    except (ValueError, TypeError) as error:
        raise SafetensorError(f"{DIGESTS}: {error}") from error


def tensor_digest(tensor: Tensor) -> str:
    """Return 16 hexadecimal digits that depend on a tensor's dtype, its shape and every bit of it."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@torch.no_grad()
def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that depend on the names of tensors, their dtypes, their shapes and every bit of
    them, and not on the device. A model of 8 billion weights takes under a second on a GPU, where they stay.

    Words of up to 32 bits, some at a time, become the sum of each times a key of its own, modulo 2^64. Keys are odd, so
    one word that is another always changes the sum; several leave it as it was in one of 2^32 cases.

    Source: Dietzfelbinger, Universal hashing and k-wise independent random variables via integer arithmetic, 1996.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        words = tensor.contiguous().reshape(-1).view(WORDS[tensor.element_size()])
        key = _key(tensor.device)
        sums = [(part * key[: len(part)]).sum() for part in words.split(len(key))]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {torch.stack(sums).tolist()} ".encode())
    return digest.hexdigest()[:16]


WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""As what numbers are read, by their bytes."""


@functools.cache
def _key(device: torch.device) -> Int[Tensor, "word"]:
    """Return odd numbers of 64 bits, the same everywhere."""
    drawn = bytearray(hashlib.shake_256(b"weights").digest(8 * 2**20))
    return (torch.from_numpy(np.frombuffer(drawn, dtype="<i8")) | 1).to(device)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity. One on `meta` holds nothing."""
    for name, tensor in tensors.items():
        if (
            tensor.numel() and not tensor.is_meta and not torch.stack(tensor.aminmax()).isfinite().all()
        ):  # takes no memory, as isfinite would
            return name
    return None


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file into one order: they are written in any."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "tensors would be overwritten"
        file.seek(8)
        file.write(text.ljust(size))
