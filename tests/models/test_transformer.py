"""The hooked transformer: both attention paths, padding, hooks, caches, and TransformerLens' tools on top of it."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum
from helpers import EXPERTS, random_model, random_tokens, seeded, tiny_config
from model_helpers import native_peer, padded
from torch import Tensor
from torch.func import functional_call, vmap
from torch.testing import assert_close
from transformer_lens import ActivationCache, FactoredMatrix, patching
from transformer_lens.hook_points import HookPoint

from mdm_interp.errors import UserError
from mdm_interp.models.bridge import hooked
from mdm_interp.models.hooks import SWITCHES, CheckedHookPoint
from mdm_interp.models.positions import POSITION_SCHEMES, PositionScheme, Rope, Which
from mdm_interp.models.transformer import HookedTransformer

ATTENTION = ["bidirectional", "causal"]
GATED: dict[str, Any] = {"d_mlp": 24, "gated_mlp": True, "act_fn": "silu"}
close = partial(assert_close, atol=1e-5, rtol=1e-5)


# ---- the fused path


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_fused_attention_equals_explicit_attention_gradients_too(
    position: str, attention: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(position=position, attention=attention, n_key_value_heads=2)
    tokens, mask = random_tokens(), None if side == "none" else padded(side, [7, 4])
    weights = torch.randn(2, 7, model.cfg.d_vocab, generator=seeded(2))
    fused_calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        fused_calls.append(args)
        return attend(*args, **kwargs)

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)

    def run(fused_from: int) -> tuple[Tensor, list[Tensor]]:
        monkeypatch.setattr("mdm_interp.models.layers.FUSED_FROM", fused_from)
        model.zero_grad()
        logits = model(tokens, attention_mask=mask)
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    explicit, explicit_gradients = run(8)
    assert not fused_calls
    fused, fused_gradients = run(7)
    assert len(fused_calls) == model.cfg.n_layers
    close(fused, explicit)
    assert len(fused_gradients) == len(list(model.parameters()))
    for one, other in zip(fused_gradients, explicit_gradients, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_looking_at_a_pattern_takes_the_explicit_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdm_interp.models.layers.FUSED_FROM", 1)
    model, tokens = random_model(), random_tokens()
    plain = model(tokens)
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("pattern"))
    close(logits, plain)
    close(cache["pattern", 1].sum(-1), torch.ones(2, 4, 7))


# ---- who sees whom


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_bidirectional_model_sees_later_tokens_and_a_causal_one_does_not(position: str, attention: str) -> None:
    model, tokens = random_model(position=position, attention=attention), random_tokens(batch=1, pos=5)
    moved = torch.zeros(5, 5, dtype=torch.bool)  # [query_pos key_pos]
    with torch.no_grad():
        before = model(tokens)
        for key_pos in range(5):
            other = tokens.clone()
            other[0, key_pos] = (tokens[0, key_pos] + 1) % model.cfg.d_vocab
            moved[:, key_pos] = (model(other) - before)[0].abs().amax(-1) > 1e-4
    seen = torch.ones(5, 5, dtype=torch.bool)
    assert torch.equal(moved, seen.tril() if model.cfg.is_causal else seen)


# ---- padding


@pytest.mark.promise("padding on the left or on the right", "the same numbers within 1e-5")
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
def test_padding_is_not_read_and_changes_nothing_for_real_tokens(position: str, side: str, attention: str) -> None:
    model = random_model(position=position, attention=attention, n_key_value_heads=2, d_mlp=24)
    tokens, lengths = random_tokens(batch=3), [7, 4, 2]
    real = padded(side, lengths)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, attention_mask=real)
        for row, length in enumerate(lengths):
            close(logits[row, real[row]], model(tokens[row, real[row]][None])[0])
            for layer in range(model.cfg.n_layers):
                pattern = cache["pattern", layer][row]
                assert (pattern[:, :, ~real[row]] == 0).all()
                close(pattern[:, real[row]].sum(-1), torch.ones(4, length))
        other_padding = torch.where(real, tokens, (tokens + 1) % model.cfg.d_vocab)
        assert torch.equal(model(other_padding, attention_mask=real)[real], model(tokens, attention_mask=real)[real])


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
def test_a_gap_in_the_mask_keeps_its_place_and_padding_before_it_has_none(position: str) -> None:
    model, tokens = random_model(position=position), random_tokens(batch=1)
    real = torch.tensor([[True, True, False, True, True, False, True]])
    front = torch.zeros(1, 3, dtype=torch.bool)
    with torch.no_grad():
        alone = model(tokens, attention_mask=real)
        moved = model(torch.cat([tokens[:, :3], tokens], dim=1), attention_mask=torch.cat([front, real], dim=1))[:, 3:]
        without = model(tokens[:, real[0]])
    close(moved[real], alone[real])
    assert ((alone[real] - without[0]).abs().max() > 1e-2) == (position != "none")  # the gap counts as places


def test_positions_without_padding_in_front_are_the_columns_bit_for_bit() -> None:
    model, tokens = random_model(position="learned"), random_tokens(batch=3)
    _, plain = model.run_with_cache(tokens, names_filter="hook_pos_embed")
    for mask in (torch.ones_like(tokens), padded("right", [7, 4, 2])):
        _, masked = model.run_with_cache(tokens, attention_mask=mask, names_filter="hook_pos_embed")
        assert torch.equal(masked["hook_pos_embed"], plain["hook_pos_embed"])
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(tokens)), model(tokens))


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("fused_from", [1, 100])
def test_a_row_of_padding_alone_stays_finite_and_reads_nothing(
    position: str, fused_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdm_interp.models.layers.FUSED_FROM", fused_from)
    model, tokens = random_model(position=position), random_tokens()
    attn_out: list[Tensor] = []
    model.add_hook("blocks.0.hook_attn_out", lambda tensor, hook: attn_out.append(tensor))
    logits = model(tokens, attention_mask=padded("right", [5, 0]))
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (attn_out[0][1] == 0).all() and (attn_out[0][0] != 0).any()


def test_inputs_of_the_wrong_shape_are_refused(unchecked: None) -> None:
    model, tokens = random_model(), random_tokens()
    with pytest.raises(
        UserError, match=r"tokens: expected shape \[batch pos\], got \[1, 2, 7\]; drop or add a dimension"
    ):
        model(tokens[None])
    with pytest.raises(UserError, match=r"attention_mask: expected the shape of tokens \[2, 7\], got \[2, 6\]"):
        model(tokens, attention_mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(UserError, match=r"tokens: 13 positions exceed n_ctx 12; shorten them or raise n_ctx"):
        model(random_tokens(pos=13))
    assert model(random_tokens(pos=12)).shape == (2, 12, 13)


ADDITIVE = torch.zeros(2, 7).masked_fill(~padded("right", [7, 4]), -math.inf)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (ADDITIVE, "float32"),
        (torch.ones(2, 7), "float32"),
        (torch.full((2, 7), 2), "int64"),
        (-padded("right", [7, 4]).long(), "int64"),
    ],
    ids=["additive", "ones in floats", "twos", "minus ones"],
)
def test_a_mask_that_might_mean_its_opposite_is_refused(unchecked: None, mask: Tensor, got: str) -> None:
    model, tokens = random_model(rotary_adjacent_pairs=True), random_tokens()
    message = rf"attention_mask: got {got}, and only booleans or integers 0 and 1 are read; .* mask == 0\)"
    for asked in (model, hooked(native_peer(model))):
        with pytest.raises(UserError, match=message):
            asked(tokens, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_mask_of_zeros_and_ones_is_one_of_booleans(unchecked: None, dtype: torch.dtype) -> None:
    model, tokens, mask = random_model(), random_tokens(), padded("left", [7, 4])
    assert torch.equal(model(tokens, attention_mask=mask.to(dtype)), model(tokens, attention_mask=mask))
    assert torch.equal(model(tokens, attention_mask=ADDITIVE.flip(1) == 0), model(tokens, attention_mask=mask))


def changed_at(row: int, pos: int, token: int) -> Tensor:
    tokens = random_tokens()
    tokens[row, pos] = token
    return tokens


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (changed_at(1, 4, 13), r"tokens: id 13 at \[1, 4\] is outside the vocabulary of 13 \(d_vocab\); correct it"),
        (changed_at(0, 2, -1), r"tokens: id -1 at \[0, 2\] is outside the vocabulary of 13"),
        (changed_at(0, 2, -100).int(), r"tokens: id -100 at \[0, 2\] is outside the vocabulary of 13"),
        (random_tokens().float(), r"tokens: expected token ids as int64, got float32; convert them with .long\(\)"),
        (random_tokens() > 5, "tokens: expected token ids as int64, got bool"),
        (random_tokens().to(torch.uint8), "tokens: expected token ids as int64, got uint8"),
    ],
)
def test_what_is_no_token_id_is_refused(unchecked: None, tokens: Tensor, message: str) -> None:
    model = random_model()
    for asked in (model, model.tokens_to_residual_directions):
        with pytest.raises(UserError, match=message):
            asked(tokens)


def test_ids_are_looked_at_outside_of_vmap_only() -> None:
    model, tokens = random_model(), random_tokens()
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    rows = vmap(lambda row: functional_call(model, parameters, (row[None],))[0])(tokens)
    close(rows, model(tokens))
    assert torch.equal(model(tokens.int()), model(tokens))
    assert model(tokens[:0]).shape == (0, 7, 13)


# ---- position schemes of one's own


class Reversing(PositionScheme):
    def rotate(self, x: Tensor, positions: Tensor, which: Which) -> Tensor:
        return torch.where((positions % 2 == 0)[:, None, None], x, -x)


class Counting(PositionScheme):
    def embed(self, positions: Tensor) -> Tensor:
        return positions[:, None].expand(-1, self.cfg.d_model).float()


class Absolute(Counting):
    relative = False


@pytest.mark.parametrize(
    ("built_as", "scheme", "message"),
    [
        ("none", Reversing, "pos_embed: Reversing rotates, and a model built with position 'none' does not; build it"),
        ("alibi", Rope, "pos_embed: Rope rotates, and a model built with position 'alibi' does not"),
        ("learned", Counting, "pos_embed: Counting adds to the residual stream; set its relative to False, and build"),
        ("rope", Absolute, "pos_embed: Absolute adds to the residual stream"),
    ],
)
def test_a_scheme_that_would_not_be_asked_is_refused(built_as: str, scheme: type[PositionScheme], message: str) -> None:
    model = random_model(position=built_as)
    model.pos_embed = scheme(random_model(position="rope").cfg)
    with pytest.raises(UserError, match=message):
        model(random_tokens())


def test_a_scheme_of_ones_own_counts_from_the_first_real_token_too() -> None:
    model, tokens, real = random_model(position="learned"), random_tokens(batch=1), padded("left", [4])
    model.pos_embed = Absolute(model.cfg)
    with torch.no_grad():
        close(model(tokens, attention_mask=real)[0, 3:], model(tokens[:, 3:])[0])


# ---- hooks: what exists, and that every edit counts

Hook = Callable[..., Any]


def hooked_models() -> list[HookedTransformer]:
    """Between them, every hook point there is."""
    return [
        random_model(normalization_type="LN", n_key_value_heads=2, **GATED),
        random_model(position="learned", attention="causal", d_mlp=24),
    ]


def perturbed(tensor: Tensor, hook: Any) -> Tensor:
    """The activation with its second half of heads, dimensions or keys changed; new memory."""
    return perturbed_in_place(tensor.clone(), hook)


def perturbed_in_place(tensor: Tensor, hook: Any) -> Tensor:
    """As a user writes it: one index or slice of the activation that came in, whose axis 2 counts heads, dimensions
    or query positions. (A norm's scale has one number there.)"""
    part = tensor[:, :, tensor.shape[2] // 2 :]
    part *= 0.5 + torch.rand(part.shape, generator=seeded(3))
    return tensor


def test_hook_points_are_those_of_transformer_lens() -> None:
    norm = ["hook_scale", "hook_normalized"]
    inner = ["q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result"]
    block = [
        "hook_resid_pre",
        "hook_attn_in",
        *(f"hook_{side}_input" for side in "qkv"),
        *(f"ln1.{name}" for name in norm),
        *(f"attn.hook_{name}" for name in inner),
        "hook_attn_out",
        "hook_resid_mid",
        "hook_mlp_in",
        *(f"ln2.{name}" for name in norm),
        *(f"mlp.hook_{name}" for name in ("pre", "pre_linear", "post")),
        "hook_mlp_out",
        "hook_resid_post",
    ]
    expected = ["hook_embed", *(f"blocks.{layer}.{name}" for layer in (0, 1) for name in block)]
    expected += [f"ln_final.{name}" for name in norm]
    assert sorted(random_model(**GATED).hook_dict) == sorted(expected)
    bare = sorted(name for name in expected if not re.search(r"rot_|mlp|ln|mid", name))
    assert sorted(random_model(position="learned", normalization_type=None).hook_dict) == sorted(
        [*bare, "hook_pos_embed"]
    )


@pytest.mark.parametrize("model", hooked_models(), ids=["gated LN rope grouped", "plain RMS learned causal"])
def test_every_edit_counts_in_place_or_not_and_whoever_else_looks(model: HookedTransformer) -> None:
    tokens = random_tokens()
    unmoved, otherwise_in_place, otherwise_when_watched = [], [], []
    with torch.no_grad():
        before = model(tokens)
        alone = {name: model.run_with_hooks(tokens, fwd_hooks=[(name, perturbed)]) for name in model.hook_dict}
        for name, logits in alone.items():
            if (logits - before).abs().max() < 1e-3:
                unmoved.append(name)
            in_place = model.run_with_hooks(tokens, fwd_hooks=[(name, perturbed_in_place)])
            if not torch.allclose(in_place, logits, atol=1e-4):
                otherwise_in_place.append(name)
        model.add_caching_hooks()  # somebody looks at everything
        for name, logits in alone.items():
            watched = model.run_with_hooks(tokens, fwd_hooks=[(name, perturbed)])
            if not torch.allclose(watched, logits, atol=1e-4):
                otherwise_when_watched.append(name)
    assert (unmoved, otherwise_in_place, otherwise_when_watched) == ([], [], [])


@pytest.mark.parametrize("head", [0, 3])
def test_without_its_pattern_a_head_writes_nothing(head: int) -> None:
    model, tokens = random_model(n_key_value_heads=2), random_tokens()
    model.set_use_attn_result(True)

    def silence(pattern: Tensor, hook: Any) -> Tensor:
        return torch.where(torch.arange(4)[:, None, None] == head, 0.0, pattern)

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", silence)]):
            _, silenced = model.run_with_cache(tokens)
    close(silenced["attn_out", 0], cache["attn_out", 0] - cache["result", 0][:, :, head])
    assert cache["result", 0][:, :, head].abs().max() > 0.1


def test_an_edited_value_reaches_the_heads_it_serves_and_no_other() -> None:
    model, tokens = random_model(n_key_value_heads=2), random_tokens()
    twice = torch.tensor([1.0, 2.0])[:, None]  # key/value head 1, read by heads 2 and 3
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_v", lambda v, hook: v * twice)]):
            _, edited = model.run_with_cache(tokens)
    close(edited["z", 0], cache["z", 0] * torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None])


def test_rotations_undone_leave_a_model_without_positions() -> None:
    model = random_model(position="rope")
    blind = HookedTransformer(tiny_config(position="none"))
    blind.load_state_dict(model.state_dict())
    tokens = random_tokens()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=["blocks.0.attn.hook_q", "blocks.0.attn.hook_k"])
        undo: list[Any] = [
            (f"blocks.0.attn.hook_rot_{name}", lambda x, hook, name=name: cache[name, 0]) for name in "qk"
        ]
        with model.hooks(fwd_hooks=undo):
            _, undone = model.run_with_cache(tokens, names_filter="blocks.0.hook_attn_out")
        _, expected = blind.run_with_cache(tokens, names_filter="blocks.0.hook_attn_out")
    close(undone["attn_out", 0], expected["attn_out", 0])


