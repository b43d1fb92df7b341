"""Training: `train(config)` gives a finished :class:`~mdm_interp.training.runs.Run`, from the store if it is there.

A run that was killed resumes from its last saved state and ends in bit-identical weights on the same machine, thread
count and build, because all randomness comes from one generator whose state is saved with the weights. One that was
begun together with others goes on as one of them, whoever else is left; begun alone, it would have ended in the same
weights up to rounding.
"""

from __future__ import annotations

import heapq
import math
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdm_interp.config import TrainConfig
from mdm_interp.data.queries import QueryPair, queries_of
from mdm_interp.data.worlds import FactWorld
from mdm_interp.devices import check_device
from mdm_interp.errors import Diverged, Overflow, UserError, few
from mdm_interp.files import DEFAULT_ROOT, LOCK, locked, remove_leftovers
from mdm_interp.inference.prediction import predict
from mdm_interp.models.positions import SAMPLE, sample_answers
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.parallel import Workers, find_place, progress_bars, side_by_side
from mdm_interp.provenance import made_with, provenance, stamp
from mdm_interp.tensors import not_finite
from mdm_interp.training.losses import LastLosses
from mdm_interp.training.runs import Run, checkpoint_steps
from mdm_interp.training.trainees import Ensemble, Trainee, shape_of

SAVE_SECONDS = 30.0
REPORT_STEPS = 25
MEMBERS, MEMBERS_ON_GPU = 8, 16
"""How many runs are batched at most: more no longer fit a core's cache, and keep a GPU waiting for batches, which are
drawn on the CPU."""
WIDEST = 128
"""Largest width times depth of what is batched on a CPU; wider models have less overhead to share."""


@dataclass(frozen=True)
class Progressed:
    """How far a run has come."""

    digest: str
    label: str
    step: int
    total: int
    loss: float
    forward: float
    """Mean probability of the forward queries' answers at the last checkpoint."""
    reverse: float


Report = Callable[[Progressed], None]


def train(
    config: TrainConfig,
    *,
    root: str | Path = DEFAULT_ROOT,
    device: str = "cpu",
    progress: bool = True,
    report: Report | None = None,
) -> Run:
    """Train `config`, resume it, or, if it is finished, check that it is whole. Metrics that are lost or damaged are
    computed again, but for their losses, and a warning says so.

    Args:
        root: Folder of the run store.
        device: `cpu`, `cuda`, … or `auto`.
        progress: Draw a progress bar with the loss and both probabilities.
        report: Called every few steps instead of drawing a bar.

    Raises:
        UserError: the device cannot be used, or what the store holds of this run is damaged.
        Diverged: loss or weights are no longer finite, or the loss has exploded. What was saved before is kept.
    """
    run = Run.of(config, root)
    if run.finished:
        if run.read_metrics()[1]:
            with locked(run.folder / LOCK):
                _record_again(run, check_device(device))
        run.check()
        return run
    if report is not None or not progress:
        _train([run], check_device(device), report or (lambda progressed: None))
        return run
    with _Bars() as bars:
        _train([run], check_device(device), bars.show)
    return run


def train_all(
    configs: Sequence[TrainConfig], *, root: str | Path = DEFAULT_ROOT, device: str = "cpu", workers: Workers = None
) -> list[Run]:
    """Train many configs side by side, those of one shape together (:func:`ensembles`), and return their runs in order.
    Runs that were finished before are checked when they are read.

    Args:
        root: Folder of the run store. Workers of a Dask cluster have to reach it under the same path.
        workers: How many single-threaded processes, or the address of a Dask scheduler; default:
            :func:`~mdm_interp.parallel.default_workers`.

    Raises:
        UserError: as :func:`train`; and where no scheduler answers, or a worker does not reach `root`.
        Diverged: of one of the runs, once all others are trained.
    """
    runs = [Run.of(config, root) for config in configs]
    missing = {run.folder: Run.of(run.config, Path(root).absolute()) for run in runs if not run.finished}
    if not missing:
        return runs
    n, device = find_place(workers, device)
    Path(root).mkdir(parents=True, exist_ok=True)
    tasks = [(together, device) for together in ensembles(list(missing.values()), device, n)]
    diverged: list[Diverged] = []

    def finished(future: Future[None]) -> None:
        try:
            future.result()
        except Diverged as error:
            diverged.append(error)

    with _Bars(total_runs=len(missing)) as bars:
        side_by_side(train_ensemble, tasks, workers=workers or n, show=bars.show, finished=finished)
    if diverged:
        raise diverged[0]
    return runs


