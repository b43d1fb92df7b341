"""Parity: by evaluation and in closed form, and the coupling of two routes against autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import LLAMA3, YARN, random_model, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import mirrored_pairs
from scheme_helpers import PerHead, XPos
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.config import FactConfig, ModelConfig
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.measures.parity import (
    Parity,
    direction_selectivity,
    plane_energy,
    plane_parity,
    plane_spectrum,
    rope_parity,
    route_coupling,
    score_parity,
)
from mdm_interp.measures.rope import Content, distance_correlation, isotropy, require_rope, spread
from mdm_interp.models.positions import POSITION_SCHEMES, PositionScheme, Rope, Which
from mdm_interp.models.transformer import HookedTransformer

MASK = 12
WORLD = FactWorld(FactConfig(n_entities=6, n_filler=3, seq_len=7, gap=(2, 5)), seed=1)
PAIRS = WORLD.query_pairs()
MANY = FactWorld(FactConfig(n_entities=60, n_filler=4), seed=0)
MANY_PAIRS = MANY.query_pairs(n_contexts=1)
WIDE = QueryPair(Query((5, 4, 0, MASK), (3,), (3, 4), (0, 2)), Query((MASK, 0, 5, 4), (3,), (0, 1), (2, 4)), 0, "right")
SAME_SIDE = QueryPair(Query((5, MASK, 0), (3,), (1, 2), (0, 1)), Query((5, 0, MASK), (3,), (2, 3), (0, 1)), 0, "right")

rotations = st.fixed_dictionaries(
    {
        "rotary_adjacent_pairs": st.booleans(),
        "rotary_dim": st.sampled_from([2, 4]),
        "n_key_value_heads": st.sampled_from([1, 2, 4]),
        "qkv_bias": st.booleans(),
        "normalization_type": st.sampled_from(["RMS", "LN", None]),
        "seed": st.integers(0, 99),
    }
)
contents = st.fixed_dictionaries({"use_qk_norm": st.booleans(), "rotary_scaling": st.sampled_from([None, LLAMA3])})
"""How queries and keys come about that rotate, and by what angles."""


def double(**changes: Any) -> HookedTransformer:
    return random_model(dtype="float64", **changes)


def test_parity_by_hand() -> None:
    """Two pairs, one head: scores 3 and 1 from the right, 1 and -3 from the left."""
    parity = Parity(even=torch.tensor([2.0, -1.0]).view(2, 1, 1), odd=torch.tensor([1.0, 2.0]).view(2, 1, 1))
    assert_close(parity.selectivity(), torch.tensor([[0.5]]))
    assert Parity(parity.even, 0 * parity.odd).selectivity().item() == 0
    assert Parity(0 * parity.even, parity.odd).selectivity().item() == 1


@pytest.mark.parametrize("position", POSITION_SCHEMES)
def test_even_plus_odd_is_the_score_with_the_source_on_the_right(position: str) -> None:
    model = double(position=position)
    parity = score_parity(model, PAIRS)
    assert {pair.forward.offset > 0 for pair in PAIRS} == {True, False}
    for row, pair in enumerate(PAIRS[:6]):
        right, left = sorted((pair.forward, pair.reverse), key=lambda query: -query.offset)
        for query, sign in ((right, 1), (left, -1)):
            _, cache = model.run_with_cache(torch.tensor([query.tokens]))
            for layer in range(2):
                score = cache["attn_scores", layer][0, :, query.answer_span[0], query.source_span[0]]
                assert_close((parity.even + sign * parity.odd)[row, layer], score)


def test_a_planted_preference_for_the_right_is_odd_and_positive() -> None:
    """T5 buckets tell sides apart by position: raise those of sources on the right."""
    model = double(position="t5_bias", n_layers=1)
    before = score_parity(model, PAIRS).odd
    original = model.pos_embed.bias

    def preferring_right(query_pos: Tensor, key_pos: Tensor) -> Tensor:
        bias = original(query_pos, key_pos)
        assert bias is not None
        return bias + 3.0 * (key_pos[None, :] > query_pos[:, None])

    model.pos_embed.bias = preferring_right
    assert_close(score_parity(model, PAIRS).odd, before + 1.5)


@settings(max_examples=15, deadline=None)
@given(changes=rotations, content=contents)
def test_the_planes_add_up_to_the_measured_parity(changes: dict[str, Any], content: dict[str, Any]) -> None:
    model = double(position="rope", n_layers=1, **changes, **content)
    planes, measured = rope_parity(model, PAIRS), score_parity(model, PAIRS)
    still = changes["rotary_dim"] < 4
    assert planes.even.shape[-1] == changes["rotary_dim"] // 2 + still
    for name in ("even", "odd"):
        assert_close(getattr(planes, name).sum(-1), getattr(measured, name), atol=1e-6, rtol=1e-6)
    assert planes.selectivity().shape == planes.even.shape[1:]
    if still:
        assert (planes.odd[..., -1] == 0).all()


@pytest.mark.parametrize("position", ["alibi", "none"])
def test_symmetric_schemes_have_no_odd_part(position: str) -> None:
    assert score_parity(double(position=position, n_layers=1), PAIRS).odd.abs().max() < 1e-12


def test_a_source_a_quarter_turn_ahead_is_all_odd() -> None:
    """Hand-computed: q = (1, 0), k = (0, -1), theta 1: s(delta) = cos(delta - pi/2) / sqrt 2 = sin(delta) / sqrt 2."""
    model = double(position="rope", n_layers=1, n_heads=1, d_model=2, d_head=2, normalization_type=None, qkv_bias=False)
    with torch.no_grad():
        model.W_E.copy_(torch.tensor([0.0, 1.0]))
        model.W_E[MASK] = torch.tensor([1.0, 0.0], dtype=torch.float64)
        model.blocks[0].attn.W_Q.copy_(torch.eye(2)[None])
        model.blocks[0].attn.W_K.copy_(torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]))
    parity = rope_parity(model, PAIRS)
    distance = torch.tensor([abs(pair.forward.offset) for pair in PAIRS], dtype=torch.float64)
    assert_close(parity.odd[:, 0, 0, 0], distance.sin() / math.sqrt(2))
    assert parity.even.abs().max() < 1e-12
    assert_close(score_parity(model, PAIRS).selectivity(), torch.ones(1, 1, dtype=torch.float64))


def test_the_spectrum_is_the_variance_per_plane() -> None:
    model = double(position="rope", rotary_adjacent_pairs=True, n_key_value_heads=2)
    spectrum = plane_spectrum(model, PAIRS)
    assert_close(spectrum.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    products: list[Tensor] = []
    for pair in PAIRS:
        _, cache = model.run_with_cache(torch.tensor([pair.forward.tokens]))
        q = cache["q", 1][0, pair.forward.answer_span[0], 3]
        k = cache["k", 1][0, pair.forward.source_span[0], 1]
        products.append(torch.view_as_complex(q.view(2, 2)).conj() * torch.view_as_complex(k.view(2, 2)))
    energy = torch.stack(products).var(0, correction=0)
    assert_close(spectrum[1, 3], energy / energy.sum())


def gradients(model: HookedTransformer, query: Query, layer: int, head: int, inputs: Tensor) -> Tensor:
    """Autograd: the gradient of one score with respect to the head's W_Q and W_K, inputs fixed."""
    attn = model.blocks[layer].attn
    kv_head = head // (model.cfg.n_heads // model.cfg.kv_heads)
    weights = [attn.W_Q[head].detach().requires_grad_(), attn.W_K[kv_head].detach().requires_grad_()]
    named = dict(attn.named_parameters(recurse=False))
    biases = [named["b_Q"][head], named["b_K"][kv_head]] if "b_Q" in named else [0, 0]
    at, stands = query.answer_span[0], query.source_span[0]
    places = torch.arange(len(query.tokens))
    q, k = (
        model.pos_embed.rotate((inputs @ weight + bias)[:, None], places, which)[:, 0]
        for which, weight, bias in zip(("q", "k"), weights, biases, strict=True)
    )
    factor = 1.0 if model.cfg.rotary_scaling is None else model.cfg.rotary_scaling.attention_factor
    score = (factor * q[at]) @ (factor * k[stands]) * model.cfg.head_dim**-0.5
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(score, weights)])


