"""A Dask cluster of processes on this machine: a scheduler, and workers of one thread that come and go."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT


class Cluster:
    """A scheduler, and the workers that are started, which import what the tests can; all end with it.

    Args:
        folder: Where their logs go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        self.address = ""

    def __enter__(self) -> Cluster:
        file, options = self.folder / "scheduler.json", ["--no-dashboard", "--no-show", "--host", "127.0.0.1"]
        self.scheduler = self._start("dask_scheduler", *options, "--port", "0", "--scheduler-file", file)
        deadline = time.monotonic() + 60
        while not self.address:
            assert time.monotonic() < deadline, "the scheduler did not start"
            with contextlib.suppress(OSError, ValueError):
                self.address = json.loads(file.read_text())["address"]
            time.sleep(0.05)
        return self

    def worker(self) -> subprocess.Popen[bytes]:
        """Start a worker; it is there some seconds later."""
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
        return self._start("dask_worker", self.address, *options, "--local-directory", self.folder)

    def _start(self, module: str, *arguments: object) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        with (self.folder / f"{module}{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *map(str, arguments)],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def __exit__(self, *exception: object) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()
