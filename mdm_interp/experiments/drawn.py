"""What was drawn into a folder, from what, and whether it is there still, as it was written.

figures/.drawn      {"figures": {NAME: {"from": DIGEST, "files": [FILE, …]}}, "pages": …, "digests": {FILE: DIGEST}}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from mdm_interp.files import file_digest, parse_json, read_text, write_text

FILE = ".drawn"
PARTS = ("figures", "pages", "digests")
Kind = Literal["figures", "pages"]


def is_drawn(out: Path, kind: Kind, names: Collection[str], source: str) -> bool:
    """Tell whether all of some analyses' figures, or pages, are in a folder as they were written.

    Args:
        source: A digest of what they are drawn from.
    """
    made = _read(out)
    try:
        drawn = [made[kind][name] for name in names]
        files = {file for one in drawn for file in one["files"]}
        is_whole = all(file_digest(out / file) == made["digests"][file] for file in files)
        return is_whole and all(one["from"] == source for one in drawn)
    except (OSError, LookupError, TypeError):
        return False


def record_drawn(out: Path, kind: Kind, source: str, files: Mapping[str, Collection[str]]) -> None:
    """Record the figures, or pages, that were written.

    Args:
        files: Of each analysis, what has to be there for it. Several may share a file.
    """
    made = _read(out)
    made[kind] |= {name: {"from": source, "files": sorted(of_one)} for name, of_one in files.items()}
    made["digests"] |= {file: file_digest(out / file) for file in set().union(*files.values())}
    write_text(out / FILE, json.dumps(made, indent=1) + "\n")


def _read(out: Path) -> dict[str, dict[str, Any]]:
    """Return what is recorded; nothing where that is damaged."""
    try:
        made = dict(parse_json(read_text(out / FILE)))
    except (OSError, ValueError, TypeError):
        made = {}
    return {part: made[part] if isinstance(made.get(part), dict) else {} for part in PARTS}
