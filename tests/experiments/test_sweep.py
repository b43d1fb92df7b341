"""Sweeps: their axes, what becomes of their runs, and the table, whoever computes and whatever befalls them."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from cli_helpers import Ended, assert_refused, contents
from cluster_helpers import Cluster
from helpers import TINY_DEMO, one_after_the_other
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.testing import assert_close

from mdm_interp import parallel
from mdm_interp.config import TrainConfig, one_line
from mdm_interp.errors import UserError
from mdm_interp.experiments import sweep as module
from mdm_interp.experiments.analysis import ENTRY_POINTS
from mdm_interp.experiments.results import Result, TrainedOrigin
from mdm_interp.experiments.scope import metrics_at
from mdm_interp.experiments.sweep import RandomPoints, Sweep, run_sweep
from mdm_interp.training import loop
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run

BASE: dict[str, Any] = {
    "model": {"d_model": 8, "n_heads": 2},
    "facts": {"n_entities": 6, "n_filler": 4, "seq_len": 5},
    "steps": 12,
    "batch_size": 4,
    "n_checkpoints": 4,
}


def sweep_of(**fields: Any) -> Sweep:
    return Sweep.model_validate({"base": BASE, **fields})


# ---- axes


def test_the_runs_are_the_product_of_the_axes() -> None:
    lr = {"n": 2, "seed": 5, "over": {"lr": {"log_uniform": [1e-4, 1e-2]}}}
    points = [{"objective": "causal"}, {"objective": "any_order", "facts.seq_len": 7}]
    sweep = sweep_of(grid={"model.position": ["rope", "alibi"], "seed": [0, 1]}, random=lr, points=points)
    assert sweep.axes == ["model.position", "seed", "lr", "objective", "facts.seq_len"]
    found = [sweep.at(config) for config in sweep.configs]
    rates = list(dict.fromkeys(point["lr"] for point in found))
    expected = itertools.product(["rope", "alibi"], [0, 1], rates, [("causal", 5), ("any_order", 7)])
    assert found == [
        dict(zip(sweep.axes, (position, seed, rate, *point), strict=True)) for position, seed, rate, point in expected
    ]
    assert len(rates) == 2 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    for config in sweep.configs:
        assert config.model.attention == ("causal" if config.objective == "causal" else "bidirectional")
        assert (config.model.n_ctx, config.model.d_vocab) == (config.facts.seq_len, config.facts.d_vocab)


FIELDS = {
    "seed": st.integers(0, 20),
    "steps": st.integers(1, 50),
    "lr": st.floats(1e-5, 1.0),
    "model.d_model": st.integers(1, 8).map(lambda n: 4 * n),
    "facts.n_filler": st.integers(1, 9),
    "model.position": st.sampled_from(["alibi", "none", "learned", "rope"]),
}


@st.composite
def axes(draw: st.DrawFn) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
    """Some fields for a grid, and others for points."""
    names = draw(st.permutations(sorted(FIELDS)))
    cut = draw(st.integers(0, 3))
    grid = {name: draw(st.lists(FIELDS[name], min_size=1, max_size=3)) for name in names[:cut]}
    listed = st.fixed_dictionaries({}, optional={name: FIELDS[name] for name in names[cut : cut + 2]})
    return grid, draw(st.lists(listed, min_size=1, max_size=3))


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(drawn=axes())
def test_every_combination_is_a_run_once(drawn: tuple[dict[str, list[Any]], list[dict[str, Any]]]) -> None:
    grid, points = drawn
    expected = dict[str, TrainConfig]()
    for values in itertools.product(*grid.values()):
        for point in points:
            fields: dict[str, Any] = {**BASE, "model": dict(BASE["model"]), "facts": dict(BASE["facts"])}
            for name, value in [*zip(grid, values, strict=True), *point.items()]:
                section, _, last = name.rpartition(".")
                (fields[section] if section else fields)[last] = value
            (alone,) = Sweep.model_validate({"base": fields}).configs
            expected[alone.digest()] = alone
    sweep = sweep_of(grid=grid, points=points)
    assert sweep.configs == list(expected.values())


def test_more_draws_begin_with_the_same_ones_and_fields_are_drawn_by_themselves() -> None:
    lr, depth = {"log_uniform": (1e-4, 1e-2)}, {"integers": (1, 3)}
    few = RandomPoints.model_validate({"n": 3, "over": {"lr": lr}}).points()
    many = RandomPoints.model_validate({"n": 40, "over": {"model.n_layers": depth, "lr": lr}}).points()
    assert [point["lr"] for point in few] == [point["lr"] for point in many[:3]]
    assert {point["model.n_layers"] for point in many} == {1, 2, 3}
    other = RandomPoints.model_validate({"n": 3, "seed": 1, "over": {"lr": lr}}).points()
    assert not {point["lr"] for point in few} & {point["lr"] for point in other}
    uniform = RandomPoints.model_validate(
        {"n": 50, "over": {"x": {"uniform": (2, 3)}, "y": {"choice": ["a", "b"]}}}
    ).points()
    assert all(2 <= point["x"] <= 3 for point in uniform) and {point["y"] for point in uniform} == {"a", "b"}


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a field that is not there": ({"grid": {"model.d_modle": [8]}}, ["model.d_modle", "correct its spelling", "=8"]),
    "a section that is none": (
        {"grid": {"lr.of": [8], "seed": [1]}, "base": {**BASE, "lr": 1}},
        ["lr.of: there is no such field, as lr has none; correct its name"],
    ),
    "a value that is none": ({"grid": {"facts.gap": [2, 9]}}, ["facts.gap: 9", "facts.gap=9"]),
    "what does not go together": ({"grid": {"model.n_heads": [1, 3]}}, ["n_heads: 3", "model.n_heads=3"]),
    "a field twice": ({"grid": {"lr": [1]}, "points": [{"lr": 2}]}, ["lr: is given by two axes"]),
    "a field and its section": ({"grid": {"facts": [{}], "facts.gap": [2]}}, ["facts.gap: is given by two axes"]),
    "no values": ({"grid": {"lr": []}}, ["grid.lr", "at least 1"]),
    "an axis that is not there": ({"gird": {"lr": [1]}}, ["gird", "no such field"]),
    "no distribution": ({"random": {"n": 1, "over": {"lr": {}}}}, ["random.over.lr", "expected one of uniform"]),
    "bounds": ({"random": {"n": 1, "over": {"lr": {"uniform": [2, 1]}}}}, ["uniform: 2.0 is above 1.0; swap"]),
    "a logarithm": (
        {"random": {"n": 1, "over": {"lr": {"log_uniform": [0, 1]}}}},
        ["log_uniform: 0.0 has no logarithm; use a number above 0"],
    ),
    "too many points": (
        {"random": {"n": 10**8, "over": {"lr": {"uniform": [1, 2]}}}},
        ["its 100000000 points are more"],
    ),
    "too large a grid": (
        {"grid": {f"facts.x{i}": [*range(10)] for i in range(9)}},
        ["grid: its 1000000000 points are"],
    ),
    "bounds without end": (
        {"random": {"n": 1, "over": {"lr": {"uniform": [1, float("inf")]}}}},
        ["uniform.1", "got inf"],
    ),
    "a measure": ({"measures": ["route_corelation"]}, ["'route_corelation'", "route_correlation"]),
    "a measure of checkpoints": ({"measures": ["large_model_routes"]}, ["'large_model_routes'"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_trained(
    mdm_interp: Callable[..., Ended], tmp_path: Path, name: str
) -> None:
    fields, says = MISTAKES[name]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"base": BASE, **fields}))
    before = contents(tmp_path)
    ended = mdm_interp("sweep", "bad.yaml")
    assert_refused(ended, *says)
    assert len(ended.err) < 500
    assert contents(tmp_path) == before


def test_a_long_point_is_cut_short() -> None:
    with pytest.raises(ValidationError) as error:
        sweep_of(points=[{"model.n_heads": 3, "facts.gap": [2] * 500}])
    assert len(one_line(error.value)) < 500


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--executor slurm", ["--executor: 'slurm' is none of local, dask"]),
        ("--executor dask", ["--executor: dask needs a scheduler", "--address"]),
        ("--address tcp://a:1", ["--address: 'tcp://a:1'", "--executor dask"]),
        ("--executor dask --address tcp://a:1 --workers 2", ["--workers: 2", "leave it out"]),
        ("--executor dask --address tcp://127.0.0.1:9", ["no Dask scheduler answers at 'tcp://127.0.0.1:9'"]),
        ("--executor dask --address nonsense://x", ["no Dask scheduler answers at 'nonsense://x'"]),
    ],
)
@pytest.mark.parametrize("command", ["sweep good.yaml", "reproduce"])
def test_an_executor_that_is_none_is_one_line(
    mdm_interp: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    says: list[str],
    command: str,
) -> None:
    assert parallel.ANSWERS_WITHIN <= 10
    monkeypatch.setattr(parallel, "ANSWERS_WITHIN", 1)
    (tmp_path / "good.yaml").write_text(yaml.safe_dump({"base": BASE}))
    before = contents(tmp_path)
    assert_refused(mdm_interp(*command.split(), *options.split()), *says)
    assert contents(tmp_path) == before


# ---- runs

STUDY = """
import os
import time
from pathlib import Path

