"""Analyses: one question, one measurement, one figure each.

An analysis is a module that holds `ANALYSIS = Analysis(...)`. The entry-point group `mdm_interp.analyses` names such
modules or packages of them, in this package and in any other that is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import plotly.graph_objects as go

from mdm_interp.config import DemoConfig, TrainConfig
from mdm_interp.errors import UserError
from mdm_interp.experiments.claims import Rule, Verdict, judge
from mdm_interp.experiments.results import CheckpointOrigin, Parts, Result, TrainedOrigin, tidy
from mdm_interp.experiments.scope import Moment, rows_of, stages
from mdm_interp.experiments.subjects import TWIN, Demo, Lab, Probe, each_checkpoint, open_probe, train_demos
from mdm_interp.files import json_digest
from mdm_interp.provenance import environment, tally, versions
from mdm_interp.stats.summary import Summary
from mdm_interp.training.demo import train_demo
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages.page import Page
from mdm_interp.viz.panels import Panels
from mdm_interp.viz.theme import title_height, titled

ENTRY_POINTS = "mdm_interp.analyses"
SHARE = 8
"""How many runs a process measures before it takes others."""


@dataclass(frozen=True)
class Analysis:
    """One question and how it is answered."""

    name: str
    question: str
    """One sentence."""
    configs: Callable[[Sequence[int]], Sequence[Any]]
    """What has to be trained for it, for given seeds: `TrainConfig`s, or an analysis of checkpoints' `DemoConfig`s."""
    measure: Callable[..., Iterable[Mapping[str, Any]]]
    """What is measured of a run at a step, `measure(run, step)`: one measurement per row. The columns that say of which
    run and when, chance and both probabilities are added (:func:`~mdm_interp.experiments.scope.rows_of`)."""
    summarize: Callable[[Result], Summary]
    """Rows to the estimates quoted anywhere."""
    takeaway: Callable[[Result], str]
    """What to take away, in a sentence or a few, which follow from the result."""
    draw: Callable[[Result], Panels | go.Figure]
    """Result to panels, or to any figure without title; computes nothing but what it shows."""
    claims: Sequence[Rule] = ()
    """The claims that its rows decide, each with its rule."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What `measure` depends on besides the runs; kept in the result."""
    order: int = 100
    """Place among the figures; lower comes first."""
    detail_of: str = ""
    """Name of the analysis whose answer it goes into; the report folds its figure below that one's."""
    when: Callable[[Run], Sequence[Moment]] = stages
    """The moments of a run's training that are measured."""
    pages: Callable[[Result, Path], Iterable[tuple[str, Page]]] = lambda result, root: ()
    """Interactive pages about its result, each with its file name, made of the runs in the store at `root`."""
    slow: bool = False
    """Whether one run takes a minute or more. Such analyses are begun first, each run in a share of its own."""

    kind: ClassVar[Literal["runs", "demos"]] = "runs"
    """What it is measured on."""
    trainer: ClassVar[Callable[..., Any]] = staticmethod(train)
    """What trains the models that it is measured on."""

    def load(self, path: str | Path) -> Result:
        """Read a result of this analysis.

        Raises:
            UserError: the file is missing, is not a result, or is one of another analysis.
        """
        result = Result.load(path, self.summarize)
        if result.name != self.name:
            raise UserError(f"{path}: is a result of {result.name}, not of {self.name}; put the right file there")
        return result

    def figure(self, result: Result) -> go.Figure:
        """Draw a result: titled with the question, and what to take away below it. The title says if it is demo
        checkpoints that answer."""
        drawn, takeaway = self.draw(result), self.takeaway(result)
        title = self.question + (" (demo checkpoints)" if result.origin.kind == "demos" else "")
        figure = drawn.figure(title_height(takeaway, title)) if isinstance(drawn, Panels) else drawn
        return titled(figure, title, takeaway)

    def write_pages(self, result: Result, root: Path, out: Path) -> None:
        """Write the interactive pages about a result beside it."""
        for file, page in self.pages(result, root):
            page.save(out / file, shared=True)

    def origin(self, lab: Lab) -> TrainedOrigin:
        """Name the models that it is measured on."""
        return self._origin(self.configs(lab.seeds), lab.seeds[0])

    def _origin(self, configs: Sequence[Any], first_seed: int) -> TrainedOrigin:
        return TrainedOrigin(
            kind=self.kind,
            runs=[config.digest() for config in configs],
            first_seed=[config.model_dump(mode="json") for config in configs if config.seed == first_seed],
        )

    def planned(self, lab: Lab) -> Result:
        """Return the result as it will be, with nothing measured yet."""
        return self._planned(self.origin(lab), lab.seeds)

    def _planned(self, origin: TrainedOrigin | CheckpointOrigin, seeds: Sequence[int]) -> Result:
        return Result(
            name=self.name,
            question=self.question,
            origin=origin,
            settings=dict(self.settings),
            seeds=list(seeds),
            versions=versions(*self.measuring()),
            rows=[],
            summarize=self.summarize,
        )

    def measuring(self) -> tuple[Callable[..., Any], ...]:
        """Name the functions whose code decides the numbers."""
        return self.measure, self.when, self.configs, Run, rows_of

    def stored(self, lab: Lab, out: Path) -> Result | None:
        """Return the result that `out` holds, if measuring again would repeat it."""
        return self._stored(self.planned(lab), out)

    def _stored(self, planned: Result, out: Path) -> Result | None:
        path = out / f"{self.name}.json"
        stored = self.load(path) if path.exists() else None
        return stored if stored and stored.same_measurement(planned) else None

    def train(self, lab: Lab) -> None:
        """Train what is missing of `configs`."""
        lab.runs(self.configs(lab.seeds))

    def subjects(self, lab: Lab) -> dict[str, Callable[[], Any]]:
        """Name what is measured, and say how each is opened: the finished runs of `configs`."""
        return {config.digest(): partial(_open_run, lab, config) for config in self.configs(lab.seeds)}

    def rows(self, subject: Any) -> list[dict[str, Any]]:
        """Measure one subject."""
        return rows_of(subject, self.when(subject), self.measure)

    def shares(self, lab: Lab) -> list[list[str]]:
        """Divide the subjects into shares, each to be measured in one go."""
        names, size = list(self.subjects(lab)), 1 if self.slow else SHARE
        return [names[start : start + size] for start in range(0, len(names), size)]

    def measure_share(self, lab: Lab, out: Path, share: Sequence[str], report: Callable[[int], Any]) -> None:
        """Measure a share of the subjects for :meth:`result` to find, each saved as soon as it is done.

        Args:
            report: Told when a subject is done, with how many there are.
        """
        parts, subjects = Parts(out, self.planned(lab)), self.subjects(lab)
        for name in share:
            self._part(parts, name, subjects[name])
            report(len(subjects))

    def _part(self, parts: Parts, name: str, opened: Callable[[], Any]) -> list[dict[str, Any]]:
        """Return the rows of one subject, which is opened if they are not there yet."""
        if (rows := parts.load(name)) is None:
            parts.save(name, rows := tidy(self.rows(opened())))
        return rows

    def opened(self, run: Any, device: str) -> Any:
        """Return the subject that something trained is."""
        return run

    def stored_rows(self, run: Run | Demo, out: Path) -> list[dict[str, Any]] | None:
        """Return the rows of one run that `out` keeps, if measuring again would repeat them."""
        return self._parts(run, out).load(run.config.digest())

    def measured_rows(self, run: Run | Demo, out: Path, device: str = "cpu") -> list[dict[str, Any]]:
        """Return the rows of one run: from `out` if they are there, otherwise measured and kept there."""
        return self._part(self._parts(run, out), run.config.digest(), lambda: self.opened(run, device))

    def _parts(self, run: Run | Demo, out: Path) -> Parts:
        return Parts(out, self._planned(self._origin([run.config], run.config.seed), [run.config.seed]))

    def gather(self, runs: Sequence[Run | Demo], out: Path) -> Result:
        """Return the result of runs whose rows `out` keeps, and save it there."""
        seeds = sorted({run.config.seed for run in runs})
        planned = self._planned(self._origin([run.config for run in runs], seeds[0]), seeds)
        planned = replace(planned, made_with=tally(run.folder for run in runs))
        return self._saved(planned, [row for run in runs for row in self.stored_rows(run, out) or ()], out)

    def result(self, lab: Lab, out: Path) -> Result:
        """Return the result of this analysis: from `out` if it is there, otherwise measured and saved there."""
        planned = self.planned(lab)
        if stored := self._stored(planned, out):
            Parts(out, planned).delete()  # of whoever was killed after saving it
            return stored
        self.train(lab)
        planned = replace(planned, made_with=tally(map(lab.folder, self.origin(lab).runs)))
        return self._measured(planned, self.subjects(lab), out)

    def _measured(self, planned: Result, subjects: Mapping[str, Callable[[], Any]], out: Path) -> Result:
        parts = Parts(out, planned)
        rows = [row for name, opened in subjects.items() for row in self._part(parts, name, opened)]
        result = self._saved(planned, rows, out)
        parts.delete()
        return result

    def _saved(self, planned: Result, rows: Sequence[Mapping[str, Any]], out: Path) -> Result:
        replace(planned, rows=tidy(rows), measured_with=environment(self.trainer)).save(out / f"{self.name}.json")
        return self.load(out / f"{self.name}.json")


