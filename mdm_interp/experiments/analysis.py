"""Analyses: one question, one measurement, one figure each; and the lab they are measured in.

An analysis is a module that holds `ANALYSIS = Analysis(...)`. The entry-point group `mdm_interp.analyses` names such
modules or packages of them, in this package and in any other that is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import plotly.graph_objects as go

from mdm_interp.config import DemoConfig, TrainConfig
from mdm_interp.errors import UserError
from mdm_interp.experiments.claims import Rule, Verdict, judge
from mdm_interp.experiments.results import CheckpointOrigin, Result, TrainedOrigin, tidy
from mdm_interp.experiments.subjects import TWIN, Lab, Probe, open_probe, train_demos
from mdm_interp.provenance import environment, tally, versions
from mdm_interp.stats.estimates import Estimate
from mdm_interp.training.demo import train_demo
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run

ENTRY_POINTS = "mdm_interp.analyses"


@dataclass(frozen=True)
class Analysis:
    """One question and how it is answered."""

    name: str
    question: str
    """One sentence."""
    configs: Callable[[Sequence[int]], Sequence[Any]]
    """What has to be trained for it, for given seeds: `TrainConfig`s, or an analysis of checkpoints' `DemoConfig`s."""
    measure: Callable[[Sequence[Run]], list[dict[str, Any]]]
    """Runs to rows: one measurement per row."""
    summarize: Callable[[Result], Mapping[str, Estimate]]
    """Rows to the figures quoted anywhere."""
    draw: Callable[[Result], go.Figure]
    """Result to figure; computes nothing but what it shows."""
    claims: Sequence[Rule] = ()
    """The claims that its rows decide, each with its rule."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What `measure` depends on besides the runs; kept in the result."""
    order: int = 100
    """Place among the figures; lower comes first."""

    trainer: ClassVar[Callable[..., Any]] = staticmethod(train)
    """What trains the models that it is measured on."""
    opener: ClassVar[tuple[Callable[..., Any], ...]] = (Run,)
    """What gives `measure` its subjects; its code decides the numbers too."""

    def load(self, path: str | Path) -> Result:
        """Read a result of this analysis.

        Raises:
            UserError: the file is missing or is not a result.
        """
        return Result.load(path, self.summarize)

    def origin(self, lab: Lab) -> TrainedOrigin:
        """Name the models that it is measured on."""
        configs = self.configs(lab.seeds)
        return TrainedOrigin(
            kind="runs" if all(isinstance(config, TrainConfig) for config in configs) else "demos",
            runs=[config.digest() for config in configs],
            first_seed=[config.model_dump(mode="json") for config in configs if config.seed == lab.seeds[0]],
        )

    def planned(self, lab: Lab) -> Result:
        """Return the result as it will be, with nothing measured yet."""
        return self._planned(self.origin(lab), lab.seeds)

    def _planned(self, origin: TrainedOrigin | CheckpointOrigin, seeds: Sequence[int]) -> Result:
        made_by = versions(self.measure, self.configs, *self.opener)
        return Result(
            self.name, self.question, origin, dict(self.settings), list(seeds), made_by, [], summarize=self.summarize
        )

    def stored(self, lab: Lab, out: Path) -> Result | None:
        """Return the result that `out` holds, if measuring again would repeat it."""
        return self._stored(self.planned(lab), out)

    def _stored(self, planned: Result, out: Path) -> Result | None:
        path = out / f"{self.name}.json"
        stored = self.load(path) if path.exists() else None
        return stored if stored and stored.same_measurement(planned) else None

    def result(self, lab: Lab, out: Path, report: Callable[[int, int], None] | None = None) -> Result:
        """Return the result of this analysis: from `out` if it is there, otherwise measured and saved there.

        Args:
            report: Told, while measuring, how many subjects are behind it and how many there are.
        """
        if stored := self.stored(lab, out):
            return stored
        subjects = self.subjects(lab)
        planned = replace(self.planned(lab), made_with=tally(map(lab.folder, self.origin(lab).runs)))
        return self._measured(planned, _Watched(subjects, report) if report else subjects, out)

    def subjects(self, lab: Lab) -> list[Any]:
        """Return what `measure` is given: the finished runs of `configs`, trained first where they are missing."""
        return lab.runs(self.configs(lab.seeds))

    def _measured(self, planned: Result, subjects: Sequence[Any], out: Path) -> Result:
        result = replace(planned, rows=tidy(self.measure(subjects)), measured_with=environment(self.trainer))
        result.save(out / f"{self.name}.json")
        return self.load(out / f"{self.name}.json")


class _Watched(list):
    """Subjects that report how many of them have been gone through."""

    def __init__(self, subjects: Sequence[Any], report: Callable[[int, int], None]) -> None:
        super().__init__(subjects)
        self.report = report

    def __iter__(self) -> Iterator[Any]:
        for done, subject in enumerate(super().__iter__()):
            self.report(done, len(self))
            yield subject
        self.report(len(self), len(self))


def discover() -> list[Analysis]:
    """All installed analyses, in the order of their figures.

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
    """The verdicts on every claim that one of `analyses` tests and `results` (by analysis name) has rows of, in the
    order of the claims."""
    tested = [(results[analysis.name], analysis.claims) for analysis in analyses if analysis.name in results]
    return sorted(judge(tested), key=lambda verdict: verdict.claim["id"])


def _modules(root: ModuleType) -> list[ModuleType]:
    """A module, or a package's modules."""
    if not hasattr(root, "__path__"):
        return [root]
    names = [module.name for module in pkgutil.iter_modules(root.__path__)]
    return [importlib.import_module(f"{root.__name__}.{name}") for name in names]


@dataclass(frozen=True)
class CheckpointAnalysis(Analysis):
    """An analysis of checkpoints: its `measure` takes probes instead of runs. `reproduce` gives it the demo
    checkpoints, `mdm-interp probe` any other."""

    measure: Callable[[Sequence[Probe]], list[dict[str, Any]]]
    trainer = staticmethod(train_demo)
    opener = (open_probe,)
    needs_twin: bool = False
    """Whether it compares with a twin, and has nothing to say without one."""

    def subjects(self, lab: Lab) -> list[Probe]:
        """The demo MDMs, each with the twin of its seed, asked about the facts that training states one way."""
        configs = self.configs(lab.seeds)
        folders = dict(zip(configs, train_demos(configs, lab), strict=True))

        def opened(config: DemoConfig) -> Probe:
            folder = folders[config]
            return replace(open_probe(folder, folder / "facts.csv", device=lab.device), name=f"demo {config.format}")

        (twin,) = [opened(config) for config in configs if config.format == TWIN]
        return [replace(opened(config), twin=twin) for config in configs if config.format != TWIN]

    def probe(self, probe: Probe, out: Path) -> Result:
        """The result for one probe: from `out` if it is there, otherwise measured and saved there."""
        planned = self._planned(probe.origin(), [])
        return self._stored(planned, out) or self._measured(planned, [probe], out)
