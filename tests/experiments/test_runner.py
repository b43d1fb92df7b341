"""Measuring side by side: analyses of any installed package, each saved when done, whatever befalls the others."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mdm_interp.measuring import measure_all

from mdm_interp import cli, measuring
from mdm_interp.errors import UserError
from mdm_interp.experiments.analysis import ENTRY_POINTS, Analysis, discover
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import Lab
from mdm_interp.training.loop import train

STUDY = """
import os

import plotly.graph_objects as go

from mdm_interp.experiments.analysis import Analysis
from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.files import UserError
from mdm_interp.stats.estimates import mean_estimate

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=5)
MODEL = ModelConfig(d_model=8, n_heads=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len)


def configs(seeds):
    return [TrainConfig(model=MODEL, facts=FACTS, steps=2, batch_size=4, n_checkpoints=2, seed=seed) for seed in seeds]


def measure(runs):
    if os.path.exists({name!r}):
        raise UserError("planted: a mistake; correct it")
    return [{{"seed": run.config.seed, "process": os.getpid()}} for run in runs]


ANALYSIS = Analysis(
    name={name!r},
    question="Planted?",
    configs=configs,
    measure=measure,
    summarize=lambda result: {{"seeds": mean_estimate(result.frame["seed"])}},
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
    found = [analysis for analysis in discover() if analysis.name in NAMES]
    for config in found[0].configs(range(2)):
        train(config, progress=False)
    yield found
    for name in [name for name in sys.modules if name.startswith("planted_study")]:
        del sys.modules[name]


def processes(result: Result) -> set[int]:
    return set(result.frame["process"])


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("work was spread although there is nothing to do side by side")


def test_analyses_of_another_package_are_measured_side_by_side_once(
    planted: list[Analysis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lab, out = Lab(n_seeds=2, workers=2), tmp_path / "out"
    results = measure_all(planted, lab, out)
    assert [result.name for result in results] == list(NAMES)
    assert [result.frame["seed"].tolist() for result in results] == [[0, 1], [0, 1]]
    assert os.getpid() not in processes(results[0]) | processes(results[1])
    assert capfd.readouterr() == ("", ""), "the bars leave nothing behind"
    monkeypatch.setattr(measuring, "side_by_side", refuse)
    assert measure_all(planted[::-1], lab, out) == results[::-1]
    (out / "planted_two.json").unlink()
    again = measure_all(planted, lab, out)
    assert (again[0], processes(again[1])) == (results[0], {os.getpid()}), "a single one needs no other process"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_one_analysis_does_not_lose_the_others(
    planted: list[Analysis], tmp_path: Path, workers: int
) -> None:
    (tmp_path / "planted_one").touch()
    lab, out = Lab(n_seeds=2, workers=workers), tmp_path / "out"
    with pytest.raises(UserError, match=r"^planted: a mistake; correct it$"):
        measure_all(planted, lab, out)
    assert [path.name for path in out.iterdir()] == ["planted_two.json"]
    (tmp_path / "planted_one").unlink()
    kept = (out / "planted_two.json").stat().st_mtime_ns
    assert [result.name for result in measure_all(planted, lab, out)] == list(NAMES)
    assert (out / "planted_two.json").stat().st_mtime_ns == kept


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
    assert capfd.readouterr() == ("", "mdm-interp: planted: a mistake; correct it\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["planted_one.json"]


def test_runs_gone_through_are_reported(planted: list[Analysis], tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    planted[0].result(Lab(n_seeds=2), tmp_path / "out", lambda done, total: reports.append((done, total)))
    assert reports == [(0, 2), (1, 2), (2, 2)]
