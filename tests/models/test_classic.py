"""Configs and weights of TransformerLens' classic `HookedTransformer`, and checkpoints by its way of loading them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_helpers import N_BPE, write_checkpoint
from helpers import random_tokens, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import refused, word_tokenizer
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.config import TransformerLensConfig

from mdm_interp.checkpoints import load_checkpoint
from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError
from mdm_interp.models.classic import NOTED, READ, SAME, VARIANTS, read_classic_config
from mdm_interp.models.transformer import HookedTransformer

close = partial(assert_close, atol=1e-5, rtol=1e-5)
LEAST: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 4, "act_fn": "gelu", "d_vocab": 13}
"""What a classic config must have."""
GATED: dict[str, Any] = {
    **LEAST,
    **{"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"},
    **{"n_key_value_heads": 2, "d_mlp": 24, "rotary_dim": 4},
}
"""A classic config of the Llama family."""


def randomised(config: Any, seed: int = 0) -> HookedTransformer:
    """The model of a classic config, with every parameter drawn at random: gains, biases and all."""
    model, generator = HookedTransformer(config), seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


# ---- the classic computation, from its description, in plain torch


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * w / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: Tensor, n_dims: int, base: float) -> Tensor:
    """`[batch pos head d_head]`, whose first `n_dims` dimensions turn in pairs (i, i + n_dims / 2)."""
    half, out = n_dims // 2, x.clone()
    for pos in range(x.shape[1]):
        for i in range(half):
            angle = pos * base ** (-2 * i / n_dims)
            one, other = x[:, pos, :, i], x[:, pos, :, i + half]
            out[:, pos, :, i] = one * math.cos(angle) - other * math.sin(angle)
            out[:, pos, :, i + half] = other * math.cos(angle) + one * math.sin(angle)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, causal: bool) -> Tensor:
    """Each head by itself; query heads share keys and values in order. Inputs are `[batch pos head d_head]`."""
    written, shared = bias, q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // shared].transpose(1, 2) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        written = written + scores.softmax(-1) @ v[:, :, head // shared] @ weight[head]
    return written


def classic_logits(w: dict[str, Tensor], cfg: dict[str, Any], tokens: Tensor) -> Tensor:
    """Logits of the weights `w` under their classic names, `_K` and `_V` of grouped heads included."""
    act = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "gelu_new": partial(F.gelu, approximate="tanh")}[
        cfg["act_fn"]
    ]
    rotary, grouped = cfg.get("positional_embedding_type") == "rotary", "_" if cfg.get("n_key_value_heads") else ""

    def normed(x: Tensor, name: str) -> Tensor:
        if cfg.get("normalization_type", "LN") == "LN":
            return layer_norm(x, w[f"{name}.w"], w[f"{name}.b"], cfg.get("eps", 1e-5))
        return rms_norm(x, w[f"{name}.w"], cfg.get("eps", 1e-5))

    resid = w["embed.W_E"][tokens]
    if not rotary:
        resid = resid + w["pos_embed.W_pos"][: tokens.shape[1]]
    for layer in range(cfg["n_layers"]):
        block = f"blocks.{layer}"
        x = normed(resid, f"{block}.ln1")
        q, k, v = (
            torch.einsum("bpm,hmd->bphd", x, w[f"{block}.attn.{mark}W_{name}"]) + w[f"{block}.attn.{mark}b_{name}"]
            for name, mark in (("Q", ""), ("K", grouped), ("V", grouped))
        )
        if rotary:
            q, k = (rotated(one, cfg.get("rotary_dim", cfg["d_head"]), cfg.get("rotary_base", 10000)) for one in (q, k))
        causal = cfg.get("attention_dir", "causal") == "causal"
        resid = resid + attention(q, k, v, w[f"{block}.attn.W_O"], w[f"{block}.attn.b_O"], causal)
        if cfg.get("attn_only"):
            continue
        x = normed(resid, f"{block}.ln2")
        if cfg.get("gated_mlp"):  # the bias after the gate, as the classic model has it
            post = act(x @ w[f"{block}.mlp.W_gate"]) * (x @ w[f"{block}.mlp.W_in"]) + w[f"{block}.mlp.b_in"]
        else:
            post = act(x @ w[f"{block}.mlp.W_in"] + w[f"{block}.mlp.b_in"])
        resid = resid + post @ w[f"{block}.mlp.W_out"] + w[f"{block}.mlp.b_out"]
    return normed(resid, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]


def classic_weights(model: HookedTransformer, *, grouped: bool = False, tables: bool = True) -> dict[str, Tensor]:
    """The model's weights as a classic model saves them: with its masks and tables, and `_` before grouped keys."""
    saved = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if grouped:
        for name in [name for name in saved if name.rsplit(".", 1)[-1] in ("W_K", "W_V", "b_K", "b_V")]:
            path, _, leaf = name.rpartition(".")
            saved[f"{path}._{leaf}"] = saved.pop(name)
    for layer in range(model.cfg.n_layers if tables else 0):
        block = f"blocks.{layer}.attn"
        saved |= {f"{block}.mask": torch.ones(12, 12).tril().bool(), f"{block}.IGNORE": torch.tensor(-math.inf)}
        saved |= {f"{block}.rotary_sin": torch.zeros(12, 4), f"{block}.rotary_cos": torch.zeros(12, 4)}
    return saved