def test_scores_of_minus_infinity_act_as_padding() -> None:
    model, tokens = random_model(), random_tokens()
    real = torch.arange(7) != 3

    def hide(scores: Tensor, hook: Any) -> Tensor:
        return scores.masked_fill(~real, -math.inf)

    with torch.no_grad():
        hidden = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("attn_scores"), hide)])
        close(hidden[:, real], model(tokens, attention_mask=real.expand(2, -1))[:, real])


@pytest.mark.parametrize("side", ["q", "k", "v"])
def test_an_edited_input_is_normalised_and_projected_for_its_head_alone(side: str) -> None:
    model, tokens = random_model(n_key_value_heads=2, qkv_bias=True), random_tokens()
    resid = torch.randn(2, 7, 16, generator=seeded(4))
    n_heads = 4 if side == "q" else 2

    def replace(inputs: Tensor, hook: Any) -> Tensor:
        assert inputs.shape == (2, 7, n_heads, 16)
        return torch.where(torch.arange(n_heads)[:, None] == 1, resid[:, :, None], inputs)

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[(f"blocks.0.hook_{side}_input", replace)]):
            _, edited = model.run_with_cache(tokens)
        normalized = F.rms_norm(resid, (16,), model.get_parameter("blocks.0.ln1.w"), eps=model.cfg.eps)
        weight, bias = (model.get_parameter(f"blocks.0.attn.{kind}_{side.upper()}")[1] for kind in "Wb")
    close(edited[side, 0][:, :, 1], normalized @ weight + bias)
    others = [head for head in range(n_heads) if head != 1]
    close(edited[side, 0][:, :, others], cache[side, 0][:, :, others])


