"""Measures on a bfloat16 model: against a float64 model of the same weights, and against the same activations added up
in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_model, seeded, tiny_config
from torch import Tensor
from torch.testing import assert_close

from mdm_interp import interventions
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.inference.prediction import predict
from mdm_interp.measures import evidence, parity, rope, routes
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.gradients.alignment import gradient_alignment
from mdm_interp.measures.gradients.first_order import mean_gradient
from mdm_interp.measures.gradients.gram import gram
from mdm_interp.measures.trajectory import denoise_answers
from mdm_interp.models.positions import T5Bias
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Contrast

ROUNDING = 2**-8
"""How far the nearest number of 8 significant bits may be, as a share."""
ACTIVATION = 4 * ROUNDING
"""Of an activation two layers deep: about 16 roundings on the way, of random sign."""
LOGIT = 1.5 * ROUNDING
"""Of a logit: its own rounding, and half as much from what it is read off, which averages over the residual stream."""
SUMMED = 2e-5
"""Of a sum in float32, which has 24 significant bits."""
TARGETS, MASK = torch.arange(1, 20), 39

MODELS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope", "n_key_value_heads": 2},
    "t5": {"position": "t5_bias", "normalization_type": "LN", "d_mlp": 32, "qkv_bias": True},
    "learned": {"position": "learned", "normalization_type": None},
}


def half_model(name: str) -> HookedTransformer:
    """Of an ordinary size at its start, but as certain of its answers as a trained one."""
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 2, "d_vocab": 40, "initializer_range": 0.1, "mask_token_id": MASK}
    model = random_model(**{**shape, **MODELS[name]})
    with torch.no_grad():
        model.W_U.mul_(8 if MODELS[name].get("normalization_type", "RMS") else 60)
    return model.to(torch.bfloat16)


def double_of(half: HookedTransformer) -> HookedTransformer:
    """The same weights, every one of them exactly."""
    full = HookedTransformer(half.cfg.model_copy(update={"dtype": torch.float64}))
    full.load_state_dict(half.state_dict())
    return full


def certain_pairs(model: HookedTransformer, count: int = 16) -> list[QueryPair]:
    """Pairs whose answer the model gives to the forward query, with a probability between 0.9 and 0.999."""
    generator, pairs = seeded(3), []
    while len(pairs) < count:
        tokens = torch.randint(1, MASK, (8,), generator=generator).tolist()
        left, right = list(tokens), list(tokens)
        left[2], right[2], right[5] = MASK, tokens[5], MASK
        with torch.no_grad():
            probs = model(torch.tensor([left]))[0, 2].softmax(-1)
        if 0.9 < probs.max() < 0.999 and int(probs.argmax()) not in (MASK, *tokens):
            answer = (int(probs.argmax()),)
            forward = Query(tuple(left), answer, (2, 3), (5, 6))
            pairs.append(QueryPair(forward, Query(tuple(right), answer, (5, 6), (2, 3)), len(pairs), "left"))
    return pairs


Measure = Callable[[Any, list[QueryPair]], Tensor]


def forwards(pairs: list[QueryPair]) -> list[Query]:
    return [pair.forward for pair in pairs]


def candidates(pairs: list[QueryPair]) -> Tensor:
    """Of every pair the answer and four other tokens."""
    return (torch.tensor([pair.forward.answer for pair in pairs]) + torch.arange(5)) % MASK


def parts(result: Any, *names: str) -> Tensor:
    return torch.stack([getattr(result, name).double() for name in names])


def both(contrast: Contrast[Tensor]) -> Tensor:
    """An effect and its null."""
    return torch.stack([contrast.effect, contrast.null])


def logit_parts(model: Any, pairs: list[QueryPair]) -> Tensor:
    found = evidence.decompose_logits(model, collate(forwards(pairs), model.cfg), TARGETS)
    return torch.cat([part.double().flatten() for part in vars(found).values()])


def answers(model: Any, pairs: list[QueryPair]) -> Tensor:
    by_head, _ = answer_evidence(model, forwards(pairs))
    return torch.cat([by_head.own[None], both(by_head.specific)]).double()


def effect(intervention: Callable[..., interventions.Effect]) -> Measure:
    def measure(model: Any, pairs: list[QueryPair]) -> Tensor:
        found = intervention(model, pairs)
        return torch.cat([parts(found, "forward", "before"), both(found.after).double()])

    return measure


SUMS: dict[str, Measure] = {
    "compute_evidence": lambda model, pairs: evidence.compute_evidence(model, forwards(pairs), TARGETS),
    "answer_evidence": answers,
    "decompose_logits": logit_parts,
    "score_parity": lambda model, pairs: parts(parity.score_parity(model, pairs), "even", "odd"),
    "scores of compute_routes": lambda model, pairs: routes.compute_routes(model, forwards(pairs)).scores,
    "pattern of compute_routes": lambda model, pairs: routes.compute_routes(model, forwards(pairs)).pattern,
    "compute_content": lambda model, pairs: parts(rope.compute_content(model, forwards(pairs)), "q", "k"),
    "route of denoise_answers": lambda model, pairs: denoise_answers(model, forwards(pairs), 1).route,
    "evidence of denoise_answers": lambda model, pairs: denoise_answers(model, forwards(pairs), 1).evidence,
}
RATIOS: dict[str, Measure] = {
    "pair_position_index": lambda model, pairs: evidence.pair_position_index(model, pairs, TARGETS),
    "evidence_scores": lambda model, pairs: both(evidence.evidence_scores(model, forwards(pairs), candidates(pairs))),
    "selectivity": lambda model, pairs: parity.score_parity(model, pairs).selectivity(),
    "score_correlation": lambda model, pairs: both(routes.score_correlation(model, pairs)),
    "route_correlation": routes.route_correlation,
}
"""Of the size of 1, over many queries each."""
ROPE: dict[str, Measure] = {
    "rope_parity": lambda model, pairs: parts(parity.rope_parity(model, pairs), "even", "odd"),
    "plane_parity": lambda model, pairs: parts(parity.plane_parity(model, pairs), "even", "odd"),
    "plane_spectrum": parity.plane_spectrum,
    "distance_correlation": lambda model, pairs: parts(
        rope.distance_correlation(model, pairs, torch.arange(1.0, 5.0)), "measured", "spectrum"
    ),
}
WEIGHTS: dict[str, Measure] = {
    "evidence_matrix": lambda model, pairs: evidence.evidence_matrix(model, TARGETS, TARGETS, torch.arange(3)),
    "position_index": lambda model, pairs: torch.tensor(
        evidence.position_index(evidence.evidence_matrix(model, TARGETS, TARGETS, torch.arange(8)))
    ),
    "score_matrix": lambda model, pairs: routes.score_matrix(model, TARGETS, TARGETS, 2, layer=1),
    "route_coupling": parity.route_coupling,
}
"""These run a norm of the model's themselves."""
COUPLING: dict[str, Measure] = {"storage_coupling": evidence.storage_coupling}
LOG_PROBABILITIES: dict[str, Measure] = {
    "predict": lambda model, pairs: predict(model, forwards(pairs)).log_probability,
    "transplant_routes": effect(interventions.transplant_routes),
    "project_even_routes": effect(interventions.project_even_routes),
    "ablate_storage": effect(interventions.ablate_storage),
    "ablate_routes": effect(interventions.ablate_routes),
    "patch_heads": lambda model, pairs: interventions.patch_heads(model, pairs[:6]).effect,
    "patch_positions": lambda model, pairs: interventions.patch_positions(model, pairs[:6]).effect,
}
ABSOLUTE = {"project_even_routes"}
"""What an absolute scheme has none of."""

