"""The README and the files it sends one to: what they say is there, and works as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from document_helpers import ROOT, blocks, check_command, targets
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from analyses import phase_diagram
from analyses.phase_diagram import EXPLAINING
from mdm_interp import cli
from mdm_interp.config import TrainConfig
from mdm_interp.experiments import grids
from mdm_interp.experiments.analysis import discover
from mdm_interp.experiments.grids import FULL_SEEDS, QUICK_SEEDS
from mdm_interp.experiments.scope import SCOPE, about
from mdm_interp.stats.summary import Summary
from mdm_interp.training.runs import Run

README = (ROOT / "README.md").read_text(encoding="utf-8")
FINDINGS = ROOT / "docs" / "findings.md"
SIDES = ("forward", "reverse")


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path: Path) -> None:
    (example,) = blocks(README, "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    ran = run_python(example, tmp_path)
    number = r"tensor\(([\d.]+)\)"
    (forward,), (reverse,) = (re.findall(rf"^{side} {number}$", ran.stdout, re.MULTILINE) for side in SIDES)
    assert 0 < float(reverse) <= 1
    assert float(forward) > 0.5, "it did not learn its facts"
    assert "route correlation tensor(" in ran.stdout
    ((before, after),) = re.findall(rf"^before {number} after {number}$", ran.stdout, re.MULTILINE)
    assert abs(float(before) - float(reverse)) < 1e-3 and abs(float(after) - float(forward)) < 1e-3
    assert "torch.Size([1, 1, 6, 6])" in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["routes.html", "runs"]


# ---- what was found

END = {"stage": "end"}
CYCLE = {"setting": "relation_cycle"}
MANY = {"setting": "relation_cycle, 4 heads"}


def heads(n_heads: int) -> dict[str, Any]:
    """The columns of a RoPE model's summary in `head_specialisation`."""
    config = grids.small_model(grids.CYCLE, "rope", "any_order", 0, n_heads=n_heads)
    return {name: value for name, value in about(Run.of(config)).items() if name in SCOPE} | END


def pool(share: float) -> dict[str, Any]:
    return {"model": "MDM rope, d_head 64, base 1e6", "reversed_share": share, "stage": "end"}


Quoted = tuple[str, str, dict[str, Any], str]
SAID: list[tuple[str, list[Quoted]]] = [
    (
        r"learned its facts forward \(probability (\S+)\) gives the reverse answer a probability of (\S+), while",
        [
            ("reversal_curse", "forward_probability", {**CYCLE, "variant": "ARM rope"}, ".2f"),
            ("reversal_curse", "reverse_probability", {**CYCLE, "variant": "ARM rope"}, ".3f"),
        ],
    ),
    (
        r"has learned the same facts \((\S+)\) gives it (\S+ \[.+?\])\.",
        [
            ("reversal_curse", "forward_probability", {**CYCLE, "variant": "MDM rope"}, ".2f"),
            ("reversal_curse", "reverse_probability", {**CYCLE, "variant": "MDM rope"}, "[.2f]"),
        ],
    ),
    (
        r"the reverse probability is (\S+ \[.+?\])\\\* with two heads, (\S+ \[.+?\]) with four and (\S+)\\\* with "
        r"eight\.",
        [
            ("head_specialisation", "reverse_probability", heads(2), "[.2f]"),
            ("head_specialisation", "reverse_probability", heads(4), "[.2f]"),
            ("head_specialisation", "reverse_probability", heads(8), ".2f"),
        ],
    ),
    (
        r"equals the forward one, which is (\S+?)\\\* with one head and (\S+?)\\\* with four\.",
        [
            ("reversal_curse", "forward_probability", {**CYCLE, "variant": "MDM alibi"}, ".2f"),
            ("reversal_curse", "forward_probability", {**MANY, "variant": "MDM alibi"}, ".2f"),
        ],
    ),
    (
        r"the four-head model answers at (\S+) instead of (\S+)\.",
        [
            ("head_specialisation", "even_after", heads(4), ".2f"),
            ("head_specialisation", "reverse_probability", heads(4), ".2f"),
        ],
    ),
    (
        r"a one-head model answers at (\S+), and at (\S+) if 80 % of the other facts were shown both ways\.",
        [
            ("one_sided_routes", "reverse_probability", pool(0.0), ".2f"),
            ("one_sided_routes", "reverse_probability", pool(0.8), ".2f"),
        ],
    ),
]
"""Sentences of the README, and what each number in them is: analysis, quantity and columns of its summary, and format.
A format in brackets is that of a number with its interval."""


