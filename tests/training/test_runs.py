"""The run store: what is in a run's folder, and what is said when something there is wrong."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage_helpers import damaged
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stranger_helpers import outcome_of

import mdm_interp.training.trainees
from mdm_interp import tensors
from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.files import json_digest
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.provenance import made_with
from mdm_interp.tensors import load_tensors, not_finite, save_tensors, tensor_digest, weights_digest
from mdm_interp.training import loop
from mdm_interp.training.loop import Progressed, train
from mdm_interp.training.runs import RECORDED, Run, stored_runs

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


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(trained: Run) -> None:
    with pytest.raises(UserError, match=r"^device: 'tpu' cannot be used here \("):
        trained.model(-1, "tpu")


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
    state = load_file(run.state_path)
    counted = {name: torch.tensor(2.0) for name in state if name.endswith(".step")}
    save_tensors(run.state_path, state | counted, {"step": "2"})


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


def cut_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def cut_letter(path: Path) -> None:
    """As no text has it."""
    path.write_bytes(path.read_bytes()[:-20] + b"\xff" + path.read_bytes()[-19:])


def assert_names_the_cure(error: pytest.ExceptionInfo[UserError], run: Run) -> None:
    message = str(error.value)
    assert message.startswith(f"{run.metrics_path}: ") and "\n" not in message
    assert f"`mdm-interp train {run.folder}/config.yaml --runs {run.folder.parent}` computes again" in message


def answers(run: Run) -> list[dict[str, Any]]:
    """What the metrics say besides losses."""
    return [{name: value for name, value in row.items() if name != "loss"} for row in run.metrics()]


@pytest.mark.parametrize("damage", [cut, remove, empty, cut_line, cut_letter])
def test_damaged_metrics_are_named_and_computed_again(run: Run, trained: Run, damage: Callable[[Path], None]) -> None:
    damage(run.metrics_path)
    with pytest.raises(UserError) as error:
        run.metrics()
    assert_names_the_cure(error, run)
    with pytest.warns(UserWarning, match=rf"^{run.metrics_path}: was damaged \(.+\); .* again, but for the loss$"):
        train(run.config, root=run.folder.parent, progress=False)
    assert answers(run) == answers(trained)
    assert math.isnan(run.metrics()[-1]["loss"]), "of a batch that is gone"
    kept = damage in (remove, empty)
    assert math.isnan(run.metrics()[1]["loss"]) == kept
    train(run.config, root=run.folder.parent, progress=False)  # which has nothing more to say


class Stopped(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("damage", [cut, remove, empty, cut_line, cut_letter])
def test_damaged_metrics_of_an_interrupted_run_are_computed_again(
    tmp_path: Path, trained: Run, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained to the end without them, the run would be refused for good."""

    def stop(progressed: Progressed) -> None:
        if progressed.step == 2:
            raise Stopped

    monkeypatch.setattr(loop, "REPORT_STEPS", 1)
    with pytest.raises(Stopped):
        train(tiny(), root=tmp_path, report=stop)
    run = Run.of(tiny(), tmp_path)
    assert run.step == 2
    damage(run.metrics_path)
    with pytest.warns(UserWarning, match=rf"^{run.metrics_path}: was damaged \(.+\); what it said of steps .*2 was"):
        train(tiny(), root=tmp_path, progress=False)
    assert answers(run) == answers(trained) and run.metrics()[-1] == trained.metrics()[-1]
    assert run.checkpoint_path(6).read_bytes() == trained.checkpoint_path(6).read_bytes()
    assert train(tiny(), root=tmp_path, progress=False) == run


def test_the_metrics_of_another_run_are_not_believed(run: Run, trained: Run, tmp_path: Path) -> None:
    other = train(tiny(seed=1), root=tmp_path, progress=False)
    shutil.copy(other.metrics_path, run.metrics_path)
    with pytest.raises(UserError, match="the line of step 0 is not as it was recorded"):
        run.metrics()
    with pytest.warns(UserWarning, match="what it said of steps 0, 1, 2, and 1 more was computed again"):
        train(run.config, root=run.folder.parent, progress=False)
    assert answers(run) == answers(trained) != answers(other)


@pytest.mark.parametrize("damage", [cut, remove, empty])
def test_a_run_that_begins_anew_needs_no_metrics(run: Run, trained: Run, damage: Callable[[Path], None]) -> None:
    run.state_path.unlink()
    damage(run.metrics_path)
    train(run.config, root=run.folder.parent, progress=False)
    assert run.metrics_path.read_bytes() == trained.metrics_path.read_bytes()


