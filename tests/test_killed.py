"""Whatever moment a command is killed at, and however many run at once, the same command ends in the files of one that
nothing disturbed, bit by bit, and `mdm-interp runs prune` clears the rest.

A few kills of each kind; with `--torture`, as in `make torture`, a hundred at random moments, and one at each touch of
the disk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import plotly.graph_objects as go
import pytest
import yaml
from damage_helpers import mounted, remount
from helpers import TINY_DEMO, one_after_the_other
from test_cli import CONFIG, stored

from mdm_interp import cli, files
from mdm_interp.config import TrainConfig
from mdm_interp.experiments import runner, subjects, sweep
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.scope import Moment, stages
from mdm_interp.experiments.subjects import Lab
from mdm_interp.stats.summary import Summary
from mdm_interp.training import loop, text
from mdm_interp.training.runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

Work = Callable[[], Any]


def command(*arguments: str) -> Work:
    """Work of the command line."""

    def work() -> None:
        before, sys.argv = sys.argv, ["mdm-interp", *arguments]
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, ended.code
        finally:
            sys.argv = before

    return work


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


RUN = TrainConfig.model_validate(CONFIG).digest()
WORK: dict[str, Work] = {
    "train": command("train", "config.yaml", "--device", "cpu"),
    "sweep": command("sweep", "sweep.yaml", "--device", "cpu", "--workers", "1", "--out", "out"),
    "demo": command("demo-checkpoint", "--out", "runs/demos/demo", "--device", "cpu"),
    "reproduce": reproduce,
    "page": command("attention", RUN, "A0 r0 [M]", "--runs", "looked at", "--out", "page.html"),
}


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands are given; every step of a training is saved, and all work is in one process."""
    for module in (loop, text):
        monkeypatch.setattr(module, "SAVE_SECONDS", -1.0)
    for module in (loop, sweep):
        monkeypatch.setattr(module, "side_by_side", one_after_the_other)
    monkeypatch.setitem(subjects.DEMOS, "memorised", TINY_DEMO.model_copy(update={"steps": 3}))
    monkeypatch.setattr("plotly.io.write_images", None)  # no browser
    folder = tmp_path / "fresh"
    stored(folder / "looked at")
    (folder / "runs").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 9}))
    along = {"base": CONFIG, "grid": {"seed": [0, 1, 2]}, "measures": ["route_correlation"]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(along))
    return folder


@contextlib.contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def begin(work: Work, folder: Path, disturb: Callable[[], Any] = lambda: None) -> int:
    """Begin to work in a folder, in a process of its own, and return its number."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.chdir(folder)
        disturb()
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(process: int) -> int:
    """Wait for a process to end, and return its exit code, or the signal that ended it as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


TOUCHES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


def killed_at_touch(number: int) -> None:
    """Have this process kill itself right before the `number`-th time that it makes, syncs, renames or deletes a
    file."""
    numbers, makes = itertools.count(1), os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        touches = event in TOUCHES or (event == "open" and bool(int(arguments[2] or 0) & makes))
        if touches and next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    os.fsync = lambda handle: look("os.rename", ())


def an_hour_later() -> None:
    files.LEFT_SECONDS = -1.0


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but locks."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


class Torture:
    """Kills one command again and again, each time in a folder of its own."""

    def __init__(self, work: Work, fresh: Path) -> None:
        self.work, self.fresh, self.times = work, fresh, 0
        with chdir(self.folder("warm")):
            work()  # so that what a process computes once, such as digests of code, is there in those forked from it
        began = time.monotonic()
        assert end(begin(work, self.folder("whole"))) == 0
        self.seconds = time.monotonic() - began
        self.whole = self.pruned(fresh.parent / "whole")
        assert self.whole != tree(fresh)

    def folder(self, name: str) -> Path:
        return Path(shutil.copytree(self.fresh, self.fresh.parent / name))

    def pruned(self, folder: Path) -> dict[str, bytes]:
        assert end(begin(command("runs", "prune"), folder, an_hour_later)) == 0
        return tree(folder)

    def kill(self, name: str, disturb: Callable[[], Any] = lambda: None, after: float | None = None) -> bool:
        """Begin the command, have it killed, and give it again; tell whether it was killed at all."""
        folder = self.folder(name)
        process = begin(self.work, folder, disturb)
        if after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
        was_killed = end(process) == -signal.SIGKILL
        assert end(begin(self.work, folder, an_hour_later)) == 0, name
        self.assert_whole(folder, name)
        shutil.rmtree(folder)
        self.times += was_killed
        return was_killed

    def assert_whole(self, folder: Path, name: str) -> None:
        """A folder has what the one has that nothing disturbed, once it is pruned."""
        found = self.pruned(folder)
        assert found.keys() == self.whole.keys(), name
        assert [file for file in found if found[file] != self.whole[file]] == [], name


@pytest.mark.promise("SIGKILL before each file that is made, synced, renamed or deleted", "the same files, bit by bit")
@pytest.mark.parametrize("work", WORK)
def test_killed_at_any_touch_of_the_disk_it_ends_in_the_same_files(
    work: str, fresh: Path, request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]
) -> None:
    torture, is_long = Torture(WORK[work], fresh), request.config.getoption("--torture")
    for number in itertools.count(1, 1 if is_long else 41):
        if not torture.kill(f"touch {number}", lambda number=number: killed_at_touch(number)):
            break
    assert torture.times > (7 if is_long else 0)
    record_property("times", torture.times)


@pytest.mark.promise("SIGKILL at random moments", "the same files, bit by bit")
@pytest.mark.parametrize("work", WORK)
def test_killed_at_random_moments_it_ends_in_the_same_files(
    work: str, fresh: Path, request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]
) -> None:
    torture, chooser = Torture(WORK[work], fresh), random.Random(work)
    wanted = 100 if request.config.getoption("--torture") else 3
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
@pytest.mark.parametrize("work", WORK)
def test_a_disk_that_fills_up_costs_nothing_that_was_done(
    work: str, fresh: Path, request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]
) -> None:
    folder, times, tries = fresh.parent / "disk", 0, 50 if request.config.getoption("--torture") else 3
    torture, before = Torture(WORK[work], fresh), taken(fresh)
    for number in range(tries):
        size = before + (taken(fresh.parent / "whole") - before) * number // tries
        with mounted(folder, str(size)):
            shutil.copytree(fresh, folder, dirs_exist_ok=True)
            ended = end(begin(WORK[work], folder))
            assert ended in (0, 1), size
            assert list(folder.rglob("*.tmp")) == [], size
            remount(folder, "size=64m")
            assert end(begin(WORK[work], folder)) == 0, size
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
@pytest.mark.parametrize("disturb", [lambda: None, no_locks], ids=["with locks", "without"])
def test_commands_at_once_end_in_the_same_files(
    disturb: Callable[[], Any], fresh: Path, record_property: Callable[[str, Any], None]
) -> None:
    torture = Torture(reproduce, fresh)
    folder = torture.folder("together")
    assert [end(process) for process in [begin(reproduce, folder, disturb) for _ in range(8)]] == [0] * 8
    torture.assert_whole(folder, "together")
    record_property("times", 8)