PLAIN: dict[str, dict[str, Any]] = {
    "defaults": LEAST,
    "attention alone": LEAST | {"attn_only": True},
    "bidirectional": LEAST | {"attention_dir": "bidirectional"},
    "narrow heads, wide MLP": LEAST | {"n_heads": 3, "d_mlp": 40, "act_fn": "relu", "eps": 0.1},
    "silu": LEAST | {"act_fn": "silu"},
    "gelu_new": LEAST | {"act_fn": "gelu_new"},
    "rotary": LEAST | {"positional_embedding_type": "rotary", "rotary_dim": 2, "rotary_base": 100},
    "RMS": LEAST | {"normalization_type": "RMS"},
}


@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN.keys())
def test_a_model_of_a_classic_config_computes_as_the_classic_architecture(config: dict[str, Any]) -> None:
    model, tokens = randomised(config), random_tokens(pos=12)
    with torch.no_grad():
        expected = classic_logits(dict(model.named_parameters()), config, tokens)
        assert expected.std() > 0.3
        close(model(tokens), expected)


@pytest.mark.parametrize("changes", [{}, {"rotary_dim": 2}, {"n_key_value_heads": 1}, {"rotary_base": 100}])
def test_rotary_rms_gated_grouped_computes_as_the_classic_architecture(changes: dict[str, Any]) -> None:
    """Of weights as a classic model saves them, its bias after the gate included."""
    config, tokens = GATED | changes, random_tokens(pos=12)
    saved = classic_weights(randomised(config), grouped=True)
    model = HookedTransformer(config)
    model.load_state_dict(saved)
    with torch.no_grad():
        close(model(tokens), classic_logits(saved, config, tokens))


@settings(deadline=None, max_examples=25)
@given(
    n_layers=st.integers(1, 3),
    n_heads=st.integers(1, 3),
    d_head=st.sampled_from([2, 4, 6]),
    d_mlp=st.integers(1, 9),
    rotary=st.booleans(),
    norm=st.sampled_from(["LN", "RMS"]),
    attention_dir=st.sampled_from(["causal", "bidirectional"]),
    act_fn=st.sampled_from(["gelu", "gelu_new", "silu", "relu"]),
    seed=st.integers(0, 9),
)
def test_any_shape_computes_as_the_classic_architecture(rotary: bool, norm: str, seed: int, **sizes: Any) -> None:
    config = {**LEAST, **sizes, "normalization_type": norm, "rotary_dim": sizes["d_head"]}
    config["positional_embedding_type"] = "rotary" if rotary else "standard"
    model, tokens = randomised(config, seed), random_tokens(pos=5)
    with torch.no_grad():
        expected = classic_logits(dict(model.named_parameters()), config, tokens)
        assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)


# ---- configs: defaults


def test_the_defaults_are_the_classic_ones() -> None:
    cfg = HookedTransformer(LEAST).cfg
    assert (cfg.position, cfg.attention, cfg.normalization_type, cfg.eps) == ("learned", "causal", "LN", 1e-5)
    assert (cfg.n_heads, cfg.kv_heads, cfg.d_mlp, cfg.gated_mlp, cfg.act_fn) == (4, 4, 64, False, "gelu")
    assert (cfg.dtype, cfg.device, cfg.default_prepend_bos, cfg.readout_shift) == (torch.float32, "cpu", True, -1)
    assert (cfg.qkv_bias, cfg.tie_word_embeddings, cfg.mask_token_id) == (True, False, None)
    assert not any(getattr(cfg, name) for name in SAME if name.startswith("use_"))