def test_edits_of_norms_and_mlps_have_the_effect_computed_by_hand() -> None:
    model, tokens = random_model(normalization_type="LN", **GATED), random_tokens()

    def times(factor: float) -> Hook:
        return lambda x, hook: x * factor

    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        bias = model.get_parameter("ln_final.b") @ model.W_U
        close(model.run_with_hooks(tokens, fwd_hooks=[("ln_final.hook_scale", times(2))]), (logits - bias) / 2 + bias)
        close(model.run_with_hooks(tokens, fwd_hooks=[("ln_final.hook_normalized", times(0))]), bias.expand_as(logits))
        with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_pre_linear", times(2))]):
            close(model.run_with_cache(tokens)[1]["mlp_out", 1], 2 * cache["mlp_out", 1])
        with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", times(0))]):
            close(model.run_with_cache(tokens)[1]["resid_post", 1], cache["resid_mid", 1])


# ---- hooks: mistakes are loud, and leave nothing behind


def identity(tensor: Tensor, hook: Any) -> Tensor:
    return tensor


def select_nothing(name: str) -> bool:
    return False


def select_all(name: str) -> bool:
    return True


def is_optional(name: str) -> bool:
    """Tell whether an activation is computed only for its hooks."""
    return name.rsplit(".", 1)[-1] in SWITCHES


