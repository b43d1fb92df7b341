"""Damage as disks, copies and editors do it: a bit that is another, an end that is lost, no room."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def damaged(path: Path, places: int) -> Iterator[str]:
    """Flip a bit of a file at so many places all over it, and cut it off at each; say what was done. In the end the
    file is as it was."""
    whole, chooser = path.read_bytes(), random.Random(path.name)
    try:
        for at in dict.fromkeys(len(whole) * place // places for place in range(places)):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << chooser.randrange(8)
            for how, content in (("flipped", bytes(flipped)), ("cut off", whole[:at])):
                path.write_bytes(content)
                yield f"{path.name}: {how} at byte {at}"
    finally:
        path.write_bytes(whole)


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A disk of its own in a folder, of so many bytes, as in `16k`; skips where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)


def remount(folder: Path, options: str) -> None:
    """Change the disk in a folder, as in `size=1m` or `ro`."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, timeout=20)
