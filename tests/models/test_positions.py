"""Position schemes against hand-computed values, independent references, and what makes a scheme relative."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_model, random_tokens, seeded, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers.models.t5.modeling_t5 import T5Attention

from mdm_interp.models.positions import POSITION_SCHEMES, Alibi, Learned, PositionScheme, Rope, Sinusoidal, T5Bias
from mdm_interp.models.transformer import HookedTransformer

RELATIVE = ["rope", "alibi", "t5_bias", "none"]
positions_far_apart = st.integers(0, 5000)


def rope(**changes: object) -> Rope:
    return Rope(tiny_config(position="rope", **{"d_head": 4, "rotary_base": 100.0, **changes}))


def rotated(scheme: PositionScheme, x: Tensor, position: int) -> Tensor:
    """One vector `[d_head]` as it enters the dot product at `position`."""
    return scheme.rotate(x[None, None], torch.tensor([position]), "q")[0, 0]


# ---- rope


@pytest.mark.parametrize(
    ("adjacent", "expected"),
    [
        # Base 100 and four dimensions: the planes turn by 1 and by 0.1 radian a step, here by 2 and by 0.2.
        # cos 2 = -0.4161468, sin 2 = 0.9092974, cos 0.2 = 0.9800666, sin 0.2 = 0.1986693
        (
            False,  # planes (0, 2) and (1, 3)
            [
                -0.4161468 - 3 * 0.9092974,
                2 * 0.9800666 - 4 * 0.1986693,
                0.9092974 - 3 * 0.4161468,
                2 * 0.1986693 + 4 * 0.9800666,
            ],
        ),
        (
            True,  # planes (0, 1) and (2, 3)
            [
                -0.4161468 - 2 * 0.9092974,
                0.9092974 - 2 * 0.4161468,
                3 * 0.9800666 - 4 * 0.1986693,
                3 * 0.1986693 + 4 * 0.9800666,
            ],
        ),
    ],
)
def test_rope_turns_two_planes_as_computed_by_hand(adjacent: bool, expected: list[float]) -> None:
    scheme = rope(rotary_adjacent_pairs=adjacent)
    assert_close(rotated(scheme, torch.tensor([1.0, 2.0, 3.0, 4.0]), 2), torch.tensor(expected), atol=1e-6, rtol=0)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(query_pos=positions_far_apart, key_pos=positions_far_apart, shift=positions_far_apart, adjacent=st.booleans())
def test_rope_scores_depend_on_the_offset_only(query_pos: int, key_pos: int, shift: int, adjacent: bool) -> None:
    scheme = rope(d_head=8, rotary_adjacent_pairs=adjacent)
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=seeded(0))
    score = rotated(scheme, q, query_pos) @ rotated(scheme, k, key_pos)
    assert_close(rotated(scheme, q, query_pos + shift) @ rotated(scheme, k, key_pos + shift), score, atol=1e-9, rtol=0)
    # the documented form, with the planes as complex numbers
    turn = torch.polar(torch.ones(4, dtype=torch.float64), (key_pos - query_pos) * scheme.theta)
    assert_close((scheme.planes(q).conj() * scheme.planes(k) * turn).sum().real, score, atol=1e-9, rtol=0)


@pytest.mark.parametrize("adjacent", [False, True])
def test_partial_rope_turns_the_first_dimensions_and_leaves_the_rest(adjacent: bool) -> None:
    partial = rope(d_head=6, rotary_dim=4, rotary_adjacent_pairs=adjacent)
    x = torch.randn(6, generator=seeded(0))
    turned = rotated(partial, x, 3)
    assert torch.equal(turned[4:], x[4:])
    assert_close(turned[:4], rotated(rope(rotary_adjacent_pairs=adjacent), x[:4], 3))
    assert not torch.isclose(turned[:4], x[:4]).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3), ("float32", 1e-6)])
def test_rope_angles_are_exact_far_away_at_any_precision(dtype: str, tolerance: float) -> None:
    """Beyond 65504 float16 has no number for the position itself, and bfloat16 has one in 512 of them."""
    model = random_model(dtype=dtype, d_head=8)
    far = torch.tensor([100_001, 100_002, 1_000_003])
    x = torch.ones(3, 1, 8, dtype=getattr(torch, dtype))
    angle = far[:, None].double() * 10_000.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    expected = torch.cat([angle.cos() - angle.sin(), angle.sin() + angle.cos()], dim=-1)
    got = model.pos_embed.rotate(x, far, "q")
    assert got.dtype == x.dtype
    assert_close(got[:, 0].double(), expected, atol=tolerance, rtol=tolerance)
    # the same in float32 throughout would be off by more than the strictest tolerance
    coarse = far[:, None].float() * 10_000.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert (coarse.cos().double() - angle.cos()).abs().max() > 1e-4


def test_the_rope_of_a_converted_model_keeps_its_precision() -> None:
    model = random_model(dtype="float16").to(torch.float64)
    reference = random_model(dtype="float64")
    x = torch.randn(2, 4, 4, dtype=torch.float64, generator=seeded(0))
    positions = torch.tensor([1, 100_001])
    ours, theirs = (one.pos_embed.rotate(x, positions, "k") for one in (model, reference))
    assert_close(ours, theirs, atol=1e-12, rtol=0)


# ---- alibi


@pytest.mark.parametrize(("n_heads", "first"), [(8, 1 / 2), (16, 2**-0.5)])
def test_alibi_slopes_are_the_papers(n_heads: int, first: float) -> None:
    """Section 3 of the paper: 1/2, 1/4, ... 1/256 for 8 heads; for 16 the ratio is the root of 1/2."""
    slopes = Alibi(tiny_config(position="alibi", d_model=16, n_heads=n_heads)).slopes
    assert_close(slopes, torch.tensor([first ** (head + 1) for head in range(n_heads)]))
    assert slopes[-1] == 1 / 256


def test_alibi_bias_falls_by_the_slope_with_each_step_to_either_side() -> None:
    scheme = Alibi(tiny_config(position="alibi", d_model=16, n_heads=8))
    steps = torch.arange(4)
    bias = scheme.bias(steps, steps)
    assert_close(bias[0], -0.5 * torch.tensor([[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0.0]]))
    assert_close(bias[7], bias[0] / 128)
    assert torch.equal(bias, bias.transpose(1, 2))
    assert torch.equal(scheme.bias(torch.tensor([2]), steps), bias[:, 2:3])


# ---- T5


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 2), (33, 100)])
def test_t5_buckets_are_those_of_transformers(attention: str, buckets: int, max_distance: int) -> None:
    if attention == "causal" and buckets == 4:
        max_distance = 3  # two distances have a bucket of their own here, one in a bidirectional model
    scheme = T5Bias(
        tiny_config(
            position="t5_bias",
            attention=attention,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=max_distance,
        )
    )
    offsets = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(offsets, attention == "bidirectional", buckets, max_distance)
    assert torch.equal(scheme.bucket(offsets), expected)
    assert expected.unique().numel() > 2


def test_t5_buckets_are_the_same_however_a_device_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, offsets, log = T5Bias(tiny_config(position="t5_bias")), torch.arange(-200, 200)[None], torch.log
    expected = scheme.bucket(offsets)
    monkeypatch.setattr(torch, "log", lambda x: log(x) * (1 - 1e-6))
    assert torch.equal(scheme.bucket(offsets), expected)


@pytest.mark.parametrize(("position", "name"), [("rope", "theta"), ("alibi", "slopes")])
def test_a_changed_constant_is_copied_to_the_device_again(position: str, name: str) -> None:
    """The `meta` device stands for a GPU: it keeps the shapes of what is copied."""
    scheme = random_model(position=position).pos_embed
    there = torch.device("meta")
    first = scheme._constant(name, there)
    assert first.is_meta and scheme._constant(name, there) is first
    getattr(scheme, name).mul_(2)
    second = scheme._constant(name, there)
    assert second is not first and scheme._constant(name, there) is second
    setattr(scheme, name, getattr(scheme, name).repeat(2))
    assert scheme._constant(name, there).shape == getattr(scheme, name).shape
    assert scheme._constant(name, torch.device("cpu")) is getattr(scheme, name)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_t5_bias_reads_the_table_at_key_minus_query(attention: str) -> None:
    scheme = random_model(position="t5_bias", attention=attention).pos_embed
    assert isinstance(scheme, T5Bias)
    bias = scheme.bias(torch.tensor([5]), torch.arange(12))[:, 0]
    # Near offsets have a row each: 0 and backwards 0, 1, 2, ...; forwards, in a bidirectional model, from row 16 on.
    before = [5, 4, 3, 2, 1, 0]
    after = [17, 18, 19, 20, 21, 22] if attention == "bidirectional" else [0] * 6
    assert torch.equal(bias, scheme.table[before + after].T)


# ---- absolute schemes


@pytest.mark.parametrize("d_model", [6, 5])
def test_sinusoidal_is_the_papers_formula_over_the_papers_scale_of_the_embedding(d_model: int) -> None:
    scheme = Sinusoidal(tiny_config(position="sinusoidal", d_model=d_model, n_heads=1, d_head=4))
    for position in (0, 1, 11):
        for column in range(d_model):
            wave = math.sin if column % 2 == 0 else math.cos
            expected = wave(position / 10_000 ** (2 * (column // 2) / d_model)) / math.sqrt(d_model)
            assert scheme.embed(torch.tensor([position]))[0, column].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("d_model", [32, 128])
def test_under_sinusoidal_a_token_weighs_as_much_as_its_position_at_the_start(d_model: int) -> None:
    """Positions have energy 1/2, from d_model/2 sines and cosines of one angle each over d_model; tokens 0.8^2."""
    model = HookedTransformer(tiny_config(position="sinusoidal", d_model=d_model, d_vocab=500), generator=seeded(0))
    tokens = random_tokens(batch=40, pos=12, d_vocab=500)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")
        token = model.embed.W_E[tokens].square().sum(-1).mean()
    total = cache["resid_pre", 0].square().sum(-1).mean()
    assert 0.4 < token / total < 0.7
    assert token / total == pytest.approx(0.64 / (0.64 + 0.5), abs=0.05)


def test_learned_reads_a_row_per_position() -> None:
    scheme = random_model(position="learned").pos_embed
    assert isinstance(scheme, Learned)
    assert torch.equal(scheme.embed(torch.tensor([3, 0])), torch.stack([scheme.W_pos[3], scheme.W_pos[0]]))


# ---- what a scheme answers, and whether it is relative


@pytest.mark.parametrize("name", list(POSITION_SCHEMES))
def test_a_scheme_answers_one_question_or_none(name: str) -> None:
    scheme = random_model(position=name).pos_embed
    steps = torch.arange(4)
    x = torch.randn(4, 4, 4, generator=seeded(0))
    answers = {
        "embed": scheme.embed(steps) is not None,
        "rotate": not torch.equal(scheme.rotate(x, steps, "q"), x),
        "bias": scheme.bias(steps, steps) is not None,
    }
    asked = {"rope": "rotate", "alibi": "bias", "t5_bias": "bias", "learned": "embed", "sinusoidal": "embed"}
    assert torch.equal(scheme.rotate(x, steps, "k"), scheme.rotate(x, steps, "q"))
    answered = [question for question, answered in answers.items() if answered]
    assert answered == ([asked[name]] if name in asked else [])
    assert answered == [question for question in ("embed", "rotate", "bias") if scheme.answers(question)]


def test_an_answer_given_to_one_scheme_alone_counts() -> None:
    scheme = random_model(position="none").pos_embed
    assert not scheme.answers("bias")
    scheme.bias = lambda query_pos, key_pos: torch.zeros(4, len(query_pos), len(key_pos))
    assert scheme.answers("bias") and not scheme.answers("rotate")


@pytest.mark.parametrize("name", list(POSITION_SCHEMES))
def test_scores_and_values_of_relative_schemes_know_offsets_only(name: str) -> None:
    """One token everywhere: whatever differs between positions, the position scheme put there."""
    model = random_model(position=name, n_layers=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.full((1, 8), 3))
    scores, values = cache["attn_scores", 0][0], cache["v", 0][0]
    by_offset = [scores.diagonal(offset, 1, 2) for offset in range(-6, 7)]
    spread = max((along - along[:, :1]).abs().max().item() for along in by_offset)
    moved = (values - values[:1]).abs().max().item()
    assert model.pos_embed.relative == (name in RELATIVE)
    if model.pos_embed.relative:
        assert spread < 1e-5 and moved == 0
    else:
        assert spread > 1e-2 and moved > 1e-2


@pytest.mark.parametrize("name", list(POSITION_SCHEMES))
def test_without_positions_the_model_is_permutation_equivariant_and_only_then(name: str) -> None:
    model, tokens = random_model(position=name, d_mlp=24), random_tokens()
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    with torch.no_grad():
        change = (model(tokens[:, order]) - model(tokens)[:, order]).abs().max().item()
    assert change < 1e-5 if name == "none" else change > 1e-2
