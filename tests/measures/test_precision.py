"""Measures on float32, float16 and bfloat16 models: against a float64 model of the same weights, and against the same
activations added up in float64. docs/reliability.md says how close they are, and these tests read it there."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from call_helpers import asking, named_in
from helpers import random_model, seeded, tiny_config
from model_helpers import mirrored_pairs
from reliability_helpers import TABLE
from torch import Tensor
from torch.testing import assert_close

from mdm_interp import interventions
from mdm_interp.config import FactConfig
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import Overflow
from mdm_interp.inference.denoising import denoise
from mdm_interp.inference.likelihood import bound
from mdm_interp.inference.prediction import (
    compare_answers,
    infill,
    infill_any_length,
    predict,
    split_by_role,
    token_log_probabilities,
)
from mdm_interp.measures import evidence, fact_routes, gradients, heads, parity, rope, routes, signatures
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.answers import Question, answer_all
from mdm_interp.measures.gradients import STORAGE, gradient_alignment, gram, mean_gradient
from mdm_interp.measures.gradients.influence import influence
from mdm_interp.measures.head_scores import head_scores
from mdm_interp.measures.lens import Lens, lens
from mdm_interp.measures.representations import compute_representations
from mdm_interp.measures.sinks import sinks, watch_sinks
from mdm_interp.measures.trajectory import denoise_answers
from mdm_interp.models.inputs import forbid_mask
from mdm_interp.models.positions import T5Bias
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Contrast

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def stated() -> dict[tuple[str, str], float]:
    """How close the documentation says that numbers of a kind are in a dtype to those in float64."""
    lines = re.findall(r"^\| (.+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    columns = ["measured", "relative to", *DTYPES]
    table = [cells for line in lines if len(cells := line.split(" | ")) == len(columns)]
    assert table[0] == columns
    kinds = {cells[0].partition(":")[0]: cells[2:] for cells in table[1:]}
    return {
        (kind, dtype): float(number)
        for kind, numbers in kinds.items()
        for dtype, number in zip(DTYPES, numbers, strict=True)
    }


STATED = stated()
SUMMED = STATED["sums", "float32"]
"""Of a sum in float32."""
WORLD = FactWorld(FactConfig(n_entities=27, n_filler=9), seed=0)
TARGETS, MASK = torch.arange(1, 20), WORLD.config.mask_token_id

MODELS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope", "n_key_value_heads": 2},
    "t5": {"position": "t5_bias", "normalization_type": "LN", "d_mlp": 32, "qkv_bias": True},
    "learned": {"position": "learned", "normalization_type": None},
}


@cache
def rounded(name: str, dtype: str) -> HookedTransformer:
    """Of an ordinary size at its start, but as certain of its answers as a trained one."""
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 2, "initializer_range": 0.1}
    shape |= {"d_vocab": WORLD.config.d_vocab, "mask_token_id": MASK}
    model = random_model(**{**shape, **MODELS[name]})
    with torch.no_grad():
        model.W_U.mul_(8 if MODELS[name].get("normalization_type", "RMS") else 60)
    return model.to(DTYPES[dtype])


def double_of(model: HookedTransformer) -> HookedTransformer:
    """The same weights, every one of them exactly."""
    full = HookedTransformer(model.cfg.model_copy(update={"dtype": torch.float64}))
    full.load_state_dict(model.state_dict())
    return full


@cache
def exact(name: str, dtype: str) -> HookedTransformer:
    return double_of(rounded(name, dtype))


@cache
def asked(name: str, dtype: str) -> list[QueryPair]:
    return certain_pairs(exact(name, dtype))


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


def others(pairs: list[QueryPair]) -> Tensor:
    """Of every pair four tokens that are not the answer."""
    return candidates(pairs)[:, 1:]


def seen(model: Any, pairs: list[QueryPair]) -> Lens:
    return lens(model, forwards(pairs), [(other,) for other in others(pairs)[:, 0].tolist()])


def attributed(model: Any, pairs: list[QueryPair]) -> Tensor:
    found = seen(model, pairs)
    return torch.cat([found.heads, found.mlps[..., None]], dim=-1)


def score(name: str) -> Measure:
    """A score of heads, mean over pairs."""
    return lambda model, pairs: head_scores(model, pairs).over_pairs[name]


def routes_of_facts(model: Any, pairs: list[QueryPair]) -> fact_routes.FactRoutes:
    return fact_routes.compute_fact_routes(model, pairs, fact_routes.same_lengths(pairs, [0] * len(pairs)))


def predicted(model: Any, pairs: list[QueryPair]) -> Tensor:
    found = fact_routes.rope_predictions(model, pairs, fact_routes.same_lengths(pairs, [0] * len(pairs)))
    return torch.stack([found.spectrum, found.same_content.value])


def isotropy(model: Any, pairs: list[QueryPair]) -> Tensor:
    found = rope.isotropy(model, pairs)
    return torch.cat([both(found.q), both(found.k), both(found.overlap) / model.cfg.head_dim])


def of_world(measure: Measure) -> Measure:
    """A measure that is asked of the world's facts."""
    return lambda model, _: measure(model, WORLD.query_pairs(n_contexts=1))


