"""The command line: what it does, and that each mistake ends in one line that says which, with nothing written."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.io as pio
import pytest
import torch
import yaml
from checkpoint_helpers import CHATML, N_BPE, write_checkpoint
from cli_helpers import Ended, assert_refused, contents
from filelock import FileLock
from helpers import TINY_DEMO
from probe_helpers import FACTS as PEOPLE
from probe_helpers import tiny_probe
from safetensors.torch import load_file

from analyses import reversal_curse
from mdm_interp import __version__, viz
from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.cli import run_one
from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.data.queries import queries_of
from mdm_interp.experiments import claims, findings, grids, runner, subjects
from mdm_interp.experiments.analysis import discover
from mdm_interp.experiments.exhibits import explorer_of
from mdm_interp.experiments.results import CheckpointOrigin, Result
from mdm_interp.experiments.runner import Reported
from mdm_interp.experiments.subjects import Lab, open_probe
from mdm_interp.measures.gradients import influence, traced_influence
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.provenance import environment, stamp, versions
from mdm_interp.tensors import save_tensors
from mdm_interp.training import loop, trainees
from mdm_interp.training.demo import train_demo
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run, stored_runs

FACTS = FactConfig(world="relation_cycle", n_entities=6, n_filler=4, seq_len=5)
MODEL = {"d_model": 8, "n_heads": 2, "d_vocab": FACTS.d_vocab, "n_ctx": FACTS.seq_len}
CONFIG: dict[str, Any] = {
    "model": MODEL,
    "facts": {"world": "relation_cycle", "n_entities": 6, "n_filler": 4, "seq_len": 5},
    "steps": 4,
    "batch_size": 4,
    "n_checkpoints": 3,
}
COMMANDS = [
    [],
    ["reproduce"],
    ["sweep"],
    ["report"],
    ["verify"],
    ["attention"],
    ["denoise"],
    ["routes"],
    ["explore"],
    ["train"],
    ["runs"],
]
COMMANDS += [["runs", "list"], ["runs", "show"], ["runs", "prune"]]


# ---- help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(mdm_interp: Callable[..., Ended], tmp_path: Path, command: list[str]) -> None:
    ended = mdm_interp(*command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert "Usage" in ended.out
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("analysis", discover(), ids=lambda analysis: analysis.name)
def test_help_of_one_analysis_is_its_question(mdm_interp: Callable[..., Ended], analysis: Any) -> None:
    ended = mdm_interp("--help", entry=partial(run_one, analysis))
    assert (ended.code, ended.err) == (0, "")
    assert analysis.question in " ".join(ended.out.split())
    assert "--seeds" in ended.out


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "analyses.reversal_curse"], ["-m", "mdm_interp"], ["-m", "mdm_interp.cli"]])
def test_the_commands_start_as_processes(tmp_path: Path, command: list[str]) -> None:
    root = str(Path(__file__).parents[1])
    helped = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert helped.returncode == 0, helped.stderr
    assert "Usage" in helped.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_that_of_the_installed_package(mdm_interp: Callable[..., Ended]) -> None:
    assert mdm_interp("--version") == Ended(0, f"mdm-interp {version('mdm-interp')}\n", "")
    assert __version__ == version("mdm-interp")


# ---- mistakes on the command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["reprodce"], ["reprodce", "--help"]),
        (["reproduce", "--sedes", "3"], ["--sedes"]),
        (["reproduce", "--seeds", "none"], ["'--seeds'", "integer"]),
        (["reproduce", "--seeds", "0"], ["'--seeds'", "1"]),
        (["reproduce", "--seeds", "100000000"], ["'--seeds'", "1000"]),
        (
            ["influence", "x", "--train", "y", "--facts", "z", "--out", "w", "--draws", str(10**12)],
            ["'--draws'", "10000"],
        ),
        (["reproduce", "--workers", "0"], ["'--workers'", "1"]),
        (["reproduce", "--only", "curse"], ["--only: no analysis 'curse'; there are reversal_curse, ", " more"]),
        (["reproduce", "--quick", "--full"], ["--quick --full", "give one"]),
        (["runs", "prune", "--runs", ""], ["--runs: its value is empty; give one, or leave the option out"]),
        (["report", "--out="], ["--out: its value is empty; give one"]),
        (
            ["probe", "c", "--facts", "f", "--out", "o", "--only", "twin"],
            ["--only: 'twin' compares two", "with --twin"],
        ),
        (["train"], ["Missing argument"]),
        (["train", "absent.yaml"], ["absent.yaml", "give the path of a YAML file"]),
        (["runs", "show", "abc"], ["run: 'abc' names 0 runs", "mdm-interp runs list"]),
        (["runs", "lst"], ["lst"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "--help" not in value else "",
)
def test_a_mistake_on_the_command_line_is_one_line(
    mdm_interp: Callable[..., Ended], tmp_path: Path, arguments: list[str], says: list[str]
) -> None:
    assert_refused(mdm_interp(*arguments), *says)
    assert contents(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("command", ["train config.yaml", "reproduce"])
@pytest.mark.parametrize("device", ["cuda:7", "abacus"])
def test_a_device_that_is_not_there_is_one_line(
    mdm_interp: Callable[..., Ended], tmp_path: Path, command: str, device: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    before = contents(tmp_path)
    assert_refused(mdm_interp(*command.split(), "--device", device), f"device: '{device}'", "use 'cpu' or 'auto'")
    assert contents(tmp_path) == before


# ---- mistakes in a config


def changed(**changes: Any) -> str:
    content = json.loads(json.dumps(CONFIG))
    for name, value in changes.items():
        *sections, field = name.split("__")
        functools.reduce(dict.__getitem__, sections, content)[field] = value
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {d_model: 8", ["not YAML", "correct its syntax"]),
        ("", ["expected fields and values", "None", "README"]),
        ("- 1", ["expected fields and values", "[1]"]),
        (changed(stepz=3), ["stepz", "no such field; remove it"]),
        (changed(model__heads=3), ["model.heads", "no such field"]),
        (changed(model__position="ropes"), ["model.position", "'rope'", "'alibi'", "'ropes'"]),
        (changed(model__d_model=6), ["d_head: 3 is odd", "make it even"]),
        (changed(model__n_heads=3), ["n_heads: 3 does not divide d_model 8", "choose a divisor"]),
        (changed(facts__gap=9), ["gap: 9 is longer", "use at most 4", "seq_len to 10"]),
        (changed(model__d_vocab=10), ["model.d_vocab: 10 is too small", f"raise it to {FACTS.d_vocab}"]),
        (changed(model__n_ctx=4), ["model.n_ctx: 4 is shorter", "raise it to 5"]),
        (changed(objective="causal"), ["objective: 'causal'", "set model.attention to 'causal'"]),
        (changed(steps=0), ["steps", "0"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_in_a_config_is_one_line(
    mdm_interp: Callable[..., Ended], tmp_path: Path, text: str, says: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    before = contents(tmp_path)
    assert_refused(mdm_interp("train", "config.yaml"), "config.yaml", *says)
    assert contents(tmp_path) == before


# ---- loop, and the run store


def stored(root: Path, **changes: Any) -> Run:
    return train(TrainConfig(**{**CONFIG, **changes}), root=root, progress=False)


def unfinished(root: Path, seed: int) -> Run:
    """A run that was killed before its first save."""
    run = Run.of(TrainConfig(**{**CONFIG, "seed": seed}), root)
    run.config.to_yaml(run.folder / "config.yaml")
    return run


def test_train_prints_the_folder_and_trains_once(
    mdm_interp: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    ended = mdm_interp("train", "config.yaml", "--device", "cpu")
    assert ended.code == 0
    folder = Path(ended.out.strip())
    assert folder == Path("runs") / TrainConfig(**CONFIG).digest()
    assert [row["step"] for row in Run.of(TrainConfig(**CONFIG)).metrics()] == [0, 1, 4]
    before = contents(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained a finished run")

    monkeypatch.setattr(trainees, "drawn_loss", refuse)
    assert mdm_interp("train", "config.yaml").out == ended.out
    assert mdm_interp("train", folder / "config.yaml").out == ended.out
    assert contents(tmp_path) == before


def test_runs_are_listed_shown_and_pruned(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    done, killed = stored(tmp_path / "runs"), unfinished(tmp_path / "runs", seed=1)
    listed = {row["run"]: row for row in json.loads(mdm_interp("runs", "list", "--json").out)}
    model = TrainConfig(**CONFIG).model
    common = {"world": "relation_cycle", "position": "rope", "objective": "any_order", "steps": 4}
    common |= {"layers": model.n_layers, "heads": model.n_heads, "mlp": not model.attn_only}
    assert listed == {
        done.folder.name: {"run": done.folder.name, **common, "seed": 0, "step": 4, "differs": ""},
        killed.folder.name: {"run": killed.folder.name, **common, "seed": 1, "step": None, "differs": ""},
    }
    table = mdm_interp("runs", "list")
    assert table.code == 0
    heading, *lines = table.out.splitlines()
    assert heading.split() == list(next(iter(listed.values())))
    assert {line.split()[0] for line in lines} == {done.folder.name, killed.folder.name}, "with whole names"

    shown = mdm_interp("runs", "show", done.folder.name[:10])
    assert shown.code == 0
    assert (done.folder / "config.yaml").read_text() in shown.out
    assert len([line for line in shown.out.splitlines() if line.strip().startswith(("0 ", "1 ", "4 "))]) == 3
    assert_refused(mdm_interp("runs", "show", ""), "names 2 runs", done.folder.name, killed.folder.name)

    kept = contents(done.folder)
    assert mdm_interp("runs", "prune").out == "deleted 1 unfinished run\n"
    assert [run.folder.name for run in stored_runs(tmp_path / "runs")] == [done.folder.name]
    assert contents(done.folder) == kept


def test_runs_that_are_alike_in_all_columns_are_told_apart(mdm_interp: Callable[..., Ended]) -> None:
    usual = TrainConfig(**CONFIG)
    changed = [
        ({}, ""),
        ({"mask_rate": 0.5}, "mask_rate=0.5"),
        ({"lr": 0.5}, "lr=0.5"),
        ({"mask_rate": 0.5, "lr": 0.25}, "lr=0.25"),  # enough
        ({"model": {**CONFIG["model"], "d_head": 2}}, "model.d_head=2"),
        ({"seed": 1}, ""),
        ({"seed": 1, "facts": {**CONFIG["facts"], "noise": 0.25}}, "facts.noise=0.25"),
    ]
    said = {}
    for fields, differs in changed:
        run = Run.of(TrainConfig(**{**CONFIG, **fields}), "runs")
        run.config.to_yaml(run.folder / "config.yaml")
        said[run.folder.name] = {*filter(None, differs.split(", "))}
    listed = json.loads(mdm_interp("runs", "list", "--json").out)
    assert {row["run"]: {*filter(None, row["differs"].split(", "))} for row in listed} == said
    assert usual.digest() in said


def test_a_long_command_says_at_once_that_it_has_begun(tmp_path: Path) -> None:
    begun = subprocess.Popen(
        [sys.executable, "-c", "from mdm_interp.cli import main; main()", "train", "none.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert begun.stderr
    with begun.stderr as lines:
        assert [line.split(":")[0].strip() for line in lines] == ["loading", "mdm-interp"]
    assert begun.wait(100) == 2


def test_a_warning_is_one_line(mdm_interp: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    run = stored(Path("runs"))
    path = run.metrics_path
    path.write_text(re.sub(r', "digest": "[^"]+"', "", path.read_text()))
    monkeypatch.setattr(warnings, "showwarning", lambda *said: sys.stderr.write(warnings.formatwarning(*said[:4])))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = mdm_interp("runs", "show", run.folder.name)
    assert (shown.code, shown.err) == (
        0,
        f"warning: {path}: has no digest in some lines: these cannot be checked\n",
    )


def test_a_run_that_other_code_or_versions_trained_is_shown_with_them(
    mdm_interp: Callable[..., Ended], tmp_path: Path
) -> None:
    run = stored(tmp_path / "runs")
    here = environment(train) | versions(train)
    show = partial(mdm_interp, "runs", "show", run.folder.name)
    said = "trained by other code or versions: "
    assert said not in show().out
    stamp(run.folder, 0, {**here, "cpu": "Another", "threads": 99, "device": "GPU"})
    assert said not in show().out
    stamp(run.folder, 3, {**here, "torch": "1.0"})
    assert f"\n{said}torch 1.0 instead of {here['torch']}\n" in show().out
    (run.folder / "made_with.json").unlink()
    assert f"\n{said}unknown code and versions\n" in show().out
    assert len(show().out.splitlines()) > 10, "config and metrics are still shown"


def test_an_empty_store_is_listed_as_empty(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "runs" / "demos").mkdir(parents=True)
    assert mdm_interp("runs", "list", "--json").out == "[]\n"
    assert mdm_interp("runs", "list") == (0, "no runs in runs\n", "")
    assert mdm_interp("runs", "prune").out == "deleted 0 unfinished runs\n"
    assert list(contents(tmp_path / "runs")) == [str(tmp_path / "runs" / "demos")]


@pytest.mark.parametrize("command", ["list", "prune"])
def test_a_store_that_is_not_there_is_said_so(mdm_interp: Callable[..., Ended], tmp_path: Path, command: str) -> None:
    stored(tmp_path / "runs")
    assert_refused(mdm_interp("runs", command, "--runs", "rnus"), "--runs: there is no folder rnus; give the run store")
    assert not (tmp_path / "rnus").exists()


@pytest.mark.parametrize("broken", ["config", "edited config", "no config", "state", "another step"])
def test_a_broken_run_is_named_and_hides_no_other(
    mdm_interp: Callable[..., Ended], tmp_path: Path, broken: str
) -> None:
    """Raised, the steps of a config would make its finished run an unfinished one."""
    good, bad = stored(tmp_path / "runs"), stored(tmp_path / "runs", seed=1)
    killed = [unfinished(tmp_path / "runs", seed=seed) for seed in (2, 3)]
    config = bad.folder / "config.yaml"
    match broken:
        case "config":
            config.write_text("model: {d_model: [")
        case "edited config":
            config.write_text(config.read_text().replace("steps: 4", "steps: 40"))
        case "no config":
            config.unlink()
        case "state":
            truncate(bad.state_path)
        case "another step":
            save_tensors(bad.state_path, load_file(bad.state_path), {"step": "5"})
    kept = contents(bad.folder)
    listed = mdm_interp("runs", "list", "--json")
    assert {row["run"] for row in json.loads(listed.out)} == {run.folder.name for run in (good, *killed)}
    pruned = mdm_interp("runs", "prune")
    assert pruned.out == "deleted 2 unfinished runs\n"
    for ended in (listed, pruned, mdm_interp("runs", "list")):
        (line,) = ended.err.splitlines()
        assert ended.code == 1 and line.startswith(f"mdm-interp: runs/{bad.folder.name}/")
        assert len(line) < 500
    assert contents(bad.folder) == kept and good.finished


def test_folders_that_hold_only_a_lock_are_pruned(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    good, others = stored(tmp_path / "runs"), [tmp_path / "runs" / name for name in ("0" * 16, "1" * 16, "2" * 16)]
    for folder in (*others, tmp_path / "runs" / "my notes"):
        folder.mkdir()
        (folder / ".lock").touch()
    (others[1] / ".config.yaml.x1.tmp").touch()
    assert [row["run"] for row in json.loads(mdm_interp("runs", "list", "--json").out)] == [good.folder.name]
    with FileLock(others[2] / ".lock"):
        assert mdm_interp("runs", "prune") == (0, "deleted 2 unfinished runs\n", "")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {good.folder.name, "2" * 16, "my notes"}


def test_unfinished_demos_and_what_was_half_written_are_pruned(
    mdm_interp: Callable[..., Ended], tmp_path: Path
) -> None:
    run, demos, now = stored(tmp_path / "runs"), tmp_path / "runs" / "demos", time.time()
    configs = [TINY_DEMO.model_copy(update={"steps": 1, "seed": seed}) for seed in range(3)]
    finished, unfinished, in_training = (demos / f"llada-{config.digest()}" for config in configs)
    for folder, config in zip((finished, unfinished, in_training), configs, strict=True):
        train_demo(folder, config, progress=False)
    for folder in (unfinished, in_training):
        (folder / "training_state.safetensors").touch()
    left, young = run.folder / "checkpoints" / ".000000.safetensors.x.tmp", finished / ".facts.csv.x.tmp"
    for path, age in ((left, 4000), (young, 0)):
        path.touch()
        os.utime(path, (now, now - age))
    before = contents(tmp_path)
    with FileLock(in_training / ".lock"):
        assert mdm_interp("runs", "prune") == (0, "deleted 1 unfinished run\n", "")
    gone = before.keys() - contents(tmp_path).keys()
    assert gone == {str(left), *(name for name in before if name.startswith(str(unfinished)))}


@pytest.mark.promise(
    "training whose loss or weights become NaN or infinite", "stopped by name, with what to try; what was good is kept"
)
def test_training_that_diverges_ends_in_one_line_and_exit_code_1(
    mdm_interp: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "lr": 1e30}))
    ended = mdm_interp("train", "config.yaml", "--device", "cpu")
    assert (ended.code, ended.out) == (1, "")
    run = Run.of(TrainConfig(**{**CONFIG, "lr": 1e30}), "runs")
    assert ended.err.splitlines()[-1] == (
        f"mdm-interp: {run.folder}: loss or weights are NaN or infinite from step 3 on; lower lr (1e+30) or raise "
        "warmup (100); what was saved at step 1 is kept"
    )
    assert json.loads(mdm_interp("runs", "list", "--json").out)[0]["step"] == 1
    assert mdm_interp("runs", "prune").out == "deleted 1 unfinished run\n"


def test_a_run_in_a_folder_of_another_name_is_not_opened(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    run = stored(tmp_path / "runs")
    run.folder.rename(tmp_path / "renamed")
    ended = mdm_interp("attention", "renamed", "A0 r0 [M]", "--out", "page.html")
    assert_refused(
        ended, f"renamed/config.yaml: is the config of run {run.folder.name}, and the folder is named renamed"
    )
    assert not (tmp_path / "page.html").exists()


def test_a_run_that_is_being_trained_is_not_pruned(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    """Its folder would come back without what was in it, and end up as a finished run that lacks checkpoints."""
    training_now, killed = unfinished(tmp_path / "runs", seed=1), unfinished(tmp_path / "runs", seed=2)
    with FileLock(training_now.folder / ".lock"):
        assert mdm_interp("runs", "prune").out == "deleted 1 unfinished run\n"
        assert training_now.folder.exists()
        assert not killed.folder.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_state_is_one_line(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    run = stored(tmp_path / "runs")
    truncate(run.state_path)
    before = contents(tmp_path)
    assert_refused(mdm_interp("train", "config.yaml"), "state.safetensors", "delete the folder", run.folder.name)
    assert contents(tmp_path) == before


def test_a_state_of_another_model_is_one_line(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    """This one is found while the progress bar is up."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    run = unfinished(tmp_path / "runs", seed=0)
    for step in (0, 1):
        save_tensors(run.checkpoint_path(step), HookedTransformer(run.config.model).state_dict())
    save_tensors(run.state_path, {"generator": torch.Generator().get_state()}, {"step": "1"})
    assert_refused(mdm_interp("train", "config.yaml", "--device", "cpu"), "state.safetensors", "delete the folder")


