"""Measuring side by side: analyses of any installed package, each saved when done, whatever befalls the others."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster_helpers import Cluster
from helpers import tiny_grid

from mdm_interp import cli
from mdm_interp.config import ModelConfig, TrainConfig
from mdm_interp.errors import UserError
from mdm_interp.experiments import analysis, runner
from mdm_interp.experiments.analysis import ENTRY_POINTS, Analysis, discover
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.runner import measure_all
from mdm_interp.experiments.subjects import Demo, Lab, demos
from mdm_interp.training.loop import train, train_ensemble
from mdm_interp.training.runs import Run

STUDY = """
import os

import plotly.graph_objects as go

from mdm_interp.experiments.analysis import Analysis
from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.errors import UserError
from mdm_interp.experiments.scope import stages
from mdm_interp.stats.summary import Summary

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=5)
MODEL = ModelConfig(d_model=8, n_heads=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len)


def configs(seeds):
    return [TrainConfig(model=MODEL, facts=FACTS, steps=2, batch_size=4, n_checkpoints=2, seed=seed) for seed in seeds]


def measure(run, step):
    if os.path.exists({name!r}) and run.config.seed == 1:
        raise UserError("planted: a mistake; correct it")
    with open({name!r} + ".log", "a") as log:
        log.write(f"{{run.config.seed}}\\n")
    return [{{"process": os.getpid()}}]


def at_the_end(run):
    return stages(run, ("end",))


ANALYSIS = Analysis(
    name={name!r},
    question="Planted?",
    configs=configs,
    measure=measure,
    when=at_the_end,
    summarize=lambda result: Summary.of(result.frame, (), ("seed",)),
    takeaway=lambda result: "Planted.",
    draw=lambda result: go.Figure(),
)
"""
NAMES = ("planted_one", "planted_two")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Analysis]]:
    """The analyses of an installed package of another study, which fail where a file has their name."""
    for name in NAMES:
        folder = tmp_path / "site" / "planted_study"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").touch()
        (folder / f"{name}.py").write_text(STUDY.format(name=name))
    info = tmp_path / "site" / "planted_study-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-study\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nplanted = planted_study\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    found = [each for each in discover() if each.name in NAMES]
    for config in found[0].configs(range(2)):
        train(config, progress=False)
    yield found
    for name in [name for name in sys.modules if name.startswith("planted_study")]:
        del sys.modules[name]


def processes(result: Result) -> set[int]:
    return set(result.frame["process"])


def measured(name: str) -> list[str]:
    """The seeds of the runs that an analysis has measured, once for each time."""
    path = Path(f"{name}.log")
    return sorted(path.read_text().split()) if path.exists() else []


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("work was spread although there is nothing to do side by side")


PROGRESS = re.compile(r"^measuring planted_(one|two): [12] of 2; [01] of 2 analyses done.*$\n", re.MULTILINE)
"""What is said every few seconds where there is no terminal for bars."""


@pytest.mark.promise("runs measured by two processes", "the rows that one process measures")
def test_the_runs_of_another_packages_analyses_are_measured_side_by_side_once(
    planted: list[Analysis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lab, out = Lab(n_seeds=2, workers=2), tmp_path / "out"
    monkeypatch.setattr(analysis, "SHARE", 1)
    first, second = (config.digest() for config in planted[0].configs(lab.seeds))
    assert planted[0].shares(lab) == [[first], [second]]
    results = measure_all(planted, lab, out)
    assert [result.name for result in results] == list(NAMES)
    assert [result.frame["seed"].tolist() for result in results] == [[0, 1]] * 2, "in order, whoever measured them"
    assert os.getpid() not in processes(results[0]) | processes(results[1])
    printed = capfd.readouterr()
    assert (printed.out, PROGRESS.sub("", printed.err)) == ("", ""), "the bars leave nothing behind"
    monkeypatch.setattr(runner, "side_by_side", refuse)
    assert measure_all(planted[::-1], lab, out) == results[::-1]
    assert [measured(name) for name in NAMES] == [["0", "1"]] * 2
    monkeypatch.setattr(analysis, "SHARE", 2)
    assert planted[0].shares(lab) == [[first, second]]
    assert replace(planted[0], slow=True).shares(lab) == [[first], [second]], "no run waits for another slow one"
    (out / "planted_two.json").unlink()
    again = measure_all(planted, lab, out)
    assert (again[0], processes(again[1])) == (results[0], {os.getpid()}), "a single share needs no other process"
    assert [{**row, "process": 0} for row in again[1].rows] == [{**row, "process": 0} for row in results[1].rows]
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json" for name in NAMES], "no parts are left"


def test_demos_are_trained_first_and_once_beside_what_needs_none(
    planted: list[Analysis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two analyses of checkpoints ask for the same demos, and one analysis of runs for none."""
    given: list[tuple[Any, ...]] = []

    def recorded(function: Any, tasks: Any, **_: Any) -> None:
        given.extend(tasks)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "side_by_side", recorded)
    of_demos = [analysis for analysis in discover() if analysis.kind == "demos"][:2]
    with tiny_grid(), pytest.raises(KeyboardInterrupt):
        measure_all([planted[0], *of_demos], Lab(n_seeds=2, root=tmp_path / "runs", workers=2), tmp_path / "out")
    trained = [args[0].config for function, args in given if function is Demo.train]
    with tiny_grid():
        assert trained == demos(range(2))
    assert [function is Demo.train for function, _ in given] == sorted(
        (function is Demo.train for function, _ in given), reverse=True
    )
    assert {args[0] for function, args in given if function is not Demo.train} == {
        planted[0].name,
        *(analysis.name for analysis in of_demos),
    }


