"""Routes of facts: the library's measures within a context, predictions by their formulas, nulls of other facts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model, seeded
from model_helpers import SHAPE, mirrored_pairs
from probe_helpers import tiny_probe
from torch.testing import assert_close

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.experiments.subjects import Probe
from mdm_interp.measures.fact_routes import (
    FactRoutes,
    compute_fact_routes,
    offsets_of,
    rope_predictions,
    same_lengths,
    uniform_share,
)
from mdm_interp.measures.rope import compute_content, distance_correlation, plane_products, require_rope
from mdm_interp.measures.routes import compute_routes, score_correlation
from mdm_interp.stats.correlations import correlate
from mdm_interp.stats.resampling import Draws, FactSample, NullDraws


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("fact_routes"), "llada")


def apart(contexts: list[int]) -> FactSample:
    """Facts of one pair each that share nothing: random tokens are no names."""
    return FactSample(torch.arange(len(contexts)), torch.tensor(contexts), torch.arange(len(contexts)))


def shifted_pairs(relations: tuple[int, ...], count: int = 12, d_vocab: int = 13) -> list[QueryPair]:
    """Pairs for a model that reads the answer one position before it, where the same token is in both queries. The
    source is at `3 + n` of the readout forward, n fillers between, and at -2 in reverse."""
    generator, pairs = seeded(3), []
    for fact in range(count):
        before, source, answer, *filler = torch.randint(1, d_vocab, (7,), generator=generator).tolist()
        fillers = filler[: relations[fact % len(relations)]]
        forward = Query((before, 0, *fillers, 7, source), (answer,), (1, 2), (3 + len(fillers), 4 + len(fillers)))
        reverse = Query((source, 7, before, 0), (answer,), (3, 4), (0, 1))
        pairs.append(QueryPair(forward, reverse, fact, "left"))
    return pairs


def test_in_one_context_they_are_the_librarys_measures() -> None:
    model, pairs = random_model(**SHAPE), mirrored_pairs(causal=False, count=12)
    sample = apart([0] * 12)
    measured = compute_fact_routes(model, pairs, sample)
    forward, reverse = (
        compute_routes(model, [getattr(pair, side) for pair in pairs]) for side in ("forward", "reverse")
    )
    expected = correlate(forward.contrast.double(), reverse.contrast.double())
    assert_close(measured.correlation.effect.value, expected, atol=1e-9, rtol=0)
    raw = score_correlation(model, pairs).effect
    assert_close(measured.score_correlation.value.float(), raw, atol=1e-5, rtol=0)
    odd, even = ((forward.contrast + sign * reverse.contrast).pow(2).mean(0) for sign in (-1, 1))
    assert_close(measured.selectivity.effect.value.float(), odd / (odd + even), atol=1e-5, rtol=0)
    library = distance_correlation(model, pairs, torch.tensor([3.0], dtype=torch.float64))
    predicted = rope_predictions(model, pairs, sample)
    assert_close(predicted.spectrum, library.spectrum[0])
    assert_close(predicted.same_content.value, library.measured[0].double())
    assert_close(predicted.isotropic, library.isotropic.expand(2, 4).double())


def test_the_first_layer_does_what_its_content_and_rope_say() -> None:
    """One-token names at mirrored places: layer 0 sees the same content in both queries."""
    model, pairs = random_model(**SHAPE), mirrored_pairs(causal=False, count=12)
    sample = same_lengths(pairs, [0] * 6 + [1] * 6)
    predicted = rope_predictions(model, pairs, sample)
    measured = compute_fact_routes(model, pairs, sample)
    assert_close(predicted.same_content.value[0], measured.score_correlation.value[0], atol=1e-5, rtol=0)
    assert (predicted.same_content.value[1] - measured.score_correlation.value[1]).abs().max() > 1e-3
    theta = torch.tensor([10_000 ** (-2 * plane / 8) for plane in range(4)]).double()
    assert model.cfg.head_dim == 8
    assert_close(predicted.isotropic, torch.cos(2 * 3 * theta).mean().expand(2, 4), atol=1e-6, rtol=0)
    # The energies of either context, added up plane by plane.
    content = compute_content(model, [pair.forward for pair in pairs])
    planes = plane_products(content, require_rope(model))
    inside = torch.cat([of - of.mean(0) for of in (planes[:6], planes[6:])])
    squares = inside.abs().pow(2).sum(0).double()
    expected = (squares * torch.cos(2 * 3 * theta)).sum(-1) / squares.sum(-1)
    assert_close(predicted.spectrum, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_each_source_is_at_its_own_offset_of_a_shifted_readout(rotary_dim: int) -> None:
    """In the first layer of a model that reads one before the answer, same content is measured, and the predictions
    turn by the sum of both distances: 3 and 2, or 5 and 2."""
    shape: dict[str, Any] = {"n_layers": 1, "d_head": 8, "rotary_dim": rotary_dim, "readout_shift": -1}
    model, pairs = random_model(dtype="float64", **shape), shifted_pairs((0, 2))
    sample = apart([0] * 12)
    assert offsets_of(model, [pair.forward for pair in pairs]).tolist() == [3, 5] * 6
    assert offsets_of(model, [pair.reverse for pair in pairs]).tolist() == [-2] * 12
    predicted = rope_predictions(model, pairs, sample)
    measured = compute_fact_routes(model, pairs, sample)
    assert_close(predicted.same_content.value, measured.score_correlation.value, atol=1e-9, rtol=0)
    assert measured.selectivity.effect.value.isnan().all() and not measured.correlation.effect.value.isnan().any()
    theta = [10_000 ** (-2 * plane / rotary_dim) for plane in range(rotary_dim // 2)]
    cosines = [[math.cos(apart * angle) for angle in theta] for apart in (5, 7)]
    still = (8 - rotary_dim) / 8
    expected = np.mean(cosines) * (1 - still) + still
    assert_close(predicted.isotropic, torch.full((1, 4), expected, dtype=torch.float64), atol=1e-9, rtol=0)
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
        assert predicted.spectrum[0, head].item() == pytest.approx(value, abs=1e-9)


def test_two_distances_predict_as_their_sum() -> None:
    """3 and 1 positions, as 2 and 2: 0.836, and neither 0.774 of twice 3 nor 0.927 of twice 1."""
    shape: dict[str, Any] = {"n_layers": 1, "n_heads": 1, "d_head": 128, "rotary_base": 1e6, "readout_shift": -1}
    forward, reverse = Query((5, 0, 7, 1), (2,), (1, 2), (3, 4)), Query((1, 5, 0), (2,), (2, 3), (0, 1))
    pairs = [QueryPair(forward, reverse, 0, "left"), QueryPair(replace(forward, answer=(3,)), reverse, 1, "left")]
    pairs[1] = replace(pairs[1], reverse=replace(reverse, answer=(3,)))
    predicted = rope_predictions(random_model(**shape), pairs, FactSample.of(pairs))
    assert float(predicted.isotropic) == pytest.approx(0.836, abs=5e-4)


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
    before = compute_fact_routes(model, pairs, sample)
    with torch.no_grad():
        for block in model.blocks:
            added: Any = 3 * torch.randn(8, generator=seeded(0), dtype=torch.float64)
            block.attn.get_parameter("b_K")[:, still] += added[still]
    after = compute_fact_routes(model, pairs, sample)
    for one, other in zip(seen_by_softmax(after), seen_by_softmax(before), strict=True):
        assert_close(one.value, other.value, atol=1e-9, rtol=0)
    assert (after.score_correlation.value - before.score_correlation.value).abs().max() > 1e-2


def seen_by_softmax(routes: FactRoutes) -> list[Draws]:
    contrasts = routes.correlation, routes.selectivity
    return [routes.forward, *(part for contrast in contrasts for part in (contrast.effect, contrast.null))]


def test_a_partner_of_the_own_cluster_is_no_null() -> None:
    """Two facts that share a name, and one that does not: a fact of the pair meets the third one only."""
    model, pairs = random_model(position="none", n_layers=1), mirrored_pairs(causal=False, count=3)
    sample = FactSample(torch.arange(3), torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1]))
    null = compute_fact_routes(model, pairs, sample).selectivity.null
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
    sample = same_lengths(prompts.pairs, prompts.templates)
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
        assert offsets_of(probe.model, [query]).tolist() == [expected]
        share = uniform_share(probe.model, query)
        assert share == pytest.approx(len(source) / len(query.tokens))


def test_a_model_without_positions_has_one_route_and_its_null_is_another() -> None:
    model, pairs = random_model(position="none", n_layers=1), mirrored_pairs(causal=False, count=12)
    measured = compute_fact_routes(model, pairs, apart([0] * 6 + [1] * 6))
    assert_close(measured.correlation.effect.value, torch.ones(1, 4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (measured.selectivity.effect.value < 1e-9).all()
    assert (measured.correlation.null.interval[1] < 0.999).all()
    assert measured.correlation.null.over(2).value.abs() < 0.25
    assert (measured.selectivity.null.value > 1e-4).all()
