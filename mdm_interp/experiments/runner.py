"""The runner: trains what is missing, measures what is missing, and makes figures and the report of the results.

from mdm_interp.experiments.runner import reproduce, report

reproduce(discover(), Lab(n_seeds=3), Path("figures/quick"))     # all of it
report(Path("figures/quick"))                                    # figures and report again, from results alone
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mdm_interp.config import DemoConfig, TrainConfig
from mdm_interp.errors import UserError
from mdm_interp.experiments.analysis import Analysis, discover, ledger
from mdm_interp.experiments.claims import save_ledger
from mdm_interp.experiments.exhibits import PAGES, write_exhibits
from mdm_interp.experiments.report import write_figures, write_index
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import Lab, train_demos
from mdm_interp.parallel import default_workers, progress_bars, side_by_side


@dataclass(frozen=True)
class Reported:
    """What was drawn."""

    figures: list[str]
    """Names of the analyses."""
    problem: str | None
    """Why there are no PNGs, on one line."""


def reproduce(analyses: Sequence[Analysis], lab: Lab, out: Path) -> Reported:
    """Train and measure for `analyses` what the lab and `out` lack, draw their figures, and write the report on all
    results in `out`."""
    wanted = [config for analysis in analyses for config in analysis.configs(lab.seeds)]
    lab.runs([config for config in wanted if isinstance(config, TrainConfig)])
    train_demos(list(dict.fromkeys(config for config in wanted if isinstance(config, DemoConfig))), lab)
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    measure_all(analyses, lab, out)
    write_exhibits(lab, out)
    return report(out, analyses)


def report(out: Path, analyses: Sequence[Analysis] | None = None) -> Reported:
    """Draw figures from the results in `out`, and write the ledger and the report on all results there.

    Args:
        analyses: Whose figures to draw; default: all that are installed and have a result.

    Raises:
        UserError: there is no result.
    """
    known = {analysis.name: analysis for analysis in [*discover(), *(analyses or ())]}
    results = {
        name: analysis.load(out / f"{name}.json") for name, analysis in known.items() if (out / f"{name}.json").exists()
    }
    if not results:
        raise UserError(f"--out: {out} holds no results; run `mdm-interp reproduce --out {out}` first")
    drawn = {name: (result, known[name].draw(result)) for name, result in results.items()}
    wanted = [name for name in drawn if analyses is None or known[name] in analyses]
    problem = write_figures([drawn[name] for name in wanted], out)
    verdicts = ledger(known.values(), results)
    if verdicts:
        save_ledger(verdicts, out / "claims.json")
    write_index(list(drawn.values()), verdicts, out, PAGES)
    return Reported(wanted, problem)


# ---- measuring


def measure_all(analyses: Sequence[Analysis], lab: Lab, out: Path) -> list[Result]:
    """Return the results of `analyses`, in order. What `out` lacks is measured there: those of most runs first, as many
    at a time as the lab has workers, each in a process of its own that finds it by its name; a single one in this
    process.

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
    return [analysis.load(out / f"{analysis.name}.json") for analysis in analyses]


def _measure_installed(name: str, lab: Lab, out: Path, report: Any) -> None:
    (analysis,) = [analysis for analysis in discover() if analysis.name == name]
    _measure(analysis, lab, out, report)


def _measure(analysis: Analysis, lab: Lab, out: Path, report: Any) -> None:
    analysis.result(lab, out, lambda done, total: report(Measured(analysis.name, done, total)))


@dataclass(frozen=True)
class Measured:
    """How far an analysis has come."""

    name: str
    done: int
    total: int
    """Runs."""


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
