"""Sweeps: runs along axes of a config's fields, trained and measured side by side into one table.

    base: {model: {d_model: 32, n_heads: 1}, steps: 300}
    grid: {model.position: [rope, alibi], seed: [0, 1, 2]}
    measures: [route_correlation]

    kind: demos                                                      # demo checkpoints instead
    base: {world: varied, n_families: 40, n_bpe: 900, steps: 6000}
    grid: {n_control: [7, 14, 21, 28]}
    measures: [large_model_prediction]

The table, `sweep.parquet`, has a row per measurement: the sweep's axes by their dotted names, `measure`, and what the
measure says, as in results (under `MEASURE.column` where it says something else by one of these names). It is there
from the beginning, and replaced by a longer one as runs are done.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field, ValidationError, model_validator

from mdm_interp.config import (
    Config,
    Count,
    DemoConfig,
    FactConfig,
    Number,
    Seed,
    TrainConfig,
    one_line,
)
from mdm_interp.errors import UserError, nearest
from mdm_interp.experiments.analysis import Analysis, discover
from mdm_interp.experiments.results import plain, tidy
from mdm_interp.experiments.scope import metrics_at, rows_of, stages
from mdm_interp.experiments.subjects import Demo
from mdm_interp.files import DEFAULT_ROOT, check_folder, replacing
from mdm_interp.parallel import Workers, find_place, progress_bars, side_by_side
from mdm_interp.training.loop import Progressed, ensembles, train_ensemble
from mdm_interp.training.runs import Run
from mdm_interp.training.text import TextStep

MOST_RUNS = 10_000
Point = dict[str, Any]
"""Values of some fields of a config, by their dotted names."""
Trained = Run | Demo
"""What a sweep trains and measures."""


class Distribution(Config):
    """What the values of a field are drawn from: one of these."""

    uniform: tuple[Number, Number] | None = None
    """Lowest and highest."""
    log_uniform: tuple[Number, Number] | None = None
    """Lowest and highest; the logarithm is drawn uniformly."""
    integers: tuple[Seed, Seed] | None = None
    """Lowest and highest, both among them."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Distribution:
        kinds = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"expected one of uniform, log_uniform, integers and choice, got {len(kinds)}; give one")
        bounds = self.uniform or self.log_uniform or self.integers
        if bounds and bounds[0] > bounds[1]:
            raise ValueError(f"{kinds[0]}: {bounds[0]} is above {bounds[1]}; swap them")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform: {self.log_uniform[0]} has no logarithm; use a number above 0")
        return self

    def draws(self, seed: str, n: int) -> list[Any]:
        """Draw `n` values. More of them begin with the same ones."""
        drawn = random.Random(seed)
        if self.uniform:
            return [drawn.uniform(*self.uniform) for _ in range(n)]
        if self.log_uniform:
            low, high = self.log_uniform
            return [low * (high / low) ** drawn.random() for _ in range(n)]
        if self.integers:
            return [drawn.randint(*self.integers) for _ in range(n)]
        return [drawn.choice(self.choice or []) for _ in range(n)]


class RandomPoints(Config):
    """Points whose fields are drawn, each from its distribution."""

    n: Count
    seed: Seed = 0
    over: Annotated[dict[str, Distribution], Field(min_length=1)]

    def points(self) -> list[Point]:
        columns = {field: of.draws(f"{self.seed} {field}", self.n) for field, of in self.over.items()}
        return [{field: values[i] for field, values in columns.items()} for i in range(self.n)]