# Every way to name hooks.
WAYS: dict[str, Callable[[HookedTransformer, Tensor, Any], Any]] = {
    "add_hook": lambda model, tokens, name: model.add_hook(name, identity),
    "add_hook backwards": lambda model, tokens, name: model.add_hook(name, identity, "bwd"),
    "add_perma_hook": lambda model, tokens, name: model.add_perma_hook(name, identity),
    "hooks": lambda model, tokens, name: model.hooks(fwd_hooks=[(name, identity)]).__enter__(),
    "hooks backwards": lambda model, tokens, name: model.hooks(bwd_hooks=[(name, identity)]).__enter__(),
    "run_with_hooks": lambda model, tokens, name: model.run_with_hooks(tokens, fwd_hooks=[(name, identity)]),
    "run_with_cache": lambda model, tokens, name: model.run_with_cache(tokens, names_filter=name),
    "run_with_cache, a list": lambda model, tokens, name: model.run_with_cache(
        tokens, names_filter=["hook_embed", name] if isinstance(name, str) else []
    ),
    "add_caching_hooks": lambda model, tokens, name: model.add_caching_hooks(name),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.attn.hook_patern", r"unknown hook 'blocks.0.attn.hook_patern'; did you mean blocks.0.attn.hook_pa"),
        ("blocks.7.attn.hook_z", r"unknown hook 'blocks.7.attn.hook_z'; did you mean blocks.[01].attn.hook_z"),
        ("blocks.0.attn", r"unknown hook 'blocks.0.attn'"),  # a module, but no hook point
        (select_nothing, r"hook filter ('select_nothing' selects none of the \d+ hooks.*; correct|is an empty list)"),
    ],
    ids=["misspelt", "no such layer", "a module", "nothing"],
)
def test_a_name_or_filter_that_selects_nothing_is_refused(way: str, name: Any, message: str) -> None:
    model, tokens = random_model(), random_tokens()
    with pytest.raises(UserError, match=message):
        WAYS[way](model, tokens, name)
    assert model.list_hooks() == {}


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.zeros(2, 7, 15), r"shape \[2, 7, 15\]"),
        (torch.zeros(1, 7, 16), r"shape \[1, 7, 16\]"),  # would be broadcast without a word
        (0.0, "float"),
        ((torch.zeros(2, 7, 16),), "tuple"),
    ],
)
def test_a_hook_must_return_what_went_in(result: Any, got: str) -> None:
    model, tokens = random_model(), random_tokens()
    with torch.no_grad():
        before = model(tokens)
        with pytest.raises(
            UserError, match=rf"hook on 'blocks.1.hook_resid_pre' returned {got}, expected .* \[2, 7, 16\]; return"
        ):
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: result)])
        assert model.list_hooks() == {}
        assert torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda model, tokens: model.run_with_hooks(
            tokens, fwd_hooks=[("hook_embed", perturbed), ("hook_embedding", perturbed)]
        ),
        lambda model, tokens: model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: 1 / 0)]),
        lambda model, tokens: model.run_with_cache(tokens.repeat(1, 2)),
    ],
    ids=["second name unknown", "hook fails", "forward pass fails"],
)
def test_a_failing_run_leaves_no_hook_behind(mistake: Callable[[HookedTransformer, Tensor], Any]) -> None:
    model, tokens = random_model(), random_tokens()
    with torch.no_grad():
        before = model(tokens)
        with pytest.raises((UserError, ZeroDivisionError)):
            mistake(model, tokens)
        assert model.list_hooks() == {}
        assert torch.equal(model(tokens), before)


def test_a_hook_that_returns_nothing_only_looks() -> None:
    model, tokens = random_model(), random_tokens()
    seen: list[Tensor] = []
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: seen.append(x.clone()))])
        assert torch.equal(logits, model(tokens))
    assert torch.equal(seen[0], model.W_E[tokens])


# ---- caches


@pytest.mark.parametrize("model", hooked_models(), ids=["gated LN rope grouped", "plain RMS learned causal"])
def test_a_cache_holds_every_activation_and_costs_nothing_in_accuracy(model: HookedTransformer) -> None:
    tokens = random_tokens()
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        close(logits, model(tokens))
        _, inputs = model.run_with_cache(tokens, names_filter=is_optional)
    assert isinstance(cache, ActivationCache)
    # None asks for everything but what is computed for its hooks alone
    assert set(cache.keys()) | set(inputs.keys()) == set(model.hook_dict) and not set(cache.keys()) & set(inputs.keys())
    for layer in range(2):
        resid = cache["resid_pre", layer]
        if model.cfg.normalization_type == "LN":
            resid = resid - resid.mean(-1, keepdim=True)
        scale = (resid.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
        assert cache[f"blocks.{layer}.ln1.hook_scale"].shape == (2, 7, 1)
        close(cache[f"blocks.{layer}.ln1.hook_scale"], scale)
        close(cache[f"blocks.{layer}.ln1.hook_normalized"], resid / scale)
        for side in "qkv":
            copies = inputs[f"blocks.{layer}.hook_{side}_input"]
            close(copies, cache["resid_pre", layer][:, :, None].expand_as(copies))
        close(inputs[f"blocks.{layer}.attn.hook_result"].sum(2), cache["attn_out", layer])
        close(cache["resid_mid", layer] + cache["mlp_out", layer], cache["resid_post", layer])
    close(cache["resid_pre", 0], cache["embed"] + (cache["hook_pos_embed"] if cache.has_pos_embed else 0))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("hook_embed", {"hook_embed"}),
        (["blocks.1.attn.hook_z", "hook_embed"], {"hook_embed", "blocks.1.attn.hook_z"}),
        (lambda name: name.endswith("hook_z"), {"blocks.0.attn.hook_z", "blocks.1.attn.hook_z"}),
    ],
)
def test_a_filter_selects_what_it_names(names: Any, expected: set[str]) -> None:
    _, cache = random_model().run_with_cache(random_tokens(), names_filter=names)
    assert set(cache.keys()) == expected


def snapshot(cache: ActivationCache | dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: entry.clone() for name, entry in cache.items()}


def changed(cache: ActivationCache | dict[str, Tensor], before: dict[str, Tensor]) -> list[str]:
    return [name for name, entry in before.items() if not torch.equal(cache[name], entry)]


