"""Provenance: what made a model or a result, that a model's folder says so, and in what two of them differ."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_DEMO

from mdm_interp.config import one_line
from mdm_interp.devices import check_device
from mdm_interp.experiments.analysis import Analysis, discover
from mdm_interp.inference.prediction import predict
from mdm_interp.meaning import meaning
from mdm_interp.provenance import (
    DECIDING,
    FILE,
    difference,
    environment,
    machine,
    made_with,
    provenance,
    stamp,
    tally,
    versions,
)
from mdm_interp.training import text
from mdm_interp.training.demo import train_demo
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Resumable

OLD: dict[str, Any] = {"torch": "2.6.0", "training": "0ld", "cpu": "One", "threads": 1}
NEW: dict[str, Any] = {**OLD, "torch": "2.13.0"}
UNKNOWN = {"step": 0}


# ---- what is recorded


def test_a_models_provenance_is_what_trains_here() -> None:
    assert provenance(train, "cpu", torch.bfloat16) == {
        **{name: version(name) for name in ("mdm-interp", "numpy", "torch")},
        "python": platform.python_version(),
        "training": meaning(train).digest,
        **machine(),
        "device": "cpu",
        "dtype": "bfloat16",
    }
    assert provenance(train_demo, "cpu", torch.float32)["training"] == meaning(train_demo).digest
    assert meaning(train_demo).digest != meaning(train).digest


def test_the_machine_is_named() -> None:
    found = machine()
    assert found.keys() == {"cpu", "instructions", "threads", "blas", "platform"}
    assert found["threads"] == torch.get_num_threads()
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["platform"] == platform.platform()
    assert json.loads(json.dumps(found)) == found


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU behind {device}")
    assert provenance(train, "cuda:1", torch.float32)["device"] == "GPU behind cuda:1"


def test_the_processor_is_named_with_or_without_linuxs_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = sys.modules[machine.__module__]
    name = module._cpu.__wrapped__
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: Fast (R) 9\nprocessor\t: 1\nmodel name\t: Slow 1\n")
    monkeypatch.setattr(module, "Path", lambda path: {"/proc/cpuinfo": listed}[path])
    assert name() == "Fast (R) 9"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    listed.write_text("processor\t: 0\n")
    assert name() == "arm64"
    listed.unlink()
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert name() == "arm"


def test_versions_are_of_the_code_and_of_the_packages_that_it_uses() -> None:
    assert versions(check_device).keys() == {"code", "torch"}
    assert versions(one_line).keys() == {"code"}
    found = versions(predict)
    assert found["code"] == meaning(predict).digest
    assert found["torch"] == version("torch").partition("+")[0]
    assert found.keys() <= {"code", *DECIDING}
    assert "scipy" not in found, "it is for statistics"
    assert versions(predict, train)["code"] == meaning(predict, train).digest


def test_a_version_is_without_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cu128")
    assert versions(predict)["torch"] == "2.13.0"


@pytest.mark.parametrize("analysis", discover(), ids=lambda analysis: analysis.name)
def test_an_analysis_names_torch_and_nothing_that_is_not_installed(analysis: Analysis) -> None:
    found = versions(*analysis.measuring())
    assert "torch" in found
    assert all(version(name).startswith(found[name]) for name in found if name != "code")


def test_the_environment_tells_what_decides_no_number() -> None:
    found = environment(train_demo)
    python = {"mdm-interp": version("mdm-interp"), "python": platform.python_version()}
    assert found == {**python, "training": meaning(train_demo).digest, **machine()}
    assert found.keys().isdisjoint(versions(predict))


# ---- in a model's folder


def test_stretches_of_training_are_recorded_with_their_first_step(tmp_path: Path) -> None:
    stamp(tmp_path, 0, OLD)
    assert made_with(tmp_path) == [{"step": 0, **OLD}]
    stamp(tmp_path, 7, OLD)
    assert made_with(tmp_path) == [{"step": 0, **OLD}], "nothing has changed at step 7"
    stamp(tmp_path, 9, NEW)
    assert made_with(tmp_path) == [{"step": 0, **OLD}, {"step": 9, **NEW}]
    stamp(tmp_path, 12, OLD)
    assert [one["step"] for one in made_with(tmp_path)] == [0, 9, 12]
    stamp(tmp_path, 9, OLD)  # resumed from before it
    assert made_with(tmp_path) == [{"step": 0, **OLD}]
    stamp(tmp_path, 0, NEW)
    assert made_with(tmp_path) == [{"step": 0, **NEW}]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_what_is_recorded_is_not_written_again(tmp_path: Path) -> None:
    stamp(tmp_path, 0, OLD)
    written = (tmp_path / FILE).stat()
    stamp(tmp_path, 0, OLD)
    stamp(tmp_path, 5, OLD)
    assert (tmp_path / FILE).stat().st_ino == written.st_ino, "another file took its place"


DAMAGED = [
    "",
    "[",
    "{}",
    "[]",
    "null",
    "3",
    '["step"]',
    '[{"torch": "2"}]',
    '[{"step": "0"}]',
    '[{"step": 4}]',
    "\udcff",
]


@pytest.mark.parametrize("text", [None, *DAMAGED, "\udcff", '[{"step": 0}, 1]', '[{"step": 0}, {"step": null}]'])
def test_what_trained_a_model_is_unknown_where_its_file_is_missing_or_damaged(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / FILE).write_bytes(text.encode(errors="surrogateescape"))
    assert made_with(tmp_path) == [UNKNOWN]
    stamp(tmp_path, 5, NEW)
    assert made_with(tmp_path) == [UNKNOWN, {"step": 5, **NEW}], "what comes after is known"
    stamp(tmp_path, 0, NEW)
    assert made_with(tmp_path) == [{"step": 0, **NEW}]


def test_a_demo_checkpoint_says_what_trained_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and resumed by something else after three steps."""
    folder = train_demo(tmp_path / "whole", TINY_DEMO, progress=False)
    assert made_with(folder) == [{"step": 0, **provenance(train_demo, "cpu", torch.float32)}]
    saved = iter(range(3))

    def save_and_die(*args: Any) -> None:
        save_state(*args)
        if next(saved) == 2:
            raise KeyboardInterrupt

    save_state = Resumable.save_state
    monkeypatch.setattr(text, "SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Resumable, "save_state", save_and_die)
        patch.setattr(text, "provenance", lambda *_: OLD)
        train_demo(tmp_path / "cut", TINY_DEMO, progress=False)
    monkeypatch.setattr(text, "provenance", lambda *_: NEW)
    folder = train_demo(tmp_path / "cut", TINY_DEMO, progress=False)
    assert made_with(folder) == [{"step": 0, **OLD}, {"step": 4, **NEW}]


def test_models_are_counted_by_what_trained_them(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcdefg"]
    for folder in folders[:-1]:
        stamp(folder, 0, OLD)
    stamp(folders[0], 4, NEW)
    stamp(folders[1], 8, NEW)
    stamp(folders[2], 8, NEW)
    stamp(folders[2], 9, OLD)
    assert tally(folders) == [
        {"runs": 3, "by": [OLD, NEW]},
        {"runs": 3, "by": [OLD]},
        {"runs": 1, "by": [{}]},
    ]
    assert json.loads(json.dumps(tally(folders))) == tally(folders)
    assert tally([]) == []


# ---- what differs

HERE = {"torch": "2.13.0", "training": "0ld", "code": "c0de", "scipy": "1"}


@pytest.mark.parametrize(
    ("made_by", "said"),
    [
        ([NEW], ""),
        ([{**NEW, "cpu": "Two", "threads": 8, "device": "GPU"}], ""),
        ([NEW, {**NEW, "cpu": "Two"}], ""),
        ([OLD], "torch 2.6.0 instead of 2.13.0"),
        (
            [{**OLD, "training": "n3w"}],
            "torch 2.6.0 instead of 2.13.0, training n3w instead of 0ld",
        ),
        ([{**NEW, "torch": "2.13.0+cu128"}], ""),
        ([{**NEW, "mdm-interp": "0", "platform": "Another"}], ""),
        ([NEW, OLD, NEW, OLD], "torch 2.6.0 instead of 2.13.0"),
        ([{}], "unknown code and versions"),
        ([UNKNOWN, OLD], "unknown code and versions and torch 2.6.0 instead of 2.13.0"),
    ],
)
def test_only_other_code_and_versions_are_told_apart(made_by: list[dict[str, Any]], said: str) -> None:
    assert difference(made_by, HERE) == said


def test_a_checkout_that_is_not_installed_trains_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert provenance(train, "cpu", torch.float32)["mdm-interp"] == "not installed"
