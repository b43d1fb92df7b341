"""Hooks on what is computed only for them, hooks' order and lifetimes, and modules in the place of hook points."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import random_model, random_tokens, seeded
from model_helpers import with_biases
from torch import Tensor, nn
from torch.testing import assert_close
from transformer_lens.hook_points import HookPoint

from mdm_interp.errors import UserError
from mdm_interp.models.hooks import SWITCHES
from mdm_interp.models.transformer import HookedTransformer

close = partial(assert_close, atol=1e-5, rtol=1e-5)

SETTERS: dict[str, Callable[[HookedTransformer, bool], None]] = {
    "use_attn_result": HookedTransformer.set_use_attn_result,
    "use_split_qkv_input": HookedTransformer.set_use_split_qkv_input,
    "use_attn_in": HookedTransformer.set_use_attn_in,
    "use_hook_mlp_in": HookedTransformer.set_use_hook_mlp_in,
}
SPLIT = ["hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"]
KINDS: dict[str, dict[str, Any]] = {
    "attention only": {},
    "no norms": {"normalization_type": None, "position": "alibi", "d_mlp": 24},
    "gated, grouped, causal": {
        "d_mlp": 24,
        "gated_mlp": True,
        "act_fn": "silu",
        "n_key_value_heads": 2,
        "attention": "causal",
    },
    "LayerNorm, learned, tied": {
        "normalization_type": "LN",
        "position": "learned",
        "tie_word_embeddings": True,
        "d_mlp": 24,
        "qkv_bias": True,
    },
    "one key/value head, T5": {"n_key_value_heads": 1, "position": "t5_bias", "d_mlp": 24, "attention": "causal"},
}


def full_model(**changes: Any) -> Any:
    """A model with every optional hook there is."""
    return with_biases(random_model(**{"d_mlp": 24, **changes}))


def everything(name: str) -> bool:
    return True


def nothing(x: Tensor, hook: Any) -> None:
    return None


def optional(model: HookedTransformer, switch: str | None = None) -> set[str]:
    """Names of the optional hooks, or of those of one switch."""
    wanted = {leaf for leaf, of in SWITCHES.items() if switch in (None, of)}
    return {name for name in model.hook_dict if name.rsplit(".", 1)[-1] in wanted}


def setting(head: int, value: Tensor) -> Callable:
    """A hook that puts `[batch pos d]` in the place of one head's activation."""

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, head] = value
        return x

    return edit


# ---- switches


@pytest.mark.parametrize("leaf", SWITCHES)
def test_hooking_by_name_works_without_a_switch(leaf: str) -> None:
    model, tokens = full_model(), random_tokens()
    (name,) = [name for name in model.hook_dict if name.startswith("blocks.1.") and name.endswith(f".{leaf}")]
    seen: list[Tensor] = []
    with torch.no_grad():
        before = model(tokens)
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: seen.append(x.clone()))])
        _, cache = model.run_with_cache(tokens, names_filter=name)
        edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: 0.5 * x)])
    assert set(cache) == {name}
    assert torch.equal(cache[name], seen[0])
    # RMSNorm undoes a factor, but for eps: what reads a halved residual changes little, and still it does
    assert (edited - before).abs().max() > (1e-3 if leaf == "hook_result" else 1e-8)


@pytest.mark.parametrize("switch", SETTERS)
def test_a_cache_of_all_hooks_holds_what_is_switched_on(switch: str) -> None:
    model, tokens = full_model(), random_tokens()
    plain = set(model.hook_dict) - optional(model)
    for on in (True, False):
        SETTERS[switch](model, on)
        assert getattr(model.cfg, switch) is on
        assert all(block.attn.cfg is model.cfg for block in model.blocks) and model.pos_embed.cfg is model.cfg
        expected = plain | (optional(model, switch) if on else set())
        _, cache = model.run_with_cache(tokens)
        assert set(cache) == expected
        assert set(model.run_with_cache(tokens, return_cache_object=False)[1]) == expected
        saved, _, _ = model.get_caching_hooks()
        model.run_with_hooks(tokens, fwd_hooks=model.get_caching_hooks(cache=saved)[1])
        assert set(saved) == expected
        added = model.add_caching_hooks()
        model(tokens)
        assert set(added) == expected
        model.reset_hooks()


