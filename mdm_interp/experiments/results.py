"""Results: what an analysis measured, as one JSON file from which its figure is drawn without a model."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from mdm_interp.config import one_line
from mdm_interp.errors import UserError
from mdm_interp.files import PARTS, json_digest, parse_json, read_text, write_text
from mdm_interp.stats.summary import Summary

DIGITS = 6


class _Origin(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainedOrigin(_Origin):
    """Models that were trained to be measured."""

    kind: Literal["runs", "demos"]
    """Runs, or demo checkpoints."""
    runs: list[str]
    """The digest of each one's config."""
    first_seed: list[dict[str, Any]]
    """The configs of the first seed."""


class CheckpointOrigin(_Origin):
    """A checkpoint, and what it was asked."""

    kind: Literal["checkpoint"] = "checkpoint"
    checkpoint: str
    """Its name."""
    model: dict[str, Any]
    """Its config."""
    digest: str
    """Of its config, its weights and what it was asked."""
    facts: int
    pairs: dict[str, int]
    """How many query pairs of each kind it was asked."""
    skipped: dict[str, int]
    """How many facts of each kind could not be asked."""
    reasons: dict[str, list[str]]
    """Why not, for the first of them."""
    twin: CheckpointOrigin | None


class _Stored(_Origin):
    """What a result's file holds, besides its digest."""

    name: str
    question: str
    origin: Annotated[TrainedOrigin | CheckpointOrigin, Field(discriminator="kind")]
    settings: dict[str, Any]
    seeds: list[StrictInt]
    versions: dict[str, str]
    measured_with: dict[str, Any] = {}
    made_with: list[dict[str, Any]] = []
    n_rows: Annotated[StrictInt, Field(ge=0, le=10**7)]
    columns: dict[str, list[Any] | dict[str, list[Any]]]


@dataclass(frozen=True)
class Result:
    """What one analysis measured."""

    name: str
    question: str
    """One sentence."""
    origin: TrainedOrigin | CheckpointOrigin
    """What it was measured on."""
    settings: dict[str, Any]
    """What the measurement depends on besides."""
    seeds: list[int]
    versions: dict[str, str]
    """What decides its numbers, as :func:`~mdm_interp.provenance.versions` returns it."""
    rows: list[dict[str, Any]]
    """Tidy: one measurement per row, the same columns in each."""
    measured_with: dict[str, Any] = field(default_factory=dict)
    """As :func:`~mdm_interp.provenance.environment` returns it. Measured with something else, it is the same result."""
    made_with: list[dict[str, Any]] = field(default_factory=list)
    """What trained the runs it was measured on, as :func:`~mdm_interp.provenance.tally` counts them."""
    summarize: Callable[[Result], Summary] = field(default=lambda result: Summary(), repr=False, compare=False)
    """Its analysis' rows to the estimates quoted anywhere. Not stored."""

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        return pd.DataFrame(self.rows)

    @cached_property
    def summary(self) -> Summary:
        """The estimates quoted anywhere, each computed from the rows.

        Raises:
            UserError: the rows are not those of its analysis.
        """
        with rows_expected(self.name, "summed up"):
            return self.summarize(self)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, a field or column per line, and a digest of it all, atomically."""
        fields = {name: getattr(self, name) for name in _STORED} | {"origin": self.origin.model_dump(mode="json")}
        lines = [f"{json.dumps(name)}: {_compact(value)}" for name, value in fields.items()]
        names = dict.fromkeys(name for row in self.rows for name in row)
        columns = [f"  {json.dumps(name)}: {_column([row.get(name) for row in self.rows])}" for name in names]
        lines += [f'"n_rows": {len(self.rows)}', "\n".join(['"columns": {', ",\n".join(columns), " }"])]
        digest = json_digest(json.loads("{" + ",".join(lines) + "}"))
        write_text(path, "{\n " + ",\n ".join([f'"digest": "{digest}"', *lines]) + "\n}\n")

    @classmethod
    def load(cls, path: str | Path, summarize: Callable[[Result], Summary] | None = None) -> Result:
        """Read a result.

        Args:
            summarize: As of its analysis. Without it the result has no summary.

        Raises:
            UserError: the file is missing, is not a result, or is not as it was measured. Of one without a digest,
                which nothing tells that by, a warning says so.
        """
        try:
            content = parse_json(read_text(path, most=MOST_BYTES))
            digest = content.pop("digest", None)
            unchanged = digest in (None, json_digest(content))
            stored = _Stored.model_validate(content)
            n_rows = stored.n_rows
            if any(_length(column) != n_rows for column in stored.columns.values()):
                raise ValueError(f"a column does not have {n_rows} rows")
            columns = {name: _values(column) for name, column in stored.columns.items()}
            rows = [{name: column[i] for name, column in columns.items()} for i in range(n_rows)]
            result = cls(**{name: getattr(stored, name) for name in (*_STORED, "origin")}, rows=rows)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            said = one_line(error) if isinstance(error, ValidationError) else " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not a result file ({said}); measure it again") from error
        if not unchanged:
            raise UserError(
                f"{path}: is not as it was measured, but edited or damaged; delete it, and measure it again"
            )
        if digest is None:
            warnings.warn(f"{path}: has no digest: it cannot be checked; measure it again", stacklevel=2)
        return replace(result, summarize=summarize) if summarize else result

    def same_measurement(self, other: Result) -> bool:
        """Tell whether measuring again would repeat this: the same settings, models and seeds, and code and packages
        that mean the same."""

        def identity(result: Result) -> str:
            """Write what it is known by as JSON, which knows no tuples."""
            origin = result.origin.model_dump(mode="json")
            return json.dumps([result.name, origin, result.settings, result.seeds, result.versions], sort_keys=True)

        return identity(self) == identity(other)


@contextlib.contextmanager
def rows_expected(name: str, done: str) -> Iterator[None]:
    """Raise whatever rows that are not those of an analysis end in as one error, which says what could not be done."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}.json: its rows cannot be {done} ({type(error).__name__}: {said}); measure it again"
        ) from error


