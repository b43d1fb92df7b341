"""Clearing the run store: what was begun and not finished goes, and nothing that may be somebody's work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mdm_interp.checkpoints.weights import SINGLE
from mdm_interp.config import DemoConfig
from mdm_interp.errors import UserError
from mdm_interp.files import LOCK, changed_lately, is_leftover, locked, remove_leftovers
from mdm_interp.provenance import FILE as MADE_WITH
from mdm_interp.training.runs import Run, holds_nothing
from mdm_interp.training.text import STATE, is_written


def prune_run(folder: Path) -> bool:
    """Delete a run that was not finished, unless it is being trained, and what was left half written of any. Return
    whether it was deleted.

    Raises:
        UserError: it cannot be told whether it is one, or it is more: its checkpoints are beyond its state, it holds
            files of others, or is a link.
        OSError: it cannot be read or deleted.
    """

    def is_unfinished(folder: Path) -> bool:
        if holds_nothing(folder):
            return True
        run = Run.at(folder)
        run.check_state()
        if run.finished:
            return False
        _require_own(folder)
        return True

    return _prune(folder, is_unfinished)


def _require_own(folder: Path) -> None:
    """Refuse a run's folder that holds what no training has put there.

    Raises:
        UserError: it does.
    """
    for path in sorted(folder.rglob("*")):
        is_own = OWN.fullmatch(path.relative_to(folder).as_posix()) and not path.is_symlink()
        if not is_own and not is_leftover(path):
            raise UserError(f"{path}: is no file of a run, whose folder is kept for it; move it elsewhere")


OWN = re.compile(
    rf"{re.escape(LOCK)}|config\.yaml|{re.escape(MADE_WITH)}|metrics\.jsonl|state\.safetensors|"
    r"checkpoints(/\d+\.safetensors)?"
)
"""What a run's folder holds."""


def prune_demo(folder: Path) -> bool:
    """Do the same to a demo checkpoint. What is not in a folder of the name that the run store gives it stays.

    Raises:
        UserError: as :func:`prune_run`.
        OSError: it cannot be read or deleted.
    """
    record = folder / "demo.yaml"
    if holds_nothing(folder):
        return _prune(folder, holds_nothing)
    if not record.exists() or not folder.name.endswith(DemoConfig.from_yaml(record).digest()):
        return False

    def is_unfinished(folder: Path) -> bool:
        if is_written(folder):
            return False
        if (folder / SINGLE).exists() and not (folder / STATE).exists():
            raise UserError(f"{folder}: has weights and no config.json; put that back, or delete the folder")
        return True

    return _prune(folder, is_unfinished)


def _prune(folder: Path, is_unfinished: Callable[[Path], bool]) -> bool:
    if not is_unfinished(folder):
        if not folder.is_symlink():
            remove_leftovers(folder)
        return False
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link to what is unfinished; delete both by hand")
    lately = changed_lately(folder)  # before the lock is touched
    try:
        with locked(folder / LOCK, wait=False) as has_locks:
            if lately and not has_locks:
                raise UserError(
                    f"{folder}: was changed in the last hour, and may be in training, which cannot be told without "
                    "locks; prune again later"
                )
            if is_unfinished(folder):  # still
                shutil.rmtree(folder)
                return True
    except TimeoutError:
        pass  # in training
    return False