def test_switches_are_independent_and_survive_moves_and_copies() -> None:
    model = full_model()
    model.set_use_attn_result(True)
    model.set_use_attn_in(True)
    model = copy.deepcopy(model.to(torch.float64))
    assert [getattr(model.cfg, name) for name in SETTERS] == [True, False, True, False]
    _, cache = model.run_with_cache(random_tokens())
    assert set(model.hook_dict) - set(cache) == optional(model, "use_split_qkv_input") | optional(
        model, "use_hook_mlp_in"
    )


def test_switches_are_no_part_of_what_a_model_is() -> None:
    model = full_model()
    before = model.cfg.digest()
    for switch in SETTERS.values():
        switch(model, True)
    assert model.cfg.digest() == before
    assert not SETTERS.keys() & model.cfg.model_dump().keys()
    with pytest.raises(UserError, match="use_attn_result: a ModelConfig is frozen; make another"):
        model.cfg.use_attn_result = False  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("fused_from", [1, 100])
def test_switches_and_hooks_that_are_gone_leave_logits_bit_for_bit(
    fused_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdm_interp.models.layers.FUSED_FROM", fused_from)
    model, tokens = full_model(), random_tokens()
    with torch.no_grad():
        before = model(tokens)
        for switch in SETTERS.values():
            switch(model, True)
        assert torch.equal(model(tokens), before)
        logits, cache = model.run_with_cache(tokens)
        assert set(cache) == set(model.hook_dict)
        close(logits, before)
        assert torch.equal(model(tokens), before)
        for switch in SETTERS.values():
            switch(model, False)
        model.add_hook(everything, lambda x, hook: 2 * x)
        assert not torch.equal(model(tokens), before)
        model.reset_hooks()
        assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_one_copy_for_all_three_is_refused_where_heads_share_keys(kv_heads: int) -> None:
    model: Any = random_model(n_key_value_heads=kv_heads)
    message = rf"use_attn_in: 4 query heads share {kv_heads} key/value heads.*; hook hook_q_input, hook_k_input and"
    with pytest.raises(UserError, match=message):
        model.set_use_attn_in(True)
    assert not model.cfg.use_attn_in
    model.set_use_attn_in(False)
    with pytest.raises(UserError, match=r"unknown hook 'blocks.0.hook_attn_in'; did you mean blocks"):
        model.add_hook("blocks.0.hook_attn_in", nothing)
    model.set_use_split_qkv_input(True)
    _, cache = model.run_with_cache(random_tokens())
    assert [cache[f"{side}_input", 0].shape[2] for side in "qkv"] == [4, kv_heads, kv_heads]


# ---- names


@pytest.mark.parametrize("leaf", SPLIT)
def test_the_names_of_bridges_reach_the_same_hook_points(leaf: str) -> None:
    model, tokens = full_model(), random_tokens()
    ours, theirs = f"blocks.1.{leaf}", f"blocks.1.attn.{leaf}"
    edit = setting(2, torch.randn(2, 7, 16, generator=seeded(4)))
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(ours, edit)])
        assert (expected - model(tokens)).abs().max() > 1e-3
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(theirs, edit)]), expected)
        model.add_hook(theirs, edit)
        assert torch.equal(model(tokens), expected)
        assert set(model.list_hooks()) == {ours}
        model.reset_hooks()
        model.add_perma_hook(theirs, edit)
        assert torch.equal(model(tokens), expected)
        model.reset_hooks(including_permanent=True)
        _, cache = model.run_with_cache(tokens, names_filter=[theirs, "hook_embed"])
        assert set(cache) == {ours, "hook_embed"}
        assert torch.equal(cache[leaf.removeprefix("hook_"), 1], cache[ours])
    with pytest.raises(UserError, match=r"unknown hook 'blocks.7.hook_"):
        model.add_hook(f"blocks.7.attn.{leaf}", edit)
    with pytest.raises(UserError, match=r"unknown hook 'blocks.1.attn.hook_mlp_in'"):
        model.add_hook("blocks.1.attn.hook_mlp_in", edit)