@settings(max_examples=12, deadline=None)
@given(changes=rotations, position=st.sampled_from(["rope", "yarn", "alibi", "learned"]))
def test_route_coupling_agrees_with_autograd(changes: dict[str, Any], position: str) -> None:
    if position == "yarn":
        changes, position = changes | {"rotary_scaling": YARN, "rotary_dim": None}, "rope"
    model = double(position=position, **changes)
    coupling = route_coupling(model, PAIRS[:3])
    for row, pair in enumerate(PAIRS[:3]):
        caches = [model.run_with_cache(torch.tensor([q.tokens]))[1] for q in (pair.forward, pair.reverse)]
        for layer in range(2):
            inputs = [model.blocks[layer].ln1(cache["resid_pre", layer])[0].detach() for cache in caches]
            for head in range(4):
                forward, reverse = (
                    gradients(model, query, layer, head, x)
                    for query, x in zip((pair.forward, pair.reverse), inputs, strict=True)
                )
                scale = (forward.norm() * reverse.norm()).item()
                assert abs(coupling[row, layer, head] - forward @ reverse) <= 1e-5 * scale


def test_normalised_queries_have_no_closed_coupling() -> None:
    with pytest.raises(UserError, match=r"model: it normalises queries and keys .* SourceAttention"):
        route_coupling(double(use_qk_norm=True), PAIRS)