# ---- reproduce


def tiny_layer(
    facts: FactConfig, position: Any, objective: Any, seed: int, *, n_heads: int = 1, n_layers: int = 1, **_: Any
) -> TrainConfig:
    model = ModelConfig(
        d_model=16,
        n_heads=n_heads,
        n_layers=n_layers,
        d_vocab=facts.d_vocab,
        n_ctx=facts.seq_len,
        position=position,
        attention="causal" if objective == "causal" else "bidirectional",
    )
    return TrainConfig(model=model, facts=facts, objective=objective, seed=seed, steps=8, batch_size=4, n_checkpoints=4)


class Work(NamedTuple):
    """What was trained and measured, run by run."""

    trained: list[Run]
    measured: dict[str, list[int]]
    """At which steps, by run."""


@pytest.fixture
def work(real_grid: None, monkeypatch: pytest.MonkeyPatch) -> Work:
    """A tiny grid, trained in this process; PNGs are left out."""
    done = Work([], {})

    def train_here(configs: Sequence[TrainConfig], *, root: Path, device: str, workers: int | None) -> list[Run]:
        runs = [Run.of(config, root) for config in configs]
        done.trained.extend(run for run in runs if not run.finished)
        return [train(config, root=root, device=device, progress=False) for config in configs]

    measure = reversal_curse.ANALYSIS.measure

    @functools.wraps(measure)
    def counted(run: Run, step: int) -> Any:
        done.measured.setdefault(run.folder.name, []).append(step)
        return measure(run, step)

    def no_browser(*_: Any, **__: Any) -> None:
        raise RuntimeError("there is no browser")

    monkeypatch.setitem(grids.WORLDS, "relation_cycle", FactConfig(n_entities=6, n_filler=4))
    monkeypatch.setitem(grids.WORLDS, "two_role", grids.TWO_ROLE.model_copy(update={"n_entities": 6}))
    monkeypatch.setattr(grids, "small_model", tiny_layer)
    monkeypatch.setattr(subjects, "train_all", train_here)
    monkeypatch.setattr(reversal_curse, "ANALYSIS", replace(reversal_curse.ANALYSIS, measure=counted))
    monkeypatch.setattr(pio, "write_images", no_browser)
    return done