def _open_run(lab: Lab, config: TrainConfig) -> Run:
    (run,) = lab.runs([config])
    return run


@dataclass(frozen=True)
class CheckpointAnalysis(Analysis):
    """An analysis of checkpoints: its `measure` takes a probe. `reproduce` gives it the demo checkpoints,
    `mdm-interp probe` any other."""

    kind = "demos"
    trainer = staticmethod(train_demo)
    needs_twin: bool = False
    """Whether it compares a checkpoint with its twin, and has nothing to say without one."""
    of_twins: bool = False
    """Whether twins are measured too, as checkpoints of their own."""

    def measuring(self) -> tuple[Callable[..., Any], ...]:
        """Name the functions whose code decides the numbers."""
        return self.measure, self.configs, open_probe

    def train(self, lab: Lab) -> None:
        """Train what is missing of `configs`."""
        train_demos(self.configs(lab.seeds), lab)

    def subjects(self, lab: Lab) -> dict[str, Callable[[], Probe]]:
        """Name the demo checkpoints, asked about the facts that training states one way, and say how each is opened."""
        measured = [config for config in self.configs(lab.seeds) if self.of_twins or config.format != TWIN]
        return {config.digest(): partial(_open_demo, lab, config, self.needs_twin) for config in measured}

    def opened(self, run: Any, device: str) -> Probe:
        """Return a demo checkpoint, asked about the facts that training states one way."""
        return run.probe(device)

    def rows(self, subject: Probe) -> list[dict[str, Any]]:
        """Measure one checkpoint."""
        return [{"checkpoint": subject.name, **row} for row in self.measure(subject)]

    def probe(self, probe: Probe, out: Path) -> Result:
        """Return the result for one probe: from `out` if it is there, otherwise measured and saved there."""
        planned = self._planned(probe.origin(), [])
        if stored := self._stored(planned, out):
            return stored
        members = each_checkpoint([probe]) if self.of_twins else [probe]
        subjects = {
            json_digest(member.origin().model_dump(mode="json")): partial(replace, member) for member in members
        }
        return self._measured(planned, subjects, out)


