"""Work side by side, in single-threaded processes here or on a Dask cluster, that reports how far it is; and the bars
that show it."""

from __future__ import annotations

import _thread
import contextlib
import importlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mdm_interp.devices import check_device
from mdm_interp.errors import UserError


class _Logged(Progress):
    """Progress as lines, where there is no terminal for bars: the first after a second, then one every few, and one
    for each end that is to be kept. Each says how far the task over all others is, if there is one, and about how long
    that will take."""

    SECONDS = 5.0

    def __init__(self, console: Console, *, keep: bool) -> None:
        super().__init__(console=console)
        self.keep = keep
        self.began = time.monotonic()
        self.due = self.began + 1

    def start(self) -> None:
        """Draw nothing."""

    stop = start

    def add_task(self, description: str, *given: Any, over_all: bool = False, **fields: Any) -> TaskID:
        """Add a task; one over all others, of bars that are kept, is a sign of life."""
        task_id = super().add_task(description, *given, over_all=over_all, **fields)
        if over_all and self.keep:
            self.due = time.monotonic()
            self._say(task_id)
        return task_id

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
        said += "".join(f"; {self._left(over)}" for over in self.tasks if over.fields.get("over_all") and over != task)
        said += f"; {_phase}" if _phase else ""
        self.console.print(said, markup=False, highlight=False, soft_wrap=True)

    def _left(self, over_all: Task) -> str:
        """Say how much of everything is done, and about how long the rest will take."""
        done, total = over_all.completed, over_all.total or 0
        said = f"{done:g} of {total:g} {over_all.description} done"
        if not 0 < done < total:
            return said
        minutes = (time.monotonic() - self.began) / done * (total - done) / 60
        return f"{said}, about {minutes:.0f} min left" if minutes >= 1 else f"{said}, less than 1 min left"


@dataclass(frozen=True)
class _Phase:
    name: str
    number: int
    of: int

    def __str__(self) -> str:
        return f"phase {self.number} of {self.of}: {self.name}"


_phase: _Phase | None = None


@contextlib.contextmanager
def phase(name: str, number: int, of: int) -> Iterator[None]:
    """Have all bars that are drawn meanwhile say of which phase of how many they are."""
    global _phase
    before, _phase = _phase, _Phase(name, number, of)
    try:
        yield
    finally:
        _phase = before


def progress_bars(*, transient: bool = False) -> Progress:
    """Return bars on stderr: what, how far, `values`, time left; lines where there is no terminal. A task with the
    field `over_all` counts all the others. Within a :func:`phase`, the first bar says how many phases are done.

    Args:
        transient: Whether the bars leave nothing behind.
    """
    console = Console(stderr=True, force_jupyter=False)  # a live display there takes ipywidgets
    if not console.is_interactive:
        return _Logged(console, keep=not transient)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=transient,
    )
    if _phase:
        bars.add_task(str(_phase), completed=_phase.number - 1, total=_phase.of, values="")
    return bars


SHARING_A_GPU = 8
"""How many processes share a GPU at most: small models keep it waiting for what the CPU does meanwhile."""