import plotly.graph_objects as go

from mdm_interp.errors import UserError
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.scope import stages
from mdm_interp.stats.summary import Summary

HERE = Path(__file__).parent


def measure(run, step):
    if (HERE / "fails").exists() and run.config.seed == 1:
        raise UserError("planted: a mistake; correct it")
    if (HERE / "dies").exists() and run.config.seed == 1:
        os._exit(1)
    with open(HERE / "log", "a") as log:
        log.write(f"{run.folder.name}\\n")
    return [{"side": side, "seen": run.config.seed} for side in ("left", "right")]


def at_the_end(run):
    return stages(run, ("end",))


ANALYSIS = Analysis(
    name="planted",
    question="Planted?",
    configs=lambda seeds: [],
    measure=measure,
    when=at_the_end,
    summarize=lambda result: Summary.of(result.frame, (), ("seed",)),
    takeaway=lambda result: "Planted.",
    draw=lambda result: go.Figure(),
)
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an installed package with an analysis that logs what it measures, and fails for seed 1 where there
    is a file `fails`."""
    site = tmp_path / "site"
    folder = site / "planted_study"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "study.py").write_text(STUDY)
    info = site / "planted_study-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-study\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nplanted = planted_study\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.startswith("planted_study")]:
        del sys.modules[name]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "side_by_side", one_after_the_other)


def measured(planted: Path) -> Counter[str]:
    """How often each run was measured."""
    log = planted / "log"
    return Counter(log.read_text().split()) if log.exists() else Counter()


def table(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "sweep.parquet")


@pytest.mark.usefixtures("in_this_process")
def test_the_table_holds_what_was_measured_at_each_point(planted: Path, tmp_path: Path) -> None:
    sweep = sweep_of(grid={"model.position": ["rope", "alibi"], "seed": [0, 1], "facts.gap": [2, [2, 3]]})
    sweep = sweep.model_copy(update={"measures": ["planted"]})
    outcomes = run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs")
    assert [outcome.run for outcome in outcomes] == [config.digest() for config in sweep.configs]
    assert not any(outcome.reason for outcome in outcomes)
    found = table(tmp_path / "out")
    assert list(found.columns[:4]) == ["model.position", "seed", "facts.gap", "measure"]
    assert {str(found[name].dtype) for name in ("seed", "seen", "step")} == {"Int64"}
    for config in sweep.configs:
        run = Run.of(config, tmp_path / "runs")
        gap = "[2, 3]" if isinstance(config.facts.gap, tuple) else "2"
        rows = found[
            (found["model.position"] == config.model.position)
            & (found["seed"] == config.seed)
            & (found["facts.gap"] == gap)
        ]
        assert set(rows["run"]) == {config.digest()}
        end = rows[(rows["measure"] == "metrics") & (rows["stage"] == "end")]
        assert end["reverse_probability"].item() == pytest.approx(metrics_at(run, 12)["reverse_probability"], rel=1e-5)
        own = rows[rows["measure"] == "planted"]
        assert own["side"].tolist() == ["left", "right"] and own["seen"].tolist() == [config.seed] * 2


def test_fields_that_files_leave_out_have_their_values_on_the_axes() -> None:
    points = [{}, {"mask_rate": 0.5}, {"facts.noise": 0.25, "facts.gap": [2, 3]}]
    sweep = sweep_of(points=points)
    assert [sweep.at(config) for config in sweep.configs] == [
        {"mask_rate": None, "facts.noise": 0.0, "facts.gap": 2},
        {"mask_rate": 0.5, "facts.noise": 0.0, "facts.gap": 2},
        {"mask_rate": None, "facts.noise": 0.25, "facts.gap": [2, 3]},
    ]


@pytest.mark.usefixtures("in_this_process")
def test_the_result_of_each_measure_is_beside_the_table(planted: Path, tmp_path: Path) -> None:
    sweep = sweep_of(grid={"seed": [1, 2]}, measures=["planted"])
    run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs")
    result = Result.load(tmp_path / "out" / "planted.json")
    digests = [config.digest() for config in sweep.configs]
    assert isinstance(result.origin, TrainedOrigin) and result.origin.runs == digests and result.seeds == [1, 2]
    assert result.origin.first_seed == [sweep.configs[0].model_dump(mode="json")]
    own = table(tmp_path / "out").query("measure == 'planted'")
    assert result.frame[["run", "side"]].to_numpy().tolist() == own[["run", "side"]].to_numpy().tolist()


@pytest.mark.usefixtures("in_this_process")
def test_demo_checkpoints_are_trained_and_measured_along_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = TINY_DEMO.model_copy(update={"world": "varied"}).model_dump(exclude={"n_control"})
    fields = {"kind": "demos", "base": base, "grid": {"n_control": [1, 3]}, "measures": ["large_model_prediction"]}
    sweep, out = Sweep.model_validate(fields), tmp_path / "out"
    outcomes = run_sweep(sweep, out, root=tmp_path / "runs", workers=1)
    assert [(outcome.run, outcome.reason) for outcome in outcomes] == [(one.digest(), "") for one in sweep.configs]
    table = pd.read_parquet(out / "sweep.parquet")
    assert set(table["measure"]) == {"large_model_prediction"}
    assert {"exact match", "rank"} < set(table["large_model_prediction.measure"])
    names = {1: "demo llada, varied, 17% both ways", 3: "demo llada, varied, 50% both ways"}
    assert dict(table.groupby("n_control")["checkpoint"].unique().explode()) == names
    result = Result.load(out / "large_model_prediction.json")
    assert result.frame["checkpoint"].unique().tolist() == list(names.values())
    monkeypatch.setattr(module, "side_by_side", pytest.fail)
    assert run_sweep(sweep, out, root=tmp_path / "runs", workers=1) == outcomes


def test_a_sweep_of_demos_measures_what_is_measured_of_demos(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"kind": "demos", "base": {"steps": 1}}
    for measure in ("route_correlation", "twin"):
        with pytest.raises(UserError, match=f"no analysis of demos '{measure}'; there are large_model_"):
            run_sweep(Sweep.model_validate({**fields, "measures": [measure]}), tmp_path)
    with pytest.raises(ValidationError, match="n_control: 16 of 16 families leave none to test"):
        Sweep.model_validate({**fields, "grid": {"n_control": [16]}})


def test_a_sweep_that_is_repeated_or_extended_goes_on(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(grid={"seed": [0, 1]}, measures=["planted"])
    first = run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs")
    before = (tmp_path / "out" / "sweep.parquet").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "side_by_side", None)
        assert run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs") == first
    assert (tmp_path / "out" / "sweep.parquet").read_bytes() == before
    more = sweep_of(grid={"seed": [1, 2]}, measures=["planted"])
    run_sweep(more, tmp_path / "out", root=tmp_path / "runs")
    assert sorted(table(tmp_path / "out")["seed"].unique()) == [1, 2]
    assert set(measured(planted).values()) == {1} and len(measured(planted)) == 3
    run_sweep(sweep_of(grid={"seed": [0, 1]}), tmp_path / "bare", root=tmp_path / "runs")
    assert set(table(tmp_path / "bare")["measure"]) == {"metrics"}


@pytest.mark.usefixtures("in_this_process")
def test_a_sweep_interrupted_between_runs_measures_none_twice(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(grid={"seed": [0, 1, 2]}, measures=["planted"])
    recorded, calls = module._recorded, itertools.count()

    def interrupted(run: Run) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return recorded(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_recorded", interrupted)
        run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs", workers=1)
    assert len(measured(planted)) == 2
    monkeypatch.setattr(loop, "_train_together", None)  # all three were trained
    run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs", workers=1)
    assert len(measured(planted)) == 3 and set(measured(planted).values()) == {1}


def broken_run(sweep: Sweep, at: int, root: Path) -> Run:
    """Train a run of a sweep, and damage it so that it cannot be resumed."""
    run = train(sweep.configs[at], root=root, progress=False)
    run.state_path.write_bytes(b"damaged")
    return run


@pytest.mark.usefixtures("in_this_process")
def test_what_fails_is_named_and_leaves_the_rest(
    mdm_interp: Callable[..., Ended], planted: Path, tmp_path: Path
) -> None:
    """One run cannot be trained, one cannot be measured; all three are of one ensemble."""
    content = {"base": BASE, "grid": {"seed": [0, 1, 2]}, "measures": ["planted"]}
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(content))
    broken = broken_run(Sweep.model_validate(content), 2, tmp_path / "runs")
    (planted / "fails").touch()
    ended = mdm_interp("sweep", "three.yaml", "--device", "cpu", "--workers", "1")
    assert (ended.code, ended.out) == (1, "sweeps/three/sweep.parquet\n")
    failed = [line for line in ended.err.splitlines() if line.startswith("failed: ")]
    other = Sweep.model_validate(content).configs[1].digest()
    assert any(
        line.startswith(f"failed: {broken.folder.name} at seed=2: {broken.state_path}: not a") for line in failed
    )
    assert f"failed: {other} at seed=1: planted: planted: a mistake; correct it" in failed
    assert len(failed) == 2
    assert ended.err.splitlines()[-1] == "2 of 3 runs failed; the same command tries them again"
    found = table(tmp_path / "sweeps" / "three")
    assert set(zip(found["seed"], found["measure"], strict=True)) == {(0, "metrics"), (0, "planted"), (1, "metrics")}
    (planted / "fails").unlink()
    broken.delete()
    ended = mdm_interp("sweep", "three.yaml", "--device", "cpu", "--workers", "1")
    assert ended.code == 0 and "failed" not in ended.err
    assert set(measured(planted).values()) == {1} and len(measured(planted)) == 3


@pytest.mark.usefixtures("in_this_process")
def test_the_table_can_be_read_while_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Table, "SECONDS", 0.0)
    lengths, together = list[int](), module._run_together

    def watched(*task: Any) -> Any:
        lengths.append(len(table(tmp_path / "out")))
        return together(*task)

    monkeypatch.setattr(module, "_run_together", watched)
    sweep = sweep_of(grid={"model.d_model": [8, 16, 32]})
    monkeypatch.setattr(module.time, "monotonic", itertools.count(step=1000).__next__)
    run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs", workers=1)
    assert lengths == [0, 2, 4] and len(table(tmp_path / "out")) == 6


# ---- processes


@pytest.mark.slow
def test_processes_here_train_and_measure_every_run_once(planted: Path, tmp_path: Path) -> None:
    sweep = sweep_of(grid={"seed": [0, 1, 2], "model.position": ["rope", "alibi"]}, measures=["planted"])
    outcomes = run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs", workers=2)
    assert [outcome.reason for outcome in outcomes] == [""] * 6
    assert measured(planted) == Counter(config.digest() for config in sweep.configs)
    assert len(table(tmp_path / "out")) == 6 * (2 + 2)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.promise("a worker of a sweep that dies", "its run alone fails, by name; the others are done")
def test_a_process_that_dies_here_fails_its_run_alone(planted: Path, tmp_path: Path) -> None:
    (planted / "dies").touch()
    sweep = sweep_of(grid={"seed": [0, 1, 2]}, measures=["planted"])
    outcomes = run_sweep(sweep, tmp_path / "out", root=tmp_path / "runs", workers=2)
    failed = [outcome for outcome in outcomes if outcome.reason]
    assert {outcome.run for outcome in failed} == {config.digest() for config in sweep.configs if config.seed == 1}
    assert all(outcome.reason.startswith("BrokenProcessPool: ") for outcome in failed)
    assert set(measured(planted).values()) == {1} and len(measured(planted)) == 2
    assert set(table(tmp_path / "out")["seed"]) == {0, 2}


def wait_until(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_cluster_finishes_every_run_once_though_a_worker_is_killed_and_one_is_late(
    planted: Path, tmp_path: Path
) -> None:
    """Runs of different shapes, each a task of its own: the first two are long, and one of their workers is killed."""
    grid = {"model.d_model": [8, 12, 16, 20, 24, 28], "model.n_layers": [2]}
    sweep = sweep_of(base={**BASE, "steps": 150}, grid=grid, measures=["planted"])
    root, out = tmp_path / "runs", tmp_path / "out"
    with Cluster(tmp_path) as cluster:
        first = cluster.worker()
        outcomes = list[Any]()
        thread = threading.Thread(
            target=lambda: outcomes.extend(run_sweep(sweep, out, root=root, workers=cluster.address))
        )
        thread.start()
        wait_until(lambda: any((root / config.digest() / "state.safetensors").exists() for config in sweep.configs))
        first.kill()  # in mid-run: a state is saved, and the run is not finished
        assert not all(Run.of(config, root).finished for config in sweep.configs)
        cluster.worker()  # late
        cluster.worker()
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert [outcome.reason for outcome in outcomes] == [""] * 6
    assert [outcome.run for outcome in outcomes] == [config.digest() for config in sweep.configs]
    assert measured(planted) == Counter(config.digest() for config in sweep.configs)
    assert Counter(table(out)["run"]) == {config.digest(): 4 for config in sweep.configs}
    for config in sweep.configs:
        undisturbed = train(config, root=tmp_path / "alone", progress=False)
        run = Run.of(config, root)
        assert run.finished and [row["step"] for row in run.metrics()] == run.steps == undisturbed.steps
        for name, weight in run.model().state_dict().items():
            assert_close(weight, undisturbed.model().state_dict()[name], atol=1e-6, rtol=0)


def test_a_config_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(UserError, match=r"config\.yaml: base: missing; add it"):
        Sweep.from_yaml(tmp_path / "config.yaml")