HALVES = {name: half_model(name) for name in MODELS}
DOUBLES = {name: double_of(half) for name, half in HALVES.items()}
PAIRS = {name: certain_pairs(model) for name, model in DOUBLES.items()}


def measured_by(*groups: dict[str, Measure]) -> list[Any]:
    """Every measure on every model that has it."""
    return [
        pytest.param(name, measure, id=f"{called} {name}")
        for name in MODELS
        for group in groups
        for called, measure in group.items()
        if not (group is ROPE and name != "rope") and not (called in ABSOLUTE and name == "learned")
    ]


def largest_logits(model: HookedTransformer, asked: list[Query]) -> Tensor:
    """Of each query at its readout, `[query]`."""
    with torch.no_grad():
        logits = model(torch.tensor([query.tokens for query in asked]))
    return torch.stack([row[query.answer_span[0]] for row, query in zip(logits, asked, strict=True)]).abs().amax(1)


# ---- against the same weights in float64


@pytest.mark.parametrize(("name", "measure"), measured_by(SUMS, ROPE, RATIOS, WEIGHTS))
def test_a_half_model_is_measured_as_exactly_as_its_activations(name: str, measure: Measure) -> None:
    got, expected = measure(HALVES[name], PAIRS[name]).double(), measure(DOUBLES[name], PAIRS[name]).double()
    scale = expected[expected.isfinite()].abs().max().item() if measure not in RATIOS.values() else 1.0
    assert_close(got, expected, atol=ACTIVATION * scale, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "measure"), measured_by(LOG_PROBABILITIES))
