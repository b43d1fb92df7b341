"""Routes of checkpoints: rows agree with the library's measures, draws with loops, and figures hold any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model
from probe_helpers import at, result_of, tiny_probe, traces
from test_bridge import SHAPE, mirrored_pairs
from torch.testing import assert_close

from analyses import large_model_routes
from mdm_interp.parity import score_parity
from mdm_interp.probing import KINDS, Probe
from mdm_interp.resampling import FactSample
from mdm_interp.results import Result
from mdm_interp.routing import (
    compute_content,
    compute_routes,
    distance_correlation,
    plane_products,
    require_rope,
    route_correlation,
)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("routes"), "llada")


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(large_model_routes.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def test_rows_are_all_heads_layers_and_the_model(result: Result) -> None:
    assert len(result.rows) == 2 * (2 * 4 + 2 + 1)
    assert len({tuple(row) for row in result.rows}) == 1  # the same columns
    assert list(result.rows[0])[:5] == ["checkpoint", "kind", "layer", "head", "facts"]
    for row in result.rows:
        for name in large_model_routes.MEASURES:
            assert row[f"{name}_low"] <= row[name] + 1e-6 and row[name] <= row[f"{name}_high"] + 1e-6


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


def test_in_one_context_they_are_the_librarys_measures(probe: Probe) -> None:
    prompts = probe.prompts["positional"]
    pairs = [
        pair
        for pair, template in zip(prompts.pairs, prompts.templates, strict=True)
        if template == 0 and pair.side == "left"
    ]
    sample = FactSample.of(pairs, [0] * len(pairs))
    measured: dict[str, Any] = large_model_routes.routes(probe.model, pairs, sample)
    assert_close(measured["correlation"].value.float(), route_correlation(probe.model, pairs), atol=1e-5, rtol=0)
    selectivity = score_parity(probe.model, pairs).selectivity()
    assert_close(measured["selectivity"].value.float(), selectivity, atol=1e-5, rtol=0)
    distances = torch.tensor([large_model_routes.distance_between(pair.forward, probe.model) for pair in pairs])
    library = distance_correlation(probe.model, pairs, distances.mean()[None].double())
    predicted: dict[str, Any] = large_model_routes.rope_predictions(probe.model, pairs, sample)
    assert_close(predicted["spectrum"], library.spectrum[0])
    assert_close(predicted["same_content"].value, library.measured[0].double())
    assert_close(predicted["isotropic"], library.isotropic.expand(2, 4).double())


def test_the_first_layer_does_what_its_content_and_rope_say() -> None:
    """One-token names at mirrored places: layer 0 sees the same content in both queries."""
    model, pairs = random_model(**SHAPE), mirrored_pairs(causal=False, count=12)
    sample = large_model_routes.same_lengths(pairs, [0] * 6 + [1] * 6)
    predicted: dict[str, Any] = large_model_routes.rope_predictions(model, pairs, sample)
    measured: dict[str, Any] = large_model_routes.routes(model, pairs, sample)
    assert_close(predicted["same_content"].value[0], measured["correlation"].value[0], atol=1e-5, rtol=0)
    assert (predicted["same_content"].value[1] - measured["correlation"].value[1]).abs().max() > 1e-3
    theta = torch.tensor([10_000 ** (-2 * plane / 8) for plane in range(4)]).double()
    assert model.cfg.head_dim == 8
    assert_close(predicted["isotropic"], torch.cos(2 * 3 * theta).mean().expand(2, 4), atol=1e-6, rtol=0)
    # The energies of either context, added up plane by plane.
    content = compute_content(model, [pair.forward for pair in pairs])
    planes = plane_products(content, require_rope(model))
    inside = torch.cat([of - of.mean(0) for of in (planes[:6], planes[6:])])
    squares = inside.abs().pow(2).sum(0).double()
    expected = (squares * torch.cos(2 * 3 * theta)).sum(-1) / squares.sum(-1)
    assert_close(predicted["spectrum"], expected, atol=1e-5, rtol=0)


def test_facts_are_compared_with_names_of_their_length(probe: Probe) -> None:
    prompts = probe.prompts["relational"]
    sample = large_model_routes.same_lengths(prompts.pairs, prompts.templates)
    for members in sample.members():
        asked = [(prompts.templates[index], prompts.pairs[index]) for index in members.tolist()]
        assert (
            len({(template, pair.side, len(pair.forward.source), len(pair.forward.answer)) for template, pair in asked})
            == 1
        )
    assert len(sample.members()) == len(
        {
            (t, p.side, len(p.forward.source), len(p.forward.answer))
            for t, p in zip(prompts.templates, prompts.pairs, strict=True)
        }
    )


def test_distances_and_even_attention_are_read_off_the_words(probe: Probe) -> None:
    pair = next(pair for pair in probe.pairs("positional") if len(pair.forward.answer) > 1)
    for query in (pair.forward, pair.reverse):
        rows, source = query.readout(probe.model.cfg), range(*query.source_span)
        expected = abs(sum(source) / len(source) - sum(rows) / len(rows))
        assert large_model_routes.distance_between(query, probe.model) == expected
        share = large_model_routes.uniform_share(query, probe.model)
        assert share == pytest.approx(len(source) / len(query.tokens))


def test_the_same_query_twice_is_one_route_and_its_null_is_not(probe: Probe) -> None:
    pairs = [replace(pair, reverse=pair.forward) for pair in probe.pairs("positional")]
    sample = FactSample.of(pairs, probe.prompts["positional"].templates)
    measured: dict[str, Any] = large_model_routes.routes(probe.model, pairs, sample)
    assert_close(measured["correlation"].value, torch.ones(2, 4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (measured["selectivity"].value < 1e-9).all()
    assert (measured["correlation_null"].interval[1] < 0.999).all()
    assert measured["correlation_null"].over(2).value.abs() < 0.25
    assert (measured["selectivity_null"].value > 1e-4).all()


def test_an_arm_has_routes_but_no_correlation(tmp_path: Path) -> None:
    result = result_of(large_model_routes.ANALYSIS, [tiny_probe(tmp_path, "qwen2")], tmp_path)
    for row in result.rows:
        assert 0 < row["forward"] < 1 and 0 < row["reverse"] < 1
        assert row["correlation"] is None and row["selectivity_null"] is None and row["isotropic"] is None
    assert not any("correlation" in name for name in result.summary)
    figure = large_model_routes.draw(result)
    said = [trace.text for trace in traces(figure, mode="text")]
    assert len(said) == 2 * 3 and all("undefined" in text for (text,) in said)


def test_the_summary_is_of_the_rows(result: Result) -> None:
    for kind in KINDS:
        row = at(result, kind, None, None)
        for name in large_model_routes.MEASURES:
            estimate = result.summary[f"tiny-llada / {kind} / {name}"]
            assert (estimate.value, estimate.low, estimate.high) == (row[name], row[f"{name}_low"], row[f"{name}_high"])
            assert estimate.n == 8
        assert result.summary[f"tiny-llada / {kind} / isotropic"].value == row["isotropic"]


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_the_figure_shows_every_checkpoint_and_kind(result: Result, checkpoints: int) -> None:
    rows = [{**row, "checkpoint": f"model {copy}"} for copy in range(checkpoints) for row in result.rows]
    many = replace(result, rows=rows)
    figure = large_model_routes.draw(replace(many, summary=dict(large_model_routes.summarize(many))))
    maps = traces(figure, type="heatmap")
    assert len(maps) == 2 * checkpoints
    assert [[maps[0].z[layer][head] for head in range(4)] for layer in range(2)] == [
        [at(result, "positional", layer, head)["correlation"] for head in range(4)] for layer in range(2)
    ]
    listed = [(trace.name, trace.legend) for trace in traces(figure, showlegend=True)]
    assert sorted(listed) == sorted(set(listed)) and ("forward and reverse", "legend2") in listed


def test_one_fact_has_routes_and_nothing_to_correlate(tmp_path: Path) -> None:
    result = result_of(large_model_routes.ANALYSIS, [tiny_probe(tmp_path, "dream", facts=1)], tmp_path)
    row = at(result, "positional", 0, 0)
    assert row["forward"] == row["forward_low"] and row["correlation"] is None and row["selectivity_null"] is None
    large_model_routes.draw(result)
