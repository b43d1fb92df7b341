"""Measures on a TransformerBridge equal those on the HookedTransformer of the same weights, or name what is missing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model
from model_helpers import SHAPE, boot_from, llama_bridge, mirrored_pairs, native_peer
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from mdm_interp import interventions
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import predict, split_by_role
from mdm_interp.measures import evidence, gradients, parity, rope, routes
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.capture import LayerView, capture
from mdm_interp.measures.representations import compute_representations
from mdm_interp.models.bridge import hooked
from mdm_interp.models.transformer import HookedTransformer

TARGETS = torch.tensor([3, 9, 4])


MEASURES: dict[str, Callable[[Any, list[QueryPair]], Any]] = {
    "predict": lambda model, pairs: predict(model, [pair.forward for pair in pairs]),
    "compute_routes": lambda model, pairs: routes.compute_routes(model, [pair.forward for pair in pairs]),
    "compute_content": lambda model, pairs: rope.compute_content(model, [pair.forward for pair in pairs]),
    "distance_correlation": lambda model, pairs: rope.distance_correlation(model, pairs, torch.arange(1.0, 4.0)),
    "plane_spectrum": parity.plane_spectrum,
    "evidence_matrix": lambda model, pairs: evidence.evidence_matrix(model, torch.arange(5), TARGETS),
    "compute_evidence": lambda model, pairs: evidence.compute_evidence(model, [p.forward for p in pairs], TARGETS),
    "decompose_logits": lambda model, pairs: evidence.decompose_logits(
        model, collate([pair.forward for pair in pairs], hooked(model).cfg), TARGETS
    ),
    "answer_evidence": lambda model, pairs: answer_evidence(model, [pair.forward for pair in pairs])[0],
    "storage_coupling": evidence.storage_coupling,
    "compute_representations": lambda model, pairs: compute_representations(model, [pair.forward for pair in pairs]),
    "split_by_role": lambda model, pairs: split_by_role(
        model, [pair.forward for pair in pairs], torch.tensor([[*pair.forward.answer, 0] for pair in pairs])
    ),
    "gradient_alignment": gradients.gradient_alignment,
    "mean_gradient": lambda model, pairs: gradients.mean_gradient(model, [pair.forward for pair in pairs]),
    "first_order": lambda model, pairs: gradients.first_order(model, pairs, [1e-2]),
}
SHARED_MEASURES: dict[str, Callable[[Any, list[QueryPair]], Any]] = {
    "score_parity": parity.score_parity,
    "rope_parity": parity.rope_parity,
    "route_coupling": parity.route_coupling,
    "route_correlation": routes.route_correlation,
    "pair_position_index": lambda model, pairs: evidence.pair_position_index(model, pairs, TARGETS),
    "transplant_routes": interventions.transplant_routes,
    "project_even_routes": interventions.project_even_routes,
    "ablate_storage": interventions.ablate_storage,
    "ablate_routes": interventions.ablate_routes,
    "patch_heads": interventions.patch_heads,
    "patch_positions": interventions.patch_positions,
}
GRADIENTS = {"gradient_alignment", "mean_gradient", "first_order"}
NEEDS_SCORES = {"compute_routes", "score_parity", "route_correlation", "project_even_routes", "ablate_routes"}
"""What a bridge without scores before the softmax cannot be asked."""


@pytest.fixture(scope="module")
def native() -> tuple[HookedTransformer, TransformerBridge]:
    model = random_model(**SHAPE, rotary_adjacent_pairs=True, qkv_bias=True)
    return model, native_peer(model)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[HookedTransformer, TransformerBridge]:
    model = random_model(**SHAPE, attention="causal", gated_mlp=True, act_fn="silu")
    return model, llama_bridge(model, tmp_path_factory.mktemp("llama"))


def assert_same(ours: Any, theirs: Any) -> None:
    """Two results agree in every number."""
    if isinstance(ours, Tensor):
        assert_close(theirs, ours, atol=5e-5, rtol=1e-3, equal_nan=True, check_dtype=False)
    elif is_dataclass(ours):
        for field in fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, dict):  # gradients, in each implementation's own shapes
        assert sorted(ours) == sorted(theirs)
        for name in ours:
            assert theirs[name].norm().item() == pytest.approx(ours[name].norm().item(), rel=1e-3), name
    elif isinstance(ours, float):
        assert theirs == pytest.approx(ours, rel=1e-3)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", list(MEASURES))
def test_on_a_causal_hugging_face_model(llama: tuple[HookedTransformer, TransformerBridge], name: str) -> None:
    pairs = mirrored_pairs(causal=True)
    assert_same(MEASURES[name](llama[0], pairs), MEASURES[name](llama[1], pairs))


@pytest.mark.parametrize("name", [name for name in [*MEASURES, *SHARED_MEASURES] if name not in GRADIENTS])
def test_on_a_bidirectional_native_bridge(native: tuple[HookedTransformer, TransformerBridge], name: str) -> None:
    measure, pairs = {**MEASURES, **SHARED_MEASURES}[name], mirrored_pairs(causal=False)
    if name in NEEDS_SCORES:
        with pytest.raises(
            UserError, match=r"it has no hook 'blocks\.0\.attn\.hook_attn_scores', which this (measure|interv)"
        ):
            measure(native[1], pairs)
    else:
        assert_same(measure(native[0], pairs), measure(native[1], pairs))


def test_gradients_on_a_native_bridge(native: tuple[HookedTransformer, TransformerBridge]) -> None:
    """It has output biases that ours has not, so only components without are compared."""
    pairs, both_have = mirrored_pairs(causal=False), ("embedding", "Q", "K", "V", "norms", "unembedding")
    ours, theirs = (gradients.gradient_alignment(model, pairs).gram for model in native)
    for component in both_have:
        assert_same(ours.within([component]), theirs.within([component]))
    ours, theirs = (gradients.first_order(model, pairs, [1e-2], components=both_have) for model in native)
    assert_same(ours, replace(theirs, steepness=ours.steepness))  # which is of all components


def test_scores_that_are_none_do_not_count(native: tuple[HookedTransformer, TransformerBridge]) -> None:
    """The native bridge fires `hook_attn_scores` after the fact and on the pattern."""
    hooks = hooked(native[1]).hook_dict
    assert "blocks.0.attn.hook_pattern" in hooks
    assert "blocks.0.attn.hook_attn_scores" in native[1].hook_dict
    assert "blocks.0.attn.hook_attn_scores" not in hooks


def test_rotation_is_found_by_looking(native: tuple[HookedTransformer, TransformerBridge]) -> None:
    """The native bridge turns adjacent dimensions, whatever its config says."""
    bridge = hooked(native[1])
    assert not bridge.cfg.rotary_adjacent_pairs
    assert bridge.pos_embed.cfg.rotary_adjacent_pairs


def test_unknown_rotation_is_refused(native: tuple[HookedTransformer, TransformerBridge]) -> None:
    bridge = hooked(native[1])
    bridge.cfg = bridge.cfg.model_copy(update={"rotary_base": 3.0})
    with pytest.raises(UserError, match=r"not that of position scheme 'rope' with base 3; scaled"):
        _ = bridge.pos_embed


def test_what_is_not_a_model_is_refused() -> None:
    with pytest.raises(UserError, match="model: Linear has no hooks; load it with load_checkpoint"):
        predict(torch.nn.Linear(2, 2), [])  # pyright: ignore[reportArgumentType]


def test_fused_projections_have_no_gradients_of_their_own(tmp_path: Path) -> None:
    """GPT-2 keeps Q, K and V in one parameter. What needs hooks works on it, and gradients say what is in the way."""
    torch.manual_seed(0)
    peer = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=13, n_positions=12))
    for parameter in peer.parameters():  # biases too, which start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    bridge: Any = boot_from(tmp_path, peer)
    pairs = mirrored_pairs(causal=True)
    queries = [pair.forward for pair in pairs]
    found = routes.compute_routes(bridge, queries)
    assert found.pattern.shape == (4, 2, 4)
    batch = collate(queries, hooked(bridge).cfg)
    with torch.no_grad():
        logits = batch.at_readout(bridge(batch.tokens))[..., TARGETS]
    assert_close(evidence.decompose_logits(bridge, batch, TARGETS).total(), logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=r"parameter 'transformer\.h\.0\.attn\.qkv\.weight' of this bridge is no comp"):
        gradients.gradient_alignment(bridge, pairs)


# ---- capture, which all of them build on


@pytest.mark.parametrize("position", ["rope", "alibi", "t5_bias", "none", "learned", "sinusoidal"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_captured_rows_are_those_of_the_whole_pattern(position: str, attention: str) -> None:
    model = random_model(position=position, attention=attention, n_key_value_heads=2, n_layers=2, qkv_bias=True)
    pairs = mirrored_pairs(causal=attention == "causal")
    short = Query((4, 0, 7), (5,), (1, 2), (0, 1))
    batch = collate([short, *(pair.forward for pair in pairs)], model.cfg)
    assert batch.attention_mask is not None
    logits, rows = capture(model, batch, lambda view: (view.scores.clone(), view.pattern.clone()))
    expected, cache = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask)
    assert_close(logits, batch.at_readout(expected))
    assert_close(capture(model, batch, lambda view: None, all_logits=True)[0], expected)
    for layer, (scores, pattern) in enumerate(rows):
        assert_close(scores, batch.at_readout(cache["attn_scores", layer].transpose(1, 2)), atol=1e-5, rtol=1e-5)
        assert_close(pattern, batch.at_readout(cache["pattern", layer].transpose(1, 2)), atol=1e-6, rtol=1e-5)


def test_nothing_of_a_layer_outlives_its_reduction() -> None:
    model, patterns = random_model(n_layers=3), []
    batch = collate([pair.forward for pair in mirrored_pairs(causal=False)], model.cfg)

    def reduce(view: LayerView) -> None:
        assert [pattern for pattern in patterns if pattern() is not None] == []
        patterns.append(weakref.ref(view.pattern))

    capture(model, batch, reduce)
    assert len(patterns) == 3


def test_capture_sees_an_edited_pattern() -> None:
    model = random_model(n_layers=1)
    batch = collate([pair.forward for pair in mirrored_pairs(causal=False)], model.cfg)
    edit = ("blocks.0.attn.hook_pattern", lambda x, hook: torch.full_like(x, 0.25))
    with model.hooks(fwd_hooks=[edit]):
        _, (pattern,) = capture(model, batch, lambda view: view.pattern.clone())
    assert pattern.unique().tolist() == [0.25]


def test_capture_never_holds_a_square_of_attention() -> None:
    """The largest tensor that is made grows with the length, not with its square."""
    largest: list[int] = []
    for n_pos in (256, 512):
        model = random_model(n_ctx=n_pos, n_layers=1)
        tokens = torch.randint(1, 12, (n_pos,), generator=torch.Generator().manual_seed(0)).tolist()
        batch = collate([Query(tuple(tokens), (3,), (1, 2), (5, 6))], model.cfg)
        with LargestTensor() as seen:
            capture(model, batch, lambda view: view.pattern.sum())
        largest.append(seen.numel)
    assert largest[1] <= 2 * largest[0]


class LargestTensor(TorchDispatchMode):
    """How many entries the largest tensor has that any operation inside gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made
