"""Summaries: tables of estimates with named columns.

summary = Summary.of(frame, by=("scheme", "stage"), quantities=("selectivity", "reverse_probability"))
summary.at("selectivity", scheme="rope", stage="end")       # an estimate
summary.null("selectivity", scheme="rope", stage="end")     # that of the column `selectivity_null`
summary.where(stage="end").frame                            # as a table
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from mdm_interp.errors import UserError
from mdm_interp.stats.estimates import NOTHING, Contrast, Estimate, mean_estimate
from mdm_interp.stats.tables import estimate_in


@dataclass(frozen=True)
class Entry:
    """One estimate of a summary."""

    quantity: str
    of: Mapping[str, Any]
    """What it is of: the value of each named column."""
    effect: Estimate
    null: Estimate | None = None
    """None where the quantity has no null."""


@dataclass(frozen=True)
class Summary:
    """Estimates by quantity and named columns."""

    entries: Sequence[Entry] = ()

    @classmethod
    def of(cls, frame: pd.DataFrame, by: Sequence[str], quantities: Sequence[str]) -> Summary:
        """Estimate the mean of columns over the rows of each group, one row per independent observation.

        Args:
            by: The columns that tell groups apart; with none, all rows are one group.
            quantities: The columns. A column `NAME_null` is the null of `NAME`.
        """
        groups = frame.groupby(list(by), sort=False) if by else [((), frame)]
        return cls(
            [
                Entry(name, dict(zip(by, map(_plain, values), strict=True)), mean_estimate(group[name]), null)
                for values, group in groups
                for name in quantities
                for null in [mean_estimate(group[f"{name}_null"]) if f"{name}_null" in group else None]
            ]
        )

    @classmethod
    def read(cls, frame: pd.DataFrame, by: Sequence[str], quantities: Sequence[str]) -> Summary:
        """Read the estimates that rows hold, as :func:`~mdm_interp.stats.tables.as_columns` writes them; those of
        nothing are left out."""
        read = [
            Entry(
                name,
                {column: _plain(row[column]) for column in by},
                estimate_in(row, name),
                estimate_in(row, f"{name}_null") if f"{name}_null" in row else None,
            )
            for row in frame.to_dict("records")
            for name in quantities
        ]
        return cls([entry for entry in read if entry.effect.n])

    def __add__(self, other: Summary) -> Summary:
        return Summary([*self.entries, *other.entries])

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return self.frame.to_string()

    def at(self, quantity: str, **of: Any) -> Estimate:
        """Return one estimate; that of nothing where nothing was measured.

        Args:
            of: The value of every column that such estimates are told apart by.

        Raises:
            UserError: the summary has no such quantity by these columns, or this one twice.
        """
        return self._entry(quantity, of).effect

    def null(self, quantity: str, **of: Any) -> Estimate:
        """Return the null of one estimate, as :meth:`at`."""
        return self._entry(quantity, of).null or NOTHING

    def contrast(self, quantity: str, **of: Any) -> Contrast[Estimate]:
        """Return one estimate and its null, as :meth:`at`."""
        return Contrast(self.at(quantity, **of), self.null(quantity, **of))

    def where(self, quantity: str | None = None, **of: Any) -> Summary:
        """Return the estimates of a quantity and of these values of some columns."""
        return Summary(
            [entry for entry in self.entries if quantity in (None, entry.quantity) and of.items() <= entry.of.items()]
        )

    @property
    def columns(self) -> list[str]:
        """The named columns, in the order in which they first come."""
        return list(dict.fromkeys(column for entry in self.entries for column in entry.of))

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The summary as a table: the named columns, `quantity`, `value`, `low`, `high` and `n`, and the same of the
        null where there is one."""
        rows = [
            {**entry.of, "quantity": entry.quantity, **vars(entry.effect)}
            | ({f"null_{name}": value for name, value in vars(entry.null).items()} if entry.null else {})
            for entry in self.entries
        ]
        return pd.DataFrame(rows)

    def _entry(self, quantity: str, of: Mapping[str, Any]) -> Entry:
        if (quantity, frozenset(of)) not in self._known:
            known = sorted({f"{name} by {', '.join(sorted(columns)) or 'nothing'}" for name, columns in self._known})
            raise UserError(
                f"quantity: the summary has no {quantity!r} by {', '.join(sorted(of)) or 'nothing'}; ask for one of "
                f"{'; '.join(known)[:300]}"
            )
        return self._index.get((quantity, frozenset(of.items())), Entry(quantity, of, NOTHING))

    @cached_property
    def _index(self) -> dict[tuple[str, frozenset[tuple[str, Any]]], Entry]:
        index: dict[tuple[str, frozenset[tuple[str, Any]]], Entry] = {}
        for entry in self.entries:
            key = entry.quantity, frozenset(entry.of.items())
            if key in index:
                raise UserError(
                    f"quantity: the summary has {entry.quantity!r} of {', '.join(map(str, entry.of.values()))} twice; "
                    "name the columns that tell them apart"
                )
            index[key] = entry
        return index

    @cached_property
    def _known(self) -> set[tuple[str, frozenset[str]]]:
        return {(entry.quantity, frozenset(entry.of)) for entry in self.entries}


def _plain(value: Any) -> Any:
    """Return a value of Python's own type."""
    return value.item() if hasattr(value, "item") else value
