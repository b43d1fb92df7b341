"""The exception for a user's mistakes."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave. The message names the field or file, its value and the fix; the CLI prints it
    on one line and exits with 2."""
