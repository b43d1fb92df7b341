"""Training: what a run records, that it survives being killed at any moment, and that it learns."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest
import torch
from filelock import FileLock
from helpers import one_after_the_other
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mdm_interp import parallel
from mdm_interp.config import FactConfig, ModelConfig, Objective, Scheme, TrainConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.devices import check_device
from mdm_interp.errors import Diverged, UserError
from mdm_interp.inference.prediction import predict
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.provenance import made_with, provenance
from mdm_interp.training import loop, trainees
from mdm_interp.training.loop import Progressed, train, train_all
from mdm_interp.training.losses import LastLosses, training_loss
from mdm_interp.training.runs import Run, checkpoint_steps

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=5)


LABEL = "relation_cycle rope any_order, 1 x 2 heads, seed {}"


def tiny(objective: Objective = "any_order", **changes: Any) -> TrainConfig:
    attention = "causal" if objective == "causal" else "bidirectional"
    model = ModelConfig(d_model=8, n_heads=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len, attention=attention)
    fields = {"steps": 12, "batch_size": 4, "n_checkpoints": 5, **changes}
    return TrainConfig(model=model, facts=FACTS, objective=objective, **fields)


def contents(run: Run) -> dict[str, bytes]:
    """Everything the run's folder holds, byte by byte, without the lock."""
    files = sorted(path for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in files}


def refuse_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a training step was taken")

    monkeypatch.setattr(trainees, "drawn_loss", refuse)


# ---- what a run records


@pytest.mark.parametrize("objective", get_args(Objective))
def test_metrics_are_what_the_checkpoints_predict(tmp_path: Path, objective: Objective) -> None:
    run = train(tiny(objective), root=tmp_path, progress=False)
    rows = run.metrics()
    assert [row["step"] for row in rows] == run.steps == checkpoint_steps(run.config)
    assert run.steps[0] == 0 and run.steps[-1] == 12
    for row in rows:
        expected = {"step": row["step"], "loss": row["loss"]}
        for name in ("forward", "reverse"):
            answered = predict(run.model(row["step"]), [getattr(pair, name) for pair in run.query_pairs()])
            expected[f"{name}_probability"] = pytest.approx(float(answered.log_probability.exp().mean()))
            expected[f"{name}_accuracy"] = pytest.approx(float((answered.rank == 1).float().mean()))
            expected[f"{name}_rank"] = pytest.approx(float(answered.rank.float().mean()))
        assert math.isnan(row["loss"]) == (row["step"] == 0)
        assert {name: value for name, value in row.items() if name != "loss"} == {
            name: value for name, value in expected.items() if name != "loss"
        }


def test_training_is_adamw_with_warmup_and_clipping(tmp_path: Path) -> None:
    """Recomputed with torch's plain AdamW from the seed alone: the initial weights, then facts and masks, step by
    step."""
    options = {"lr": 0.01, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "warmup": 3, "grad_clip": 0.2, "steps": 5}
    config = tiny(seed=7, **options)
    run = train(config, root=tmp_path, progress=False)
    draws = torch.Generator().manual_seed(7)
    model = HookedTransformer(run.config.model, generator=draws)
    world = FactWorld(FACTS, seed=7)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9), weight_decay=0.1, foreach=False)
    losses, norms = [], []
    for lr in (0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        loss = training_loss(model, world.sample(4, draws), "any_order", draws)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()))
        for gradient in gradients:
            gradient *= min(1.0, 0.2 / norms[-1])
        optimizer.step()
        losses.append(loss.item())
    assert max(norms) > 0.2  # the clipping was put to the test
    trained = run.model().state_dict()
    for name, expected in model.state_dict().items():
        assert torch.allclose(trained[name], expected, atol=1e-5), name
    recorded = {row["step"]: row["loss"] for row in run.metrics()}
    assert recorded[5] == pytest.approx(losses[4], rel=1e-4)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    first = train(tiny(), root=tmp_path / "a", progress=False)
    torch.manual_seed(99)  # the global generator has no say
    again = train(tiny(), root=tmp_path / "b", progress=False)
    assert contents(first) == contents(again)
    other = train(tiny(seed=1), root=tmp_path / "a", progress=False)
    assert not torch.equal(first.model().W_E, other.model().W_E)
    assert not torch.equal(first.facts.facts, other.facts.facts)


