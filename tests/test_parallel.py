"""Work side by side: reports arrive, errors end or do not end the rest, and no worker outlives its parent."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_helpers import Cluster

from mdm_interp import parallel
from mdm_interp.errors import UserError
from mdm_interp.parallel import SHARING_A_GPU, default_workers, find_place, import_in_workers, side_by_side

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")


def work(number: int, report: Callable[[Any], None]) -> int:
    report((number, torch.get_num_threads(), os.getpid()))
    if number < 0:
        raise UserError(f"number: {number} is negative; use another")
    return 2 * number


def test_every_task_is_done_in_single_threaded_processes_and_errors_leave_the_rest() -> None:
    reports: list[Any] = []
    ended: list[Future[int]] = []
    side_by_side(work, [(1,), (-1,), (2,), (3,)], workers=2, show=reports.append, finished=ended.append)
    assert sorted(number for number, _, _ in reports) == [-1, 1, 2, 3]
    assert {threads for _, threads, _ in reports} == {1}
    assert os.getpid() not in {process for _, _, process in reports}
    assert sorted(future.result() for future in ended if not future.exception()) == [2, 4, 6]
    with pytest.raises(UserError, match="number: -1 is negative"):
        side_by_side(work, [(-1,), (1,)], workers=1, show=reports.append)


def is_imported(module: str, report: Callable[[Any], None]) -> bool:
    return module in sys.modules


NEEDED = ("needed_by_workers", "not_to_be_imported")


def test_workers_import_what_they_are_told_and_pass_over_what_they_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needed_by_workers.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(parallel, "_needed", set[str]())
    for module in NEEDED:
        import_in_workers(module)
    ended: list[Future[bool]] = []
    tasks = [(module,) for module in NEEDED]
    side_by_side(is_imported, tasks, workers=1, show=lambda report: None, finished=ended.append)
    assert sorted(future.result() for future in ended) == [False, True]
    assert "needed_by_workers" not in sys.modules


def test_a_core_has_one_worker_and_a_gpu_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert default_workers("cpu") == 64
    assert default_workers("cuda:0") == SHARING_A_GPU
    monkeypatch.undo()
    assert 1 <= default_workers("cpu") <= (os.cpu_count() or 1)


SLEEPERS = """
    import os, signal, sys, time
    from mdm_interp.files import replacing
    from mdm_interp.parallel import side_by_side

    def sleep(seconds, report):
        with replacing(f"{os.getpid()}.txt") as half_written:
            half_written.write_text("half")
            report(os.getpid())
            for _ in range(10 * seconds):
                time.sleep(0.1)

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore Ctrl-C
        side_by_side(sleep, [(100,), (100,)], workers=2, show=lambda process: print(process, flush=True))
"""


def group(leader: int) -> list[int]:
    """The processes of a process group."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(process) for process, of, state in rows if int(of) == leader and not state.startswith("Z")]


