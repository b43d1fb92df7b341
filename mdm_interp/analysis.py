"""Analyses: one question, one measurement, one figure each; and the lab they are measured in.

An analysis is a module that holds `ANALYSIS = Analysis(...)`. The entry-point group `mdm_interp.analyses` names such
modules or packages of them, in this package and in any other that is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects as go

from mdm_interp.claims import ClaimTest, Verdict, judge
from mdm_interp.config import TrainConfig
from mdm_interp.files import UserError
from mdm_interp.presets import SCOPE
from mdm_interp.results import Result, tidy, versions
from mdm_interp.runs import DEFAULT_ROOT, Run
from mdm_interp.stats import Estimate
from mdm_interp.training import train_all

ENTRY_POINTS = "mdm_interp.analyses"
QUICK_SEEDS, FULL_SEEDS = 3, 10


@dataclass(frozen=True)
class Lab:
    """Where analyses get their runs: seeds, run store and device."""

    n_seeds: int = QUICK_SEEDS
    root: Path = DEFAULT_ROOT
    device: str = "cpu"
    workers: int | None = None

    @property
    def seeds(self) -> range:
        return range(self.n_seeds)

    def runs(self, configs: Sequence[TrainConfig]) -> list[Run]:
        """The finished runs of `configs`; what the store lacks is trained first."""
        return train_all(configs, root=self.root, device=self.device, workers=self.workers)


@dataclass(frozen=True)
class Analysis:
    """One question and how it is answered."""

    name: str
    question: str
    """One sentence."""
    configs: Callable[[Sequence[int]], list[TrainConfig]]
    """The runs it needs, for given seeds."""
    measure: Callable[[Sequence[Run]], list[dict[str, Any]]]
    """Runs to rows: one measurement per row."""
    summarize: Callable[[Result], Mapping[str, Estimate]]
    """Rows to the figures quoted anywhere."""
    draw: Callable[[Result], go.Figure]
    """Result to figure; computes nothing but what it shows."""
    claims: Sequence[ClaimTest] = ()
    """The claims that its rows decide, each with its rule."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What `measure` depends on besides the runs; kept in the result."""
    order: int = 100
    """Place among the figures; lower comes first."""

    def planned(self, lab: Lab) -> Result:
        """The result as it will be, with nothing measured yet."""
        runs = [Run.of(config, lab.root) for config in self.configs(lab.seeds)]
        first_seed = [run.config.model_dump(mode="json") for run in runs if run.config.seed == lab.seeds[0]]
        config = {"settings": dict(self.settings), "runs": [run.folder.name for run in runs], "first_seed": first_seed}
        made_with = versions(Path(inspect.getfile(self.measure)))
        return Result(self.name, self.question, config, list(lab.seeds), made_with, [], {})

    def result(self, lab: Lab, out: Path) -> Result:
        """The result of this analysis: from `out` if it is there, otherwise measured and saved there."""
        planned, path = self.planned(lab), out / f"{self.name}.json"
        if path.exists():
            stored = Result.load(path)
            if stored.same_measurement(planned):
                return stored
        measured = replace(planned, rows=tidy(self.measure(lab.runs(self.configs(lab.seeds)))))
        result = replace(measured, summary=dict(self.summarize(measured)))
        result.save(path)
        return Result.load(path)

    def main(self) -> None:
        """Measure and draw this analysis alone, with the options of `mdm-interp reproduce`."""
        from mdm_interp.cli import run_one

        run_one(self)


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
    return sorted(judge(tested, (*SCOPE, "stage")), key=lambda verdict: verdict.claim["id"])


def _modules(root: ModuleType) -> list[ModuleType]:
    """A module, or a package's modules."""
    if not hasattr(root, "__path__"):
        return [root]
    names = [module.name for module in pkgutil.iter_modules(root.__path__)]
    return [importlib.import_module(f"{root.__name__}.{name}") for name in names]