def test_progress_is_reported_and_the_bar_keeps_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Progressed] = []
    run = train(tiny(steps=60), root=tmp_path, report=reports.append)
    assert capfd.readouterr() == ("", "")
    assert [progressed.step for progressed in reports] == [0, 25, 50, 60]
    assert {progressed.total for progressed in reports} == {60}
    last, row = reports[-1], run.metrics()[-1]
    assert (last.loss, last.forward, last.reverse) == (
        row["loss"],
        row["forward_probability"],
        row["reverse_probability"],
    )
    assert last.digest == run.config.digest() and last.label == LABEL.format(0)
    monkeypatch.setenv("COLUMNS", "200")
    digest = train(tiny(steps=60, seed=1), root=tmp_path).config.digest()
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith(f"{digest[:6]} {LABEL.format(1)}: 60 of 60 loss ")


def test_a_run_says_what_trained_it(tmp_path: Path) -> None:
    run = train(tiny(), root=tmp_path, progress=False)
    assert made_with(run.folder) == [{"step": 0, **provenance(train, "cpu", torch.float32)}]


def train_as(monkeypatch: pytest.MonkeyPatch, root: Path, torch_version: str, *, saves: int, **changes: Any) -> Run:
    """Train under another version, at most until so many steps are saved."""
    left, save_state = iter(range(saves)), Run.save_state

    def save_or_die(self: Run, *args: Any) -> None:
        if next(left, None) is None:
            raise Killed
        save_state(self, *args)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(loop, "SAVE_SECONDS", -1.0)
        patch.setattr(loop, "provenance", lambda *_: {"torch": torch_version})
        patch.setattr(Run, "save_state", save_or_die)
        train(tiny(**changes), root=root, progress=False)
    return Run.of(tiny(**changes), root)


def test_a_resumed_run_says_from_which_step_on_what_trained_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not (train_as(monkeypatch, tmp_path, "0", saves=0)).finished  # steps 0 of it are lost
    assert train_as(monkeypatch, tmp_path, "1", saves=3).step == 2
    assert train_as(monkeypatch, tmp_path, "1", saves=2).step == 4
    assert train_as(monkeypatch, tmp_path, "2", saves=0).step == 4  # nothing of it is left either
    run = train_as(monkeypatch, tmp_path, "3", saves=99)
    assert run.finished
    assert made_with(run.folder) == [{"step": 0, "torch": "1"}, {"step": 5, "torch": "3"}]


@pytest.mark.parametrize("text", [None, "[{"], ids=["before it was recorded", "damaged"])
def test_a_resumed_run_keeps_unknown_what_trained_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    path = train_as(monkeypatch, tmp_path, "1", saves=3).folder / "made_with.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    run = train_as(monkeypatch, tmp_path, "2", saves=99)
    assert run.finished
    assert made_with(run.folder) == [{"step": 0}, {"step": 3, "torch": "2"}]


# ---- the store is asked first


def test_a_finished_run_is_loaded_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tiny(), root=tmp_path, progress=False)
    before = contents(first)
    refuse_to_train(monkeypatch)
    again = train(tiny(), root=tmp_path, progress=False, device="no such device")  # which is not needed either
    assert again == first and contents(again) == before
    with pytest.raises(AssertionError, match="a training step was taken"):
        train(tiny(seed=1), root=tmp_path, progress=False)


def test_train_all_starts_no_process_for_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [tiny(seed=1), tiny(seed=0)]
    runs = [train(config, root=tmp_path, progress=False) for config in configs]
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", None)
    assert train_all([*configs, configs[0]], root=tmp_path) == [*runs, runs[0]]
    assert train_all([], root=tmp_path) == []


# ---- checkpoints


def test_checkpoint_steps_are_log_spaced() -> None:
    assert checkpoint_steps(tiny(steps=1000, n_checkpoints=5)) == [0, 1, 10, 100, 1000]
    assert checkpoint_steps(tiny(steps=1, n_checkpoints=5)) == [0, 1]
    assert checkpoint_steps(tiny(steps=3, n_checkpoints=24)) == [0, 1, 2, 3]