def signature(function: Callable[..., Contrast[float]], *given: Any) -> Measure:
    return of_world(lambda model, pairs: both(function(model, pairs, *given).map(torch.tensor)))


def specialised(model: Any, pairs: list[QueryPair]) -> Tensor:
    _, whole = heads.compare_heads(model, pairs, WORLD)
    return torch.stack([whole["index"], whole["index_null"]])


def evidence_of_relation(model: Any, pairs: list[QueryPair]) -> Tensor:
    rows = evidence.relation_evidence(model, WORLD, int(WORLD.facts[0, 1]), "left")
    return torch.tensor([row["evidence"] for row in rows])


def questions(pairs: list[QueryPair]) -> list[Question]:
    return [Question(pair.forward, pair, "positional", "forward", pair.side) for pair in pairs]


def read(model: Any, pairs: list[QueryPair]) -> Tensor:
    found = answer_all(model, questions(pairs))
    return torch.stack(
        [torch.from_numpy(found[way, "known", "log-likelihood"].effect) for way in ("one_shot", "bound")]
    )


def filled(function: Callable[..., Any], **options: Any) -> Measure:
    def measure(model: Any, pairs: list[QueryPair]) -> Tensor:
        return torch.tensor([one.log_probabilities for one in function(model, forwards(pairs), **options)])

    return measure


def bounded(model: Any, pairs: list[QueryPair]) -> Tensor:
    sentences = [pair.forward.statement for pair in pairs]
    return bound(model, sentences, [pair.forward.answer_span for pair in pairs], n_draws=2).value


def certainty(model: Any, pairs: list[QueryPair]) -> Tensor:
    tokens = torch.tensor([query.tokens for query in forwards(pairs)])
    return denoise(model, tokens, steps=1).probability


def first_head(model: Any) -> Tensor:
    """The first head of the first layer."""
    return torch.arange(model.cfg.n_layers * model.cfg.n_heads).view(-1, model.cfg.n_heads) == 0


def effect(intervention: Callable[..., interventions.Effect]) -> Measure:
    def measure(model: Any, pairs: list[QueryPair]) -> Tensor:
        found = intervention(model, pairs)
        return torch.cat([parts(found, "forward", "before"), both(found.after).double()])

    return measure


def halved(model: Any, pairs: list[QueryPair]) -> interventions.Effect:
    """With half of what the first layer's heads read."""
    return interventions.effect(model, pairs, [("blocks.0.attn.hook_z", lambda z, hook: z / 2)])


def influences(model: Any, pairs: list[QueryPair]) -> Tensor:
    reverse = [pair.reverse for pair in pairs[:4]]
    one = gradients.influence(model, forwards(pairs[:4]), reverse)
    traced = gradients.traced_influence([(model, 0.5), (model, 0.25)], [query.statement for query in reverse], reverse)
    return torch.cat([found.flatten() for each in (one, traced) for found in (each.inner, each.by_token)])


def step(model: Any, pairs: list[QueryPair]) -> Tensor:
    down, random = vars(gradients.contrast_steps(model, pairs[:8], [1e-3], STORAGE, seed=0)).values()
    everywhere = gradients.first_order(model, pairs[:8], [1e-3])
    return torch.stack([parts(found, "reverse", "forward") for found in (down, random, everywhere)])


