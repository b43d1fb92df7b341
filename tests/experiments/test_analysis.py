"""Analyses: how they are found, when they measure again, and that those that are here say what their rows say."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from helpers import TINY_DEMO, train_here, with_summary

import analyses
from analyses import evidence_growth, gradient_alignment, reversal_curse, route_correlation
from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.errors import UserError
from mdm_interp.experiments import analysis as analysis_module
from mdm_interp.experiments import findings, grids, subjects
from mdm_interp.experiments.analysis import ENTRY_POINTS, Analysis, CheckpointAnalysis, discover, ledger
from mdm_interp.experiments.claims import save_ledger
from mdm_interp.experiments.grids import FULL_SEEDS
from mdm_interp.experiments.results import Result, TrainedOrigin, tidy
from mdm_interp.experiments.scope import stages
from mdm_interp.experiments.subjects import Lab
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.provenance import environment, machine, provenance, stamp, versions
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Entry, Summary
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures"
MODULES = {module.ANALYSIS.name: module for module in (reversal_curse, evidence_growth, route_correlation)}
MODULES["gradient_alignment"] = gradient_alignment
END = {"stage": "end"}
BUILTIN = [analysis.name for analysis in discover()]
COLUMNS = {
    "reversal_curse": {"world", "n_heads", "setting", "variant", "seed", "run", "chance", "step"},
    "evidence_growth": {"variant", "seed", "run", "step", "query", "margin", "rank", "chance_rank", "evidence"},
    "route_correlation": {"kind", "variant", "seed", "run", "step", "measured", "distance", "spectrum", "isotropic"},
    "gradient_alignment": {"variant", "seed", "run", "step", "component", "mean_gradient", "matched", "storage_term"},
}
SAME_COLUMNS_IN_EVERY_ROW = ("reversal_curse", "gradient_alignment")

PLANTED = """
from mdm_interp import Analysis, Summary

ANALYSIS = Analysis(
    name={name!r},
    question="Planted?",
    configs=lambda seeds: [],
    measure=lambda run, step: [],
    summarize=lambda result: Summary(),
    takeaway=lambda result: "Planted.",
    draw=lambda result: None,
    order={order},
)
"""


def tiny(seed: int = 0) -> TrainConfig:
    facts = FactConfig(n_entities=6, n_filler=4, seq_len=5)
    model = ModelConfig(d_model=8, n_heads=2, d_vocab=facts.d_vocab, n_ctx=facts.seq_len)
    return TrainConfig(model=model, facts=facts, steps=4, batch_size=4, n_checkpoints=3, seed=seed)


# ---- discovery


def forget(names: set[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)
        package, _, module = name.rpartition(".")
        if package in sys.modules and hasattr(sys.modules[package], module):
            delattr(sys.modules[package], module)


@pytest.fixture
def fresh_modules() -> Iterator[None]:
    """Modules that a test imports are forgotten after it."""
    before = set(sys.modules)
    yield
    forget({name for name in set(sys.modules) - before if "planted" in name})


def plant(path: Path, name: str = "planted", order: int = 15) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PLANTED.format(name=name, order=order))


def test_the_report_shows_thirteen_figures_and_folds_the_others_below_them() -> None:
    below = {analysis.name: analysis.detail_of for analysis in discover()}
    shown = {name for name, main in below.items() if not main}
    assert len(shown) == 13 and set(below.values()) <= {"", *shown}


def test_the_analyses_are_found_in_the_order_of_their_figures() -> None:
    orders = [analysis.order for analysis in discover()]
    assert orders == sorted(orders)
    assert {path.stem for path in (ROOT / "analyses").glob("[a-z]*.py")} == set(BUILTIN)


@pytest.mark.usefixtures("fresh_modules")
def test_a_module_put_into_the_folder_is_found_without_an_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "planted_analysis.py", order=7)
    (tmp_path / "planted_helper.py").write_text("ANALYSIS = 'a module that only happens to have such a name'\n")
    monkeypatch.setattr(analyses, "__path__", [*analyses.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    names = [analysis.name for analysis in discover()]
    assert names == [BUILTIN[0], "planted", *BUILTIN[1:]]


@pytest.mark.usefixtures("fresh_modules")
@pytest.mark.parametrize("entry", ["planted_study", "planted_study.one"], ids=["a package", "a module"])
def test_an_installed_package_of_another_study_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    plant(tmp_path / "planted_study" / "one.py", name="planted", order=1)
    (tmp_path / "planted_study" / "__init__.py").touch()
    info = tmp_path / "planted_study-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-study\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nplanted = {entry}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    names = [analysis.name for analysis in discover()]
    assert names == ["planted", *BUILTIN]


@pytest.mark.usefixtures("fresh_modules")
def test_two_analyses_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "planted_analysis.py", name="reversal_curse")
    monkeypatch.setattr(analyses, "__path__", [*analyses.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="analysis 'reversal_curse' of analyses has the name of another; rename"):
        discover()


# ---- measured once


class Counted:
    """An analysis that keeps account of what it measures."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def analysis(self, **changes: Any) -> Analysis:
        def measure(run: Run, step: int) -> list[dict[str, Any]]:
            assert run.finished and step == run.steps[-1] == run.config.steps
            self.measured.append(run.folder.name)
            return [{"value": run.config.seed + 1 / 3}]

        fields: dict[str, Any] = {
            "name": "counted",
            "question": "How often?",
            "configs": lambda seeds: [tiny(seed) for seed in seeds],
            "measure": measure,
            "summarize": lambda result: Summary.of(result.frame, (), ("value",)),
            "takeaway": lambda result: "Measured.",
            "draw": lambda result: go.Figure(),
            "when": lambda run: stages(run, ("end",)),
        }
        return Analysis(**{**fields, **changes})


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(subjects, "train_all", train_here)
    return Lab(n_seeds=2, root=tmp_path / "store")