@settings(derandomize=True, database=None, deadline=None)
@given(steps=st.integers(1, 100_000), n_checkpoints=st.integers(3, 60))
def test_checkpoint_steps_reach_from_0_to_the_last(steps: int, n_checkpoints: int) -> None:
    made = checkpoint_steps(tiny(steps=steps, n_checkpoints=n_checkpoints))
    assert made[0] == 0 and made[-1] == steps
    assert all(isinstance(step, int) for step in made)
    assert made == sorted(set(made)) and len(made) <= n_checkpoints
    ratio = steps ** (1 / (n_checkpoints - 2))  # neighbours differ by this factor, or by rounding
    assert all(later <= earlier * ratio + ratio + 1 for earlier, later in pairwise(made[1:]))


def test_two_checkpoints_are_the_first_and_the_last(tmp_path: Path) -> None:
    assert checkpoint_steps(tiny(n_checkpoints=2)) == [0, 12]
    assert train(tiny(n_checkpoints=2), root=tmp_path, progress=False).finished


# ---- killed at any moment: tests/test_killed.py does so for real


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


def test_killed_again_and_again_it_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt gets only a little further: the first state it saves is its last."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    whole = train(tiny(), root=tmp_path / "whole", progress=False)
    attempts = 0
    while not Run.of(tiny(), tmp_path).finished:
        attempts += 1
        save_state = Run.save_state

        def save_and_die(self: Run, *args: Any, save_state: Any = save_state) -> None:
            save_state(self, *args)
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Run, "save_state", save_and_die)
            train(tiny(), root=tmp_path, progress=False)
    assert attempts == 13  # steps 0 to 12, one each
    assert contents(Run.of(tiny(), tmp_path)) == contents(whole)


def test_an_error_in_a_step_leaves_no_temporary_file_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="a training step was taken"):
        refuse_to_train(patch)
        train(tiny(), root=tmp_path, progress=False)
    run = Run.of(tiny(), tmp_path)
    assert set(contents(run)) == {
        "config.yaml",
        "made_with.json",
        "checkpoints/000000.safetensors",
        "metrics.jsonl",
        "state.safetensors",
    }
    assert train(tiny(), root=tmp_path, progress=False).finished


# ---- several processes

TRAIN = """
import torch
from mdm_interp.training import loop, trainees
torch.set_num_threads(1)
loop.SAVE_SECONDS = -1.0
loop.train(config, root=root, progress=False)
"""


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start in moments: their server has imported the package, and what torch's optimizers import."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs the forkserver start method")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mdm_interp.training.loop", "torch._dynamo"])
    return context


def start(
    processes: ForkServerContext, config: TrainConfig, root: Path, first: str = "", **names: Any
) -> ForkServerProcess:
    """Start a process that trains, after code of one's own."""
    process = processes.Process(
        target=exec, args=(first + TRAIN, {"config": config, "root": root, **names}), daemon=True
    )
    process.start()
    return process


def ended_well(process: ForkServerProcess) -> bool:
    process.join(timeout=60)
    return process.exitcode == 0


ASKERS = 8


@pytest.mark.promise("eight processes that want one run", "it is trained once, to the same bits")
def test_processes_that_want_the_same_run_share_it(
    tmp_path: Path, processes: ForkServerContext, record_property: Callable[[str, Any], None]
) -> None:
    config = tiny(steps=40)
    alone = train(config, root=tmp_path / "alone", progress=False)
    together = [start(processes, config, tmp_path) for _ in range(ASKERS)]
    assert all([ended_well(process) for process in together])
    assert contents(Run.of(config, tmp_path)) == contents(alone)
    record_property("times", ASKERS)


OVERLAPPING = """
import json, time, torch
from mdm_interp.errors import UserError
from mdm_interp.training import loop
from mdm_interp.training.runs import Run
torch.set_num_threads(1)
runs = [Run.of(config, root) for config in configs]
loop.train_ensemble(runs, "cpu", lambda progressed: None)
for _ in range(100):
    try:
        got = [run.metrics() for run in runs]
        break
    except UserError:  # without locks, another process may be about to complete them
        time.sleep(0.1)
(root / f"{name}.json").write_text(json.dumps(got))
"""


