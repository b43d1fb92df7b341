"""The README and the files it sends one to: what they say is there, and works as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from document_helpers import ROOT, blocks, check_command, targets
from helpers import TINY_DEMO

from mdm_interp import cli
from mdm_interp.config import TrainConfig
from mdm_interp.experiments.analysis import discover
from mdm_interp.experiments.grids import FULL_SEEDS, QUICK_SEEDS
from mdm_interp.training.demo import train_demo
from mdm_interp.training.runs import Run

README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def test_the_first_two_python_blocks_run_as_written(tmp_path: Path) -> None:
    ran = run_python("\n".join(blocks(README, "python")[:2]), tmp_path)
    number = r"tensor\(([\d.]+)\)"
    forward, reverse = map(float, re.findall(rf"^forward {number} reverse {number}$", ran.stdout, re.MULTILINE)[0])
    assert 0 < reverse <= 1
    assert forward > 0.5, "it did not learn its facts"
    assert "route correlation per layer and head tensor(" in ran.stdout
    assert re.search(r"^torch\.Size\(\[\d+, 1, 6, 6\]\)$", ran.stdout, re.MULTILINE)
    without = float(re.findall(rf"^without head 0 {number}$", ran.stdout, re.MULTILINE)[0])
    assert abs(without - forward) > 1e-3, "silencing a head changes nothing"
    pages = ["attention.html", "denoising.html", "routes.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*pages, "runs"]


def test_the_last_python_block_runs_on_a_demo_checkpoint(tmp_path: Path) -> None:
    train_demo(tmp_path / "demo", TINY_DEMO, progress=False)
    *_, last = blocks(README, "python")
    assert "nan" not in run_python(last, tmp_path).stdout


def test_the_yaml_block_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CONFIG.yaml").write_text(*blocks(README, "yaml"))
    monkeypatch.setattr(sys, "argv", ["mdm-interp", "train", "CONFIG.yaml", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    config = TrainConfig.from_yaml("CONFIG.yaml")
    assert capsys.readouterr().out == f"{Run.of(config).folder}\n"
    assert Run.of(config).metrics()[-1]["step"] == config.steps == 300


def test_the_table_lists_the_analyses_that_are_there() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, re.MULTILINE)
    assert listed == [(analysis.name, analysis.question) for analysis in discover()]


def test_the_number_of_models_is_right(real_grid: None) -> None:
    trained = {config.digest() for analysis in discover() for config in analysis.configs(range(QUICK_SEEDS))}
    assert f"trains {len(trained)} small models" in " ".join(README.split())
    assert {int(number) for number in re.findall(r"(\d+) seeds\)", README)} == {FULL_SEEDS}


def test_the_commands_and_options_exist() -> None:
    usages = re.findall(r"^    mdm-interp (.+)$", README, re.MULTILINE)
    usages += re.findall(r"`mdm-interp ([^`]+)`", README)
    assert len(usages) >= 5
    for usage in usages:
        check_command(usage)


def test_every_file_it_names_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert {"docs/theory.md", "CITATION.cff"} <= set(links)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_make_targets_exist() -> None:
    recipes = targets()
    named = set(re.findall(r"^    make (\w+)", README, re.MULTILINE)) | set(re.findall(r"`make (\w+)", README))
    assert {"reproduce", "test"} <= named <= recipes.keys()
    assert "mdm-interp reproduce $(ARGS)" in recipes["reproduce"]
    assert re.search(r"pytest .*\$\(ARGS\)", recipes["test"])


def test_ci_runs_the_linters_and_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in script if line.startswith("make")] == ["make lint", "make test"]
    assert "set -euo pipefail" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert all(tool in targets()["lint"] for tool in ("ruff check .", "ruff format --check .", "pyright"))