HERE = ["--device", "cpu", "--workers", 1]
ONLY = ["reproduce", *HERE, "--only", "reversal_curse", "--seeds"]


@pytest.mark.slow
def test_reproduce_writes_what_it_says_and_works_once(
    mdm_interp: Callable[..., Ended], tmp_path: Path, work: Work
) -> None:
    ended = mdm_interp(*ONLY, 1)
    assert ended.code == 0
    said = ["no PNGs: there is no browser", "1 figure in figures/quick; open figures/quick/index.html"]
    assert ended.err.splitlines()[-2:] == said, "after what a slow machine says of its progress"
    assert len(work.trained) == len(work.measured) == 12
    assert all(steps == sorted(set(steps)) for steps in work.measured.values())
    measured = {run: list(steps) for run, steps in work.measured.items()}
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["quick"]
    written = sorted(path.name for path in (tmp_path / "figures" / "quick").iterdir())
    assert written == [
        ".drawn",
        *sorted(explorer_of(run.folder.name) for run in work.trained),
        "index.html",
        "plotly-cartesian.min.js",
        "reversal_curse.html",
        "reversal_curse.json",
    ]
    before = contents(tmp_path)

    again = mdm_interp(*ONLY, 1)
    assert (again.code, again.out, again.err.splitlines()[-2:]) == (0, ended.out, said)
    assert (len(work.trained), work.measured) == (12, measured), "trained or measured a second time"
    assert contents(tmp_path) == before, "the same results make other files"

    assert mdm_interp(*ONLY, 2).code == 0
    assert len(work.trained) == len(work.measured) == 16
    assert {run.config.seed for run in work.trained[15:]} == {1}


