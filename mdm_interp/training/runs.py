"""The run store: one folder per training run, named by the digest of its config.

    runs/<digest>/config.yaml                   what was asked for
    runs/<digest>/made_with.json                what trained it: code, versions and machine
    runs/<digest>/metrics.jsonl                 one line per checkpoint, each with a digest of what it says
    runs/<digest>/checkpoints/000123.safetensors  weights after that many steps
    runs/<digest>/state.safetensors             weights, optimizer moments, RNG state and step: where to resume

Every file is written whole or not at all. A run is finished when its state is at its last step; it then has the
checkpoints that its config asks for, and no others count. Weights and states hold a digest of each tensor and say of
which run and step they are, and all of it is checked when it is read. Of older files, what they say is checked. Metrics
that are lost or damaged are computed again from the checkpoints when the run is trained again.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdm_interp.config import TrainConfig
from mdm_interp.data.queries import QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.devices import check_device
from mdm_interp.errors import Diverged, UserError, few
from mdm_interp.files import DEFAULT_ROOT, LOCK, is_leftover, json_digest, parse_json, require_file, write_text
from mdm_interp.models.positions import SAMPLE, check_answers
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.provenance import FILE as MADE_WITH
from mdm_interp.provenance import made_with
from mdm_interp.tensors import load_tensors, not_finite, save_tensors, saved_digests
from mdm_interp.training.losses import LastLosses


def checkpoint_steps(config: TrainConfig) -> list[int]:
    """Step 0, then log-spaced up to the last step; fewer than asked for where roundings coincide."""
    spaced = np.geomspace(config.steps, 1, config.n_checkpoints - 1).round().astype(int)  # of one, the last step
    return [0, *sorted(set(spaced.tolist()))]


class Resumable:
    """A folder that holds a training's state while it runs."""

    config: Any
    """A :class:`~mdm_interp.config.TrainConfig` or :class:`~mdm_interp.config.TextConfig`."""
    folder: Path

    @property
    def state_path(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def step(self) -> int | None:
        """How many steps are trained and saved; None before the first save.

        Raises:
            UserError: the state cannot be read, is not as it was saved, or is at no step of this training.
        """
        if not self.state_path.exists():
            return None
        try:
            require_file(self.state_path)
            with safe_open(self.state_path, "pt") as state:
                said = state.metadata()
            saved_digests(said)
            step = int(said["step"])
            if not 0 <= step <= self.config.steps:
                raise ValueError(f"it is at step {step} of {self.config.steps}")
            return step
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.state_path}: not a whole training state ({error}); delete the folder {self.folder} to "
                "train the run again"
            ) from error

    def save_state(
        self,
        step: int,
        model: HookedTransformer,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        losses: LastLosses,
    ) -> None:
        """Save all that resuming at `step` needs.

        Raises:
            UserError: the folder is gone.
        """
        self._require_there()
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        tensors |= {"generator": generator.get_state(), "losses": losses.get_state()}
        save_tensors(self.state_path, tensors, {"run": self.config.digest(), "step": str(step)})

    def _require_there(self) -> None:
        """Refuse to write into a folder that was moved or deleted since training began: what it held is not there."""
        if not (self.folder / MADE_WITH).exists():
            raise UserError(
                f"{self.folder}: was moved or deleted while it was being trained; put it back, or repeat the command "
                "to train it again"
            )

    def load_state(
        self,
        model: HookedTransformer,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        losses: LastLosses,
    ) -> int:
        """Put the saved state into place and return its step. One of before has no losses.

        Raises:
            UserError: the state is damaged, or of another training.
        """
        assert self.step is not None
        tensors, said = load_tensors(self.state_path)  # opened once: another process may put a later one in its place
        step = int(said["step"])
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        try:
            if said.get("run", self.config.digest()) != self.config.digest():
                raise ValueError(f"it is of run {said['run']}")
            if damaged := not_finite({name: tensor for name, tensor in tensors.items() if name != "losses"}):
                raise ValueError(f"{damaged} holds NaN or infinity")
            _check_moments(
                moments, step, [parameter for group in optimizer.param_groups for parameter in group["params"]]
            )
            if "losses" in tensors:
                losses.set_state(tensors["losses"])
            generator.set_state(tensors["generator"].cpu())
            model.load_state_dict(weights)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.state_path}: does not fit the model of config.yaml ({' '.join(str(error).split())[:200]}); "
                f"delete the folder {self.folder} to train the run again"
            ) from error
        return step

    def stop_diverged(self, step: int, losses: LastLosses) -> NoReturn:
        """Say that training came to numbers that are not finite, or to losses that exploded.

        Raises:
            Diverged: always.
        """
        kept = "nothing was saved before" if self.step is None else f"what was saved at step {self.step} is kept"
        if losses.exploded:
            raise Diverged(
                f"{self.folder}: the loss has exploded by step {step}, from {losses.first:.3g} to "
                f"{losses.last[-1]:.3g}, where knowing nothing gives {losses.of_chance:.3g}; lower lr "
                f"({self.config.lr:g}) or raise warmup ({self.config.warmup}); {kept}"
            )
        raise Diverged(
            f"{self.folder}: loss or weights are NaN or infinite from step {step} on; lower lr ({self.config.lr:g}) or "
            f"raise warmup ({self.config.warmup}); {kept}"
        )