def cosines_of_layers(model: Any, pairs: list[QueryPair]) -> Tensor:
    return both(gradients.layer_cosines(model, pairs, {"storage": STORAGE})["storage"])


def mean_alignment(model: Any, pairs: list[QueryPair]) -> Tensor:
    return torch.tensor([cosine.effect for cosine in signatures.alignment(model, pairs[:8]).values()])


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
    "margin_and_rank": lambda model, pairs: evidence.margin_and_rank(model, forwards(pairs), candidates(pairs))[0],
    "compute_contributions": lambda model, pairs: parts(
        heads.compute_contributions(model, pairs, others(pairs)), "forward", "reverse"
    ),
    "compute_reading": lambda model, pairs: parts(heads.compute_reading(model, pairs, others(pairs)), "right", "left"),
    "heads and MLPs of lens": attributed,
    "shares of compute_fact_routes": lambda model, pairs: routes_of_facts(model, pairs).forward.value,
}
REPRESENTATIONS: dict[str, Measure] = {
    "compute_representations": lambda model, pairs: compute_representations(model, forwards(pairs)),
}
OF_HEADS: dict[str, Measure] = {
    "routes of sinks": lambda model, pairs: sinks(model, forwards(pairs)).source,
    **{name: score(name) for name in ("forward route", "reverse route", "forward evidence", "reverse evidence")},
}
"""Sums, too; they read patterns as the model rounds them, or run parts of it by themselves."""
RATIOS: dict[str, Measure] = {
    "pair_position_index": lambda model, pairs: evidence.pair_position_index(model, pairs, TARGETS),
    "evidence_scores": lambda model, pairs: both(evidence.evidence_scores(model, forwards(pairs), candidates(pairs))),
    "selectivity": lambda model, pairs: parity.score_parity(model, pairs).selectivity(),
    "score_correlation": lambda model, pairs: both(routes.score_correlation(model, pairs)),
    "route_correlation": routes.route_correlation,
    "correlations of compute_fact_routes": lambda model, pairs: torch.stack(
        [routes_of_facts(model, pairs).correlation.effect.value, routes_of_facts(model, pairs).score_correlation.value]
    ),
    "isotropy": isotropy,
    "signatures.evidence": signature(signatures.evidence, WORLD),
    "signatures.position": signature(signatures.position, WORLD),
    "signatures.route": signature(signatures.route),
    "signatures.score": signature(signatures.score),
    "compare_heads": of_world(specialised),
}
"""Of the size of 1, over many queries each."""
ROPE: dict[str, Measure] = {
    "rope_parity": lambda model, pairs: parts(parity.rope_parity(model, pairs), "even", "odd"),
    "plane_parity": lambda model, pairs: parts(parity.plane_parity(model, pairs), "even", "odd"),
    "plane_spectrum": parity.plane_spectrum,
    "distance_correlation": lambda model, pairs: parts(
        rope.distance_correlation(model, pairs, torch.arange(1.0, 5.0)), "measured", "spectrum"
    ),
    "plane_scores": lambda model, pairs: rope.plane_scores(model, forwards(pairs)),
    "plane_energy": lambda model, pairs: parity.plane_energy(model, pairs).odd_uniform,
    "rope_predictions": predicted,
}
WEIGHTS: dict[str, Measure] = {
    "evidence_matrix": lambda model, pairs: evidence.evidence_matrix(model, TARGETS, TARGETS, torch.arange(3)),
    "position_index": lambda model, pairs: torch.tensor(
        evidence.position_index(evidence.evidence_matrix(model, TARGETS, TARGETS, torch.arange(8)))
    ),
    "score_matrix": lambda model, pairs: routes.score_matrix(model, TARGETS, TARGETS, 2, layer=1),
    "relation_evidence": evidence_of_relation,
    "route_coupling": parity.route_coupling,
}
"""These run a norm of the model's themselves."""
COUPLING: dict[str, Measure] = {"storage_coupling": evidence.storage_coupling}
LOG_PROBABILITIES: dict[str, Measure] = {
    "predict": lambda model, pairs: predict(model, forwards(pairs)).log_probability,
    "token_log_probabilities": lambda model, pairs: token_log_probabilities(model, forwards(pairs), candidates(pairs)),
    "split_by_role": lambda model, pairs: parts(
        split_by_role(model, forwards(pairs), candidates(pairs)), "answer", "role"
    ),
    "compare_answers": of_world(lambda model, pairs: torch.tensor(list(compare_answers(model, pairs, WORLD).values()))),
    "infill": filled(infill),
    "infill_any_length": filled(infill_any_length, longest=1),
    "bound": bounded,
    "answer_all": read,
    "denoise": certainty,
    "probability of denoise_answers": lambda model, pairs: denoise_answers(model, forwards(pairs), 1).probability,
    "probability of lens": lambda model, pairs: both(seen(model, pairs).probability),
    "effect": effect(halved),
    "share_routes": effect(interventions.share_routes),
    "edit_heads": effect(lambda model, pairs: interventions.edit_heads(model, pairs, first_head(model))["shared"]),
    "transplant_routes": effect(interventions.transplant_routes),
    "project_even_routes": effect(interventions.project_even_routes),
    "ablate_storage": effect(interventions.ablate_storage),
    "ablate_routes": effect(interventions.ablate_routes),
    "patch_heads": lambda model, pairs: interventions.patch_heads(model, pairs[:6]).effect,
    "patch_positions": lambda model, pairs: interventions.patch_positions(model, pairs[:6]).effect,
}
PRODUCTS: dict[str, Measure] = {"influence": influences, "contrast_steps": step}
COSINES: dict[str, Measure] = {
    "layer_cosines": cosines_of_layers,
    "signatures.alignment": mean_alignment,
    **{name: score(name) for name in ("storage alignment", "routing alignment")},
}
"""Of gradients."""
COUNTS: dict[str, Measure] = {
    "sinks": lambda model, pairs: parts(sinks(model, forwards(pairs), threshold=1.0), "readout", "count"),
    "watch_sinks": lambda model, pairs: both(watch_sinks(model, forwards(pairs), 1, threshold=1.0).share),
    "sink share": score("sink share"),
}
"""These say which numbers are above others, and half precision does not tell close ones apart."""
ABSOLUTE = {"project_even_routes"}
"""What an absolute scheme has none of."""


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


