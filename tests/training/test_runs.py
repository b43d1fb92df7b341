"""The run store: what is in a run's folder, and what is said when something there is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import mdm_interp.training.trainees
from mdm_interp import tensors
from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.provenance import made_with
from mdm_interp.tensors import load_tensors, save_tensors
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run, stored_runs

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=5)


def tiny(*, d_model: int = 8, seed: int = 0, steps: int = 6) -> TrainConfig:
    model = ModelConfig(d_model=d_model, n_heads=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len)
    return TrainConfig(model=model, facts=FACTS, steps=steps, batch_size=4, n_checkpoints=4, seed=seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; tests that write use `run`."""
    return train(tiny(), root=tmp_path_factory.mktemp("store"), progress=False)


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of the finished run that a test may damage."""
    own = Run.of(trained.config, tmp_path)
    shutil.copytree(trained.folder, own.folder)
    return own


# ---- what is there


def test_a_run_is_found_by_its_config(trained: Run) -> None:
    assert trained.folder.name == tiny().digest()
    assert Run.of(tiny(), trained.folder.parent) == trained
    assert Run.of(tiny(seed=1), trained.folder.parent).folder != trained.folder
    assert TrainConfig.from_yaml(trained.folder / "config.yaml") == trained.config
    assert {path.name for path in trained.folder.iterdir()} - {".lock"} == {
        "config.yaml",
        "made_with.json",
        "metrics.jsonl",
        "checkpoints",
        "state.safetensors",
    }


def test_a_finished_run_knows_its_steps(trained: Run, tmp_path: Path) -> None:
    assert trained.steps == [0, 1, 2, 6] and trained.step == 6 and trained.finished
    unborn = Run.of(tiny(), tmp_path)
    assert unborn.steps == [] and unborn.step is None and not unborn.finished
    assert not unborn.folder.exists()  # asking creates nothing


def test_the_world_and_its_pairs_are_those_of_the_config(trained: Run) -> None:
    world = FactWorld(FACTS, seed=0)
    assert torch.equal(trained.facts.facts, world.facts)
    assert trained.query_pairs(n_contexts=3) == world.query_pairs("any_order", 3)


def test_checkpoint_0_is_the_seeds_initial_model_and_the_last_is_the_state(trained: Run) -> None:
    initial = HookedTransformer(trained.config.model, generator=torch.Generator().manual_seed(0)).state_dict()
    stored = trained.model(step=0).state_dict()
    assert initial.keys() == stored.keys() and all(torch.equal(initial[name], stored[name]) for name in stored)
    state = load_file(trained.state_path)
    last = trained.model().state_dict()
    assert all(torch.equal(last[name], state[f"model.{name}"]) for name in last)
    assert not any(torch.equal(initial[name], last[name]) for name in last)  # every weight has learnt something


@pytest.mark.parametrize(("asked", "given"), [(-1, 6), (-2, 2), (-4, 0), (0, 0), (1, 1), (6, 6)])
def test_steps_count_from_either_end(trained: Run, asked: int, given: int) -> None:
    weights, expected = trained.model(asked).state_dict(), load_file(trained.checkpoint_path(given))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize("step", [3, 7, -5])
def test_a_step_without_checkpoint_is_refused_with_those_there_are(trained: Run, step: int) -> None:
    with pytest.raises(UserError, match=rf"step: {step} has no checkpoint in .*; there are \[0, 1, 2, 6\]"):
        trained.model(step)


def test_a_run_without_checkpoints_says_to_train_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step: -1 has no checkpoint in .*; there are none: train the run"):
        Run.of(tiny(), tmp_path).model()


def test_stored_runs_are_all_the_runs_below_a_root(tmp_path: Path) -> None:
    assert list(stored_runs(tmp_path)) == [] == list(stored_runs(tmp_path / "nowhere"))
    made = [train(tiny(seed=seed, steps=1), root=tmp_path, progress=False) for seed in range(3)]
    (tmp_path / "not a run").mkdir()
    found = list(stored_runs(tmp_path))
    assert found == sorted(made, key=lambda run: run.folder.name)
    found[1].delete()
    assert not found[1].folder.exists()
    assert list(stored_runs(tmp_path)) == [found[0], found[2]]


def test_a_stored_run_with_a_damaged_config_is_named(run: Run) -> None:
    (run.folder / "config.yaml").write_text("model: {d_model: [}")
    with pytest.raises(UserError, match=r"config\.yaml: not YAML"):
        list(stored_runs(run.folder.parent))


@pytest.mark.parametrize("text", [None, "[{"], ids=["before it was recorded", "damaged"])
def test_a_run_that_does_not_say_what_trained_it_is_used_as_it_is(
    run: Run, trained: Run, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.folder / "made_with.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(mdm_interp.training.trainees, "drawn_loss", None)  # no step is taken
    assert train(run.config, root=run.folder.parent, progress=False) == run
    assert list(stored_runs(run.folder.parent)) == [run]
    assert run.finished and run.metrics()[1:] == trained.metrics()[1:]  # the first row's loss is NaN
    assert torch.equal(run.model().W_E, trained.model().W_E)
    assert path.exists() == (text is not None), "nothing is made up"
    assert made_with(run.folder) == [{"step": 0}]


# ---- what is wrong


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def of_another_model(path: Path) -> None:
    weights = HookedTransformer(tiny(d_model=16).model).state_dict()
    state = {f"model.{name}": tensor for name, tensor in weights.items()} | {"generator": torch.get_rng_state()}
    save_tensors(path, weights if path.parent.name == "checkpoints" else state, {"step": "2"})


def without_a_tensor(path: Path) -> None:
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    del tensors["generator" if "generator" in tensors else "embed.W_E"]
    save_tensors(path, tensors, metadata and {**metadata, "step": "2"})


def without_step(path: Path) -> None:
    save_tensors(path, load_file(path))


def set_back(run: Run) -> None:
    """Make the run look as if it was killed after step 2."""
    save_tensors(run.state_path, load_file(run.state_path), {"step": "2"})


def assert_names(error: pytest.ExceptionInfo[UserError], path: Path, folder: Path) -> None:
    """The message starts with the file, ends with the fix, and is one line, as the CLI prints it."""
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert f"delete the folder {folder} to train" in message or f"delete {folder} to train" in message


@pytest.mark.parametrize("damage", [cut, cut_header, empty, of_another_model, without_a_tensor])
def test_a_damaged_checkpoint_is_named(run: Run, damage: Callable[[Path], None]) -> None:
    path = run.checkpoint_path(2)
    damage(path)
    with pytest.raises(UserError) as error:
        run.model(2)
    assert_names(error, path, run.folder)
    run.model(6)  # the others still load


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        cut_header,
        empty,
        without_step,
        of_another_model,
        without_a_tensor,
    ],
)
def test_a_damaged_state_is_named_and_its_advice_works(run: Run, trained: Run, damage: Callable[[Path], None]) -> None:
    damage(run.state_path)
    with pytest.raises(UserError) as error:
        train(run.config, root=run.folder.parent, progress=False)
    assert_names(error, run.state_path, run.folder)
    run.delete()
    again = train(run.config, root=run.folder.parent, progress=False)
    assert again.checkpoint_path(6).read_bytes() == trained.checkpoint_path(6).read_bytes()


@pytest.mark.parametrize("damage", [cut, remove])
def test_damaged_metrics_are_named(run: Run, damage: Callable[[Path], None]) -> None:
    damage(run.metrics_path)
    with pytest.raises(UserError) as error:
        run.metrics()
    assert_names(error, run.metrics_path, run.folder)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        remove,
        empty,
    ],
)
def test_damaged_metrics_stop_a_run_from_resuming(run: Run, damage: Callable[[Path], None]) -> None:
    set_back(run)
    damage(run.metrics_path)
    with pytest.raises(UserError) as error:
        train(run.config, root=run.folder.parent, progress=False)
    assert_names(error, run.metrics_path, run.folder)


def test_damaged_metrics_stop_a_run_from_starting(run: Run) -> None:
    run.state_path.unlink()
    cut(run.metrics_path)
    with pytest.raises(UserError) as error:
        train(run.config, root=run.folder.parent, progress=False)
    assert_names(error, run.metrics_path, run.folder)


def test_a_stray_file_among_the_checkpoints_is_no_step(run: Run) -> None:
    shutil.copy(run.checkpoint_path(6), run.folder / "checkpoints" / "best.safetensors")
    assert run.steps == [0, 1, 2, 6]


# ---- writing


def test_save_tensors_keeps_any_tensor(tmp_path: Path) -> None:
    table = torch.arange(6.0).view(2, 3)
    tensors = {"transposed": table.T, "weight": torch.nn.Parameter(table), "part": table[:, 1], "none": torch.zeros(0)}
    save_tensors(tmp_path / "new" / "t.safetensors", tensors, {"step": "3"})
    stored = load_tensors(tmp_path / "new" / "t.safetensors")
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "new" / "t.safetensors", "pt") as opened:
        assert opened.metadata() == {"step": "3"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"x": torch.ones(2)})

    def half_written(tensors: dict, where: Path, metadata: dict | None) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(tensors, "save_file", half_written)
    with pytest.raises(OSError, match="no space left"):
        save_tensors(path, {"x": torch.zeros(2)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.safetensors"]
    assert torch.equal(load_tensors(path)["x"], torch.ones(2))


def test_recorded_rows_replace_those_of_their_steps_and_leave_the_others(tmp_path: Path) -> None:
    """Of two processes that train a run, the one behind neither loses what the other recorded nor is lost by it."""
    run, rows = Run.of(tiny(), tmp_path), [{"step": step, "loss": float(step)} for step in (0, 1, 5, 9)]
    run.record(rows)
    run.record([rows[0], {"step": 1, "loss": 7.0}])
    assert [(row["step"], row["loss"]) for row in run.metrics()] == [(0, 0.0), (1, 7.0), (5, 5.0), (9, 9.0)]
    run.record([{"step": 2, "loss": 8.0}])
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 5, 9]