def test_every_weight_has_the_classic_bias_at_zero_and_every_gain_is_one() -> None:
    parameters = dict(HookedTransformer(LEAST).named_parameters())
    block = ["ln1.w", "ln1.b", *(f"attn.{kind}_{name}" for kind in "Wb" for name in "QKVO")]
    block += ["ln2.w", "ln2.b", "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out"]
    expected = {f"blocks.{layer}.{name}" for layer in (0, 1) for name in block}
    expected |= {"embed.W_E", "pos_embed.W_pos", "ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U"}
    assert parameters.keys() == expected
    for name, parameter in parameters.items():
        leaf = name.rsplit(".", 1)[-1]
        assert parameter.requires_grad
        assert (
            (parameter == 0).all()
            if leaf.startswith("b")
            else (parameter == 1).all()
            if leaf == "w"
            else parameter.std() > 0
        )


def test_a_config_of_ours_has_no_such_biases() -> None:
    parameters = dict(HookedTransformer(ModelConfig(d_model=16, n_heads=4, d_vocab=13, n_ctx=12)).named_parameters())
    assert not [name for name in parameters if name.rsplit(".", 1)[-1].startswith("b")]


def test_the_seed_draws_the_weights_and_nothing_else() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, same, other = (HookedTransformer(LEAST | {"seed": seed}).W_Q for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    given = HookedTransformer(LEAST | {"seed": 1}, generator=seeded(2)).W_Q
    assert torch.equal(given, other)  # a generator comes first
    assert not torch.equal(HookedTransformer(LEAST).W_Q, HookedTransformer(LEAST).W_Q)


def test_the_tokenizer_gives_the_vocabulary_where_the_config_does_not() -> None:
    config = {name: value for name, value in LEAST.items() if name != "d_vocab"}
    tokenizer = word_tokenizer("bos")
    model = HookedTransformer(config, tokenizer)
    assert model.cfg.d_vocab == 13 and model.tokenizer is tokenizer
    assert model("w1 w2").shape == (1, 3, 13)  # BOS is prepended by default
    assert HookedTransformer(config | {"d_vocab": 20}, tokenizer).cfg.d_vocab == 20
    assert HookedTransformer(config | {"d_vocab": -1}, tokenizer).cfg.d_vocab == 13
    with refused("cfg: d_vocab: missing; add it"):
        HookedTransformer(config)


# ---- configs: what they come in


@dataclasses.dataclass
class OwnConfig:
    n_layers: int = 2
    d_model: int = 16
    n_ctx: int = 12
    d_head: int = 4
    act_fn: str = "gelu"
    d_vocab: int = 13


class Convertible:
    def to_dict(self) -> dict[str, Any]:
        return dict(LEAST)


@pytest.mark.parametrize("config", [OwnConfig(), Convertible(), TransformerLensConfig(n_heads=4, **LEAST)])
def test_a_dataclass_or_what_has_to_dict_is_read_like_its_dict(config: Any) -> None:
    assert HookedTransformer(config).cfg == HookedTransformer(LEAST).cfg


@pytest.mark.parametrize("fields", [LEAST | {"n_heads": 4}, LEAST | {"n_heads": 4, "n_key_value_heads": 2}])
def test_a_config_of_transformer_lens_is_read(fields: dict[str, Any]) -> None:
    assert HookedTransformer(TransformerLensConfig(**fields)).cfg == HookedTransformer(fields).cfg


def test_a_config_is_not_changed_by_being_read() -> None:
    config = dict(GATED)
    read_classic_config(config)
    assert config == GATED


@pytest.mark.parametrize(
    ("config", "name"), [(3, "int"), ("gpt2", "str"), (None, "NoneType"), ([("d_model", 16)], "list")]
)
def test_what_is_no_config_is_refused(config: Any, name: str) -> None:
    with refused(f"cfg: {name} is no config; give a ModelConfig, a HookedTransformerConfig or a dict of its fields"):
        HookedTransformer(config)


# ---- configs: fields

SET: dict[str, tuple[Any, Any]] = {
    **{name: (3, 3) for name in ("n_layers", "n_heads", "n_ctx", "d_vocab", "d_head", "d_mlp")},
    "d_model": (12, 12),
    **{f"use_{name}": (True, True) for name in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in")},
    **{"n_key_value_heads": (2, 2), "gated_mlp": (True, True), "act_fn": ("gelu_fast", "gelu_new"), "eps": (0.5, 0.5)},
    **{"normalization_type": ("RMSPre", "RMS"), "tie_word_embeddings": (True, True), "initializer_range": (0.3, 0.3)},
    **{"mask_token_id": (12, 12), "dtype": (torch.bfloat16, torch.bfloat16), "device": (torch.device("cpu"), "cpu")},
    **{"default_prepend_bos": (False, False), "rotary_base": (7, 7.0), "rotary_dim": (2, 2)},
    **{"rotary_adjacent_pairs": (True, True), "relative_attention_num_buckets": (8, 8)},
    **{"relative_attention_max_distance": (64, 64), "use_qk_norm": (True, True), "d_vocab_out": (5, 5)},
}
"""Fields of ours: what a classic config says, and what ours then has."""


def test_there_is_a_value_for_every_field_that_is_read() -> None:
    assert SET.keys() == SAME
    kinds = (SAME, NOTED, READ, VARIANTS.keys())
    assert sum(map(len, kinds)) == len(set().union(*kinds))  # none is of two kinds


@pytest.mark.parametrize("field", SET)
def test_a_field_is_read(field: str) -> None:
    given, expected = SET[field]
    extra = {"positional_embedding_type": "rotary"} if field.startswith("rotary") else {}
    extra |= {"positional_embedding_type": "relative_positional_bias"} if field.startswith("relative") else {}
    cfg, plain = (read_classic_config(LEAST | extra | more).model for more in ({field: given}, {}))
    assert getattr(cfg, field) == expected != getattr(plain, field) or field == "device"


@pytest.mark.parametrize("field", sorted(SAME - LEAST.keys() - {"normalization_type", "default_prepend_bos"}))
def test_none_and_minus_one_leave_a_field_at_its_default(field: str) -> None:
    plain = read_classic_config(LEAST).model
    assert read_classic_config(LEAST | {field: None}).model == plain
    if not isinstance(SET[field][0], bool):
        assert read_classic_config(LEAST | {field: -1}).model == plain


@pytest.mark.parametrize(
    ("classic", "ours", "has_W_pos"),
    [
        ("standard", "learned", True),
        ("rotary", "rope", False),
        ("alibi", "alibi", False),
        ("relative_positional_bias", "t5_bias", False),
        ("none", "none", False),
    ],
)
def test_position_schemes_have_other_names(classic: str, ours: str, has_W_pos: bool) -> None:
    model = HookedTransformer(LEAST | {"positional_embedding_type": classic, "rotary_dim": 2})
    assert model.cfg.position == ours
    assert ("pos_embed.W_pos" in dict(model.named_parameters())) == has_W_pos
    assert model(random_tokens()).shape == (2, 7, 13)


@pytest.mark.parametrize(
    ("classic", "ours"), [("LN", "LN"), ("LNPre", "LN"), ("RMS", "RMS"), ("RMSPre", "RMS"), (None, None)]
)
def test_folded_norms_are_norms(classic: str | None, ours: str | None) -> None:
    assert read_classic_config(LEAST | {"normalization_type": classic}).model.normalization_type == ours


@pytest.mark.parametrize(
    ("classic", "ours"),
    [
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("silu", "silu"),
        ("gelu_new", "gelu_new"),
        ("gelu_fast", "gelu_new"),
        ("gelu_pytorch_tanh", "gelu_new"),
    ],
)
def test_the_tanh_approximation_has_several_names(classic: str, ours: str) -> None:
    assert read_classic_config(LEAST | {"act_fn": classic}).model.act_fn == ours


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_the_direction_of_attention_is_read(direction: str) -> None:
    cfg = read_classic_config(LEAST | {"attention_dir": direction}).model
    assert cfg.attention == direction and cfg.readout_shift == (-1 if direction == "causal" else 0)


def test_attention_alone_needs_no_activation_and_has_no_mlp() -> None:
    config = {name: value for name, value in LEAST.items() if name != "act_fn"}
    assert HookedTransformer(config | {"attn_only": True}).cfg.attn_only
    assert HookedTransformer(LEAST | {"attn_only": True, "d_mlp": 64}).cfg.d_mlp is None
    with refused("act_fn: missing; add it, or set attn_only"):
        HookedTransformer(config)


@pytest.mark.parametrize("default", [True, False, None])
def test_whether_texts_begin_with_bos_is_read(default: bool | None) -> None:
    assert read_classic_config(LEAST | {"default_prepend_bos": default}).model.default_prepend_bos is default


@pytest.mark.parametrize("field", sorted(NOTED))
def test_a_field_that_says_where_weights_come_from_changes_nothing(field: str) -> None:
    assert read_classic_config(LEAST | {field: 3}) == read_classic_config(LEAST)


@pytest.mark.parametrize("field", sorted(VARIANTS))
def test_a_variant_is_refused_and_its_plain_value_is_not(field: str) -> None:
    plain = VARIANTS[field]
    for value in (plain, None):
        assert read_classic_config(LEAST | {field: value}) == read_classic_config(LEAST)
    other = not plain if isinstance(plain, bool) else "other" if isinstance(plain, str) else 4.0
    with refused(f"{field}: {other!r} is not implemented here; leave it out, or set it to {plain!r}"):
        HookedTransformer(LEAST | {field: other})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_modle": 16}, "d_modle: no such field of a classic config; remove it or correct its spelling"),
        (
            {"positional_embedding_type": "shortformer"},
            "positional_embedding_type: 'shortformer' is not known here; use one of standard, rotary, alibi, "
            "relative_positional_bias, none",
        ),
        (
            {"normalization_type": "batch"},
            "normalization_type: 'batch' is not known here; use one of LN, LNPre, RMS, RMSPre, None",
        ),
        ({"attn_scale": 1.0}, "attn_scale: scores are divided by sqrt(d_head) 2 here, not by 1.0; leave it out"),
        (
            {"final_rms": True},
            "final_rms: all norms are of one kind here; leave it out, or set normalization_type to 'RMS'",
        ),
        ({"n_heads": 3, "n_key_value_heads": 2}, "cfg: n_key_value_heads: 2 does not divide n_heads 3; use a divisor"),
    ],
)
def test_what_would_compute_something_else_is_refused(fields: dict[str, Any], message: str) -> None:
    with refused(message):
        HookedTransformer(LEAST | fields)


