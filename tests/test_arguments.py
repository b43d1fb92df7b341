"""Arguments that Python's own calls would take, and mean nothing: each is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from call_helpers import CALLS, OWN_MODELS, PAGES, SHAPE, WORLD, Asked, made
from helpers import random_model
from model_helpers import native_peer

from mdm_interp.data.celebrities import Benchmark, facts
from mdm_interp.errors import UserError
from mdm_interp.inference.denoising import denoise
from mdm_interp.inference.likelihood import bound
from mdm_interp.inference.prediction import infill, infill_any_length, predict
from mdm_interp.measures.evidence import evidence_matrix, relation_evidence
from mdm_interp.measures.rope import plane_scores
from mdm_interp.measures.routes import score_matrix

pytestmark = pytest.mark.usefixtures("unchecked")

DRAWN = {"run_with_cache", "every_switched_hook", "loss", "part_of_the_layers", "fused_attention", "processed_weights"}
DRAWN |= {"generate", "denoised", "denoised_at_random", "scores_of_tokens", "training_steps", *OWN_MODELS, *PAGES}
"""Calls on tokens of their own."""


@pytest.mark.parametrize("name", [name for name in CALLS if name not in DRAWN])
def test_nothing_to_ask_is_refused(name: str) -> None:
    call, models = CALLS[name]
    with pytest.raises(UserError, match=r"^[\w, ]+: .*\b(none|no|0)\b"):
        call(made(models[0], torch.float32), Asked([], []))


def model() -> Any:
    return made("rope", torch.float32)


QUERIES = [pair.reverse for pair in WORLD.query_pairs(n_contexts=1)[:2]]
MASKED = torch.tensor([QUERIES[0].tokens])


@pytest.mark.parametrize(
    ("call", "known"),
    {
        "predict": (lambda word: predict(model(), QUERIES, word), "order"),
        "infill": (lambda word: infill(model(), QUERIES, word), "order"),
        "infill_any_length": (lambda word: infill_any_length(model(), QUERIES, word, longest=2), "order"),
        "denoise": (lambda word: denoise(model(), MASKED, steps=1, order=word), "order"),
        "model.denoise": (lambda word: model().denoise(MASKED, order=word), "order"),
        "query_pairs": (lambda word: WORLD.query_pairs(word), "objective"),
        "attention": (lambda word: WORLD.query_pairs(attention=word), "attention"),
        "relation_evidence": (lambda word: relation_evidence(model(), WORLD, 9, word), "source"),
        "facts": (lambda word: facts(Benchmark((), {}, ""), word), "trained"),
    }.values(),
    ids=lambda value: None,
)
def test_a_word_that_is_none_of_those_known_is_refused(call: Callable[[str], Any], known: str) -> None:
    with pytest.raises(UserError, match=rf"^{known}: 'confidense' is none of \w+, .*; choose one$"):
        call("confidense")


@pytest.mark.parametrize("layer", [-3, 2])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    deep, tokens = made("deep", torch.float32), torch.tensor([0, 1])
    for call in (partial(evidence_matrix, deep, tokens, tokens), partial(score_matrix, deep, tokens, tokens, 1)):
        with pytest.raises(UserError, match=rf"^layer: the model has no layer {layer}; give -2 to 1$"):
            call(layer=layer)
        assert call(layer=-1).equal(call(layer=1))


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(UserError, match=r"^temperature: -1 is negative; use 0 or more$"):
        denoise(model(), MASKED, steps=1, temperature=-1)


def test_a_bridge_that_does_not_show_rotated_queries_is_refused() -> None:
    bridge = native_peer(random_model(**SHAPE, n_layers=2))
    with pytest.raises(UserError, match=r"^model: its hook 'rot_q' does not fire in every layer; use load_checkpoint$"):
        plane_scores(bridge, QUERIES)


def test_sentences_are_not_masked_without_a_mask_token() -> None:
    unmasked = made("rope", torch.float32, mask_token_id=None)
    with pytest.raises(UserError, match=r"^mask_token_id: None, and a bidirectional model is asked with masks"):
        bound(unmasked, [(1, 2, 3)], n_draws=1)