# ---- what an edit changes, by hand


def projections(model: Any, tokens: Tensor, **hooks: Any) -> dict[str, Tensor]:
    """Queries, keys and values of layer 1 under hooks there."""
    with model.hooks(fwd_hooks=[(f"blocks.1.hook_{name}", edit) for name, edit in hooks.items()]):
        _, cache = model.run_with_cache(tokens, names_filter=[f"blocks.1.attn.hook_{side}" for side in "qkv"])
    return {side: cache[side, 1] for side in "qkv"}


def by_hand(model: Any, resid: Tensor, side: str, head: int) -> Tensor:
    """What a head of layer 1 makes of a residual stream."""
    block, head_of = model.blocks[1], model.cfg.n_heads // model.cfg.kv_heads
    at = head if side == "q" else head // head_of
    weight, bias = (getattr(block.attn, f"{kind}_{side.upper()}")[at] for kind in "Wb")
    return block.ln1(resid) @ weight + bias


@pytest.mark.parametrize("kind", ["attention only", "no norms", "LayerNorm, learned, tied"])
@torch.no_grad()
def test_an_edited_copy_is_read_by_queries_keys_and_values_of_its_head_alone(kind: str) -> None:
    model, tokens = full_model(**{"d_mlp": None, **KINDS[kind]}), random_tokens()
    new = torch.randn(2, 7, 16, generator=seeded(4))
    plain, edited = projections(model, tokens), projections(model, tokens, attn_in=setting(2, new))
    for side in "qkv":
        close(edited[side][:, :, 2], by_hand(model, new, side, 2), atol=1e-4)
        close(edited[side][:, :, [0, 1, 3]], plain[side][:, :, [0, 1, 3]])
        only = projections(model, tokens, **{f"{side}_input": setting(2, new)})
        close(only[side], edited[side])
        for other in set("qkv") - {side}:
            assert torch.equal(only[other], plain[other])


@torch.no_grad()
def test_the_shared_copy_comes_before_those_of_queries_keys_and_values() -> None:
    model, tokens = full_model(), random_tokens()
    order: list[str] = []
    first, second = (torch.randn(2, 7, 16, generator=seeded(seed)) for seed in (4, 5))
    names = [f"blocks.1.{name}" for name in reversed(SPLIT)]
    seen = [(name, lambda x, hook: order.append(hook.name.rsplit(".", 1)[-1])) for name in names]
    model.run_with_hooks(tokens, fwd_hooks=seen)
    assert order == SPLIT

    def check_and_replace(x: Tensor, hook: Any) -> Tensor:
        close(x[:, :, 2], first)
        return setting(2, second)(x, hook)

    edited = projections(model, tokens, attn_in=setting(2, first), k_input=check_and_replace)
    for side, resid in (("q", first), ("k", second), ("v", first)):
        close(edited[side][:, :, 2], by_hand(model, resid, side, 2))


@torch.no_grad()
def test_edits_in_place_of_one_copy_leave_the_others_alone() -> None:
    model, tokens = full_model(), random_tokens()
    _, cache = model.run_with_cache(tokens)

    def overwrite(x: Tensor, hook: Any) -> Tensor:
        return x.mul_(-3)

    plain = projections(model, tokens)
    for edits in ({"q_input": overwrite}, {"q_input": overwrite, "attn_in": nothing}):
        edited = projections(model, tokens, **edits)
        close(edited["k"], plain["k"])
        close(edited["v"], plain["v"])
        assert (edited["q"] - plain["q"]).abs().max() > 0.1
    with model.hooks(fwd_hooks=[(f"blocks.1.{name}", overwrite) for name in (*SPLIT, "hook_mlp_in")]):
        _, after = model.run_with_cache(tokens)
    assert torch.equal(after["resid_pre", 1], cache["resid_pre", 1])
    close(after["resid_mid", 1], cache["resid_pre", 1] + after["attn_out", 1])


