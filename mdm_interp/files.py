"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mdm_interp.errors import UserError

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
        temporary, mode = _begun(target)
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(mode)  # libraries may have put a file of theirs there
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _begun(target: Path) -> tuple[Path, int]:
    """Make the temporary file of a file, and return it and the mode that it is to have in the end: that of the file
    that is there, or what the umask leaves to a new one."""
    temporary = target.parent / f".{target.name[:SHOWN]}.{secrets.token_hex(4)}.tmp"
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(target.stat().st_mode)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o600))  # a private file is never open to others
        return temporary, mode
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666))
    return temporary, stat.S_IMODE(temporary.stat().st_mode)


@contextlib.contextmanager
def replacing_all(folder: str | Path, known: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder whose files come to be in `folder` together on success, and are removed on failure.
    Files of `folder` that match the patterns `known` and are not among them are removed then; all others stay.

    A process that is killed leaves the files of before or the new ones, never some of each, where :func:`all_of` says.

    Raises:
        OSError: they cannot be written. The error names `folder`.
    """
    folder = Path(folder)
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(folder.glob(f".files.{RANDOM}.tmp"))
        with _temporary_folder(folder) as temporary:
            yield temporary
            while True:
                _put_in_place(folder, known)  # what a killed process, or another at work now, had ready
                try:
                    temporary.rename(folder / READY)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
        _put_in_place(folder, known)


READY = ".ready"
"""Folder of files that are whole, and on the way to their places in the folder around it."""


def all_of(folder: Path) -> Path:
    """Return where the files are that :func:`replacing_all` put together."""
    return folder / READY if (folder / READY).is_dir() else folder


def _put_in_place(folder: Path, known: Sequence[str]) -> None:
    """Put the files that are ready in their places. Each is linked, not moved: until all are there, nothing is missing
    where they are ready."""
    ready = folder / READY
    if not ready.is_dir():
        return
    with contextlib.suppress(FileNotFoundError), _temporary_folder(folder) as temporary:  # another process was faster
        names = os.listdir(ready)
        for name in names:
            try:
                os.link(ready / name, temporary / name)
            except OSError:  # some file systems have no links
                shutil.copyfile(ready / name, temporary / name)
            os.replace(temporary / name, folder / name)
        for path in itertools.chain.from_iterable(map(folder.glob, known)):
            if path.name not in names:
                path.unlink(missing_ok=True)
        ready.rename(temporary / READY)


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(".tmp", ".files.", folder, ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


SHOWN, RANDOM = 50, "?" * 8
"""How much of a file's name its temporary file has, as the whole might be too long with what is added; and what is
added at random."""


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


OF_SAFETENSORS = ".tmp" + "?" * 6
"""What that library calls its own temporary files."""


def check_file(path: Path) -> Path:
    """Return `path` if a file can be put there, before anything is done for it. Nothing is left there, and what a
    killed process left half written of it is removed.

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
        target = Path(os.path.realpath(path))
        _check_place(target.parent)
    _remove_old(target.parent.glob(f".{glob.escape(target.name[:SHOWN])}.{RANDOM}.tmp"))
    return path


def check_folder(path: Path) -> Path:
    """Return `path` if files can be put into that folder, which need not be there yet. Nothing is left there, and what
    a killed process left half written in it, or in its folders of :data:`PARTS`, is removed.

    Raises:
        OSError: it is a file, is below one, or cannot be written to.
    """
    with _naming(path):
        _check_place(path)
    temporary = f".*.{RANDOM}.tmp"
    _remove_old([*path.glob(temporary), *path.glob(f"{PARTS}/{temporary}"), *path.glob(OF_SAFETENSORS)])
    return path


PARTS = ".*.parts"
"""Folders in which a folder of results keeps what it was measured from."""


def _check_place(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.stat(folder)
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(one))
    with tempfile.TemporaryFile(dir=there):
        pass


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


def parse_json(text: str) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_digest(content: Any) -> str:
    """Return 16 hexadecimal digits that depend on all that a JSON value says, and not on how it is written down."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


DIGESTS = "digests.json"
"""File of a folder with a digest of each other file."""


def write_digests(folder: Path) -> None:
    """Write the digests of a folder's files, but for hidden ones and for weights, which hold their own."""
    names = sorted(path.name for path in folder.iterdir() if _has_digest(path))
    write_text(folder / DIGESTS, json.dumps({name: file_digest(folder / name) for name in names}, indent=2) + "\n")


def check_digests(folder: Path) -> None:
    """Check the files of a folder that has their digests.

    Raises:
        UserError: one is missing, or is not as it was written.
    """
    path = folder / DIGESTS
    if not os.path.lexists(path):
        return
    try:
        digests = dict(parse_json(read_text(path)))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to use the files beside it unchecked") from error
    there = {path.name for path in folder.iterdir() if _has_digest(path)}
    for name, digest in digests.items():
        if name not in there or file_digest(folder / name) != digest:
            raise UserError(
                f"{folder / name}: is missing or not as it was written; put it back, or delete the folder to make it "
                f"again ({path.name} alone, if it was changed on purpose)"
            )


def _has_digest(path: Path) -> bool:
    own = not path.name.startswith(".") and path.name != DIGESTS and path.suffix != ".safetensors"
    return own and path.is_file()


def file_digest(path: Path) -> str:
    """Return 16 hexadecimal digits that depend on all that a file holds.

    Raises:
        OSError: it cannot be read.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporary files and folders below a folder that a killed process left. Those of the last hour may be
    another process's that is about to put them into place, and stay."""
    _remove_old([*Path(folder).rglob(".*.tmp"), *Path(folder).rglob(OF_SAFETENSORS)])


def is_leftover(path: Path) -> bool:
    """Tell whether a name is of a temporary file."""
    return path.match(".*.tmp") or path.match(OF_SAFETENSORS)


def _remove_old(leftovers: Iterable[Path]) -> None:
    for leftover in list(leftovers):
        with contextlib.suppress(FileNotFoundError):  # it has been put into place, or someone else removed it
            if not _is_young(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def changed_lately(folder: Path) -> bool:
    """Tell whether something in a folder was written so lately that someone may still be at it. Locks, which are
    written by who only looks, do not count."""
    return any(_is_young(path) for path in (folder, *folder.rglob("*")) if path.name != LOCK)


def _is_young(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime <= LEFT_SECONDS


LEFT_SECONDS = 3600.0
"""From what age on nobody is writing a temporary file any more."""

LOCK = ".lock"
"""The lock of a folder."""


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, after whoever holds it now. A file system without locks gives none: there, those who
    write one thing rely on writing whole files that are alike.

    Args:
        wait: Whether to wait for another who holds it.

    Returns:
        Whether there are locks here.

    Raises:
        OSError: the file cannot be written.
        TimeoutError: another holds it, and one is not to wait.
    """
    from filelock import FileLock  # which the command line's help need not wait for

    # A soft lock outlives a host that died with it.
    lock, has_locks = FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False), True
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        has_locks = False
    try:
        yield has_locks
    finally:
        lock.release()


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks answer."""