@pytest.mark.parametrize("changes", [{"rotary_scaling": YARN}, {"rotary_scaling": YARN, "use_qk_norm": True}])
def test_closed_forms_have_yarns_factor(changes: dict[str, Any]) -> None:
    model = double(position="rope", n_layers=1, **changes)
    planes, measured = rope_parity(model, PAIRS), score_parity(model, PAIRS)
    assert_close(planes.even.sum(-1), measured.even, atol=1e-6, rtol=1e-6)
    assert_close(planes.odd.sum(-1), measured.odd, atol=1e-6, rtol=1e-6)
    plain = double(position="rope", n_layers=1, **{**changes, "rotary_scaling": {**YARN, "attention_factor": 1.0}})
    assert_close(measured.even, 1.2**2 * score_parity(plain, PAIRS).even, atol=1e-6, rtol=1e-6)
    energies = [plane_energy(one, PAIRS) for one in (model, plain)]
    assert_close(energies[0].odd_uniform, 1.2**4 * energies[1].odd_uniform)
    assert_close(energies[0].odd_energy, 1.2**4 * energies[1].odd_energy)


def test_route_coupling_is_the_formula_for_equal_content() -> None:
    model = double(position="rope", n_layers=1, rotary_dim=2)
    pair, theta = PAIRS[0], require_rope(model).theta
    _, cache = model.run_with_cache(torch.tensor([pair.forward.tokens]))
    x = model.blocks[0].ln1(cache["resid_pre", 0])[0]
    at, stands = pair.forward.answer_span[0], pair.forward.source_span[0]
    kernel = torch.cat([(2 * pair.forward.offset * theta).cos().repeat(2), torch.ones(2)])  # per dimension
    q, k = cache["q", 0][0, at], cache["k", 0][0, stands]
    expected = (x[at] @ x[at] * (k**2 @ kernel) + x[stands] @ x[stands] * (q**2 @ kernel)) / 4
    assert_close(route_coupling(model, PAIRS[:1])[0, 0], expected.detach())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_selectivity_is_a_share_that_scale_and_side_leave_alone(seed: int, scale: float) -> None:
    even, odd = torch.randn(2, 6, 2, 3, generator=seeded(seed), dtype=torch.float64)
    selectivity = Parity(even, odd).selectivity()
    assert (selectivity >= 0).all() and (selectivity <= 1).all()
    assert_close(Parity(scale * even, -scale * odd).selectivity(), selectivity)
    assert_close(Parity(odd, even).selectivity(), 1 - selectivity)