@pytest.mark.parametrize("kind", ["no norms", "gated, grouped, causal", "LayerNorm, learned, tied"])
@torch.no_grad()
def test_the_mlp_reads_its_edited_input_and_nothing_else_does(kind: str) -> None:
    model, tokens = full_model(**{"d_mlp": None, **KINDS[kind]}), random_tokens()
    new = torch.randn(2, 7, 16, generator=seeded(4))
    _, plain = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_in", lambda x, hook: new)]):
        _, edited = model.run_with_cache(tokens)
    block = model.blocks[1]
    assert torch.equal(edited["resid_mid", 1], plain["resid_mid", 1])
    close(edited["mlp_out", 1], block.mlp(block.ln2(new)))
    close(edited["resid_post", 1], plain["resid_mid", 1] + edited["mlp_out", 1])


@pytest.mark.parametrize("kv_heads", [1, 4])
@torch.no_grad()
def test_an_edited_result_is_what_its_head_writes(kv_heads: int) -> None:
    model, tokens = full_model(n_key_value_heads=kv_heads), random_tokens()
    new = torch.randn(2, 7, 16, generator=seeded(4))
    _, plain = model.run_with_cache(tokens, names_filter=everything)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_result", setting(2, new))]):
        _, edited = model.run_with_cache(tokens)
    bias = model.blocks[1].attn.b_O
    assert bias is not None and bias.abs().min() > 0
    close(plain["attn_out", 1], plain["result", 1].sum(2) + bias)
    close(edited["attn_out", 1], plain["result", 1][:, :, [0, 1, 3]].sum(2) + new + bias)
    close(plain["result", 1][:, :, 3], plain["z", 1][:, :, 3] @ model.W_O[1, 3])


def test_gradients_of_each_heads_copy_add_up_to_that_of_the_residual_stream() -> None:
    model, tokens = full_model(), random_tokens()
    names = [f"blocks.1.{name}" for name in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")]
    cache = model.add_caching_hooks(["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", *names], incl_bwd=True)
    torch.logsumexp(model(tokens), -1).sum().backward()
    model.reset_hooks()
    copies, pre, mid = (cache[f"blocks.1.hook_{name}_grad"] for name in ("attn_in", "resid_pre", "resid_mid"))
    close(copies.sum(2), pre - mid, atol=1e-4)
    close(sum(cache[f"{name}_grad"] for name in names[1:]), copies, atol=1e-4)
    assert (pre - mid).abs().max() > 1e-2


# ---- every kind of model


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_everything_fires_everywhere_and_changes_nothing(kind: str) -> None:
    tokens = random_tokens()
    model: Any = random_model(**KINDS[kind])
    fired: list[str] = []

    def look(x: Tensor, hook: Any) -> None:
        fired.append(hook.name)

    with torch.no_grad():
        before = model(tokens)
        model.add_hook(everything, look)
        assert set(model.list_hooks()) == set(model.hook_dict)
        close(model(tokens), before, atol=1e-4)
        assert sorted(fired) == sorted(model.hook_dict)
        model.reset_hooks()
        assert torch.equal(model(tokens), before)
    assert any("result" in name for name in fired)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_hooks_on_everything_see_every_gradient(kind: str) -> None:
    tokens = random_tokens()
    model: Any = random_model(**KINDS[kind])
    seen: dict[str, Tensor] = {}

    def look(gradient: Tensor, hook: Any) -> None:
        seen[hook.name] = gradient

    model.add_hook(everything, look, dir="bwd")
    torch.logsumexp(model(tokens), -1).sum().backward()
    assert set(seen) == set(model.hook_dict)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in seen.values())


# ---- order and lifetime


def labelled(order: list[str], label: str) -> Callable:
    return lambda x, hook: order.append(label)


def run(model: HookedTransformer, order: list[str]) -> list[str]:
    order.clear()
    model(random_tokens())
    return list(order)


@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.hook_mlp_in", "blocks.1.attn.hook_result"])
def test_prepended_hooks_run_first(name: str) -> None:
    model, order = full_model(), []
    for label, prepend in (("a", False), ("b", True), ("c", False), ("d", True)):
        model.add_hook(name, labelled(order, label), prepend=prepend)
    assert run(model, order) == ["d", "b", "a", "c"]
    assert len(model.list_hooks()[name]) == 4


