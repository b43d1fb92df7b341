"""How a command ended, and what it left behind."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def assert_refused(ended: Ended, *says: str) -> None:
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("mdm-interp: ")
    assert ended.err.count("\n") == 1
    assert ended.err.endswith("\n")
    for part in says:
        assert part in ended.err
