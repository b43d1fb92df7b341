"""A Dask cluster of processes on this machine: a scheduler, and workers of one thread that come and go."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from helpers import ROOT

TESTS = Path(__file__).parent


class Cluster:
    """A scheduler, and the workers that are started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        self.address = ""

    def __enter__(self) -> Cluster:
        file = self.folder / "scheduler.json"
        quiet = ["--no-dashboard", "--no-show"]
        self._start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", *quiet, "--scheduler-file", file)
        deadline = time.monotonic() + 60
        while not self.address:
            assert time.monotonic() < deadline, "the scheduler did not start"
            with contextlib.suppress(OSError, ValueError):
                import json

                self.address = json.loads(file.read_text())["address"]
            time.sleep(0.05)
        return self

    def worker(self) -> subprocess.Popen[bytes]:
        """Start a worker; it is there some seconds later."""
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
        return self._start("dask_worker", self.address, *options, "--local-directory", self.folder)

    def _start(self, module: str, *arguments: object) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{module}", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{module}{len(self.processes)}.log").open("wb"),
        )
        self.processes.append(process)
        return process

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


def log_of(folder: Path) -> list[Any]:
    """What was appended to a log by many processes, a line each."""
    path = folder / "log"
    return path.read_text().split() if path.exists() else []


@contextlib.contextmanager
def cluster_in(folder: Path) -> Iterator[Cluster]:
    folder.mkdir(parents=True, exist_ok=True)
    with Cluster(folder) as cluster:
        yield cluster
