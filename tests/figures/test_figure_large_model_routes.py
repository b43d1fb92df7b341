"""Routes of checkpoints: rows agree with the library, and figures hold any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from probe_helpers import at, result_of, tiny_probe, traces

from analyses import large_model_routes
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.fact_routes import is_mirrored
from mdm_interp.measures.routes import compute_routes
from mdm_interp.stats.tables import estimate_in


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("routes"), "llada")


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(large_model_routes.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def test_rows_are_all_heads_layers_and_the_model(result: Result) -> None:
    assert len(result.rows) == 2 * (2 * 4 + 2 + 1)
    assert len({tuple(row) for row in result.rows}) == 1  # the same columns
    assert list(result.rows[0])[:6] == ["checkpoint", "kind", "layer", "head", "facts", "clusters"]
    for row in result.rows:
        for name in (*large_model_routes.MEASURES, "correlation_null", "selectivity_null"):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            if row[f"{name}_n"] > 2 or "null" in name:
                assert low <= row[name] + 1e-6 and row[name] <= high + 1e-6
            else:  # a correlation of two facts is 1 or -1, and of one it is nothing
                assert (low is None and high is None and "correlation" in name) or name == "same_content"


def test_means_of_routes_are_over_facts(probe: Probe, result: Result) -> None:
    for kind in KINDS:
        pairs = probe.pairs(kind)
        for side in ("forward", "reverse"):
            routes = compute_routes(probe.model, [getattr(pair, side) for pair in pairs]).pattern
            facts = sorted({pair.fact for pair in pairs})
            of_facts = [
                torch.stack([r for r, pair in zip(routes, pairs, strict=True) if pair.fact == f]).mean(0) for f in facts
            ]
            expected = torch.stack(of_facts).mean(0)
            for layer in range(2):
                for head in range(4):
                    assert at(result, kind, layer, head)[side] == pytest.approx(expected[layer, head].item(), rel=1e-4)
                assert at(result, kind, layer, None)[side] == pytest.approx(expected[layer].mean().item(), rel=1e-4)
            assert at(result, kind, None, None)[side] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_selectivity_is_of_mirrored_pairs_only(probe: Probe, result: Result, tmp_path: Path) -> None:
    for kind in KINDS:
        row = at(result, kind, None, None)
        mirrored = {pair.fact for pair in probe.pairs(kind) if is_mirrored(probe.model, pair)}
        assert row["mirrored"] == row["selectivity_n"] == len(mirrored) > 0
    shifted = result_of(large_model_routes.ANALYSIS, [tiny_probe(tmp_path, "dream")], tmp_path)
    for row in shifted.rows:
        assert row["correlation"] is not None
        if row["kind"] == "positional":
            assert row["mirrored"] == 0 and row["selectivity"] is None and row["selectivity_null"] is None


def test_an_arm_has_routes_but_no_correlation(tmp_path: Path) -> None:
    result = result_of(large_model_routes.ANALYSIS, [tiny_probe(tmp_path, "qwen2")], tmp_path)
    for row in result.rows:
        assert 0 < row["forward"] < 1 and 0 < row["reverse"] < 1
        assert row["correlation"] is None and row["selectivity_null"] is None and row["isotropic"] is None
    assert not any("correlation" in entry.quantity for entry in result.summary)
    figure = large_model_routes.draw(result).figure()
    said = [trace.text for trace in traces(figure, mode="text")]
    assert len(said) == 2 + 2 * 4 and all("undefined" in text for (text,) in said)
    assert "Undefined" in large_model_routes.takeaway(result)


def test_the_summary_is_of_the_rows(result: Result) -> None:
    for kind in KINDS:
        row = at(result, kind, None, None)
        for name in large_model_routes.MEASURES:
            found = result.summary.contrast(name, checkpoint="tiny-llada", kind=kind)
            assert repr(found.effect) == repr(estimate_in(row, name))  # NaN where it is null
            if name in ("correlation", "selectivity"):
                assert repr(found.null) == repr(estimate_in(row, f"{name}_null"))
        for name in large_model_routes.PLAIN:
            assert result.summary.at(name, checkpoint="tiny-llada", kind=kind).value == row[name]


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_the_figure_shows_every_checkpoint_and_kind(result: Result, checkpoints: int) -> None:
    rows = [{**row, "checkpoint": f"model {copy}"} for copy in range(checkpoints) for row in result.rows]
    many = replace(result, rows=rows)
    figure = large_model_routes.draw(many).figure()
    maps = traces(figure, type="heatmap")
    assert len(maps) == 2 * checkpoints
    assert [[maps[0].z[layer][head] for head in range(4)] for layer in range(2)] == [
        [at(result, "positional", layer, head)["correlation"] for head in range(4)] for layer in range(2)
    ]
    listed = [(trace.name, trace.legend) for trace in traces(figure, showlegend=True)]
    assert sorted(listed) == sorted(set(listed))
    assert [name for name, _ in listed].count("forward and reverse") == 2, "once for each column"


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.9, "Largely, in all 4 layers"), (0.3, "In part, in all 4 layers"), (0.0, "In no layer for sure")],
)
def test_the_takeaway_says_how_alike_and_where(result: Result, value: float, said: str) -> None:
    told = {"correlation": value, "correlation_low": value - 0.05, "correlation_high": value + 0.05}
    told |= {"correlation_null": 0.0, "correlation_null_low": -0.1, "correlation_null_high": 0.1}
    rows = [{**row, **told} for row in result.rows]
    assert large_model_routes.takeaway(replace(result, rows=rows)).startswith(said)


def test_one_fact_has_routes_and_nothing_to_correlate(tmp_path: Path) -> None:
    result = result_of(large_model_routes.ANALYSIS, [tiny_probe(tmp_path, "dream", facts=1)], tmp_path)
    row = at(result, "positional", 0, 0)
    assert row["forward"] is not None and row["forward_low"] is None and row["forward_n"] == 1
    assert row["correlation"] is None and row["selectivity_null"] is None
    large_model_routes.draw(result).figure()
