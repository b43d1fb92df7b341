"""What becomes of a stranger's file: it is read or refused on one short line, in 10 s and 2 GiB."""

from __future__ import annotations

import os
import resource
import signal
import traceback
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mdm_interp.config import one_line
from mdm_interp.errors import UserError

SECONDS, MEMORY = 10, 2 * 2**30
READ = "it was read"


def said_of(call: Callable[[], Any]) -> str:
    """Return the message with which a call refuses its input, or `READ`. Every other error is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that are not known
        try:
            call()
        except UserError as error:
            message = str(error)
        except ValidationError as error:
            message = one_line(error)
        else:
            return READ
    assert len(message) < 500, message
    assert not any(unicodedata.category(mark) in ("Cc", "Cs") for mark in message), message
    return message


def outcome_of(call: Callable[[], Any]) -> str:
    """Return what :func:`said_of` does, of a call in a process that is killed where it takes too long, and has no more
    memory than may be taken. Other errors are returned as tracebacks."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        try:
            said = said_of(call)
        except BaseException:
            said = traceback.format_exc()
        os.write(writer, said.encode("utf-8", "backslashreplace")[-4000:])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said or f"killed after {SECONDS} s"