def _check_moments(moments: Mapping[int, Mapping[str, Tensor]], step: int, parameters: Sequence[Tensor]) -> None:
    """Check that an optimizer's moments are those of all parameters after so many steps; before the first there are
    none.

    Raises:
        ValueError: they are not.
    """
    shapes = {index: parameter.shape for index, parameter in enumerate(parameters)} if step else {}
    if moments.keys() != shapes.keys():
        raise ValueError(f"it has moments of {len(moments)} parameters, not of {len(shapes)}")
    for index, shape in shapes.items():
        expected = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
        if {name: tensor.shape for name, tensor in moments[index].items()} != expected:
            raise ValueError(f"the moments of parameter {index} are not of its shape {list(shape)}")
        if moments[index]["step"] != step:
            raise ValueError(f"it is at step {step}, and its moments at {moments[index]['step']:g}")


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
    def at(cls, folder: str | Path) -> Run:
        """Return the run that is in a folder.

        Raises:
            UserError: its config cannot be read, or is not the one that the folder is named by.
        """
        folder = Path(folder)
        path, name = folder / "config.yaml", folder.resolve().name
        config = TrainConfig.from_yaml(path)
        if config.digest() != name:
            raise UserError(
                f"{path}: is the config of run {config.digest()}, and the folder is named {name}; undo what was edited "
                "or renamed, or delete the folder"
            )
        return cls(config, folder)

    @classmethod
    def open(cls, name: str, root: str | Path = DEFAULT_ROOT) -> Run:
        """Return the stored run whose name is, or begins with, `name`.

        Raises:
            UserError: there is none, or there are several; or as :meth:`at`.
        """
        found = list(Path(root).glob(f"{glob.escape(name)}*/config.yaml"))
        if len(found) != 1:
            named = f" ({few(sorted(path.parent.name for path in found))})" if found else ""
            raise UserError(
                f"run: {name!r} names {len(found)} runs of {root}{named}; `mdm-interp runs list` shows their names"
            )
        return cls.at(found[0].parent)

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
        """Steps that have a checkpoint, in order: of a finished run all that its config asks for, whether or not their
        files are still there; of another those that it has come to."""
        asked = checkpoint_steps(self.config)
        return asked if self.finished else [step for step in asked if self.checkpoint_path(step).exists()]

    @cached_property
    def facts(self) -> FactWorld:
        return FactWorld(self.config.facts, self.config.seed)

    def query_pairs(self, n_contexts: int = 2) -> list[QueryPair]:
        """Return the world's pairs whose forward queries this run's objective trains."""
        return self.facts.query_pairs(self.config.objective, n_contexts, attention=self.config.model.attention)

    def model(self, step: int = -1, device: str = "cpu") -> HookedTransformer:
        """Return the model after `step` training steps; negative counts back from the last checkpoint. Its tokenizer
        reads and writes the names of its world's tokens.

        Raises:
            UserError: there is no such checkpoint, or it is damaged or of another model; or its position scheme is a
                registered one, and another class is registered now; or the device cannot be used.
        """
        device = check_device(device)
        self._check_scheme()
        steps = self.steps
        if step < 0 and -step <= len(steps):
            step = steps[step]
        if step not in steps:
            raise UserError(
                f"step: {step} has no checkpoint in {self.folder}; there are {steps or 'none: train the run'}"
            )
        model, weights = HookedTransformer(self.config.model), self._weights(step)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"{self.checkpoint_path(step)}: does not fit the model of config.yaml "
                f"({' '.join(str(error).split())[:200]}); delete {self.folder} to train it again"
            ) from error
        model.set_tokenizer(self.facts.tokenizer)
        return model.to(device)

    def save_checkpoint(self, step: int, model: HookedTransformer) -> None:
        """Save the weights after `step` training steps.

        Raises:
            UserError: the folder is gone.
        """
        self._require_there()
        of = {"run": self.config.digest(), "step": str(step)}
        save_tensors(self.checkpoint_path(step), model.state_dict(), of)

    def _weights(self, step: int) -> dict[str, Tensor]:
        """Read a checkpoint.

        Raises:
            UserError: it is missing, damaged or not the one of this run and step, or its numbers are not finite.
        """
        path, of = self.checkpoint_path(step), {"run": self.config.digest(), "step": str(step)}
        weights, said = load_tensors(path)
        if other := {name: said[name] for name in of if said.get(name, of[name]) != of[name]}:
            raise UserError(
                f"{path}: is of {' '.join(f'{name} {value}' for name, value in other.items())}; put the file of this "
                f"run and step back, or delete the folder {self.folder} to train the run again"
            )
        if name := not_finite(weights):
            raise UserError(
                f"{path}: {name} holds NaN or infinity; delete the folder {self.folder}, and train with a lower lr"
            )
        return weights

    def check(self) -> None:
        """Read what the run has come to, so that damage is found before there is work that needs it.

        Raises:
            UserError: something is missing, damaged or of another run, or as :meth:`model` of the position scheme.
        """
        Run.at(self.folder)
        self._check_scheme()
        done = -1 if self.step is None else self.step
        for step in checkpoint_steps(self.config):
            if step <= done:
                self._weights(step)
        if self.finished:
            self.metrics()

    def check_state(self) -> None:
        """Check that no checkpoint is beyond the training state, without which a finished run looks like an unfinished
        one. The next one may be, as it is written before the state, but for the last.

        Raises:
            UserError: the state cannot be read, is missing or is older than the checkpoints.
        """
        done = -1 if self.step is None else self.step
        beyond = [step for step in checkpoint_steps(self.config) if step > done]
        if there := [step for step in beyond[1:] or beyond if self.checkpoint_path(step).exists()]:
            raise UserError(
                f"{self.state_path}: is {'missing' if done < 0 else f'at step {done}'}, and there is a checkpoint of "
                f"step {there[-1]}; put the state back, or train the run again by {self._command}"
            )

    @property
    def _command(self) -> str:
        """The command that trains the run, or mends it."""
        words = ["mdm-interp", "train", str(self.folder / "config.yaml"), "--runs", str(self.folder.parent)]
        return f"`{shlex.join(words)}`"

    def _check_scheme(self) -> None:
        try:
            check_answers(self.config.model, made_with(self.folder)[0].get(SAMPLE))
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return one entry per checkpoint: step, loss, and probability, accuracy and rank of forward and reverse
        queries.

        Raises:
            UserError: the file is missing or damaged, or it is not of all checkpoints up to the state's.
        """
        rows, problem = self.read_metrics()
        if problem:
            raise UserError(
                f"{self.metrics_path}: cannot be used ({problem}); {self._command} computes again what is missing"
            )
        return rows

    def read_metrics(self) -> tuple[list[dict[str, Any]], str]:
        """Return the entries of the metrics that are as they were recorded, and what is wrong with the file, if
        something is.

        Raises:
            UserError: the file is there and cannot be opened.
        """
        step = self.step  # first: who trains it writes it last
        lines, problem = self._lines()
        done = -1 if step is None else step
        rows = [row for row, _ in lines]
        asked = [step for step in checkpoint_steps(self.config) if step <= done]
        recorded = [row["step"] for row in rows if row["step"] <= done or done == self.config.steps]
        if not problem and recorded != asked:
            problem = "it does not have one line for each checkpoint"
        return rows, problem

    def _lines(self) -> tuple[list[tuple[dict[str, Any], str]], str]:
        """Return each line of the metrics that is as it was recorded, as an entry and as it is written, and what is
        wrong with the first other one."""
        try:
            require_file(self.metrics_path, MOST_BYTES)
            text = self.metrics_path.read_text(encoding="utf-8", errors="replace")  # a line of it may be whole
        except FileNotFoundError:
            return [], "it is not there"
        except OSError as error:
            raise UserError(
                f"{self.metrics_path}: cannot be read ({error}); delete it, and compute it again by {self._command}"
            ) from error
        lines, problems, unchecked = list[tuple[dict[str, Any], str]](), list[str](), False
        for line in text.splitlines():
            try:
                row, has_digest = self._read_row(line)
                lines.append((row, line))
                unchecked |= not has_digest
            except ValueError as error:
                problems.append(str(error))
        if unchecked:
            warnings.warn(f"{self.metrics_path}: has no digest in some lines: these cannot be checked", stacklevel=4)
        return lines, (problems or ["" if lines else "it is empty"])[0]

    def _read_row(self, line: str) -> tuple[dict[str, Any], bool]:
        """Return what a line says, and whether it has a digest to check that by."""
        row = parse_json(line)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError("a line is not of a step")
        digest = row.pop("digest", None)
        if digest not in (None, self._digest(row), json_digest(row)):  # lines of before do not say of which run
            raise ValueError(f"the line of step {row['step']} is not as it was recorded")
        if lacking := [name for name in RECORDED if type(row.get(name)) not in (int, float)]:
            raise ValueError(f"the line of step {row['step']} has no number as its {lacking[0]}")
        return row, digest is not None

    def _digest(self, row: Mapping[str, Any]) -> str:
        """Return the digest of a row of this run."""
        return json_digest({**row, "run": self.config.digest()})

    def record(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put rows into the metrics, in place of those of the same steps and of damaged lines. A line that says the
        same already stays as it is, and no row without a loss takes the place of another.

        Args:
            rows: All that the caller knows of: where two processes train a run without locks, either may have
                overwritten the other's.
        """
        there, problem = self._lines()
        known = {row["step"]: (json_digest(row), line) for row, line in there}
        for row in rows:
            before = known.get(row["step"], ("",))[0]
            if not before or (before != json_digest(row) and not math.isnan(row["loss"])):
                known[row["step"]] = json_digest(row), json.dumps({**row, "digest": self._digest(row)})
        lines = [known[step][1] for step in sorted(known)]
        if problem or lines != [line for _, line in there]:  # whoever is behind writes nothing
            write_text(self.metrics_path, "".join(f"{line}\n" for line in lines))

    def delete(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.folder)