@pytest.mark.parametrize("measure", [score_parity, rope_parity, route_coupling])
def test_pairs_without_a_shared_answer_are_refused(measure: Any) -> None:
    arm = WORLD.query_pairs("causal")
    with pytest.raises(UserError, match=r"query_pairs: .* undefined for pairs that share neither"):
        measure(random_model(position="rope"), arm)
    with pytest.raises(UserError, match=r"query_pairs: .* needs at least one pair"):
        measure(random_model(position="rope"), [])


def test_what_a_measure_cannot_use_is_refused() -> None:
    model = random_model(position="rope")
    assert score_parity(model, [WIDE]).odd.shape == (1, 2, 4)
    for measure in (rope_parity, route_coupling):
        with pytest.raises(UserError, match="query_pairs: closed forms need one-token spans; use score_parity"):
            measure(model, [WIDE])
        with pytest.raises(UserError, match=r"query_pairs: sources at offsets -1 and -2 .* do not mirror"):
            measure(model, [SAME_SIDE])
    with pytest.raises(UserError, match="query_pairs: a source is on one side in both"):
        score_parity(model, [SAME_SIDE])
    for measure in (rope_parity, plane_spectrum):
        with pytest.raises(UserError, match="model: position scheme 'alibi' has no rotation"):
            measure(random_model(position="alibi"), PAIRS)
    with pytest.raises(UserError, match="query_pairs: a spectrum needs several pairs"):
        plane_spectrum(model, [])


class Halved(Rope):
    """Leaves the second half of the heads as they are."""

    def rotate(self, x: Tensor, positions: Tensor, which: Which) -> Tensor:
        half = x.shape[-2] // 2
        return torch.cat([super().rotate(x[..., :half, :], positions, which), x[..., half:, :]], dim=-2)


class Stretched(Rope):
    """Turns at a quarter of the angles."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.theta = self.theta / 4


class Spun(PositionScheme):
    """A rotation that is not Rope's."""

    def rotate(self, x: Tensor, positions: Tensor, which: Which) -> Tensor:
        return torch.where((positions % 2 == 0)[:, None, None], x, -x)


def with_scheme(scheme: type[PositionScheme]) -> HookedTransformer:
    model = double(position="rope", n_layers=1)
    model.pos_embed = scheme(model.cfg)
    return model


CLOSED_FORMS: dict[str, Callable[[HookedTransformer], Any]] = {
    "rope_parity": lambda model: rope_parity(model, PAIRS),
    "plane_parity": lambda model: plane_parity(model, PAIRS),
    "plane_spectrum": lambda model: plane_spectrum(model, PAIRS),
    "plane_energy": lambda model: plane_energy(model, PAIRS),
    "route_coupling": lambda model: route_coupling(model, PAIRS),
    "distance_correlation": lambda model: distance_correlation(model, PAIRS, torch.arange(1.0, 3.0)),
}


@pytest.mark.parametrize("measure", CLOSED_FORMS)
def test_a_rotation_that_is_not_ropes_has_no_closed_form(measure: str) -> None:
    for scheme in (Halved, Spun, XPos, PerHead):
        with pytest.raises(UserError, match=rf"model: {scheme.__name__} has its own rotate, .*; use score_parity"):
            CLOSED_FORMS[measure](with_scheme(scheme))
    patched = with_scheme(Rope)
    patched.pos_embed.bias = lambda query_pos, key_pos: torch.zeros(4, len(query_pos), len(key_pos))
    with pytest.raises(UserError, match="model: Rope has its own bias"):
        CLOSED_FORMS[measure](patched)
    for shape in ((4, 2), (1,)):  # one for each head, and one for all planes
        other = with_scheme(Rope)
        require_rope(other).theta = torch.ones(shape, dtype=torch.float64)
        with pytest.raises(UserError, match="model: Rope has its own shape of theta"):
            CLOSED_FORMS[measure](other)


@pytest.mark.parametrize("scheme", [Rope, Stretched])
def test_closed_forms_hold_for_rope_at_any_angles(scheme: type[Rope]) -> None:
    model = with_scheme(scheme)
    planes, measured = rope_parity(model, PAIRS), score_parity(model, PAIRS)
    assert_close(planes.odd.sum(-1), measured.odd, atol=1e-9, rtol=0)
    assert_close(planes.even.sum(-1), measured.even, atol=1e-9, rtol=0)


