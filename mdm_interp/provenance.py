"""Provenance: which code, versions and machine made a model or a result.

    runs/<digest>/made_with.json      what trained the run, each stretch of training with its first step

The file is a list, as a run may be resumed by something else. Code and versions are compared (:func:`difference`); the
processor, its threads, the device and the number format are only recorded, for whoever asks why last digits differ.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import torch

from mdm_interp.files import write_text

FILE = "made_with.json"

LATER = ("mdm_interp.claims", "mdm_interp.cli", "mdm_interp.provenance", "mdm_interp.viz", "mdm_interp.workers")
"""Modules that no number depends on: how it is judged, looks, and is recorded, and by which process it is measured."""

TRAINERS = ("mdm_interp.training", "mdm_interp.demo")
"""Modules that train. What they train names their code by the module's name, and so does what is measured on it."""


# ---- of a result


@cache
def versions(analysis: str) -> dict[str, str]:
    """Return what the numbers of an analysis are made with: packages, Python, and digests of sources.

    `code` is that of all that makes them; the part of it that trains is told by the names of :data:`TRAINERS`.

    Args:
        analysis: Name of its module.
    """
    found = sources(analysis)
    training = {trainer: code(trainer) for trainer in TRAINERS if trainer in found}
    packages = _installed("mdm-interp", "numpy", "scipy", "torch", "transformer-lens")
    return {**packages, "code": code(analysis), **training}


def machine() -> dict[str, Any]:
    """Name the processor, and count the threads with which torch computes."""
    return {"cpu": _cpu(), "threads": torch.get_num_threads()}


@cache
def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _installed(*packages: str) -> dict[str, str]:
    """Return the versions of packages and of Python."""
    return {**{name: importlib.metadata.version(name) for name in packages}, "python": platform.python_version()}


# ---- of a model


def provenance(trainer: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a model that is trained now is made with: packages, Python, machine, device and number format.

    Args:
        trainer: Name of the module that trains, one of :data:`TRAINERS`. The digest of its code is given under it.
        device: As torch names it; of a GPU the model is recorded.
    """
    named = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    return {
        **_installed("mdm-interp", "numpy", "torch"),
        trainer: code(trainer),
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
        write_text(folder / FILE, json.dumps(kept, indent=2) + "\n")


def made_with(folder: Path) -> list[dict[str, Any]]:
    """Read what trained the model in a folder: a provenance for each stretch of training, with its first `step`.

    One without provenance, `{"step": 0}`, is of training that nothing is known of: the file is missing or damaged.
    """
    try:
        recorded = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if recorded[0]["step"] == 0 and all(one["step"] >= 0 for one in recorded):
            return recorded
    except (OSError, ValueError, TypeError, LookupError):
        pass
    return [{"step": 0}]


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
        here: As :func:`versions` returns it. Only what both name is compared.
    """
    said: list[str] = []
    for one in made_by:
        shared = [name for name in one if name in here]
        others = [f"{name} {one[name]} instead of {here[name]}" for name in shared if one[name] != here[name]]
        said.append(", ".join(others) if shared else "unknown code and versions")
    return " and ".join(dict.fromkeys(filter(None, said)))


# ---- code


@cache
def code(module: str) -> str:
    """Digest the sources of a module and of all it reaches."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources(module).values())).hexdigest()[:16]


def sources(module: str) -> dict[str, Path]:
    """Find the source of a module and of all that it imports from `mdm_interp` and its own package, directly or through
    others: module name to file, in the order of names. Read off the import statements; nothing else is imported.

    Left out are the modules of :data:`LATER` and what only they import.
    """
    loaded = importlib.import_module(module)
    name = loaded.__spec__.name if loaded.__spec__ else module  # not `__main__`, under `python -m`
    assert loaded.__file__ is not None
    packages = {name.split(".")[0], __name__.split(".")[0]}
    found, waiting = {name: Path(loaded.__file__)}, [name]
    while waiting:
        importing = waiting.pop()
        for imported, _ in _imports(importing, found[importing]):
            reached, path = _resolved(imported, packages)
            if path is not None and reached not in found:
                found[reached] = path
                waiting.append(reached)
    return dict(sorted(found.items()))


def _imports(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """What the import statements of a module import, and the name it is bound to."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((f"{source}.{alias.name}", alias.asname or alias.name) for alias in node.names)


def _resolved(imported: str, packages: AbstractSet[str]) -> tuple[str, Path | None]:
    """The module of `packages` that an imported name is, or comes from; a package that only hands it on is passed
    through."""
    if imported.split(".")[0] not in packages or any(f"{imported}.".startswith(f"{later}.") for later in LATER):
        return imported, None
    path = _file(imported)
    if path is not None or "." not in imported:
        return imported, path
    package, _, name = imported.rpartition(".")
    path = _file(package)
    if path is not None and path.name == "__init__.py":
        for handed_on, bound in _imports(package, path):
            if bound == name and handed_on != imported:
                return _resolved(handed_on, packages)
    return package, path


def _file(module: str) -> Path | None:
    """The source of a module of a package that is already imported."""
    top, *parts = module.split(".")
    for folder in getattr(sys.modules.get(top), "__path__", ()):
        place = Path(folder, *parts)
        for path in (place / "__init__.py", *([place.with_name(f"{place.name}.py")] if parts else [])):
            if path.is_file():
                return path
    return None