@cache
def summary(name: str) -> Summary:
    (analysis,) = [analysis for analysis in discover() if analysis.name == name]
    return analysis.load(ROOT / "figures" / f"{name}.json").summary


@pytest.mark.parametrize(("sentence", "quoted"), SAID)
def test_what_was_found_is_in_the_results(sentence: str, quoted: list[Quoted]) -> None:
    (said,) = re.findall(sentence, " ".join(README.split()))
    for number, (analysis, quantity, of, format) in zip(said, quoted, strict=True):
        estimate = summary(analysis).at(quantity, **of)
        written = f"{estimate.value:{format.strip('[]')}}"
        if format.startswith("["):
            written += f" [{estimate.low:{format[1:-1]}}, {estimate.high:{format[1:-1]}}]"
        assert number == written, f"{analysis}: {quantity} of {of}"


def test_every_finding_is_checked_and_has_its_seeds() -> None:
    (section,) = re.findall(r"^1\. .+?(?=\n\n)", README, re.MULTILINE | re.DOTALL)
    text, numbers = " ".join(section.split()), r"\d\.\d+"
    checked = [number for sentence, _ in SAID for said in re.findall(sentence, text) for number in said]
    assert len(re.findall(numbers, text)) == len(re.findall(numbers, " ".join(checked))), "a number is unchecked"
    for sentence, quoted in SAID:
        (place,) = re.finditer(sentence, text)
        for group, (analysis, quantity, of, _) in enumerate(quoted, start=1):
            starred = text[place.end(group) :].startswith("\\*")
            assert summary(analysis).at(quantity, **of).n == (5 if starred else FULL_SEEDS), of


# ---- the map


@cache
def the_map() -> tuple[Any, Summary]:
    result = phase_diagram.ANALYSIS.load(ROOT / "figures" / "map" / "phase_diagram.json")
    return phase_diagram.settings_of(result), result.summary


def explained(by: str, *, interval: bool = False) -> str:
    estimate = the_map()[1].at("explained", by=by)
    return f"{estimate.value:.2f}" + (f" [{estimate.low:.2f}, {estimate.high:.2f}]" if interval else "")


def answered(n_heads: int) -> tuple[int, int]:
    """In how many settings reverse queries are answered, of how many."""
    estimate = the_map()[1].at("answered", n_heads=n_heads)
    return round(estimate.value * estimate.n), estimate.n


def on_the_map(setting: str, n_heads: int, quantity: str = "reverse") -> str:
    settings = the_map()[0]
    (value,) = settings[(settings["setting"] == setting) & (settings["n_heads"] == n_heads)][quantity].unique()
    return f"{value:.2f}"


def test_the_map_is_as_the_readme_says() -> None:
    settings, said = the_map()[0], " ".join(README.split())
    (one, of_one), (two, of_two), (four, of_four), (eight, of_eight) = map(answered, (1, 2, 4, 8))
    assert f"of {len(settings.drop_duplicates('runs'))} settings" in said
    assert f"in {one} of {of_one} settings with one head and {two} of {of_two} with two" in said
    assert f"and in {four + eight} of {of_four + of_eight} with four or eight" in said
    assert f"R² of {explained('route_gap', interval=True)} along" in said
    assert f"tells as much ({explained('reverse_early')})" in said
    less = the_map()[1].at("explained_more", by="route_gap", than="reverse_early")
    assert less.side == "undecided" and max(EXPLAINING, key=lambda name: float(explained(name))) == "route_gap"