@pytest.mark.promise("eight processes that want overlapping runs", "none waits for ever, and all get the same")
@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_processes_that_want_overlapping_runs_get_the_same(
    tmp_path: Path, processes: ForkServerContext, locks: str, record_property: Callable[[str, Any], None]
) -> None:
    """Each wants four of seven runs, as an ensemble, in an order of its own."""
    configs, chooser, wanted = [tiny(seed=seed, steps=30) for seed in range(7)], random.Random(0), dict[int, Any]()
    whole = [train(config, root=tmp_path / "alone", progress=False) for config in configs]
    together = []
    for name in range(ASKERS):
        wanted[name] = chooser.sample(configs, 4)
        first = WITHOUT_LOCKS if locks == "without locks" else ""
        given = {"configs": wanted[name], "root": tmp_path, "name": name, "seed": name}
        process = processes.Process(target=exec, args=(first + OVERLAPPING, given), daemon=True)
        process.start()
        together.append(process)
    assert all([ended_well(process) for process in together])
    runs = [Run.of(config, tmp_path) for config in configs]
    for name, asked in wanted.items():
        got = json.loads((tmp_path / f"{name}.json").read_text())
        assert str(got) == str([runs[configs.index(config)].metrics() for config in asked])
    for run, alone in zip(runs, whole, strict=True):
        run.check()
        for name, weight in run.model().state_dict().items():
            assert_close(weight, alone.model().state_dict()[name], atol=1e-5, rtol=0)
    record_property("times", ASKERS)


WITHOUT_LOCKS = """
import contextlib, random, time
import filelock

class Open:
    def __init__(self, path, **options): pass
    def acquire(self): pass
    def release(self): pass

filelock.FileLock = Open
from mdm_interp.training.runs import Run

record = Run.record

def slowly(self, rows):
    time.sleep(jitter.uniform(0, 0.02))
    record(self, rows)

jitter = random.Random(seed)
Run.record = slowly
"""


@pytest.mark.promise("eight processes that want one run, without locks", "identical copies meet, nothing is lost")
def test_processes_that_train_a_run_without_locks_end_in_the_bits_of_one(
    tmp_path: Path, processes: ForkServerContext, record_property: Callable[[str, Any], None]
) -> None:
    """All write all of it, one behind the other: neither is in the way of another, and nothing is lost."""
    config = tiny(steps=60, n_checkpoints=40)
    whole = Run.of(config, tmp_path / "whole")
    assert ended_well(start(processes, config, tmp_path / "whole"))
    run, together = Run.of(config, tmp_path), list[Any]()
    for seed in range(ASKERS):
        process = start(processes, config, tmp_path, WITHOUT_LOCKS, seed=seed)
        together.append(process)
        while seed == 0 and not (run.step or 0) >= 5 and process.is_alive():
            time.sleep(0.002)
    assert sum(process.is_alive() for process in together) == ASKERS, "they were not at it at one time"
    looks = list[bool]()
    while any(process.is_alive() for process in together):
        if run.finished:
            assert run.steps == checkpoint_steps(config)
            try:
                looks.append(bool(run.metrics()))
            except UserError:  # it lacks rows
                looks.append(False)
    assert sum(looks) > 0.9 * len(looks) > 0, "whoever was behind took rows away"
    assert all([ended_well(process) for process in together])
    assert contents(run) == contents(whole)
    record_property("times", ASKERS)


