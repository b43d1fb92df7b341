"""Whatever moment a command is killed at, and however many run at once, the same command ends in the files of one that
nothing disturbed, bit by bit, and `mdm-interp runs prune` clears the rest.

A few kills of each kind; with `--torture`, as in `make torture`, a hundred at random moments, and one at each touch of
the disk.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import filelock
import plotly.graph_objects as go
import plotly.io
import pytest
import torch
import yaml
from damage_helpers import killed_at_touch, mounted, remount
from helpers import TINY_DEMO, one_after_the_other
from test_cli import CONFIG, stored

from mdm_interp import cli, files
from mdm_interp.config import TrainConfig
from mdm_interp.experiments import runner, subjects, sweep
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.scope import Moment, stages
from mdm_interp.experiments.subjects import Lab
from mdm_interp.meaning import meaning
from mdm_interp.stats.summary import Summary
from mdm_interp.training import loop, text
from mdm_interp.training.demo import train_demo
from mdm_interp.training.runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

Work = Callable[[], Any]


def run_command(*arguments: str) -> None:
    sys.argv = ["mdm-interp", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, ended.code


def command(*arguments: str) -> Work:
    """Work of the command line."""
    return partial(run_command, *arguments)


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [TrainConfig.model_validate({**CONFIG, "seed": seed}) for seed in seeds]


def at_the_end(run: Run) -> list[Moment]:
    return stages(run, ("end",))


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    return [{"first": run.model(step).W_E[0, 0].item()}]


MEASURED = Analysis(
    name="killed",
    question="Is it there?",
    configs=configs,
    measure=measure,
    when=at_the_end,
    summarize=lambda result: Summary.of(result.frame, (), ("first",)),
    takeaway=lambda result: "It is.",
    draw=lambda result: go.Figure(go.Bar(y=result.frame["first"])),
)


def reproduce() -> None:
    """Train an ensemble, measure it, and draw the figure and the report."""
    runner.reproduce([MEASURED], Lab(n_seeds=2, root=Path("runs"), workers=1), Path("out"))


RUN, MEASURE = TrainConfig.model_validate(CONFIG).digest(), "route_correlation"
WORK: dict[str, Work] = {
    "train": command("train", "config.yaml", "--device", "cpu"),
    "sweep": command("sweep", "sweep.yaml", "--device", "cpu", "--workers", "1", "--out", "out"),
    "demo": command("demo-checkpoint", "--out", "runs/demos/demo", "--device", "cpu"),
    "reproduce": reproduce,
    "page": command("attention", RUN, "A0 r0 [M]", "--runs", "looked at", "--out", "page.html"),
}


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder with what the commands are given."""
    folder = tmp_path / "fresh"
    stored(folder / "looked at")
    (folder / "runs").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 9}))
    along = {"base": CONFIG, "grid": {"seed": [0, 1, 2]}, "measures": [MEASURE]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(along))
    return folder


# ---- processes

READY = "ready"