def test_a_result_is_measured_once_and_read_from_then_on(lab: Lab, tmp_path: Path) -> None:
    counted = Counted()
    first = counted.analysis().result(lab, tmp_path)
    again = counted.analysis().result(lab, tmp_path)
    assert counted.measured == [tiny(0).digest(), tiny(1).digest()]
    assert again == first
    assert [(row["seed"], row["value"]) for row in first.rows] == [(0, 0.333333), (1, 1.33333)]
    assert [(row["run"], row["step"]) for row in first.rows] == [(tiny(seed).digest(), 4) for seed in (0, 1)]
    assert first.seeds == [0, 1]
    assert first.summary.at("value").value == pytest.approx(0.833333, rel=1e-5)
    assert isinstance(first.origin, TrainedOrigin)
    assert (first.origin.kind, first.origin.runs) == ("runs", counted.measured)
    assert [TrainConfig(**config) for config in first.origin.first_seed] == [tiny(0)]


@pytest.mark.parametrize(
    "settings",
    [{"distances": [1, 2]}, {"threshold": 1 / 3}, {"distances": (1, 2)}],
    ids=["list", "float of many digits", "tuple"],
)
def test_settings_alone_never_make_it_measure_again(lab: Lab, tmp_path: Path, settings: dict[str, Any]) -> None:
    counted = Counted()
    for _ in range(2):
        counted.analysis(settings=settings).result(lab, tmp_path)
    assert len(counted.measured) == 2, "each of both runs once"


def test_a_width_whose_initial_scale_has_many_digits_is_measured_once(lab: Lab, tmp_path: Path) -> None:
    """The default `initializer_range`, 0.8 / sqrt(d_model), is 0.2828… here."""
    assert tiny().model.initializer_range == pytest.approx(0.8 / 8**0.5)
    counted = Counted()
    for _ in range(2):
        counted.analysis().result(lab, tmp_path)
    assert len(counted.measured) == 2, "each of both runs once"


def test_other_settings_seeds_or_runs_are_measured_again(lab: Lab, tmp_path: Path) -> None:
    counted = Counted()
    counted.analysis().result(lab, tmp_path)
    counted.analysis(settings={"distances": [1]}).result(lab, tmp_path)
    counted.analysis(configs=lambda seeds: [tiny(seed + 5) for seed in seeds]).result(lab, tmp_path)
    assert counted.analysis().result(replace(lab, n_seeds=1), tmp_path).seeds == [0]
    assert len(counted.measured) == 2 + 2 + 2 + 1


