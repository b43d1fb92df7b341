"""Damage as disks, copies and editors do it: a bit that is another, an end that is lost, no room."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


TOUCHES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


def killed_at_touch(number: int) -> None:
    """Have this process kill itself right before the `number`-th time that it makes, syncs, renames or deletes a
    file."""
    numbers, makes = itertools.count(1), os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        touches = event in TOUCHES or (event == "open" and bool(int(arguments[2] or 0) & makes))
        if touches and next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    os.fsync = lambda handle: look("os.rename", ())


@contextlib.contextmanager
def full_at(number: int) -> Iterator[list[int]]:
    """A disk with no room for the `number`-th file, folder or name that this process makes on it. Gives how many it
    has made."""
    made, events = [0], {"os.rename", "os.link", "os.mkdir"}

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on[0] and (event in events or (event == "open" and bool(int(arguments[2] or 0) & os.O_CREAT))):
            made[0] += 1
            if made[0] == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    is_on = [True]  # what listens once listens for good
    sys.addaudithook(look)
    try:
        yield made
    finally:
        is_on[0] = False