def test_an_error_in_one_analysis_does_not_lose_the_others(planted: list[Analysis], tmp_path: Path) -> None:
    (tmp_path / "planted_one").touch()
    lab, out = Lab(n_seeds=2, workers=1), tmp_path / "out"
    with pytest.raises(UserError, match=r"^planted: a mistake; correct it$"):
        measure_all(planted, lab, out)
    assert (measured("planted_one"), measured("planted_two")) == (["0"], ["0", "1"])
    (tmp_path / "planted_one").unlink()
    results = measure_all(planted, lab, out)
    assert [result.frame["seed"].tolist() for result in results] == [[0, 1], [0, 1]]
    assert (measured("planted_one"), measured("planted_two")) == (["0", "1"], ["0", "1"]), "what was measured is kept"
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json" for name in NAMES]


def test_an_interrupted_measurement_goes_on_from_the_runs_that_are_done(
    planted: list[Analysis], tmp_path: Path
) -> None:
    one, lab, out = planted[0], Lab(n_seeds=2), tmp_path / "out"
    (tmp_path / "planted_one").touch()
    with pytest.raises(UserError, match="planted"):
        one.result(lab, out)
    assert [path.name for path in out.iterdir()] == [".planted_one.parts"]
    (tmp_path / "planted_one").unlink()
    assert one.result(lab, out).frame["seed"].tolist() == [0, 1]
    assert measured("planted_one") == ["0", "1"]
    assert [path.name for path in out.iterdir()] == ["planted_one.json"]


@pytest.mark.parametrize("change", ["settings", "code", "damaged"])
def test_parts_of_another_measurement_are_not_used(
    planted: list[Analysis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    one, lab, out = planted[0], Lab(n_seeds=2), tmp_path / "out"
    (tmp_path / "planted_one").touch()
    with pytest.raises(UserError, match="planted"):
        one.result(lab, out)
    (tmp_path / "planted_one").unlink()
    if change == "settings":
        one = replace(one, settings={"more": 1})
    elif change == "code":
        monkeypatch.setattr(analysis, "versions", lambda *functions: {"code": "another"})
    else:
        (part,) = (out / ".planted_one.parts").iterdir()
        part.write_text(part.read_text()[:-5])
    assert one.result(lab, out).frame["seed"].tolist() == [0, 1]
    assert measured("planted_one") == ["0", "0", "1"]


@pytest.mark.usefixtures("planted")
def test_a_mistake_in_a_worker_is_one_line_and_the_next_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "planted_two").touch()
    command = ["mdm-interp", "reproduce", "--seeds", "2", "--device", "cpu", "--workers", "2", "--out", "out"]
    monkeypatch.setattr(sys, "argv", [*command, *(part for name in NAMES for part in ("--only", name))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capfd.readouterr()
    assert (printed.out, PROGRESS.sub("", printed.err)) == ("", "mdm-interp: planted: a mistake; correct it\n")
    assert (measured("planted_one"), measured("planted_two")) == (["0", "1"], ["0"])
    (tmp_path / "planted_two").unlink()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (None, 0)
    assert (measured("planted_one"), measured("planted_two")) == (["0", "1"], ["0", "1"])


def test_runs_gone_through_are_reported(planted: list[Analysis], tmp_path: Path) -> None:
    reports: list[int] = []
    lab = Lab(n_seeds=2)
    first, second = (config.digest() for config in planted[0].configs(lab.seeds))
    planted[0].measure_share(lab, tmp_path / "out", [second], reports.append)
    assert (reports, measured("planted_one")) == ([2], ["1"]), "one of two"
    planted[0].measure_share(lab, tmp_path / "out", [first, second], reports.append)
    assert (reports, measured("planted_one")) == ([2, 2, 2], ["0", "1"]), "and the one that was done before"


def test_an_analysis_that_is_not_installed_is_measured_too(
    planted: list[Analysis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "SHARE", 1)
    own = replace(planted[0], name="my_own")
    (result,) = measure_all([own], Lab(n_seeds=2, workers=2), tmp_path / "out")
    assert result.frame["seed"].tolist() == [0, 1]


def test_a_cluster_trains_and_measures_in_folders_that_are_named_from_here(
    planted: list[Analysis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with Cluster(elsewhere) as cluster:
        worker = cluster.worker()
        lab, out = Lab(n_seeds=3, workers=cluster.address), Path("out")
        runs = lab.runs(planted[0].configs(lab.seeds))
        assert [run.finished for run in runs] == [True] * 3 and {run.folder.parent for run in runs} == {Path("runs")}
        results = measure_all(planted[:1], lab, out)
        assert processes(results[0]) == {worker.pid}
        assert (elsewhere / "planted_one.log").read_text().split() == ["0", "1", "2"]
        assert [result.frame["seed"].tolist() for result in results] == [[0, 1, 2]]
        (tmp_path / "runs").rename(tmp_path / "moved")
    assert measure_all(planted[:1], lab, out) == results, "what is there asks no cluster"


def test_a_worker_that_does_not_reach_the_runs_says_so(tmp_path: Path) -> None:
    run = Run.of(TrainConfig(model=ModelConfig(d_model=8, n_heads=2, d_vocab=80, n_ctx=8)), tmp_path / "absent")
    with pytest.raises(UserError, match=r"^runs: \S+/absent is not there on .+; give a folder that all workers share$"):
        train_ensemble([run], "cpu", lambda progressed: None)
    assert list(tmp_path.iterdir()) == []
