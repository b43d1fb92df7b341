"""What residual streams would answer, against the model cut off there; attributions, against the model's own logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXPERTS, YARN, random_model
from model_helpers import SHAPE, llama_bridge, mirrored_pairs
from torch.testing import assert_close

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.measures.lens import Lens, lens, other_answers
from mdm_interp.models.bridge import hooked
from mdm_interp.stats.estimates import Contrast

MASK = 12
QUERIES = [
    Query((4, 7, MASK), (3,), (2, 3), (0, 1)),
    Query((5, 9, 1, MASK, MASK, 2), (8, 6), (3, 5), (0, 2)),
    Query((1, 10, 2, MASK), (0,), (3, 4), (1, 3)),
    Query((1, 7, 7, 1, MASK), (7,), (4, 5), (0, 1)),
]
OTHERS = [(5,), (2, 2), None, (11,)]
MODELS: dict[str, dict[str, Any]] = {
    "attention only": {},
    "gated, shifted": {"d_mlp": 20, "gated_mlp": True, "act_fn": "silu", "readout_shift": -1, "n_key_value_heads": 2},
    "layer norm": {"normalization_type": "LN", "position": "learned", "qkv_bias": True, "d_mlp": 20},
    "no norm, tied": {"normalization_type": None, "tie_word_embeddings": True, "position": "none"},
    "causal": {"attention": "causal", "position": "alibi"},
    "normed": {"use_qk_norm": True, "rotary_scaling": YARN},
    "experts": {"experts": EXPERTS, "d_mlp": 24, "gated_mlp": True},
    "fewer predictions": {"d_vocab_out": 12},
}


def double(name: str) -> Any:
    return random_model(dtype="float64", mask_token_id=MASK, **MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_is_read_as_if_the_model_ended_there(name: str) -> None:
    model = double(name)
    seen = lens(model, QUERIES, OTHERS)
    for row, query in enumerate(QUERIES):
        at = list(query.readout(model.cfg))
        for layer in range(2):
            resid = model(torch.tensor([query.tokens]), stop_at_layer=layer + 1)
            logits = model.unembed(model.ln_final(resid))[0, at]
            probs = logits.softmax(-1)
            own = torch.stack([probs[i, token] for i, token in enumerate(query.answer)]).mean()
            assert_close(seen.probability.effect[row, layer], own, atol=1e-12, rtol=1e-9)
            if (other := OTHERS[row]) is None:
                assert seen.probability.null[row, layer].isnan()
            else:
                expected = torch.stack([probs[i, token] for i, token in enumerate(other)]).mean()
                assert_close(seen.probability.null[row, layer], expected, atol=1e-12, rtol=1e-9)
            if not model.cfg.is_causal and logits.shape[-1] > MASK:
                logits[:, MASK] = -torch.inf
            right = [logits[i].argmax().item() == token for i, token in enumerate(query.answer)]
            assert seen.correct[row, layer] == sum(right) / len(right)


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_difference_of_the_logits(name: str) -> None:
    """The rest is the embedding's own part, computed here by itself."""
    model = double(name)
    seen = lens(model, QUERIES, OTHERS)
    for row, (query, other) in enumerate(zip(QUERIES, OTHERS, strict=True)):
        parts = seen.heads[row].sum() + seen.mlps[row].sum() + seen.rest[row]
        if other is None:
            assert parts.isnan()
            continue
        at = list(query.readout(model.cfg))
        logits, cache = model.run_with_cache(torch.tensor([query.tokens]))
        rows = logits[0, at]
        difference = sum(rows[i, a] - rows[i, b] for i, (a, b) in enumerate(zip(query.answer, other, strict=True)))
        bias = 0.0
        if model.cfg.normalization_type == "LN":  # a bias is no part of what the residual stream holds
            unread = model.ln_final.b @ model.W_U
            bias = sum(unread[a] - unread[b] for a, b in zip(query.answer, other, strict=True))
        assert_close(parts, (difference - bias) / len(at), atol=1e-9, rtol=1e-9)
        entered = cache["blocks.0.hook_resid_pre"][0, at]
        scale = cache["ln_final.hook_scale"][0, at] if model.cfg.normalization_type else 1.0
        directions = model.residual_directions(torch.tensor([query.answer, other]))
        toward = directions[0] - directions[1]
        toward = toward - toward.mean(-1, keepdim=True) if model.cfg.normalization_type == "LN" else toward
        assert_close(seen.rest[row], (entered / scale * toward).sum(-1).mean(), atol=1e-9, rtol=1e-9)


def test_batches_make_no_difference() -> None:
    model = random_model(mask_token_id=MASK, d_mlp=20)
    many = lens(model, QUERIES * 140, OTHERS * 140)
    few = lens(model, QUERIES, OTHERS)
    assert_close(many.heads[-4:], few.heads, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert_close(many.probability.effect[-4:], few.probability.effect, atol=1e-6, rtol=1e-5)


def test_a_bridge_is_read_as_our_model(tmp_path: Path) -> None:
    model = random_model(attention="causal", **SHAPE, gated_mlp=True, act_fn="silu")
    pairs = mirrored_pairs(causal=True)
    queries = [pair.forward for pair in pairs]
    others = [(query.answer[0] % 11 + 1,) for query in queries]
    ours, theirs = lens(model, queries, others), lens(hooked(llama_bridge(model, tmp_path)), queries, others)
    assert_close(theirs.probability.effect, ours.probability.effect, atol=1e-5, rtol=1e-3)
    assert_close(theirs.heads, ours.heads, atol=1e-4, rtol=1e-3)
    assert_close(theirs.mlps, ours.mlps, atol=1e-4, rtol=1e-3)


def test_an_answer_appears_where_it_stays() -> None:
    correct = torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 1], [0.5, 1, 1, 1], [1, 1, 1, 0.5], [0, 0, 0, 1]])
    nothing = torch.zeros(5, 4)
    seen = Lens(Contrast(nothing, nothing), correct, nothing[..., None], nothing, nothing[:, 0])
    assert seen.appears.nan_to_num(-1).tolist() == [0, 3, 1, -1, 3]


def test_other_answers_are_of_unrelated_facts_and_as_long() -> None:
    def pair(fact: int, answer: tuple[int, ...], source: tuple[int, ...]) -> QueryPair:
        query = Query((1, 2, MASK, *[MASK] * (len(answer) - 1)), answer, (2, 2 + len(answer)), (0, 1))
        query = replace(query, tokens=(*source, *query.tokens[1:]))
        return QueryPair(query, query, fact, "left")

    pairs = [pair(0, (3,), (7,)), pair(1, (4, 5), (8,)), pair(2, (6,), (9,)), pair(3, (10,), (7,))]
    queries = [pair.forward for pair in pairs]
    assert other_answers(pairs, queries) == [(6,), None, (3,), (6,)] or other_answers(pairs, queries)[2] == (10,)
    with pytest.raises(UserError, match="others: 1 for 4 queries; give one for each"):
        lens(random_model(mask_token_id=MASK), queries, [None])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_that_of_its_weights(dtype: str) -> None:
    half = random_model(mask_token_id=MASK, d_mlp=20, dtype=dtype)
    exact = random_model(mask_token_id=MASK, d_mlp=20, dtype=dtype).to(torch.float64)
    found, expected = lens(half, QUERIES, OTHERS), lens(exact, QUERIES, OTHERS)
    assert_close(found.probability.effect, expected.probability.effect, atol=0.02, rtol=0.05)
    assert_close(found.heads, expected.heads, atol=0.05, rtol=0.05, equal_nan=True)