def test_log_probabilities_of_a_half_model_are_as_exact_as_two_logits(name: str, measure: Measure) -> None:
    full, pairs = DOUBLES[name], PAIRS[name]
    largest = max(largest_logits(full, forwards(pairs)).max(), largest_logits(full, [p.reverse for p in pairs]).max())
    atol = 2 * LOGIT * largest.item()
    assert_close(measure(HALVES[name], pairs).double(), measure(full, pairs).double(), atol=atol, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_storage_coupling_of_certain_answers_survives_half_precision(name: str) -> None:
    """Its factor 1 - p is small where p has few digits left: each pair must be right in relation to itself."""
    full, pairs = DOUBLES[name], PAIRS[name]
    got, expected = evidence.storage_coupling(HALVES[name], pairs).double(), evidence.storage_coupling(full, pairs)
    both = largest_logits(full, forwards(pairs)) + largest_logits(full, [pair.reverse for pair in pairs])
    assert (((got - expected) / expected).abs().amax((1, 2)) < 2 * LOGIT * both).all()


# ---- against the same activations, added up in float64


def replaying(half: HookedTransformer) -> HookedTransformer:
    """A float64 model of the same weights, each of whose activations is the half model's own: what a measure makes of
    them has no other rounding than the measure's.

    Scores and patterns are computed from queries and keys, as measures do in both models.
    """
    full, seen = double_of(half), {}
    left_out = ("_input", "_in", "attn_scores", "pattern", "result")
    names = [name for name in full.hook_dict if not name.endswith(left_out) and "ln1" not in name]

    def run(tokens: Tensor, **asked: Any) -> Tensor:
        logits, cache = half.run_with_cache(tokens, names_filter=names, **asked)
        seen.update(cache.items())
        forward(tokens, **asked)
        return logits.double()

    def replay(tensor: Tensor, *, hook: Any) -> Tensor:
        return seen[hook.name].double()

    forward, full.forward = full.forward, run  # pyright: ignore[reportAttributeAccessIssue]
    for name in names:
        full.add_perma_hook(name, replay)
    return full


@pytest.mark.parametrize(("name", "measure"), measured_by(SUMS, ROPE, RATIOS, COUPLING))
def test_no_measure_rounds_what_it_adds_up(name: str, measure: Measure) -> None:
    got, expected = measure(HALVES[name], PAIRS[name]), measure(replaying(HALVES[name]), PAIRS[name]).double()
    scale = expected[expected.isfinite()].abs().max().item()
    assert_close(got.double(), expected, atol=SUMMED * scale, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
def test_answers_rank_as_their_evidence_says(name: str) -> None:
    half, replayed, pairs = HALVES[name], replaying(HALVES[name]), PAIRS[name]
    for by_half, by_double in zip(
        answer_evidence(half, forwards(pairs)), answer_evidence(replayed, forwards(pairs)), strict=True
    ):
        assert_close(both(by_half.beaten).double(), both(by_double.beaten), atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_evidence_matrix_is_the_product_of_the_weights(name: str) -> None:
    half, full = HALVES[name], DOUBLES[name]
    with torch.no_grad():
        resid = half.W_E[TARGETS] if half.pos_embed.relative else half.W_E[TARGETS] + half.W_pos[2]
        x, attn = half.blocks[0].ln1(resid).double(), full.blocks[0].attn
        values = torch.einsum("sm,hmd->shd", x, attn.W_V)
        values = values + attn.get_parameter("b_V") if full.cfg.qkv_bias else values
        written = torch.einsum("shd,hdm->hsm", values.repeat_interleave(4 // full.cfg.kv_heads, 1), attn.W_O)
        expected = torch.einsum("tm,hsm->hts", evidence.readout_directions(full, TARGETS), written)
        got = evidence.evidence_matrix(half, TARGETS, TARGETS, torch.tensor([2]))[..., 0]
    assert_close(got.double(), expected, atol=SUMMED * expected.abs().max().item(), rtol=0)


def test_position_indices_of_half_precision_evidence_are_computed_in_more() -> None:
    found = torch.randn(2, 30, 30, 4, generator=seeded(0)).to(torch.bfloat16)
    expected = evidence.position_index(found.double())
    assert evidence.position_index(found) == pytest.approx(expected, rel=SUMMED)
    one, other = found[0, :, :, :1], found[0, :, :, 1:2]  # [pair target layer]
    one, other = one.transpose(1, 2), other.transpose(1, 2)
    index = evidence.place_index(one, other).double()
    assert_close(index, evidence.place_index(one.double(), other.double()), atol=0, rtol=SUMMED)


# ---- gradients


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_half_model_are_those_of_its_weights(name: str) -> None:
    half, full, pairs = HALVES[name], DOUBLES[name], PAIRS[name][:8]
    got, expected = mean_gradient(half, forwards(pairs)), mean_gradient(full, forwards(pairs))
    assert got.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for part, gradient in expected.items():
        assert_close(got[part].double(), gradient, atol=1e-5 * largest, rtol=0)
    products, expected_products = gram(half, forwards(pairs)).inner, gram(full, forwards(pairs)).inner
    for of_part, expected_of_part in zip(products, expected_products, strict=True):  # either factor may be off so far
        assert_close(of_part, expected_of_part, atol=2 * 1e-5 * expected_of_part.abs().max().item(), rtol=0)
    half_alignment, full_alignment = (gradient_alignment(model, pairs) for model in (half, full))
    for layers in (None, [0], [1], [None]):
        got, expected = (aligned.pair_cosine(layers=layers).effect for aligned in (half_alignment, full_alignment))
        assert_close(got, expected, atol=1e-4, rtol=0)


def test_the_gradient_of_a_t5_table_rounds_once_and_not_at_every_offset() -> None:
    half = T5Bias(tiny_config(position="t5_bias", n_ctx=128)).to(torch.bfloat16)
    steps = torch.arange(128)
    from_bias = torch.rand(4, 128, 128, generator=seeded(0)).to(torch.bfloat16)
    with torch.no_grad():
        half.table.zero_()
    (half.bias(steps, steps) * from_bias).sum().backward()
    rows, expected = half.bucket(steps[None, :] - steps[:, None]), torch.zeros(32, 4, dtype=torch.float64)
    expected.index_put_((rows,), from_bias.permute(1, 2, 0).double(), accumulate=True)
    assert half.table.grad is not None
    assert_close(half.table.grad.double(), expected, atol=0, rtol=ROUNDING)
