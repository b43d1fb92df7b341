"""The page for who comes from TransformerLens: its tables say what is there, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from document_helpers import ROOT, load
from torch import nn

from mdm_interp.errors import UserError
from mdm_interp.models.transformer import HookedTransformer

PROGRAM = ROOT / "docs" / "classic_names.py"
KINDS = ("members", "arguments", "hooks", "fields")
BATCH = 2


@pytest.fixture(scope="module")
def classic() -> Any:
    return load(PROGRAM)


@pytest.fixture(scope="module")
def models(classic: Any) -> list[Any]:
    return classic.example_models()


def by_status(classic: Any, kind: str) -> tuple[set[str], set[str]]:
    """The names that the page calls there, and those it calls not there."""
    found = classic.fates(kind)
    absent = {name for name, fate in found.items() if fate.status == "not there"}
    return found.keys() - absent, absent


def test_the_page_has_the_tables_of_today(classic: Any) -> None:
    page = classic.PAGE.read_text(encoding="utf-8")
    assert page.count(classic.BEGIN) == page.count(classic.END) == 1
    assert classic.rewritten(page) == page, "run python docs/classic_names.py"


def test_every_name_that_needs_a_reason_has_one_and_no_other(classic: Any) -> None:
    assert classic.problems() == []


def test_every_classic_name_is_in_the_tables_once(classic: Any) -> None:
    known = classic.names()
    assert set(known) == set(KINDS)
    assert {kind: len(names) > least for (kind, names), least in zip(known.items(), (90, 10, 40, 80), strict=True)}
    for kind, names in known.items():
        assert len(names) == len(set(names)), kind
        assert set(classic.fates(kind)) == set(names)
    table = classic.tables()
    assert all(f"`{name}`" in table for names in known.values() for name in names)


def test_members_are_there_as_the_page_says(classic: Any, models: list[Any]) -> None:
    there, absent = by_status(classic, "members")
    for name in there:
        assert name in dir(HookedTransformer) or any(hasattr(model, name) for model in models), name
    for name in absent:
        assert getattr(HookedTransformer, name, None) is getattr(nn.Module, name, None), name
        assert not any(name in vars(model) | dict(model.named_children()) for model in models), name


def test_arguments_are_taken_as_the_page_says(classic: Any) -> None:
    there, absent = by_status(classic, "arguments")
    taken = inspect.signature(HookedTransformer.forward).parameters
    assert there <= taken.keys() and not absent & taken.keys()
    assert all(one.kind is not one.VAR_KEYWORD for one in taken.values()), "whatever is not taken is refused"


def test_methods_called_the_same_take_what_the_classic_ones_took(classic: Any) -> None:
    """And by the same defaults; looked up here by calling the signature, not by reading it."""
    same = {name for name, fate in classic.fates("members").items() if fate.status == "same"}
    signatures = {name: text for group in classic.MEMBERS.values() for name, text in group.items() if name in same}
    checked = 0
    for name, text in signatures.items():
        ours = classic.own_signature(name)
        if ours is None:
            continue
        expected = [
            one for one in classic.signature_of(text).parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD
        ]
        bound = ours.bind(**{one.name: one.name for one in expected})
        order = [name for name in bound.arguments if name in {one.name for one in expected}]
        assert order == [one.name for one in expected] or "kwargs" in bound.arguments, name
        checked += 1
    assert checked > 15


def seen(model: Any) -> dict[str, list[int]]:
    """The shape at every hook that fires in a pass over the longest sequence."""
    shapes: dict[str, list[int]] = {}

    def note(x: torch.Tensor, hook: Any) -> None:
        shapes[hook.name] = list(x.shape)

    tokens = torch.zeros(BATCH, model.cfg.n_ctx, dtype=torch.long)
    model.run_with_hooks(tokens, fwd_hooks=[(name, note) for name in model.hook_dict])
    return shapes


def test_hooks_are_there_as_the_page_says_and_fire_with_the_classic_shape(classic: Any, models: list[Any]) -> None:
    there, absent = by_status(classic, "hooks")
    fate_of, expected = (
        classic.fates("hooks"),
        {name: shape for group in classic.HOOKS.values() for name, shape in group.items()},
    )
    fired: set[str] = set()
    for model in models:
        cfg, shapes = model.cfg, seen(model)
        assert shapes.keys() == model.hook_dict.keys(), "every hook fires"
        sizes = {"batch": BATCH, "head": cfg.n_heads, "kv_head": cfg.kv_heads, "d_head": cfg.head_dim, "1": 1}
        sizes |= dict.fromkeys(("pos", "query_pos", "key_pos"), cfg.n_ctx)
        sizes |= {name: getattr(cfg, name) for name in ("d_model", "d_mlp", "d_vocab")}
        for hook, shape in shapes.items():
            name = classic.pattern_of(hook)
            fired.add(name)
            if name in fate_of and fate_of[name].status == "same":
                assert shape == [sizes[axis] for axis in expected[name].split()], hook
    assert there <= fired and not absent & fired


def test_hooks_that_the_classic_model_had_not_are_few(classic: Any, models: list[Any]) -> None:
    own = {classic.pattern_of(hook) for model in models for hook in model.hook_dict} - set(classic.names()["hooks"])
    shared = {f"blocks.{{l}}.mlp.shared.hook_{kind}" for kind in ("pre", "pre_linear", "post")}
    experts = {f"blocks.{{l}}.mlp.hook_{kind}" for kind in ("router", "expert_out")} | shared
    assert own == {f"blocks.{{l}}.attn.hook_{kind}_normalized" for kind in ("q", "k")} | experts


def test_fields_are_there_as_the_page_says(classic: Any, models: list[Any]) -> None:
    there, absent = by_status(classic, "fields")
    assert all(hasattr(model.cfg, name) for name in there for model in models)
    assert not any(hasattr(model.cfg, name) for name in absent for model in models)


# ---- classic configs

SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_ctx": 8, "d_head": 4, "d_vocab": 11, "act_fn": "gelu"}
DEFAULTS: dict[str, Any] = {
    **{"model_name": "custom", "eps": 1e-5, "use_attn_scale": True, "attn_scale": 2.0, "init_mode": "gpt2"},
    **{"normalization_type": "LN", "n_devices": 1, "attention_dir": "causal", "initializer_range": -1.0},
    **{"init_weights": True, "d_vocab_out": -1, "positional_embedding_type": "standard", "default_prepend_bos": True},
    **{"dtype": torch.float32, "rotary_base": 10000, "rotary_scaling_factor": 1.0, "attn_scores_soft_cap": -1.0},
    **{"output_logits_soft_cap": -1.0, "NTK_by_parts_low_freq_factor": 1.0, "NTK_by_parts_high_freq_factor": 4.0},
    **{"NTK_by_parts_factor": 8.0, "NTK_original_ctx_len": 8192, "yarn_factor": 1.0, "yarn_attention_factor": 1.0},
    **{"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_original_max_position_embeddings": 4096},
    **{"yarn_truncate": True, "n_heads": 4, "d_mlp": 64, "n_params": 6144, "device": "cpu"},
}
"""What fields of a classic config are in a plain model of that shape, where they are not false or None."""
VARIANTS: dict[str, Any] = {
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "use_local_attn", "use_logn_attn"), True),
    **dict.fromkeys(("use_attention_sinks", "use_dynamic_ntk_rope", "use_NTK_by_parts_rope", "use_yarn_rope"), True),
    **dict.fromkeys(("parallel_attn_mlp", "final_rms", "post_embedding_ln", "load_in_4bit"), True),
    **{"use_normalization_before_and_after": True, "use_attn_scale": False, "attn_scale": 1.0, "num_experts": 4},
    **{"attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0, "clip_qkv": 8.0, "rotary_base_local": 1e4},
    **{"rotary_scaling_factor": 8.0, "positional_embedding_type": "shortformer"},
    **{"act_fn": "solu_ln", "init_mode": "kaiming_normal", "use_hook_tokens": True},
}
"""Fields that change what a classic model computes, and are said not to be there."""


def test_a_classic_config_with_every_field_at_its_default_is_read(classic: Any) -> None:
    known = classic.names()["fields"]
    assert DEFAULTS.keys() <= set(known)
    model = HookedTransformer(dict.fromkeys(known) | DEFAULTS | SHAPE)
    assert not model.cfg.attn_only and model.cfg.is_causal and model.cfg.position == "learned"


@pytest.mark.parametrize("field", VARIANTS)
def test_a_classic_config_that_asks_for_what_is_not_there_is_refused(classic: Any, field: str) -> None:
    with pytest.raises(UserError, match=field):
        HookedTransformer(SHAPE | {field: VARIANTS[field]})


# ---- the program itself


def test_a_name_without_a_reason_is_a_problem(classic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(classic.ABSENT, "members", {})
    found = classic.problems()
    assert "members: generate_stream is not there, and no reason is given" in found
    with pytest.raises(ValueError, match="generate_stream"):
        classic.tables()


@pytest.mark.parametrize(
    ("table", "name", "problem"),
    [
        ("ABSENT", "all_head_labels", "is there, and a reason why not is given"),
        ("DIFFERENT", "generate_stream", "is called different, and is not there"),
        ("DIFFERENT", "no_such_name", "is no classic name"),
    ],
)
def test_a_reason_without_need_is_a_problem(
    classic: Any, monkeypatch: pytest.MonkeyPatch, table: str, name: str, problem: str
) -> None:
    reasons = getattr(classic, table)
    monkeypatch.setitem(reasons, "members", reasons["members"] | {name: "for no reason"})
    assert classic.problems() == [f"members: {name} {problem}"]


def test_a_signature_that_takes_less_is_a_problem(classic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taking_more = {"Weights": classic.MEMBERS["Weights"] | {"all_head_labels": "prefix='L'"}}
    monkeypatch.setattr(classic, "MEMBERS", classic.MEMBERS | taking_more)
    assert classic.problems() == ["members: all_head_labels is other in prefix, and no reason names it"]


def test_a_reason_that_has_become_untrue_is_a_problem(classic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = classic.DIFFERENT["members"] | {"loss_fn": "takes no `per_token`"}
    monkeypatch.setitem(classic.DIFFERENT, "members", said)
    assert classic.problems() == ["members: loss_fn takes per_token as it did, and a reason names it"]