class Sweep(Config):
    """Which runs there are, and what is measured of them. The runs are the product of a grid's fields, of points that
    are drawn, and of points that are listed, each with the fields of `base`."""

    kind: Literal["runs", "demos"] = "runs"
    """What is trained: runs of a :class:`~mdm_interp.config.TrainConfig`, or demo checkpoints of a
    :class:`~mdm_interp.config.DemoConfig`."""
    base: dict[str, Any]
    """Fields of these. A run's `model.d_vocab` and `model.n_ctx` follow the world, and `model.attention` and
    `model.readout_shift` the objective, where they are not given."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values of fields, by their dotted names."""
    random: RandomPoints | None = None
    points: Annotated[list[Point], Field(min_length=1)] | None = None
    measures: list[str] = Field(default_factory=list)
    """Names of analyses of what is trained. What the training of runs recorded is always in the table, as the measure
    `metrics`."""

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        axes = [*self.grid, *(self.random.over if self.random else ()), *self._listed]
        for one, other in itertools.pairwise(sorted(f"{axis}." for axis in axes)):
            if other.startswith(one):
                raise ValueError(
                    f"{other[:-1]}: is given by two axes, the other being {one[:-1]}; leave one of them out"
                )
        sizes = [*map(len, self.grid.values()), self.random.n if self.random else 1, len(self.points or [{}])]
        if math.prod(sizes) > MOST_RUNS:
            raise ValueError(f"grid: its {math.prod(sizes)} points are more than {MOST_RUNS}; leave values out")
        _ = self.configs
        return self

    @property
    def _listed(self) -> dict[str, None]:
        return dict.fromkeys(name for point in self.points or () for name in point)

    @property
    def axes(self) -> list[str]:
        """The fields that differ, by their dotted names."""
        return [*self.grid, *(self.random.over if self.random else ()), *self._listed]

    @cached_property
    def configs(self) -> list[Any]:
        """The runs' configs, of the `kind` that they are, equal ones once."""
        of_grid = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        parts = [of_grid, self.random.points() if self.random else [{}], self.points or [{}]]
        points = ({**one, **two, **three} for one, two, three in itertools.product(*parts))
        return list({config.digest(): config for config in map(self._config, points)}.values())

    def _config(self, point: Point) -> Any:
        content = copy.deepcopy(self.base)
        for name, value in point.items():
            *sections, last = name.split(".")
            section: Any = content
            for key in sections:
                section = section.setdefault(key, {}) if isinstance(section, dict) else None
            if not isinstance(section, dict):
                raise ValueError(f"{name}: there is no such field, as {'.'.join(sections)} has none; correct its name")
            section[last] = copy.deepcopy(value)
        prefix = "" if self.kind == "demos" else "facts."
        try:
            if self.kind == "demos":
                return DemoConfig.model_validate(content)
            facts = FactConfig.model_validate(content.get("facts", {}))
            prefix, model = "", content.get("model")
            if isinstance(model, dict):
                causal = content.get("objective") == "causal"
                seen, shift = ("causal", -1) if causal else ("bidirectional", 0)
                follows = {"d_vocab": facts.d_vocab, "n_ctx": facts.seq_len, "attention": seen, "readout_shift": shift}
                content["model"] = {**follows, **model}
            return TrainConfig.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{prefix}{_short(one_line(error))}{at(point)}") from error

    def at(self, config: Config) -> Point:
        """Return where on the axes a run is."""
        return {axis: plain(functools.reduce(getattr, axis.split("."), config)) for axis in self.axes}


def at(point: Mapping[str, Any]) -> str:
    """Say where on the axes something is."""
    said = ", ".join(f"{name}={value}" for name, value in point.items())
    return f" at {_short(said, 150)}" if point else ""


def _short(text: str, most: int = 250) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


# ---- running one


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run: str
    """Its digest."""
    rows: dict[str, list[dict[str, Any]]]
    """Tidy, by measure."""
    reason: str = ""
    """Why it failed, on one line; empty if it did not."""


