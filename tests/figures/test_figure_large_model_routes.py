"""Routes of checkpoints: rows agree with the library, predictions with evaluation, and figures hold any model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model, seeded
from model_helpers import SHAPE, mirrored_pairs
from probe_helpers import at, result_of, tiny_probe, traces
from torch.testing import assert_close

from analyses import large_model_routes
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.rope import compute_content, distance_correlation, plane_products, require_rope
from mdm_interp.measures.routes import compute_routes, score_correlation
from mdm_interp.stats.correlations import correlate
from mdm_interp.stats.resampling import FactSample, NullDraws
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
        for name in large_model_routes.MEASURES:
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


def test_in_one_context_they_are_the_librarys_measures() -> None:
    model, pairs = random_model(**SHAPE), mirrored_pairs(causal=False, count=12)
    sample = apart([0] * 12)
    measured: dict[str, Any] = large_model_routes.routes(model, pairs, sample)
    forward, reverse = (
        compute_routes(model, [getattr(pair, side) for pair in pairs]) for side in ("forward", "reverse")
    )
    expected = correlate(forward.contrast.double(), reverse.contrast.double())
    assert_close(measured["correlation"].value, expected, atol=1e-9, rtol=0)
    assert_close(measured["score_correlation"].value.float(), score_correlation(model, pairs), atol=1e-5, rtol=0)
    odd, even = ((forward.contrast + sign * reverse.contrast).pow(2).mean(0) for sign in (-1, 1))
    assert_close(measured["selectivity"].value.float(), odd / (odd + even), atol=1e-5, rtol=0)
    library = distance_correlation(model, pairs, torch.tensor([3.0], dtype=torch.float64))
    predicted: dict[str, Any] = large_model_routes.rope_predictions(model, pairs, sample)
    assert_close(predicted["spectrum"], library.spectrum[0])
    assert_close(predicted["same_content"].value, library.measured[0].double())
    assert_close(predicted["isotropic"], library.isotropic.expand(2, 4).double())


def test_the_first_layer_does_what_its_content_and_rope_say() -> None:
    """One-token names at mirrored places: layer 0 sees the same content in both queries."""
    model, pairs = random_model(**SHAPE), mirrored_pairs(causal=False, count=12)
    sample = large_model_routes.same_lengths(pairs, [0] * 6 + [1] * 6)
    predicted: dict[str, Any] = large_model_routes.rope_predictions(model, pairs, sample)
    measured: dict[str, Any] = large_model_routes.routes(model, pairs, sample)
    assert_close(predicted["same_content"].value[0], measured["score_correlation"].value[0], atol=1e-5, rtol=0)
    assert (predicted["same_content"].value[1] - measured["score_correlation"].value[1]).abs().max() > 1e-3
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


def apart(contexts: list[int]) -> FactSample:
    """Facts of one pair each that share nothing: random tokens are no names."""
    return FactSample(torch.arange(len(contexts)), torch.tensor(contexts), torch.arange(len(contexts)))


def shifted_pairs(relations: tuple[int, ...], count: int = 12, d_vocab: int = 13) -> list[QueryPair]:
    """Pairs for a model that reads the answer one position before it, where the same token stands in both queries. The
    source is at `3 + n` of the readout forward, n fillers between, and at -2 in reverse."""
    generator, pairs = seeded(3), []
    for fact in range(count):
        before, source, answer, *filler = torch.randint(1, d_vocab, (7,), generator=generator).tolist()
        fillers = filler[: relations[fact % len(relations)]]
        forward = Query((before, 0, *fillers, 7, source), (answer,), (1, 2), (3 + len(fillers), 4 + len(fillers)))
        reverse = Query((source, 7, before, 0), (answer,), (3, 4), (0, 1))
        pairs.append(QueryPair(forward, reverse, fact, "left"))
    return pairs


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_each_source_is_at_its_own_offset_of_a_shifted_readout(rotary_dim: int) -> None:
    """In the first layer of a model that reads one before the answer, same content is measured, and the predictions
    turn by the sum of both distances: 3 and 2, or 5 and 2."""
    shape: dict[str, Any] = {"n_layers": 1, "d_head": 8, "rotary_dim": rotary_dim, "readout_shift": -1}
    model, pairs = random_model(dtype="float64", **shape), shifted_pairs((0, 2))
    sample = apart([0] * 12)
    assert large_model_routes.offsets_of([pair.forward for pair in pairs], model).tolist() == [3, 5] * 6
    assert large_model_routes.offsets_of([pair.reverse for pair in pairs], model).tolist() == [-2] * 12
    predicted: dict[str, Any] = large_model_routes.rope_predictions(model, pairs, sample)
    measured: dict[str, Any] = large_model_routes.routes(model, pairs, sample)
    assert_close(predicted["same_content"].value, measured["score_correlation"].value, atol=1e-9, rtol=0)
    assert measured["selectivity"].value.isnan().all() and not measured["correlation"].value.isnan().any()
    theta = [10_000 ** (-2 * plane / rotary_dim) for plane in range(rotary_dim // 2)]
    cosines = [[math.cos(apart * angle) for angle in theta] for apart in (5, 7)]
    still = (8 - rotary_dim) / 8
    expected = np.mean(cosines) * (1 - still) + still
    assert_close(predicted["isotropic"], torch.full((1, 4), expected, dtype=torch.float64), atol=1e-9, rtol=0)
    content = compute_content(model, [pair.forward for pair in pairs])
    products = plane_products(content, require_rope(model))
    energy = (products - products.mean(0)).abs().pow(2)[:, 0]
    unturned = (content.q * content.k)[:, 0, :, rotary_dim:].sum(-1)
    unturned = 2 * (unturned - unturned.mean(0)).pow(2)
    for head in range(4):
        even = sum(
            float(energy[fact, head, plane]) * cosines[fact % 2][plane]
            for fact in range(12)
            for plane in range(rotary_dim // 2)
        )
        whole = float(energy[:, head].sum() + unturned[:, head].sum())
        value = (even + float(unturned[:, head].sum())) / whole
        assert predicted["spectrum"][0, head].item() == pytest.approx(value, abs=1e-9)


def test_two_distances_predict_as_their_sum() -> None:
    """3 and 1 positions, as 2 and 2: 0.836, and neither 0.774 of twice 3 nor 0.927 of twice 1."""
    shape: dict[str, Any] = {"n_layers": 1, "n_heads": 1, "d_head": 128, "rotary_base": 1e6, "readout_shift": -1}
    forward, reverse = Query((5, 0, 7, 1), (2,), (1, 2), (3, 4)), Query((1, 5, 0), (2,), (2, 3), (0, 1))
    pairs = [QueryPair(forward, reverse, 0, "left"), QueryPair(replace(forward, answer=(3,)), reverse, 1, "left")]
    pairs[1] = replace(pairs[1], reverse=replace(reverse, answer=(3,)))
    predicted = large_model_routes.rope_predictions(random_model(**shape), pairs, FactSample.of(pairs))
    assert float(predicted["isotropic"]) == pytest.approx(0.836, abs=5e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "still"),
    [({"position": "alibi"}, slice(0, 8)), ({"position": "learned"}, slice(0, 8)), ({"rotary_dim": 4}, slice(4, 8))],
    ids=["alibi", "learned", "partial rope"],
)
def test_what_no_softmax_sees_changes_raw_scores_only(scheme: dict[str, Any], still: slice) -> None:
    """The same vector is added to every key of a head, in dimensions that do not rotate."""
    model, pairs = (
        random_model(dtype="float64", d_head=8, qkv_bias=True, **scheme),
        mirrored_pairs(causal=False, count=12),
    )
    sample = apart([0] * 12)
    before: dict[str, Any] = large_model_routes.routes(model, pairs, sample)
    with torch.no_grad():
        for block in model.blocks:
            added: Any = 3 * torch.randn(8, generator=seeded(0), dtype=torch.float64)
            block.attn.get_parameter("b_K")[:, still] += added[still]
    after: dict[str, Any] = large_model_routes.routes(model, pairs, sample)
    for name in ("forward", "correlation", "correlation_null", "selectivity", "selectivity_null"):
        assert_close(after[name].value, before[name].value, atol=1e-9, rtol=0)
    assert (after["score_correlation"].value - before["score_correlation"].value).abs().max() > 1e-2


def test_selectivity_is_of_mirrored_pairs_only(probe: Probe, result: Result, tmp_path: Path) -> None:
    for kind in KINDS:
        row = at(result, kind, None, None)
        mirrored = {pair.fact for pair in probe.pairs(kind) if large_model_routes.is_mirrored(pair, probe.model)}
        assert row["mirrored"] == row["selectivity_n"] == len(mirrored) > 0
    shifted = result_of(large_model_routes.ANALYSIS, [tiny_probe(tmp_path, "dream")], tmp_path)
    for row in shifted.rows:
        assert row["correlation"] is not None
        if row["kind"] == "positional":
            assert row["mirrored"] == 0 and row["selectivity"] is None and row["selectivity_null"] is None


def test_a_partner_of_the_own_cluster_is_no_null(probe: Probe) -> None:
    """Two facts that share a name, and one that does not: a fact of the pair meets the third one only."""
    model, pairs = random_model(position="none", n_layers=1), mirrored_pairs(causal=False, count=3)
    sample = FactSample(torch.arange(3), torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1]))
    null = large_model_routes.routes(model, pairs, sample)["selectivity_null"]
    forward, reverse = (
        compute_routes(model, [getattr(pair, side) for pair in pairs]).contrast.double()
        for side in ("forward", "reverse")
    )

    def share(meetings: list[tuple[int, int]]) -> torch.Tensor:
        odd, even = (
            torch.stack([(forward[one] + sign * reverse[two]).pow(2) for one, two in meetings]).mean(0)
            for sign in (-1, 1)
        )
        return odd / (odd + even)

    possible = torch.stack([share([(0, 2), (1, 2), (2, other)]) for other in (0, 1)])
    assert isinstance(null, NullDraws)
    seen = null.draws[~null.draws.isnan().flatten(1).any(1)]
    assert 60 < len(seen) < 140  # half of 200; in the others the clusters meet themselves
    assert ((seen[:, None] - possible).abs().flatten(2).amax(2) < 1e-6).any(1).all()


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


def test_offsets_and_even_attention_are_read_off_the_words(probe: Probe) -> None:
    pair = next(pair for pair in probe.pairs("positional") if len(pair.forward.answer) > 1)
    for query in (pair.forward, pair.reverse):
        rows, source = query.readout(probe.model.cfg), range(*query.source_span)
        expected = sum(source) / len(source) - sum(rows) / len(rows)
        assert large_model_routes.offsets_of([query], probe.model).tolist() == [expected]
        share = large_model_routes.uniform_share(query, probe.model)
        assert share == pytest.approx(len(source) / len(query.tokens))


def test_a_model_without_positions_has_one_route_and_its_null_is_another() -> None:
    model, pairs = random_model(position="none", n_layers=1), mirrored_pairs(causal=False, count=12)
    measured: dict[str, Any] = large_model_routes.routes(model, pairs, apart([0] * 6 + [1] * 6))
    assert_close(measured["correlation"].value, torch.ones(1, 4, dtype=torch.float64), atol=1e-5, rtol=0)
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
    assert len(said) == 2 * 4 and all("undefined" in text for (text,) in said)


def test_the_summary_is_of_the_rows(result: Result) -> None:
    for kind in KINDS:
        row = at(result, kind, None, None)
        for name in large_model_routes.MEASURES:
            estimate = result.summary[f"tiny-llada / {kind} / {name}"]
            stated = {"value": row[name], **{part: row[f"{name}_{part}"] for part in ("low", "high", "n")}}
            assert repr(estimate) == repr(estimate_in(stated))  # NaN where it is null
        assert result.summary[f"tiny-llada / {kind} / isotropic"].value == row["isotropic"]


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_the_figure_shows_every_checkpoint_and_kind(result: Result, checkpoints: int) -> None:
    rows = [{**row, "checkpoint": f"model {copy}"} for copy in range(checkpoints) for row in result.rows]
    many = replace(result, rows=rows)
    figure = large_model_routes.draw(many)
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
    assert row["forward"] is not None and row["forward_low"] is None and row["forward_n"] == 1
    assert row["correlation"] is None and row["selectivity_null"] is None
    large_model_routes.draw(result)
