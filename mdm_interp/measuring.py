"""Measuring: several analyses side by side, each saved as soon as it is done."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm_interp.analysis import Analysis, Lab, discover
from mdm_interp.results import Result
from mdm_interp.workers import default_workers, progress_bars, side_by_side


@dataclass(frozen=True)
class Measured:
    """How far an analysis has come."""

    name: str
    done: int
    total: int
    """Runs."""


def measure_all(analyses: Sequence[Analysis], lab: Lab, out: Path) -> list[Result]:
    """The results of `analyses`, in order. What `out` lacks is measured there: those of most runs first, as many at a
    time as the lab has workers, each in a process of its own that finds it by its name; a single one in this process.

    Raises:
        Exception: the first one that an analysis ended in, once all others are measured.
    """
    missing = [analysis for analysis in analyses if analysis.stored(lab, out) is None]
    missing.sort(key=lambda analysis: len(analysis.configs(lab.seeds)), reverse=True)
    workers, errors = lab.workers or default_workers(lab.device), []
    with _Bars(len(missing)) as bars:
        if min(workers, len(missing)) > 1:
            tasks = [(analysis.name, lab, out) for analysis in missing]

            def finished(future: Future[None]) -> None:
                if error := future.exception():
                    errors.append(error)

            side_by_side(_measure_installed, tasks, workers=workers, show=bars.show, finished=finished)
        else:
            for analysis in missing:
                try:
                    _measure(analysis, lab, out, bars.show)
                except Exception as error:
                    errors.append(error)
    if errors:
        raise errors[0]
    return [Result.load(out / f"{analysis.name}.json") for analysis in analyses]


def _measure_installed(name: str, lab: Lab, out: Path, report: Any) -> None:
    (analysis,) = [analysis for analysis in discover() if analysis.name == name]
    _measure(analysis, lab, out, report)


def _measure(analysis: Analysis, lab: Lab, out: Path, report: Any) -> None:
    analysis.result(lab, out, lambda done, total: report(Measured(analysis.name, done, total)))


class _Bars:
    """Progress bars, one per analysis under way, and one over all when there are several. They leave nothing behind."""

    def __init__(self, total: int) -> None:
        self.progress = progress_bars(transient=True)
        self.tasks: dict[str, Any] = {}
        self.all = self.progress.add_task("analyses", total=total, values="") if total > 1 else None

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, measured: Measured) -> None:
        if measured.name not in self.tasks:
            self.tasks[measured.name] = self.progress.add_task(f"measuring {measured.name}", total=None, values="")
        task, values = self.tasks[measured.name], f"{measured.done} of {measured.total} runs"
        self.progress.update(task, completed=measured.done, total=measured.total, values=values)
        if measured.done == measured.total and self.all is not None:
            self.progress.remove_task(task)
            self.progress.advance(self.all)