MOST_BYTES = 2**24
"""Of the longest metrics that are read."""
RECORDED = (
    "loss",
    *(f"{way}_{what}" for way in ("forward", "reverse") for what in ("probability", "accuracy", "rank")),
)
"""What each line of the metrics says besides its step."""


RUN_NAME = re.compile("[0-9a-f]{16}")


def run_folders(root: str | Path = DEFAULT_ROOT) -> list[Path]:
    """Return the folders below `root` that hold a run, or are named like one, in the order of their names."""
    return [path for path in folders(root) if RUN_NAME.fullmatch(path.name) or os.path.exists(path / "config.yaml")]


def folders(root: str | Path) -> list[Path]:
    """Return the folders in a folder, which need not be there, in the order of their names.

    Raises:
        OSError: it cannot be read.
    """
    return sorted(path for path in Path(root).iterdir() if os.path.isdir(path)) if os.path.isdir(root) else []


def holds_nothing(folder: Path) -> bool:
    """Tell whether training was stopped in a folder before it wrote anything there: at most its lock is left, and what
    was half written."""
    return all(path.name == LOCK or is_leftover(path) for path in folder.iterdir())


def stored_runs(root: str | Path = DEFAULT_ROOT) -> Iterator[Run]:
    """Return every run below `root`, in the order of their names.

    Raises:
        UserError: one of them cannot be told, as :meth:`Run.at` says.
    """
    for folder in run_folders(root):
        if not holds_nothing(folder):
            yield Run.at(folder)
