"""How a command ended, and what it left behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def assert_refused(ended: Ended, *says: str) -> None:
    """One line says what is wrong. Where the machine is busy, lines of progress may come before it."""
    assert ended.code == 2, ended
    assert ended.out == ""
    *progress, line = ended.err.splitlines()
    assert all(re.match(r"(measuring|training|drawing) .*: \d+ of \d+", one) for one in progress), ended.err
    assert line.startswith("mdm-interp: ")
    assert ended.err.endswith("\n")
    for part in says:
        assert part in line