def test_unrotated_heads_are_measured_by_evaluation() -> None:
    odd = score_parity(with_scheme(Halved), PAIRS).odd.abs().amax((0, 1))
    assert (odd[2:] < 1e-12).all() and (odd[:2] > 1e-2).all()


def test_swapping_forward_and_reverse_changes_nothing() -> None:
    """Right and left are read off the offsets, not off which query was trained."""
    model = double(position="rope")
    swapped = [replace(pair, forward=pair.reverse, reverse=pair.forward) for pair in PAIRS]
    for name in ("even", "odd"):
        assert_close(getattr(score_parity(model, swapped), name), getattr(score_parity(model, PAIRS), name))
    assert_close(route_coupling(model, swapped), route_coupling(model, PAIRS))


# ---- selectivity beside its null, and planes


def selectivity(right: torch.Tensor, left: torch.Tensor) -> tuple[float, float]:
    """Selectivity and its null of one head with these scores."""
    parity = Parity(((right + left) / 2)[:, None, None], ((right - left) / 2)[:, None, None])
    found = direction_selectivity(parity, MANY_PAIRS)
    return found.effect.item(), found.null.item()


def test_selectivity_is_on_either_side_of_its_null() -> None:
    right, other = torch.randn(2, len(MANY_PAIRS), generator=seeded(0), dtype=torch.float64)
    alike, unrelated, opposite = selectivity(right, right), selectivity(right, other), selectivity(right, -right)
    assert alike[0] == 0 and alike[1] == pytest.approx(0.5, abs=0.05)
    assert unrelated[0] == pytest.approx(unrelated[1], abs=0.1)
    assert opposite[0] == 1 and opposite[1] == pytest.approx(0.5, abs=0.05)
    constant = selectivity(torch.ones(len(MANY_PAIRS)).double(), -torch.ones(len(MANY_PAIRS)).double())
    assert constant == (1.0, 1.0), "a preference that all facts share is no fact's own"


def test_planes_of_a_random_model_have_uniform_phases_and_a_planted_one_does_not() -> None:
    facts = MANY.config
    vocabulary = {"d_vocab": facts.d_vocab, "n_ctx": facts.seq_len, "mask_token_id": facts.mask_token_id}
    model = double(position="rope", n_layers=1, d_model=64, d_head=16, **vocabulary)
    planes = plane_energy(model, MANY_PAIRS)
    assert {len(values) for values in vars(planes).values()} == {8}
    assert planes.wavelength[0].item() == pytest.approx(2 * torch.pi)
    assert planes.energy_share.sum().item() == pytest.approx(1)
    assert_close(planes.odd_energy, rope_parity(model, MANY_PAIRS).odd.pow(2).mean((0, 1, 2)))
    assert 0.3 < (planes.odd_energy / planes.odd_uniform)[0] < 1.7
    with torch.no_grad():  # keys are the query at the mask, a quarter turn further in plane 0: all of it is odd
        attn = model.blocks[0].attn
        attn.W_Q.zero_(), attn.W_K.zero_()  # type: ignore[func-returns-value]
        attn.W_Q[:, :, 0] = torch.randn(64, generator=seeded(1), dtype=torch.float64)
        attn.W_K[:, :, 8] = torch.randn(64, generator=seeded(2), dtype=torch.float64)
    planes = plane_energy(model, MANY_PAIRS)
    assert_close(planes.odd_energy[0], 2 * planes.odd_uniform[0])
    assert planes.energy_share[0].item() == pytest.approx(1)


def test_planes_that_do_not_rotate_are_none() -> None:
    planes = plane_energy(double(position="rope", rotary_dim=2), PAIRS)
    assert {name: values.shape for name, values in vars(planes).items()} == dict.fromkeys(vars(planes), (1,))


def gaussian(n: int, d_head: int, scale: Tensor | float = 1.0) -> Tensor:
    return torch.randn(n, 1, 1, d_head, generator=seeded(n), dtype=torch.float64) * scale