@pytest.mark.promise(
    "a command with workers that is interrupted or killed", "no process outlives it, no half file is left"
)
@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_process_outlives_the_parent(tmp_path: Path, ending: signal.Signals) -> None:
    (tmp_path / "sleepers.py").write_text(textwrap.dedent(SLEEPERS))
    parent = subprocess.Popen(
        [sys.executable, "sleepers.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    assert set(workers) < set(group(parent.pid))
    parent.send_signal(ending)
    parent.wait(timeout=30)
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while group(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert group(parent.pid) == []
    assert [path.name for path in tmp_path.iterdir()] == ["sleepers.py"]


# ---- on a Dask cluster


def wait_for(seconds: float, until: str, report: Callable[[Any], None]) -> None:
    report(os.getpid())
    deadline = time.monotonic() + seconds
    while not Path(until).exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_cluster_takes_tasks_in_order_with_their_reports_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needed_by_workers.py").touch()  # a worker's own folder
    monkeypatch.setattr(parallel, "_needed", set(NEEDED))
    with Cluster(tmp_path) as cluster:
        cluster.worker()
        assert find_place(cluster.address, "auto") == (1, "cuda" if torch.cuda.is_available() else "cpu")
        with pytest.raises(UserError, match=r"^device: 'abacus' cannot be used here"):
            find_place(cluster.address, "abacus")
        reports: list[Any] = []
        ended: list[Future[int]] = []
        tasks = [(n,) for n in (5, -1, *range(10, 20), 0)]
        side_by_side(work, tasks, workers=cluster.address, show=reports.append, finished=ended.append)
        assert [(n,) for n, _, _ in reports] == tasks, "the first ones first"
        assert {threads for _, threads, _ in reports} == {1}
        assert sorted(future.result() for future in ended if not future.exception()) == [0, 10, *range(20, 40, 2)]
        with pytest.raises(UserError, match="number: -1 is negative"):
            side_by_side(work, [(-1,), (1,)], workers=cluster.address, show=reports.append)
        imported: list[Future[bool]] = []
        modules = [(module,) for module in NEEDED]
        side_by_side(is_imported, modules, workers=cluster.address, show=reports.append, finished=imported.append)
        assert sorted(future.result() for future in imported) == [False, True]


def test_a_killed_workers_task_is_another_workers_and_is_finished_once(tmp_path: Path) -> None:
    go_on, held = tmp_path / "go on", list[int]()
    with Cluster(tmp_path) as cluster:
        workers = [cluster.worker()]
        ended: list[Future[None]] = []

        def show(process: int) -> None:
            held.append(process)
            if len(held) == 1:
                workers[0].kill()
                workers.append(cluster.worker())
            else:
                go_on.touch()

        tasks = [(60, str(go_on)), (60, str(go_on))]
        side_by_side(wait_for, tasks, workers=cluster.address, show=show, finished=ended.append)
        assert [future.exception() for future in ended] == [None, None]
        assert held == [workers[0].pid, workers[1].pid, workers[1].pid]


def test_a_scheduler_that_is_gone_is_one_error(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.worker()

        def show(process: int) -> None:
            cluster.scheduler.kill()

        with pytest.raises(UserError, match=r"^address: the Dask scheduler at tcp://\S+ is gone; start it"):
            side_by_side(wait_for, [(60, str(tmp_path / "never"))], workers=cluster.address, show=show)
    with pytest.raises(UserError, match=r"^address: no Dask scheduler answers at 'tcp://\S+' within 8 seconds"):
        find_place(cluster.address, "cpu")


def test_distributed_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"^address: 'tcp://a:1' needs Dask's distributed \(.+\); `pip install"):
        find_place("tcp://a:1", "cpu")
    assert find_place(3, "cpu") == (3, "cpu")


def test_a_log_gets_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first after a second, then one every five, and the end at once if it is to be kept."""
    now = [0.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    for transient in (False, True):
        now[0] = 0.0
        with parallel.progress_bars(transient=transient) as bars:
            task = bars.add_task("things", total=4, values="")
            for second, values in ((0.5, "a"), (1.5, "b"), (3.0, "c"), (3.1, "d")):
                now[0] = second
                bars.update(task, advance=1, values=values)
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["things: 2 of 4 b", *([] if transient else ["things: 4 of 4 d"])]


def test_bars_and_lines_say_of_which_phase_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    for within in (parallel.phase("measuring", 2, 4), contextlib.nullcontext()):
        now[0] = 0.0
        with within, parallel.progress_bars() as bars:
            task = bars.add_task("things", total=2, values="")
            now[0] = 2.0
            bars.advance(task)
    assert capsys.readouterr().err.splitlines() == ["things: 1 of 2; phase 2 of 4: measuring", "things: 1 of 2"]
    monkeypatch.setattr(parallel, "Console", functools.partial(parallel.Console, force_interactive=True))
    with parallel.phase("measuring", 2, 4):
        (bar,) = parallel.progress_bars().tasks
    assert (bar.description, bar.completed, bar.total) == ("phase 2 of 4: measuring", 1, 4)
    assert parallel.progress_bars().tasks == []


def test_lines_say_how_much_of_everything_is_done_and_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    with parallel.progress_bars() as bars:
        every = bars.add_task("runs", total=6, values="", over_all=True)
        one = bars.add_task("one", total=100, values="")
        for second, done, ended in ((10, 1, 0), (60, 50, 2), (90, 80, 4), (100, 100, 6)):
            now[0] = float(second)
            bars.update(every, completed=ended)  # says so itself
            now[0] += 6
            bars.update(one, completed=done)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("one")]
    assert lines == [
        "one: 1 of 100; 0 of 6 runs done",
        "one: 50 of 100; 2 of 6 runs done, about 2 min left",
        "one: 80 of 100; 4 of 6 runs done, less than 1 min left",
        "one: 100 of 100; 6 of 6 runs done",
    ]