def compare(measure: Measure, name: str, dtype: str, allowed: float, *, relative: bool) -> None:
    """Compare a measure with itself in float64.

    Args:
        allowed: How far numbers may be apart, as a share of the largest if `relative`.
    """
    model, full, pairs = rounded(name, dtype), exact(name, dtype), asked(name, dtype)
    got, expected = measure(model, pairs).double(), measure(full, pairs).double()
    assert expected.isfinite().any()
    scale = expected[expected.isfinite()].abs().max().item() if relative else 1.0
    assert_close(got, expected, atol=allowed * scale, rtol=0, equal_nan=True)


@pytest.mark.promise("a measure in float32, float16 or bfloat16", "that of float64, as close as stated above")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "measure"), measured_by(SUMS, OF_HEADS, ROPE, WEIGHTS))
def test_sums_are_as_exact_as_activations(name: str, measure: Measure, dtype: str) -> None:
    compare(measure, name, dtype, STATED["sums", dtype], relative=True)


@pytest.mark.promise("a measure in float32, float16 or bfloat16", "that of float64, as close as stated above")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "measure"), measured_by(REPRESENTATIONS))
def test_representations_keep_the_error_of_their_mean(name: str, measure: Measure, dtype: str) -> None:
    compare(measure, name, dtype, STATED["representations", dtype], relative=True)


@pytest.mark.promise("a measure in float32, float16 or bfloat16", "that of float64, as close as stated above")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "measure"), measured_by(RATIOS))
def test_ratios_are_as_exact_as_activations(name: str, measure: Measure, dtype: str) -> None:
    compare(measure, name, dtype, STATED["ratios", dtype], relative=False)


@pytest.mark.parametrize(("name", "measure"), measured_by(COUNTS))
def test_counts_are_those_of_float64_in_float32(name: str, measure: Measure) -> None:
    compare(measure, name, "float32", STATED["ratios", "float32"], relative=False)


