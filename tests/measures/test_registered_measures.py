"""What measures make of schemes that rotate queries otherwise than keys, or each head by itself."""

from __future__ import annotations

import cmath
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_helpers import XPos, forgotten, register_all
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.config import FactConfig, ModelConfig
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.interventions.edits import even_routes
from mdm_interp.measures.fact_routes import rope_predictions
from mdm_interp.measures.head_scores import head_scores
from mdm_interp.measures.parity import rope_parity, score_parity
from mdm_interp.measures.routes import compute_routes, score_matrix
from mdm_interp.models.positions import Rope, register_scheme
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.resampling import FactSample

PAIRS = FactWorld(FactConfig(n_entities=6, n_filler=3, seq_len=7, gap=(2, 5)), seed=1).query_pairs()


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with forgotten():
        register_all()
        yield


def one_layer(name: str, **changes: Any) -> HookedTransformer:
    return random_model(position=name, n_layers=1, dtype="float64", **changes)


def by_hand(model: HookedTransformer, query: Query, side: int = 1) -> Tensor:
    """The score `[head]` from readout to source, for their content in a layer of heads with two planes; with side -1 of
    the source as far away on the other side."""
    cfg = model.cfg
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([query.tokens]))
    readout, source = query.answer_span[0], query.source_span[0]
    back, scores = side * (readout - source), []
    for head in range(cfg.n_heads):
        kv_head, score = head * cfg.kv_heads // cfg.n_heads, 0.0
        q, k = cache["q", 0][0, readout, head].tolist(), cache["k", 0][0, source, kv_head].tolist()
        for plane in range(2):
            speed = 1 + kv_head if cfg.position == "per_head" else 1
            zeta = (plane / 2 + 0.4) / 1.4 if cfg.position == "xpos" else 1
            product = complex(q[plane], q[plane + 2]).conjugate() * complex(k[plane], k[plane + 2])
            turned = product * cmath.rect(1, -back * speed * 10_000 ** (-plane / 2))
            score += turned.real * zeta ** (back / XPos.span)
        scores.append(score / 2)
    return torch.tensor(scores, dtype=torch.float64)


def left_and_right(pair: QueryPair) -> list[Query]:
    return sorted((pair.forward, pair.reverse), key=lambda query: query.offset)


@settings(max_examples=12)
@given(name=st.sampled_from(["xpos", "per_head"]), kv_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_routes_and_parity_are_what_the_content_gives(name: str, kv_heads: int, seed: int) -> None:
    model = one_layer(name, n_key_value_heads=kv_heads, seed=seed)
    routes = compute_routes(model, [pair.forward for pair in PAIRS])
    parity = score_parity(model, PAIRS)
    for row, pair in enumerate(PAIRS):
        assert_close(routes.scores[row, 0], by_hand(model, pair.forward), atol=1e-9, rtol=0)
        left, right = (by_hand(model, query) for query in left_and_right(pair))
        assert_close(parity.even[row, 0], (left + right) / 2, atol=1e-9, rtol=0)
        assert_close(parity.odd[row, 0], (right - left) / 2, atol=1e-9, rtol=0)
        # The first layer has one content for both sides: the offset alone tells them apart.
        assert_close(by_hand(model, pair.forward, side=-1), by_hand(model, pair.reverse), atol=1e-9, rtol=0)
    assert (parity.odd.abs().amax((0, 1)) > 1e-3).all()


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", ["xpos", "per_head"])
def test_even_routes_are_the_mean_of_both_sides(name: str, kv_heads: int) -> None:
    model = one_layer(name, n_key_value_heads=kv_heads)
    queries = [pair.reverse for pair in PAIRS]
    with even_routes(model, PAIRS):
        edited = compute_routes(model, queries).scores[:, 0]
    for row, query in zip(edited, queries, strict=True):
        assert_close(row, (by_hand(model, query) + by_hand(model, query, side=-1)) / 2, atol=1e-9, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["xpos", "per_head"])
@pytest.mark.parametrize("offset", [3, -2])
def test_score_matrix_rotates_queries_and_keys_as_the_model_does(name: str, offset: int) -> None:
    model = random_model(position=name, dtype="float64", n_key_value_heads=2)
    found = score_matrix(model, torch.tensor([3]), torch.tensor([5]), offset)[:, 0, 0]
    tokens, at, of = [2] * (abs(offset) + 1), max(-offset, 0), max(offset, 0)
    tokens[at], tokens[of] = 3, 5
    _, cache = model.run_with_cache(torch.tensor([tokens]))
    assert_close(found, cache["attn_scores", 0][0, :, at, of], atol=1e-9, rtol=0)


def test_scores_of_heads_are_there() -> None:
    found = head_scores(random_model(position="xpos"), PAIRS)
    assert {"odd share", "reverse attribution", "routing alignment"} <= found.over_pairs.keys()
    assert all(scores.isfinite().any() for scores in found.over_pairs.values())


# ---- closed forms


@pytest.mark.parametrize(("name", "named"), [("xpos", "XPos"), ("per_head", "PerHead")])
def test_predictions_of_rope_refuse_what_rotates_otherwise(name: str, named: str) -> None:
    with pytest.raises(UserError, match=f"model: {named} has its own rotate, and closed forms are for Rope's"):
        rope_predictions(one_layer(name), PAIRS, FactSample.of(PAIRS))


def test_without_a_rotation_rope_predicts_nothing() -> None:
    predicted = rope_predictions(one_layer("window"), PAIRS, FactSample.of(PAIRS))
    assert predicted.isotropic.isnan().all() and predicted.spectrum.isnan().all()


class Slow(Rope):
    """Rope at other angles, which closed forms follow by whatever name."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.theta = self.theta / 4


@pytest.mark.usefixtures("own_schemes")
def test_closed_forms_follow_a_registered_rope_of_other_angles() -> None:
    register_scheme("slow")(Slow)
    model = one_layer("slow")
    planes, measured = rope_parity(model, PAIRS), score_parity(model, PAIRS)
    assert_close(planes.odd.sum(-1), measured.odd, atol=1e-9, rtol=0)
    assert_close(planes.even.sum(-1), measured.even, atol=1e-9, rtol=0)
    predicted, plain = (rope_predictions(one, PAIRS, FactSample.of(PAIRS)) for one in (model, one_layer("rope")))
    assert predicted.isotropic.isfinite().all() and not torch.isclose(predicted.isotropic, plain.isotropic).any()
