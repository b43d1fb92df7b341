"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DEFAULT_ROOT = Path("runs")
"""Where the run store is, unless one says otherwise."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place on success and is removed on failure.

    The content reaches the disk before the name does, so a reader sees the old file or the new one, never part of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_text(path: str | Path, most: int = 2**24) -> str:
    """Read a text file (UTF-8), which a stranger may have written.

    Raises:
        OSError: it cannot be read, is no regular file, or holds more than `most` bytes.
        ValueError: it is not UTF-8, or `path` cannot name a file.
    """
    require_file(path, most)
    return Path(path).read_text(encoding="utf-8")


def require_file(path: str | Path, most: int | None = None) -> None:
    """Refuse what is no regular file: reading a FIFO or a device may never end.

    Raises:
        OSError: it is none, is not there, or holds more than `most` bytes.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")
    if most is not None and found.st_size > most:
        raise OSError(f"it has {found.st_size} bytes, and at most {most} are read")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporary files below a folder that a killed process left. Those of the last hour may be another
    process's that is about to put them into place, and stay."""
    for leftover in Path(folder).rglob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it has been put into place, or someone else removed it
            if time.time() - leftover.stat().st_mtime > LEFT_SECONDS:
                leftover.unlink()


LEFT_SECONDS = 3600.0
"""From what age on nobody is writing a temporary file any more."""


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the lock of a file, after whoever holds it now. A file system without locks gives none: there, those who
    write one thing rely on writing whole files that are alike.

    Raises:
        OSError: the file cannot be written.
    """
    from filelock import FileLock  # which the command line's help need not wait for

    lock = FileLock(path, fallback_to_soft=False)  # a soft lock outlives a host that died with it
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks answer."""
