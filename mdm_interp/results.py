"""Results: what an analysis measured, as one JSON file from which its figure is drawn without a model."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from mdm_interp.files import UserError, write_text
from mdm_interp.stats import Estimate

DIGITS = 6


LATER = ("mdm_interp.claims", "mdm_interp.cli", "mdm_interp.viz", "mdm_interp.workers")
"""Modules that no number depends on: how it is judged, looks, and by which process it is measured."""


@cache
def versions(analysis: ModuleType) -> dict[str, str]:
    """What the numbers of an analysis are made with; `code` is a digest of the sources that make them."""
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources(analysis).values())).hexdigest()[:16]
    packages = {name: importlib.metadata.version(name) for name in ("mdm-interp", "torch", "transformer-lens")}
    return {**packages, "python": platform.python_version(), "code": code}


def sources(analysis: ModuleType) -> dict[str, Path]:
    """The source of an analysis and of all that it imports from `mdm_interp` and its own package, directly or through
    others: module name to file, in the order of names. Read off the import statements; nothing is imported.

    Left out are the modules of :data:`LATER` and what only they import.
    """
    name = analysis.__spec__.name if analysis.__spec__ else analysis.__name__  # not `__main__`, under `python -m`
    assert analysis.__file__ is not None
    packages = {name.split(".")[0], __name__.split(".")[0]}
    found, waiting = {name: Path(analysis.__file__)}, [name]
    while waiting:
        importing = waiting.pop()
        for imported, _ in _imports(importing, found[importing]):
            module, path = _resolved(imported, packages)
            if path is not None and module not in found:
                found[module] = path
                waiting.append(module)
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


@dataclass(frozen=True)
class Result:
    """What one analysis measured."""

    name: str
    question: str
    """One sentence."""
    config: dict[str, Any]
    """Everything needed to measure it again."""
    seeds: list[int]
    versions: dict[str, str]
    rows: list[dict[str, Any]]
    """Tidy: one measurement per row, the same columns in each."""
    summary: dict[str, Estimate]
    """The figures quoted anywhere, each computed from the rows."""

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        return pd.DataFrame(self.rows)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, one row per line, atomically."""
        content = asdict(self)
        rows = ",\n    ".join(json.dumps(row, allow_nan=False) for row in content.pop("rows"))
        content["summary"] = _plain(content["summary"])
        head = json.dumps(content, indent=2, allow_nan=False)
        write_text(path, head.removesuffix("\n}") + f',\n  "rows": [\n    {rows}\n  ]\n}}\n')

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a result.

        Raises:
            UserError: the file is missing or is not a result.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            missing: dict[str, Any] = dict.fromkeys(("value", "low", "high"), float("nan"))
            content["summary"] = {
                name: Estimate(**missing | {key: number for key, number in estimate.items() if number is not None})
                for name, estimate in content["summary"].items()
            }
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a result file ({error}); measure it again") from error

    def same_measurement(self, other: Result) -> bool:
        """Whether measuring again would repeat this: same question, settings, seeds, code and packages."""

        def settings(result: Result) -> str:
            """As JSON, which knows no tuples."""
            made = (result.name, result.question, result.config, result.seeds, result.versions)
            return json.dumps(made, sort_keys=True)

        return settings(self) == settings(other)


def tidy(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as JSON holds them: floats to 6 significant digits, NaN as null."""
    return [_plain(dict(row)) for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value  # a number of numpy or torch
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