@pytest.mark.parametrize(
    "fields", [{"act_fn": "solu_ln"}, {"attention_dir": "both"}, {"n_layers": 0}, {"dtype": "int8"}]
)
def test_a_value_that_no_model_has_is_refused_by_its_field(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(UserError, match=f"^cfg: {name.removesuffix('_dir')}: .*{value}") as error:
        HookedTransformer(LEAST | fields)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [{"attn_scale": 2.0}, {"attn_scale": -1.0}, {"d_vocab_out": 13}, {"d_vocab_out": -1}, {"final_rms": False}],
)
def test_what_says_the_same_is_accepted(fields: dict[str, Any]) -> None:
    assert read_classic_config(LEAST | fields) == read_classic_config(LEAST)


def test_the_last_norm_may_be_said_to_be_rms_where_all_are() -> None:
    rms = LEAST | {"normalization_type": "RMS"}
    assert read_classic_config(rms | {"final_rms": True}) == read_classic_config(rms)


# ---- weights


def test_a_classic_state_dict_is_loaded_with_its_tables_and_names() -> None:
    source, model = randomised(LEAST), HookedTransformer(LEAST)
    result = model.load_state_dict(classic_weights(source))
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(got, source.state_dict()[name]) for name, got in model.state_dict().items())


def test_keys_of_grouped_heads_have_other_names() -> None:
    source, model = randomised(GATED | {"gated_mlp": False}), HookedTransformer(GATED | {"gated_mlp": False})
    model.load_state_dict(classic_weights(source, grouped=True))
    assert all(torch.equal(got, source.state_dict()[name]) for name, got in model.state_dict().items())


