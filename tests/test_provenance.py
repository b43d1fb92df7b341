"""Provenance: what made a model or a result, that a model's folder says so, and in what two of them differ."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_DEMO

from mdm_interp.experiments.analysis import discover
from mdm_interp.provenance import (
    FILE,
    LATER,
    TRAINERS,
    code,
    difference,
    machine,
    made_with,
    provenance,
    sources,
    stamp,
    tally,
    versions,
)
from mdm_interp.training.demo import train_demo
from mdm_interp.training.loop import demo
from mdm_interp.training.runs import Resumable

TRAINING, DEMO = TRAINERS
OLD: dict[str, Any] = {"torch": "2.6.0", "mdm_interp.training.loop": "0ld", "cpu": "One", "threads": 1}
NEW: dict[str, Any] = {**OLD, "torch": "2.13.0"}
UNKNOWN = {"step": 0}


# ---- what is recorded


def test_a_models_provenance_is_what_trains_here() -> None:
    threads = torch.get_num_threads()
    assert provenance(TRAINING, "cpu", torch.bfloat16) == {
        **{name: version(name) for name in ("mdm-interp", "numpy", "torch")},
        "python": platform.python_version(),
        "mdm_interp.training.loop": code(TRAINING),
        **machine(),
        "threads": threads,
        "device": "cpu",
        "dtype": "bfloat16",
    }
    assert provenance(DEMO, "cpu", torch.float32)["mdm_interp.training.demo"] == code(DEMO) != code(TRAINING)


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU behind {device}")
    assert provenance(TRAINING, "cuda:1", torch.float32)["device"] == "GPU behind cuda:1"


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


def test_versions_name_what_trains_apart_from_the_rest() -> None:
    found = versions("analyses.depth")
    packages = {name: version(name) for name in ("mdm-interp", "numpy", "scipy", "torch", "transformer-lens")}
    assert found.items() >= {**packages, "python": platform.python_version()}.items()
    assert found["mdm_interp.training.loop"] == code(TRAINING) != found["code"]
    assert "mdm_interp.training.demo" not in found
    assert versions("analyses.twin").items() >= {trainer: code(trainer) for trainer in TRAINERS}.items()


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
    assert made_with(folder) == [{"step": 0, **provenance(DEMO, "cpu", torch.float32)}]
    saved = iter(range(3))

    def save_and_die(*args: Any) -> None:
        save_state(*args)
        if next(saved) == 2:
            raise KeyboardInterrupt

    save_state = Resumable.save_state
    monkeypatch.setattr(demo, "SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Resumable, "save_state", save_and_die)
        patch.setattr(demo, "provenance", lambda *_: OLD)
        train_demo(tmp_path / "cut", TINY_DEMO, progress=False)
    monkeypatch.setattr(demo, "provenance", lambda *_: NEW)
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

HERE = {"torch": "2.13.0", "mdm_interp.training.loop": "0ld", "code": "c0de", "scipy": "1"}


@pytest.mark.parametrize(
    ("made_by", "said"),
    [
        ([NEW], ""),
        ([{**NEW, "cpu": "Two", "threads": 8, "device": "GPU"}], ""),
        ([NEW, {**NEW, "cpu": "Two"}], ""),
        ([OLD], "torch 2.6.0 instead of 2.13.0"),
        (
            [{**OLD, "mdm_interp.training.loop": "n3w"}],
            "torch 2.6.0 instead of 2.13.0, mdm_interp.training.loop n3w instead of 0ld",
        ),
        ([NEW, OLD, NEW, OLD], "torch 2.6.0 instead of 2.13.0"),
        ([{}], "unknown code and versions"),
        ([UNKNOWN, OLD], "unknown code and versions and torch 2.6.0 instead of 2.13.0"),
    ],
)
def test_only_other_code_and_versions_are_told_apart(made_by: list[dict[str, Any]], said: str) -> None:
    assert difference(made_by, HERE) == said


# ---- code

STUDY = {
    "__init__.py": "from .shared import measure\nfrom .other import unused\n",
    "one.py": "import json\nfrom mdm_interp import routing\nfrom mdm_interp.cli import main\nfrom . import measure\n",
    "shared.py": "def measure(runs):\n    from planted_study.deep import CONSTANT\n    return []\n",
    "deep.py": "CONSTANT = 1\n",
    "other.py": "unused = 1\n",
}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package of another study."""
    folder = tmp_path / "planted_study"
    folder.mkdir()
    for name, text in STUDY.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("planted_study")]:
        del sys.modules[name]


def fresh(module: str) -> str:
    """The digest of a module's code, not the one remembered from before a change."""
    return code.__wrapped__(module)


def test_the_code_digest_is_of_all_that_makes_the_numbers_and_nothing_else(study: Path) -> None:
    one = "planted_study.one"
    before = fresh(one)
    for changing in ("one.py", "shared.py", "deep.py"):
        (study / changing).write_text(STUDY[changing] + "# changed\n")
        assert fresh(one) != before, changing
        (study / changing).write_text(STUDY[changing])
        assert fresh(one) == before
    (study / "other.py").write_text("unused = 2\n")
    (study / "new.py").write_text("from . import one\n")
    assert fresh(one) == before


def test_sources_go_through_what_only_hands_names_on(study: Path) -> None:
    found = sources("planted_study.one")
    assert [name for name in found if name.startswith("planted_study")] == [
        "planted_study.deep",
        "planted_study.one",
        "planted_study.shared",
    ]
    ours = {name for name in found if name.startswith("mdm_interp")}
    assert {"mdm_interp.measures.routes", "mdm_interp.data.queries", "mdm_interp.models.positions"} <= ours
    assert ours.isdisjoint(
        {"mdm_interp", "mdm_interp.cli", "mdm_interp.measures.evidence", "mdm_interp.interventions.edits"}
    )
    (study / "one.py").write_text("from mdm_interp import HookedTransformer as Model, storage as s\n")
    found = sources("planted_study.one")
    assert {"mdm_interp.models.transformer", "mdm_interp.measures.evidence"} <= found.keys()
    assert found.keys().isdisjoint({"mdm_interp", "mdm_interp.measures.routes"})
    (study / "one.py").write_text("import mdm_interp\nfrom planted_study import *\n")
    assert {"mdm_interp", "mdm_interp.measures.routes", "planted_study.other"} <= sources("planted_study.one").keys()


def test_an_analysis_run_as_a_program_is_made_of_the_same_sources() -> None:
    program = "import sys, runpy; sys.argv[1:] = ['--help']\n"
    program += "from mdm_interp.experiments.analysis import Analysis\nfrom mdm_interp.provenance import versions\n"
    program += "Analysis.main = lambda self: print(versions(self.measure.__module__)['code'])\n"
    program += "runpy.run_module('analyses.depth', run_name='__main__', alter_sys=True)\n"
    root = Path(__file__).parents[1]
    printed = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=100)
    assert printed.stdout.strip() == fresh("analyses.depth"), printed.stderr


@pytest.mark.parametrize("later", LATER)
def test_looks_and_verdicts_are_in_no_digest(later: str) -> None:
    importlib.import_module(later)
    for analysis in discover():
        found = sources(analysis.measure.__module__)
        assert not [name for name in found if f"{name}.".startswith(f"{later}.")]
        assert "mdm_interp.models.transformer" in found
