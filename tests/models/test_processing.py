"""Weight processing: what a model computes stays, what is promised of its weights holds, and tools go on working."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model, random_tokens, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import mirrored_pairs, padded, with_biases
from torch import Tensor, nn
from torch.testing import assert_close

from mdm_interp import load_checkpoint, save_checkpoint
from mdm_interp.data.queries import collate
from mdm_interp.errors import UserError
from mdm_interp.measures.evidence import decompose_logits
from mdm_interp.measures.gradients import gram
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.layers import Norm, TiedUnembed, Unembed
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.models.transformer import HookedTransformer

close = partial(assert_close, atol=1e-10, rtol=1e-10)  # of models in float64

STEPS: dict[str, Callable[[HookedTransformer], Any]] = {
    "fold_layer_norm": HookedTransformer.fold_layer_norm,
    "fold_layer_norm, gains alone": lambda model: model.fold_layer_norm(fold_biases=False),
    "center_writing_weights": HookedTransformer.center_writing_weights,
    "center_unembed": HookedTransformer.center_unembed,
    "fold_value_biases": HookedTransformer.fold_value_biases,
    "process_weights_": HookedTransformer.process_weights_,
}
GATED: dict[str, Any] = {"d_mlp": 24, "gated_mlp": True, "act_fn": "silu"}
MLPS: list[dict[str, Any]] = [{}, {"d_mlp": 24}, GATED]


def makes_sense(step: str, norm: str | None) -> bool:
    return not (step.startswith("fold_layer") and norm is None) and not ("writing" in step and norm != "LN")


@torch.no_grad()
def full_model(*, biases: bool = True, **changes: Any) -> Any:
    """Non-zero gains, biases everywhere, and nothing centred: embeddings and unembeddings with a mean far from 0."""
    model = random_model(**{"dtype": "float64", "qkv_bias": True, "d_mlp": 24, **changes})
    model = with_biases(model) if biases else model
    model.W_E.add_(0.3)
    model.unembed.W_U.add_(torch.linspace(-1, 1, 16)[:, None])
    for block in model.blocks:
        block.attn.W_O.add_(0.2)
    return model


REAL = {"none": None, "left": padded("left", [7, 3]), "right": padded("right", [7, 3])}


@torch.no_grad()
def outputs(model: HookedTransformer, side: str = "none") -> Tensor:
    """Logits of random tokens, at those that are real."""
    real = REAL[side]
    logits = model(random_tokens(), attention_mask=real)
    return logits.flatten(0, 1) if real is None else logits[real]


def log_probs(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


# ---- what a model computes stays as it is

KIND = st.fixed_dictionaries(
    {
        "normalization_type": st.sampled_from(["LN", "RMS", None]),
        "position": st.sampled_from(list(POSITION_SCHEMES)),
        "attention": st.sampled_from(["bidirectional", "causal"]),
        "tie_word_embeddings": st.booleans(),
        "n_key_value_heads": st.sampled_from([1, 2, 4]),
        "n_layers": st.integers(1, 3),
        "seed": st.integers(0, 1000),
        "biases": st.booleans(),
        "qkv_bias": st.booleans(),
    }
)


@settings(deadline=None, max_examples=60)
@given(KIND, st.sampled_from(MLPS), st.sampled_from(list(STEPS)), st.sampled_from(list(REAL)))
def test_any_step_leaves_any_models_predictions(
    kind: dict[str, Any], mlp: dict[str, Any], step: str, side: str
) -> None:
    if not makes_sense(step, kind["normalization_type"]):
        return
    model = full_model(**kind, **{"d_mlp": None, **mlp})
    before = outputs(model, side)
    assert STEPS[step](model) is model
    after = outputs(model, side)
    if step in ("center_unembed", "process_weights_"):
        close(after, before - before.mean(-1, keepdim=True))
        close(log_probs(after), log_probs(before))
    else:
        close(after, before)


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("norm", ["LN", "RMS"])
@pytest.mark.parametrize("mlp", MLPS, ids=["attention only", "plain", "gated"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_steps_together_leave_log_probabilities(position: str, norm: str, mlp: dict[str, Any], dtype: str) -> None:
    for tied in (False, True):
        model = full_model(
            dtype=dtype,
            position=position,
            normalization_type=norm,
            tie_word_embeddings=tied,
            n_key_value_heads=2,
            **{"d_mlp": None, **mlp},
        )
        before = {side: log_probs(outputs(model, side)) for side in REAL}
        model.process_weights_()
        tolerance = 1e-5 if dtype == "float32" else 1e-10
        for side, expected in before.items():
            assert_close(log_probs(outputs(model, side)), expected, atol=tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(list(STEPS)), min_size=2, max_size=5), st.booleans())
def test_steps_in_any_order_and_number_leave_log_probabilities(steps: list[str], tied: bool) -> None:
    model = full_model(normalization_type="LN", position="learned", tie_word_embeddings=tied, **GATED)
    before = log_probs(outputs(model))
    for step in steps:
        STEPS[step](model)
        close(log_probs(outputs(model)), before)


def test_the_loss_stays_as_it_is() -> None:
    model, tokens = full_model(attention="causal", normalization_type="LN"), random_tokens()
    before = model(tokens, return_type="loss")
    close(model.process_weights_()(tokens, return_type="loss"), before)


# ---- what is promised of the weights


@pytest.mark.parametrize("norm", ["LN", "RMS"])
@pytest.mark.parametrize("fold_biases", [True, False])
def test_folded_norms_have_gain_1_and_bias_0(norm: str, fold_biases: bool) -> None:
    model = full_model(normalization_type=norm, **GATED)
    biases = [module.b / module.w for module in model.modules() if isinstance(module, Norm) and module.b is not None]
    model.fold_layer_norm(fold_biases=fold_biases)
    norms = [module for module in model.modules() if isinstance(module, Norm)]
    assert len(norms) == 5
    for module in norms:
        assert (module.w == 1).all()
    for module, bias in zip(norms, biases, strict=False):
        assert module.b is not None
        assert torch.equal(module.b, torch.zeros(16).double() if fold_biases else bias)  # as it is multiplied again
    assert (model.blocks[0].mlp.b_gate is not None) == (norm == "LN" and fold_biases)


def test_folding_multiplies_the_gain_in_and_reads_the_bias_off() -> None:
    model = full_model(normalization_type="LN", n_key_value_heads=2, **GATED)
    old = copy.deepcopy(model)
    model.fold_layer_norm()
    for block, was in zip(model.blocks, old.blocks, strict=True):
        for name in "QKV":
            weight, bias = getattr(was.attn, f"W_{name}"), getattr(was.attn, f"b_{name}")
            for head in range(len(weight)):
                close(getattr(block.attn, f"W_{name}")[head], was.ln1.w.diag() @ weight[head])
                close(getattr(block.attn, f"b_{name}")[head], bias[head] + was.ln1.b @ weight[head])
        assert torch.equal(block.attn.W_O, was.attn.W_O) and torch.equal(block.attn.b_O, was.attn.b_O)
        close(block.mlp.W_in, was.ln2.w.diag() @ was.mlp.W_in)
        close(block.mlp.b_in, was.mlp.b_in + was.ln2.b @ was.mlp.W_in)
        close(block.mlp.W_gate, was.ln2.w.diag() @ was.mlp.W_gate)
        close(block.mlp.b_gate, was.ln2.b @ was.mlp.W_gate)
    close(model.W_U, old.ln_final.get_parameter("w").diag() @ old.W_U)
    close(model.b_U, old.b_U + old.ln_final.get_parameter("b") @ old.W_U)
    assert torch.equal(model.W_E, old.W_E)


@pytest.mark.parametrize("position", ["learned", "rope", "sinusoidal"])
def test_what_writes_has_mean_0_after_centring(position: str) -> None:
    model = full_model(normalization_type="LN", position=position)
    tokens = random_tokens()
    with torch.no_grad():
        _, before = model.run_with_cache(tokens)
        model.center_writing_weights()
        written = [model.W_E, model.W_O, model.b_O, model.W_out, model.b_out]
        written += [model.W_pos] if position == "learned" else []
        for weight in written:
            assert weight.mean(-1).abs().max() < 1e-14
        _, after = model.run_with_cache(tokens)
    assert before["resid_post", 1].mean(-1).abs().max() > 0.1
    if position != "sinusoidal":  # its table is a constant, and stays
        assert after["resid_post", 1].mean(-1).abs().max() < 1e-12
    for name in before:
        if name.endswith(("hook_normalized", "hook_scale", "hook_q", "hook_pattern")):
            close(after[name], before[name])


def test_a_centred_unembedding_has_mean_0_over_tokens_and_so_have_logits() -> None:
    model = full_model(normalization_type=None)
    model.center_unembed()
    assert model.W_U.mean(-1).abs().max() < 1e-14 and model.b_U.mean().abs() < 1e-14
    assert outputs(model).mean(-1).abs().max() < 1e-12


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_value_biases_move_into_output_biases_with_every_head_that_reads_them(kv_heads: int) -> None:
    model = full_model(n_key_value_heads=kv_heads)
    old = copy.deepcopy(model)
    assert old.b_V.abs().min() > 0
    model.fold_value_biases()
    assert not model.b_V.any()
    for layer in range(2):
        moved = sum(old.b_V[layer, head] @ old.W_O[layer, head] for head in range(4))
        close(model.b_O[layer], old.b_O[layer] + moved)
    _, before = old.run_with_cache(random_tokens())
    _, after = model.run_with_cache(random_tokens())
    for layer in range(2):
        close(after["attn_out", layer], before["attn_out", layer])
        close(after["v", layer], before["v", layer] - old.blocks[layer].attn.b_V)


def test_without_value_biases_there_is_nothing_to_move() -> None:
    model = full_model(biases=False, qkv_bias=False)
    names = list(model.state_dict())
    model.fold_value_biases()
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("norm", ["LN", "RMS"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_done_twice_is_done_once(step: str, norm: str) -> None:
    if not makes_sense(step, norm):
        return
    model = full_model(normalization_type=norm, tie_word_embeddings=True, **GATED)
    STEPS[step](model)
    once = {name: weight.clone() for name, weight in model.state_dict().items()}
    STEPS[step](model)
    assert model.state_dict().keys() == once.keys()
    for name, weight in model.state_dict().items():
        assert_close(weight, once[name], atol=1e-14, rtol=0)


def test_each_part_of_all_can_be_left_out() -> None:
    for left_out in ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"):
        model = full_model(normalization_type="LN")
        model.process_weights_(**{left_out: False})
        done = {
            "fold_ln": bool((model.blocks[0].ln1.w == 1).all()),
            "center_writing_weights": bool(model.W_out.mean(-1).abs().max() < 1e-12),
            "center_unembed": bool(model.W_U.mean(-1).abs().max() < 1e-12),
            "fold_value_biases": not model.b_V.any(),
        }
        assert [name for name, was_done in done.items() if not was_done] == [left_out]


# ---- what is not exact is refused, and changes nothing


@pytest.mark.parametrize("norm", ["RMS", None])
@pytest.mark.parametrize(
    "centre",
    [
        HookedTransformer.center_writing_weights,
        lambda model: model.process_weights_(center_writing_weights=True),
    ],
    ids=["alone", "among others"],
)
def test_only_layer_norm_lets_weights_be_centred(norm: str | None, centre: Callable) -> None:
    model = full_model(normalization_type=norm, tie_word_embeddings=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"center_writing_weights: with normalization_type {norm!r} the mean of the"):
        centre(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.cfg.tie_word_embeddings


def test_without_norms_there_is_nothing_to_fold() -> None:
    model = full_model(normalization_type=None)
    with pytest.raises(UserError, match=r"fold_layer_norm: the model has no norms \(normalization_type None\)"):
        model.fold_layer_norm()
    before = log_probs(outputs(model))
    close(log_probs(outputs(model.process_weights_())), before)


def test_biases_stay_only_where_a_gain_gives_them_back() -> None:
    model = full_model(normalization_type="LN", tie_word_embeddings=True)
    with torch.no_grad():
        model.ln_final.get_parameter("w")[3] = 0
    before = outputs(model)
    with pytest.raises(UserError, match=r"fold_biases: a norm has a bias where its gain is 0.*; fold both, with True"):
        model.fold_layer_norm(fold_biases=False)
    assert torch.equal(outputs(model), before) and model.cfg.tie_word_embeddings
    close(outputs(copy.deepcopy(model).fold_layer_norm()), before)
    with torch.no_grad():
        model.ln_final.get_parameter("b")[3] = 0
    before = outputs(model)
    close(outputs(model.fold_layer_norm(fold_biases=False)), before)


# ---- the model remains one


@pytest.mark.parametrize("step", STEPS)
def test_a_tied_model_is_untied_where_the_two_come_to_differ(step: str) -> None:
    model = full_model(normalization_type="LN", tie_word_embeddings=True)
    STEPS[step](model)
    untied = step != "fold_value_biases"
    assert isinstance(model.unembed, Unembed if untied else TiedUnembed)
    assert model.cfg.tie_word_embeddings != untied
    assert all(block.attn.cfg is model.cfg for block in model.blocks)
    with torch.no_grad():
        before = model.W_U.clone()
        model.W_E.mul_(2)
    assert torch.equal(model.W_U, before) == untied


def test_a_copy_of_a_tied_model_is_tied_to_its_own_embedding() -> None:
    model = full_model(normalization_type="LN", tie_word_embeddings=True)
    twin, before = copy.deepcopy(model), outputs(model)
    with torch.no_grad():
        twin.W_E.mul_(3)
    assert torch.equal(twin.W_U, twin.W_E.T) and not torch.equal(twin.W_U, model.W_U)
    twin.process_weights_()
    assert torch.equal(outputs(model), before) and model.cfg.tie_word_embeddings
    again = copy.deepcopy(twin)
    assert torch.equal(outputs(again), outputs(twin)) and isinstance(again.unembed, Unembed)
    assert again.unembed.W_U is not twin.unembed.W_U


def test_processing_keeps_hooks_and_what_takes_gradients() -> None:
    model = full_model(normalization_type="LN", tie_word_embeddings=True)
    seen: list[str] = []
    model.add_perma_hook(lambda name: name.endswith("hook_scale"), lambda x, hook: seen.append(hook.name))
    model.process_weights_()
    model(random_tokens()).sum().backward()
    assert len(seen) == 5
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters())

    frozen = full_model(biases=False, normalization_type="LN", tie_word_embeddings=True, **GATED).requires_grad_(False)
    n_before = len(list(frozen.parameters()))
    frozen.process_weights_()
    assert len(list(frozen.parameters())) > n_before
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_biases_that_are_added_are_0_and_of_the_models_dtype() -> None:
    model = full_model(biases=False, qkv_bias=False, dtype="bfloat16")
    before, names = outputs(model), {name for name, _ in model.named_parameters()}
    assert model.add_biases() is model
    added = {name: p for name, p in model.named_parameters() if name not in names}
    kinds = {name.rsplit(".", 1)[-1] for name in added}
    assert kinds == {"b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U"}
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.bfloat16 and not p.any() for p in added.values())
    assert torch.equal(outputs(model), before)


# ---- files


def rounded_trip(model: HookedTransformer, folder: Path) -> HookedTransformer:
    save_checkpoint(model, folder, "mdm_interp")
    return load_checkpoint(folder, dtype=model.cfg.dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_a_processed_model_without_new_biases_is_saved_and_comes_back(norm: str, tied: bool, tmp_path: Path) -> None:
    model = full_model(biases=False, normalization_type=norm, tie_word_embeddings=tied, dtype="float32")
    if norm == "RMS":
        model.process_weights_(fold_value_biases=False)
    else:
        model.fold_layer_norm(fold_biases=False).center_unembed()
    loaded = rounded_trip(model, tmp_path / "saved")
    assert not loaded.cfg.tie_word_embeddings
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_a_processed_model_with_new_biases_is_not_saved(norm: str, tmp_path: Path) -> None:
    model = full_model(biases=False, normalization_type=norm)
    model.process_weights_()
    new = "b_O" if norm == "RMS" else "b_"
    with pytest.raises(UserError, match=rf"model: \S*{new}\S* is no parameter of a model of this config; weights that"):
        save_checkpoint(model, tmp_path / "saved", "mdm_interp")
    assert not (tmp_path / "saved").exists()


# ---- caches and measures of a processed model


@pytest.mark.parametrize("norm", ["RMS", "LN", None])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_components_and_attributions_add_up_after_processing(norm: str | None, tied: bool) -> None:
    model = full_model(normalization_type=norm, position="learned", tie_word_embeddings=tied, **GATED)
    model.process_weights_()
    tokens, answers, others = random_tokens(), random_tokens(seed=5), random_tokens(seed=6)
    logits, cache = model.run_with_cache(tokens)
    stack: Any = cache.decompose_resid()
    close(stack.sum(0), cache["resid_post", 1])
    wanted, other = (logits.gather(-1, each[..., None])[..., 0] for each in (answers, others))
    assert (model.b_U.abs().max() > 0.1) == (norm == "LN" or not tied)
    for expand in (None, False, True):
        parts: Any = stack if expand is None else cache.get_full_resid_decomposition(expand_neurons=expand)
        attributed = cache.logit_attrs(parts, answers).sum(0)
        close(attributed + model.b_U[answers], wanted)
        difference = cache.logit_attrs(parts, answers, others).sum(0)
        close(difference + model.b_U[answers] - model.b_U[others], wanted - other)
    close(cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U + model.b_U, logits)


@pytest.mark.parametrize("norm", ["RMS", "LN", None])
@pytest.mark.parametrize("position", ["rope", "learned"])
@torch.no_grad()
def test_parts_of_logits_add_up_and_routes_stay_after_processing(norm: str | None, position: str) -> None:
    model = full_model(normalization_type=norm, position=position, n_key_value_heads=2, tie_word_embeddings=True)
    pairs = mirrored_pairs(causal=False)
    queries = [pair.forward for pair in pairs]
    batch, targets = collate(queries, model.cfg), torch.arange(13)
    routes = compute_routes(model, queries)
    model.process_weights_()
    logits = batch.at_readout(model(batch.tokens, attention_mask=batch.attention_mask))
    parts = decompose_logits(model, batch, targets)
    close(parts.total(), logits)
    assert parts.bias.abs().max() > 0.1
    after = compute_routes(model, queries)
    for field in fields(routes):
        close(getattr(after, field.name), getattr(routes, field.name))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_gradients_of_a_processed_model_are_autograds(attention: str) -> None:
    model = full_model(normalization_type="LN", attention=attention, **GATED).process_weights_()
    pairs = mirrored_pairs(causal=attention == "causal")
    queries = [pair.forward for pair in pairs]
    products = gram(model, queries)
    for row, query in enumerate(queries):
        batch = collate([query], model.cfg)
        model.zero_grad()
        logits = batch.at_readout(model(batch.tokens))
        torch.nn.functional.cross_entropy(logits[0], batch.answer[0]).backward()
        squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        assert float(products.within()[row, row]) == pytest.approx(squares, rel=1e-9)


def test_a_processed_model_moves_to_other_precisions() -> None:
    model = full_model(normalization_type="LN", tie_word_embeddings=True).process_weights_()
    expected = log_probs(outputs(model))
    model.to(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_close(log_probs(outputs(model)).double(), expected, atol=1e-5, rtol=1e-5)


def test_directions_of_the_processed_model_are_its_unembedding() -> None:
    model = full_model(normalization_type="LN").process_weights_()
    tokens = torch.randint(13, (5,), generator=seeded(1))
    close(model.tokens_to_residual_directions(tokens), model.W_U.T[tokens])