def train_ensemble(runs: Sequence[Run], device: str, report: Report) -> None:
    """Train runs of one shape in this process, those that are at one step together.

    Args:
        runs: Of one root, which exists.

    Raises:
        UserError: as :func:`train`; and where the root is not there.
        Diverged: of one of the runs, once the others are trained.
    """
    root = runs[0].folder.parent
    if not root.is_dir():
        raise UserError(f"runs: {root} is not there on {socket.gethostname()}; give a folder that all workers share")
    _train(runs, device, report)


def ensembles(runs: Sequence[Run], device: str, workers: int) -> list[list[Run]]:
    """Divide runs into those that are trained together, the longest first, so that no worker waits long for the last.

    Runs of one shape are batched where that is faster: on a GPU, and for narrow models of one layer. They are dealt out
    evenly, in as few parts as keep all workers busy to the end by :func:`estimate_seconds`.
    """
    of_shape: dict[Any, list[Run]] = {}
    for run in runs:
        model = run.config.model
        batched = device != "cpu" or model.n_layers * model.d_model <= WIDEST
        of_shape.setdefault(shape_of(run.config) if batched else run.folder, []).append(run)
    most = MEMBERS if device == "cpu" else MEMBERS_ON_GPU
    total = sum(_seconds(alike) for alike in of_shape.values())

    def divided(fineness: int) -> list[list[Run]]:
        """Divide so that no part takes longer than a `fineness`-th of what each worker has to do."""
        found = []
        for alike in of_shape.values():
            n = max(math.ceil(len(alike) / most), math.ceil(_seconds(alike) * workers * fineness / total))
            found += [list(share) for share in np.array_split(np.array(alike, dtype=object), min(n, len(alike)))]
        return sorted(found, key=_seconds, reverse=True)

    def cost(fineness: int) -> float:
        return last_end([_seconds(share) for share in divided(fineness)], workers) * (1 + WORTH * fineness)

    return divided(min(range(FINEST + 1), key=cost))


FINEST, WORTH = 4, 0.05
"""Into how small parts of a worker's share work is divided at most, and what share of the time each step there saves at
least: smaller ensembles take longer in all."""


def estimate_seconds(config: TrainConfig, members: int = 1) -> float:
    """Estimate how long a CPU core trains so many runs of one shape together.

    Steps take a time of their own, more for each layer, and each member adds drawing its batch, and for each token the
    products with all weights and some operations on all activations. The constants are from a core of a server, where
    it was right to within a third for widths of 16 to 256, 1 to 4 layers, with and without MLP, and ensembles of 1 to
    8. What is compared is their ratio, and that differs less between machines.
    """
    model, tokens = config.model, config.batch_size * config.facts.seq_len
    d_attention, d_mlp = model.n_heads * model.head_dim, model.d_mlp or 0
    weights = 4 * model.d_model * d_attention + (3 if model.gated_mlp else 2) * model.d_model * d_mlp
    of_token = 6 * weights / 60e9 + 2e-8 * (model.d_model + d_mlp)
    return config.steps * (3.4e-3 + 1.2e-3 * model.n_layers + members * (1.3e-3 + model.n_layers * tokens * of_token))


def _seconds(runs: Sequence[Run]) -> float:
    return estimate_seconds(runs[0].config, len(runs))


def last_end(seconds: Sequence[float], workers: int) -> float:
    """Return when the last worker ends, if whoever is free takes the next task."""
    ends = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def retrace(config: TrainConfig, *, device: str = "cpu") -> Iterator[HookedTransformer]:
    """Train `config` once more, in memory, and give the model before the first step and after each one.

    It is the same model each time, whose weights change in place. The run store is neither read nor written. On the
    machine, thread count and build that trained a run, the weights are bit-identical with its checkpoints.

    Raises:
        UserError: the device cannot be used.
    """
    trainee = Trainee(config, FactWorld(config.facts, config.seed), check_device(device))
    yield trainee.model
    for step in range(1, config.steps + 1):
        trainee.advance(step)
        yield trainee.model