def _open_demo(lab: Lab, config: DemoConfig, with_twin: bool) -> Probe:
    (demo,) = train_demos([config], lab)
    twin = _open_demo(lab, config.model_copy(update={"format": TWIN}), False) if with_twin else None
    return replace(demo.probe(lab.device), twin=twin)


def discover() -> list[Analysis]:
    """Find all installed analyses, in the order of their figures.

    Raises:
        UserError: two analyses have one name.
    """
    found: dict[str, Analysis] = {}
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        for module in _modules(entry_point.load()):
            analysis = getattr(module, "ANALYSIS", None)
            if not isinstance(analysis, Analysis):
                continue
            if found.setdefault(analysis.name, analysis) is not analysis:
                raise UserError(
                    f"analysis {analysis.name!r} of {entry_point.value} has the name of another; rename one of them"
                )
    return sorted(found.values(), key=lambda analysis: (analysis.order, analysis.name))


def ledger(analyses: Iterable[Analysis], results: Mapping[str, Result]) -> list[Verdict]:
    """Judge every claim that one of `analyses` tests and `results` (by analysis name) has rows of, in
    the order of the claims."""
    tested = [(results[analysis.name], analysis.claims) for analysis in analyses if analysis.name in results]
    return sorted(judge(tested), key=lambda verdict: verdict.claim["id"])


def _modules(root: ModuleType) -> list[ModuleType]:
    """Return a module, or a package's modules."""
    if not hasattr(root, "__path__"):
        return [root]
    names = [module.name for module in pkgutil.iter_modules(root.__path__)]
    return [importlib.import_module(f"{root.__name__}.{name}") for name in names]
