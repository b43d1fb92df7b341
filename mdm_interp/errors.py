"""The exception for a user's mistakes, and how its message stays short."""

from __future__ import annotations

from collections.abc import Collection
from difflib import SequenceMatcher


class UserError(ValueError):
    """A mistake in what the user gave. The message names the field or file, its value and the fix; the CLI prints it
    on one line and exits with :attr:`exit_code`."""

    exit_code = 2


class Diverged(UserError):
    """Training whose numbers are no longer finite: nothing was wrong with what was given until it was tried."""

    exit_code = 1


MOST = 3
"""How many of a list's items a message names."""


def few(items: Collection[object], separator: str = ", ") -> str:
    """Name the first items of a list, and say how many more there are."""
    named = [str(item) for item in list(items)[:MOST]]
    more = len(items) - len(named)
    return separator.join(named) + (f"{separator}and {more} more" if more else "")


def nearest(name: str, known: Collection[str]) -> str:
    """Name those of the known names that are most like `name`, and say how many more there are."""
    nearest_first: list[str] = sorted(known, key=lambda one: SequenceMatcher(None, name, one).ratio(), reverse=True)
    return few(nearest_first)
