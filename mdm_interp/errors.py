"""The exception for a user's mistakes, and how its message stays short."""

from __future__ import annotations

import re
from collections.abc import Collection, Sized
from difflib import SequenceMatcher


class UserError(ValueError):
    """A mistake in what the user gave. The message names the field or file, its value and the fix, on one line of fewer
    than 500 characters; the CLI prints it and exits with :attr:`exit_code`."""

    exit_code = 2

    def __str__(self) -> str:
        return shorten(super().__str__())


class Diverged(UserError):
    """Training whose numbers are no longer finite: nothing was wrong with what was given until it was tried."""

    exit_code = 1


class Overflow(UserError):
    """Logits that are NaN or infinite: activations are too large for the dtype."""


INTERRUPTED = "interrupted; the same command goes on from here"
"""What a command says after Ctrl-C."""
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shorten(text: str, most: int = 480) -> str:
    """Put a message on one short line. Too long a one loses its middle, as it begins with what is wrong and ends with
    what to do. Control characters, which a terminal would obey, are written out."""
    text = CONTROL.sub(lambda mark: mark[0].encode("unicode_escape").decode(), re.sub(r"\s*[\t\r\n]\s*", " ", text))
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def require_one_of(name: str, value: object, known: Collection[object]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        UserError: it is not.
    """
    if value not in known:
        raise UserError(f"{name}: {shorten(repr(value), 100)} is none of {', '.join(map(str, known))}; choose one")


def require_some(name: str, values: Sized) -> None:
    """Refuse to go on with nothing.

    Raises:
        UserError: there are no values.
    """
    if not len(values):
        raise UserError(f"{name}: got none; give at least one")


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
