"""Storage of checkpoints: rows agree with the library, and figures hold any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from probe_helpers import at, result_of, tiny_probe, traces

from analyses import large_model_storage
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.answer_evidence import answer_evidence


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("storage"), "dream")


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(large_model_storage.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def test_rows_are_all_heads_layers_and_the_model(result: Result) -> None:
    assert len(result.rows) == 2 * (2 * 4 + 2 + 1)
    assert len({tuple(row) for row in result.rows}) == 1
    for row in result.rows:
        assert (row["place_index"] is None) == (row["head"] is not None)
        for name in ("forward_beaten", "reverse_beaten_null"):
            assert 0 <= row[name] <= 1 and row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
            assert (row["facts"], row["clusters"], row[f"{name}_n"]) == (8, 8, 8)


def test_each_source_is_compared_within_its_template_and_side(probe: Probe, result: Result) -> None:
    for kind in KINDS:
        prompts = probe.prompts[kind]
        for side in large_model_storage.SIDES:
            per_fact: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for place in {(t, p.side) for t, p in zip(prompts.templates, prompts.pairs, strict=True)}:
                asked = [
                    pair
                    for template, pair in zip(prompts.templates, prompts.pairs, strict=True)
                    if (template, pair.side) == place
                ]
                heads, layers = answer_evidence(probe.model, [getattr(pair, side) for pair in asked])
                for row, pair in enumerate(asked):
                    per_fact.setdefault(pair.fact, []).append((heads.specific.effect[row], layers.beaten.effect[row]))
            means = [
                [torch.stack(part).nanmean(0) for part in zip(*of_fact, strict=True)] for of_fact in per_fact.values()
            ]
            specific, beaten = (torch.stack(part).nanmean(0) for part in zip(*means, strict=True))
            for layer in range(2):
                for head in range(4):
                    row = at(result, kind, layer, head)
                    assert row[f"{side}_specific"] == pytest.approx(specific[layer, head].item(), rel=1e-3, abs=1e-5)
                assert at(result, kind, layer, None)[f"{side}_beaten"] == pytest.approx(beaten[layer].item(), rel=1e-3)
            assert at(result, kind, None, None)[f"{side}_beaten"] == pytest.approx(beaten.mean().item(), rel=1e-3)


def test_the_first_layer_does_not_know_where_a_source_stands(result: Result) -> None:
    for kind in KINDS:
        assert at(result, kind, 0, None)["place_index"] == pytest.approx(0, abs=1e-9)
        assert at(result, kind, 1, None)["place_index"] > 1e-6
        first = at(result, kind, 0, 2)
        assert first["forward_specific"] == pytest.approx(first["reverse_specific"], rel=1e-3)


def test_an_arm_has_evidence_but_no_position_index(tmp_path: Path) -> None:
    result = result_of(large_model_storage.ANALYSIS, [tiny_probe(tmp_path, "llama")], tmp_path)
    assert all(row["place_index"] is None and row["forward_beaten"] is not None for row in result.rows)
    figure = large_model_storage.draw(result).figure()
    said = [text for trace in traces(figure, mode="text") for text in trace.text]
    assert len(said) == 2 and all("share no source" in text for text in said)


def test_the_summary_is_of_the_rows(result: Result) -> None:
    for kind in KINDS:
        row = at(result, kind, None, None)
        for name in large_model_storage.MEASURES:
            found = result.summary.contrast(name, checkpoint="tiny-dream", kind=kind)
            for column, estimate in ((name, found.effect), (f"{name}_null", found.null)):
                if column != "place_index_null":
                    stated = row[column], row[f"{column}_low"], row[f"{column}_high"]
                    assert (estimate.value, estimate.low, estimate.high) == stated


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_the_figure_shows_every_checkpoint_and_kind(result: Result, checkpoints: int) -> None:
    rows = [{**row, "checkpoint": f"model {copy}"} for copy in range(checkpoints) for row in result.rows]
    many = replace(result, rows=rows)
    figure = large_model_storage.draw(many).figure()
    maps = traces(figure, type="heatmap")
    assert len(maps) == 2 * 2 * checkpoints
    assert maps[1].z[1][3] == at(result, "positional", 1, 3)["reverse_beaten"]


@pytest.mark.parametrize(
    ("reverse", "said"),
    [
        (0.9, "Yes: in reverse, a layer's heads write more toward the source's own answer than toward 90% of others, "),
        (0.7, "Yes: in reverse, a layer's heads write more toward the source's own answer than toward 70% of others, "),
        (0.5, "In none of 2 cases: "),
    ],
)
def test_the_takeaway_says_from_which_side(result: Result, reverse: float, said: str) -> None:
    told = {}
    for side, value in (("forward", 0.9), ("reverse", reverse)):
        for name, mean in ((f"{side}_beaten", value), (f"{side}_beaten_null", 0.5)):
            told |= {name: mean, f"{name}_low": mean - 0.05, f"{name}_high": mean + 0.05}
    found = large_model_storage.takeaway(replace(result, rows=[{**row, **told} for row in result.rows]))
    assert found.startswith(said)
    assert ("no sure difference" if reverse == 0.9 else "surely more in all 2 cases") in found


def test_two_facts_leave_nothing_to_compare(tmp_path: Path) -> None:
    result = result_of(large_model_storage.ANALYSIS, [tiny_probe(tmp_path, "llada", facts=2)], tmp_path)
    assert all(row["forward_beaten"] is None and row["reverse_specific_null"] is None for row in result.rows)
    assert "Too few facts" in large_model_storage.takeaway(result)
    large_model_storage.draw(result).figure()