@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.hook_mlp_in", "blocks.1.attn.hook_result"])
def test_permanent_hooks_stay_until_they_are_asked_to_go(name: str) -> None:
    model, order = full_model(), []
    model.add_perma_hook(name, labelled(order, "permanent"))
    model.add_hook(name, labelled(order, "also"), is_permanent=True)
    model.add_hook(name, labelled(order, "gone"))
    assert run(model, order) == ["permanent", "also", "gone"]
    model.reset_hooks()
    assert run(model, order) == ["permanent", "also"]
    with model.hooks(fwd_hooks=[(name, labelled(order, "inside"))]):
        assert run(model, order) == ["permanent", "also", "inside"]
    model.run_with_cache(random_tokens())
    assert run(model, order) == ["permanent", "also"]
    model.reset_hooks(including_permanent=True)
    assert run(model, order) == [] and model.list_hooks() == {}


def test_each_context_takes_its_own_hooks_away() -> None:
    model, order, name = full_model(), [], "blocks.0.hook_attn_in"
    model.add_hook(name, labelled(order, "before"))
    with model.hooks(fwd_hooks=[(name, labelled(order, "outer"))]):
        with model.hooks(fwd_hooks=[(name, labelled(order, "inner"))]):
            assert model.context_level == 2
            model.add_hook(name, labelled(order, "level 1"), level=1)
            model.add_hook(name, labelled(order, "level 2"), level=2)
            model.add_hook(name, labelled(order, "no level"))
            assert run(model, order) == ["before", "outer", "inner", "level 1", "level 2", "no level"]
        assert run(model, order) == ["before", "outer", "level 1", "no level"]
        model.run_with_hooks(random_tokens(), fwd_hooks=[(name, nothing)])
        assert run(model, order) == ["before", "outer", "level 1", "no level"]
    assert model.context_level == 0
    assert run(model, order) == ["before", "no level"]


def test_a_context_left_by_an_error_takes_its_hooks_away() -> None:
    model, order = full_model(), []
    with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[("hook_embed", labelled(order, "a"))]):
        raise ZeroDivisionError
    assert run(model, order) == [] and model.context_level == 0


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,)], ids=["tensor", "as torch's own hooks return it"])
def test_backward_hooks_edit_gradients(wrap: Callable[[Tensor], Any]) -> None:
    model, tokens = full_model(), random_tokens()

    def embedding_gradient(*hooks: Any) -> Tensor:
        model.zero_grad()
        with model.hooks(bwd_hooks=list(hooks)):
            model(tokens).square().sum().backward()
        assert model.W_E.grad is not None
        return model.W_E.grad.clone()

    plain = embedding_gradient()
    close(embedding_gradient(("hook_embed", lambda x, hook: wrap(2 * x))), 2 * plain, atol=1e-4)
    seen: list[Tensor] = []
    close(embedding_gradient(("hook_embed", lambda x, hook: seen.append(x))), plain)
    assert seen[0].shape == (2, 7, 16)
    cut: list[Any] = [
        (f"blocks.{layer}.hook_{name}", lambda x, hook: wrap(torch.zeros_like(x)))
        for layer in range(2)
        for name in ("attn_out", "mlp_out")
    ]
    direct = embedding_gradient(*cut)  # along the residual stream alone
    resid = model(tokens, stop_at_layer=2)
    (expected,) = torch.autograd.grad(model(resid, start_at_layer=2).square().sum(), resid)
    by_token = torch.zeros(13, 16).index_add(0, tokens.flatten(), expected.flatten(0, 1))
    close(direct, by_token, atol=1e-4)
    with pytest.raises(UserError, match=r"hook on 'hook_embed' returned shape \[2, 7\], expected a tensor of shape"):
        embedding_gradient(("hook_embed", lambda x, hook: wrap(x.sum(-1))))


