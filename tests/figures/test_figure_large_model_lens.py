"""The lens on checkpoints: rows agree with the library, and figures hold any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from probe_helpers import at, result_of, tiny_probe, traces

from analyses import large_model_lens
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.lens import lens, other_answers
from mdm_interp.stats.resampling import FactSample


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("lens"), "dream")


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(large_model_lens.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def test_rows_are_those_of_the_library(probe: Probe, result: Result) -> None:
    assert len(result.rows) == 2 * (2 * 4 + 2 + 1)
    for kind in KINDS:
        pairs = probe.pairs(kind)
        sample = FactSample.of(pairs, probe.prompts[kind].templates)
        for side in large_model_lens.SIDES:
            queries = [getattr(pair, side) for pair in pairs]
            seen = lens(probe.model, queries, other_answers(pairs, queries))
            heads, probability = sample.mean(seen.heads).value, sample.mean(seen.probability.effect).value
            for layer in range(2):
                assert at(result, kind, layer, 3)[f"{side}_heads"] == pytest.approx(heads[layer, 3].item(), rel=1e-4)
                row = at(result, kind, layer, None)
                assert row[f"{side}_probability"] == pytest.approx(probability[layer].item(), rel=1e-4)
                assert row[f"{side}_heads"] == pytest.approx(heads[layer].sum().item(), rel=1e-4)
            assert at(result, kind, None, None)[f"{side}_heads"] == pytest.approx(heads.sum().item(), rel=1e-4)


def test_an_arm_has_a_lens_too(tmp_path: Path) -> None:
    result = result_of(large_model_lens.ANALYSIS, [tiny_probe(tmp_path, "llama")], tmp_path)
    assert all(row["forward_heads"] is not None for row in result.rows)
    assert "In reverse, at most" in large_model_lens.takeaway(result) or "Nowhere" in large_model_lens.takeaway(result)


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_the_figure_shows_every_checkpoint_and_kind(result: Result, checkpoints: int) -> None:
    rows = [{**row, "checkpoint": f"model {copy}"} for copy in range(checkpoints) for row in result.rows]
    figure = large_model_lens.draw(replace(result, rows=rows)).figure()
    maps = traces(figure, type="heatmap")
    assert len(maps) == 2 * 2 * checkpoints
    assert maps[1].z[1][3] == at(result, "positional", 1, 3)["reverse_heads"]


def test_the_takeaway_names_the_layer_and_who_writes(result: Result) -> None:
    def planted(appears: float | None, mlp: float) -> Result:
        told = {"forward_appears": appears, "forward_appears_n": 8, "reverse_correct": 0.25}
        told |= {"forward_mlp": mlp, "forward_mlp_low": mlp - 0.1, "forward_mlp_high": mlp + 0.1}
        told |= {"forward_heads": 1.0, "forward_heads_low": 0.9, "forward_heads_high": 1.1}
        return replace(result, rows=[{**row, **told} if row["layer"] is None else row for row in result.rows])

    said = large_model_lens.takeaway(planted(0.5, 2.0))
    assert "from layer 0.5 on (the last is 1); MLPs write more of it than heads in all 2 cases" in said
    assert "In reverse, at most 25% of its tokens" in said and said.endswith("(n = 8 clusters of facts).")
    assert "more of it than heads in none of 2 cases" in large_model_lens.takeaway(planted(0.5, 1.0))
    assert large_model_lens.takeaway(planted(None, 2.0)).startswith("Nowhere:")


def test_one_fact_has_no_other_answer(tmp_path: Path) -> None:
    result = result_of(large_model_lens.ANALYSIS, [tiny_probe(tmp_path, "llada", facts=1)], tmp_path)
    assert all(row["forward_heads"] is None for row in result.rows)
    assert at(result, "positional", 0, None)["forward_probability"] is not None
    large_model_lens.draw(result).figure()