def test_our_own_state_dict_is_loaded_as_it_is() -> None:
    """A bias before the gate stays there: only a classic model's is after it."""
    source, model = randomised(GATED), HookedTransformer(GATED)
    for assign in (False, True):
        model.load_state_dict(classic_weights(source, tables=False), assign=assign)
        assert all(torch.equal(got, source.state_dict()[name]) for name, got in model.state_dict().items())
        close(model(random_tokens()), source(random_tokens()))


@pytest.mark.parametrize("position", ["rotary", "alibi", "none"])
def test_a_position_embedding_that_is_never_read_is_left_out(position: str) -> None:
    config = LEAST | {"positional_embedding_type": position}
    saved = classic_weights(randomised(config)) | {"pos_embed.W_pos": torch.zeros(12, 16)}
    HookedTransformer(config).load_state_dict(saved)
    learned = HookedTransformer(LEAST)
    learned.load_state_dict(classic_weights(randomised(LEAST)) | {"pos_embed.W_pos": torch.full((12, 16), 3.0)})
    assert (learned.W_pos == 3.0).all()


def test_missing_and_unknown_weights_are_told() -> None:
    saved, model = classic_weights(randomised(LEAST)), HookedTransformer(LEAST)
    del saved["ln_final.w"]
    saved["blocks.0.attn.W_X"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)ln_final\.w.*blocks\.0\.attn\.W_X"):
        model.load_state_dict(saved)
    result = model.load_state_dict(saved, strict=False)
    assert result.missing_keys == ["ln_final.w"] and result.unexpected_keys == ["blocks.0.attn.W_X"]
    assert (model.get_parameter("ln_final.w") == 1).all()