class Nursery:
    """A process that has computed nothing, from which those that work are forked: torch's threads would not outlive a
    fork, and pytest's own process may have some."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,))
        self.process.start()
        assert self.pipe.recv() == READY

    def begin(self, work: Work, folder: Path, disturb: Work | None = None) -> int:
        """Begin to work in a folder, in a process of its own, and return its number."""
        self.pipe.send((work, folder, disturb))
        return self.pipe.recv()

    def end(self, process: int) -> int:
        """Wait for a process to end, and return its exit code, or the signal that ended it as a negative number."""
        self.pipe.send(process)
        return self.pipe.recv()

    def run(self, work: Work, folder: Path, disturb: Work | None = None) -> int:
        return self.end(self.begin(work, folder, disturb))


def serve(pipe: Connection) -> None:
    """Fork whatever is asked for, with every step of a training saved, all work in one process, and no browser."""
    torch.set_num_threads(1)
    os.fsync = lambda _: None
    loop.SAVE_SECONDS = text.SAVE_SECONDS = -1.0
    loop.side_by_side = sweep.side_by_side = one_after_the_other
    subjects.DEMOS["memorised"] = TINY_DEMO.model_copy(update={"steps": 4})
    plotly.io.write_images = None
    # What a process computes once, so that those forked from this one find it done.
    for trainer in (loop.train, train_demo):
        meaning(trainer)
    for analysis in (MEASURED, *sweep.find_measures([MEASURE])):
        analysis.stored_rows(Run.of(TrainConfig.model_validate(CONFIG), "nowhere"), Path("nowhere"))
    pipe.send(READY)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]) if isinstance(asked, int) else fork(*asked))


def fork(work: Work, folder: Path, disturb: Work | None) -> int:
    if process := os.fork():
        return process
    code = 1
    try:
        os.chdir(folder)
        if disturb:
            disturb()
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.pipe.close()
    made.process.join(60)


def an_hour_later() -> None:
    files.LEFT_SECONDS = -1.0


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but locks."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


class Torture:
    """Kills one command again and again, each time in a folder of its own."""

    def __init__(self, nursery: Nursery, name: str, fresh: Path) -> None:
        self.nursery, self.name, self.fresh, self.times = nursery, name, fresh, 0
        self.work = work = WORK[name]
        began = time.monotonic()
        assert nursery.run(work, self.folder("whole")) == 0
        self.seconds = time.monotonic() - began
        self.whole = self.pruned(fresh.parent / "whole")
        assert self.whole != tree(fresh)

    def folder(self, name: str) -> Path:
        return Path(shutil.copytree(self.fresh, self.fresh.parent / name))

    def pruned(self, folder: Path) -> dict[str, bytes]:
        assert self.nursery.run(command("runs", "prune"), folder, an_hour_later) == 0
        return tree(folder)

    def kill(self, name: str, disturb: Work | None = None, after: float | None = None) -> bool:
        """Begin the command, have it killed, and give it again; tell whether it was killed at all."""
        folder = self.folder(name)
        process = self.nursery.begin(self.work, folder, disturb)
        if after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
        was_killed = self.nursery.end(process) == -signal.SIGKILL
        assert self.nursery.run(self.work, folder, an_hour_later) == 0, name
        self.assert_whole(folder, name)
        shutil.rmtree(folder)
        self.times += was_killed
        return was_killed

    def assert_whole(self, folder: Path, name: str) -> None:
        """A folder has what the one has that nothing disturbed, once it is pruned."""
        found = self.pruned(folder)
        assert found.keys() == self.whole.keys(), name
        assert [file for file in found if found[file] != self.whole[file]] == [], name


@pytest.fixture(params=WORK)
def torture(request: pytest.FixtureRequest, nursery: Nursery, fresh: Path) -> Torture:
    return Torture(nursery, request.param, fresh)


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--torture"))


@pytest.mark.promise("SIGKILL before each file that is made, synced, renamed or deleted", "the same files, bit by bit")
def test_killed_at_any_touch_of_the_disk_it_ends_in_the_same_files(
    torture: Torture, is_long: bool, record_property: Callable[[str, Any], None]
) -> None:
    for number in itertools.count(1, 1 if is_long else 41):
        if not torture.kill(f"touch {number}", partial(killed_at_touch, number)):
            break
    assert torture.times > (7 if is_long else 0)
    record_property("times", torture.times)


@pytest.mark.promise("SIGKILL at random moments", "the same files, bit by bit")
def test_killed_at_random_moments_it_ends_in_the_same_files(
    torture: Torture, is_long: bool, record_property: Callable[[str, Any], None]
) -> None:
    chooser, wanted = random.Random(torture.name), 100 if is_long else 3
    for number in itertools.count():  # one that is done in time does not count
        torture.kill(f"moment {number}", after=chooser.uniform(0, torture.seconds))
        if torture.times == wanted:
            break
    record_property("times", torture.times)


# ---- no room


def taken(folder: Path) -> int:
    """How many bytes a small disk needs for a folder: whole blocks, and one for each name."""
    return sum(4096 * (1 + -(-len(content) // 4096)) for content in tree(folder).values())


@pytest.mark.promise("a disk that fills up on the way, and is made larger", "the same files, bit by bit")
def test_a_disk_that_fills_up_costs_nothing_that_was_done(
    torture: Torture, is_long: bool, record_property: Callable[[str, Any], None]
) -> None:
    fresh, nursery, work = torture.fresh, torture.nursery, torture.work
    folder, times, tries = fresh.parent / "disk", 0, 50 if is_long else 3
    before = taken(fresh)
    for number in range(tries):
        size = before + (taken(fresh.parent / "whole") - before) * number // tries
        with mounted(folder, str(size)):
            shutil.copytree(fresh, folder, dirs_exist_ok=True)
            ended = nursery.run(work, folder)
            assert ended in (0, 1), size
            assert list(folder.rglob("*.tmp")) == [], size
            remount(folder, "size=64m")
            assert nursery.run(work, folder) == 0, size
            torture.assert_whole(folder, f"{size} bytes")
        folder.rmdir()
        times += ended
    assert times > 0
    record_property("times", times)


# ---- many at once


class NoLock:
    """In place of a lock, on a file system whose locks do nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def acquire(self) -> None: ...
    def release(self) -> None: ...


def no_locks() -> None:
    filelock.FileLock = NoLock  # type: ignore[misc, assignment]


@pytest.mark.promise("eight `reproduce` into one folder at once, with locks and without", "the same files, bit by bit")
@pytest.mark.parametrize("disturb", [None, no_locks], ids=["with locks", "without"])
def test_commands_at_once_end_in_the_same_files(
    disturb: Work | None, fresh: Path, nursery: Nursery, record_property: Callable[[str, Any], None]
) -> None:
    torture = Torture(nursery, "reproduce", fresh)
    folder = torture.folder("together")
    processes = [nursery.begin(reproduce, folder, disturb) for _ in range(8)]
    assert [nursery.end(process) for process in processes] == [0] * 8
    torture.assert_whole(folder, "together")
    record_property("times", 8)
