"""The paper's signatures: each number is what it is called."""

from __future__ import annotations

import pytest
import torch
from helpers import random_model

from mdm_interp.config import FactConfig, Objective
from mdm_interp.data.queries import collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures import signatures
from mdm_interp.measures.evidence import compute_evidence, evidence_scores, pair_position_index, place_index
from mdm_interp.measures.gradients.alignment import gradient_alignment
from mdm_interp.measures.gradients.components import STORAGE
from mdm_interp.measures.routes import route_correlation, score_correlation

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=6)


def test_the_mean_alignment_is_the_cosine_of_the_storage_gradients() -> None:
    model = random_model(n_layers=1, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len).to(torch.float64)
    pairs = FactWorld(FACTS, 0).query_pairs(n_contexts=1)
    gradients = []
    for queries in ([pair.forward for pair in pairs], [pair.reverse for pair in pairs]):
        batch = collate(queries, model.cfg)
        attention = model.blocks[0].attn
        loss = query_loss(model(batch.tokens), batch).mean()
        parts = torch.autograd.grad(loss, [attention.W_V, attention.W_O])
        gradients.append(torch.cat([part.flatten() for part in parts]))
    cosine = torch.cosine_similarity(*gradients, dim=0).item()
    assert signatures.alignment(model, pairs)["mean_alignment"].effect == pytest.approx(cosine, abs=1e-6)


def test_evidence_and_place_are_of_the_layer_where_they_are_largest() -> None:
    """One rule for both claims about evidence, and for their nulls."""
    world = FactWorld(FACTS, 0)
    pairs = world.query_pairs(n_contexts=1)
    reverse = [pair.reverse for pair in pairs]
    model = random_model(n_layers=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len, position="learned")
    scores, found = evidence_scores(model, reverse, world.candidates(reverse)), signatures.evidence(model, pairs, world)
    assert found.effect == pytest.approx(max(scores.effect.tolist()))
    assert found.null == pytest.approx(max(scores.null.tolist()))
    index = pair_position_index(model, pairs, torch.arange(FACTS.n_entities)).max().item()
    assert signatures.position(model, pairs, world).effect == pytest.approx(index / (1 + index), rel=1e-5)


@pytest.mark.parametrize("objective", ["any_order", "source_only"])
def test_the_null_of_place_takes_the_reverse_query_of_another_source(objective: Objective) -> None:
    world, entities = FactWorld(FACTS, 0), torch.arange(FACTS.n_entities)
    pairs = world.query_pairs(objective, n_contexts=1)
    model = random_model(n_layers=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len, position="learned")
    others = [pairs[i - 2].reverse for i in range(len(pairs))]
    forward, reverse = (
        compute_evidence(model, queries, entities).sum(2) for queries in ([pair.forward for pair in pairs], others)
    )
    index = place_index(forward, reverse).max().item()
    assert signatures.position(model, pairs, world).null == pytest.approx(index / (1 + index), rel=1e-5)


def test_routes_are_averaged_over_layers_and_heads() -> None:
    pairs = FactWorld(FACTS, 0).query_pairs(n_contexts=1)
    model = random_model(n_layers=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len)
    route = signatures.route(model, pairs)
    assert (route.effect, route.null) == (pytest.approx(route_correlation(model, pairs).mean().item()), 0)
    score, scores = signatures.score(model, pairs), score_correlation(model, pairs)
    assert score.effect == pytest.approx(scores.effect.mean().item())
    assert score.null == pytest.approx(scores.null.mean().item())


def test_the_alignment_of_pairs_is_the_mean_of_theirs_and_its_null_that_of_different_facts() -> None:
    pairs = FactWorld(FACTS, 0).query_pairs(n_contexts=1)
    model = random_model(n_layers=1, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len)
    cosine, found = gradient_alignment(model, pairs).gram.cosine(STORAGE), signatures.alignment(model, pairs)
    others = [cosine[i, j] for i, one in enumerate(pairs) for j, two in enumerate(pairs) if one.fact != two.fact]
    assert found["alignment"].effect == pytest.approx(cosine.diagonal().mean().item(), abs=1e-6)
    assert found["alignment"].null == pytest.approx(torch.stack(others).mean().item(), abs=1e-6)


def test_place_has_no_share_in_relative_evidence_and_all_of_it_where_only_place_is_stored() -> None:
    world = FactWorld(FACTS, 0)
    pairs = world.query_pairs(n_contexts=1)
    relative = random_model(n_layers=1, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len)
    assert signatures.position(relative, pairs, world).effect == 0
    absolute = random_model(n_layers=1, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len, position="learned")
    with torch.no_grad():
        absolute.embed.W_E[: FACTS.n_entities] = absolute.embed.W_E[0]
    shares = signatures.position(absolute, pairs, world)
    assert 0.1 < shares.effect <= 1
    assert 0 <= shares.null <= 1