def default_workers(device: str) -> int:
    """Return as many as this process may use CPU cores; on a GPU no more than :data:`SHARING_A_GPU`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device == "cpu" else min(cores, SHARING_A_GPU)


Workers = int | str | None
"""Where tasks run: in so many processes here, or on the workers of the Dask scheduler at this address. None means
:func:`default_workers`."""


def find_place(workers: Workers, device: str) -> tuple[int, str]:
    """Return how many tasks run at a time, and the device, checked where they run.

    Args:
        device: As :func:`~mdm_interp.devices.check_device` takes it. `auto` is what a worker finds.

    Raises:
        UserError: the device cannot be used there, or no scheduler answers.
    """
    if not isinstance(workers, str):
        device = check_device(device)
        return workers or default_workers(device), device
    with _connected(workers) as client:
        if not client.nthreads():
            Console(stderr=True).print(f"waiting for a worker of {workers}", markup=False, soft_wrap=True)
        device = client.submit(check_device, device, pure=False).result()
        return sum(client.nthreads().values()), device


def side_by_side(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *,
    workers: int | str,
    show: Callable[[Any], None],
    finished: Callable[[Future[Any]], Any] = Future.result,
) -> None:
    """Call `function(*task, report)` for every task, the first ones first. What is given to `report` reaches `show`.

    Args:
        function: A module's function; tasks and reports have to be picklable.
        workers: How many calls run at a time, each in a process here; or the address of a Dask scheduler, whose workers
            take one for each of their threads. A task of a worker that is killed is given to another.
        finished: Called with each finished call. The default raises a call's error at once, and whatever is raised
            here, Ctrl-C included, ends the calls under way. On a Dask cluster those that run already run to their end.

    Raises:
        UserError: no scheduler answers, or it is gone before the calls are finished.
    """
    with workers_of(workers if isinstance(workers, str) else min(workers, len(tasks))) as (submit, reports):
        pending = {submit(function, task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
            while not reports.empty():
                show(reports.get())
            for future in done:
                if future.cancelled():
                    raise UserError(
                        f"address: the Dask scheduler at {workers} is gone; start it and its workers again, and repeat "
                        "the command, which goes on from here"
                    )
                finished(future)


Place = tuple[Callable[[Callable[..., Any], tuple[Any, ...]], "Future[Any]"], Any]
"""What calls a function with a task there, and a queue of what is reported."""


_needed: set[str] = set()


def import_in_workers(module: str) -> None:
    """Have workers import a module before they work, so that what it registers here is registered there, too. One that
    they cannot import is left out."""
    _needed.add(module)


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        with contextlib.suppress(ImportError):  # whoever misses what it registers says so
            importlib.import_module(module)


def workers_of(workers: int | str) -> contextlib.AbstractContextManager[Place]:
    """Give so many processes here, or the workers of the Dask scheduler at an address, until this ends.

    Raises:
        UserError: no scheduler answers.
    """
    return _cluster(workers) if isinstance(workers, str) else _processes(workers)


# ---- on a Dask cluster


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Place]:
    """Give the workers of a scheduler. What has not begun when this ends is withdrawn."""
    topic, reports, place_in_line = f"mdm-interp-{uuid.uuid4().hex}", queue.SimpleQueue(), itertools.count()
    with _connected(address) as client:
        client.subscribe_topic(topic, lambda event: reports.put(pickle.loads(event[1])))
        executor = client.get_executor(pure=False)

        def submit(function: Callable[..., Any], task: tuple[Any, ...]) -> Future[Any]:
            return executor.submit(_work_there, topic, sorted(_needed), function, task, priority=-next(place_in_line))

        yield submit, reports


def _work_there(topic: str, modules: Sequence[str], function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    from distributed import get_worker

    _import(modules)
    torch.set_num_threads(1)
    worker = get_worker()
    return function(*task, lambda report: worker.log_event(topic, pickle.dumps(report)))


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Give a client of a Dask scheduler.

    Raises:
        UserError: Dask is not installed, or no scheduler answers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            f'address: {address!r} needs Dask\'s distributed ({error}); `pip install "mdm-interp[cluster]"` installs it'
        ) from error
    try:
        client = Client(address, timeout=ANSWERS_WITHIN, set_as_default=False, name="mdm-interp")
    except (OSError, ValueError) as error:
        raise UserError(
            f"address: no Dask scheduler answers at {address!r} within {ANSWERS_WITHIN} seconds; start one with `dask "
            "scheduler` and give the address that it prints, as in tcp://host:8786"
        ) from error
    with client:
        yield client


ANSWERS_WITHIN = 8
"""Seconds after which a scheduler that has not answered counts as absent."""


# ---- in processes here


@contextlib.contextmanager
def _processes(n: int) -> Iterator[Place]:
    """Give processes, which end with this, or with the process that this is."""
    context = multiprocessing.get_context("spawn")
    (watched, held), reports = context.Pipe(duplex=False), context.SimpleQueue()
    given = (watched, reports, context.Value("i", 0))
    pool = ProcessPoolExecutor(n, mp_context=context, initializer=_start_worker, initargs=given)
    try:
        yield (lambda function, task: pool.submit(_work, sorted(_needed), function, task)), reports
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for end in (held, watched, reports):
            end.close()


_reports: Any = None
"""Where a worker's reports go."""
_at_work = False
_number = 0


def worker_number() -> int:
    """Return which of a machine's workers this process is, from 0."""
    return _number


def _start_worker(watched: Connection, reports: Any, started: Any) -> None:
    global _reports, _number
    _reports = reports
    with started.get_lock():
        _number, started.value = started.value, started.value + 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes: the parent answers it
    signal.signal(signal.SIGTERM, _interrupt)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()


def _work(modules: Sequence[str], function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    global _at_work
    _at_work = True
    try:
        _import(modules)
        return function(*task, _reports.put)
    except KeyboardInterrupt:
        os._exit(1)
    finally:
        _at_work = False


def _interrupt(*_: Any) -> None:
    """Leave the task under way as Ctrl-C would, so that it removes what it has half written."""
    if not _at_work:
        os._exit(1)
    raise KeyboardInterrupt


def _end_with_parent(watched: Connection) -> None:
    """End with the parent. A worker whose parent was killed would work on, unseen, in folders that may have been
    cleared meanwhile. The parent holds the other end of the pipe, and closes it to end its workers or by ending
    itself."""
    try:
        watched.poll(None)
        _thread.interrupt_main(signal.SIGTERM)
        time.sleep(LEAVING_SECONDS if _at_work else 0)
    finally:
        os._exit(1)


LEAVING_SECONDS = 2.0
"""How long a task may take to leave. One in the middle of a long computation has nothing half written."""
