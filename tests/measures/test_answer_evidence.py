"""Answer evidence against loops over a full cache in float64; what it leaves out; planted and absent knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model, seeded
from model_helpers import SHAPE, llama_bridge
from probe_helpers import tiny_probe
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.measures.answer_evidence import AnswerEvidence, _Contest, answer_evidence, fact_place_index
from mdm_interp.measures.evidence import compute_evidence, place_index
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.resampling import FactSample

MASK = 12
NAMES = [(1, 2), (3,), (4, 4), (5, 2, 6), (7,), (8, 1)]
SOURCES = [(9,), (10, 3), (11,), (9, 10), (11,), (0, 9, 10)]
"""The third and the fifth fact have one source; the second has a token of the second answer, its only one."""


def ask(source: Sequence[int], answer: Sequence[int], *, filler: Sequence[int] = (), causal: bool = False) -> Query:
    """source, filler, answer (masked, or for a causal model as it is)."""
    given = (*source, *filler)
    masked = tuple(answer) if causal else (MASK,) * len(answer)
    return Query((*given, *masked), tuple(answer), (len(given), len(given) + len(answer)), (0, len(source)))


def values_of(evidence: AnswerEvidence) -> dict[str, Tensor]:
    """Every measure and every null by a name."""
    specific, beaten = evidence.specific, evidence.beaten
    effects = {"own": evidence.own, "specific": specific.effect, "beaten": beaten.effect}
    return {**effects, "null_specific": specific.null, "null_beaten": beaten.null}


LINEAR = ("own", "specific", "null_specific")
QUERIES = [
    ask(source, name, filler=(2,) * (1 + at % 3)) for at, (source, name) in enumerate(zip(SOURCES, NAMES, strict=True))
]


def by_loops(model: HookedTransformer, queries: Sequence[Query]) -> dict[str, Tensor]:
    """Every measure from the definition, one query, layer, head, answer and token at a time."""
    cfg, n = model.cfg, len(queries)
    answers = list(dict.fromkeys(query.answer for query in queries))
    gain: Any = model.ln_final.w
    toward = torch.zeros(n, cfg.n_layers, cfg.n_heads, cfg.d_vocab, dtype=torch.float64)
    for i, query in enumerate(queries):
        _, cache = model.run_with_cache(torch.tensor([query.tokens]))
        for layer in range(cfg.n_layers):
            v = cache[f"blocks.{layer}.attn.hook_v"][0, slice(*query.source_span)].sum(0)
            for head in range(cfg.n_heads):
                written = v[head // (cfg.n_heads // cfg.kv_heads)] @ model.blocks[layer].attn.W_O[head]
                toward[i, layer, head] = (written * gain) @ model.W_U
    excess = torch.full_like(toward, torch.nan)
    for token in range(cfg.d_vocab):
        lacking = [i for i, query in enumerate(queries) if token not in query.source]
        excess[..., token] = toward[..., token] - toward[lacking, ..., token].mean(0)
    found = {
        name: torch.full((n, cfg.n_layers, cfg.n_heads), torch.nan, dtype=torch.float64)
        for name in ("own", "specific", "beaten", "null_specific", "null_beaten")
    }
    for i, query in enumerate(queries):
        linked = {other.answer for other in queries if other.source == query.source}
        counted = {answer: [token for token in answer if token not in query.source] for answer in answers}
        found["own"][i] = toward[i][..., list(query.answer)].sum(-1)
        start = answers.index(query.answer)
        ordered = answers[start + 1 :] + answers[:start]
        rivals = [answer for answer in ordered if answer not in linked and counted[answer]]
        if len(rivals) < 2 or not counted[query.answer]:
            continue
        scores = {answer: excess[i][..., counted[answer]].sum(-1) for answer in answers}
        against = torch.stack([scores[answer] for answer in rivals[1:]])
        for prefix, chosen in (("", query.answer), ("null_", rivals[0])):
            found[f"{prefix}specific"][i] = scores[chosen] - against.mean(0)
            found[f"{prefix}beaten"][i] = (against < scores[chosen]).double().mean(0)
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_every_measure_is_its_definition(causal: bool) -> None:
    attention: dict[str, Any] = {"attention": "causal"} if causal else {}
    model = random_model(**SHAPE, dtype="float64", **attention)
    queries = [ask(query.source, query.answer, filler=(2,), causal=causal) for query in QUERIES]
    by_head, _ = answer_evidence(model, queries)
    for name, expected in by_loops(model, queries).items():
        assert_close(values_of(by_head)[name], expected, atol=1e-10, rtol=1e-9, equal_nan=True)
    assert by_head.specific.effect[1].isnan().all()  # nothing is left of its answer
    assert not by_head.specific.effect[[0, 2, 3, 4, 5]].isnan().any()


def test_a_layer_is_the_sum_of_its_heads() -> None:
    by_head, by_layer = answer_evidence(random_model(**SHAPE, dtype="float64"), QUERIES)
    for name in LINEAR:
        assert_close(values_of(by_layer)[name], values_of(by_head)[name].sum(2), equal_nan=True)
    single = random_model(**SHAPE | {"n_key_value_heads": 1}, n_heads=1, dtype="float64")
    heads, layers = answer_evidence(single, QUERIES)
    assert_close(layers.beaten.effect, heads.beaten.effect[..., 0], equal_nan=True)


def test_own_evidence_is_that_of_compute_evidence() -> None:
    model = random_model(**SHAPE)
    by_head, _ = answer_evidence(model, QUERIES)
    for row, query in enumerate(QUERIES):
        of_tokens = compute_evidence(model, [query], torch.tensor(query.answer))
        assert_close(by_head.own[row], of_tokens[0].sum(-1), atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(**SHAPE)
    together = answer_evidence(model, QUERIES)
    monkeypatch.setattr("mdm_interp.data.queries.MAX_LOGITS", 1)
    for padded, alone in zip(together, answer_evidence(model, QUERIES), strict=True):
        for name in LINEAR:
            assert_close(values_of(padded)[name], values_of(alone)[name], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_contexts_are_contests_of_their_own() -> None:
    model = random_model(**SHAPE, dtype="float64")
    contexts = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0])
    queries = [*QUERIES, ask((6,), (3, 8)), ask((5, 6), (1,))]
    whole, _ = answer_evidence(model, queries, contexts)
    for context in (0, 1):
        members = (contexts == context).nonzero().flatten()
        apart, _ = answer_evidence(model, [queries[member] for member in members])
        for name, values in values_of(whole).items():
            assert_close(values[members], values_of(apart)[name], equal_nan=True)


def test_a_bridge_gives_the_same(tmp_path: Path) -> None:
    model = random_model(**SHAPE, attention="causal", gated_mlp=True, act_fn="silu")
    queries = [ask(query.source, query.answer, causal=True) for query in QUERIES]
    bridge = llama_bridge(model, tmp_path)
    for ours, theirs in zip(answer_evidence(model, queries), answer_evidence(bridge, queries), strict=True):
        for name in LINEAR:
            assert_close(values_of(ours)[name], values_of(theirs)[name], atol=2e-5, rtol=1e-4, equal_nan=True)


# ---- what counts as knowledge


def facts(n: int, d_vocab: int = 200) -> list[Query]:
    return [ask((at, n + at), (2 * n + at, 3 * n + at)) for at in range(n)]


def judged(queries: Sequence[Query], written: Tensor) -> AnswerEvidence:
    """The contest of these queries, for what one head writes toward each token of the vocabulary."""
    model = HookedTransformer(ModelConfig(d_model=8, n_heads=1, n_layers=1, d_vocab=200, n_ctx=8))
    contest = _Contest.of(model, queries, torch.arange(len(queries)))
    tokens = torch.tensor(sorted({token for query in queries for token in query.answer}))
    measures = contest.judge(written[:, tokens])
    return AnswerEvidence.of(measures[:, :, None])


def test_planted_knowledge_is_found_and_another_facts_answer_is_not() -> None:
    queries = facts(30)
    written = torch.randn(30, 200, generator=seeded(0))
    for row, query in enumerate(queries):
        written[row, list(query.answer)] += 1.5
    evidence = judged(queries, written)
    assert evidence.specific.effect.mean().item() == pytest.approx(3, abs=0.7)
    assert evidence.beaten.effect.mean() > 0.9
    assert evidence.specific.null.mean().abs() < 0.7
    assert evidence.beaten.null.mean().item() == pytest.approx(0.5, abs=0.12)


def test_without_knowledge_half_of_the_others_are_beaten() -> None:
    judgements = [judged(facts(30), torch.randn(30, 200, generator=seeded(seed))) for seed in range(20)]
    means = [evidence.beaten.effect.mean() for evidence in judgements]
    error = torch.stack(means).std() / len(means) ** 0.5
    assert abs(torch.stack(means).mean() - 0.5) < 4 * error


def test_easy_tokens_and_loud_sources_are_no_knowledge() -> None:
    queries = facts(12)
    written = torch.randn(12, 200, generator=seeded(0)).double()
    loud = 100 * torch.randn(12, 1, generator=seeded(1)).double()
    easy = 100 * torch.randn(1, 200, generator=seeded(2)).double()
    plain, changed = judged(queries, written), judged(queries, written + loud + easy)
    for name in ("specific", "beaten", "null_specific", "null_beaten"):
        assert_close(values_of(changed)[name], values_of(plain)[name], atol=1e-9, rtol=0)


def test_copying_a_shared_token_is_no_knowledge() -> None:
    queries = [ask((at, 100 + at), (50 + at, 100 + at)) for at in range(10)]  # every pair has a family name
    written = torch.zeros(10, 200)
    for row in range(10):
        written[row, 100 + row] = 5.0
    evidence = judged(queries, written)
    assert (evidence.own == 5).all()
    assert (evidence.specific.effect == 0).all() and (evidence.beaten.effect == 0.5).all()


def test_answers_of_the_same_source_do_not_compete() -> None:
    queries = [*facts(10), ask((0, 10), (150, 151))]  # the first fact's source has a second answer
    written = torch.randn(11, 200, generator=seeded(0))
    changed = written.clone()
    changed[0, [150, 151]] += 50
    changed = changed - changed.mean(0) + written.mean(0)  # and the mean over sources as it was
    before, after = judged(queries, written), judged(queries, changed)
    assert_close(before.specific.effect[0], after.specific.effect[0])
    assert_close(before.beaten.effect[0], after.beaten.effect[0])


def test_too_few_answers_leave_nothing_to_compare() -> None:
    by_head, _ = answer_evidence(random_model(**SHAPE), QUERIES[:2])
    assert by_head.own.isfinite().all()
    assert by_head.specific.effect.isnan().all() and by_head.beaten.null.isnan().all()
    with pytest.raises(UserError, match="queries: evidence for answers needs several"):
        answer_evidence(random_model(**SHAPE), [])


def test_the_position_index_is_the_librarys_within_a_context(tmp_path: Path) -> None:
    prompts = tiny_probe(tmp_path, "dream").prompts["positional"]
    pairs = [p for p, t in zip(prompts.pairs, prompts.templates, strict=True) if t == 0 and p.side == "left"]
    forward, reverse = torch.randn(2, len(pairs), 3, generator=torch.Generator().manual_seed(0)).double()
    sample = FactSample.of(pairs, [0] * len(pairs))
    index = fact_place_index(forward, reverse, pairs, sample)
    assert_close(index.value, place_index(forward[..., None], reverse[..., None]))
    moved = FactSample(sample.facts.repeat(2), torch.arange(2).repeat_interleave(len(pairs)), sample.of_facts)
    shifted = [torch.cat([of, of + 100]) for of in (forward, reverse)]  # another template, the same otherwise
    assert_close(fact_place_index(shifted[0], shifted[1], pairs * 2, moved).value, index.value)