@pytest.mark.parametrize("fused_from", [1, 100])
@pytest.mark.parametrize("name", ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_result", *SPLIT])
def test_hooks_registered_with_torch_count_as_well(name: str, fused_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdm_interp.models.layers.FUSED_FROM", fused_from)
    model, tokens = full_model(), random_tokens()
    point = model.hook_dict[f"blocks.0.{name}"]
    noise = torch.randn(64, generator=seeded(4))

    def edit(x: Tensor) -> Tensor:
        return x * noise[: x.shape[-1]]

    with torch.no_grad():
        before = model(tokens)
        expected = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.0.{name}", lambda x, hook: edit(x))])
        assert (expected - before).abs().max() > 1e-3
        for register in (
            lambda: point.register_forward_hook(lambda module, args, output: edit(output)),
            lambda: point.register_forward_pre_hook(lambda module, args: (edit(args[0]),)),
        ):
            handle = register()
            assert torch.equal(model(tokens), expected)
            handle.remove()
            assert torch.equal(model(tokens), before)


# ---- modules in the place of hook points


class Autoencoder(nn.Module):
    """Sparse, as wide as it must be; knows nothing of hooks but one of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = seeded(6)
        self.encode = nn.Parameter(torch.randn(width, 24, generator=generator) / width**0.5)
        self.decode = nn.Parameter(torch.randn(24, width, generator=generator) / 24**0.5)
        self.hook_features = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_features((x @ self.encode).relu()) @ self.decode


class Doubling(HookPoint):
    """A hook point, and not one of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


PLACES = [
    *("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_mlp_in", "hook_attn_out", *SPLIT),
    *("attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_z", "attn.hook_result", "mlp.hook_post"),
]


@pytest.mark.parametrize("fused_from", [1, 100])
@pytest.mark.parametrize("place", PLACES)
def test_a_module_in_the_place_of_a_hook_point_is_used(
    place: str, fused_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdm_interp.models.layers.FUSED_FROM", fused_from)
    model, tokens, name = full_model(), random_tokens(), f"blocks.0.{place}"
    parent = model.get_submodule(name.rpartition(".")[0])
    point = model.hook_dict[name]
    with torch.no_grad():
        before = model(tokens)
        _, cache = model.run_with_cache(tokens, names_filter=name)
        autoencoder = Autoencoder(cache[name].shape[-1])
        expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: autoencoder(x))])
        assert (expected - before).abs().max() > 1e-3

        setattr(parent, place.rsplit(".", 1)[-1], autoencoder)
        model.setup()
        assert torch.equal(model(tokens), expected)
        assert name not in model.hook_dict and f"{name}.hook_features" in model.hook_dict
        logits, cached = model.run_with_cache(tokens, names_filter=everything)
        close(logits, expected)
        assert (cached[f"{name}.hook_features"] >= 0).all()
        silent = model.run_with_hooks(tokens, fwd_hooks=[(f"{name}.hook_features", lambda x, hook: 0 * x)])
        assert (silent - expected).abs().max() > 1e-3
        assert not hasattr(autoencoder, "has_hooks") and model.list_hooks() == {}
        with pytest.raises(UserError, match=f"unknown hook '{name}'; did you mean"):
            model.add_hook(name, nothing)

        setattr(parent, place.rsplit(".", 1)[-1], point)
        model.setup()
        assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("fused_from", [1, 100])
@pytest.mark.parametrize("place", ["attn.hook_pattern", "attn.hook_result", "hook_k_input", "hook_mlp_in"])
def test_a_hook_point_of_another_kind_is_used(place: str, fused_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdm_interp.models.layers.FUSED_FROM", fused_from)
    model, tokens, name = full_model(normalization_type=None), random_tokens(), f"blocks.0.{place}"
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: 2 * x)])
        assert (expected - model(tokens)).abs().max() > 1e-3
        setattr(model.get_submodule(name.rpartition(".")[0]), place.rsplit(".", 1)[-1], Doubling())
        model.setup()
        close(model(tokens), expected)


def test_what_a_module_in_the_place_of_a_hook_point_learns_gets_gradients() -> None:
    model, tokens = full_model(), random_tokens()
    autoencoder: Any = Autoencoder(16)
    model.blocks[0].hook_resid_post = autoencoder
    model.setup()
    model(tokens).square().sum().backward()
    for parameter in autoencoder.parameters():
        assert parameter.grad is not None and parameter.grad.any()
    assert {"blocks.0.hook_resid_post.encode", "blocks.0.hook_resid_post.decode"} <= dict(
        model.named_parameters()
    ).keys()
