"""Position schemes of one's own: queries told from keys, heads from heads, and names for configs and models."""

from __future__ import annotations

import cmath
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import random_model, random_tokens, seeded, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scheme_helpers import PerHead, Window, XPos, forgotten, register_all
from torch import Tensor, nn
from torch.testing import assert_close

from mdm_interp import parallel
from mdm_interp.config import SCHEMES, ModelConfig, one_line
from mdm_interp.errors import UserError
from mdm_interp.models.positions import (
    OWN,
    POSITION_SCHEMES,
    PositionScheme,
    Rope,
    Which,
    check_answers,
    register_scheme,
    rotates,
    sample_answers,
)
from mdm_interp.models.transformer import HookedTransformer

MINE = ("xpos", "per_head", "window")
places = st.integers(0, 40)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with forgotten():
        register_all()
        yield


# ---- rotate knows queries from keys


@settings(derandomize=True, max_examples=40)
@given(query_pos=places, key_pos=places, shift=places, adjacent=st.booleans(), dim=st.sampled_from([4, 8]), seed=places)
def test_xpos_scores_are_the_papers_and_depend_on_the_offset_only(
    query_pos: int, key_pos: int, shift: int, adjacent: bool, dim: int, seed: int
) -> None:
    """Sun et al., eq. 4 and 5: planes turned by the offset, times zeta to the power of how far back the key is."""
    cfg = tiny_config(position="xpos", d_head=8, rotary_dim=dim, rotary_adjacent_pairs=adjacent)
    scheme = XPos(cfg).requires_grad_(False)
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64, generator=seeded(seed))

    def score(at: int, of: int) -> float:
        turned = scheme.rotate(q, torch.tensor([at]), "q") * scheme.rotate(k, torch.tensor([of]), "k")
        return turned.sum().item()

    expected = (q * k)[..., dim:].sum().item()
    for plane in range(dim // 2):
        pair = [2 * plane, 2 * plane + 1] if adjacent else [plane, plane + dim // 2]
        of_query, of_key = (complex(*x[0, 0, pair].tolist()) for x in (q, k))
        turned = of_query.conjugate() * of_key * cmath.rect(1, (key_pos - query_pos) * 10_000 ** (-2 * plane / dim))
        expected += turned.real * ((2 * plane / dim + 0.4) / 1.4) ** ((query_pos - key_pos) / XPos.span)
    assert score(query_pos, key_pos) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert score(query_pos + shift, key_pos + shift) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_schemes_of_ones_own_are_relative_as_they_say(name: str, kv_heads: int) -> None:
    """One token everywhere: whatever differs between positions, the position scheme put there."""
    model = random_model(position=name, n_layers=1, n_key_value_heads=kv_heads, dtype="float64")
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.full((1, 8), 3))
    scores, values = cache["attn_scores", 0][0], cache["v", 0][0]
    by_offset = [scores.diagonal(offset, 1, 2) for offset in range(-6, 7)]
    assert max((along - along[:, :1]).abs().max().item() for along in by_offset) < 1e-9
    assert (torch.stack([along[:, 0] for along in by_offset]).std(0) > 1e-3).all()  # and positions do count
    assert not (values - values[:1]).any()


def test_heads_turn_at_speeds_of_their_own() -> None:
    """Grouped queries: heads 0 and 1 read key head 0, which turns as RoPE does; the other turns twice as fast."""
    shape: dict[str, Any] = {"n_layers": 1, "n_key_value_heads": 2, "dtype": "float64"}
    model, plain = random_model(position="per_head", **shape), random_model(position="rope", **shape)
    tokens = random_tokens()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        _, expected = plain.run_with_cache(tokens)
        assert isinstance(plain.pos_embed, Rope)
        plain.pos_embed.theta = 2 * plain.pos_embed.theta
        _, twice = plain.run_with_cache(tokens)
    for heads, of_plain in ((slice(0, 2), expected), (slice(2, 4), twice)):
        assert_close(cache["attn_scores", 0][:, heads], of_plain["attn_scores", 0][:, heads])
    assert not torch.allclose(expected["attn_scores", 0][:, 2:], twice["attn_scores", 0][:, 2:])


@pytest.mark.parametrize("n_pos", [7, 80])  # explicit and fused attention
@pytest.mark.parametrize("name", MINE)
def test_hooks_of_what_is_rotated_are_there_where_something_rotates(name: str, n_pos: int) -> None:
    model = random_model(position=name, n_key_value_heads=2, n_ctx=80)
    hooks = {f"blocks.{layer}.attn.hook_rot_{which}" for layer in range(2) for which in "qk"}
    assert rotates(model.cfg) == (name != "window") == (hooks <= model.hook_dict.keys())
    if name == "window":
        assert not any("hook_rot" in hook for hook in model.hook_dict)
        return
    _, cache = model.run_with_cache(random_tokens(pos=n_pos))
    kinds: tuple[Which, ...] = ("q", "k")
    for which in kinds:
        turned = model.pos_embed.rotate(cache[which, 1], torch.arange(n_pos), which)
        assert torch.equal(cache[f"rot_{which}", 1], turned)
        assert cache[f"rot_{which}", 1].shape[2] == (4 if which == "q" else 2)
    edited = model.run_with_hooks(
        random_tokens(pos=n_pos), fwd_hooks=[("blocks.0.attn.hook_rot_k", lambda x, hook: 2 * x)]
    )
    assert not torch.allclose(edited, model(random_tokens(pos=n_pos)))


@pytest.mark.parametrize("name", MINE)
def test_padding_moves_nothing_and_generation_goes_on(name: str) -> None:
    model = random_model(position=name, attention="causal")
    tokens, mask = random_tokens(pos=5), torch.tensor([[False] * 3 + [True] * 5])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
    with torch.no_grad():
        assert_close(model(padded, attention_mask=mask.expand(2, -1))[:, 3:], model(tokens), atol=1e-4, rtol=1e-4)
        expected = tokens
        for _ in range(4):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False)
    assert isinstance(generated, Tensor) and torch.equal(generated, expected)