def run_sweep(
    sweep: Sweep, out: str | Path, *, root: str | Path = DEFAULT_ROOT, device: str = "cpu", workers: Workers = None
) -> list[Outcome]:
    """Train and measure what is missing of a sweep, and write its table, `OUT/sweep.parquet`, and the result of each
    measure over all runs that did not fail, `OUT/NAME.json`.

    A run that fails is reported at once, and the others go on. What is trained is kept in the run store and what is
    measured in `out`, so that a sweep that was interrupted or extended, or in which runs failed, goes on from there.

    Args:
        root: Folder of the run store. Workers of a Dask cluster have to reach it and `out` under the same paths.
        workers: How many processes, or the address of a Dask scheduler; default:
            :func:`~mdm_interp.parallel.default_workers`.

    Returns:
        One outcome per config, in order.

    Raises:
        UserError: a measure is not installed, the device cannot be used, or no scheduler answers.
        OSError: `out`, or the store in which something is missing, cannot be written to.
    """
    root, out = Path(root).absolute(), check_folder(Path(out).absolute())
    measures = find_measures(sweep.measures, sweep.kind)
    runs = {config.digest(): _trained_of(config, root) for config in sweep.configs}
    outcomes = {name: found for name, run in runs.items() if (found := _stored(run, out, measures))}
    missing = [run for name, run in runs.items() if name not in outcomes]
    n, device = find_place(workers, device)
    if not all(map(_is_finished, missing)):
        check_folder(root)
    together, alone = list[Run](), list[Trained]()
    for run in missing:
        if isinstance(run, Run) and not _is_finished(run):
            together.append(run)
        else:
            alone.append(run)
    shares: list[Sequence[Trained]] = [*ensembles(together, device, n), *([run] for run in alone)]
    root.mkdir(parents=True, exist_ok=True)
    table, lost = _Table(sweep, out / "sweep.parquet"), list[BaseException]()
    with _Bar(sweep, len(runs)) as bar:

        def finished(future: Future[list[Outcome]]) -> None:
            if error := future.exception():
                lost.append(error)
            for outcome in [] if error else future.result():
                outcomes[outcome.run] = outcome
                bar.add(outcome)
            table.write(outcomes, if_due=True)

        def run_all(shares: Sequence[Sequence[Trained]]) -> None:
            """Run shares; where a process died and took the others' with it, the lost ones again in ever smaller
            groups, so that what it died of is found and the rest is done."""
            if not shares:
                return
            tasks = [(share, device, out, sweep.measures, sweep.kind) for share in shares]
            side_by_side(_run_together, tasks, workers=workers or n, show=bar.show, finished=finished)
            left = [share for share in shares if share[0].config.digest() not in outcomes]
            if len(left) == 1:
                left = [[run] for run in left[0]]
            if isinstance(workers, str) or len(left) == 1:  # a cluster's workers die each for themselves
                for name in (run.config.digest() for run in itertools.chain(*left)):
                    outcomes[name] = Outcome(name, {}, _reason(lost[-1]))
                    bar.add(outcomes[name])
            else:
                run_all(left[: len(left) // 2])
                run_all(left[len(left) // 2 :])

        table.write(outcomes)
        for outcome in list(outcomes.values()):
            bar.add(outcome)
        try:
            run_all(shares)
        finally:
            table.write(outcomes)
    done = [run for name, run in runs.items() if not outcomes[name].reason]
    for analysis in measures if done else ():
        analysis.write_pages(analysis.gather(done, out), root, out)
    return [outcomes[run] for run in runs]


def _trained_of(config: TrainConfig | DemoConfig, root: Path) -> Trained:
    return Run.of(config, root) if isinstance(config, TrainConfig) else Demo.of(config, root)


def find_measures(names: Sequence[str], kind: str = "runs") -> list[Analysis]:
    """Return the installed analyses of runs, or of demos, that are named.

    Raises:
        UserError: there is none of a name.
    """
    known = {one.name: one for one in discover() if one.kind == kind and not getattr(one, "needs_twin", False)}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"measures: no analysis of {kind} {unknown[0]!r}; there are {nearest(unknown[0], known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _is_finished(run: Trained) -> bool:
    try:
        return run.finished
    except UserError:  # it is damaged, as training it will say
        return False


def _stored(run: Trained, out: Path, measures: Sequence[Analysis]) -> Outcome | None:
    """Return the outcome of a run of which nothing is missing."""
    rows = {analysis.name: analysis.stored_rows(run, out) for analysis in measures}
    if not _is_finished(run) or None in rows.values():
        return None
    try:
        found = {"metrics": _recorded(run)} if isinstance(run, Run) else {}
        return Outcome(run.config.digest(), {**found, **{name: found or [] for name, found in rows.items()}})
    except UserError:  # so are its metrics
        return None


def _run_together(
    runs: Sequence[Trained], device: str, out: Path, measures: Sequence[str], kind: str, report: Callable[..., Any]
) -> list[Outcome]:
    """Train runs together and measure each; if that fails, one by one, so that only those fail that are to blame."""
    try:
        if ensemble := [run for run in runs if isinstance(run, Run)]:
            train_ensemble(ensemble, device, report)
        for demo in runs:
            if isinstance(demo, Demo):
                demo.train(device, report)
    except Exception as error:
        if len(runs) == 1:
            return [Outcome(runs[0].config.digest(), {}, _reason(error))]
        return [outcome for run in runs for outcome in _run_together([run], device, out, measures, kind, report)]
    return [_measured(run, out, find_measures(measures, kind), device) for run in runs]


def _measured(run: Trained, out: Path, measures: Sequence[Analysis], device: str) -> Outcome:
    rows, reasons = dict[str, list[dict[str, Any]]](), list[str]()
    calls = {"metrics": partial(_recorded, run)} if isinstance(run, Run) else {}
    calls |= {analysis.name: partial(analysis.measured_rows, run, out, device) for analysis in measures}
    for name, call in calls.items():
        try:
            rows[name] = call()
        except Exception as error:
            reasons.append(f"{name}: {_reason(error)}")
    return Outcome(run.config.digest(), rows, "; ".join(reasons))


def _recorded(run: Run) -> list[dict[str, Any]]:
    return tidy(rows_of(run, stages(run), lambda run, step: [metrics_at(run, step)]))


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return _short(said if isinstance(error, UserError) else f"{type(error).__name__}: {said}", 300)


# ---- what is seen of it


class _Table:
    """The table of what is there so far."""

    SECONDS = 5.0

    def __init__(self, sweep: Sweep, path: Path) -> None:
        self.path, self.axes, self.due = path, sweep.axes, 0.0
        self.places = {config.digest(): sweep.at(config) for config in sweep.configs}

    def write(self, outcomes: Mapping[str, Outcome], *, if_due: bool = False) -> None:
        """Write the rows of all outcomes, in the order of the runs.

        Args:
            if_due: Only some time after it was last written, and not more often than takes a tenth of the time.
        """
        began = time.monotonic()
        if if_due and began < self.due:
            return
        rows = [
            _joined({**place, "measure": measure}, measure, row)
            for run, place in self.places.items()
            if run in outcomes
            for measure, measured in outcomes[run].rows.items()
            for row in measured
        ]
        names = dict.fromkeys([*self.axes, "measure", *itertools.chain(*rows)])
        frame = pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in names})
        with replacing(self.path) as temporary:
            frame.to_parquet(temporary, index=False)
        self.due = time.monotonic() + max(self.SECONDS, 9 * (time.monotonic() - began))


def _joined(own: Point, measure: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table. What a measure says differently under a name of the table's own has the measure's name
    before it."""
    named = {f"{measure}.{name}" if own.get(name, value) != value else name: value for name, value in row.items()}
    return own | named


def _column(values: Sequence[Any]) -> pd.Series:
    """Return a column of one type that has missing values: texts where they were of several types, or were lists."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) != 1 or not kinds <= DTYPES.keys():
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        kinds = {str}
    return pd.Series(values, dtype=DTYPES[kinds.pop()])


DTYPES: dict[type, Any] = {int: "Int64", float: "Float64", bool: "boolean", str: "string"}


class _Bar:
    """A progress bar over the runs, and a line for each that fails."""

    def __init__(self, sweep: Sweep, total: int) -> None:
        self.progress = progress_bars()
        self.task = self.progress.add_task("runs", total=total, values="")
        self.places = {config.digest(): sweep.at(config) for config in sweep.configs}
        self.under_way, self.done, self.failed = dict[str, float](), 0, 0

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, progressed: Progressed | TextStep) -> None:
        if isinstance(progressed, TextStep):
            self.under_way[progressed.config.digest()] = progressed.step / progressed.config.steps
        else:
            self.under_way[progressed.digest] = progressed.step / progressed.total
        self._update()

    def add(self, outcome: Outcome) -> None:
        self.under_way.pop(outcome.run, None)
        self.done += 1
        if outcome.reason:
            self.failed += 1
            said = f"failed: {outcome.run}{at(self.places[outcome.run])}: {outcome.reason}"
            self.progress.console.print(said, markup=False, highlight=False, soft_wrap=True)
        self._update()

    def _update(self) -> None:
        values = f"{len(self.under_way)} under way" + (f", {self.failed} failed" if self.failed else "")
        self.progress.update(self.task, completed=round(self.done + sum(self.under_way.values()), 1), values=values)
