"""Clearing the run store: what is unfinished goes, and nothing that may be somebody's work."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
from cli_helpers import Ended, contents
from helpers import TINY_DEMO
from safetensors.torch import load_file

from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.tensors import save_tensors
from mdm_interp.training import runs as store
from mdm_interp.training.demo import train_demo
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=5)
ROOT = Path("runs")


def tiny(seed: int) -> TrainConfig:
    model = ModelConfig(d_model=8, n_heads=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len)
    return TrainConfig(model=model, facts=FACTS, steps=4, batch_size=4, n_checkpoints=3, seed=seed)


def finished(seed: int) -> Run:
    return train(tiny(seed), root=ROOT, progress=False)


def killed(seed: int) -> Run:
    """A run that was killed before its first save."""
    run = Run.of(tiny(seed), ROOT)
    run.config.to_yaml(run.folder / "config.yaml")
    return run


@pytest.fixture
def prune(mdm_interp: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Ended]:
    monkeypatch.chdir(tmp_path)
    return lambda: mdm_interp("runs", "prune")


def assert_kept(ended: Ended, folder: Path, says: str, deleted: str = "0 unfinished runs") -> None:
    assert (ended.code, ended.out) == (1, f"deleted {deleted}\n")
    (line,) = ended.err.splitlines()
    assert line.startswith(f"mdm-interp: {folder}") and says in line and len(line) < 500


def flip(run: Run) -> None:
    """One bit of the step that the state says."""
    content = run.state_path.read_bytes()
    run.state_path.write_bytes(content.replace(b'"step":"4"', b'"step":"0"'))


def of_before(run: Run) -> None:
    """The same in a state that has no digest of it."""
    save_tensors(run.state_path, load_file(run.state_path), {"step": "1"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: run.state_path.unlink(), "is missing, and there is a checkpoint of step 4; put the state back"),
        (of_before, "is at step 1, and there is a checkpoint of step 4; put the state back, or train the run again"),
        (flip, "what it says of itself is not as it was saved"),
    ],
)
def test_a_finished_run_with_a_damaged_state_is_named_and_kept(
    prune: Callable[[], Ended], mdm_interp: Callable[..., Ended], damage: Callable[[Run], None], says: str
) -> None:
    """It looks as one that was killed on the way, and its checkpoints are whole."""
    run, other = finished(0), killed(1)
    damage(run)
    kept, listed = contents(run.folder), mdm_interp("runs", "list")
    assert listed.code == 1 and says in listed.err and other.folder.name in listed.out
    assert_kept(prune(), run.state_path, says, "1 unfinished run")
    assert contents(run.folder) == kept


def test_a_run_that_was_killed_between_a_checkpoint_and_its_state_is_pruned(prune: Callable[[], Ended]) -> None:
    run = finished(0)
    run.checkpoint_path(4).unlink()
    save_tensors(run.state_path, load_file(run.state_path), {"step": "0"})
    assert prune() == (0, "deleted 1 unfinished run\n", "")
    run = finished(0)
    save_tensors(run.state_path, load_file(run.state_path), {"step": "1"})  # but not if that was the last
    assert_kept(prune(), run.state_path, "is at step 1, and there is a checkpoint of step 4")


def test_what_is_not_of_the_store_is_left_alone(prune: Callable[[], Ended]) -> None:
    for name in ("demos/my notes", "notes", "demos/llada-0123456789abcdef"):
        (ROOT / name / ".git").mkdir(parents=True)
        (ROOT / name / ".git" / "thesis.txt").write_text("years of work")
        (ROOT / name / ".old.tmp").write_text("mine")
        os.utime(ROOT / name / ".old.tmp", (0, time.time() - 10**5))
    mine = train_demo(ROOT / "demos" / "mine", TINY_DEMO.model_copy(update={"steps": 1}), progress=False)
    (mine / "training_state.safetensors").touch()
    before = contents(ROOT)
    assert prune() == (0, "deleted 0 unfinished runs\n", "")
    assert contents(ROOT) == before


@pytest.mark.parametrize("name", ["thesis.txt", ".git/thesis.txt", "checkpoints/best.safetensors"])
def test_an_unfinished_run_with_a_foreign_file_is_named_and_kept(prune: Callable[[], Ended], name: str) -> None:
    run, other = killed(0), killed(1)
    for folder in (run.folder, ROOT / ("0" * 16)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")
    shutil.rmtree(ROOT / ("0" * 16))
    kept = contents(run.folder)
    assert_kept(prune(), run.folder, "is no file of a run, whose folder is kept for it; move it", "1 unfinished run")
    assert contents(run.folder) == kept and not other.folder.exists()


def test_a_folder_that_only_is_named_like_a_run_is_named_and_kept(prune: Callable[[], Ended]) -> None:
    (ROOT / ("0" * 16) / ".git").mkdir(parents=True)
    assert_kept(prune(), ROOT / ("0" * 16), "config.yaml")
    assert (ROOT / ("0" * 16) / ".git").exists()


def test_a_demo_that_lost_a_file_is_named_and_kept(prune: Callable[[], Ended]) -> None:
    config = TINY_DEMO.model_copy(update={"steps": 1})
    demo = train_demo(ROOT / "demos" / f"llada-{config.digest()}", config, progress=False)
    (demo / "config.json").unlink()
    kept = contents(demo)
    assert_kept(prune(), demo, "has weights and no config.json; put that back")
    assert contents(demo) == kept


def test_links_are_left_alone(prune: Callable[[], Ended]) -> None:
    run, there, empty = finished(0), Path("elsewhere"), Path("empty")
    there.mkdir()
    empty.mkdir()
    (ROOT / ("0" * 16)).symlink_to(empty.absolute())
    run.folder.rename(there / run.folder.name)
    run.folder.symlink_to((there / run.folder.name).absolute())
    (ROOT / ("1" * 16)).symlink_to("nowhere")
    assert_kept(prune(), ROOT / ("0" * 16), "is a link to what is unfinished; delete both by hand")
    assert (ROOT / ("0" * 16)).is_symlink() and empty.exists() and run.finished


@pytest.mark.parametrize("command", ["list", "prune"])
def test_a_folder_that_cannot_be_read_hides_no_other(
    mdm_interp: Callable[..., Ended], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, closed = finished(0), finished(1).folder
    at = Run.at

    def refuse(folder: Path) -> Run:
        if folder == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(closed))
        return at(folder)

    monkeypatch.setattr(store.Run, "at", refuse)
    ended = mdm_interp("runs", command)
    assert ended.code == 1
    assert ended.err == f"mdm-interp: {closed}: Permission denied; give a path that can be read and written\n"
    assert (good.folder.name if command == "list" else "deleted 0") in ended.out


@pytest.mark.skipif(os.name != "posix", reason="locks of another kind")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_only_what_is_old_is_pruned(
    prune: Callable[[], Ended], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any of the others may be in training, with a lock of which nothing is seen or with none."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    young, old = killed(0), killed(1)
    (young.folder / ".lock").touch()
    for path in (*old.folder.rglob("*"), old.folder):
        os.utime(path, (0, time.time() - 4000))
    monkeypatch.setattr(filelock._unix.fcntl, "flock", refuse)  # type: ignore[attr-defined]
    assert_kept(prune(), young.folder, "was changed in the last hour, and may be in training", "1 unfinished run")
    assert not old.folder.exists()
    assert_kept(prune(), young.folder, "cannot be told without locks; prune again later")