MOST_BYTES = 2**28
"""Of the largest result that is read."""
_STORED = ("name", "question", "settings", "seeds", "versions", "measured_with", "made_with")


def _column(values: list[Any]) -> str:
    """Return a column as JSON: its values one by one or, if that is shorter, its different values and in which runs of
    how many rows they come."""
    whole = _compact(values)
    different = dict.fromkeys((type(value), value) for value in values)
    if len(different) > len(values) // 2:
        return whole
    place = {value: i for i, value in enumerate(different)}
    runs = [
        [place[value], len(list(group))] for value, group in itertools.groupby((type(value), value) for value in values)
    ]
    coded = _compact({"values": [value for _, value in different], "runs": runs})
    return min(whole, coded, key=len)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _length(column: list[Any] | dict[str, Any]) -> int:
    """Return how many values a stored column has, before they are written out."""
    return len(column) if isinstance(column, list) else sum(max(count, 0) for _, count in column["runs"])


def _values(column: list[Any] | dict[str, Any]) -> list[Any]:
    """Return the values of a stored column."""
    if isinstance(column, list):
        return column
    return [column["values"][i] for i, count in column["runs"] for _ in range(count)]


def tidy(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows as JSON holds them, each with every column: floats to 6 significant digits, NaN and what is missing
    as null."""
    names = dict.fromkeys(str(name) for row in rows for name in row)
    return [{**dict.fromkeys(names), **plain(dict(row))} for row in rows]


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: of Python's own types, floats to 6 significant digits, NaN as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value  # a number of numpy or torch
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


class Parts:
    """The rows of single subjects, kept beside a result while it is being measured: whoever measures it again after
    being interrupted, or together with others, goes on from them.

    Args:
        out: Folder of the result.
        planned: The result as it will be.
    """

    def __init__(self, out: Path, planned: Result) -> None:
        self.folder = out / PARTS.replace("*", planned.name)
        self.of = {"settings": planned.settings, "versions": planned.versions}

    def load(self, subject: str) -> list[dict[str, Any]] | None:
        """Return the rows of a subject; None where there are none, or they are damaged or of other settings or code."""
        try:
            content = parse_json(read_text(self.folder / f"{subject}.json", most=MOST_BYTES))
            whole = content["digest"] == json_digest(content["rows"])
            return content["rows"] if whole and content["of"] == json.loads(json.dumps(self.of)) else None
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return None

    def save(self, subject: str, rows: list[dict[str, Any]]) -> None:
        """Keep the tidy rows of a subject."""
        content = {"of": self.of, "digest": json_digest(rows), "rows": rows}
        with contextlib.suppress(FileNotFoundError):  # whoever measures the same was done first, and deletes all
            write_text(self.folder / f"{subject}.json", json.dumps(content, allow_nan=False))

    def delete(self) -> None:
        """Remove all that is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
