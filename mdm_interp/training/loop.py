"""Training: `train(config)` gives a finished :class:`~mdm_interp.training.runs.Run`, from the store if it is there.

A run that was killed resumes from its last saved state and ends in bit-identical weights on the same machine, thread
count and build, because all randomness comes from one generator whose state is saved with the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from mdm_interp.config import TrainConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.devices import check_device
from mdm_interp.files import DEFAULT_ROOT
from mdm_interp.inference.prediction import predict
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.parallel import default_workers, progress_bars, side_by_side
from mdm_interp.provenance import provenance, stamp
from mdm_interp.tensors import save_tensors
from mdm_interp.training.losses import training_loss
from mdm_interp.training.runs import Run

SAVE_SECONDS = 30.0
REPORT_STEPS = 25


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


def checkpoint_steps(config: TrainConfig) -> list[int]:
    """Step 0, then log-spaced up to the last step; fewer than asked for where roundings coincide."""
    spaced = np.geomspace(config.steps, 1, config.n_checkpoints - 1).round().astype(int)  # of one, the last step
    return [0, *sorted(set(spaced.tolist()))]


def train(
    config: TrainConfig,
    *,
    root: str | Path = DEFAULT_ROOT,
    device: str = "cpu",
    progress: bool = True,
    report: Report | None = None,
) -> Run:
    """Train `config`, resume it, or load it if it is finished.

    Args:
        root: Folder of the run store.
        device: `cpu`, `cuda`, … or `auto`.
        progress: Draw a progress bar with the loss and both probabilities.
        report: Called every few steps instead of drawing a bar.

    Raises:
        UserError: the device cannot be used, or what the store holds of this run is damaged.
    """
    run = Run.of(config, root)
    if run.finished:
        return run
    if report is not None or not progress:
        _train(run, check_device(device), report or (lambda progressed: None))
        return run
    with _Bars() as bars:
        _train(run, check_device(device), bars.show)
    return run


def train_all(
    configs: Sequence[TrainConfig], *, root: str | Path = DEFAULT_ROOT, device: str = "cpu", workers: int | None = None
) -> list[Run]:
    """Train many configs side by side, one single-threaded process each, and return their runs in order.

    Args:
        workers: How many at a time; default: as many as there are CPU cores, or 1 on a GPU.

    Raises:
        UserError: as :func:`train`.
    """
    runs = [Run.of(config, root) for config in configs]
    missing = list({run.folder: run for run in runs if not run.finished}.values())
    if not missing:
        return runs
    missing.sort(key=lambda run: run.config.model.n_layers, reverse=True)  # the long ones first, so that none is last
    device = check_device(device)
    tasks = [(run, device) for run in missing]
    with _Bars(total_runs=len(missing)) as bars:
        side_by_side(_train, tasks, workers=workers or default_workers(device), show=bars.show)
    return runs


class _Trainee:
    """A model in training, and all that a step of it changes."""

    def __init__(self, config: TrainConfig, facts: FactWorld, device: str) -> None:
        self.config, self.facts = config, facts
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = HookedTransformer(config.model, generator=self.generator).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def advance(self, step: int) -> Tensor:
        """Take a step, the first of which is 1, and return the loss of its batch before it."""
        config, model, generator = self.config, self.model, self.generator
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, step / max(config.warmup, 1))
        loss = training_loss(model, self.facts.sample(config.batch_size, generator), config.objective, generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        self.optimizer.step()
        return loss


def retrace(config: TrainConfig, *, device: str = "cpu") -> Iterator[HookedTransformer]:
    """Train `config` once more, in memory, and give the model before the first step and after each one.

    It is the same model each time, whose weights change in place. The run store is neither read nor written. On the
    machine, thread count and build that trained a run, the weights are bit-identical with its checkpoints.

    Raises:
        UserError: the device cannot be used.
    """
    trainee = _Trainee(config, FactWorld(config.facts, config.seed), check_device(device))
    yield trainee.model
    for step in range(1, config.steps + 1):
        trainee.advance(step)
        yield trainee.model


def _train(run: Run, device: str, report: Report) -> None:
    """Train under the run's lock, so that two processes never write one run."""
    config = run.config
    run.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(run.folder / ".lock"):
        if run.finished:
            return
        for leftover in run.folder.rglob(".*tmp*"):  # of a process that was killed while it wrote
            leftover.unlink()
        if not (run.folder / "config.yaml").exists():
            config.to_yaml(run.folder / "config.yaml")
        trainee = _Trainee(config, run.facts, device)
        model, optimizer, generator = trainee.model, trainee.optimizer, trainee.generator
        step = -1 if run.step is None else run.load_state(model, optimizer, generator)
        at_checkpoint = set(checkpoint_steps(config))
        pairs = run.query_pairs()
        forward, reverse = [pair.forward for pair in pairs], [pair.reverse for pair in pairs]
        latest: dict[str, Any] = run.metrics()[-1] if step >= 0 else {}
        stamp(run.folder, step + 1, provenance(train, device, model.W_E.dtype))
        loss, saved = torch.tensor(latest.get("loss", float("nan"))), time.monotonic()
        while step < config.steps:
            step += 1
            if step > 0:
                loss = trainee.advance(step)
            if step in at_checkpoint:
                latest = {"step": step, "loss": loss.item()}
                for name, queries in (("forward", forward), ("reverse", reverse)):
                    answered = predict(model, queries)
                    latest[f"{name}_probability"] = float(answered.probability.mean())
                    latest[f"{name}_accuracy"] = float(answered.correct.float().mean())
                    latest[f"{name}_rank"] = float(answered.rank.float().mean())
                save_tensors(run.checkpoint_path(step), model.state_dict())
                run.record(latest)
            if step in at_checkpoint or time.monotonic() - saved > SAVE_SECONDS:
                run.save_state(step, model, optimizer, generator)
                saved = time.monotonic()
            if step % REPORT_STEPS == 0 or step == config.steps:
                both = (latest["forward_probability"], latest["reverse_probability"])
                report(Progressed(config.digest(), _label(config), step, config.steps, loss.item(), *both))


def _label(config: TrainConfig) -> str:
    return f"{config.model.position} {config.objective} seed {config.seed}"


class _Bars:
    """Progress bars, one per run under way, and one over all runs when there are several."""

    def __init__(self, total_runs: int = 1) -> None:
        self.progress = progress_bars()
        self.tasks: dict[str, Any] = {}
        self.runs = self.progress.add_task("training runs", total=total_runs, values="") if total_runs > 1 else None

    def __enter__(self) -> _Bars:
        return self  # drawn from the first report on: an error before it is alone on its line

    def __exit__(self, *exception: object) -> None:
        if self.tasks:
            self.progress.stop()

    def show(self, progressed: Progressed) -> None:
        self.progress.start()
        values = asdict(progressed)
        digest = values["digest"]
        if digest not in self.tasks:
            self.tasks[digest] = self.progress.add_task(values["label"], total=values["total"], values="")
        text = "loss {loss:.2f} fwd {forward:.2f} rev {reverse:.2f}".format(**values)
        self.progress.update(self.tasks[digest], completed=values["step"], values=text)
        if progressed.step == progressed.total and self.runs is not None:
            self.progress.remove_task(self.tasks[digest])
            self.progress.advance(self.runs)