def test_a_result_says_what_it_was_measured_with_and_what_trained_its_runs(lab: Lab, tmp_path: Path) -> None:
    analysis = Counted().analysis()
    result = analysis.result(lab, tmp_path)
    assert result.made_with == [{"runs": 2, "by": [provenance(train, "cpu", torch.float32)]}]
    assert result.measured_with == environment(train)
    assert result.measured_with.items() >= machine().items()
    assert result.versions == versions(*analysis.measuring())
    assert {"code", "torch"} <= result.versions.keys()


def test_runs_that_something_else_trained_are_used_and_counted(lab: Lab, tmp_path: Path) -> None:
    runs, other = lab.runs([tiny(seed) for seed in range(3)]), {"torch": "1.0", "cpu": "Another"}
    (runs[0].folder / "made_with.json").unlink()
    stamp(runs[1].folder, 2, other)
    counted = Counted()
    result = counted.analysis().result(replace(lab, n_seeds=3), tmp_path)
    assert counted.measured == [run.folder.name for run in runs]
    here = provenance(train, "cpu", torch.float32)
    assert result.made_with == [{"runs": 1, "by": by} for by in ([{}], [here, other], [here])]


def test_another_machine_or_another_past_of_the_runs_is_no_reason_to_measure_again(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted()
    first = counted.analysis().result(lab, tmp_path)
    monkeypatch.setattr(analysis_module, "environment", lambda trainer: {"cpu": "Another", "threads": 64})
    for run in lab.runs(counted.analysis().configs(lab.seeds)):
        stamp(run.folder, 0, {"torch": "1.0"})
    assert counted.analysis().result(lab, tmp_path) == first
    assert len(counted.measured) == 2
    (tmp_path / "counted.json").unlink()
    again = counted.analysis().result(lab, tmp_path)
    assert again.measured_with == {"cpu": "Another", "threads": 64}
    assert again.made_with == [{"runs": 2, "by": [{"torch": "1.0"}]}]


@pytest.mark.parametrize("package", ["torch", "numpy", "scipy", "code"])
def test_other_packages_are_a_reason(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    counted = Counted()
    counted.analysis().result(lab, tmp_path)
    monkeypatch.setattr(analysis_module, "versions", lambda *functions: {**versions(*functions), package: "another"})
    counted.analysis().result(lab, tmp_path)
    assert len(counted.measured) == 4


def test_runs_and_demo_checkpoints_are_found_by_their_digests(lab: Lab) -> None:
    demo = subjects.Demo.of(TINY_DEMO, lab.root).folder
    demo.mkdir(parents=True)
    assert lab.folder(TINY_DEMO.digest()) == demo
    assert lab.folder(tiny().digest()) == Run.of(tiny(), lab.root).folder


def test_a_damaged_result_is_not_overwritten(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "counted.json").write_text('{"name": ')
    with pytest.raises(UserError, match=r"counted\.json: not a result file"):
        Counted().analysis().result(lab, tmp_path)
    assert (tmp_path / "counted.json").read_text() == '{"name": '


# ---- the four analyses, on models that train in a blink


@pytest.fixture(scope="module")
def measured(tiny_result: Callable[[str], Result]) -> dict[str, Result]:
    """Each analysis' result on the tiny grid, with 2 seeds."""
    return {name: tiny_result(name) for name in MODULES}


def at_step(frame: pd.DataFrame, stage: str) -> pd.DataFrame:
    step = frame["step"].min() if stage == "initial" else frame["step"].max()
    return cast(pd.DataFrame, frame[frame["step"] == step])


Figures = dict[tuple[Any, ...], float]
"""By quantity and what they are of."""


def expect_reversal_curse(frame: pd.DataFrame) -> Figures:
    expected: Figures = {}
    for of, group in frame.groupby(["setting", "variant"]):
        last = group.sort_values("step").groupby("run").tail(1)
        for quantity in ("forward_probability", "reverse_probability", "forward_accuracy", "reverse_accuracy"):
            expected[(quantity, *of)] = last[quantity].sum() / len(last)
        above = [reverse - group["chance"].iloc[0] for reverse in last["reverse_probability"]]
        expected[("above_chance", *of)] = sum(above) / len(above)
        peaks = [one["reverse_probability"].max() for _, one in group.groupby("seed")]
        expected[("highest_reverse", *of)] = sum(peaks) / len(peaks)
    return expected


def expect_evidence_growth(frame: pd.DataFrame) -> Figures:
    expected: Figures = {("chance_rank",): frame["chance_rank"].dropna().iloc[0]}
    asked = frame[frame["query"].isin(["forward", "reverse"])]
    for of, group in asked.groupby(["variant", "query"]):
        for stage in ("initial", "end"):
            for quantity in ("margin", "rank"):
                expected[(quantity, *of, stage)] = at_step(group, stage)[quantity].mean()
    return expected


def expect_route_correlation(frame: pd.DataFrame) -> Figures:
    expected: Figures = {}
    for stage in ("initial", "end"):
        whole = at_step(frame[frame["kind"] == "correlation"], stage)
        for scheme, group in whole.groupby("scheme"):
            for quantity in ("measured", "raw"):
                expected[quantity, scheme, stage] = group[quantity].mean()
        distances = at_step(frame[frame["kind"] == "distance"], stage)
        for distance, group in distances.groupby("distance"):
            for quantity in ("measured", "spectrum", "isotropic"):
                expected[quantity, stage, distance] = group[quantity].mean()
        for scheme, group in at_step(frame[frame["kind"] == "premise"], stage).groupby("scheme"):
            for quantity in ("q", "k", "overlap"):
                expected[quantity, scheme, stage] = group[quantity].mean()
                expected[f"null of {quantity}", scheme, stage] = group[f"{quantity}_null"].mean()
    for scheme, whole in frame[frame["kind"] == "correlation"].groupby("scheme"):
        for direction in ("forward", "reverse"):
            shares = whole.pivot(index="step", columns="run", values=f"{direction}_attention").sort_index()
            fall = shares.max() - np.maximum(shares.iloc[0], shares.iloc[-1])
            late = shares[shares.index >= shares.index.max() / 2]
            expected[f"{direction}_fall", scheme, "over training"] = fall.mean()
            expected[f"null of {direction}_fall", scheme, "over training"] = (late.max() - late.min()).mean()
    return expected


def expect_gradient_alignment(frame: pd.DataFrame) -> Figures:
    expected: Figures = {}
    for variant, whole in frame[frame["component"] == "all"].groupby("variant"):
        for stage in ("initial", "end"):
            at = at_step(whole, stage)
            for quantity in ("mean_gradient", "matched", "storage_term"):
                expected[quantity, variant, stage] = at[quantity].mean()
            expected["null of matched", variant, stage] = at["mismatched"].mean()
        kept = []
        for _, run in whole[whole["step"] > 0].groupby("seed"):
            last = 0
            for step, cosine in sorted(zip(run["step"], run["mean_gradient"], strict=True)):
                if cosine < 0.5:
                    break
                last = step
            kept.append(last)
        expected["last_aligned_step", variant] = sum(kept) / len(kept)
    return expected


EXPECTED = {
    "reversal_curse": expect_reversal_curse,
    "evidence_growth": expect_evidence_growth,
    "route_correlation": expect_route_correlation,
    "gradient_alignment": expect_gradient_alignment,
}
every_analysis = pytest.mark.parametrize("name", list(MODULES))
every_installed = pytest.mark.parametrize("name", BUILTIN)


def module_of(name: str) -> Any:
    return importlib.import_module(f"analyses.{name}")


@every_analysis
def test_the_rows_are_tidy(measured: dict[str, Result], name: str) -> None:
    frame = measured[name].frame
    assert COLUMNS[name] <= set(frame.columns)
    assert sorted(frame["seed"].unique()) == [0, 1]
    assert not frame[["variant", "seed", "run", "step"]].isna().any(axis=None)
    if name in SAME_COLUMNS_IN_EVERY_ROW:
        assert len({tuple(row) for row in measured[name].rows}) == 1
    if name == "gradient_alignment":
        assert ((frame["component"] == "all") == frame["storage_term"].notna()).all()
    keys = [column for column in frame.columns if not pd.api.types.is_float_dtype(frame[column])]
    keys += [column for column in ("distance", "head") if column in frame]
    if name == "route_correlation":
        frame = frame[frame["kind"] != "score"]  # several pairs share a head and a side
    assert not frame.duplicated(list(dict.fromkeys(keys))).any(), "one measurement is in two rows"


@every_analysis
def test_each_figure_of_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result], name: str) -> None:
    result = tiny_result(name)
    effects = {(entry.quantity, *entry.of.values()): entry.effect for entry in result.summary}
    nulls = {(f"null of {entry.quantity}", *entry.of.values()): entry.null for entry in result.summary if entry.null}
    figures, expected = {**effects, **nulls}, EXPECTED[name](result.frame)
    assert figures.keys() == expected.keys()
    for figure, estimate in figures.items():
        assert estimate.value == pytest.approx(expected[figure], rel=1e-5, abs=1e-9), figure
        if estimate.n == 1 and np.isnan([estimate.low, estimate.high]).all():
            continue  # a single observation has no interval
        tolerance = 1e-5 * abs(estimate.value) + 1e-12
        if estimate.n > 1:
            assert estimate.low <= estimate.value + tolerance, figure
            assert estimate.value <= estimate.high + tolerance, figure