def test_the_map_is_as_the_findings_say() -> None:
    said = " ".join(FINDINGS.read_text(encoding="utf-8").split())
    counts = [f"{n} of {of}" for n, of in map(answered, (1, 2, 4, 8))]
    assert f"0.45 or more in {counts[0]} settings with one head, {counts[1]} with two, {counts[2]} with four" in said
    assert f"and {counts[3]} with eight" in said
    alone, two, both = (on_the_map(name, 1) for name in ("MLP", "2 layers", "2 layers, MLP"))
    assert f"({alone} with one layer, {both} with two); two layers without give {two}." in said
    wide = "64 dimensions, base 1e6"
    four, eight = ((on_the_map(wide, n), on_the_map("base setting", n)) for n in (4, 8))
    assert f"({four[0]} with four heads instead of {four[1]}, {eight[0]} with eight instead of {eight[1]})" in said
    many, none = (on_the_map(f"{share}% both ways", 4) for share in (80, 0))
    assert f"({many} with four heads and 80 % of them, {none} with none)" in said
    short, long = (on_the_map(f"{steps} steps", 2, "reverse_end") for steps in ("1,000", "8,000"))
    assert f"reverse probability is {short} after 1,000 steps and {long} after 8,000" in said
    assert f"explains {explained('route_gap', interval=True)} of the variance" in said
    assert f"gradient alignment in V and O {explained('alignment', interval=True)}." in said
    assert f"How specialised heads are ({explained('specialisation')})" in said
    assert f"at that point explains {explained('reverse_early')} as well" in said
    unsure = ("specialisation", "odd_share", "storage_share", "exposures", "forward_end")
    assert all(the_map()[1].at("explained", by=name).low < 0 for name in unsure)


def test_alibi_answers_both_ways_alike() -> None:
    for setting in (CYCLE, MANY):
        of = {**setting, "variant": "MDM alibi"}
        both = [summary("reversal_curse").at(f"{side}_probability", **of).value for side in SIDES]
        assert f"{both[0]:.2f}" == f"{both[1]:.2f}"


@pytest.mark.slow
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


def test_the_findings_list_the_analyses_that_are_there() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (.+) \|$", FINDINGS.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [(analysis.name, analysis.question) for analysis in discover()]


def test_the_number_of_models_is_right(real_grid: None) -> None:
    trained = {config.digest() for analysis in discover() for config in analysis.configs(range(QUICK_SEEDS))}
    assert f"trains {len(trained)} small models" in " ".join(README.split())
    assert f"with {QUICK_SEEDS} seeds" in README and f"trains {FULL_SEEDS} seeds" in " ".join(README.split())


def test_the_commands_and_options_exist() -> None:
    usages = re.findall(r"^    mdm-interp (.+?)(?: +#.*)?$", README, re.MULTILINE)
    usages += re.findall(r"`mdm-interp ([^`]+)`", README)
    assert len(usages) >= 3
    for usage in usages:
        check_command(usage)


def test_every_file_it_names_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    expected = {"docs/theory.md", "docs/findings.md", "docs/architecture.md", "CONTRIBUTING.md", "CITATION.cff"}
    assert expected <= set(links)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_make_targets_exist() -> None:
    recipes = targets()
    named = set(re.findall(r"(?:^    |`|\()make ([\w-]+)", README, re.MULTILINE))
    assert {"reproduce", "test"} <= named <= recipes.keys()
    assert "mdm-interp reproduce $(ARGS)" in recipes["reproduce"]
    assert re.search(r"pytest .*\$\(ARGS\)", recipes["test"])


def test_the_fast_tests_leave_out_what_takes_long() -> None:
    recipe = targets()["test-fast"]
    assert '-m "not slow and not browser and not gpu"' in recipe
    assert recipe.replace('-m "not slow and not browser and not gpu" ', "") == targets()["test"]


def test_ci_runs_everything_on_every_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    versions = [Version(version) for version in job["strategy"]["matrix"]["python"]]
    (allowed,) = re.findall(r'^requires-python = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    minors = [Version(f"3.{minor}") for minor in range(30)]
    assert versions == [minor for minor in minors if minor in SpecifierSet(allowed)]


def test_the_commit_hooks_are_the_linters() -> None:
    said = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = [hook["entry"] for repo in yaml.safe_load(said)["repos"] for hook in repo["hooks"]]
    assert [entry.split()[0] for entry in entries] == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/pyright"]
    (installs,) = re.findall(r"`make (\w+)` first", said)
    assert ".[dev]" in installed_by(installs)


def installed_by(target: str) -> str:
    """The recipe of the file that a target of the Makefile stands for."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (file,) = re.findall(rf"^{target}: (.+)$", makefile, re.MULTILINE)
    (recipe,) = re.findall(rf"^{re.escape(file)}:.*\n((?:\t.+\n?)*)", makefile, re.MULTILINE)
    return recipe


def test_ci_runs_the_linters_and_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in script if line.startswith("make")] == ["make lint", "make test"]
    assert "set -euo pipefail" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert all(tool in targets()["lint"] for tool in ("ruff check .", "ruff format --check .", "pyright"))
