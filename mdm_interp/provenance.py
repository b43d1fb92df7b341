"""Provenance: which code, versions and machine made a model or a result.

    runs/<digest>/made_with.json      what trained the run, each stretch of training with its first step

The file is a list, as a run may be resumed by something else. Code and versions are compared (:func:`difference`); the
processor, its threads, the device and the number format are only recorded, for whoever asks why last digits differ.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mdm_interp.files import json_digest, parse_json, read_text, write_text
from mdm_interp.meaning import meaning
from mdm_interp.version import version_of

FILE = "made_with.json"

# ---- of a result


def versions(*functions: Callable[..., Any]) -> dict[str, str]:
    """Return what decides the numbers of functions: the digest of what their code means, and the versions of those
    packages of :data:`DECIDING` that it uses."""
    meant = meaning(*functions)
    used = [package for package in DECIDING if package.replace("-", "_") in meant.packages]
    return {"code": meant.digest, **{name: _release(importlib.metadata.version(name)) for name in used}}


def _release(version: str) -> str:
    """Return a version without what it was built for, as in 2.13.0+cpu."""
    return version.partition("+")[0]


DECIDING = ("numpy", "scipy", "torch", "transformer-lens")
"""Packages that compute."""


def environment(trainer: Callable[..., Any]) -> dict[str, Any]:
    """Return what a result is measured with that does not decide its numbers: versions, and the :func:`machine`.

    Args:
        trainer: What trains the models that it is measured on. The digest of its code says which of them it trained.
    """
    return {**_installed("mdm-interp"), "training": meaning(trainer).digest, **machine()}


def machine() -> dict[str, Any]:
    """Return the processor, its instruction set, the threads with which torch computes, its BLAS, and the platform."""
    blas = "MKL" if torch.backends.mkl.is_available() else "another"
    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "blas": blas,
        "platform": platform.platform(),
    }


@cache
def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _installed(*packages: str) -> dict[str, str]:
    """Return the versions of packages and of Python."""
    return {**{name: version_of(name) for name in packages}, "python": platform.python_version()}


# ---- of a model


def provenance(trainer: Callable[..., Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a model that is trained now is made with: packages, Python, machine, device and number format.

    Args:
        trainer: What trains it. The digest of what its code means is given as `training`.
        device: As torch names it; of a GPU the model is recorded.
    """
    named = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    return {
        **_installed("mdm-interp", "numpy", "torch"),
        "training": meaning(trainer).digest,
        **machine(),
        "device": named,
        "dtype": str(dtype).removeprefix("torch."),
    }


def stamp(folder: Path, step: int, made_by: Mapping[str, Any]) -> None:
    """Record in a model's folder that `made_by` goes on with its training.

    Args:
        step: The first step that it takes; 0 makes the initial weights. What was recorded from there on left no trace
            in the model, and is dropped.
        made_by: A :func:`provenance`.
    """
    recorded = made_with(folder)
    kept = [one for one in recorded if one["step"] < step]
    if not kept or kept[-1] != {"step": kept[-1]["step"], **made_by}:
        kept.append({"step": step, **made_by})
    if kept != recorded:
        write_text(folder / FILE, json.dumps([one | {DIGEST: json_digest(one)} for one in kept], indent=2) + "\n")


def made_with(folder: Path) -> list[dict[str, Any]]:
    """Read what trained the model in a folder: a provenance for each stretch of training, with its first `step`.

    One without provenance, `{"step": 0}`, is of training that nothing is known of: the file is missing, damaged or
    edited.
    """
    try:
        recorded = parse_json(read_text(folder / FILE))
        said = [{name: value for name, value in one.items() if name != DIGEST} for one in recorded]
        is_whole = all(one.get(DIGEST) in (None, json_digest(kept)) for one, kept in zip(recorded, said, strict=True))
        if is_whole and said[0]["step"] == 0 and all(one["step"] >= 0 for one in said):
            return said
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        pass
    return [{"step": 0}]


DIGEST = "digest"
"""Of what each stretch says. Files of before have none."""


def tally(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Count models by what trained them: the number of `runs`, and the different provenances `by` which each of them
    was trained."""
    counted: Counter[str] = Counter()
    for folder in folders:
        stretches = ({name: value for name, value in one.items() if name != "step"} for one in made_with(folder))
        different = dict.fromkeys(json.dumps(one, sort_keys=True) for one in stretches)
        counted[f"[{', '.join(different)}]"] += 1
    return [{"runs": n, "by": json.loads(by)} for by, n in counted.most_common()]


def difference(made_by: Sequence[Mapping[str, Any]], here: Mapping[str, Any]) -> str:
    """Say in which code and versions the provenances of a model are not those of `here`; empty where they agree.

    Args:
        here: As :func:`versions` and :func:`environment` return it. Only what both name is compared, and no machine.
    """
    compared, said = here.keys() - machine().keys(), list[str]()
    for one in made_by:
        shared = [name for name in one if name in compared]
        pairs = [(name, _release(one[name]), _release(here[name])) for name in shared]
        others = [f"{name} {theirs} instead of {ours}" for name, theirs, ours in pairs if theirs != ours]
        said.append(", ".join(others) if shared else "unknown code and versions")
    return " and ".join(dict.fromkeys(filter(None, said)))