# ---- names


def test_every_scheme_of_the_package_has_its_settings() -> None:
    assert set(POSITION_SCHEMES) - set(MINE) == set(OWN)
    assert {name: issubclass(scheme, Rope) for name, scheme in POSITION_SCHEMES.items()} == SCHEMES


def test_a_registered_class_is_what_models_of_its_name_ask() -> None:
    model = random_model(position="xpos")
    assert type(model.pos_embed) is XPos and model.cfg.rotary_dim == 4
    assert "pos_embed.gamma" in dict(model.named_parameters())
    assert model.pos_embed.gamma.item() == pytest.approx(0.4)  # as the class leaves it: only W_ and table are drawn
    assert tiny_config(position="window").rotary_dim is None
    with pytest.raises(ValidationError, match="d_head: 3 is odd"):
        tiny_config(position="xpos", d_head=3)
    assert tiny_config(position="window", d_head=3).head_dim == 3
    with pytest.raises(ValidationError, match="rotary_scaling: position 'window' has no angles of RoPE"):
        tiny_config(position="window", rotary_scaling={"rope_type": "linear", "factor": 2.0})


def test_the_config_of_a_registered_scheme_reads_and_writes(tmp_path: Any) -> None:
    config = tiny_config(position="xpos", rotary_base=100.0)
    config.to_yaml(tmp_path / "model.yaml")
    again = ModelConfig.from_yaml(tmp_path / "model.yaml")
    assert again == config and again.digest() == config.digest() != tiny_config(position="rope").digest()


@pytest.mark.usefixtures("own_schemes")
def test_a_name_that_nobody_registered_is_refused(tmp_path: Any) -> None:
    config = tiny_config(position="xpos")
    config.to_yaml(tmp_path / "model.yaml")
    pickled = pickle.dumps(config)
    del POSITION_SCHEMES["xpos"], SCHEMES["xpos"]
    with pytest.raises(ValidationError) as refused:
        tiny_config(position="xpos")
    said = one_line(refused.value)
    assert said.startswith("position: 'xpos' is not one of 'rope', 'alibi'") and len(said) < 500
    assert said.endswith("correct it, or register it (register_scheme) in a module that this process imports")
    with pytest.raises(UserError, match=r"model.yaml: position: 'xpos' is not one of .* register it"):
        ModelConfig.from_yaml(tmp_path / "model.yaml")
    with pytest.raises(UserError, match="position: 'xpos' is registered by no module that this process imports; call"):
        HookedTransformer(pickle.loads(pickled))


def stranger() -> type[PositionScheme]:
    class XPos(PositionScheme):
        pass

    return XPos