def _train(runs: Sequence[Run], device: str, report: Report) -> None:
    """Train runs of one shape together, under their locks, so that two processes never write one run."""
    with ExitStack() as locks:
        for run in sorted(runs, key=lambda run: run.folder):  # in one order everywhere, so that none waits for another
            run.folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(locked(run.folder / LOCK))
        under_way = [_Training(run, device) for run in runs if not run.finished]
        for step in sorted({training.step for training in under_way}):
            _train_together([training for training in under_way if training.step == step], device, report)
        for training in under_way:
            if training.diverged is not None:
                training.run.stop_diverged(training.diverged, training.losses)


def _train_together(trainings: Sequence[_Training], device: str, report: Report) -> None:
    """Train runs of one shape that are at one step, to the end. One that diverges does not disturb the others."""
    first = trainings[0]
    alone = len(trainings) == 1 and first.ensemble is None and not first.trainee.model.W_E.is_cuda
    members = [training.trainee for training in trainings]
    if len(members) == 1 and first.ensemble is not None:  # beside itself: kernels for a batch of one round otherwise
        members.append(first.trainee.copy())
    ensemble = None if alone else Ensemble(members)
    for training in trainings:
        made_by = provenance(train, device, training.trainee.model.W_E.dtype)
        if sample := sample_answers(training.run.config.model):
            made_by[SAMPLE] = sample
        stamp(
            training.run.folder,
            training.step + 1,
            made_by if ensemble is None else {**made_by, "ensemble": training.ensemble or len(trainings)},
        )
    saved = time.monotonic()
    for step in range(first.step + 1, first.run.config.steps + 1):
        if step > 0:
            losses = first.trainee.advance(step)[None] if ensemble is None else ensemble.advance(step)[: len(trainings)]
            for training, loss in zip(trainings, losses, strict=True):
                training.step, training.loss = step, loss
        due = time.monotonic() - saved > SAVE_SECONDS
        at_checkpoint = [training for training in trainings if step in training.checkpoints]
        if ensemble is not None and (due or at_checkpoint):
            ensemble.update_members()
        to_report = step % REPORT_STEPS == 0 or step == first.run.config.steps
        if due or at_checkpoint or to_report or not first.loss.is_cuda:  # a look at each loss keeps a GPU waiting
            for training in trainings:
                training.look(step, closely=due or bool(at_checkpoint))
        sound = [training for training in trainings if training.diverged is None]
        if not sound:
            return
        for training in sound:
            if step in training.checkpoints:
                training.record(step)
            if training.diverged is None and (due or step in training.checkpoints):
                training.save(step)
        if due or at_checkpoint:
            saved = time.monotonic()
        if to_report:
            for training in sound:
                if training.diverged is None:
                    report(training.progressed(step))


class _Training:
    """A run under way, from where its folder has it."""

    def __init__(self, run: Run, device: str) -> None:
        self.run, config = run, run.config
        remove_leftovers(run.folder)
        if not (run.folder / "config.yaml").exists():
            config.to_yaml(run.folder / "config.yaml")
        run.check()
        self.trainee, self.losses = Trainee(config, run.facts, device), LastLosses(config.model.d_vocab)
        self.step = -1 if run.step is None else run.load_state(*self._state())
        """How many steps are trained; -1 before anything is saved."""
        self.ensemble: int | None = made_with(run.folder)[-1].get("ensemble")
        """Together with how many it was begun. One that is left of them goes on as one of them, to end in the same
        bits."""
        if self.step >= 0 and run.read_metrics()[1]:
            _record_again(run, device)
        self.recorded = [row for row in run.metrics() if row["step"] <= self.step] if self.step >= 0 else []
        self.latest: dict[str, Any] = self.recorded[-1] if self.recorded else {}
        self.loss = torch.tensor(self.latest.get("loss", float("nan")))
        self.diverged: int | None = None
        """The step from which on loss or weights are not finite, or by which the loss has exploded."""
        self.checkpoints, self.pairs = set(checkpoint_steps(config)), run.query_pairs()

    def _state(self) -> tuple[HookedTransformer, torch.optim.Optimizer, torch.Generator, LastLosses]:
        return self.trainee.model, self.trainee.optimizer, self.trainee.generator, self.losses

    def look(self, step: int, *, closely: bool) -> None:
        """Note if the loss, which there is from the first step on, has exploded, or it or (closely) a weight is no
        longer finite."""
        if self.diverged is not None:
            return
        seen = {"loss": self.loss} if step > 0 else {}
        if not_finite(seen | (self.trainee.model.state_dict() if closely else {})):
            self.diverged = step
        elif step > 0:
            self.losses.add(self.loss.item())
            if self.losses.exploded:
                self.diverged = step

    def record(self, step: int) -> None:
        """Ask the queries, and write a checkpoint if its answers are numbers: huge weights may give others."""
        try:
            found = {"step": step, "loss": self.loss.item(), **_answers(self.trainee.model, self.pairs)}
        except Overflow:
            self.diverged = step
            return
        self.latest = found
        self.run.save_checkpoint(step, self.trainee.model)
        self.recorded.append(self.latest)
        self.run.record(self.recorded)

    def save(self, step: int) -> None:
        """Save what resuming needs, unless another process is as far: without locks there may be one."""
        if (saved := self.run.step) is None or saved < step:
            self.run.save_state(step, *self._state())

    def progressed(self, step: int) -> Progressed:
        config, both = self.run.config, (self.latest["forward_probability"], self.latest["reverse_probability"])
        return Progressed(config.digest(), _label(config), step, config.steps, self.loss.item(), *both)


