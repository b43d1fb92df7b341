"""Routes: read from the model, split by parity, predicted from the rotation, and compared between the two sides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import LLAMA3, YARN, random_model, random_tokens, seeded, tiny_config
from model_helpers import SHAPE, llama_bridge
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.config import Attention, FactConfig
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.measures.rope import (
    Content,
    compute_content,
    distance_correlation,
    isotropic_correlation,
    plane_products,
    score_at_offset,
    spectrum_correlation,
)
from mdm_interp.measures.routes import (
    compute_routes,
    route_correlation,
    score_correlation,
    score_matrix,
)
from mdm_interp.models.positions import POSITION_SCHEMES, Rope, T5Bias
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.correlations import correlate

MASK = 12
# Lengths, source spans and answer spans all differ, so a batch of them is padded.
LEFT_SOURCES = [
    Query((4, 7, MASK), (3,), (2, 3), (0, 1)),
    Query((5, 9, 1, MASK, MASK, 2), (8, 6), (3, 5), (0, 2)),
    Query((1, 10, 2, MASK), (0,), (3, 4), (1, 3)),
]
BOTH_SIDES = [
    *LEFT_SOURCES,
    Query((MASK, MASK, 4, 10, 7), (2, 9), (0, 2), (3, 5)),
    Query((MASK, 7), (1,), (0, 1), (1, 2)),
]
ROTATIONS: dict[str, dict[str, Any]] = {
    "halves": {},
    "adjacent": {"rotary_adjacent_pairs": True},
    "part of the halves": {"rotary_dim": 4},
    "adjacent part": {"rotary_dim": 4, "rotary_adjacent_pairs": True},
    "normalised": {"use_qk_norm": True},
    "normalised part": {"use_qk_norm": True, "rotary_dim": 4, "rotary_scaling": LLAMA3},
    "yarn": {"rotary_scaling": YARN},
}


def make_rope(**changes: Any) -> Rope:
    return Rope(tiny_config(position="rope", n_heads=1, **changes))


def rope_of(model: HookedTransformer) -> Rope:
    assert isinstance(model.pos_embed, Rope)
    return model.pos_embed


def world_pairs(gap: int | tuple[int, int] = (2, 4), **asked: Any) -> list[QueryPair]:
    """Pairs of a world in the vocabulary of the tiny models; the facts are the same for every gap."""
    return FactWorld(FactConfig(n_entities=6, n_filler=3, seq_len=7, gap=gap), seed=1).query_pairs(**asked)


def random_products(scale: Tensor, *, samples: int, seed: int = 0) -> Tensor:
    """conj(q_p) k_p `[samples 1 1 plane]` of independent isotropic q and k, plane p scaled by `scale[p]`."""
    planes = torch.randn(2, samples, len(scale), 2, dtype=torch.float64, generator=seeded(seed))
    q, k = torch.view_as_complex(planes)
    return (q.conj() * k * scale)[:, None, None]


# ---- routes and content, read from the model


@pytest.mark.parametrize("position", ["rope", "t5_bias", "learned"])
@pytest.mark.parametrize(
    ("attention", "queries"), [("bidirectional", BOTH_SIDES), ("causal", LEFT_SOURCES)], ids=["MDM", "ARM"]
)
def test_routes_sum_over_the_source_and_average_over_the_answer(
    position: str, attention: str, queries: list[Query]
) -> None:
    model = random_model(position=position, attention=attention, n_key_value_heads=2)
    routes = compute_routes(model, queries)
    for row, query in enumerate(queries):
        _, cache = model.run_with_cache(torch.tensor([query.tokens]))
        rows = [at - 1 if attention == "causal" else at for at in range(*query.answer_span)]
        for layer in range(2):
            for kind, got in (("attn_scores", routes.scores), ("pattern", routes.pattern)):
                read = cache[kind, layer][0]
                expected = sum(read[:, at, source] for at in rows for source in range(*query.source_span)) / len(rows)
                assert_close(got[row, layer], expected, atol=2e-6, rtol=1e-5)
    assert routes.pattern.min() >= 0 and routes.pattern.max() <= 1


@pytest.mark.parametrize(("dtype", "n_answer"), [("float32", 10), ("float64", 3), ("bfloat16", 13)])
def test_a_masked_score_beside_the_source_leaves_the_route_finite(dtype: str, n_answer: int) -> None:
    """A masked score is the most negative number there is; averaged over the answer it must not reach infinity."""
    model = random_model(dtype=dtype, n_layers=1, n_ctx=20)
    query = Query((*[MASK] * n_answer, 3), (1,) * n_answer, (0, n_answer), (n_answer, n_answer + 1))
    longer = Query((MASK, *[1] * 15), (2,), (0, 1), (3, 4))
    together, alone = compute_routes(model, [query, longer]), compute_routes(model, [query])
    assert together.scores.isfinite().all()
    tolerance = 0.05 if dtype == "bfloat16" else 1e-5
    assert_close(together.scores[:1], alone.scores, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attention", get_args(Attention))
def test_content_is_the_query_at_the_readout_and_the_key_at_the_source(attention: str) -> None:
    block_size = 4 if attention == "block_causal" else None
    model = random_model(attention=attention, block_size=block_size, n_key_value_heads=2, qkv_bias=True)
    content = compute_content(model, LEFT_SOURCES)
    for row, query in enumerate(LEFT_SOURCES):
        _, cache = model.run_with_cache(torch.tensor([query.tokens]))
        rows = [at - 1 if attention == "causal" else at for at in range(*query.answer_span)]
        for layer in range(2):
            for head in range(4):
                q = sum(cache["q", layer][0, at, head] for at in rows) / len(rows)
                k = sum(cache["k", layer][0, at, head // 2] for at in range(*query.source_span))
                assert_close(content.q[row, layer, head], q, atol=1e-6, rtol=1e-5)
                assert_close(content.k[row, layer, head], k, atol=1e-6, rtol=1e-5)


def test_routes_and_content_keep_the_order_of_many_queries() -> None:
    """They work through their list in batches."""
    model = random_model(n_layers=1)
    queries = [*BOTH_SIDES * 110, BOTH_SIDES[1]]
    assert len(queries) > 512
    few, many = compute_routes(model, BOTH_SIDES), compute_routes(model, queries)
    assert_close(many.scores, torch.cat([few.scores.repeat(110, 1, 1), few.scores[1:2]]), atol=1e-5, rtol=0)
    keys = compute_content(model, BOTH_SIDES).k
    assert_close(compute_content(model, queries).k[-7:-1], torch.cat([keys[-1:], keys]), atol=1e-5, rtol=0)


# ---- fixed content at any offset


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS.keys())
@pytest.mark.parametrize("n_key_value_heads", [1, 4])
def test_score_at_offset_is_the_score_where_the_source_really_stands(
    rotation: dict[str, Any], n_key_value_heads: int
) -> None:
    """Content is taken at offset 1 only; in one layer it is the same wherever mask and source are."""
    model = random_model(
        n_layers=1, d_head=8, n_key_value_heads=n_key_value_heads, qkv_bias=True, dtype="float64", **rotation
    )
    offsets, context = [-5, -3, -2, -1, 1, 2, 4, 6], random_tokens(batch=1, pos=12)[0].tolist()

    def placed(offset: int) -> Query:
        tokens = list(context)
        tokens[5], tokens[5 + offset] = MASK, 3
        return Query(tuple(tokens), (0,), (5, 6), (5 + offset, 6 + offset))

    content = compute_content(model, [placed(1)])
    products = plane_products(content, rope_of(model))
    got = score_at_offset(products, rope_of(model), torch.tensor(offsets, dtype=torch.float64))[:, 0, 0]
    rotating = model.cfg.rotary_dim
    passed = (content.q * content.k)[0, 0, :, rotating:].sum(-1) / 8**0.5
    assert (passed.abs() > 1e-3).all() or rotating == 8
    for row, offset in enumerate(offsets):
        _, cache = model.run_with_cache(torch.tensor([placed(offset).tokens]))
        assert_close(got[row], cache["attn_scores", 0][0, :, 5, 5 + offset] - passed, atol=1e-9, rtol=0)
    assert got.std(0).min() > 1e-3


@pytest.mark.parametrize("adjacent", [False, True])
def test_even_and_odd_part_have_their_closed_form(adjacent: bool) -> None:
    rope = make_rope(d_head=8, rotary_adjacent_pairs=adjacent)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=seeded(0))
    offsets = torch.tensor([1.0, 3.0, 17.0], dtype=torch.float64)
    products = plane_products(Content(q, k), rope)
    right, left = (score_at_offset(products, rope, side * offsets).flatten() for side in (1, -1))
    for row, offset in enumerate(offsets.tolist()):
        even = odd = 0.0
        for plane in range(4):
            pair = (2 * plane, 2 * plane + 1) if adjacent else (plane, plane + 4)
            (qx, qy), (kx, ky) = (x[0, 0, 0, list(pair)].tolist() for x in (q, k))
            size, phase = math.hypot(qx, qy) * math.hypot(kx, ky), math.atan2(ky, kx) - math.atan2(qy, qx)
            turn = offset * 10_000 ** (-plane / 4)
            even += size * math.cos(phase) * math.cos(turn) / 8**0.5
            odd -= size * math.sin(phase) * math.sin(turn) / 8**0.5
        assert (right[row] + left[row]).item() / 2 == pytest.approx(even, abs=1e-6)
        assert (right[row] - left[row]).item() / 2 == pytest.approx(odd, abs=1e-6)


@pytest.mark.parametrize("rotation", [ROTATIONS["halves"], ROTATIONS["adjacent"]], ids=["halves", "adjacent"])
def test_gradients_of_the_scores_to_both_sides_have_their_closed_inner_product(rotation: dict[str, Any]) -> None:
    """With respect to W_Q and W_K of one head: the residuals' squared norms weigh the planes' energies."""
    model = random_model(n_layers=1, d_head=8, normalization_type=None, dtype="float64", **rotation)
    attn, rope, head = model.blocks[0].attn, rope_of(model), 2
    x_i, x_j = model.W_E[MASK], model.W_E[3]

    def gradient(offset: int) -> Tensor:
        """Of the score with the mask at position 5, the source `offset` further right."""
        scores: list[Tensor] = []
        tokens = random_tokens(batch=1, pos=11)
        tokens[0, 5], tokens[0, 5 + offset] = MASK, 3
        model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.0.attn.hook_attn_scores", lambda tensor, hook: scores.append(tensor))]
        )
        parts = torch.autograd.grad(scores[0][0, head, 5, 5 + offset], [attn.W_Q, attn.W_K])
        return torch.cat([part.flatten() for part in parts])

    q, k = rope.planes(x_i @ attn.W_Q[head]).abs() ** 2, rope.planes(x_j @ attn.W_K[head]).abs() ** 2
    for distance in (1, 4):
        turn = torch.cos(2 * distance * rope.theta)
        expected = (x_i @ x_i * (k * turn).sum() + x_j @ x_j * (q * turn).sum()) / 8
        assert_close(gradient(distance) @ gradient(-distance), expected, atol=1e-9, rtol=1e-9)
        assert_close(gradient(distance) @ gradient(distance), (x_i @ x_i * k.sum() + x_j @ x_j * q.sum()) / 8)


# ---- predicted correlation


def test_isotropic_kernel_of_a_large_head() -> None:
    got = isotropic_correlation(make_rope(d_head=128).theta, torch.tensor([0.0, 1.0, 4.0, 16.0, 256.0]))
    assert got.tolist() == pytest.approx([1, 0.897, 0.714, 0.557, 0.219], abs=5e-4)


def test_random_isotropic_content_correlates_as_predicted() -> None:
    """20 000 draws: three standard errors of a correlation are at most 0.02."""
    rope, distance = make_rope(d_head=128), torch.tensor([1.0, 4.0, 16.0, 256.0])
    products = random_products(torch.ones(64), samples=20_000)
    right, left = (score_at_offset(products, rope, side * distance).transpose(0, 1) for side in (1, -1))
    measured = correlate(right, left).flatten()
    isotropic = isotropic_correlation(rope.theta, distance)
    assert_close(measured, isotropic, atol=0.02, rtol=0)
    assert_close(spectrum_correlation(products, rope.theta, distance).flatten(), isotropic, atol=0.02, rtol=0)
    even, odd = (right + left).var(0).flatten(), (right - left).var(0).flatten()
    assert_close((even - odd) / (even + odd), measured, atol=1e-3, rtol=0)


def test_spectrum_weighs_planes_by_their_energy_where_isotropic_is_wrong() -> None:
    """Planted: the fastest plane carries a hundred times the energy of each other one."""
    rope, distance = make_rope(d_head=8), torch.tensor([1.0, 2.0])
    products = random_products(torch.tensor([10.0, 1.0, 1.0, 1.0]), samples=20_000)
    right, left = (score_at_offset(products, rope, side * distance).transpose(0, 1) for side in (1, -1))
    measured = correlate(right, left).flatten()
    turns = [[math.cos(2 * d * rate) for rate in (1, 0.1, 0.01, 0.001)] for d in (1, 2)]
    expected = torch.tensor([(100 * fast + sum(slow)) / 103 for fast, *slow in turns], dtype=torch.float64)
    assert_close(measured, expected, atol=0.02, rtol=0)
    assert_close(spectrum_correlation(products, rope.theta, distance).flatten(), expected, atol=0.02, rtol=0)
    assert (isotropic_correlation(rope.theta, distance) - measured).abs().min() > 0.5


def test_spectrum_correlation_by_hand() -> None:
    """What all queries share does not count: deviations of 1 and of 2i in the planes make energies 1 and 4."""
    products = torch.tensor([[5 + 1, 3j + 2j], [5 - 1, 3j - 2j]], dtype=torch.complex128)[:, None, None]
    theta = torch.tensor([math.pi / 2, math.pi / 4], dtype=torch.float64)
    got = spectrum_correlation(products, theta, torch.tensor([0.0, 1.0, 2.0]))[:, 0, 0]
    assert got.tolist() == pytest.approx([1, (-1 + 0) / 5, (1 - 4) / 5])


# ---- correlation over pairs


def test_correlation_by_hand() -> None:
    x = torch.tensor([[1.0, 1.0, 2.0, 4.0], [2.0, 2.0, 2.0, 5.0], [3.0, 3.0, 2.0, 6.0]])
    y = torch.tensor([[1.0, 9.0, 1.0, 2.0], [3.0, 6.0, 2.0, 2.0], [2.0, 3.0, 3.0, 2.0]])
    got = correlate(x, y)
    assert got[:2].tolist() == pytest.approx([0.5, -1.0])
    assert got[2:].isnan().all()  # one side constant


@pytest.mark.parametrize("value", [0.1, -2.31, 7.7])
def test_what_does_not_vary_has_no_correlation(value: float) -> None:
    """The mean of equal numbers need not be that number."""
    for count in range(2, 31):
        constant, varying = torch.full((count,), value), torch.randn(count, generator=seeded(0))
        assert correlate(constant, varying).isnan() and correlate(constant, constant).isnan()


@pytest.mark.parametrize(("position", "n_layers"), [("alibi", 1), ("none", 1), ("none", 3)])
def test_without_an_odd_part_both_sides_are_routed_alike(position: str, n_layers: int) -> None:
    """ALiBi in one layer only: there the other tokens' distances to the pair do not matter."""
    model = random_model(position=position, n_layers=n_layers, d_mlp=20)
    assert_close(score_correlation(model, world_pairs()).effect, torch.ones(n_layers, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_random_routes_that_know_sides_are_not_alike(position: str) -> None:
    assert score_correlation(random_model(position=position, n_layers=1), world_pairs()).effect.max() < 0.99


def test_t5_tells_sides_apart_by_position_and_not_by_content() -> None:
    model = random_model(position="t5_bias", n_layers=1)
    alike, one_side, both_sides = torch.ones(1, 4), world_pairs(gap=3, objective="source_only"), world_pairs(gap=3)
    # One offset per side: the two buckets shift all forward and all reverse scores, and content decides the rest.
    assert_close(score_correlation(model, one_side).effect, alike, atol=1e-5, rtol=0)
    assert score_correlation(model, both_sides).effect.min() < 0.9
    assert isinstance(model.pos_embed, T5Bias)
    with torch.no_grad():
        model.pos_embed.table[16:] = model.pos_embed.table[:16]  # the same buckets to both sides
    assert_close(score_correlation(model, both_sides).effect, alike, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("key_half", "expected"), [(slice(0, 4), 1.0), (slice(4, 8), -1.0)], ids=["even", "odd"])
def test_planted_even_and_odd_routes(key_half: slice, expected: float) -> None:
    """Queries in the first direction of every plane; keys along it (phase 0) or across it (phase +-90 degrees)."""
    model = random_model(n_layers=1, d_head=8)
    attn, other = model.blocks[0].attn, slice(4, 8) if key_half.start == 0 else slice(0, 4)
    with torch.no_grad():
        attn.W_Q[..., 4:] = 0
        attn.W_K[..., other] = 0
    assert_close(score_correlation(model, world_pairs()).effect, torch.full((1, 4), expected), atol=1e-5, rtol=0)


def test_route_correlation_is_the_correlation_of_the_two_lists_of_scores() -> None:
    model, pairs = random_model(), world_pairs()
    forward, reverse = (
        torch.stack(
            [
                model.run_with_cache(torch.tensor([query.tokens]))[1]["attn_scores", 1][
                    0, :, query.answer_span[0], query.source_span[0]
                ]
                for query in queries
            ]
        ).detach()
        for queries in ([pair.forward for pair in pairs], [pair.reverse for pair in pairs])
    )
    expected = [torch.corrcoef(torch.stack([forward[:, head], reverse[:, head]]))[0, 1] for head in range(4)]
    assert_close(score_correlation(model, pairs).effect[1], torch.stack(expected), atol=1e-4, rtol=0)


# ---- correlation by distance


def single_sided(gap: int) -> list[QueryPair]:
    return [pair for pair in world_pairs(gap, n_contexts=1) if pair.side == "left"]


@pytest.mark.parametrize(
    "rotation",
    [
        pytest.param(
            changes,
            id=name,
        )
        for name, changes in ROTATIONS.items()
    ],
)
def test_at_each_distance_the_correlation_is_the_routes_of_pairs_that_far_apart(rotation: dict[str, Any]) -> None:
    model = random_model(n_layers=1, d_head=8, **rotation)
    got = distance_correlation(model, single_sided(2), torch.tensor([2.0, 3.0, 6.0])).measured
    expected = torch.stack([score_correlation(model, single_sided(gap)).effect for gap in (2, 3, 6)])
    assert expected.min() < 0.9
    assert_close(got.float(), expected, atol=1e-4, rtol=0)


def test_both_predictions_come_with_the_measurement() -> None:
    model, pairs, distance = random_model(d_head=8), world_pairs(), torch.tensor([1.0, 5.0])
    rope, got = rope_of(model), distance_correlation(model, pairs, distance)
    products = plane_products(compute_content(model, [pair.forward for pair in pairs]), rope)
    assert torch.equal(got.distance, distance)
    assert_close(got.isotropic, isotropic_correlation(rope.theta, distance))
    assert_close(got.spectrum, spectrum_correlation(products, rope.theta, distance), atol=1e-5, rtol=0)
    assert got.measured.shape == got.spectrum.shape == (2, 2, 4)


def test_half_precision_models_have_a_distance_correlation() -> None:
    distance, pairs = torch.tensor([1.0, 5.0]), world_pairs()
    coarse, exact = (
        distance_correlation(random_model(dtype=dtype, d_head=8), pairs, distance) for dtype in ("bfloat16", "float32")
    )
    assert_close(coarse.measured, exact.measured, atol=0.1, rtol=0)


# ---- what is refused


@pytest.mark.parametrize("position", [name for name in POSITION_SCHEMES if name != "rope"])
def test_distance_correlation_needs_a_rotation(position: str) -> None:
    with pytest.raises(UserError, match=f"position scheme '{position}' has no rotation to predict from; use 'rope'"):
        distance_correlation(random_model(position=position), world_pairs(), torch.tensor([1.0]))


def test_correlations_need_pairs() -> None:
    with pytest.raises(UserError, match="query_pairs: a correlation needs several pairs, got none"):
        distance_correlation(random_model(), [], torch.tensor([1.0]))
    with pytest.raises(UserError, match="query_pairs: score correlation needs at least one pair, got none"):
        score_correlation(random_model(), [])


def test_score_correlation_is_undefined_for_an_arm() -> None:
    arm, pairs = random_model(attention="causal"), world_pairs(objective="causal")
    with pytest.raises(UserError, match="score correlation is undefined for pairs that share neither"):
        score_correlation(arm, pairs)
    with pytest.raises(UserError, match="score correlation is undefined"):  # one of them is enough
        score_correlation(random_model(), [*world_pairs(), pairs[0]])


# ---- the null of the score correlation

FACTS = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
ONE_CONTEXT = FACTS.query_pairs(n_contexts=1)


def model_of_facts(**changes: Any) -> HookedTransformer:
    facts = FACTS.config
    return random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id, **changes)


def test_route_null_is_the_mean_over_other_facts_of_the_same_side() -> None:
    two = model_of_facts(position="rope")
    null = score_correlation(two, ONE_CONTEXT).null
    forward, reverse = (
        compute_routes(two, [getattr(pair, side) for pair in ONE_CONTEXT]).scores.double()
        for side in ("forward", "reverse")
    )
    n = len(FACTS.facts)
    for layer in range(2):
        for head in range(two.cfg.n_heads):
            other = []
            for shift in range(1, n):
                moved = [2 * ((i // 2 - shift) % n) + i % 2 for i in range(2 * n)]  # pairs alternate left and right
                both = torch.stack([forward[:, layer, head], reverse[moved, layer, head]])
                other.append(float(torch.corrcoef(both)[0, 1]))
            assert null[layer, head].item() == pytest.approx(sum(other) / len(other), abs=1e-5)


def test_without_positions_routes_correlate_in_the_first_layer_and_their_null_does_not() -> None:
    none = model_of_facts(position="none")
    correlation = score_correlation(none, ONE_CONTEXT)
    assert correlation.effect[0].mean().item() == pytest.approx(1.0, abs=1e-4)
    assert correlation.null[0].mean() < 0.5


# ---- routes as the softmax sees them


def mirrored_rows(model: HookedTransformer, pairs: list[QueryPair]) -> tuple[Tensor, Tensor]:
    """Forward and reverse rows of scores, the reverse one mirrored by hand, `[pair layer head key_pos]`."""
    sides = []
    for side in ("forward", "reverse"):
        queries = [getattr(pair, side) for pair in pairs]
        names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
        _, cache = model.run_with_cache(torch.tensor([query.tokens for query in queries]), names_filter=names)
        rows = []
        for i, query in enumerate(queries):
            row = torch.stack([cache[name][i, :, query.answer_span[0]] for name in names]).double()
            answer, source = query.answer_span[0], query.source_span[0]
            if side == "reverse":
                row[..., [answer, source]] = row[..., [source, answer]]
            rows.append(row)
        sides.append(torch.stack(rows))
    return sides[0], sides[1]


def test_route_correlation_is_that_of_centred_mirrored_rows() -> None:
    model, pairs = random_model(position="rope"), world_pairs()
    forward, reverse = mirrored_rows(model, pairs)
    for layer in range(2):
        for head in range(4):
            x, y = (torch.cat([row - row.mean() for row in side[:, layer, head]]) for side in (forward, reverse))
            expected = float((x @ y) / (x.norm() * y.norm()))
            assert route_correlation(model, pairs)[layer, head].item() == pytest.approx(expected, abs=1e-5)


def test_route_correlation_is_one_without_positions_and_where_both_sides_are_sought_alike() -> None:
    assert_close(route_correlation(random_model(position="none"), world_pairs())[0], torch.ones(4).double())


def test_route_correlation_of_scores_that_rise_to_the_right_is_negative() -> None:
    """Over five positions, from either end: 0 10 20 30 40 forward and 0 -30 -20 -10 -40 in reverse, mirrored."""
    facts = FactConfig(n_entities=6, n_filler=3, seq_len=5, gap=4)
    model = random_model(position="t5_bias", n_layers=1)
    scheme = model.pos_embed
    assert isinstance(scheme, T5Bias)
    with torch.no_grad():
        half = model.cfg.relative_attention_num_buckets // 2
        for distance in range(5):
            scheme.table[distance] = -1000.0 * distance
            scheme.table[half + distance] = 1000.0 * distance
    pairs = FactWorld(facts, seed=1).query_pairs("source_only")
    assert_close(route_correlation(model, pairs), torch.full((1, 4), -0.6).double(), atol=0.01, rtol=0)


def with_a_key_bias(model: HookedTransformer) -> HookedTransformer:
    """A key bias in the dimensions that do not rotate moves all scores of a row alike."""
    rotated = model.cfg.rotary_dim or 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attn.b_K"):
                parameter[:, rotated:] += 3.0
    return model


@pytest.mark.parametrize(
    "changes", [{"position": "none"}, {"position": "alibi"}, {"position": "rope", "rotary_dim": 2}]
)
def test_routes_do_not_see_what_no_softmax_sees(changes: dict[str, Any]) -> None:
    plain, pairs = random_model(qkv_bias=True, **changes), world_pairs()
    biased = with_a_key_bias(random_model(qkv_bias=True, **changes))
    tokens = torch.tensor([pair.reverse.tokens for pair in pairs])
    assert_close(biased(tokens), plain(tokens), atol=1e-4, rtol=1e-4)  # no logit changes
    assert_close(route_correlation(biased, pairs), route_correlation(plain, pairs), atol=1e-4, rtol=0)
    reverse = [pair.reverse for pair in pairs]
    one, other = compute_routes(biased, reverse), compute_routes(plain, reverse)
    assert_close(one.contrast, other.contrast, atol=1e-4, rtol=1e-4)
    assert (one.scores - other.scores).abs().max() > 0.1  # what it is told apart from


def test_the_contrast_is_the_sources_mean_less_that_of_the_other_keys() -> None:
    model = random_model(attention="causal")
    routes = compute_routes(model, LEFT_SOURCES)
    for i, query in enumerate(LEFT_SOURCES):
        _, cache = model.run_with_cache(torch.tensor([query.tokens]), names_filter="blocks.1.attn.hook_attn_scores")
        expected = []
        for row in query.readout(model.cfg):
            scores = cache["blocks.1.attn.hook_attn_scores"][0, :, row, : row + 1]
            source = torch.zeros(row + 1, dtype=torch.bool)
            source[slice(*query.source_span)] = True
            expected.append(scores[:, source].mean(1) - scores[:, ~source].mean(1))
        assert_close(routes.contrast[i, 1], torch.stack(expected).mean(0), equal_nan=True)


def test_route_correlation_needs_mirror_images() -> None:
    pair = world_pairs()[0]
    moved = QueryPair(pair.forward, pair.forward, pair.fact, pair.side)
    with pytest.raises(UserError, match="only pairs that swap them mirror each other"):
        route_correlation(random_model(), [moved])
    with pytest.raises(UserError, match="route correlation needs at least one pair"):
        route_correlation(random_model(), [])


@pytest.mark.parametrize("position", ["rope", "alibi", "t5_bias", "none", "learned", "sinusoidal"])
@pytest.mark.parametrize("offset", [-3, 2])
@torch.no_grad()
def test_score_matrix_is_what_the_first_layer_would_score(position: str, offset: int) -> None:
    """Each pair of tokens as a sequence of its own, filler between them."""
    model = random_model(position=position, dtype="float64", n_key_value_heads=2, qkv_bias=True)
    queries, keys = torch.tensor([3, 5]), torch.tensor([1, 4, 5])
    found = score_matrix(model, queries, keys, offset)
    assert found.shape == (4, 2, 3)
    for i, query in enumerate(queries.tolist()):
        for j, key in enumerate(keys.tolist()):
            tokens = [2] * (abs(offset) + 1)
            tokens[max(-offset, 0)], tokens[max(offset, 0)] = query, key
            _, cache = model.run_with_cache(torch.tensor([tokens]))
            expected = cache["attn_scores", 0][0, :, max(-offset, 0), max(offset, 0)]
            assert found[:, i, j] == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_score_matrix_of_a_deeper_layer_reads_the_embedding_alone() -> None:
    """With nothing written by the layers before, a deeper layer reads what it would of the embedding."""
    model = random_model(position="rope", dtype="float64", use_qk_norm=True)
    model.blocks[0].attn.W_O.zero_()
    if model.blocks[0].mlp is not None:
        model.blocks[0].mlp.W_out.zero_()
    _, cache = model.run_with_cache(torch.tensor([[3, 4]]))
    found = score_matrix(model, torch.tensor([3]), torch.tensor([4]), 1, layer=1)[:, 0, 0]
    assert found == pytest.approx(cache["attn_scores", 1][0, :, 0, 1], abs=1e-6)


def test_score_matrix_names_mistakes(tmp_path: Path) -> None:
    model, tokens = random_model(), torch.tensor([1])
    with pytest.raises(UserError, match=r"^offset: 12 is longer than the context; give -11 to 11"):
        score_matrix(model, tokens, tokens, 12)
    with pytest.raises(UserError, match=r"^keys: .*13"):
        score_matrix(model, tokens, torch.tensor([13]), 1)
    bridge = llama_bridge(random_model(**SHAPE, attention="causal", gated_mlp=True, act_fn="silu"), tmp_path)
    with pytest.raises(UserError, match="need a HookedTransformer"):
        score_matrix(bridge, tokens, tokens, 1)