@pytest.mark.slow
def test_the_index_keeps_the_figures_that_were_not_asked_for(
    mdm_interp: Callable[..., Ended], tmp_path: Path, work: Work
) -> None:
    assert mdm_interp(*ONLY, 1).code == 0
    assert mdm_interp("reproduce", *HERE, "--only", "route_correlation", "--seeds", 1).code == 0
    index = (tmp_path / "figures" / "quick" / "index.html").read_text()
    assert index.index('<section id="reversal_curse">') < index.index('<section id="route_correlation">')
    assert {len(steps) for steps in work.measured.values()} == {4}, "nothing was measured again"


@pytest.mark.slow
def test_the_index_keeps_the_pages_whose_models_are_not_in_the_run_store(
    mdm_interp: Callable[..., Ended], tmp_path: Path, work: Work
) -> None:
    assert mdm_interp(*ONLY, 1).code == 0
    index = tmp_path / "figures" / "quick" / "index.html"
    index.unlink()
    shutil.rmtree(tmp_path / "runs")
    assert mdm_interp("report", "--out", index.parent).code == 0
    assert all(f'href="{explorer_of(run.folder.name)}"' in index.read_text() for run in work.trained)


@pytest.mark.slow
def test_one_analysis_runs_alone(mdm_interp: Callable[..., Ended], tmp_path: Path, work: Work) -> None:
    asked = (*HERE, "--seeds", 1, "--out", "elsewhere", "--runs", "store")
    ended = mdm_interp(*asked, entry=partial(run_one, reversal_curse.ANALYSIS))
    assert ended.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "store"]
    assert len(list((tmp_path / "store").iterdir())) == len(work.trained) == 12


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_an_analysis_that_is_not_installed_runs_alone_too(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    own = replace(reversal_curse.ANALYSIS, name="my_study")
    ended = mdm_interp(*HERE, "--seeds", 1, entry=partial(run_one, own))
    assert ended.code == 0
    assert '<section id="my_study">' in (tmp_path / "figures" / "quick" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_a_truncated_checkpoint_is_one_line(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    command = ["reproduce", *HERE, "--only", "evidence_growth", "--seeds", "1", "--out", "elsewhere"]
    assert mdm_interp(*command).code == 0
    (tmp_path / "elsewhere" / "evidence_growth.json").unlink()
    run = next(iter(stored_runs(tmp_path / "runs")))
    truncate(run.checkpoint_path(8))
    before = contents(tmp_path)
    assert_refused(mdm_interp(*command), "000008.safetensors", f"delete the folder runs/{run.folder.name}")
    after = {path: kept for path, kept in contents(tmp_path).items() if ".evidence_growth.parts" not in path}
    assert after == before, "but for the runs that were measured before it"


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_a_damaged_result_is_one_line(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    """Of the analysis asked for, and of another that the index would show."""
    (tmp_path / "figures" / "quick").mkdir(parents=True)
    for name in ("route_correlation", "reversal_curse"):
        (tmp_path / "figures" / "quick" / f"{name}.json").write_text('{"name": ')
        ended = mdm_interp(*ONLY, 1)
        assert_refused(ended._replace(err=ended.err.splitlines(keepends=True)[-1]), f"{name}.json: not a result file")


@pytest.mark.parametrize(("asked", "folder"), [("--full", "figures"), ("--quick", "figures/quick")])
def test_a_full_run_and_a_quick_one_do_not_overwrite_each_other(
    mdm_interp: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, asked: str, folder: str
) -> None:
    given: list[tuple[Lab, Path]] = []

    def reproduce(analyses: Any, lab: Lab, out: Path) -> Reported:
        given.append((lab, out))
        return Reported([analysis.name for analysis in analyses], None)

    monkeypatch.setattr(runner, "reproduce", reproduce)
    assert mdm_interp("reproduce", asked, *HERE).code == 0
    assert mdm_interp("reproduce", asked, *HERE, "--seeds", 2, "--out", "elsewhere").code == 0
    assert [str(out) for _, out in given] == [folder, "elsewhere"]
    assert [lab.n_seeds for lab, _ in given] == [grids.FULL_SEEDS if asked == "--full" else grids.QUICK_SEEDS, 2]


# ---- report


@pytest.mark.slow
def test_report_draws_everything_again_from_the_results_alone(
    mdm_interp: Callable[..., Ended], tmp_path: Path, work: Work
) -> None:
    assert mdm_interp(*ONLY, 1).code == 0
    folder = tmp_path / "figures" / "quick"
    before, trained = contents(folder), len(work.trained)
    measured = {run: list(steps) for run, steps in work.measured.items()}
    for path in folder.iterdir():
        if path.suffix != ".json" and not path.name.startswith((".drawn", "inside_", "explore_")):
            path.unlink()
    shutil.rmtree(tmp_path / "runs")
    ended = mdm_interp("report", "--out", "figures/quick")
    assert ended.code == 0
    assert ended.err.splitlines()[-2:] == [
        "no PNGs: there is no browser",
        "1 figure in figures/quick; open figures/quick/index.html",
    ]
    assert contents(folder) == before
    assert (work.measured, len(work.trained)) == (measured, trained), "nothing was measured or trained for it"


def test_report_draws_the_results_that_are_there(
    mdm_interp: Callable[..., Ended],
    tmp_path: Path,
    tiny_result: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pio, "write_images", None)
    names = {"two_slots", "route_parity"}
    for name in names:
        tiny_result(name).save(tmp_path / "figures" / f"{name}.json")
    assert mdm_interp("report").code == 0
    assert {path.stem for path in (tmp_path / "figures").glob("*.html")} == {*names, "index"}


def draw_bytes(figures: Sequence[Any], images: Sequence[Any], **_: Any) -> None:
    """What `plotly.io.write_images` does, without a browser."""
    for image in images:
        Path(image).write_bytes(b"a picture of " + Path(image).name.encode())


@pytest.mark.promise("a figure, the report or a library that they share, cut short or gone", "drawn again")
@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["cut short", "gone"])
def test_report_draws_what_is_damaged_and_nothing_else(
    mdm_interp: Callable[..., Ended],
    tmp_path: Path,
    tiny_result: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    monkeypatch.setattr(pio, "write_images", draw_bytes)
    folder = tmp_path / "figures"
    tiny_result("two_slots").save(folder / "two_slots.json")
    assert mdm_interp("report").code == 0
    whole = contents(folder)
    drawn = {path.name for path in folder.iterdir()} - {".drawn", "two_slots.json"}
    assert drawn >= {"index.html", "two_slots.html", "two_slots.png", "plotly-cartesian.min.js"}
    for name in sorted(drawn):
        damage(folder / name)
        assert mdm_interp("report").code == 0
        assert contents(folder) == whole, name
    for of in ("{", '{"figures": 3}', '{"figures": {"two_slots": []}, "digests": []}', '{"two_slots": "0123"}'):
        (folder / ".drawn").write_text(of)
        assert mdm_interp("report").code == 0
        assert contents(folder) == whole
    monkeypatch.setattr(pio, "write_images", None)  # whatever would draw has no browser, and says so
    assert mdm_interp("report").err == "1 figure in figures; open figures/index.html\n"


@pytest.mark.slow
@pytest.mark.promise(
    "a page that the report links to, cut short or gone", "written again; no link to what is not there"
)
def test_reproduce_writes_damaged_pages_again_and_links_to_those_that_are_there(
    mdm_interp: Callable[..., Ended], tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pio, "write_images", draw_bytes)
    assert mdm_interp(*ONLY, 1).code == 0
    folder = tmp_path / "figures" / "quick"
    whole, page = contents(folder), folder / explorer_of(work.trained[0].folder.name)
    for file in (page, folder / "plotly-cartesian.min.js"):
        for damage in (truncate, Path.unlink):
            damage(file)
            assert mdm_interp(*ONLY, 1).code == 0
            assert contents(folder) == whole
    page.unlink()
    assert mdm_interp("report", "--out", folder).code == 0
    assert page.name not in (folder / "index.html").read_text(), "a link that leads nowhere"
    assert mdm_interp(*ONLY, 1).code == 0
    assert contents(folder) == whole


@pytest.mark.parametrize("files", [None, [], ["notes.json", "index.html"]], ids=["no folder", "empty", "other files"])
def test_a_folder_without_results_is_refused(
    mdm_interp: Callable[..., Ended], tmp_path: Path, files: list[str] | None
) -> None:
    if files is not None:
        (tmp_path / "there").mkdir()
    for name in files or ():
        (tmp_path / "there" / name).write_text("{}")
    before = contents(tmp_path)
    assert_refused(mdm_interp("report", "--out", "there"), "there holds no results", "reproduce --out there")
    assert contents(tmp_path) == before


def test_a_damaged_result_is_named_before_anything_is_drawn(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "depth.json").write_text('{"name": ')
    before = contents(tmp_path)
    assert_refused(mdm_interp("report"), "depth.json: not a result file")
    assert contents(tmp_path) == before


# ---- what is not a user's mistake


def test_a_bug_is_not_reported_as_a_mistake(
    mdm_interp: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(loop, "train", bug)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(RuntimeError, match="planted"):  # Python prints its traceback and exits with 1
        mdm_interp("train", "config.yaml")


def test_ctrl_c_is_one_line(mdm_interp: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    ended = mdm_interp("train", "config.yaml")
    assert ended == Ended(130, "", "mdm-interp: interrupted; the same command goes on from here\n")


@pytest.mark.parametrize("imported", ["mdm_interp.cli", "typer", "mdm_interp.files"])
def test_ctrl_c_while_the_command_line_is_imported_is_one_line(tmp_path: Path, imported: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING.format(imported=imported))
    ended = subprocess.run(
        [sys.executable, "-m", "mdm_interp", "runs", "list"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    said = "mdm-interp: interrupted; the same command goes on from here\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", said)


INTERRUPTING = """
import sys


class Interrupting:
    def find_spec(self, name, *_):
        if name == {imported!r}:
            raise KeyboardInterrupt


sys.meta_path.insert(0, Interrupting())
"""


# ---- verify


def test_verify_prints_and_writes_the_ledger(
    mdm_interp: Callable[..., Ended], tmp_path: Path, tiny_result: Callable[[str], Any]
) -> None:
    for analysis in discover():
        if analysis.claims:
            tiny_result(analysis.name).save(tmp_path / "figures" / f"{analysis.name}.json")
    readme = "before\n" + "".join(findings.marks("findings")) + "after\n"
    (tmp_path / "README.md").write_text(readme)
    printed = mdm_interp("verify", "--readme", "README.md")
    assert printed.code == 0
    ledger = json.loads((tmp_path / "figures" / "claims.json").read_text())
    judged = {verdict["claim"]["id"] for verdict in ledger}  # tiny signatures are too alike for claim 7
    assert judged >= set(claims.CLAIMS) - {"7"}
    assert all(f"\n{claim} " in printed.out for claim in judged), "every claim has a row"
    assert len(printed.out.splitlines()) <= 24 and max(map(len, printed.out.splitlines())) <= 80
    written = json.loads((tmp_path / "figures" / "claims.json").read_text())
    assert json.loads(mdm_interp("verify", "--json").out) == written
    asked = ("--claim", "4", "--claim", "5", "--stage", "end")
    chosen = [one for one in written if one["claim"]["id"] in ("4", "5") and one["scope"]["stage"] == "end"]
    assert chosen and json.loads(mdm_interp("verify", *asked, "--json").out) == chosen
    table = pd.read_csv(StringIO(mdm_interp("verify", *asked, "--csv").out))
    assert table["effect.value"].tolist() == pytest.approx([one["effect"]["value"] for one in chosen])
    listed = mdm_interp("verify", *asked).out
    assert listed.count(", null ") == len(chosen) and listed.count("It holds where") == len(
        {(one["claim"]["id"], one["measure"]) for one in chosen}
    )
    assert max(map(len, listed.splitlines())) <= 80
    none = [one for one in written if one["scope"]["scheme"] == "none"]
    for name in ("none", "NoPE", "nope"):
        assert none and json.loads(mdm_interp("verify", "--scheme", name, "--json").out) == none
    listed = mdm_interp("verify", "--scheme", "NoPE").out
    assert " NoPE, " in listed and " none, " not in listed
    assert_refused(mdm_interp("verify", "--scheme", "rop"), "--scheme: the ledger has no 'rop'; there are rope")
    assert_refused(mdm_interp("verify", "--csv", "--json"), "--json --csv: these exclude each other")
    assert {line["verdict"] for line in written} <= {"holds", "fails", "inconclusive"}
    text = (tmp_path / "README.md").read_text()
    start, end = findings.marks("findings")
    assert text.startswith(f"before\n{start}") and text.endswith(f"{end}after\n")
    held = sum(line["verdict"] == "holds" and line["role"] in ("test", "arm") for line in written)
    assert sum(int(count) for count in re.findall(r"(\d+) holds", text)) == held
    (tmp_path / "figures" / "claims.json").unlink()
    (tmp_path / "figures" / "claims.json").mkdir()
    unwritten = mdm_interp("verify", *asked)
    assert unwritten.out == mdm_interp("verify", *asked).out and unwritten.out.count(", null ") == len(chosen)
    assert unwritten.code == 2 and unwritten.err.startswith("mdm-interp: figures/claims.json: Is a directory; give")
    (tmp_path / "README.md").write_text("no marks")
    assert_refused(mdm_interp("verify", "--readme", "README.md"), "README.md", "no place for the findings")
    assert (tmp_path / "README.md").read_text() == "no marks"


def test_verify_says_what_has_to_be_measured_first(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    assert_refused(mdm_interp("verify", "--out", "nowhere"), "nowhere", "mdm-interp reproduce --only")
    assert list(tmp_path.iterdir()) == []


# ---- attention


def test_attention_writes_a_page_of_a_run_or_a_checkpoint(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    run = train(TrainConfig(**CONFIG), root="runs", progress=False)
    save_checkpoint(run.model(), tmp_path / "native", format="mdm_interp")
    expected = viz.attention(run, "A0 r0 [M]", layers=[0], heads=[1], source="A0").html()
    for name in (run.folder.name[:8], run.folder):
        ended = mdm_interp(
            "attention", name, "A0 r0 [M]", "--out", "page.html", "--layers", "0", "--heads", "1", "--source", "A0"
        )
        assert ended == Ended(0, "page.html\n", "")
        assert (tmp_path / "page.html").read_text(encoding="utf-8") == expected
    assert mdm_interp("attention", "native", "A0 r0 [M]", "--out", "native.html") == Ended(0, "native.html\n", "")
    (tmp_path / "native" / "tokenizer.json").unlink()
    assert_refused(mdm_interp("attention", "native", "A0", "--out", "x.html"), "tokenizer.json: is missing")
    (tmp_path / "native" / "digests.json").unlink()
    assert_refused(mdm_interp("attention", "native", "A0", "--out", "x.html"), "has no tokenizer")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing", "A0"], ["nothing: not a folder, and not to be had"]),
        (["RUN", "A0 x9 [M]"], ["text: 'A0 x9' holds what this model's tokenizer has no token for"]),
        (["RUN", "A0", "--layers", "0;1"], ["--layers: '0;1' is no list of numbers; write it as 0,1,5"]),
        (["RUN", "A0", "--heads", "7"], ["heads: [7] is no choice from 0 to 1"]),
    ],
)
def test_a_mistake_in_what_to_look_at_is_one_line(
    mdm_interp: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: list[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = train(TrainConfig(**CONFIG), root=tmp_path / "runs", progress=False)
    given = [run.folder.name if argument == "RUN" else argument for argument in arguments]
    assert_refused(mdm_interp("attention", *given, "--out", "page.html"), *says)
    assert not (tmp_path / "page.html").exists()


# ---- the other pages


def test_pages_of_a_run_are_those_of_python(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    run = train(TrainConfig(**CONFIG), root=tmp_path / "runs", progress=False)
    name, pairs = run.folder.name[:8], run.query_pairs(n_contexts=1)
    text = "A0 r0 [M]"
    pages = {
        ("routes", name, "--pair", "1"): viz.routes(run, pairs[1]),
        ("denoise", name, text, "--order", "left_to_right"): viz.trajectory(run, text, order="left_to_right"),
        ("explore", name, "--limit", "3"): viz.explore(run, pairs[:3]),
    }
    for arguments, page in pages.items():
        ended = mdm_interp(*arguments, "--out", "page.html")
        assert (ended.code, ended.out) == (0, "page.html\n")
        written = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert f"<title>{page.title}</title>" in written
        assert page.about.split(".")[0] in written


def test_a_file_is_trained_and_explored_beside_another(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    one, other = TrainConfig(**CONFIG), TrainConfig(**{**CONFIG, "seed": 1})
    one.to_yaml(tmp_path / "one.yaml")
    run = train(other, root=tmp_path / "runs", progress=False)
    ended = mdm_interp("explore", "one.yaml", "--with", run.folder.name, "--out", "page.html")
    assert (ended.code, ended.out) == (0, "page.html\n")
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    for config in (one, other):
        assert config.digest()[:6] in written
    assert Run.of(one, tmp_path / "runs").finished


def test_a_checkpoint_is_explored_by_its_facts(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    tiny_probe(tmp_path, "llada")
    demo, facts = "tiny-llada", "facts.csv"
    assert mdm_interp("explore", demo, "--facts", facts, "--limit", "2", "--out", "page.html").code == 0
    assert f"Explorer: {demo}" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert mdm_interp("routes", demo, "--facts", facts, "--kind", "relational", "--out", "routes.html").code == 0
    for command in ("routes", "explore"):
        assert_refused(mdm_interp(command, demo, "--out", "x.html"), "--facts: a checkpoint does not say what to ask")
    assert_refused(mdm_interp("routes", demo, "--facts", facts, "--kind", "odd", "--out", "x.html"), "--kind: 'odd'")
    assert not (tmp_path / "x.html").exists()


def test_a_pair_or_facts_that_a_run_does_not_have_are_refused(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    run = train(TrainConfig(**CONFIG), root=tmp_path / "runs", progress=False)
    count = len(run.query_pairs(n_contexts=1))
    refused = mdm_interp("routes", run.folder.name, "--pair", "999", "--out", "x.html")
    assert_refused(refused, f"--pair: 999 is not there; give 0 to {count - 1}")
    refused = mdm_interp("explore", run.folder.name, "--facts", "facts.csv", "--out", "x.html")
    assert_refused(refused, "--facts: facts.csv is for checkpoints; a run is asked about its own world")


# ---- influence


def test_influence_writes_numbers_a_table_and_a_page(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path, "llada", facts=2)
    said = ["Tom Cruise's mother is Mary Lee Pfeiffer.", "The father of Zoë Müller is José Álvarez.", "Anna sleeps."]
    (tmp_path / "said.txt").write_text("\n".join(said) + "\n\n", encoding="utf-8")
    asked = ("tiny-llada", "--train", "said.txt", "--facts", "facts.csv", "--out", "out", "--draws", "3", "--top", "2")
    assert mdm_interp("influence", *asked) == Ended(0, "out/influence.html\n", "")
    written, table = (
        json.loads((tmp_path / "out/influence.json").read_text()),
        pd.read_csv(tmp_path / "out/influence.csv"),
    )
    pairs, tokenizer = probe.pairs("positional"), probe.model.tokenizer
    queries = [pair.forward for pair in pairs] + [pair.reverse for pair in pairs]
    training = [tokenizer(f" {sentence}")["input_ids"] for sentence in said]
    kept = tokenizer.all_special_ids
    total = influence(probe.model, training, queries, n_draws=3, seed=0, kept=kept).total
    assert written["sentences"] == said and (written["n_draws"], written["seed"]) == (3, 0)
    for at, query in enumerate(written["queries"]):
        for one in query["helping"] + query["hurting"]:
            assert one["influence"] == pytest.approx(total[one["sentence"], at].item(), rel=1e-4, abs=1e-9)
            rows = table[(table["query"] == at) & (table["sentence"] == one["sentence"])]
            assert rows["influence"].sum() == pytest.approx(one["influence"])
    assert set(table["direction"]) == {"forward", "reverse"} and set(table["rank"]) <= {1, 2, -1, -2}
    assert_refused(mdm_interp("influence", *asked, "--kind", "odd"), "--kind: 'odd' is none of positional, relational")


def test_influence_over_checkpoints_is_summed_with_their_rates(
    mdm_interp: Callable[..., Ended], tmp_path: Path
) -> None:
    probe = tiny_probe(tmp_path, "llada", facts=2)
    for name, format in {"early": "llada", "other": "dream"}.items():
        write_checkpoint(tmp_path / name, format, tokenizer=True, seed=9)
    said = ["Tom Cruise's mother is Mary Lee Pfeiffer.", "Anna sleeps."]
    (tmp_path / "said.txt").write_text("\n".join(said), encoding="utf-8")
    asked = ("--train", "said.txt", "--facts", "facts.csv", "--out", "out", "--draws", "2")
    ended = mdm_interp("influence", "early", "tiny-llada", *asked, "--rates", "0.5,0.01")
    assert ended == Ended(0, "out/influence.html\n", "")
    tokenizer, pairs = probe.model.tokenizer, probe.pairs("positional")
    training = [tokenizer(f" {sentence}")["input_ids"] for sentence in said]
    queries = queries_of(pairs, "forward") + queries_of(pairs, "reverse")
    models = (load_checkpoint(tmp_path / "early"), 0.5), (probe.model, 0.01)
    traced = traced_influence(models, training, queries, n_draws=2, seed=0, kept=tokenizer.all_special_ids)
    written = json.loads((tmp_path / "out/influence.json").read_text())
    assert [one["rate"] for one in written["checkpoints"]] == [0.5, 0.01]
    for at, query in enumerate(written["queries"]):
        found = {one["sentence"]: one["influence"] for one in query["helping"] + query["hurting"]}
        assert found == pytest.approx({of: traced.total[of, at].item() for of in range(len(said))}, rel=1e-4, abs=1e-9)
    assert "tiny-llada, summed with 1 earlier checkpoint" in (tmp_path / "out/influence.html").read_text()
    for rates in ((), ("--rates", "0.5"), ("--rates", "0.5,-1"), ("--rates", "0.5,nan"), ("--rates", "half,1")):
        given = rates[1] if rates else "None"
        says = f"--rates: {given} is not a positive number for each of the 2 checkpoints; write them as 0.01,0.003"
        assert_refused(mdm_interp("influence", "early", "tiny-llada", *asked, *rates), says)
    ended = mdm_interp("influence", "other", "tiny-llada", *asked, "--rates", "1,1")
    assert_refused(ended, "other: has another architecture or other tokens than tiny-llada; give checkpoints of one")


# ---- probe: what its options say of a checkpoint


def probed(mdm_interp: Callable[..., Ended], *given: object) -> CheckpointOrigin:
    """What the result says that was asked."""
    ended = mdm_interp("probe", *given, "--out", "out", "--only", "large_model_sinks", "--limit", 3)
    assert ended.code == 0, ended.err
    origin = Result.load(Path("out") / "large_model_sinks.json").origin
    assert isinstance(origin, CheckpointOrigin)
    return origin


def test_a_probe_asks_inside_a_chat(tmp_path: Path, mdm_interp: Callable[..., Ended]) -> None:
    checkpoint, facts = tmp_path / "model", tmp_path / "facts.csv"
    write_checkpoint(checkpoint, "a2d-qwen3", tokenizer=True, max_position_embeddings=512)
    (checkpoint / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    facts.write_text(PEOPLE, encoding="utf-8")
    origin = probed(mdm_interp, checkpoint, "--facts", facts, "--chat")
    assert origin.digest == open_probe(checkpoint, facts, limit=3, chat=True).origin().digest
    assert origin.digest != open_probe(checkpoint, facts, limit=3).origin().digest


def test_a_probe_is_told_what_no_file_says(tmp_path: Path, mdm_interp: Callable[..., Ended]) -> None:
    tiny_probe(tmp_path, "qwen3")
    options = ["--attention", "block_causal", "--readout-shift", 0, "--mask-token-id", N_BPE + 2, "--block-size", 64]
    model = probed(mdm_interp, tmp_path / "tiny-qwen3", "--facts", tmp_path / "facts.csv", *options).model
    found = [model[name] for name in ("attention", "readout_shift", "mask_token_id", "block_size")]
    assert found == ["block_causal", 0, N_BPE + 2, 64]