@pytest.mark.parametrize("name", ["best", "000999", "000003", "6"])
def test_a_stray_file_among_the_checkpoints_is_no_step(run: Run, trained: Run, name: str) -> None:
    shutil.copy(run.checkpoint_path(1), run.folder / "checkpoints" / f"{name}.safetensors")
    assert run.steps == [0, 1, 2, 6]
    assert torch.equal(run.model().W_E, trained.model().W_E)


# ---- nothing damaged is used in silence


def flip(path: Path, at: float = 0.9) -> None:
    """Flip one bit among the weights."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def unsaid(path: Path) -> None:
    """Rewrite a file as it was before it said anything of itself but its step."""
    with safe_open(path, "pt") as opened:
        said = opened.metadata()
    kept = {"step": said["step"]} if path.name == "state.safetensors" else None
    save_file(load_file(path), path, kept)


OF_A_RUN = ("config.yaml", "made_with.json", "metrics.jsonl", "state.safetensors")
OF_A_RUN += tuple(f"checkpoints/{step:06d}.safetensors" for step in (0, 1, 2, 6))


def everything(run: Run) -> dict[str, Any]:
    """All that can be read of a finished run."""
    train(run.config, root=run.folder.parent, progress=False)
    rows = {f"{row['step']} {name}": str(row[name]) for row in run.metrics() for name in RECORDED}
    models = {step: run.model(step).state_dict() for step in run.steps}
    weights = {f"{step} {name}": tensor_digest(x) for step, found in models.items() for name, x in found.items()}
    return {"config": Run.at(run.folder).config, **rows, **weights}


@pytest.mark.promise("a flipped bit or a lost end, anywhere in a run", "noticed and named, or nothing is changed")
@pytest.mark.parametrize("name", OF_A_RUN)
def test_damage_anywhere_in_a_run_is_noticed_or_changes_nothing(
    run: Run, trained: Run, name: str, record_property: Callable[[str, Any], None]
) -> None:
    """In headers, too: what a file says of itself may become nothing, and never another number. Metrics are computed
    again, but for the losses."""
    path, whole, made_by, times, noticed = run.folder / name, everything(trained), made_with(trained.folder), 0, 0
    for how in damaged(path, 100):
        times += 1
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = everything(run)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 500, how
            noticed += 1
        else:
            assert all(name == "metrics.jsonl" and str(one.message).startswith(f"{path}: ") for one in said), how
            lost = {key for key in whole if key.endswith(" loss") and found[key] == "nan"} if said else set()
            assert {**found, **{key: whole[key] for key in lost}} == whole, how
            noticed += bool(said)
        told = made_with(run.folder)
        noticed += told == [{"step": 0}]
        assert told == [{"step": 0}] or told[0].items() >= made_by[0].items(), how
    # Comments and spaces of YAML say nothing, and of a finished training's state only the step is read.
    assert noticed > (0.45 if name in ("config.yaml", "state.safetensors") else 0.9) * times
    assert everything(run) == whole
    record_property("times", times)


@pytest.mark.parametrize("step", [0, 2, 6])
@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_a_finished_run_with_a_damaged_checkpoint_is_refused_by_name(
    run: Run, step: int, damage: Callable[[Path], None]
) -> None:
    """By whoever asks for it, and by who asks for the training; that an earlier one is there changes nothing."""
    path = run.checkpoint_path(step)
    damage(path)
    assert run.steps == [0, 1, 2, 6] and run.finished
    for use in (lambda: run.model(run.steps.index(step) - 4), lambda: train(run.config, root=run.folder.parent)):
        with pytest.raises(UserError) as error:
            use()
        assert_names(error, path, run.folder)
        assert len(str(error.value)) < 500


def test_the_checkpoint_of_another_step_or_run_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    other = train(tiny(seed=1), root=tmp_path, progress=False)
    shutil.copy(run.checkpoint_path(2), run.checkpoint_path(6))
    with pytest.raises(UserError, match=rf"^{run.checkpoint_path(6)}: is of step 2; put the file .* delete the folder"):
        run.model()
    shutil.copy(other.checkpoint_path(2), run.checkpoint_path(2))
    with pytest.raises(UserError, match=rf"000002\.safetensors: is of run {other.folder.name}; put the file"):
        run.model(2)


def test_a_run_of_before_is_used_and_what_it_says_is_checked(run: Run, trained: Run) -> None:
    for path in (run.state_path, *(run.checkpoint_path(step) for step in run.steps)):
        unsaid(path)
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    run.metrics_path.write_text(
        "".join(f"{json.dumps({**row, 'digest': None})}\n".replace(', "digest": null', "") for row in rows)
    )
    with pytest.warns(
        UserWarning, match=rf"^{run.metrics_path}: has no digest in some lines: these cannot be checked$"
    ):
        assert train(run.config, root=run.folder.parent, progress=False) == run == Run.at(run.folder)
        assert run.metrics()[1:] == trained.metrics()[1:]
    of_before = [{name: row[name] for name in row if name != "digest"} for row in rows]
    run.metrics_path.write_text("".join(f"{json.dumps({**row, 'digest': json_digest(row)})}\n" for row in of_before))
    assert run.metrics()[1:] == trained.metrics()[1:], "whose digests did not say of which run"
    assert all(torch.equal(run.model(step).W_E, trained.model(step).W_E) for step in run.steps)
    state = load_file(run.state_path)
    save_file({name: state[name] for name in state if ".exp_avg" not in name}, run.state_path, {"step": "2"})
    with pytest.raises(UserError) as error:
        train(run.config, root=run.folder.parent, progress=False)
    assert_names(error, run.state_path, run.folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(run: Run, value: float) -> None:
    weights = load_file(run.checkpoint_path(6))
    weights["embed.W_E"][1, 2] = value
    save_tensors(run.checkpoint_path(6), weights)
    for use in (run.model, lambda: train(run.config, root=run.folder.parent)):
        with pytest.raises(
            UserError, match=r"000006\.safetensors: embed\.W_E holds NaN or infinity; delete the folder"
        ):
            use()


@pytest.mark.parametrize(
    ("edited", "says"),
    [
        (lambda text: re.sub(r'"loss": (\d)', r'"loss": 1\1', text), "not as it was recorded"),
        (
            lambda text: text.replace('"forward_probability": 0.', '"forward_probability": 0.9'),
            "not as it was recorded",
        ),
        (lambda text: text.replace('"step": 2,', '"step": 3,'), "not as it was recorded"),
        (lambda text: text.replace('"step": 2,', '"step": "2",'), "not of a step"),
        (lambda text: text.replace("{", "[").replace("}", "]").replace(":", ","), "not of a step"),
        (lambda text: text.replace('"step": 1,', '"step": true,'), "not of a step"),
        (lambda text: "[" * 10**5, "nested too deeply"),
        (lambda text: '{"step": 0}\n', "the line of step 0 has no number as its loss"),
        (lambda text: re.sub(r'"loss": [^,]+(.*), "digest": "[^"]+"', r'"loss": [1]\1', text), "no number as its loss"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "one line for each checkpoint"),
        (lambda text: "".join(text.splitlines(keepends=True)[::-1]), "one line for each checkpoint"),
        (lambda text: text + text.splitlines(keepends=True)[-1], "one line for each checkpoint"),
    ],
)
def test_metrics_that_were_edited_are_refused_by_name_and_computed_again(
    run: Run, trained: Run, edited: Callable[[str], str], says: str
) -> None:
    text = run.metrics_path.read_text()
    run.metrics_path.write_text(edited(text))
    assert run.metrics_path.read_text() != text
    with pytest.raises(UserError, match=says) as error:
        run.metrics()
    assert_names_the_cure(error, run)
    with pytest.warns(UserWarning, match=says):
        train(run.config, root=run.folder.parent, progress=False)
    assert answers(run) == answers(trained)


@pytest.mark.promise("a FIFO in place of a file of a run", "refused by name, and not waited for")
@pytest.mark.parametrize("name", [name for name in OF_A_RUN if name != "made_with.json"])
def test_a_fifo_among_the_files_of_a_run_is_refused_by_name(run: Run, name: str) -> None:
    (run.folder / name).unlink()
    os.mkfifo(run.folder / name)
    outcome = outcome_of(lambda: everything(run))
    assert outcome.startswith(f"{run.folder / name}: ") and "it is no regular file" in outcome


def test_an_edited_config_is_refused_by_name(run: Run) -> None:
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("steps: 6", "steps: 60"))
    edited = TrainConfig.from_yaml(path).digest()
    says = rf"^{path}: is the config of run {edited}, and the folder is named {run.folder.name}; undo what was edited"
    for use in (
        lambda: Run.at(run.folder),
        lambda: Run.open(run.folder.name, run.folder.parent),
        lambda: list(stored_runs(run.folder.parent)),
        lambda: train(run.config, root=run.folder.parent),
    ):
        with pytest.raises(UserError, match=says):
            use()


def test_a_run_is_opened_by_its_folder_by_whatever_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder)
    assert Run.at(".").config == run.config
    (run.folder.parent / "link").symlink_to(run.folder)
    assert Run.at(run.folder.parent / "link").config == run.config


def with_state(run: Run, step: str, changed: dict[str, torch.Tensor | None]) -> None:
    """Put a state into place that says what it holds, as no damage would: what it says is wrong."""
    state = {name: tensor for name, tensor in (load_file(run.state_path) | changed).items() if tensor is not None}
    save_tensors(run.state_path, state, {"step": step})


FIRST = "optimizer.0.exp_avg"
COUNTS = {f"optimizer.{i}.step": torch.tensor(2.0) for i in range(8)}
"""Of all parameters, as at step 2."""


@pytest.mark.parametrize(
    ("step", "changed", "says"),
    [
        ("2", {}, "at step 2, and its moments at 6"),
        ("0", {}, "moments of 8 parameters, not of 0"),
        ("2", COUNTS | {FIRST: None}, "moments of parameter 0 are not of its shape"),
        ("2", COUNTS | {FIRST: torch.zeros(3)}, "moments of parameter 0 are not of its shape"),
        ("2", COUNTS | {FIRST: torch.zeros(1)}, "moments of parameter 0 are not of its shape"),
        ("2", COUNTS | {"optimizer.3.step": torch.tensor(1.0)}, "at step 2, and its moments at 1"),
        (
            "2",
            COUNTS | {f"optimizer.3.{name}": None for name in ("step", "exp_avg", "exp_avg_sq")},
            "of 7 parameters, not of 8",
        ),
        ("2", COUNTS | {"optimizer.9.exp_avg": torch.zeros(1)}, "of 9 parameters, not of 8"),
        ("2", COUNTS | {"model.embed.W_E": torch.full((15, 8), float("nan"))}, "embed.W_E holds NaN or infinity"),
        ("2", COUNTS | {"optimizer.1.exp_avg_sq": torch.full((2, 8, 4), float("inf"))}, "exp_avg_sq holds NaN"),
        ("2", COUNTS | {"generator": torch.zeros(3, dtype=torch.uint8)}, "does not fit"),
        ("7", {}, "at step 7 of 6"),
        ("-1", {}, "at step -1 of 6"),
        ("many", {}, "invalid literal"),
    ],
)
def test_a_state_that_contradicts_itself_is_never_resumed(
    run: Run, step: str, changed: dict[str, torch.Tensor | None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_state(run, step, changed)
    monkeypatch.setattr(mdm_interp.training.trainees, "drawn_loss", None)  # no step is taken
    with pytest.raises(UserError, match=says) as error:
        train(run.config, root=run.folder.parent, progress=False)
    assert_names(error, run.state_path, run.folder)


def test_a_state_of_another_run_or_with_a_flipped_bit_is_never_resumed(run: Run, tmp_path: Path) -> None:
    set_back(run)
    flip(run.state_path, 0.5)
    with pytest.raises(UserError, match="is not as it was saved") as error:
        train(run.config, root=run.folder.parent, progress=False)
    assert_names(error, run.state_path, run.folder)
    other = train(tiny(seed=1), root=tmp_path, progress=False)
    set_back(other)
    state = load_file(other.state_path)
    save_tensors(run.state_path, state, {"step": "2", "run": other.folder.name})
    with pytest.raises(UserError, match=f"it is of run {other.folder.name}") as error:
        train(run.config, root=run.folder.parent, progress=False)
    assert_names(error, run.state_path, run.folder)


def flip_step(path: Path, old: bytes, new: bytes) -> None:
    """Change what a file says of its step: no tensor of it is another."""
    content = path.read_bytes()
    assert content.count(b'"step":"%s"' % old) == 1
    path.write_bytes(content.replace(b'"step":"%s"' % old, b'"step":"%s"' % new))


def test_what_a_file_says_of_its_step_is_in_its_digest(run: Run) -> None:
    flip_step(run.state_path, b"6", b"2")
    for use in (lambda: run.step, lambda: run.finished, lambda: train(run.config, root=run.folder.parent)):
        with pytest.raises(UserError, match="what it says of itself is not as it was saved") as error:
            use()
        assert_names(error, run.state_path, run.folder)
    flip_step(run.state_path, b"2", b"6")
    flip_step(run.checkpoint_path(2), b"2", b"6")
    with pytest.raises(UserError, match="what it says of itself is not as it was saved") as error:
        run.model(2)
    assert_names(error, run.checkpoint_path(2), run.folder)


@pytest.mark.parametrize("damage", [flip, remove])
def test_a_run_does_not_go_on_from_damaged_checkpoints(run: Run, damage: Callable[[Path], None]) -> None:
    set_back(run)
    damage(run.checkpoint_path(1))
    with pytest.raises(UserError) as error:
        train(run.config, root=run.folder.parent, progress=False)
    assert_names(error, run.checkpoint_path(1), run.folder)


# ---- writing


def test_save_tensors_keeps_any_tensor(tmp_path: Path) -> None:
    table = torch.arange(6.0).view(2, 3)
    tensors = {"transposed": table.T, "weight": torch.nn.Parameter(table), "part": table[:, 1], "none": torch.zeros(0)}
    save_tensors(tmp_path / "new" / "t.safetensors", tensors, {"step": "3"})
    stored, metadata = load_tensors(tmp_path / "new" / "t.safetensors")
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)
    assert metadata.keys() == {"step", "digests", "digest"} and metadata["step"] == "3"


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
    assert torch.equal(load_tensors(path)[0]["x"], torch.ones(2))


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path: Path) -> None:
    """Safetensors writes metadata in any order, and its header has to keep its length in bytes."""
    tensors = {'ü "\\': torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    said = {"step": "3", "run": "ü\x01\n", "format": "pt", "more": "…"}
    for i in range(20):
        save_tensors(tmp_path / f"{i}.safetensors", tensors, said)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    stored, metadata = load_tensors(tmp_path / "0.safetensors")
    assert metadata.items() >= said.items()
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_any_bit_of_a_tensor_its_shape_and_its_dtype_are_in_its_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3)
    digests = {tensor_digest(tensor), tensor_digest(tensor.view(3, 2)), tensor_digest(tensor.view(torch.uint8))}
    size = tensor.element_size()
    for bit in range(tensor.numel() * size * 8):
        flipped = tensor.clone()
        flipped.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        digests.add(tensor_digest(flipped))
    assert len(digests) == tensor.numel() * size * 8 + (2 if dtype == torch.uint8 else 3)
    assert tensor_digest(tensor.T.contiguous().T) == tensor_digest(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_digest_of_weights_depends_on_every_bit_of_them(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(8, 5, generator=generator).to(dtype), "b": torch.ones(7, dtype=dtype)}
    known = {whole := weights_digest(weights)}
    for tensor in weights.values():
        flat = tensor.view(-1).view(torch.uint8)
        for at in range(len(flat)):
            for bit in range(8):
                flat[at] ^= 1 << bit
                known.add(weights_digest(weights))
                flat[at] ^= 1 << bit
    assert len(known) == 1 + 8 * dtype.itemsize * (40 + 7)
    others = {
        "negative": {name: -tensor for name, tensor in weights.items()},
        "two negative": {**weights, "b": torch.tensor([-1, -1, 1, 1, 1, 1, 1], dtype=dtype)},
        "exchanged": {**weights, "a": weights["a"].flip(0)},
        "another shape": {**weights, "a": weights["a"].view(5, 8)},
        "other names": {"b": weights["a"], "a": weights["b"]},
        "fewer": {"a": weights["a"]},
    }
    for name, other in others.items():
        assert weights_digest(other) not in known, name
        known.add(weights_digest(other))
    assert weights_digest({**weights, "a": weights["a"].T.contiguous().T}) == whole


def test_a_digest_of_weights_depends_on_all_of_a_large_tensor() -> None:
    large = torch.zeros(2**20 + 3)
    known = {weights_digest({"a": large})}
    for at in (0, 2**20 - 1, 2**20, 2**20 + 2):
        large[at] = 1.0
        known.add(weights_digest({"a": large}))
    assert len(known) == 5


def test_what_is_not_finite_is_named() -> None:
    whole = {"ids": torch.arange(3), "none": torch.zeros(0), "one": torch.tensor(1.0), "w": torch.ones(2, 2)}
    assert not_finite(whole) is None
    for value in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert not_finite(whole | {"bad": torch.tensor([0, value, 1], dtype=dtype)}) == "bad"


def test_recorded_rows_replace_those_of_their_steps_and_leave_the_others(tmp_path: Path) -> None:
    """Of two processes that train a run, the one behind neither loses what the other recorded nor is lost by it."""

    def row(step: int, loss: float) -> dict[str, Any]:
        return {"step": step, **dict.fromkeys(RECORDED, 0.5), "loss": loss}

    run, rows = Run.of(tiny(), tmp_path), [row(step, float(step)) for step in (0, 1, 5, 9)]
    run.record(rows)
    run.record([rows[0], row(1, 7.0)])
    assert [(row["step"], row["loss"]) for row in run.metrics()] == [(0, 0.0), (1, 7.0), (5, 5.0), (9, 9.0)]
    run.record([row(2, 8.0)])
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 5, 9]
