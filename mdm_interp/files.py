"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEFAULT_ROOT = Path("runs")
"""Where the run store is, unless one says otherwise."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place on success and is removed on failure.

    The content reaches the disk before the name does, so a reader sees the old file or the new one, never part of one.
    A link stays a link: the file that it leads to is replaced. What is no file, such as a pipe or `/dev/null`, is
    yielded itself and written to.

    Raises:
        OSError: the file cannot be written. The error names `path`, whatever was being written.
    """
    path = Path(path)
    with _naming(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            yield path
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:SHOWN]}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o644)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


SHOWN = 50
"""How much of a file's name its temporary file has: the whole might be too long with what is added."""


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise what a file system refuses as an error about `path`. Rust libraries say it in their text alone."""
    try:
        yield
    except Exception as error:
        hidden = re.search(r"\(os error (\d+)\)", str(error))
        number = getattr(error, "errno", None) or (int(hidden[1]) if hidden else None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def check_file(path: Path) -> Path:
    """Return `path` if a file can be put there, before anything is done for it. Nothing is left there.

    Raises:
        OSError: it is a folder, is below a file, or cannot be written.
    """
    with _naming(path), contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return path
    with _naming(path):
        check_folder(Path(os.path.realpath(path)).parent)
    return path


def check_folder(path: Path) -> Path:
    """Return `path` if files can be put into that folder, which need not be there yet. Nothing is left there.

    Raises:
        OSError: it is a file, is below one, or cannot be written to.
    """
    with _naming(path):
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=there):
            return path


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
    """Write `text` to `path`, atomically.

    Raises:
        OSError: as :func:`replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_digest(content: Any) -> str:
    """Return 16 hexadecimal digits that depend on all that a JSON value says, and not on how it is written down."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporary files and folders below a folder that a killed process left. Those of the last hour may be
    another process's that is about to put them into place, and stay."""
    for leftover in list(Path(folder).rglob(".*.tmp")):
        with contextlib.suppress(FileNotFoundError):  # it has been put into place, or someone else removed it
            if time.time() - leftover.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


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