def _answers(model: HookedTransformer, pairs: Sequence[QueryPair]) -> dict[str, float]:
    """Return what is recorded of a model besides its loss."""
    found = {}
    for name in ("forward", "reverse"):
        answered = predict(model, queries_of(pairs, name))
        found[f"{name}_probability"] = float(answered.probability.mean())
        found[f"{name}_accuracy"] = float(answered.correct.float().mean())
        found[f"{name}_rank"] = float(answered.rank.float().mean())
    return found


def _record_again(run: Run, device: str) -> None:
    """Compute those lines of a run's metrics that are missing or damaged from its checkpoints, and say so. Losses are
    of batches that are gone: there, they are NaN.

    Raises:
        UserError: a checkpoint is missing or damaged.
    """
    rows, problem = run.read_metrics()
    done, there = -1 if run.step is None else run.step, {row["step"] for row in rows}
    lacking, pairs = [step for step in run.steps if step <= done and step not in there], run.query_pairs()
    again = [{"step": step, "loss": math.nan, **_answers(run.model(step, device), pairs)} for step in lacking]
    run.record(again)
    said = (
        f"what it said of steps {few(lacking)} was computed again, but for the loss"
        if lacking
        else "it is in order now"
    )
    warnings.warn(f"{run.metrics_path}: was damaged ({problem}); {said}", stacklevel=3)


def _label(config: TrainConfig) -> str:
    shape = f"{config.model.n_layers} x {config.model.n_heads} heads"
    return f"{config.facts.world} {config.model.position} {config.objective}, {shape}, seed {config.seed}"


class _Bars:
    """Progress bars, one per run under way, and one over all runs when there are several."""

    def __init__(self, total_runs: int = 1) -> None:
        self.progress = progress_bars()
        self.tasks: dict[str, Any] = {}
        self.runs = (
            self.progress.add_task("training runs", total=total_runs, values="", over_all=True)
            if total_runs > 1
            else None
        )

    def __enter__(self) -> _Bars:
        return self  # drawn from the first report on: an error before it is alone on its line

    def __exit__(self, *exception: object) -> None:
        if self.tasks:
            self.progress.stop()

    def show(self, progressed: Progressed) -> None:
        self.progress.start()
        digest = progressed.digest
        if digest not in self.tasks:
            described = f"{digest[:6]} {progressed.label}"
            self.tasks[digest] = self.progress.add_task(described, total=progressed.total, values="")
        text = f"fwd {progressed.forward:.2f} rev {progressed.reverse:.2f}"
        if progressed.step:  # before the first there is no loss
            text = f"loss {progressed.loss:.2f} {text}"
        self.progress.update(self.tasks[digest], completed=progressed.step, values=text)
        if progressed.step == progressed.total and self.runs is not None:
            self.progress.advance(self.runs)
            self.progress.remove_task(self.tasks[digest])