@pytest.mark.promise("a file system without locks", "training goes on, and leaves no lock that outlives it")
@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_trains_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(answer, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    run = train(tiny(), root=tmp_path, progress=False)
    assert run.finished
    assert run.folder.joinpath(".lock").read_bytes() == b"", "a soft lock is left, which outlives whoever holds it"


@pytest.mark.promise("a run's folder that is deleted or moved while it is trained", "one line; repeated, the same bits")
@pytest.mark.parametrize("gone", ["deleted", "moved"])
def test_a_folder_that_vanishes_ends_training_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str, record_property: Callable[[str, Any], None]
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    whole = train(tiny(), root=tmp_path / "whole", progress=False)
    for moment in range(12):
        run = Run.of(tiny(), tmp_path / str(moment))

        def vanish(progressed: Progressed, run: Run = run, moment: int = moment) -> None:
            if progressed.step == moment:
                run.folder.rename(tmp_path / f"moved {moment}") if gone == "moved" else shutil.rmtree(run.folder)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "REPORT_STEPS", 1)
            with pytest.raises(UserError, match=f"^{run.folder}: was moved or deleted while it was being trained; "):
                train(tiny(), root=run.folder.parent, report=vanish)
        assert not run.folder.exists(), "half a run was begun in its place"
        if gone == "moved":
            (tmp_path / f"moved {moment}").rename(run.folder)
        assert contents(train(tiny(), root=run.folder.parent, progress=False)) == contents(whole)
    record_property("times", 12)


def test_only_old_temporary_files_are_leftovers(tmp_path: Path) -> None:
    run = Run.of(tiny(), tmp_path)
    old, new = run.folder / "checkpoints" / ".a.x.tmp", run.folder / ".b.x.tmp"
    for path in (old, new):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.utime(old, (0, time.time() - 4000))
    train(run.config, root=tmp_path, progress=False)
    assert new.exists() and not old.exists()


def test_nobody_writes_a_run_that_another_process_holds(tmp_path: Path, processes: ForkServerContext) -> None:
    run = Run.of(tiny(), tmp_path)
    run.folder.mkdir()
    with FileLock(run.folder / ".lock"):
        process = start(processes, tiny(), tmp_path)
        time.sleep(1.0)  # ample: unhindered, it would be finished
        assert process.is_alive() and contents(run) == {}
    assert ended_well(process) and run.finished


class CountingPool(ProcessPoolExecutor):
    submitted: list[list[Run]]

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.submitted.append(args[2][0])  # _work(modules, function, (runs, device))
        return super().submit(fn, *args, **kwargs)


@pytest.mark.promise("runs trained by two processes", "those of one; runs trained as one batch, within 1e-5")
@pytest.mark.slow
def test_train_all_gives_the_runs_of_train_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountingPool, "submitted", [], raising=False)
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", CountingPool)
    configs = [tiny(seed=2), tiny("causal"), tiny(seed=1), tiny(seed=2), tiny(seed=3)]
    stored = train(configs[2], root=tmp_path, progress=False)
    runs = train_all(configs, root=tmp_path, workers=2)
    assert [run.config for run in runs] == configs and runs[2] == stored
    trained = [[run.config for run in together] for together in CountingPool.submitted]
    assert trained == [[configs[0], configs[4]], [configs[1]]]
    for run in runs:
        alone = train(run.config, root=tmp_path / "one by one", progress=False)
        (made_by,) = made_with(run.folder)
        if run.config in trained[0]:
            assert made_by["ensemble"] == 2
            for name, weight in run.model().state_dict().items():
                assert_close(weight, alone.model().state_dict()[name], atol=1e-5, rtol=0)
        else:
            assert contents(run) == contents(alone) and "ensemble" not in made_by