@pytest.mark.usefixtures("own_schemes", "unchecked")
@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        ("XPos", XPos, "name: 'XPos' is no name of a position scheme; use up to 40 small letters, digits"),
        ("", XPos, "name: '' is no name"),
        ("x" * 41, XPos, "name: 'xxx.*' is no name"),
        ("x/../y", XPos, "name: 'x/../y' is no name"),
        ("xpos\n", XPos, "name: .* is no name"),
        (XPos, None, r"name: <class 'scheme_helpers.XPos'> is no name .* as in @register_scheme\('xpos'\)"),
        ("mine", "rope", "scheme: 'rope' is no class derived from PositionScheme; derive it from that, or from Rope"),
        ("mine", nn.Linear, "scheme: <class 'torch.nn.modules.linear.Linear'> is no class derived"),
        ("rope", XPos, "name: 'rope' is mdm_interp.models.positions.Rope's already; give scheme_helpers.XPos another"),
        ("rope", Rope, "name: 'rope' is mdm_interp.models.positions.Rope's already"),
        ("xpos", stranger(), "name: 'xpos' is scheme_helpers.XPos's already; give test_registered_schemes.stranger"),
    ],
)
def test_what_cannot_be_registered_is_refused(name: Any, scheme: Any, message: str) -> None:
    before = dict(POSITION_SCHEMES), dict(SCHEMES)
    with pytest.raises(UserError, match=f"^{message}") as refused:
        register_scheme(name)(scheme)
    assert len(str(refused.value)) < 500
    assert (dict(POSITION_SCHEMES), dict(SCHEMES)) == before


@pytest.mark.usefixtures("own_schemes")
def test_a_class_that_is_defined_again_takes_the_place_of_the_first() -> None:
    """As it is where a cell of a notebook is run twice."""
    first, second = stranger(), stranger()
    assert register_scheme("mine")(first) is first
    register_scheme("mine")(second)
    assert POSITION_SCHEMES["mine"] is second is not first
    assert first.__module__ in parallel._needed


@pytest.mark.parametrize("built_as", ["none", "window"])
def test_a_model_that_would_not_ask_a_scheme_to_rotate_refuses_it(built_as: str) -> None:
    model = random_model(position=built_as)
    model.pos_embed = PerHead(tiny_config(position="per_head"))
    with pytest.raises(UserError, match=f"pos_embed: PerHead rotates, and a model built with position '{built_as}'"):
        model(random_tokens())
    model = random_model(position="xpos")  # which asks any
    model.pos_embed = PerHead(model.cfg)
    assert model(random_tokens()).isfinite().all()


# ---- a class told from another of its name


@pytest.mark.parametrize("name", OWN)
def test_schemes_of_the_package_are_not_sampled(name: str) -> None:
    cfg = tiny_config(position=name)
    assert sample_answers(cfg) == []
    check_answers(cfg, [])
    check_answers(cfg, None)
    with pytest.raises(UserError, match="is not the one that the model was made with"):
        check_answers(cfg, [0.0] * 4)


@pytest.mark.usefixtures("own_schemes")
def test_a_changed_class_answers_otherwise() -> None:
    for name in MINE:
        cfg = tiny_config(position=name)
        sample = sample_answers(cfg)
        assert sample_answers(cfg) == sample and len(sample) == 4 and any(sample)
        assert [bool(number) for number in sample] == [False, True, True, name == "window"]
        check_answers(cfg, sample)
    cfg = tiny_config(position="xpos")
    sample = sample_answers(cfg)
    register_scheme("xpos")(type("XPos", (XPos,), {"__module__": XPos.__module__, "__qualname__": "XPos"}))
    check_answers(cfg, sample)  # another class object that does the same
    changed = type("XPos", (XPos,), {"span": 9, "__module__": XPos.__module__, "__qualname__": "XPos"})
    register_scheme("xpos")(changed)
    with pytest.raises(UserError, match="position: the scheme that is registered as 'xpos' is not the one") as refused:
        check_answers(cfg, sample)
    assert "register that one, and a changed one under a name of its own" in str(refused.value)


@pytest.mark.parametrize("sample", [["1"] * 4, [None] * 4, {"a": 1}, "wave", 7, [float("nan")] * 4, [10**400] * 4])
def test_a_sample_that_is_none_is_another(sample: Any) -> None:
    with pytest.raises(UserError, match="is not the one that the model was made with"):
        check_answers(tiny_config(position="xpos"), sample)


def test_what_is_learned_and_stored_makes_no_other_scheme() -> None:
    class Directed(Window):
        """Draws a direction, which files hold."""

        direction: Tensor

        def __init__(self, cfg: ModelConfig) -> None:
            super().__init__(cfg)
            self.register_buffer("direction", torch.randn(3))
            self.strength = nn.Parameter(torch.randn(()))

        def bias(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
            return super().bias(query_pos, key_pos) * self.strength * self.direction.sum() - float("inf")

    with forgotten():
        register_scheme("directed")(Directed)
        cfg = tiny_config(position="directed")
        sample = sample_answers(cfg)
        assert sample == sample_answers(cfg) and all(abs(number) < 1e9 for number in sample)