def largest_of_pairs(name: str, dtype: str) -> tuple[Tensor, Tensor]:
    """The largest logits of each pair's forward and of its reverse query."""
    full, pairs = exact(name, dtype), asked(name, dtype)
    return largest_logits(full, forwards(pairs)), largest_logits(full, [pair.reverse for pair in pairs])


@pytest.mark.promise("a measure in float32, float16 or bfloat16", "that of float64, as close as stated above")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "measure"), measured_by(LOG_PROBABILITIES))
def test_log_probabilities_are_as_exact_as_two_logits(name: str, measure: Measure, dtype: str) -> None:
    largest = torch.cat(largest_of_pairs(name, dtype)).max().item()
    compare(measure, name, dtype, STATED["log-probabilities", dtype] * largest, relative=False)


@pytest.mark.promise("a measure in float32, float16 or bfloat16", "that of float64, as close as stated above")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_storage_coupling_of_certain_answers_survives_half_precision(name: str, dtype: str) -> None:
    """Its factor 1 - p is small where p has few digits left: each pair must be right in relation to itself."""
    pairs = asked(name, dtype)
    got, expected = (evidence.storage_coupling(of(name, dtype), pairs).double() for of in (rounded, exact))
    forward, reverse = largest_of_pairs(name, dtype)
    allowed = STATED["storage coupling", dtype] * (forward + reverse)
    assert (((got - expected) / expected).abs().amax((1, 2)) < allowed).all()


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


@pytest.mark.parametrize(("name", "measure"), measured_by(SUMS, REPRESENTATIONS, ROPE, RATIOS, COUPLING))
def test_no_measure_rounds_what_it_adds_up(name: str, measure: Measure) -> None:
    half, pairs = rounded(name, "bfloat16"), asked(name, "bfloat16")
    got, expected = measure(half, pairs), measure(replaying(half), pairs).double()
    scale = expected[expected.isfinite()].abs().max().item()
    assert_close(got.double(), expected, atol=SUMMED * scale, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
def test_answers_rank_as_their_evidence_says(name: str) -> None:
    half, pairs = rounded(name, "bfloat16"), asked(name, "bfloat16")
    replayed = replaying(half)
    for by_half, by_double in zip(
        answer_evidence(half, forwards(pairs)), answer_evidence(replayed, forwards(pairs)), strict=True
    ):
        assert_close(both(by_half.beaten).double(), both(by_double.beaten), atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_evidence_matrix_is_the_product_of_the_weights(name: str) -> None:
    half, full = rounded(name, "bfloat16"), exact(name, "bfloat16")
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


@pytest.mark.promise("a measure in float32, float16 or bfloat16", "that of float64, as close as stated above")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_weights(name: str, dtype: str) -> None:
    model, full, pairs = rounded(name, dtype), exact(name, dtype), asked(name, dtype)[:8]
    got, expected = mean_gradient(model, forwards(pairs)), mean_gradient(full, forwards(pairs))
    assert got.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for part, gradient in expected.items():
        assert_close(got[part].double(), gradient, atol=STATED["gradients", dtype] * largest, rtol=0)
    products, expected_products = gram(model, forwards(pairs)).inner, gram(full, forwards(pairs)).inner
    for of_part, expected_of_part in zip(products, expected_products, strict=True):  # either factor may be off so far
        atol = STATED["products of gradients", dtype] * expected_of_part.abs().max().item()
        assert_close(of_part, expected_of_part, atol=atol, rtol=0)
    alignment, full_alignment = (gradient_alignment(each, pairs) for each in (model, full))
    for layers in (None, [0], [1], [None]):
        got, expected = (aligned.pair_cosine(layers=layers).effect for aligned in (alignment, full_alignment))
        assert_close(got, expected, atol=STATED["cosines of gradients", dtype], rtol=0)


@pytest.mark.promise("a measure in float32, float16 or bfloat16", "that of float64, as close as stated above")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "measure"), measured_by(PRODUCTS, COSINES))
def test_what_gradients_make_is_as_exact(name: str, measure: Measure, dtype: str) -> None:
    if measure in COSINES.values():
        compare(measure, name, dtype, STATED["cosines of gradients", dtype], relative=False)
    else:
        compare(measure, name, dtype, STATED["products of gradients", dtype], relative=True)


