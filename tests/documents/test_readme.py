"""The README and the files it sends one to: what they say is there, and works as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from document_helpers import ROOT, blocks, check_command, targets
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from analyses import phase_diagram
from analyses.phase_diagram import EXPLAINING
from mdm_interp import cli
from mdm_interp.config import TrainConfig
from mdm_interp.data.celebrities import TESTS
from mdm_interp.experiments import reversal_benchmark
from mdm_interp.experiments.analysis import discover
from mdm_interp.experiments.grids import FULL_SEEDS, QUICK_SEEDS
from mdm_interp.stats.summary import Summary
from mdm_interp.training.runs import Run

README = (ROOT / "README.md").read_text(encoding="utf-8")
FINDINGS = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
FOUND = " ".join(FINDINGS.split())
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
    ((before, after),) = re.findall(r"^before ([\d.]+) after ([\d.]+)$", ran.stdout, re.MULTILINE)
    assert abs(float(before) - float(reverse)) < 1e-3 and abs(float(after) - float(forward)) < 1e-3
    assert "torch.Size([1, 1, 6, 6])" in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["explorer.html", "runs"]


# ---- what was found

DEMOS = (
    "demo llada",
    "demo llada, varied",
    "demo llada, varied, seed 1",
    "demo llada, varied, seed 2",
    "demo qwen2, varied",
)


@cache
def summary(name: str, folder: str = "") -> Summary:
    (analysis,) = [analysis for analysis in discover() if analysis.name == name]
    return analysis.load(ROOT / "figures" / folder / f"{name}.json").summary


def test_fewer_facts_both_ways_are_as_the_findings_say() -> None:
    answered = summary("large_model_prediction", "demo_worlds")
    of = {"kind": "relational", "direction": "reverse", "asked": "left", "order": "confidence", "length": "known"}
    names = [f"demo llada, varied, {n / 40:.0%} both ways" for n in (7, 14, 21)]
    one, two, three = (answered.at("value", checkpoint=name, measure="exact match", **of).value for name in names)
    assert f"the left entity comes in {one:.2f}, {two:.2f} and {three:.2f} (one seed each;" in FOUND
    same = {"checkpoint": "demo llada, varied", "measure": "exact match", **of}
    assert answered.at("value", **same) == summary("large_model_prediction").at("value", **same)


def test_the_demo_checkpoints_are_as_the_findings_say() -> None:

    def nats(checkpoint: str, what: str, kind: str = "positional") -> list[str]:
        of = {"checkpoint": checkpoint, "kind": kind}
        return [f"{summary('large_model_lens').at(f'{side}_{what}', **of).value:.1f}" for side in SIDES]

    heads, mlps = nats("demo llada", "heads"), nats("demo llada", "mlp")
    assert f"{heads[1]} nats to a positional reverse answer beyond another fact's, against {heads[0]} forward" in FOUND
    assert f"MLPs add {mlps[1]} against {mlps[0]}. Its ARM twin's heads add" in FOUND
    heads, mlps = nats("demo qwen2", "heads"), nats("demo qwen2", "mlp")
    assert f"add {heads[1]} and {heads[0]}, its MLPs {mlps[1]} and {mlps[0]} (" in FOUND

    def exact(checkpoint: str, direction: str) -> str:
        order = "left_to_right" if "qwen2" in checkpoint else "confidence"
        of = {"kind": "relational", "order": order, "length": "known", "measure": "exact match"}
        of |= {"checkpoint": checkpoint, "direction": direction}
        side = "right" if direction == "forward" and "qwen2" in checkpoint else "left"
        return f"{summary('large_model_prediction').at('value', asked=side, **of).value:.2f}"

    memorised, *seeds, twin = (exact(name, "reverse") for name in DEMOS)
    assert f"relational reverse query in {memorised} of cases" in FOUND
    assert f"does in {seeds[0]}, {seeds[1]} and {seeds[2]} (three seeds), its ARM twin in {twin}; forward" in FOUND
    assert {exact(name, "forward") for name in DEMOS} == {"1.00"}
    varied, before = (
        summary("large_model_coupling").at("cosine", checkpoint=name, kind="relational", group="storage (V, O)")
        for name in DEMOS[1::-1]
    )
    told = [f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in (varied, before)]
    assert f"more aligned there, {told[0]} instead of {told[1]}" in FOUND
    assert f"MLPs add {nats(DEMOS[1], 'mlp', 'relational')[1]} nats in reverse instead of" in FOUND
    assert f"instead of {nats(DEMOS[0], 'mlp', 'relational')[1]}. These" in FOUND


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


@pytest.mark.usefixtures("real_grid")
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


@pytest.mark.usefixtures("real_grid")
def test_the_map_is_as_the_findings_say() -> None:
    counts = [f"{n} of {of}" for n, of in map(answered, (1, 2, 4, 8))]
    assert f"0.45 or more in {counts[0]} settings with one head, {counts[1]} with two, {counts[2]} with four" in FOUND
    assert f"and {counts[3]} with eight" in FOUND
    alone, two, both = (on_the_map(name, 1) for name in ("MLP", "2 layers", "2 layers, MLP"))
    assert f"({alone} with one layer, {both} with two); two layers without give {two}." in FOUND
    wide = "64 dimensions, base 1e6"
    four, eight = ((on_the_map(wide, n), on_the_map("base setting", n)) for n in (4, 8))
    assert f"({four[0]} with four heads instead of {four[1]}, {eight[0]} with eight instead of {eight[1]})" in FOUND
    many, none = (on_the_map(f"{share}% both ways", 4) for share in (80, 0))
    assert f"({many} with four heads and 80 % of them, {none} with none)" in FOUND
    short, long = (on_the_map(f"{steps} steps", 2, "reverse_end") for steps in ("1,000", "8,000"))
    assert f"reverse probability is {short} after 1,000 steps and {long} after 8,000" in FOUND
    assert f"explains {explained('route_gap', interval=True)} of the variance" in FOUND
    assert f"gradient alignment in V and O {explained('alignment', interval=True)}." in FOUND
    assert f"How specialised heads are ({explained('specialisation')})" in FOUND
    assert f"at that point explains {explained('reverse_early')} as well" in FOUND
    unsure = ("specialisation", "odd_share", "storage_share", "exposures", "forward_end")
    assert all(the_map()[1].at("explained", by=name).low < 0 for name in unsure)


def test_the_published_benchmark_is_as_the_findings_say() -> None:
    scores = pd.read_csv(ROOT / "figures" / "benchmark" / "reversal_benchmark.csv")
    scores = scores[scores["length"] == "known"].set_index(["checkpoint", "quantity", "test"])

    def told(name: str, quantity: str) -> list[str]:
        rows = [scores.loc[(name, quantity, test)] for test in TESTS]
        assert {row["n"] for row in rows} == {30}
        return [f"{row['value']:.2f} [{max(row['low'], 0):.2f}, {min(row['high'], 1):.2f}]" for row in rows]

    for name in ("ARM", "MDM"):
        for quantity, word in (("contains", "written"), ("preferred", "likelier")):
            assert f"| {name}, {word} | {' | '.join(told(name, quantity))} |" in FINDINGS
    published = reversal_benchmark.PUBLISHED["GPT-3 175B, fine-tuned"]
    assert f"published | {' | '.join(f'{published[test]:.2f}' for test in TESTS)} |" in FINDINGS
    reverse = scores.loc[[(name, "preferred", test) for name in ("ARM", "MDM") for test in TESTS[2:]]]
    at_chance = [low < 0.5 < high for low, high in reverse[["low", "high"]].to_numpy()]
    assert at_chance == [True, True, False, False] and (reverse["low"].iloc[2:] > 0.5).all()


def test_what_carries_the_benchmark_is_as_the_findings_say() -> None:
    table = pd.read_csv(ROOT / "figures" / "benchmark" / "summary.csv")

    def at(
        quantity: str, column: str = "value", *, checkpoint: str = "MDM", group: str | None = None, digits: int = 2
    ) -> str:
        rows = table[(table["quantity"] == quantity) & (table["checkpoint"] == checkpoint)]
        rows = rows[(rows["kind"] == "positional") & ((rows["group"] == group) if group else rows["group"].isna())]
        (value,) = rows[column]
        return f"{value:.{digits}f}"

    def interval(quantity: str, **of: Any) -> str:
        return f"{at(quantity, **of)} [{at(quantity, 'low', **of)}, {at(quantity, 'high', **of)}]"

    beaten = [[at(f"{side}_beaten", column) for side in SIDES] for column in ("value", "null_value")]
    assert f"above {beaten[0][0]} (forward) and {beaten[0][1]} (reverse) of other people's" in FOUND
    assert f"does so for {beaten[1][0]} and {beaten[1][1]}." in FOUND
    storage, routing = "storage (V, O)", "routing (Q, K)"
    cosine = f"{interval('cosine', group=storage)}, with other people's {at('cosine', 'null_value', group=storage)}"
    assert f"in V and O is {cosine}, and exceeds theirs in all" in FOUND
    assert f"that of Q and K is {at('cosine', group=routing)}" in FOUND and at("share_above", group=storage) == "1.00"
    assert f"at {interval('correlation')}, where equal energy in RoPE predicts {at('isotropic')}" in FOUND
    assert f"it gets {at('reverse')} of the attention in reverse instead of {at('forward')}" in FOUND
    heads, mlps = ([at(f"{side}_{what}", digits=1) for side in SIDES] for what in ("heads", "mlp"))
    assert (
        f"Heads add {heads[1]} nats" in FOUND and f"instead of {heads[0]}, MLPs {mlps[1]} instead of {mlps[0]}" in FOUND
    )
    assert f"heads add {at('reverse_heads', checkpoint='ARM', digits=1)} in reverse" in FOUND


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
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \|(?: `(\w+)`)? \|$", FINDINGS, re.MULTILINE)
    assert listed == [(analysis.name, analysis.question, analysis.detail_of or "") for analysis in discover()]


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