def test_a_state_dict_is_not_changed_by_being_loaded() -> None:
    saved = classic_weights(randomised(GATED), grouped=True)
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    HookedTransformer(GATED).load_state_dict(saved)
    assert saved.keys() == copies.keys() and all(torch.equal(saved[name], copies[name]) for name in saved)


# ---- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, "llama", tokenizer=True)
    return str(folder)


def test_a_pretrained_model_is_the_checkpoint_as_it_is_stored(checkpoint: str) -> None:
    model, loaded = HookedTransformer.from_pretrained(checkpoint), load_checkpoint(checkpoint)
    assert isinstance(model, HookedTransformer) and model.cfg == loaded.cfg
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(got, loaded.state_dict()[name]) for name, got in model.state_dict().items())
    assert model.to_tokens("Tom").tolist() == loaded.to_tokens("Tom").tolist()
    assert model.to_tokens("Tom")[0, 0] == N_BPE  # Llama's own BOS


def no_gains(model: HookedTransformer) -> bool:
    return all((p == 1).all() for name, p in model.named_parameters() if name.endswith(".w"))


def centred_over_tokens(model: HookedTransformer) -> bool:
    return bool(model.W_U.mean(-1).abs().max() < 1e-6)


@pytest.mark.parametrize(
    ("options", "holds", "same"),
    [
        ({"fold_ln": True}, no_gains, "logits"),
        ({"center_unembed": True}, centred_over_tokens, "log probabilities"),
        ({"fold_value_biases": True}, lambda model: True, "logits"),
        ({"fold_ln": True, "center_unembed": True, "fold_value_biases": True}, no_gains, "log probabilities"),
    ],
)
def test_weights_are_processed_if_asked(
    checkpoint: str, options: dict[str, Any], holds: Callable[[HookedTransformer], bool], same: str
) -> None:
    plain, model = load_checkpoint(checkpoint), HookedTransformer.from_pretrained(checkpoint, **options)
    tokens = random_tokens(d_vocab=300)
    with torch.no_grad():
        expected, got = plain(tokens), model(tokens)
        assert_close(got.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)
        assert holds(model)
        if same == "logits":
            assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("format", ["qwen2", "dream"])
def test_biases_of_values_are_moved_if_asked(format: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, format)
    plain, model = load_checkpoint(tmp_path), HookedTransformer.from_pretrained(str(tmp_path), fold_value_biases=True)
    assert plain.b_V.abs().max() > 0 and (model.b_V == 0).all() and model.b_O.abs().max() > 0
    with torch.no_grad():
        assert_close(model(random_tokens()), plain(random_tokens()), atol=1e-4, rtol=1e-4)


def test_processing_that_is_not_exact_is_refused(checkpoint: str) -> None:
    with refused(
        "center_writing_weights: with normalization_type 'RMS' the mean of the residual stream reaches the outputs; "
        "only models with LayerNorm ('LN') can be centred"
    ):
        HookedTransformer.from_pretrained(checkpoint, center_writing_weights=True)


def test_other_options_are_those_of_load_checkpoint(checkpoint: str) -> None:
    model = HookedTransformer.from_pretrained(checkpoint, dtype="bfloat16", device="cpu", fold_ln=True)
    assert model.cfg.dtype == model.W_Q.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="checkpoint_index"):
        HookedTransformer.from_pretrained(checkpoint, checkpoint_index=3)
    with refused("no-such-folder!: not a folder, nor a Hugging Face hub id; give one of them"):
        HookedTransformer.from_pretrained("no-such-folder!")
