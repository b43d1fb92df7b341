"""Work side by side, in single-threaded processes that report how far they are, and the bars that show it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


class _Logged(Progress):
    """Progress as lines, where there is no terminal for bars: the first after a second, then one every few, and one
    for each end that is to be kept."""

    SECONDS = 5.0

    def __init__(self, console: Console, *, keep: bool) -> None:
        super().__init__(console=console)
        self.keep = keep
        self.due = time.monotonic() + 1

    def start(self) -> None:
        """Draw nothing."""

    stop = start

    def update(self, task_id: TaskID, **changed: Any) -> None:
        super().update(task_id, **changed)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        (task,) = [task for task in self.tasks if task.id == task_id]
        ended = self.keep and task.finished
        if self.disable or (time.monotonic() < self.due and not ended):
            return
        self.due = time.monotonic() + self.SECONDS
        total = "" if task.total is None else f" of {task.total:g}"
        said = f"{task.description}: {task.completed:g}{total} {task.fields.get('values', '')}".rstrip()
        self.console.print(said, markup=False, highlight=False, soft_wrap=True)


def progress_bars(*, transient: bool = False) -> Progress:
    """Return bars on stderr: what, how far, `values`, time left; lines where there is no terminal.

    Args:
        transient: Whether the bars leave nothing behind.
    """
    console = Console(stderr=True, force_jupyter=False)  # a live display there takes ipywidgets
    if not console.is_interactive:
        return _Logged(console, keep=not transient)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=transient,
    )


SHARING_A_GPU = 8
"""How many processes share a GPU at most: small models keep it waiting for what the CPU does meanwhile."""


def default_workers(device: str) -> int:
    """Return as many as this process may use CPU cores; on a GPU no more than :data:`SHARING_A_GPU`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device == "cpu" else min(cores, SHARING_A_GPU)


def side_by_side(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *,
    workers: int,
    show: Callable[[Any], None],
    finished: Callable[[Future[Any]], Any] = Future.result,
) -> None:
    """Call `function(*task, report)` for every task, `workers` at a time. What is given to `report` reaches `show`.

    Args:
        function: A module's function; tasks and reports have to be picklable.
        finished: Called with each finished call. The default raises a call's error at once, and whatever is raised
            here, Ctrl-C included, ends the calls under way.
    """
    context = multiprocessing.get_context("spawn")
    (watched, held), reports = context.Pipe(duplex=False), context.SimpleQueue()
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start_worker, initargs=(watched, reports)
    )
    try:
        pending = {pool.submit(_work, function, task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
            while not reports.empty():
                show(reports.get())
            for future in done:
                finished(future)
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for end in (held, watched, reports):
            end.close()


_reports: Any = None
"""Where a worker's reports go."""


def _start_worker(watched: Connection, reports: Any) -> None:
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes: the parent answers it
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()


def _work(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    return function(*task, _reports.put)


def _end_with_parent(watched: Connection) -> None:
    """End with the parent. A worker whose parent was killed would work on, unseen, in folders that may have been
    cleared meanwhile. The parent holds the other end of the pipe, and closes it to end its workers or by ending
    itself."""
    try:
        watched.poll(None)
    finally:
        os._exit(1)
