"""Runs under position schemes of one's own: trained here and by workers, read back, and never taken for another."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from scheme_helpers import PerHead, Window, XPos, forgotten, register_all
from torch.testing import assert_close

from mdm_interp import parallel
from mdm_interp.config import SCHEMES, FactConfig, ModelConfig, TrainConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import predict
from mdm_interp.models.positions import POSITION_SCHEMES, register_scheme
from mdm_interp.provenance import made_with
from mdm_interp.training import loop
from mdm_interp.training.loop import Progressed, train, train_all
from mdm_interp.training.runs import Run
from mdm_interp.training.trainees import Ensemble, Trainee

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=5)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with forgotten():
        register_all()
        yield


def tiny(position: str = "xpos", seed: int = 0, steps: int = 12, **changes: Any) -> TrainConfig:
    sizes: dict[str, Any] = {"d_model": 16, "n_heads": 2, "d_vocab": FACTS.d_vocab, "n_ctx": FACTS.seq_len}
    model = ModelConfig(**sizes, position=position, **changes)
    fields: dict[str, Any] = {"batch_size": 8, "n_checkpoints": 5, "warmup": 3}
    return TrainConfig(model=model, facts=FACTS, seed=seed, steps=steps, **fields)


def test_a_run_trains_what_the_scheme_learns_and_keeps_it(tmp_path: Path) -> None:
    run = train(tiny(), root=tmp_path, progress=False)
    first, last = run.model(0), Run.open(run.folder.name, tmp_path).model()
    assert type(last.pos_embed) is XPos
    gammas = [model.pos_embed.get_parameter("gamma").item() for model in (first, last)]
    assert gammas[0] == pytest.approx(0.4) and abs(gammas[1] - 0.4) > 1e-3
    answered = predict(last, [pair.forward for pair in run.query_pairs()])
    assert float(answered.probability.mean()) == pytest.approx(run.metrics()[-1]["forward_probability"])
    run.check()
    assert train(tiny(), root=tmp_path, progress=False) == run


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "REPORT_STEPS", 1)
    whole = train(tiny(), root=tmp_path / "whole", progress=False)

    def stop(progressed: Progressed) -> None:
        if progressed.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), root=tmp_path / "resumed", report=stop)
    resumed = train(tiny(), root=tmp_path / "resumed", progress=False)
    assert resumed.checkpoint_path(12).read_bytes() == whole.checkpoint_path(12).read_bytes()


@pytest.mark.parametrize("scheme", [XPos, PerHead, Window])
def test_members_of_an_ensemble_become_what_they_would_alone(scheme: type) -> None:
    name = {XPos: "xpos", PerHead: "per_head", Window: "window"}[scheme]
    configs = [tiny(name, seed, dtype="float64") for seed in range(3)]
    together, alone = (
        [Trainee(config, FactWorld(config.facts, config.seed), "cpu") for config in configs] for _ in range(2)
    )
    ensemble = Ensemble(together)
    for step in range(1, 31):
        losses = ensemble.advance(step)
        for loss, one in zip(losses.tolist(), alone, strict=True):
            assert loss == pytest.approx(one.advance(step).item(), abs=1e-9)
    ensemble.update_members()
    for member, one in zip(together, alone, strict=True):
        assert type(member.model.pos_embed) is scheme
        for mine, theirs in zip(member.model.parameters(), one.model.parameters(), strict=True):
            assert_close(mine, theirs, atol=1e-9, rtol=0)


# ---- what is not registered, or is another class by now


def test_a_run_whose_scheme_nobody_registered_is_refused_by_name(tmp_path: Path) -> None:
    run = train(tiny(steps=2), root=tmp_path, progress=False)
    del POSITION_SCHEMES["xpos"], SCHEMES["xpos"]
    with pytest.raises(
        UserError, match=r"config.yaml: model.position: 'xpos' is not one of .*; correct it, or register"
    ):
        Run.open(run.folder.name, tmp_path)
    with pytest.raises(UserError, match="position: 'xpos' is registered by no module"):
        run.model()


@pytest.mark.promise("a registered position scheme that was changed after a run", "its runs are refused, not measured")
def test_a_run_is_not_read_as_one_of_a_changed_class(tmp_path: Path) -> None:
    run = train(tiny(steps=2), root=tmp_path, progress=False)
    (made_by,) = made_with(run.folder)
    assert len(made_by["position_sample"]) == 4
    changed = type("XPos", (XPos,), {"span": 9, "__module__": XPos.__module__, "__qualname__": "XPos"})
    register_scheme("xpos")(changed)
    asked = (run.model, run.check, lambda: train(tiny(steps=2), root=tmp_path, progress=False))
    for ask in asked:
        with pytest.raises(UserError, match=f"^{run.folder}: position: the scheme that is registered as 'xpos' is not"):
            ask()
    register_scheme("xpos")(XPos)
    for ask in asked:
        ask()
    (run.folder / "made_with.json").unlink()  # then nothing is known of what trained it
    register_scheme("xpos")(changed)
    assert type(run.model().pos_embed) is changed


def test_runs_of_the_package_are_sampled_by_nothing(tmp_path: Path) -> None:
    run = train(tiny("rope", steps=2), root=tmp_path, progress=False)
    assert "position_sample" not in json.loads((run.folder / "made_with.json").read_text())[0]


# ---- workers

MODULE = """
import torch
from torch import nn