def test_every_function_of_a_model_is_compared() -> None:
    missing = asking() - named_in(Path(__file__))
    assert {name for name in missing if not name.startswith("viz.")} == set()  # pages round what they show


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
    assert_close(half.table.grad.double(), expected, atol=0, rtol=2**-8)  # of its 8 significant bits


# ---- too large for a dtype

READ: dict[str, Callable[[Any, list[QueryPair]], object]] = {
    "predict": lambda model, pairs: predict(model, [pair.reverse for pair in pairs], "confidence"),
    "infill": lambda model, pairs: infill(model, [pair.reverse for pair in pairs]),
    "token_log_probabilities": lambda model, pairs: token_log_probabilities(
        model, [pair.reverse for pair in pairs], torch.ones(len(pairs), 1, dtype=torch.long)
    ),
    "bound": lambda model, pairs: bound(model, [pair.reverse.statement for pair in pairs], n_draws=2),
    "denoise": lambda model, pairs: denoise(model, torch.tensor([pair.reverse.tokens for pair in pairs]), steps=1),
    "denoise at a temperature": lambda model, pairs: denoise(
        model, torch.tensor([pair.reverse.tokens for pair in pairs]), steps=1, temperature=1.0
    ),
    "gram": lambda model, pairs: gram(model, [pair.reverse for pair in pairs]),
    "influence": lambda model, pairs: influence(
        model, [pair.reverse.statement for pair in pairs], [pair.reverse for pair in pairs], n_draws=2
    ),
    "compute_routes": lambda model, pairs: routes.compute_routes(model, [pair.reverse for pair in pairs]),
    "answer_evidence": lambda model, pairs: answer_evidence(model, [pair.reverse for pair in pairs]),
    "lens": lambda model, pairs: lens(model, [pair.reverse for pair in pairs], [None] * len(pairs)),
    "transplant_routes": lambda model, pairs: interventions.transplant_routes(model, pairs),
}


TOO_LARGE = [
    (1e20, ("W_Q", "W_K"), torch.float32, "float64"),
    (1e38, ("W_V", "W_O"), torch.float32, "float64"),
    (1e38, ("W_V", "W_O"), torch.bfloat16, "float64"),
    (5e4, ("W_V", "W_O"), torch.float16, "float32 or bfloat16"),
]


@pytest.mark.promise("finite weights whose activations overflow", "refused by name, with a dtype to try")
@pytest.mark.parametrize(
    ("name", "times", "weights", "dtype", "other"),
    [
        (name, *case)
        for name in READ
        for case in TOO_LARGE
        if case[2] != torch.float16 or name not in ("gram", "influence")  # which are of float32 copies of the weights
    ],
)
def test_logits_that_are_no_numbers_are_refused(
    name: str, times: float, weights: tuple[str, ...], dtype: torch.dtype, other: str
) -> None:
    model, pairs = random_model(n_layers=2, mask_token_id=0), mirrored_pairs(causal=False)
    for block in model.blocks:
        for weight in weights:
            getattr(block.attn, weight).data *= times / getattr(block.attn, weight).data.abs().max()
    model.to(dtype)
    READ[name](random_model(n_layers=2, mask_token_id=0).to(dtype), pairs)
    said = f"^model: its logits are NaN or infinite in {str(dtype)[6:]}; load it in {other} "
    with pytest.raises(Overflow, match=said):
        READ[name](model, pairs)


@pytest.mark.parametrize("name", ["predict", "infill", "token_log_probabilities", "denoise", "bound"])
def test_a_logit_of_minus_infinity_is_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models cannot predict the mask."""
    model = random_model(n_layers=2, mask_token_id=0)
    unembed = type(model.unembed).forward
    monkeypatch.setattr(type(model.unembed), "forward", lambda self, x: forbid_mask(unembed(self, x), 0))
    assert model(torch.tensor([[1, 0]]))[0, 0, 0] == -torch.inf
    READ[name](model, mirrored_pairs(causal=False))
