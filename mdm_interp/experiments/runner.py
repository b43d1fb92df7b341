"""The runner: trains what is missing, measures what is missing, and makes figures and the report of the results.

from mdm_interp.experiments.runner import reproduce, report

reproduce(discover(), Lab(n_seeds=3), Path("figures/quick"))     # all of it
report(Path("figures/quick"))                                    # figures and report again, from results alone
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

from mdm_interp.config import TrainConfig
from mdm_interp.errors import UserError
from mdm_interp.experiments.analysis import Analysis, discover, ledger
from mdm_interp.experiments.claims import save_ledger
from mdm_interp.experiments.drawn import is_drawn, record_drawn
from mdm_interp.experiments.exhibits import PAGES, explored, make_exhibits
from mdm_interp.experiments.report import library_of, write_report
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import Demo, Lab, demo_bars
from mdm_interp.files import check_folder
from mdm_interp.parallel import find_place, phase, progress_bars, side_by_side
from mdm_interp.training.text import TextStep


@dataclass(frozen=True)
class Reported:
    """What was drawn."""

    figures: list[str]
    """Names of the analyses."""
    problem: str | None
    """Why there are no PNGs, on one line."""


def reproduce(analyses: Sequence[Analysis], lab: Lab, out: Path) -> Reported:
    """Train and measure for `analyses` what the lab and `out` lack, draw their figures, and write the report on all
    results in `out`. What is there already is neither trained, nor measured, nor drawn again.

    Raises:
        UserError: what is there is damaged, or the device cannot be used.
        OSError: `out` cannot be written to, which is found before anything is trained.
    """
    check_folder(out)
    wanted = [config for analysis in analyses for config in analysis.configs(lab.seeds)]
    of_runs = [config for config in wanted if isinstance(config, TrainConfig)]
    with phase("training", 1, PHASES):
        lab.runs(of_runs)
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    with phase("measuring", 2, PHASES):
        results = measure_all(analyses, lab, out)
    names, source, files = [analysis.name for analysis in analyses], _drawing_of(out), set[str]()
    if not is_drawn(out, "pages", names, source):
        of_results = (analysis.pages(result, lab.root) for analysis, result in zip(analyses, results, strict=True))
        with phase("pages", 3, PHASES), progress_bars(transient=True) as bars:
            written = bars.add_task("pages", total=None, values="")
            for file, page in chain(make_exhibits(lab, of_runs), *of_results):
                page.save(out / file, shared=True)
                files |= {file, *page.shared}
                bars.advance(written)
        record_drawn(out, "pages", source, dict.fromkeys(names, files))
    with phase("figures", 4, PHASES):
        return report(out, analyses)


PHASES = 4
"""Of :func:`reproduce`."""


def report(out: Path, analyses: Sequence[Analysis] | None = None) -> Reported:
    """Draw figures from the results in `out`, and write the ledger and the report on all results there.

    Args:
        analyses: Whose figures to draw; default: all that are installed and have a result.

    Raises:
        UserError: there is no result.
        OSError: `out` cannot be written to.
    """
    known = {analysis.name: analysis for analysis in [*discover(), *(analyses or ())]}
    there = [name for name in known if (out / f"{name}.json").exists()]
    if not there:
        raise UserError(f"--out: {out} holds no results; run `mdm-interp reproduce --out {out}` first")
    check_folder(out)
    wanted = [name for name in there if analyses is None or known[name] in analyses]
    source = _drawing_of(out, linked=[*explored(out).values(), *(file for file in PAGES if (out / file).exists())])
    if is_drawn(out, "figures", wanted, source):
        return Reported(wanted, None)
    results = {name: known[name].load(out / f"{name}.json") for name in there}
    with progress_bars(transient=True) as bars:
        drawing, drawn = bars.add_task("figures", total=len(there) + 1, values=""), {}
        for name, result in results.items():
            drawn[name] = result, _figure(known[name], result)
            bars.advance(drawing)
        verdicts = ledger(known.values(), results)
        if verdicts:
            save_ledger(verdicts, out / CLAIMS)
        details = {name: known[name].detail_of for name in there}
        problem = write_report(list(drawn.values()), out, verdicts, changed=wanted, pages=PAGES, details=details)
        bars.advance(drawing)
    if problem is None:
        of_all = {"index.html", *([CLAIMS] if verdicts else ())}
        own = {name: {f"{name}.html", f"{name}.png", library_of(drawn[name][1])} for name in wanted}
        record_drawn(out, "figures", source, {name: of_all | files for name, files in own.items()})
    return Reported(wanted, problem)


def _figure(analysis: Analysis, result: Result) -> go.Figure:
    try:
        return analysis.figure(result)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{result.name}.json: its figure cannot be drawn of these runs ({type(error).__name__}: {said}); it is "
            "made for those of `mdm-interp reproduce`"
        ) from error


CLAIMS = "claims.json"
"""The ledger's file, beside results and made of them."""


