"""Results: what an analysis measured, as one JSON file from which its figure is drawn without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from mdm_interp.files import UserError, write_text
from mdm_interp.stats import Estimate

DIGITS = 6


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
    """As :func:`~mdm_interp.provenance.versions` returns them."""
    rows: list[dict[str, Any]]
    """Tidy: one measurement per row, the same columns in each."""
    summary: dict[str, Estimate]
    """The figures quoted anywhere, each computed from the rows."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Processor and threads it was measured with. Measured with others, it is the same result."""
    made_with: list[dict[str, Any]] = field(default_factory=list)
    """What trained the runs it was measured on, as :func:`~mdm_interp.provenance.tally` counts them."""

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