@pytest.mark.parametrize(
    ("cosines", "expected"),
    [([0.9, 0.5, 0.4, 0.9], 10.0), ([0.9, 0.8, 0.7, 0.6], 1000.0), ([0.4, 0.9, 0.9, 0.9], 0.0)],
    ids=["fell and came back", "never fell", "fell at once"],
)
def test_alignment_lasts_until_it_first_falls(cosines: list[float], expected: float) -> None:
    run = pd.DataFrame({"step": [1000, 100, 10, 1], "mean_gradient": cosines[::-1]})
    assert gradient_alignment.last_aligned_step(run) == expected


QUOTED: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "evidence_growth": [
        ("rank", {"variant": "ARM rope", "query": query} | END, ".1f") for query in ("forward", "reverse")
    ],
    "route_correlation": [
        ("measured", {"scheme": scheme, "stage": stage}, ".2f")
        for scheme in grids.MDM_SCHEMES
        for stage in ("initial", "end")
    ],
    "gradient_alignment": [("mean_gradient", {"variant": "ARM rope"} | END, ".2f")],
}
"""Which figures of its summary a takeaway quotes, and how they are rounded."""


def certain(quantity: str, value: float, **of: Any) -> Entry:
    """A figure of a summary without doubt."""
    return Entry(quantity, of, Estimate(value, value, value, 2))


