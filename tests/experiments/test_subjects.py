"""Probes: what is asked of which model, what a result says of it, and the commands that make and probe checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cli_helpers import Ended, assert_refused
from helpers import TINY_DEMO, tiny_grid, tiny_run, train_here
from probe_helpers import FACTS, tiny_probe
from transformer_lens.model_bridge import TransformerBridge

from analyses import large_model_coupling
from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.config import DemoConfig, FactConfig
from mdm_interp.data.prompts import load_facts
from mdm_interp.errors import UserError
from mdm_interp.experiments import subjects
from mdm_interp.experiments.analysis import CheckpointAnalysis, discover
from mdm_interp.experiments.results import CheckpointOrigin, Result
from mdm_interp.experiments.subjects import (
    KINDS,
    Lab,
    Probe,
    demo_name,
    demos,
    demos_of_several_seeds,
    each_checkpoint,
    open_probe,
    train_demos,
)
from mdm_interp.measures.evidence import compute_evidence
from mdm_interp.measures.gradients.alignment import gradient_alignment
from mdm_interp.measures.parity import score_parity
from mdm_interp.measures.routes import score_correlation
from mdm_interp.stats.summary import Summary
from mdm_interp.training.demo import train_demo
from mdm_interp.viz.pages import explorer

ALONE = [a for a in discover() if isinstance(a, CheckpointAnalysis) and not a.needs_twin]


def test_a_result_says_what_was_asked_and_what_was_not(tmp_path: Path) -> None:
    csv = tmp_path / "facts.csv"
    tiny_probe(tmp_path, "llada")
    csv.write_text(FACTS + "Nemo,Nemo,father\n", encoding="utf-8")
    origin = open_probe(tmp_path / "tiny-llada", csv).origin()
    assert origin.checkpoint == "tiny-llada"
    assert origin.facts == 8
    assert origin.pairs == dict.fromkeys(KINDS, 8 * 3 * 2)
    assert origin.skipped == dict.fromkeys(KINDS, 1)
    assert origin.reasons["positional"] == ["row 8: answer and source are the same, 'Nemo'"]
    assert origin.model["mask_token_id"] is not None
    assert origin.twin is None
    limited = open_probe(tmp_path / "tiny-llada", csv, limit=2)
    assert {pair.fact for pair in limited.pairs("relational")} == {0, 1}


def test_a_checkpoint_has_its_folders_name_and_a_twin_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = tmp_path / "facts.csv"
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        tiny_probe(folder, "llada")
    csv.write_text(FACTS, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "first" / "tiny-llada")
    probe = open_probe(".", csv, twin=tmp_path / "second" / "tiny-llada")
    assert [each.name for each in each_checkpoint([probe, probe])] == ["tiny-llada", "tiny-llada (twin)"]


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_probe(tmp_path, "llada")
    (tmp_path / "tiny-llada" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tiny-llada: has no tokenizer, which the facts are phrased in"):
        open_probe(tmp_path / "tiny-llada", tmp_path / "facts.csv")


def test_a_probe_is_measured_once_for_the_same_weights_and_facts(tmp_path: Path) -> None:
    probe, measured = tiny_probe(tmp_path, "llada"), []

    def measure(probe: Probe) -> list[dict[str, Any]]:
        measured.append(probe)
        return [{"value": 1.0}]

    analysis = replace(large_model_coupling.ANALYSIS, measure=measure, summarize=lambda result: Summary(), name="once")
    for _ in range(2):
        analysis.probe(probe, tmp_path / "out")
    assert len(measured) == 1
    probe.model.W_E.data[0] += 1
    analysis.probe(probe, tmp_path / "out")
    fewer = replace(probe, prompts={kind: replace(p, pairs=p.pairs[:2]) for kind, p in probe.prompts.items()})
    analysis.probe(fewer, tmp_path / "out")
    assert len(measured) == 3


def sum_of_weights(probe: Probe) -> float:
    members = [probe] if probe.twin is None else [probe, probe.twin]
    return sum(weight.double().sum().item() for one in members for weight in one.model.parameters())


def test_a_result_is_not_taken_for_that_of_other_weights(tmp_path: Path) -> None:
    """Names, configs, facts and embeddings are the same."""
    probe = tiny_probe(tmp_path, "llada", twin="qwen2")
    analysis = replace(
        large_model_coupling.ANALYSIS,
        name="sum",
        measure=lambda probe: [{"sum": sum_of_weights(probe)}],
        summarize=lambda result: Summary(),
    )
    found = [analysis.probe(probe, tmp_path / "out").rows]
    for model in (probe.model, probe.require_twin().model):
        model.blocks[-1].attn.W_V.data[0, 0, 0] += 1
        found.append(analysis.probe(probe, tmp_path / "out").rows)
    assert found == [[{"checkpoint": probe.name, "sum": pytest.approx(found[0][0]["sum"] + i)}] for i in range(3)]


@pytest.mark.parametrize("changed", ["weights", "twin", "config", "name"])
def test_what_an_interrupted_measurement_left_is_not_taken_for_that_of_another_model(
    changed: str, tmp_path: Path
) -> None:
    probe, measured = tiny_probe(tmp_path, "llada", twin="qwen2"), list[str]()

    def measure(probe: Probe) -> list[dict[str, Any]]:
        measured.append(probe.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [{"value": 1.0}]

    analysis = replace(
        large_model_coupling.ANALYSIS, name="left", measure=measure, summarize=lambda result: Summary(), of_twins=True
    )
    with pytest.raises(KeyboardInterrupt):
        analysis.probe(probe, tmp_path / "out")
    if changed in ("weights", "twin"):
        model = probe.model if changed == "weights" else probe.require_twin().model
        model.blocks[-1].attn.W_V.data[0, 0, 0] += 1
    elif changed == "config":
        probe.model.cfg = probe.model.cfg.model_copy(update={"rotary_base": 77.0})
    else:
        probe = replace(probe, name="another")
    analysis.probe(probe, tmp_path / "out")
    assert measured[2:] == [probe.name, probe.require_twin().name]


@pytest.mark.parametrize("analysis", ALONE, ids=lambda analysis: analysis.name)
def test_a_bridge_booted_from_the_folder_measures_the_same(analysis: CheckpointAnalysis, tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path, "qwen2")
    folder = tmp_path / "tiny-qwen2"
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    other = Probe.of(probe.name, bridge, load_facts(tmp_path / "facts.csv"), load_checkpoint(folder).tokenizer)
    assert other.prompts == probe.prompts
    ours, theirs = list(analysis.measure(probe)), list(analysis.measure(other))
    assert len(ours) == len(theirs)
    for row, same in zip(ours, theirs, strict=True):
        for name, value in row.items():
            if name == "rotary_base":  # a bridge's own config has TransformerLens' default
                continue
            if isinstance(value, float):
                relative = 1e-3 if name.startswith("influence") else 0.0  # in nats per unit of step: hundreds
                assert same[name] == pytest.approx(value, abs=2e-3, rel=relative, nan_ok=True), name
            else:
                assert same[name] == value


def test_a_model_of_the_small_grid_is_measured_alike_as_a_checkpoint(tmp_path: Path) -> None:
    """Saved, loaded again and asked its world's own pairs, a one-layer model gives the routes, evidence and alignments
    that it gave as a run."""
    config = tiny_run(FactConfig(n_entities=9, n_filler=4), "rope", "any_order", 0)
    (run,) = train_here([config], root=tmp_path / "runs", device="cpu", workers=None)
    model, pairs = run.model(), run.query_pairs()
    save_checkpoint(model, tmp_path / "saved", format="mdm_interp")
    loaded = load_checkpoint(tmp_path / "saved")
    assert score_correlation(loaded, pairs).effect.equal(score_correlation(model, pairs).effect)
    assert score_parity(loaded, pairs).odd.equal(score_parity(model, pairs).odd)
    targets, queries = run.facts.candidates([pairs[0].forward])[0], [pair.forward for pair in pairs]
    assert compute_evidence(loaded, queries, targets).equal(compute_evidence(model, queries, targets))
    again, aligned = gradient_alignment(loaded, pairs), gradient_alignment(model, pairs)
    for group in (("V", "O"), ("Q", "K")):
        assert again.gram.cosine(group, [0]).equal(aligned.gram.cosine(group, [0]))


def test_a_quick_run_has_one_demo_and_its_twin_and_a_full_one_both_worlds(real_grid: None) -> None:
    def named(configs: list[DemoConfig]) -> list[str]:
        return [demo_name(config) for config in configs]

    assert named(demos_of_several_seeds(range(3))) == named(demos(range(3)))
    assert [(demo.world, demo.format, demo.seed) for demo in demos(range(3))] == [
        ("memorised", "llada", 0),
        ("memorised", "qwen2", 0),
    ]
    full = ["demo llada", "demo qwen2", "demo dream", "demo llada, varied", "demo qwen2, varied"]
    assert named(demos(range(10))) == full
    more = ["demo llada, varied, seed 1", "demo llada, varied, seed 2"]
    assert named(demos_of_several_seeds(range(10))) == [*full, *more]
    few = subjects.DEMOS["varied"].model_copy(update={"n_control": 7})
    assert demo_name(few) == "demo llada, varied, 18% both ways"


# ---- the commands


def test_probing_from_the_command_line(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    for format in ("llada", "qwen2"):
        train_demo(tmp_path / format, TINY_DEMO.model_copy(update={"format": format}), progress=False)
    asked = ("probe", tmp_path / "llada", "--facts", tmp_path / "llada" / "facts.csv", "--out", "probed")
    ended = mdm_interp(*asked, "--only", "large_model_routes", "--limit", 3, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "positional: 18 pairs asked, 0 skipped" in ended.err
    result = Result.load(tmp_path / "probed" / "large_model_routes.json")
    assert isinstance(result.origin, CheckpointOrigin) and result.origin.checkpoint == "llada"
    assert {path.name for path in (tmp_path / "probed").iterdir()} >= {"index.html", "large_model_routes.html"}
    means = pd.read_csv(tmp_path / "probed" / "summary.csv")
    (analysis,) = [one for one in discover() if one.name == "large_model_routes"]
    expected = analysis.load(tmp_path / "probed" / "large_model_routes.json").summary.frame
    assert set(means["analysis"]) == {"large_model_routes"} and list(means.columns[-4:-3]) == ["null_value"]
    assert means["value"].to_numpy() == pytest.approx(expected["value"].to_numpy(dtype=float), nan_ok=True)
    assert_refused(mdm_interp(*asked, "--only", "twin"), "--only: 'twin' compares two checkpoints; give the second")
    ended = mdm_interp(*asked, "--only", "twin", "--limit", 3, "--twin", tmp_path / "qwen2", "--device", "cpu")
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "probed" / "twin.json").read_text())["origin"]["twin"]["checkpoint"] == "qwen2"


def test_probing_everything_leads_to_every_head(
    mdm_interp: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_probe(tmp_path, "llada")
    monkeypatch.setattr("mdm_interp.experiments.analysis.discover", lambda: [large_model_coupling.ANALYSIS])
    asked = ("probe", tmp_path / "tiny-llada", "--facts", tmp_path / "facts.csv", "--device", "cpu", "--out")
    ended = mdm_interp(*asked, "probed")
    assert ended.code == 0, ended.err
    assert '<a href="explorer.html">Every head of tiny-llada</a>' in (tmp_path / "probed" / "index.html").read_text()
    assert "<h1>Explorer: tiny-llada</h1>" in (tmp_path / "probed" / "explorer.html").read_text()
    assert mdm_interp(*asked, "one", "--only", "large_model_coupling").code == 0
    assert not (tmp_path / "one" / "explorer.html").exists()
    assert "Look inside" not in (tmp_path / "one" / "index.html").read_text()
    monkeypatch.setattr(explorer, "MAX_ENTRIES", 50)
    ended = mdm_interp(*asked, "large")
    assert ended.code == 0 and "no explorer: query_pairs: 8 pairs of 1 models with" in ended.err, ended.err
    assert (tmp_path / "large" / "index.html").exists() and not (tmp_path / "large" / "explorer.html").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), ("model.safetensors",)),
        (lambda folder: (folder / "facts.csv").write_text("a,b\n1,2\n"), ("facts.csv", "columns")),
        (lambda folder: (folder / "facts.csv").unlink(), ("facts.csv", "cannot be read")),
    ],
    ids=["no config", "damaged weights", "other columns", "no facts"],
)
def test_what_cannot_be_probed_is_said_in_one_line(
    mdm_interp: Callable[..., Ended],
    tmp_path: Path,
    change: Callable[[Path], Any],
    says: tuple[str, ...],
) -> None:
    tiny_probe(tmp_path, "llada")
    folder = tmp_path / "tiny-llada"
    (tmp_path / "facts.csv").rename(folder / "facts.csv")
    change(folder)
    assert_refused(mdm_interp("probe", folder, "--facts", folder / "facts.csv", "--out", "probed"), *says)
    assert not (tmp_path / "probed").exists()


def test_a_demo_of_an_unknown_format_is_refused(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    assert_refused(mdm_interp("demo-checkpoint", "--format", "gpt2", "--out", tmp_path / "demo"), "format", "gpt2")
    assert not (tmp_path / "demo").exists()


def test_a_demo_of_an_unknown_world_is_refused(mdm_interp: Callable[..., Ended], tmp_path: Path) -> None:
    ended = mdm_interp("demo-checkpoint", "--world", "flat", "--out", tmp_path / "demo")
    assert_refused(ended, "--world: 'flat' is none of memorised, varied")
    assert not (tmp_path / "demo").exists()


def test_training_demos_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tiny_grid():
        lab = Lab(n_seeds=1, root=tmp_path)
        train_demos(demos(lab.seeds), lab)
        said = capsys.readouterr().err
        for demo in demos(lab.seeds):
            n = demo.steps
            assert re.search(rf"^demo {demo.format}: {n} of {n} loss \d", said, re.MULTILINE)
        train_demos(demos(lab.seeds), lab)
        assert capsys.readouterr().err == "", "what is there is not trained again"