@pytest.mark.parametrize("model", hooked_models(), ids=["gated LN rope grouped", "plain RMS learned causal"])
def test_a_cached_tensor_never_changes_afterwards(model: HookedTransformer) -> None:
    with torch.no_grad():
        logits, cache = model.run_with_cache(random_tokens())
        before = snapshot(cache)
        for parameter in model.parameters():
            parameter.mul_(3.0)
        logits.zero_()
        assert changed(cache, before) == []
        for name in before:
            cache[name].fill_(7.0)
            assert changed(cache, before) == [name]
            cache[name].copy_(before[name])


def test_a_cached_tensor_does_not_see_later_hooks_of_its_own_run() -> None:
    model, tokens = random_model(position="learned", **GATED), random_tokens()
    seen: dict[str, Tensor] = {}

    def see(tensor: Tensor, hook: Any) -> None:
        seen[hook.name] = tensor.clone()

    def overwrite(tensor: Tensor, hook: Any) -> Tensor:
        return tensor.fill_(0.5)

    cache, save, _ = model.get_caching_hooks(select_all)
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*save, (select_all, see), (select_all, overwrite)])
    assert set(seen) == set(model.hook_dict)
    assert changed(cache, seen) == []


def test_activations_are_copied_only_where_something_could_edit_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only tensor with two names is the residual stream that enters a layer."""
    model, tokens, live = random_model(**GATED), random_tokens(), {}

    def forward(point: HookPoint, x: Tensor) -> Tensor:
        live[point.name] = x
        return x

    def copied() -> set[str]:
        _, cache = model.run_with_cache(tokens)
        return {name for name, entry in cache.items() if entry.data_ptr() != live[name].data_ptr()}

    monkeypatch.setattr(CheckedHookPoint, "forward", forward)
    assert copied() == {f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)}
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: None)]):
        assert copied() == set(model.run_with_cache(tokens)[1])


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (HookedTransformer.half, torch.float16),
        (HookedTransformer.bfloat16, torch.bfloat16),
        (HookedTransformer.double, torch.float64),
        (lambda model: model.double().float(), torch.float32),
        (lambda model: model.type(torch.float16), torch.float16),
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    ],
)
def test_the_config_follows_whatever_converts_a_model(convert: Callable[..., Any], dtype: torch.dtype) -> None:
    model = convert(random_model())
    assert model.cfg.dtype == model.W_E.dtype == model.blocks[0].attn.W_Q.dtype == dtype


def test_the_config_follows_weights_that_are_assigned() -> None:
    model = random_model()
    model.load_state_dict(random_model().half().state_dict(), assign=True)
    assert model.cfg.dtype == model.W_E.dtype == torch.float16
    model.load_state_dict(random_model().double().state_dict())
    assert model.cfg.dtype == model.W_E.dtype == torch.float16


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GATED,
        {"d_mlp": 24, "d_head": 6, "n_key_value_heads": 2},
        {"position": "learned", "tie_word_embeddings": True},
        {"d_vocab_out": 11},
        {"experts": {**EXPERTS, "n_shared": 0}, **GATED},
    ],
)
def test_the_config_counts_the_weights_of_its_matrices(changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    choose = sum(weight.numel() for name, weight in matrices.items() if name.endswith("W_router"))
    assert model.cfg.n_weights == sum(weight.numel() for weight in matrices.values()) - choose


def test_threads_with_a_copy_each_see_their_own_hooks_alone() -> None:
    model, tokens = random_model(), random_tokens()

    def edited(own: HookedTransformer, factor: float) -> Tensor:
        with torch.no_grad(), own.hooks([("blocks.0.hook_resid_pre", lambda x, hook: factor * x)]):
            return own(tokens)

    expected = [edited(model, 1.0 + number) for number in range(4)]

    def work(number: int) -> list[Tensor]:
        own = copy.deepcopy(model)
        return [edited(own, 1.0 + number) for _ in range(40)]

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(work, range(4))):
            assert all(torch.equal(one, expected[number]) for one in found)


@pytest.mark.slow
def test_hooks_of_a_compiled_model_are_seen_where_the_model_itself_is_called(unchecked: None) -> None:
    """As the documentation says: what is compiled passes over hooks that are added later."""
    model, tokens = random_model(), random_tokens()
    edit: list[Any] = [("blocks.0.hook_resid_pre", lambda x, hook: 0 * x)]
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="eager")
        plain = model(tokens)
        close(compiled(tokens), plain)
        with model.hooks(edit):
            assert not torch.allclose(model(tokens), plain)
        assert not torch.allclose(compiled.run_with_hooks(tokens, fwd_hooks=edit), plain)
        assert torch.equal(
            compiled.run_with_cache(tokens)[1]["pattern", 0], model.run_with_cache(tokens)[1]["pattern", 0]
        )


def test_only_a_batch_of_one_sequence_has_its_dimension_removed() -> None:
    model = random_model()
    with pytest.raises(UserError, match=r"^remove_batch_dim: the batch has 2 sequences; give one, or leave it out$"):
        model.run_with_cache(random_tokens(batch=2), remove_batch_dim=True)
    with pytest.raises(UserError, match=r"^remove_batch_dim: the batch has 2 sequences"):
        model.run_with_cache(input=random_tokens(batch=2), remove_batch_dim=True)
    _, cache = model.run_with_cache(input=random_tokens(batch=1, pos=5), remove_batch_dim=True)
    assert cache["resid_pre", 0].shape == (5, 16)


def test_remove_batch_dim_and_pos_slice_take_the_axes_they_name() -> None:
    model, tokens = random_model(**GATED), random_tokens(batch=1)
    with torch.no_grad():
        _, whole = model.run_with_cache(tokens, names_filter=select_all)
        _, squeezed = model.run_with_cache(tokens, names_filter=select_all, remove_batch_dim=True)
        _, sliced = model.run_with_cache(tokens, names_filter=select_all, pos_slice=slice(1, 4))
        _, last = model.run_with_cache(tokens, names_filter=select_all, pos_slice=-1)
    assert not squeezed.has_batch_dim
    for name, entry in whole.items():
        pos_axis = 2 if name.endswith(("pattern", "attn_scores")) else 1  # [batch head query_pos key_pos]
        assert torch.equal(squeezed[name], entry[0]), name
        assert torch.equal(sliced[name], entry.narrow(pos_axis, 1, 3)), name
        assert torch.equal(last[name], entry.narrow(pos_axis, 6, 1)), name  # TransformerLens keeps the axis


@pytest.mark.parametrize("model", hooked_models(), ids=["gated LN rope grouped", "plain RMS learned causal"])
def test_cached_gradients_are_the_gradients_at_each_hook(model: HookedTransformer) -> None:
    """Against the gradient for a zero added there, one hook at a time."""
    tokens = random_tokens()
    cache: dict[str, Tensor] = {}
    for names in (None, is_optional):
        model.add_caching_hooks(names, incl_bwd=True, cache=cache)
        torch.logsumexp(model(tokens), -1).sum().backward()
        model.reset_hooks()
    before = snapshot(cache)
    wrong = []
    for name in model.hook_dict:
        added = torch.zeros_like(cache[name], requires_grad=True)
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, added=added: x + added)])
        (expected,) = torch.autograd.grad(torch.logsumexp(logits, -1).sum(), added)
        if f"{name}_grad" not in cache or not torch.allclose(cache[f"{name}_grad"], expected, atol=1e-4, rtol=1e-3):
            wrong.append(name)
        assert expected.abs().max() > 1e-4
    assert wrong == []
    assert changed(cache, before) == []


def test_run_with_cache_caches_gradients_of_a_model_that_returns_a_loss() -> None:
    class WithLoss(HookedTransformer):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs).square().sum()

    model, tokens = WithLoss(tiny_config(), generator=seeded(0)), random_tokens()
    _, cache = model.run_with_cache(tokens, incl_bwd=True, names_filter="hook_embed")
    embedding_gradient = model.get_parameter("embed.W_E").grad
    assert set(cache.keys()) == {"hook_embed", "hook_embed_grad"}
    assert embedding_gradient is not None
    expected = torch.zeros_like(embedding_gradient).index_add(
        0, tokens.flatten(), cache["hook_embed_grad"].flatten(0, 1)
    )
    close(expected, embedding_gradient)


# ---- TransformerLens' decompositions


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("d_mlp", [None, 24])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_components_add_up_to_the_final_residual(n_layers: int, d_mlp: int | None, position: str) -> None:
    model = random_model(n_layers=n_layers, d_mlp=d_mlp, position=position)
    with torch.no_grad():
        logits, cache = model.run_with_cache(random_tokens())
        stack, labels = cache.decompose_resid(return_labels=True)
        accumulated: Any = cache.accumulated_resid(apply_ln=True)
        close(stack.sum(0), cache["resid_post", n_layers - 1])
        per_layer = 1 if d_mlp is None else 2
        assert len(labels) == len(stack) == 1 + (position == "learned") + per_layer * n_layers
        # the logit lens: every residual through the final norm and unembedding, the last of them the logits
        lens = accumulated @ model.W_U
        assert len(lens) == n_layers + 1
        close(lens[-1], logits)
        close(lens[0], model.get_submodule("ln_final")(cache["resid_pre", 0]) @ model.W_U)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_head_results_are_pattern_times_value_times_output(kv_heads: int) -> None:
    model = random_model(n_key_value_heads=kv_heads)
    with torch.no_grad():
        _, cache = model.run_with_cache(random_tokens(), names_filter=lambda name: "result" not in name)
        stack, labels = cache.stack_head_results(return_labels=True)
        for layer in range(2):
            ones = cache["pattern", layer].sum(-1)
            close(ones, torch.ones_like(ones))
            by_hand = einsum(
                cache["pattern", layer],
                cache[f"blocks.{layer}.ln1.hook_normalized"] * model.get_parameter(f"blocks.{layer}.ln1.w"),
                model.W_V[layer],
                model.W_O[layer],
                "batch head query_pos key_pos, batch key_pos d_in, head d_in d_head, head d_head d_model"
                " -> head batch query_pos d_model",
            )
            close(stack[4 * layer : 4 * layer + 4], by_hand)
    assert labels == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]


@pytest.mark.parametrize("norm", ["RMS", "LN", None])
@pytest.mark.parametrize("mlp", [{}, {"d_mlp": 24}, GATED], ids=["attention only", "plain", "gated"])
@pytest.mark.parametrize("expand_neurons", [False, True])
def test_attributions_of_all_components_add_up_to_the_logit(
    norm: str | None, mlp: dict[str, Any], expand_neurons: bool
) -> None:
    model, tokens = random_model(normalization_type=norm, position="learned", **mlp), random_tokens()
    answers = random_tokens(seed=5)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        stack, labels = cache.get_full_resid_decomposition(expand_neurons=expand_neurons, return_labels=True)
        attributions = cache.logit_attrs(stack, answers)
        expected = logits.gather(-1, answers[..., None])[..., 0]
        if norm == "LN":  # the only part of a logit that no component writes
            expected = expected - (model.get_parameter("ln_final.b") @ model.W_U)[answers]
    neurons = 2 * (24 if expand_neurons else 1) if mlp else 0
    assert len(labels) == len(stack) == 2 * 4 + neurons + 3  # heads, neurons or MLPs, embed, pos_embed, bias
    assert_close(attributions.sum(0), expected, atol=1e-4, rtol=1e-4)
    assert_close(stack.sum(0), cache["resid_post", 1], atol=1e-4, rtol=1e-4)


def test_attributions_of_a_logit_difference_take_tied_weights_and_words() -> None:
    model, tokens = random_model(tie_word_embeddings=True), random_tokens()
    model.tokenizer = lambda text, **_: {"input_ids": [len(word) for word in text.split()]}
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        stack: Any = cache.decompose_resid()
        difference = cache.logit_attrs(stack, 3, 5)
        assert_close(difference.sum(0), logits[..., 3] - logits[..., 5], atol=1e-4, rtol=1e-4)
        close(cache.logit_attrs(stack, "and", "under"), difference)  # the tokenizer above counts letters
    assert torch.equal(model.W_U, model.W_E.T)


# ---- TransformerLens' weights


def test_weights_have_the_shapes_of_transformer_lens() -> None:
    model = random_model(n_key_value_heads=2, d_head=6, d_mlp=24, position="learned")
    shapes = {name: tuple(getattr(model, name).shape) for name in ("W_E", "W_pos", "W_U", "W_Q", "W_K", "W_V", "W_O")}
    assert shapes == {
        "W_E": (13, 16),
        "W_pos": (12, 16),
        "W_U": (16, 13),
        "W_Q": (2, 4, 16, 6),
        "W_K": (2, 4, 16, 6),  # one per query head
        "W_V": (2, 4, 16, 6),
        "W_O": (2, 4, 6, 16),
    }
    assert (model.W_in.shape, model.W_out.shape) == ((2, 16, 24), (2, 24, 16))
    for layer in range(2):
        for name in ("W_K", "W_V"):
            own = model.get_parameter(f"blocks.{layer}.attn.{name}")
            assert own.shape == (2, 16, 6)
            assert torch.equal(getattr(model, name)[layer], own[[0, 0, 1, 1]])


def test_factored_matrices_are_the_products_that_attention_uses() -> None:
    model, tokens = random_model(position="none", n_layers=1, n_key_value_heads=2), random_tokens()
    model.set_use_attn_result(True)
    qk: Any = FactoredMatrix(model.W_Q, model.W_K.transpose(-1, -2))
    ov: Any = FactoredMatrix(model.W_V, model.W_O)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        close(qk.AB, model.W_Q @ model.W_K.transpose(-1, -2))
        close(ov.AB, model.W_V @ model.W_O)
        x = cache["blocks.0.ln1.hook_normalized"] * model.get_parameter("blocks.0.ln1.w")
        scores = einsum(
            x,
            qk.AB[0],
            x,
            "batch query_pos d_query, head d_query d_key, batch key_pos d_key -> batch head query_pos key_pos",
        )
        close(scores / model.cfg.head_dim**0.5, cache["attn_scores", 0])
        written = einsum(x, ov.AB[0], "batch pos d_in, head d_in d_model -> batch pos head d_model")
        result = einsum(
            cache["pattern", 0],
            written,
            "batch head query_pos key_pos, batch key_pos head d_model -> batch query_pos head d_model",
        )
        close(result, cache["result", 0])
        assert_close(ov.norm(), ov.AB.norm(dim=(-2, -1)), atol=1e-4, rtol=1e-4)


# ---- TransformerLens' patching

NO_SWEEP = {
    "make_df_from_ranges": "lists the cells of a sweep; knows no model",
    "layer_pos_patch_setter": "edits one activation inside a sweep below",
    "layer_pos_head_vector_patch_setter": "edits one activation inside a sweep below",
    "layer_head_vector_patch_setter": "edits one activation inside a sweep below",
    "layer_head_pattern_patch_setter": "edits one activation inside a sweep below",
    "layer_head_pos_pattern_patch_setter": "edits one activation inside a sweep below",
    "layer_head_dest_src_pos_pattern_patch_setter": "edits one activation inside a sweep below",
    "generic_activation_patch": "runs inside every sweep below; alone in the test of all positions",
    "get_act_patch_direct_path": "takes two caches; computed by hand in its own test",
    "get_act_patch_direct_path_all_sources": "takes two caches; in the test of direct paths",
}
SWEEPS = [
    name
    for name, value in vars(patching).items()
    if (isinstance(value, partial) or (inspect.isfunction(value) and value.__module__ == patching.__name__))
    and not (name.startswith("_") or name in NO_SWEEP)
]


class Pair:
    """A clean and a corrupted sequence that differ at position 1, measured by a mix of the logits at position 2."""

    def __init__(self, **changes: Any) -> None:
        self.model: Any = random_model(seed=2, n_heads=2, d_head=4, d_mlp=24, **changes)
        self.clean = random_tokens(batch=1, pos=3)
        self.corrupted = self.clean.clone()
        self.corrupted[0, 1] = (self.clean[0, 1] + 5) % self.model.cfg.d_vocab
        with torch.no_grad():
            self.model.set_use_attn_result(True)
            clean_logits, self.clean_cache = self.model.run_with_cache(self.clean)
            corrupted_logits, self.corrupted_cache = self.model.run_with_cache(self.corrupted)
        self.clean_metric, self.corrupted_metric = self.metric(clean_logits), self.metric(corrupted_logits)
        assert abs(self.clean_metric - self.corrupted_metric) > 0.05

    @staticmethod
    def metric(logits: Tensor) -> Tensor:
        return logits[0, 2] @ torch.linspace(-1, 1, 13)


def expected_shape(sweep: str) -> tuple[int, ...]:
    """Layers, then positions and heads as the name says; `every` stacks kinds of activations in front."""
    n_layers, n_heads, n_pos = 2, 2, 3
    if sweep.endswith("dest_src_pos"):
        return n_layers, n_heads, n_pos, n_pos
    if "block_every" in sweep:
        return 3, n_layers, n_pos
    kinds = (5,) if sweep.endswith("every") else ()
    if "all_pos" in sweep:
        return *kinds, n_layers, n_heads
    if "pattern_by_pos" in sweep:
        return n_layers, n_heads, n_pos
    return (*kinds, n_layers, n_pos, n_heads) if "head" in sweep else (n_layers, n_pos)


def test_every_function_of_patching_is_a_sweep_or_excluded_for_a_reason() -> None:
    assert len(SWEEPS) == 18 and all(name.startswith("get_act_patch") for name in SWEEPS)
    assert all(hasattr(patching, name) for name in NO_SWEEP)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_patching_sweeps_run_and_patch_nothing_but_differences(sweep: str) -> None:
    pair = Pair()
    run = getattr(patching, sweep)
    with torch.no_grad():  # TransformerLens edits in place here, and clones while gradients are on
        patched = run(pair.model, pair.corrupted, pair.clean_cache, pair.metric)
    unpatched = run(pair.model, pair.corrupted, pair.corrupted_cache, pair.metric)
    assert patched.shape == unpatched.shape == expected_shape(sweep)
    # from the corrupted run itself nothing changes; from the clean run something does
    close(unpatched, pair.corrupted_metric.expand_as(unpatched))
    assert (patched - pair.corrupted_metric).abs().max() > 1e-3


def test_patching_the_token_that_differs_restores_the_clean_run() -> None:
    pair = Pair()
    with torch.no_grad():
        by_pos = patching.get_act_patch_resid_pre(pair.model, pair.corrupted, pair.clean_cache, pair.metric)
    close(by_pos[0, 1], pair.clean_metric)
    close(by_pos[0, [0, 2]], pair.corrupted_metric.expand(2))
    # before layer 1 the difference has spread: to the position that is read above all, but to no other alone
    assert (by_pos[1] - pair.clean_metric).abs().min() > 1e-4
    assert (by_pos[1] - pair.corrupted_metric).abs().min() > 1e-4


@pytest.mark.parametrize("layer", [0, 1])
def test_patching_all_positions_restores_the_clean_run(layer: int) -> None:
    pair = Pair()
    sweep: Any = patching.generic_activation_patch
    with torch.no_grad():
        restored = sweep(
            pair.model,
            pair.corrupted,
            pair.clean_cache,
            pair.metric,
            patch_setter=lambda corrupted, index, clean: clean,
            activation_name="resid_pre",
            index_axis_names=("layer",),
        )
    close(restored[layer], pair.clean_metric)


def test_patching_a_heads_output_equals_its_clean_write_added_by_hand() -> None:
    pair = Pair()
    with torch.no_grad():
        patched = patching.get_act_patch_attn_head_out_all_pos(
            pair.model, pair.corrupted, pair.clean_cache, pair.metric
        )
        for head in range(2):
            change = (pair.clean_cache["result", 0] - pair.corrupted_cache["result", 0])[:, :, head]
            logits = pair.model.run_with_hooks(
                pair.corrupted, fwd_hooks=[("blocks.0.hook_attn_out", lambda out, hook, change=change: out + change)]
            )
            close(patched[0, head], pair.metric(logits))


@pytest.mark.parametrize(("component", "kv_heads"), [("q", 2), ("q", 1), ("k", 2), ("v", 2)])
def test_direct_paths_equal_those_computed_by_hand(component: Any, kv_heads: int) -> None:
    """The clean write of head 0.1 is added to what one head of layer 1 reads, and to nothing else."""
    pair = Pair(n_key_value_heads=kv_heads)
    model = pair.model
    caches = (pair.clean_cache, pair.corrupted_cache)
    with torch.no_grad():
        every = patching.get_act_patch_direct_path_all_sources(
            model, pair.corrupted, *caches, pair.metric, component=component, verbose=False
        )
        one = patching.get_act_patch_direct_path(
            model, pair.corrupted, *caches, pair.metric, 0, 1, component=component, verbose=False
        )
        assert torch.equal(every[0, 1], one)
        assert (every[1] == 0).all()  # nothing comes after the last layer

        change = (pair.clean_cache["result", 0] - pair.corrupted_cache["result", 0])[:, :, 1]
        read = F.rms_norm(
            pair.corrupted_cache["resid_pre", 1] + change,
            (16,),
            model.get_parameter("blocks.1.ln1.w"),
            eps=model.cfg.eps,
        )
        weight = {"q": model.W_Q, "k": model.W_K, "v": model.W_V}[component][1]
        for head in range(2):

            def replace(activation: Tensor, hook: Any, head: int = head) -> Tensor:
                return torch.where(torch.arange(2)[:, None] == head, (read @ weight[head])[:, :, None], activation)

            logits = model.run_with_hooks(pair.corrupted, fwd_hooks=[(f"blocks.1.attn.hook_{component}", replace)])
            close(one[1, head], pair.metric(logits))
    assert (one[1] - pair.corrupted_metric).abs().max() > 1e-3


def test_direct_paths_into_shared_keys_are_refused_by_transformer_lens() -> None:
    pair = Pair(n_key_value_heads=1)
    with pytest.raises(ValueError, match="n_key_value_heads=1 for n_heads=2"):
        patching.get_act_patch_direct_path(
            pair.model, pair.corrupted, pair.clean_cache, pair.corrupted_cache, pair.metric, 0, 0, component="k"
        )


# ---- initial weights, precision, conversion, text


def test_initial_weights_follow_the_config_and_the_generator() -> None:
    config = tiny_config(
        d_vocab=2000, initializer_range=0.05, qkv_bias=True, normalization_type="LN", position="t5_bias"
    )
    model = HookedTransformer(config, generator=seeded(0))
    assert model.W_E.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(model.W_E.mean().item()) < 1e-3
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "w":
            assert (parameter == 1).all()
        elif leaf.startswith("b"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.3), name
    same, other = (HookedTransformer(config, generator=seeded(seed)).W_Q for seed in (0, 1))
    assert torch.equal(model.W_Q, same) and not torch.equal(model.W_Q, other)
    assert not model.training


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_norms_are_computed_in_float32_at_least(norm: str) -> None:
    """In float16 the square of 300 is infinite."""
    model = random_model(normalization_type=norm, dtype="float16")
    x = 300 * torch.randn(2, 16, generator=seeded(0))
    reference = random_model(normalization_type=norm)
    with torch.no_grad():
        got = model.get_submodule("ln_final")(x.half())
        expected = reference.get_submodule("ln_final")(x)
    assert got.dtype == torch.float16
    assert_close(got.float(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fused_from", [1, 100])
def test_half_precision_follows_full_precision(dtype: str, fused_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdm_interp.models.layers.FUSED_FROM", fused_from)
    tokens, real = random_tokens(), padded("left", [7, 4])
    for position in POSITION_SCHEMES:
        changes: dict[str, Any] = {"position": position, "attention": "causal", "initializer_range": 0.2}
        with torch.no_grad():
            half, full = (
                random_model(dtype=kind, **changes)(tokens, attention_mask=real) for kind in (dtype, "float32")
            )
        assert half.dtype == getattr(torch, dtype)
        assert_close(half.float(), full, atol=0.15, rtol=0.05)


def test_the_config_follows_a_converted_model() -> None:
    model, tokens = random_model(), random_tokens()
    converted = model.to(torch.float64)
    assert converted is model and model.cfg.dtype == torch.float64 and model.cfg.device == "cpu"
    with torch.no_grad():
        assert model(tokens).dtype == torch.float64
        close(model(tokens).float(), random_model()(tokens))


def test_text_needs_a_tokenizer_and_one_token_where_one_is_asked_for() -> None:
    model = random_model()
    assert torch.equal(model.to_tokens(random_tokens()), random_tokens())
    with pytest.raises(
        UserError,
        match="input: 'Paris' needs a tokenizer, and this model has none; give token ids, or call set_tokenizer",
    ):
        model.to_tokens("Paris")
    model.tokenizer = lambda text, **_: {"input_ids": [len(word) for word in text.split()]}
    assert model.to_single_token("Paris") == 5
    with pytest.raises(UserError, match="text: 'New York' is 2 tokens, expected one; choose another word"):
        model.to_single_token("New York")


@pytest.mark.parametrize("position", ["rope", "alibi", "t5_bias", "none"])
def test_relative_schemes_have_no_position_embedding(position: str) -> None:
    model = random_model(position=position)
    with pytest.raises(AttributeError, match="W_pos"):
        _ = model.W_pos
    assert "hook_pos_embed" not in model.hook_dict