@pytest.mark.parametrize("name", list(QUOTED))
def test_the_takeaway_quotes_the_summary(tiny_result: Callable[[str], Result], name: str) -> None:
    result, takeaway = tiny_result(name), MODULES[name].takeaway
    for quantity, of, rounding in QUOTED[name]:
        assert format(result.summary.at(quantity, **of).value, rounding) in takeaway(result), quantity
        planted = 777.0
        changed = takeaway(with_summary(result, certain(quantity, planted, **of)))
        assert changed != takeaway(result), quantity
        assert format(planted, rounding) in changed, quantity


def has_marks(trace: Any) -> bool:
    drawn = [trace.z] if trace.type == "heatmap" else [trace.x, trace.y]
    values = [np.asarray(axis) for axis in drawn]
    if trace.type == "heatmap" and trace.text is not None:
        # A cell that says nothing is of what was not measured, a dash of what is not defined.
        values = [values[0][~np.isin(np.asarray(trace.text), ["", "–"])]]
    numbers = [axis.astype(float) for axis in values if axis.dtype.kind not in "US"]
    return all(axis.size for axis in values) and all(np.isfinite(axis).all() for axis in numbers) and bool(numbers)


@every_installed
def test_the_figure_is_labelled_and_nothing_in_it_is_empty(tiny_result: Callable[[str], Result], name: str) -> None:
    result, module = tiny_result(name), module_of(name)
    figure = module.ANALYSIS.figure(result)
    assert isinstance(figure, go.Figure)
    layout, look = figure.to_dict()["layout"], cast(Any, figure.layout)
    of_demos = " (demo checkpoints)" if isinstance(module.ANALYSIS, CheckpointAnalysis) else ""
    assert look.title.text.replace("<br>", " ") == f"<b>{result.question}{of_demos}</b>"
    assert look.title.subtitle.text.replace("<br>", " ") == module.ANALYSIS.takeaway(result)
    assert look.font.family is None, "the theme gives the font"
    assert look.template.layout.font.family.startswith("DejaVu Sans")
    assert (look.width, look.template.layout.paper_bgcolor) == (1400, "white")
    if type(module.ANALYSIS) is not Analysis:
        return  # a checkpoint's may have layers in which nothing is defined; their own tests look at their marks
    drawn: Any = figure.data
    assert [trace.name for trace in drawn if not has_marks(trace)] == []
    for axis, properties in layout.items():
        if axis.startswith(("xaxis", "yaxis")) and properties.get("showticklabels", True):
            assert properties.get("title", {}).get("text"), f"{axis} shows numbers of nothing"