def test_isotropic_vectors_spread_as_their_null_and_a_line_over_one_dimension() -> None:
    for n in (20, 2000):
        found = spread(gaussian(n, 16))
        assert found.effect.item() == pytest.approx(found.null.item(), rel=0.05)
    assert found.effect.item() == pytest.approx(1, rel=0.05)
    line = spread(gaussian(1, 16).repeat(50, 1, 1, 1))
    assert (line.effect.item(), line.null.item()) == pytest.approx((1 / 16, 1 / 16))
    flat = spread(gaussian(2000, 16, (torch.arange(16) < 4).double()))
    assert flat.effect.item() == pytest.approx(4 / 16, rel=0.05) and flat.null.item() > 0.9


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 99))
def test_spread_is_the_participation_ratio_of_the_second_moment(n: int, d_head: int, seed: int) -> None:
    """Against the eigenvalues; and neither turning nor scaling changes it."""
    x = torch.randn(n, 1, 1, d_head, generator=seeded(seed), dtype=torch.float64)
    values = torch.linalg.eigvalsh(x[:, 0, 0].T @ x[:, 0, 0])
    assert spread(x).effect.item() == pytest.approx((values.sum() ** 2 / (d_head * values.square().sum())).item())
    turn = torch.linalg.qr(torch.randn(d_head, d_head, generator=seeded(seed), dtype=torch.float64)).Q
    assert_close(spread(3 * x @ turn).effect, spread(x).effect)
    assert_close(spread(3 * x @ turn).null, spread(x).null)


def test_queries_at_a_mask_are_one_vector_and_keys_as_many_as_sources() -> None:
    found = isotropy(
        double(n_layers=1, d_vocab=MANY.config.d_vocab, mask_token_id=MANY.config.mask_token_id), MANY_PAIRS
    )
    assert_close(found.q.effect, torch.full_like(found.q.effect, 1 / 4))
    assert_close(found.q.null, found.q.effect)
    assert (found.k.effect > 2 / 4).all()
    assert_close(found.overlap.effect, found.overlap.null, atol=0.05, rtol=0)  # the same query with every source


def test_keys_that_point_where_their_own_query_does_overlap_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q = gaussian(len(MANY_PAIRS), 16)
    monkeypatch.setattr("mdm_interp.measures.rope.compute_content", lambda model, queries: Content(q, -2 * q))
    found = isotropy(double(n_layers=1), MANY_PAIRS)
    assert found.overlap.effect.item() == pytest.approx(16)
    assert found.overlap.null.item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("changes", [{}, {"n_key_value_heads": 2}, {"rotary_dim": 2}, {"rotary_adjacent_pairs": True}])
def test_plane_parity_is_score_parity_plane_by_plane(changes: dict[str, Any]) -> None:
    """For spans of several tokens and in the second layer, where no closed form holds."""
    model = random_model(position="rope", dtype="float64", mask_token_id=12, **changes)
    pair = QueryPair(
        Query((12, 12, 5, 3, 7, 4), (1, 2), (0, 2), (4, 6)),
        Query((7, 4, 5, 3, 12, 12), (1, 2), (4, 6), (0, 2)),
        0,
        "left",
    )
    pairs = [pair, QueryPair(pair.reverse, pair.forward, 1, "right")]
    by_plane, summed = plane_parity(model, pairs), score_parity(model, pairs)
    assert by_plane.even.shape[-1] == (2 if changes.get("rotary_dim") == 2 else model.cfg.head_dim // 2)
    for name in ("even", "odd"):
        assert getattr(by_plane, name).sum(-1) == pytest.approx(getattr(summed, name), abs=1e-6)


def test_plane_parity_is_the_closed_form_where_that_holds() -> None:
    model = random_model(position="rope", dtype="float64", mask_token_id=0, n_layers=1)
    pairs = mirrored_pairs(causal=False)
    by_plane, closed = plane_parity(model, pairs), rope_parity(model, pairs)
    for name in ("even", "odd"):
        assert getattr(by_plane, name) == pytest.approx(getattr(closed, name), abs=1e-6)


def test_plane_parity_needs_rope() -> None:
    with pytest.raises(UserError, match="has no rotation"):
        plane_parity(random_model(position="alibi"), mirrored_pairs(causal=False))