def _drawing_of(out: Path, linked: Sequence[str] = ()) -> str:
    """Return a digest of the results in a folder, of all code that could draw them, and of the names of pages that the
    report links to."""
    packages = {module.split(".")[0] for analysis in discover() for module in (analysis.draw.__module__, __name__)}
    folders = [folder for package in sorted(packages) for folder in getattr(sys.modules[package], "__path__", ())]
    code = [path for folder in folders for path in sorted(Path(folder).rglob("*")) if path.suffix in DRAWING]
    digest = hashlib.sha256(json.dumps(linked).encode())
    for path in [*code, *sorted(out.glob("[!.]*.json"))]:
        if path.name != CLAIMS:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


DRAWING = (".py", ".js", ".css", ".html")
"""Endings of files that draw."""


# ---- measuring


def measure_all(analyses: Sequence[Analysis], lab: Lab, out: Path) -> list[Result]:
    """Return the results of `analyses`, in order.

    What `out` lacks is measured there: shares of the subjects, as many at a time as the lab has workers, each in a
    process of its own, here or on a Dask cluster, that finds its analysis by name; in this process where there is one
    worker. Demo checkpoints that have to be trained for it come first, beside whatever needs none.

    Raises:
        Exception: the first one that an analysis ended in, once all others are measured.
    """
    missing = [analysis for analysis in analyses if analysis.stored(lab, out) is None]
    missing.sort(key=lambda a: (a.slow, a.kind == "demos", len(a.configs(lab.seeds))), reverse=True)  # long ones first
    needed = dict.fromkeys(config for a in missing if a.kind == "demos" for config in a.configs(lab.seeds))
    installed = discover()
    own = [analysis for analysis in missing if analysis not in installed]
    shares = [(analysis.name, share) for analysis in missing if analysis in installed for share in analysis.shares(lab)]
    errors: list[BaseException] = []
    with _Bars(len(missing)) as bars:
        n, device = find_place(lab.workers, lab.device) if shares else (1, lab.device)
        if shares and (isinstance(lab.workers, str) or min(n, len(shares)) > 1):

            def finished(future: Future[None]) -> None:
                if error := future.exception():
                    errors.append(error)

            there = replace(lab, root=lab.root.absolute(), device=device, workers=1)
            demos = [Demo.of(config, lab.root) for config in needed]
            tasks = [(Demo.train, (demo, device)) for demo in demos if not demo.finished]
            tasks += [(_measure_share, (name, there, out.absolute(), share)) for name, share in shares]
            side_by_side(_call, tasks, workers=lab.workers or n, show=bars.show, finished=finished)
        else:
            own = missing
        for analysis in own:
            try:
                for share in analysis.shares(lab):
                    _measure(analysis, lab, out, share, bars.show)
            except Exception as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return [analysis.result(lab, out) for analysis in analyses]


def _call(function: Callable[..., None], given: tuple[Any, ...], report: Callable[[Any], Any]) -> None:
    function(*given, report)


def _measure_share(name: str, lab: Lab, out: Path, share: Sequence[str], report: Callable[[Measured], Any]) -> None:
    (analysis,) = [analysis for analysis in discover() if analysis.name == name]
    _measure(analysis, lab, out, share, report)


def _measure(analysis: Analysis, lab: Lab, out: Path, share: Sequence[str], report: Callable[[Measured], Any]) -> None:
    analysis.measure_share(lab, out, share, lambda total: report(Measured(analysis.name, total)))


@dataclass(frozen=True)
class Measured:
    """That an analysis has measured one more subject."""

    name: str
    total: int
    """Of its subjects."""


class _Bars:
    """Progress bars, one per analysis under way, and one over all when there are several. They leave nothing behind."""

    def __init__(self, total: int) -> None:
        self.progress = progress_bars(transient=True)
        self.tasks: dict[str, Any] = {}
        self.demos = demo_bars(self.progress)
        self.done: Counter[str] = Counter()
        self.all = self.progress.add_task("analyses", total=total, values="", over_all=True) if total > 1 else None

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, measured: Measured | TextStep) -> None:
        if isinstance(measured, TextStep):
            self.demos.show(measured)
            return
        if measured.name not in self.tasks:
            description = f"measuring {measured.name}"
            self.tasks[measured.name] = self.progress.add_task(description, total=measured.total, values="")
        self.done[measured.name] += 1
        task, done = self.tasks[measured.name], self.done[measured.name]
        self.progress.advance(task)
        self.progress.update(task, values=f"{done} of {measured.total}")
        if done == measured.total and self.all is not None:
            self.progress.remove_task(task)
            self.progress.advance(self.all)