def traces(figure: go.Figure) -> list[dict[str, Any]]:
    """What a figure draws, as JSON holds it."""
    return json.loads(str(figure.to_json()))["data"]


def test_a_result_of_another_analysis_is_refused_by_name(tiny_result: Callable[[str], Result], tmp_path: Path) -> None:
    path = tmp_path / "reversal_curse.json"
    tiny_result("depth").save(path)
    with pytest.raises(UserError) as caught:
        module_of("reversal_curse").ANALYSIS.load(path)
    assert str(caught.value) == f"{path}: is a result of depth, not of reversal_curse; put the right file there"


@every_installed
def test_a_figure_is_redrawn_from_its_file_without_a_model(
    tiny_result: Callable[[str], Result], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, result = module_of(name).ANALYSIS, tiny_result(name)
    drawn = analysis.figure(replace(result, rows=tidy(result.rows)))
    result.save(tmp_path / "copy.json")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a figure was drawn with a model")

    monkeypatch.setattr(HookedTransformer, "__init__", refuse)
    monkeypatch.setattr(Run, "metrics", refuse)
    redrawn = analysis.figure(analysis.load(tmp_path / "copy.json"))
    assert redrawn.to_json() == drawn.to_json()
    assert len(traces(redrawn)) > (1 if name == "objective_and_attention" else 4)  # which has two tables here


@every_analysis
def test_a_figure_shows_the_numbers_of_its_rows(measured: dict[str, Result], name: str) -> None:
    """Planted: adding 0.125 to every measurement moves what is drawn."""
    result = measured[name]
    column = {"reversal_curse": "reverse_probability", "evidence_growth": "margin", "route_correlation": "measured"}
    moved = column.get(name, "mean_gradient")
    rows = [{**row, moved: row[moved] + 0.125} if row.get(moved) is not None else row for row in result.rows]
    before, after = (traces(MODULES[name].ANALYSIS.figure(replace(result, rows=r))) for r in (result.rows, rows))
    assert len(before) == len(after)
    assert sum(one != other for one, other in zip(before, after, strict=True)) >= 4


# ---- the committed results


@pytest.fixture(scope="module")
def columns(tiny_result: Callable[[str], Result]) -> dict[str, set[str]]:
    """What is measured by each analysis."""
    return {name: set(tiny_result(name).frame.columns) for name in BUILTIN}


@pytest.mark.usefixtures("real_grid")
def test_the_committed_results_are_whole_and_the_ledger_and_the_findings_say_what_they_say(
    columns: dict[str, set[str]], tmp_path: Path
) -> None:
    found = {path.stem for path in FIGURES.glob("*.json")} - {"claims"}
    assert found == set(BUILTIN)
    results = {}
    for analysis in discover():
        result = results[analysis.name] = analysis.load(FIGURES / f"{analysis.name}.json")
        assert (result.name, result.question) == (analysis.name, analysis.question)
        assert result.seeds == list(range(FULL_SEEDS)), analysis.name
        assert result.rows and set(result.frame.columns) == columns[analysis.name], analysis.name
        if type(analysis) is Analysis:
            configs = analysis.configs(result.seeds)
            assert isinstance(result.origin, TrainedOrigin)
            assert result.origin.runs == [config.digest() for config in configs], analysis.name
            measured = set(zip(result.frame["run"], result.frame["seed"], strict=True))
            assert measured == {(config.digest(), config.seed) for config in configs}, analysis.name
        summary = result.summary
        assert len(summary) and analysis.takeaway(result), analysis.name
    verdicts = ledger(discover(), results)
    save_ledger(verdicts, path := tmp_path / "claims.json")
    assert path.read_text(encoding="utf-8") == (FIGURES / "claims.json").read_text(encoding="utf-8")
    for file, name in ((ROOT / "README.md", "what was found"), (ROOT / "docs" / "findings.md", "findings")):
        start, end = findings.marks(name)
        told = findings.WRITTEN[name](verdicts, results)
        assert f"{start}\n{told}\n{end}" in file.read_text(encoding="utf-8"), "`mdm-interp verify --readme` writes it"