from mdm_interp.models.positions import PositionScheme, register_scheme


@register_scheme("fading")
class Fading(PositionScheme):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.slope = nn.Parameter(torch.ones(cfg.n_heads))

    def bias(self, query_pos, key_pos):
        return -self.slope[:, None, None] * (key_pos[None, :] - query_pos[:, None]).abs()
"""


@pytest.fixture
def fading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of the user's that registers a scheme."""
    (tmp_path / "fading_scheme.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("fading_scheme")
    yield
    del sys.modules["fading_scheme"]


@pytest.mark.usefixtures("fading")
def test_workers_import_the_module_that_registers_a_scheme(tmp_path: Path) -> None:
    configs = [tiny("fading", seed) for seed in range(2)]
    runs = train_all(configs, root=tmp_path / "runs", workers=1)
    for run in runs:
        alone = train(run.config, root=tmp_path / "alone", progress=False).model()
        for name, weight in run.model().state_dict().items():
            assert_close(weight, alone.state_dict()[name], atol=1e-5, rtol=0)
        slope = run.model().pos_embed.get_parameter("slope")
        assert (slope - torch.ones(2)).abs().min() > 1e-4


SCRIPT = f"""{MODULE}

from mdm_interp import FactConfig, ModelConfig, TrainConfig
from mdm_interp.training.loop import train_all

if __name__ == "__main__":
    facts = FactConfig(n_entities=6, n_filler=4, seq_len=5)
    model = ModelConfig(d_model=16, n_heads=2, d_vocab=facts.d_vocab, n_ctx=5, position="fading")
    (run,) = train_all([TrainConfig(model=model, facts=facts, steps=3, n_checkpoints=2)], root="runs", workers=1)
    print(run.finished, type(run.model().pos_embed).__name__)
"""


def test_workers_of_a_script_know_what_it_registers(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(SCRIPT)
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "study.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "True Fading\n"), ran.stderr


def test_a_scheme_that_workers_cannot_import_is_refused_there(tmp_path: Path) -> None:
    """As a notebook's are: its classes are in no module that can be imported."""
    class_of_a_notebook = type("XPos", (XPos,), {"__module__": "a_notebook", "__qualname__": "XPos"})
    register_scheme("cell")(class_of_a_notebook)
    assert "a_notebook" in parallel._needed
    config = tiny("cell", steps=2)
    with pytest.raises(
        UserError, match=r"model.position: 'cell' is not one of .* in a module that this process imports"
    ):
        train_all([config], root=tmp_path, workers=1)
    assert train(config, root=tmp_path, progress=False).finished  # here it is known
