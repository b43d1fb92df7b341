"""The run store: one folder per training run, named by the digest of its config.

    runs/<digest>/config.yaml                   what was asked for
    runs/<digest>/made_with.json                what trained it: code, versions and machine
    runs/<digest>/metrics.jsonl                 one line per checkpoint
    runs/<digest>/checkpoints/000123.safetensors  weights after that many steps
    runs/<digest>/state.safetensors             weights, optimizer moments, RNG state and step: where to resume

Every file is written whole or not at all. A run is finished when its state is at its last step.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdm_interp.config import TrainConfig
from mdm_interp.data.queries import QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.files import DEFAULT_ROOT, write_text
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.tensors import load_tensors, save_tensors


class Resumable:
    """A folder that holds a training's state while it runs."""

    folder: Path

    @property
    def state_path(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def step(self) -> int | None:
        """How many steps are trained and saved; None before the first save.

        Raises:
            UserError: the state cannot be read.
        """
        if not self.state_path.exists():
            return None
        try:
            with safe_open(self.state_path, "pt") as state:
                return int(state.metadata()["step"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.state_path}: not a whole training state ({error}); delete the folder {self.folder} to "
                "train the run again"
            ) from error

    def save_state(
        self, step: int, model: HookedTransformer, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Save all that resuming at `step` needs."""
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        tensors["generator"] = generator.get_state()
        save_tensors(self.state_path, tensors, {"step": str(step)})

    def load_state(self, model: HookedTransformer, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        """Put the saved state into place and return its step.

        Raises:
            UserError: the state is damaged.
        """
        assert self.step is not None
        with safe_open(self.state_path, "pt") as state:  # opened once: another process may put a later one in its place
            step, tensors = int(state.metadata()["step"]), {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        try:
            generator.set_state(tensors["generator"].cpu())
            model.load_state_dict(weights)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.state_path}: does not fit the model of config.yaml ({' '.join(str(error).split())}); delete "
                f"the folder {self.folder} to train the run again"
            ) from error
        return step


@dataclass(frozen=True)
class Run(Resumable):
    """A training run on disk, finished or not."""

    config: TrainConfig
    folder: Path

    @classmethod
    def of(cls, config: TrainConfig, root: str | Path = DEFAULT_ROOT) -> Run:
        """Return where the run of `config` is, or will be."""
        return cls(config, Path(root) / config.digest())

    @classmethod
    def open(cls, name: str, root: str | Path = DEFAULT_ROOT) -> Run:
        """Return the stored run whose name is, or begins with, `name`.

        Raises:
            UserError: there is none, or there are several.
        """
        found = list(Path(root).glob(f"{glob.escape(name)}*/config.yaml"))
        if len(found) != 1:
            raise UserError(
                f"run: {name!r} names {len(found)} runs of {root}; `mdm-interp runs list` shows their names"
            )
        return cls(TrainConfig.from_yaml(found[0]), found[0].parent)

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def checkpoint_path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"{step:06d}.safetensors"

    @property
    def finished(self) -> bool:
        return self.step == self.config.steps

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        paths = (self.folder / "checkpoints").glob("*.safetensors")
        return sorted(int(path.stem) for path in paths if path.stem.isdigit())

    @cached_property
    def facts(self) -> FactWorld:
        return FactWorld(self.config.facts, self.config.seed)

    def query_pairs(self, n_contexts: int = 2) -> list[QueryPair]:
        """Return the world's pairs whose forward queries this run's objective trains."""
        return self.facts.query_pairs(self.config.objective, n_contexts, attention=self.config.model.attention)

    def model(self, step: int = -1, device: str = "cpu") -> HookedTransformer:
        """Return the model after `step` training steps; negative counts back from the last checkpoint.

        Raises:
            UserError: there is no such checkpoint, or it is damaged or of another model.
        """
        steps = self.steps
        if step < 0 and -step <= len(steps):
            step = steps[step]
        if step not in steps:
            raise UserError(
                f"step: {step} has no checkpoint in {self.folder}; there are {steps or 'none: train the run'}"
            )
        path = self.checkpoint_path(step)
        model = HookedTransformer(self.config.model)
        try:
            model.load_state_dict(load_tensors(path))
        except RuntimeError as error:
            raise UserError(
                f"{path}: does not fit the model of config.yaml ({' '.join(str(error).split())}); delete "
                f"{self.folder} to train it again"
            ) from error
        return model.to(device)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate that a step was taken with: it rises linearly over the warm-up, and stays. At the
        initial weights it is 0."""
        return self.config.lr * min(1.0, step / max(self.config.warmup, 1))

    def metrics(self) -> list[dict[str, Any]]:
        """Return one entry per checkpoint: step, loss, and probability, accuracy and rank of forward and reverse
        queries.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            rows = [json.loads(line) for line in self.metrics_path.read_text().splitlines()]
            if not rows:
                raise ValueError("it is empty")
            return rows
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.metrics_path}: cannot be read ({error}); delete the folder {self.folder} to train the run again"
            ) from error

    def record(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put rows into the metrics, in place of those of the same steps.

        Args:
            rows: All that the caller knows of: where two processes train a run without locks, either may have
                overwritten the other's.
        """
        there = self.metrics() if self.metrics_path.exists() else []
        by_step = dict(sorted({row["step"]: row for row in (*there, *rows)}.items()))
        before, now = ("".join(f"{json.dumps(row)}\n" for row in those) for those in (there, by_step.values()))
        if now != before:  # whoever is behind writes nothing
            write_text(self.metrics_path, now)

    def delete(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.folder)


def stored_runs(root: str | Path = DEFAULT_ROOT) -> Iterator[Run]:
    """Return every run below `root`, in the order of their names."""
    for path in sorted(Path(root).glob("*/config.yaml")):
        yield Run(TrainConfig.from_yaml(path), path.parent)