@pytest.mark.slow
def test_a_workers_user_error_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a worker sees this mistake: the run was killed after step 2, and a checkpoint is gone."""
    damaged = train_as(monkeypatch, tmp_path, "1", saves=3, seed=1)
    assert damaged.step == 2
    lost = damaged.checkpoint_path(1)
    lost.unlink()
    with pytest.raises(UserError, match=rf"^{lost}: .* delete the folder {damaged.folder} to train"):
        train_all([tiny(), damaged.config], root=tmp_path, workers=2)


# ---- training that diverges


@pytest.mark.promise(
    "training whose loss or weights become NaN or infinite", "stopped by name, with what to try; what was good is kept"
)
@pytest.mark.parametrize(("lr", "kept", "from_step"), [(1e30, 1, 2), (1e20, 0, 1)])
def test_training_that_diverges_stops_with_the_step_and_keeps_what_was_good(
    tmp_path: Path, lr: float, kept: int, from_step: int
) -> None:
    """Step 1 of the second has finite weights, whose answers are none."""
    config = tiny(lr=lr, steps=60, n_checkpoints=8)
    run, reports = Run.of(config, tmp_path), list[Progressed]()
    for _ in range(2):  # and so does who goes on with it
        with pytest.raises(Diverged) as caught:
            train(config, root=tmp_path, report=reports.append)
        assert str(caught.value) == (
            f"{run.folder}: loss or weights are NaN or infinite from step {from_step} on; lower lr ({lr:g}) or raise "
            f"warmup (100); what was saved at step {kept} is kept"
        )
        assert run.step == run.steps[-1] == kept and not run.finished
        assert math.isfinite(sum(run.metrics()[-1][f"{way}_probability"] for way in ("forward", "reverse")))
        run.check()  # all that is there is finite
    assert all(math.isfinite(progressed.loss) for progressed in reports if progressed.step)


@pytest.mark.parametrize("lr", [1e2, 1e3])
def test_training_whose_loss_explodes_stops_with_the_step_and_keeps_what_was_good(tmp_path: Path, lr: float) -> None:
    """Its numbers are finite, and stay so to the end under the first."""
    config = tiny(lr=lr, steps=60, n_checkpoints=8)
    run, reports = Run.of(config, tmp_path), list[Progressed]()
    for _ in range(2):  # and so does who goes on with it
        with pytest.raises(
            Diverged, match=rf"^{run.folder}: the loss has exploded by step 25, from 3\.78 to "
        ) as caught:
            train(config, root=tmp_path, report=reports.append)
        assert str(caught.value).endswith(
            f", where knowing nothing gives 2.64; lower lr ({lr:g}) or raise warmup (100); what was saved at step 15 "
            "is kept"
        )
        assert run.step == run.steps[-1] == 15 and not run.finished
        run.check()


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_training_that_learns_badly_is_not_stopped(tmp_path: Path, lr: float) -> None:
    assert train(tiny(lr=lr, steps=60, warmup=1), root=tmp_path, progress=False).finished


def test_an_explosion_is_told_by_most_losses_and_never_by_a_few() -> None:
    """Of 25, against the larger of the first and of log(d_vocab)."""
    for first, most in ((0.1, 4 * math.log(20)), (3.0, 4 * math.log(20)), (9.0, 36.0)):
        losses = LastLosses(20)
        losses.add(first)
        for i in range(400):
            losses.add(1e6 if i % 25 < 12 else 0.99 * most)
            assert not losses.exploded
        for i in range(25):
            assert not losses.exploded
            losses.add(1.01 * most if i % 2 == 0 else 0.0)
        assert losses.exploded
        again = LastLosses(20)
        again.set_state(losses.get_state())
        assert again.exploded and again.first == first
        again.add(0.0)
        assert not again.exploded
    short = LastLosses(20)
    for _ in range(24):
        short.add(1e6)
    assert not short.exploded


@pytest.mark.parametrize("lr", [1e20])
def test_a_last_step_that_diverges_finishes_no_run(tmp_path: Path, lr: float) -> None:
    """The loss of a step is that of before it."""
    config = tiny(lr=lr, steps=1, warmup=1)
    with pytest.raises(Diverged, match="from step 1 on"):
        train(config, root=tmp_path, progress=False)
    assert Run.of(config, tmp_path).step == 0


def test_a_member_that_diverges_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    configs = [tiny(seed=1), tiny(seed=2, lr=1e30), tiny(seed=3)]
    runs = [Run.of(config, tmp_path) for config in configs]
    with pytest.raises(Diverged, match=f"^{runs[1].folder}: .* from step 2 on"):
        loop.train_ensemble(runs, "cpu", lambda progressed: None)
    assert [run.step for run in runs] == [12, 1, 12]
    for run in (runs[0], runs[2]):
        alone = train(run.config, root=tmp_path / "alone", progress=False).model().state_dict()
        for name, weight in run.model().state_dict().items():
            assert_close(weight, alone[name], atol=1e-5, rtol=0)


def test_runs_beside_one_that_diverges_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "side_by_side", one_after_the_other)
    monkeypatch.setattr(loop, "ensembles", lambda runs, *_: [[run] for run in runs])
    configs = [tiny(lr=1e30), tiny(seed=1), tiny(seed=2)]
    with pytest.raises(Diverged, match=configs[0].digest()):
        train_all(configs, root=tmp_path, workers=1)
    assert [Run.of(config, tmp_path).finished for config in configs] == [False, True, True]
    damaged = Run.of(configs[1], tmp_path)
    damaged.state_path.unlink()
    (damaged.folder / "config.yaml").write_text("[")
    with pytest.raises(UserError, match="not YAML"):  # another error is not put off
        train_all(configs[1:], root=tmp_path, workers=1)


# ---- devices


def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == "cpu"
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert check_device("auto") == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
@pytest.mark.parametrize("device", ["cuda", "cuda:9"])
def test_a_missing_gpu_is_a_users_mistake(tmp_path: Path, device: str) -> None:
    message = rf"^device: '{device}' cannot be used here \(.+\); use 'cpu' or 'auto'$"
    with pytest.raises(UserError, match=message):
        train(tiny(), root=tmp_path, device=device, progress=False)
    with pytest.raises(UserError, match=message):
        train_all([tiny()], root=tmp_path, device=device)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "device",
    [
        "gpu",
        "",
        "meta",
    ],
)
def test_a_device_that_is_none_is_a_users_mistake(device: str) -> None:
    with pytest.raises(UserError, match=rf"^device: '{device}' cannot be used here"):
        check_device(device)


# ---- settings that cannot be trained


@pytest.mark.parametrize(("objective", "shift"), [("any_order", -1), ("causal", 0)])
def test_a_shift_that_the_objective_does_not_train_is_refused(objective: Objective, shift: Literal[0, -1]) -> None:
    model = tiny(objective).model.model_copy(update={"readout_shift": shift})
    with pytest.raises(ValueError, match="readout_shift"):
        TrainConfig(model=model, facts=FACTS, objective=objective)


def test_a_world_without_testable_facts_is_refused_with_its_cause(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reversed_share"):
        facts = FactConfig(world="two_role", n_entities=4, reversed_share=0.9)
        model = ModelConfig(d_model=8, n_heads=2, d_vocab=facts.d_vocab, n_ctx=facts.seq_len)
        train(TrainConfig(model=model, facts=facts, steps=1), root=tmp_path, progress=False)


# ---- learning


def learn(position: Scheme, objective: Objective, steps: int, root: Path) -> tuple[list[dict[str, Any]], float]:
    """The metrics of a small model of three roles with four entities each, and chance."""
    facts = FactConfig(n_entities=12, n_filler=6, seq_len=6)
    attention = "causal" if objective == "causal" else "bidirectional"
    model = ModelConfig(d_model=32, n_heads=4, d_vocab=facts.d_vocab, n_ctx=6, position=position, attention=attention)
    run = train(
        TrainConfig(model=model, facts=facts, objective=objective, steps=steps, batch_size=128, n_checkpoints=12),
        root=root,
        progress=False,
    )
    return run.metrics(), run.facts.chance


@pytest.mark.slow
def test_an_alibi_mdm_learns_and_answers_in_reverse_as_it_does_forward(tmp_path: Path) -> None:
    rows, chance = learn("alibi", "any_order", 900, tmp_path)
    first, last = rows[0], rows[-1]
    assert first["forward_probability"] < chance
    assert last["forward_probability"] > 0.8
    assert abs(last["reverse_probability"] - last["forward_probability"]) < 0.02


@pytest.mark.slow
def test_a_rope_arm_learns_but_never_answers_in_reverse(tmp_path: Path) -> None:
    rows, chance = learn("rope", "causal", 400, tmp_path)
    assert rows[-1]["forward_probability"] > 0.8
    assert max(row["reverse_probability"] for row in rows) <= chance


@pytest.mark.parametrize("objective", ["any_order", "causal"])
def test_a_run_that_is_retraced_goes_through_its_own_checkpoints(objective: Objective, tmp_path: Path) -> None:
    config = tiny(objective)
    run = train(config, root=tmp_path, progress=False)
    passed = {
        step: {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for step, model in enumerate(loop.retrace(config))
    }
    assert sorted(passed) == list(range(config.steps + 1))
    for step in run.steps:
        saved = run.model(step).state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in passed[step].items())
