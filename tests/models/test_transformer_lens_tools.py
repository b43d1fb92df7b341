"""TransformerLens' own tools on our models: what they give is what an independent computation gives."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from helpers import random_model, random_tokens, seeded
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import ActivationCache, SVDInterpreter, evals, patching
from transformer_lens import utilities as tl
from transformer_lens.head_detector import HEAD_NAMES, detect_head
from transformer_lens.tools import analysis, training
from transformers import PreTrainedTokenizerFast

from mdm_interp.errors import UserError
from mdm_interp.models.transformer import HookedTransformer

N_LAYERS, N_HEADS, D_MODEL, D_MLP, D_VOCAB, N_POS = 2, 4, 16, 24, 13, 7
CLASSIC: dict[str, Any] = {
    **{"n_layers": N_LAYERS, "d_model": D_MODEL, "d_head": 4, "d_mlp": D_MLP, "n_ctx": 12, "d_vocab": D_VOCAB},
    **{"act_fn": "gelu", "seed": 0, "initializer_range": 0.4},
}
BIDIRECTIONAL: dict[str, Any] = {
    **{"d_mlp": D_MLP, "gated_mlp": True, "act_fn": "silu", "qkv_bias": True},
    **{"position": "rope", "normalization_type": "RMS", "attention": "bidirectional"},
}
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"atol": 1e-4, "rtol": 1e-4},
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w12, the ids 0 to 12."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w1", pad_token="w0")


def causal_model() -> HookedTransformer:
    """LayerNorm, learned positions and an MLP, with no bias 0 and no gain 1."""
    model, generator = HookedTransformer(CLASSIC, tokenizer()), seeded(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"\.(b|b_\w+|w)$", name):
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


def bidirectional_model(**changes: Any) -> HookedTransformer:
    """RMSNorm, rotary positions and a gated MLP."""
    model = random_model(**{**BIDIRECTIONAL, **changes})
    model.set_tokenizer(tokenizer())
    return model


@dataclass
class Subject:
    """A model, what it was run on, and what came of it."""

    model: HookedTransformer
    tokens: Tensor
    logits: Tensor
    cache: ActivationCache

    def close(self, actual: Any, expected: Any) -> None:
        assert_close(actual, expected, **TOLERANCE[self.model.cfg.dtype])

    def resid(self, layer: int, mlp_input: bool = False) -> Tensor:
        """What enters a layer, or its MLP; of the layer after the last, what is read out. Not from the cache."""
        entering = self.model(self.tokens, stop_at_layer=layer)
        if not mlp_input:
            return entering
        block = self.model.blocks[layer]
        read = torch.ones(1, 1, N_POS, N_POS, dtype=torch.bool)
        allowed = read.tril() if self.model.cfg.is_causal else read
        normed = block.ln1(entering)
        return entering + block.attn(normed, normed, normed, self.model.pos_embed, allowed)

    def normalized(self, resid: Tensor) -> Tensor:
        """What a norm divides by its scale, by that scale: no gain, no bias."""
        if self.model.cfg.normalization_type == "LN":
            resid = resid - resid.mean(-1, keepdim=True)
        return resid / (resid.pow(2).mean(-1, keepdim=True) + self.model.cfg.eps).sqrt()

    def constant(self) -> Tensor:
        """What no component writes: the parts of the logits that come from the biases of norm and unembedding."""
        bias = getattr(self.model.ln_final, "b", None)
        return self.model.b_U if bias is None else self.model.b_U + bias @ self.model.W_U


SUBJECTS = [
    (kind, processed, dtype)
    for kind in ("causal", "bidirectional")
    for processed in (False, True)
    for dtype in (torch.float32, torch.float64)
    if not processed or dtype == torch.float64
]


@pytest.fixture(
    scope="module", params=SUBJECTS, ids=lambda it: f"{it[0]}{', processed' if it[1] else ''}, {str(it[2])[6:]}"
)
def run(request: pytest.FixtureRequest) -> Subject:
    kind, processed, dtype = request.param
    model = (causal_model() if kind == "causal" else bidirectional_model()).to(dtype)
    if processed:
        model.process_weights_()
    tokens = random_tokens()
    with torch.no_grad():
        return Subject(model, tokens, *model.run_with_cache(tokens))


@pytest.fixture
def subject(run: Subject) -> Iterator[Subject]:
    """A run with a cache of its own, which what is computed of it may be added to."""
    with torch.no_grad():
        yield replace(run, cache=ActivationCache(dict(run.cache.cache_dict), run.model))
    run.model.set_use_attn_result(False)


INPUTS = [(0, False), (0, True), (1, False), (1, True), (2, False)]
"""Layer and whether what its MLP reads is meant; layer 2 is the unembedding."""


# ---- ActivationCache


@pytest.mark.parametrize(("layer", "mlp_input"), INPUTS)
def test_components_add_up_to_what_a_layer_reads(subject: Subject, layer: int, mlp_input: bool) -> None:
    expected, learned = subject.resid(layer, mlp_input), not subject.model.pos_embed.relative
    stack, labels = subject.cache.decompose_resid(layer, mlp_input=mlp_input, return_labels=True)
    written = [f"{i}_{part}_out" for i in range(layer) for part in ("attn", "mlp")]
    written += [f"{layer}_attn_out"] if mlp_input else []
    assert labels == ["embed", *["pos_embed"] * learned, *written]
    subject.close(stack.sum(0), expected)
    of_ln: Any = subject.cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True)
    subject.close(of_ln.sum(0), subject.normalized(expected))
    last: Any = subject.cache.decompose_resid(layer, mlp_input=mlp_input, pos_slice=-1)
    subject.close(last.sum(0), expected[:, -1])


@pytest.mark.parametrize("mode", ["attn", "mlp"])
def test_components_of_one_kind_are_those_that_its_ablation_removes(
    subject: Subject, mode: Literal["attn", "mlp"]
) -> None:
    stack, labels = subject.cache.decompose_resid(mode=mode, incl_embeds=False, return_labels=True)
    assert labels == [f"{layer}_{mode}_out" for layer in range(N_LAYERS)]
    with subject.model.hooks(fwd_hooks=[(f"blocks.1.hook_{mode}_out", lambda out, hook: torch.zeros_like(out))]):
        without = subject.model(subject.tokens, stop_at_layer=N_LAYERS)
    if mode == "mlp":
        subject.close(stack[1], subject.resid(N_LAYERS) - without)
    block, entering = subject.model.blocks[1], subject.resid(1)
    middle = subject.resid(1, mlp_input=True)
    by_hand = {"attn": middle - entering, "mlp": block.mlp(block.ln2(middle))}  # pyright: ignore[reportOptionalCall]
    subject.close(stack[1], by_hand[mode])
    embedded: Any = subject.cache.decompose_resid(mode=mode)
    subject.close(embedded[-N_LAYERS:], stack)


def test_the_accumulated_residual_is_what_each_layer_reads(subject: Subject) -> None:
    stack, labels = subject.cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    subject.close(stack, torch.stack([subject.resid(layer) for layer in range(N_LAYERS + 1)]))
    stack, labels = subject.cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    subject.close(stack, torch.stack([subject.resid(*at) for at in INPUTS]))
    stack, labels = subject.cache.accumulated_resid(1, mlp_input=True, pos_slice=(2, 5), return_labels=True)
    assert labels == ["0_pre", "1_pre", "1_mid"]
    subject.close(stack[-1], subject.resid(1, mlp_input=True)[:, 2:5])


def test_the_accumulated_residual_through_a_norm(subject: Subject) -> None:
    model = subject.model
    lens: Any = subject.cache.accumulated_resid(apply_ln=True)
    for layer, read in enumerate(lens):  # each by statistics of its own, gain and bias included
        expected = subject.normalized(subject.resid(layer)) * model.get_parameter("ln_final.w")
        bias = getattr(model.ln_final, "b", None)
        subject.close(read, expected if bias is None else expected + bias)
    subject.close(model.unembed(lens[-1]), subject.logits)
    for mlp_input in (False, True):  # into a layer: all by the scale of what it reads
        stack: Any = subject.cache.accumulated_resid(1, apply_ln=True, mlp_input=mlp_input)
        subject.close(stack[-1], subject.normalized(subject.resid(1, mlp_input)))


def test_a_stack_through_a_norm_keeps_its_sum(subject: Subject) -> None:
    cache, final = subject.cache, subject.normalized(subject.resid(N_LAYERS))
    parts: Any = cache.decompose_resid()
    subject.close(cache.apply_ln_to_stack(parts).sum(0), final)
    subject.close(cache.apply_ln_to_stack(parts[:, :, 3], pos_slice=3).sum(0), final[:, 3])
    subject.close(cache.apply_ln_to_stack(parts, batch_slice=1).sum(0), final[1])
    recomputed = cache.apply_ln_to_stack(parts, recompute_ln=True)
    subject.close(recomputed, torch.stack([subject.model.ln_final(part) for part in parts]))


@pytest.mark.parametrize("cached", [False, True])
def test_head_results_are_what_silencing_the_head_removes(subject: Subject, cached: bool) -> None:
    model, cache = subject.model, subject.cache
    assert "blocks.0.attn.hook_result" not in cache
    if cached:
        model.set_use_attn_result(True)
        cache = model.run_with_cache(subject.tokens)[1]
        assert "blocks.0.attn.hook_result" in cache
    stack, labels = cache.stack_head_results(return_labels=True, incl_remainder=True)
    assert labels == [*model.all_head_labels(), "remainder"]
    subject.close(stack.sum(0), subject.resid(N_LAYERS))
    for head in range(N_HEADS):
        silence = ("blocks.0.attn.hook_z", lambda z, hook, head=head: z.index_fill(2, torch.tensor(head), 0.0))
        with model.hooks(fwd_hooks=[silence]):
            without = model.run_with_cache(subject.tokens, names_filter="blocks.0.hook_attn_out")[1]["attn_out", 0]
        subject.close(stack[head], subject.cache["attn_out", 0] - without)
    first, labels = cache.stack_head_results(1, return_labels=True, apply_ln=True, incl_remainder=True, pos_slice=2)
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3", "remainder"]
    subject.close(first.sum(0), subject.normalized(subject.resid(1))[:, 2])
    none: Any = cache.stack_head_results(0)
    assert none.shape == (0, 2, N_POS, D_MODEL)


def test_computing_head_results_fills_the_cache_once(subject: Subject, caplog: pytest.LogCaptureFixture) -> None:
    subject.cache.compute_head_results()
    heads = subject.cache["result", 1]
    bias = subject.model.b_O[1]
    subject.close(heads.sum(2) + bias, subject.cache["attn_out", 1])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        subject.cache.compute_head_results()
    assert "already cached" in caplog.text


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_neuron_results_are_what_each_neuron_writes(subject: Subject, layer: int) -> None:
    model, cache, written = subject.model, subject.cache, subject.cache["mlp_out", layer]
    results = cache.get_neuron_results(layer)
    subject.close(results.sum(-2) + model.b_out[layer], written)
    some = cache.get_neuron_results(layer, neuron_slice=[3, 5], pos_slice=-1)
    subject.close(some, results[:, -1, [3, 5]])
    silence = (f"blocks.{layer}.mlp.hook_post", lambda post, hook: post.index_fill(-1, torch.tensor([3, 5]), 0.0))
    with model.hooks(fwd_hooks=[silence]):
        without = model.run_with_cache(subject.tokens, names_filter=f"blocks.{layer}.hook_mlp_out")[1]
    subject.close(some.sum(-2), (written - without["mlp_out", layer])[:, -1])
    for direction in (model.W_U[:, 4], model.W_U[:, :3]):
        subject.close(cache.get_neuron_results(layer, project_output_onto=direction), results @ direction)


@pytest.mark.parametrize(("layer", "mlp_input"), INPUTS[2:])
def test_a_stack_of_neurons_and_what_they_leave_add_up(subject: Subject, layer: int, mlp_input: bool) -> None:
    expected, direction = subject.resid(layer, mlp_input), subject.model.W_U[:, 4]
    ask: dict[str, Any] = {"mlp_input": mlp_input, "incl_remainder": True}
    stack, labels = subject.cache.stack_neuron_results(layer, return_labels=True, **ask)
    assert labels == [*(f"L{i}N{n}" for i in range(layer) for n in range(D_MLP)), "remainder"]
    subject.close(stack.sum(0), expected)
    subject.close(stack[5], subject.cache.get_neuron_results(0)[..., 5, :])
    some: Any = subject.cache.stack_neuron_results(layer, neuron_slice=[5], pos_slice=2, **ask)
    assert len(some) == layer + 1
    subject.close(some.sum(0), expected[:, 2])
    normed: Any = subject.cache.stack_neuron_results(layer, apply_ln=True, **ask)
    subject.close(normed.sum(0), subject.normalized(expected))
    onto: Any = subject.cache.stack_neuron_results(layer, project_output_onto=direction, **ask)
    subject.close(onto, stack @ direction)
    fused: Any = subject.cache.stack_neuron_results(layer, apply_ln=True, project_output_onto=direction, **ask)
    subject.close(fused, normed @ direction)


@pytest.mark.parametrize("expand_neurons", [False, True])
@pytest.mark.parametrize(("layer", "mlp_input"), INPUTS)
def test_the_full_decomposition_adds_up(subject: Subject, expand_neurons: bool, layer: int, mlp_input: bool) -> None:
    expected, direction = subject.resid(layer, mlp_input), subject.model.W_U[:, :2]
    ask: dict[str, Any] = {"layer": layer, "mlp_input": mlp_input, "expand_neurons": expand_neurons}
    stack, labels = subject.cache.get_full_resid_decomposition(return_labels=True, **ask)
    heads = (layer + mlp_input) * N_HEADS
    neurons = layer * (D_MLP if expand_neurons else 1)
    embeds = ["embed"] if subject.model.pos_embed.relative else ["embed", "pos_embed"]
    assert len(labels) == len(stack) == heads + neurons + len(embeds) + 1
    assert labels[heads + neurons :] == [*embeds, "bias"]
    subject.close(stack.sum(0), expected)
    normed: Any = subject.cache.get_full_resid_decomposition(apply_ln=True, pos_slice=-1, **ask)
    subject.close(normed.sum(0), subject.normalized(expected)[:, -1])
    onto: Any = subject.cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=direction, **ask)
    subject.close(onto.sum(0), subject.normalized(expected) @ direction)


def test_activations_stack_over_layers(subject: Subject) -> None:
    cache = subject.cache
    patterns = cache.stack_activation("pattern")
    assert patterns.shape == (N_LAYERS, 2, N_HEADS, N_POS, N_POS)
    subject.close(patterns.sum(-1), torch.ones_like(patterns[..., 0]))
    scales = cache.stack_activation("scale", sublayer_type="ln2")
    assert torch.equal(scales[1], cache["blocks.1.ln2.hook_scale"])
    assert torch.equal(cache.stack_activation("z", 1), cache["z", 0][None])


# Asked of a batch of two: which tokens, and the same spelt out for each sequence and position.
ANSWERS: dict[str, tuple[Any, Any, Callable[[Tensor], Tensor]]] = {
    "id": (3, 5, lambda given: given.expand(2, N_POS)),
    "word": ("w3", "w5", lambda given: given.expand(2, N_POS)),
    "scalar": (torch.tensor(3), torch.tensor(5), lambda given: given.expand(2, N_POS)),
    "one": (torch.tensor([3]), torch.tensor([5]), lambda given: given.expand(2, N_POS)),
    "for each sequence": (torch.tensor([3, 7]), torch.tensor([5, 2]), lambda given: given[:, None].expand(2, N_POS)),
    "for each position": (torch.arange(N_POS), torch.arange(N_POS) + 4, lambda given: given.expand(2, N_POS)),
    "for each": (random_tokens(seed=5), random_tokens(seed=6), lambda given: given),
}


def token_ids(given: Any) -> Tensor:
    return torch.as_tensor(int(given[1:]) if isinstance(given, str) else given)


@pytest.mark.parametrize("answer", ANSWERS)
def test_attributions_add_up_to_logits_and_their_differences(subject: Subject, answer: str) -> None:
    right, wrong, spread = ANSWERS[answer]
    stack: Any = subject.cache.get_full_resid_decomposition(expand_neurons=False)
    written = subject.logits - subject.constant()
    at = [spread(token_ids(given))[..., None] for given in (right, wrong)]
    logit, other = (written.gather(-1, index)[..., 0] for index in at)
    subject.close(subject.cache.logit_attrs(stack, right).sum(0), logit)
    subject.close(subject.cache.logit_attrs(stack, right, wrong).sum(0), logit - other)


def test_attributions_of_slices_and_without_a_batch(subject: Subject) -> None:
    cache, written = subject.cache, subject.logits - subject.constant()
    last: Any = cache.decompose_resid(pos_slice=-1)
    subject.close(cache.logit_attrs(last, torch.tensor([3, 7]), pos_slice=-1).sum(0), written[[0, 1], -1, [3, 7]])
    stack: Any = cache.decompose_resid()
    subject.close(cache.logit_attrs(stack, 3, batch_slice=1).sum(0), written[1, :, 3])
    one = subject.model.run_with_cache(subject.tokens[1:], remove_batch_dim=True)[1]
    alone: Any = one.decompose_resid()
    subject.close(one.logit_attrs(alone, "w3", has_batch_dim=False).sum(0), written[1, :, 3])
    with pytest.raises(ValueError, match="must have the same shape"):
        cache.logit_attrs(stack, 3, torch.tensor([5, 2]))


def test_a_cache_loses_its_batch_and_takes_slices_of_it(subject: Subject, caplog: pytest.LogCaptureFixture) -> None:
    cache = subject.model.run_with_cache(subject.tokens[1:])[1]
    assert cache.remove_batch_dim() is cache and not cache.has_batch_dim
    by_argument = subject.model.run_with_cache(subject.tokens[1:], remove_batch_dim=True)[1]
    sliced = subject.cache.apply_slice_to_batch_dim(1)
    assert not sliced.has_batch_dim and sliced.keys() == cache.keys() == by_argument.keys()
    for name in cache:
        assert torch.equal(cache[name], by_argument[name])
        subject.close(cache[name], sliced[name])
    parts: Any = cache.decompose_resid()
    subject.close(parts.sum(0), subject.resid(N_LAYERS)[1])
    heads: Any = cache.stack_head_results(incl_remainder=True)
    subject.close(heads.sum(0), subject.resid(N_LAYERS)[1])
    cache.remove_batch_dim()
    assert "after already having removed it" in caplog.text
    with pytest.raises(AssertionError, match="batch size 2"):
        subject.cache.remove_batch_dim()


def test_a_cache_is_a_mapping_that_knows_short_names(subject: Subject) -> None:
    cache = subject.cache
    assert list(cache) == list(cache.keys()) and len(cache) == len(list(cache.values())) == len(list(cache.items()))
    assert cache["pattern", -1] is cache["blocks.1.attn.hook_pattern"] is cache["pattern1"]
    assert cache["embed"] is cache["hook_embed"] and "blocks.0.hook_resid_pre" in repr(cache)
    moved = cache.to("cpu")
    assert moved is cache and cache["embed"].device.type == "cpu"


def test_autodiff_is_toggled_for_everyone() -> None:
    cache = causal_model().run_with_cache(random_tokens())[1]
    assert torch.is_grad_enabled()
    try:
        cache.toggle_autodiff(False)
        assert not torch.is_grad_enabled()
    finally:
        cache.toggle_autodiff(True)
    assert torch.is_grad_enabled()


def test_what_a_cache_offers_for_recurrent_layers_finds_none(subject: Subject) -> None:
    assert subject.cache.ssm_layers() == []
    with pytest.raises(RuntimeError, match="No SSM mixer layers found"):
        subject.cache.compute_ssm_state()
    with pytest.raises(TypeError, match="Block 0 has no SSM mixer"):
        subject.cache.compute_ssm_effective_attention(0)


# ---- names


def test_every_short_name_is_that_of_a_hook() -> None:
    names = set(causal_model().hook_dict) | set(bidirectional_model().hook_dict)
    per_layer = ["k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores", "pre", "post", "pre_linear"]
    per_layer += ["attn", "attn_logits", "key", "query", "value", "mlp_pre", "mlp_post"]  # the aliases
    per_layer += ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
    per_layer += ["attn_in", "q_input", "k_input", "v_input", "mlp_in"]
    for name in per_layer:
        assert {tl.get_act_name(name, layer) for layer in range(N_LAYERS)} <= names, name
    assert {tl.get_act_name(name) for name in ("embed", "pos_embed", "scale", "normalized")} <= names
    for norm in ("ln1", "ln2"):
        assert {tl.get_act_name(name, 1, norm) for name in ("scale", "normalized")} <= names
    assert {tl.get_act_name(name) for name in ("k1", "scale1ln1", "pre1", "ln_final.hook_scale")} <= names
    assert tl.get_act_name("mid", 0) not in names, "of MLPs with a norm of their own, which are not there"


# ---- patching, cell by cell


def at_pos(layer: int, pos: int) -> tuple[Any, ...]:
    return (slice(None), pos)


def at_head(layer: int, head: int) -> tuple[Any, ...]:
    return (slice(None), slice(None), head)


def at_pos_head(layer: int, pos: int, head: int) -> tuple[Any, ...]:
    return (slice(None), pos, head)


def at_pattern(layer: int, head: int, *places: int) -> tuple[Any, ...]:
    return (slice(None), head, *places)


CELLS: dict[str, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    **{f"get_act_patch_{name}": (name, at_pos) for name in ("resid_pre", "resid_mid", "attn_out", "mlp_out")},
    **{f"get_act_patch_attn_head_{name}_all_pos": (name, at_head) for name in "qkv"},
    **{f"get_act_patch_attn_head_{name}_by_pos": (name, at_pos_head) for name in "qkv"},
    "get_act_patch_attn_head_out_all_pos": ("z", at_head),
    "get_act_patch_attn_head_out_by_pos": ("z", at_pos_head),
    "get_act_patch_attn_head_pattern_all_pos": ("pattern", at_pattern),
    "get_act_patch_attn_head_pattern_by_pos": ("pattern", at_pattern),
    "get_act_patch_attn_head_pattern_dest_src_pos": ("pattern", at_pattern),
}
"""Which part of which activation each cell of a sweep takes from the clean run."""
EVERY = {
    "get_act_patch_block_every": ("resid_pre", "attn_out", "mlp_out"),
    "get_act_patch_attn_head_all_pos_every": [f"attn_head_{n}_all_pos" for n in ("out", "q", "k", "v", "pattern")],
    "get_act_patch_attn_head_by_pos_every": [f"attn_head_{n}_by_pos" for n in ("out", "q", "k", "v", "pattern")],
}
"""Sweeps that stack others."""


class Patched:
    """A clean and a corrupted run of a model, and what a metric says of the corrupted one when patched."""

    def __init__(self, model: HookedTransformer) -> None:
        self.model, self.clean = model, random_tokens(batch=1, pos=3)
        self.corrupted = self.clean.clone()
        self.corrupted[0, 1] = (self.clean[0, 1] + 5) % D_VOCAB
        with torch.no_grad():
            self.cache = model.run_with_cache(self.clean)[1]

    @staticmethod
    def metric(logits: Tensor) -> Tensor:
        return logits[0, 2] @ torch.linspace(-1, 1, D_VOCAB)

    def sweep(self, name: str) -> Tensor:
        with torch.no_grad():
            return getattr(patching, name)(self.model, self.corrupted, self.cache, self.metric)

    def by_hand(self, name: str, layer: int, *index: int) -> Tensor:
        short, part = CELLS[name]
        hook = tl.get_act_name(short, layer)

        def patch(activation: Tensor, hook: Any) -> Tensor:
            where = part(layer, *index)
            patched = activation.clone()
            patched[where] = self.cache[hook.name][where]
            return patched

        with torch.no_grad():
            return self.metric(self.model.run_with_hooks(self.corrupted, fwd_hooks=[(hook, patch)]))


GROUPED = {name for name in CELLS if re.search("_[kv]_", name)}
"""Sweeps of what grouped heads share."""
PATCHED: dict[str, Callable[[], HookedTransformer]] = {
    "causal": causal_model,
    "bidirectional": bidirectional_model,
    "grouped": lambda: bidirectional_model(n_key_value_heads=2),
}


def test_every_sweep_is_checked() -> None:
    direct = {"get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"}  # in test_transformer.py
    assert CELLS.keys() | EVERY.keys() | direct == {name for name in vars(patching) if name.startswith("get_act_patch")}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in PATCHED for name in CELLS if kind != "grouped" or name in GROUPED]
)
def test_a_sweeps_cells_are_the_patches_made_by_hand(kind: str, name: str) -> None:
    pair = Patched(PATCHED[kind]())
    swept = pair.sweep(name)
    cells = torch.stack(
        [pair.by_hand(name, *map(int, index)) for index in torch.cartesian_prod(*map(torch.arange, swept.shape))]
    )
    assert_close(swept.flatten(), cells, atol=1e-5, rtol=1e-5)
    assert swept.std() > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_a_sweep_of_every_kind_stacks_the_others(name: str) -> None:
    pair = Patched(causal_model())
    for of_kind, part in zip(pair.sweep(name), EVERY[name], strict=True):
        alone = pair.sweep(f"get_act_patch_{part}")
        alone = alone.transpose(1, 2) if part == "attn_head_pattern_by_pos" else alone  # [layer pos head], as the rest
        assert_close(of_kind, alone, atol=1e-5, rtol=1e-5)


def test_a_sweep_of_every_kind_fills_up_what_grouped_keys_lack_with_zeros() -> None:
    pair = Patched(bidirectional_model(n_key_value_heads=2))
    _, _, k, v, _ = pair.sweep("get_act_patch_attn_head_all_pos_every")
    for kind, swept in (("k", k), ("v", v)):
        assert_close(swept[:, :2], pair.sweep(f"get_act_patch_attn_head_{kind}_all_pos"))
        assert (swept[:, 2:] == 0).all()


def test_without_an_mlp_there_is_nothing_to_patch_in_it() -> None:
    pair = Patched(random_model())
    for name in ("resid_mid", "mlp_out", "block_every"):
        with pytest.raises(KeyError, match=r"hook_(resid_mid|mlp_out)"):
            pair.sweep(f"get_act_patch_{name}")


# ---- head_detector

TEXT = "w2 w3 w4 w2 w3 w4 w2 w5"


def wanted(name: str, tokens: Sequence[int]) -> Tensor:
    """Where a head of that name attends, [query_pos key_pos], written out from what the name means."""
    n = len(tokens)
    pattern = torch.zeros(n, n)
    for query in range(n):
        for key in range(query + 1):
            pattern[query, key] = {
                "previous_token_head": key == query - 1,
                "duplicate_token_head": key < query and tokens[key] == tokens[query],
                "induction_head": key > 0 and tokens[key - 1] == tokens[query] and key - 1 < query,
            }[name]
    return pattern


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_heads_are_detected_by_the_share_of_attention_that_goes_where_the_name_says(name: Any) -> None:
    model: Any = causal_model()
    tokens = model.to_tokens(TEXT)
    expected = wanted(name, tokens[0].tolist())
    assert expected.sum() > 3
    with torch.no_grad():
        found = detect_head(model, TEXT, name)
        others = detect_head(model, TEXT, name, exclude_bos=True, exclude_current_token=True)
        absolute = detect_head(model, TEXT, name, error_measure="abs")
        some = detect_head(model, [TEXT, "w2 w2 w3"], name, heads=[(1, 2)])
        patterns = torch.stack([model.run_with_cache(tokens)[1]["pattern", layer][0] for layer in range(N_LAYERS)])
    assert found.shape == (N_LAYERS, N_HEADS)
    assert_close(found, (patterns * expected).sum((-2, -1)) / len(tokens[0]), atol=1e-5, rtol=1e-5)
    kept = patterns.clone()
    kept[..., 0] = 0
    kept.diagonal(dim1=-2, dim2=-1).zero_()
    assert_close(others, (kept * expected).sum((-2, -1)) / kept.sum((-2, -1)), atol=1e-5, rtol=1e-5)
    assert_close(absolute, 1 - (patterns - expected).abs().sum((-2, -1)) / len(tokens[0]), atol=1e-3, rtol=0)
    assert (some >= 0).nonzero().tolist() == [[1, 2]] and (some == -1).sum() == N_LAYERS * N_HEADS - 1


def planted(query_to_key: Tensor) -> tuple[str, Callable[..., Tensor]]:
    """A hook by which head L0H1 attends as told."""

    def attend(pattern: Tensor, hook: Any) -> Tensor:
        edited = pattern.clone()
        edited[:, 1] = query_to_key / query_to_key.sum(-1, keepdim=True).clamp(min=1)
        return edited

    return "blocks.0.attn.hook_pattern", attend


def test_the_detector_looks_to_the_left_only() -> None:
    """In a bidirectional model, too: a head that reads duplicates and next tokens to the right scores nothing."""
    model: Any = bidirectional_model()
    tokens = model.to_tokens(TEXT)[0]
    left = wanted("duplicate_token_head", tokens.tolist())
    with torch.no_grad():
        with model.hooks(fwd_hooks=[planted(left)]):
            assert detect_head(model, TEXT, "duplicate_token_head")[0, 1] == pytest.approx(1)
        with model.hooks(fwd_hooks=[planted(left.T)]):
            assert detect_head(model, TEXT, "duplicate_token_head")[0, 1] == 0
        with model.hooks(fwd_hooks=[planted(left + left.T)]):
            assert 0.2 < detect_head(model, TEXT, "duplicate_token_head")[0, 1] < 0.8
        with pytest.raises(AssertionError, match="must be a lower triangular matrix"):
            detect_head(model, TEXT, left.T)
        with pytest.raises(AssertionError):
            detect_head(model, TEXT, "duplicate_token_head", error_measure="abs")


# ---- tools.analysis


def pair_metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 4]).sum()


def corrupted(tokens: Tensor) -> Tensor:
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 5) % D_VOCAB
    return changed


TESTED = {
    *("direct_logit_attribution", "logit_lens", "logit_readout", "attribution_patch", "faithfulness", "Node"),
    *("EdgeAttributionConfig", "SubspaceInterchange", "NormMatchedPlacebo", "collect_activations", "random_basis"),
    *("intervened_logits", "run_with_intervention", "fit_das", "attention_head_subspace_affinity", "JacobianLens"),
    *("reinitialized", "neuron_basis"),
}
ELSEWHERE = {
    "get_act_patch_direct_path": "transformer_lens.patching, see test_transformer.py",
    "get_act_patch_direct_path_all_sources": "transformer_lens.patching, see test_transformer.py",
    "random_init_bridge": "makes a bridge of its own",
    "FaithfulnessConfig": "of faithfulness, which is refused",
    **dict.fromkeys(
        (
            *("JSpaceDecomposition", "LearnedSubspace", "SparseProbeConvergenceError", "SubspaceBasis"),
            *("arbitrary_targets", "fit_sparse_probe", "get_sparse_decomposition", "mean_difference_basis"),
            *("orthonormal_subspace", "probe_basis", "projection_kernel", "random_neuron_basis"),
            *("random_projection_kernel_moments", "solve_coordinate_patch", "sweep_sparse_probe"),
        ),
        "takes tensors and knows no model",
    ),
}


def test_every_tool_is_tried_or_left_out_for_a_reason() -> None:
    assert TESTED | ELSEWHERE.keys() == set(analysis.__all__) and not TESTED & ELSEWHERE.keys()


@pytest.mark.parametrize("unit", ["component", "head"])
def test_direct_logit_attribution_adds_up(subject: Subject, unit: str) -> None:
    written = subject.logits - subject.constant()
    given = analysis.direct_logit_attribution(subject.model, subject.tokens, "w3", "w5", unit=unit)
    subject.close(given.attribution.sum(0), (written[..., 3] - written[..., 5])[:, -1])
    assert len(given.labels) == len(given.attribution)
    everywhere = analysis.direct_logit_attribution(
        subject.model, answer_tokens=3, unit=unit, pos=None, cache=subject.cache
    )
    subject.close(everywhere.attribution.sum(0), written[..., 3])


def test_direct_logit_attribution_by_layer_is_the_residual_so_far(subject: Subject) -> None:
    given = analysis.direct_logit_attribution(subject.model, subject.tokens, 3, unit="layer", pos=2)
    assert given.labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    subject.close(given.attribution[-1], (subject.logits - subject.constant())[:, 2, 3])
    assert given.top(1)[0][0] in given.labels


def test_the_logit_lens_reads_every_layer_as_the_model_reads_its_last(subject: Subject) -> None:
    model = subject.model
    lens = analysis.logit_lens(model, subject.tokens, positions=None, incl_mid=True)
    assert lens.labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    subject.close(lens.values[-1], subject.logits)
    for read, at in zip(lens.values, INPUTS, strict=True):
        subject.close(read, model.unembed(model.ln_final(subject.resid(*at))))
    log_probs = subject.cache.logit_lens(return_type="log_probs").values[-1]  # in float32, whatever the model's dtype
    assert_close(log_probs, subject.logits[:, -1].float().log_softmax(-1), atol=1e-4, rtol=1e-4)
    ranks = analysis.logit_lens(model, subject.tokens, targets="w3").rank_trajectory("w3")
    assert torch.equal(ranks[-1], (subject.logits[:, -1] > subject.logits[:, -1, 3:4]).sum(-1))


def test_the_logit_lens_reads_any_vector(subject: Subject) -> None:
    model, vectors = subject.model, torch.randn(3, D_MODEL, generator=seeded(0)).to(subject.logits.dtype)
    subject.close(analysis.logit_readout(model, vectors).values, model.unembed(model.ln_final(vectors[None]))[0])
    raw = analysis.logit_readout(model, vectors, apply_ln=False, top_k=2)
    subject.close(raw.values, (vectors @ model.W_U + model.b_U).topk(2).values)


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "grouped"])
def test_attribution_patching_is_the_slope_towards_the_clean_run(kind: str) -> None:
    """Against differences of the metric itself, a small step towards the clean activation."""
    model, tokens = PATCHED[kind]().to(torch.float64), random_tokens(batch=1, pos=3)
    told = analysis.attribution_patch(model, tokens, corrupted(tokens), pair_metric)
    assert len(told.node_scores) == 3 * (1 + N_LAYERS * (N_HEADS + 1)) and not told.edge_scores
    with torch.no_grad():
        clean = model.run_with_cache(tokens)[1]
        for node, score in told.node_scores.items():
            at = (0, node.position) if node.head is None else (0, node.position, node.head)

            def moved(step: float, node: analysis.Node = node, at: tuple[int, ...] = at) -> Tensor:
                def move(activation: Tensor, hook: Any) -> Tensor:
                    edited = activation.clone()
                    edited[at] += step * (clean[hook.name] - activation)[at]
                    return edited

                return pair_metric(model.run_with_hooks(corrupted(tokens), fwd_hooks=[(node.hook_name, move)]))

            slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
            assert score == pytest.approx(float(slope), abs=1e-6, rel=1e-6)
    assert told.top_nodes(1)[0][0].kind in ("embed", "attn_head_out", "mlp_out")


def test_attribution_patching_of_edges_is_refused() -> None:
    """It looks split inputs up by the names that bridges give them."""
    model, tokens = causal_model(), random_tokens(batch=1)
    edges = analysis.EdgeAttributionConfig(granularity="edge")
    message = r"edge graph requires hook points missing from the cache: blocks\.0\.attn\.hook_q_input"
    with pytest.raises(ValueError, match=message):
        analysis.attribution_patch(model, tokens, corrupted(tokens), pair_metric, edges)
    with pytest.raises(ValueError, match=message):
        analysis.faithfulness(model, tokens, corrupted(tokens), pair_metric, [])
    assert not model.cfg.use_attn_result and not model.cfg.use_split_qkv_input, "the switches are as they were"
    grouped = bidirectional_model(n_key_value_heads=2)
    with pytest.raises(ValueError, match="n_key_value_heads=2 for n_heads=4"):
        analysis.attribution_patch(grouped, tokens, corrupted(tokens), pair_metric, edges)
    with pytest.raises(ValueError, match=r"node graph requires .*: blocks\.0\.hook_mlp_out"):
        analysis.attribution_patch(random_model(), tokens, corrupted(tokens), pair_metric)


def test_interchange_interventions_set_a_subspace_to_the_sources() -> None:
    model, base = bidirectional_model(), random_tokens(batch=4)
    source, at = corrupted(base), torch.tensor([1, 1, 2, 3])
    hook = "blocks.0.hook_resid_post"

    def task(tokens: Tensor) -> Tensor:
        return model(tokens)[:, -1, :4]

    with torch.no_grad():
        given = analysis.collect_activations(model, hook, source, task, positions=at, batch_size=3)
        cached = model.run_with_cache(source)[1][hook][torch.arange(4), at]
        assert_close(given, cached)
        basis = analysis.random_basis(D_MODEL, 3, seed=0)
        interchange = analysis.SubspaceInterchange(basis)
        moved = analysis.intervened_logits(model, hook, interchange, base, given, task, positions=at)

        def by_hand(resid: Tensor, hook: Any) -> Tensor:
            edited, rows = resid.clone(), torch.arange(4)
            edited[rows, at] += (given - resid[rows, at]) @ basis @ basis.T
            return edited

        assert_close(moved, model.run_with_hooks(base, fwd_hooks=[(hook, by_hand)])[:, -1, :4])
        whole = analysis.SubspaceInterchange(torch.eye(D_MODEL))
        swapped = analysis.run_with_intervention(model, hook, whole, base, given, task, positions=at)
        placebo = analysis.NormMatchedPlacebo(interchange, analysis.random_basis(D_MODEL, 3, seed=1))
        assert_close(
            (placebo(cached, given + 1) - cached).norm(dim=-1), (interchange(cached, given + 1) - cached).norm(dim=-1)
        )
        neurons = analysis.neuron_basis(D_MLP, [2, 5])
        posts = analysis.collect_activations(model, "blocks.0.mlp.hook_post", source, task, positions=at)
        assert analysis.SubspaceInterchange(neurons)(torch.zeros(4, D_MLP), posts).nonzero()[
            :, 1
        ].unique().tolist() == [2, 5]
    assert swapped.shape == (4, 4)


def test_an_aligned_subspace_can_be_searched_for() -> None:
    """All dimensions together carry all that the position carries, so the search has something to find."""
    model, base = bidirectional_model(n_layers=1), random_tokens(batch=6)
    at = torch.full((6,), N_POS - 1)
    targets = model(base.roll(1, 0))[:, -1, :4].argmax(-1)
    found = analysis.fit_das(
        model,
        *("blocks.0.hook_resid_post", base, base.roll(1, 0), targets, lambda tokens: model(tokens)[:, -1, :4]),
        **{"rank": D_MODEL, "base_positions": at, "source_positions": at, "epochs": 1},
    )
    basis = found.subspace.basis
    assert_close(basis.T @ basis, torch.eye(D_MODEL), atol=1e-5, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("target", ["Q", "K", "V"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_affinity_of_heads_is_the_overlap_of_what_they_write_and_read(target: Any, kv_heads: int) -> None:
    model = bidirectional_model(n_key_value_heads=kv_heads)
    told = analysis.attention_head_subspace_affinity(model, target_role=target)
    read = model.get_parameter(f"blocks.1.attn.W_{target}")
    by_hand = {
        (source, head): float((basis_of(model.W_O[0, source].T).T @ basis_of(read[head])).pow(2).sum())
        for source in range(N_HEADS)
        for head in range(len(read))
    }
    pairs = {(pair.source.head, pair.target.head): pair.score for pair in told.top_pairs(1000)}
    assert pairs.keys() == by_hand.keys()
    assert all(pairs[key] == pytest.approx(value, rel=1e-4) for key, value in by_hand.items())


def basis_of(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix.detach())[0]


REFUSED: dict[str, tuple[Callable[[HookedTransformer], Any], type[Exception], str]] = {
    "JacobianLens.fit": (
        lambda model: analysis.JacobianLens.fit(model, ["w1 w2"], corpus="none"),
        *(TypeError, "JacobianLens supports TransformerBridge only"),
    ),
    "reinitialized": (
        lambda model: analysis.reinitialized(model, 0),
        *(ValueError, "reinitialized cannot reset embed.W_E"),
    ),
}


@pytest.mark.parametrize("tool", REFUSED)
def test_what_cannot_work_says_so(tool: str) -> None:
    run, error, message = REFUSED[tool]
    for model in (causal_model(), bidirectional_model()):
        with pytest.raises(error, match=message):
            run(model)


def test_tools_that_want_evaluation_mode_find_it_after_processing_too() -> None:
    model = random_model(tie_word_embeddings=True, **BIDIRECTIONAL)
    model.process_weights_()
    assert not any(module.training for module in model.modules())
    analysis.logit_lens(model, random_tokens())
    with pytest.raises(ValueError, match="evaluation mode"):
        analysis.logit_lens(model.train(), random_tokens())


# ---- singular vectors


@pytest.mark.parametrize("tied", [False, True])
def test_singular_vectors_are_those_of_the_heads_own_matrices(tied: bool) -> None:
    """Of grouped heads, too: head 3 reads the values of group 1."""
    model: Any = bidirectional_model(n_key_value_heads=2, tie_word_embeddings=tied)
    interpreter = SVDInterpreter(model)
    matrices = {
        ("OV", 3): model.W_V[1, 3] @ model.W_O[1, 3],
        ("w_in", None): (model.get_parameter("blocks.1.ln2.w")[:, None] * model.W_in[1]).T,
        ("w_out", None): model.W_out[1],
    }
    for (kind, head), matrix in matrices.items():
        found = interpreter.get_singular_vectors(kind, 1, num_vectors=3, head_index=head)[:, 0]  # pyright: ignore[reportArgumentType]
        by_hand = model.W_U.T @ torch.linalg.svd(matrix.detach()).Vh[:3].T
        assert found.shape == (D_VOCAB, 3)
        assert_close(found.abs(), by_hand.detach().abs(), atol=1e-4, rtol=1e-4)  # signs are free


# ---- what assumes that the next token is predicted


def test_losses_of_text_are_refused_of_a_model_that_fills_in_masks() -> None:
    batches = [{"tokens": random_tokens()}]
    causal, mdm = causal_model(), bidirectional_model()
    loss = causal(random_tokens(), return_type="loss").item()
    assert evals.evaluate_on_dataset(causal, batches, device="cpu") == pytest.approx(loss)
    with pytest.raises(UserError, match="give the true tokens as targets"):
        evals.evaluate_on_dataset(mdm, batches, device="cpu")


def test_training_by_the_loss_of_text_is_for_causal_models() -> None:
    tokens = random_tokens(batch=8)
    texts: Any = [{"tokens": row} for row in tokens]
    config = training.TrainConfig(num_epochs=5, batch_size=8, lr=1e-2, device="cpu", warmup_steps=0, print_every=None)
    model = causal_model()
    before = model(tokens, return_type="loss").item()
    assert training.train(model, config, texts) is model
    assert model.eval()(tokens, return_type="loss").item() < before - 0.1
    with pytest.raises(UserError, match="give the true tokens as targets"):
        training.train(bidirectional_model(), config, texts)


def test_a_prompt_is_tested_by_the_next_token(capsys: pytest.CaptureFixture[str]) -> None:
    """Upstream's `test_prompt` reads one position before the answer, whatever the model predicts from where."""
    model = causal_model()
    with torch.no_grad():
        tl.test_prompt("w2 w3", "w4", model, prepend_space_to_answer=False, top_k=1)
        logits = model(model.to_tokens("w2 w3"))[0, -1]
    rank = int((logits > logits[4]).sum())
    assert re.search(rf"Rank: {rank} .*Prob: +{100 * logits.softmax(-1)[4]:.2f}%", capsys.readouterr().out)


def test_signatures_have_not_changed() -> None:
    """What this file says of upstream's defaults, which decide what is read where."""
    defaults = {
        analysis.direct_logit_attribution: ("pos", -1),
        analysis.logit_lens: ("positions", -1),
        detect_head: ("error_measure", "mul"),
    }
    for function, (name, default) in defaults.items():
        assert inspect.signature(function).parameters[name].default == default
