"""Heads: contributions add up to logits, one-sided heads are told from two-sided ones, and the null is one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from mdm_interp.config import FactConfig, ModelConfig
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.measures.evidence import decompose_logits
from mdm_interp.measures.heads import (
    Contributions,
    Specialisation,
    compare_heads,
    compute_contributions,
    compute_reading,
    specialisation,
)
from mdm_interp.models.transformer import HookedTransformer

FACTS = FactConfig(n_entities=9, n_filler=4, seq_len=7, gap=2)
WORLD = FactWorld(FACTS, 0)
PAIRS = WORLD.query_pairs()
CANDIDATES = WORLD.candidates([pair.forward for pair in PAIRS])
ANSWERS = torch.tensor([pair.forward.answer for pair in PAIRS])
ANSWER_LEFT = torch.tensor([pair.side == "left" for pair in PAIRS])
DOUBLE: dict[str, Any] = {"d_vocab": FACTS.d_vocab, "n_ctx": FACTS.seq_len, "mask_token_id": FACTS.mask_token_id}
DOUBLE |= {"dtype": "float64"}


def margin(logits: Tensor, others: Tensor) -> Tensor:
    """By loops: the answer's logit less the mean of the others'."""
    rows = zip(logits, ANSWERS[:, 0].tolist(), others.tolist(), strict=True)
    return torch.stack([row[answer] - sum(row[other] for other in among) / len(among) for row, answer, among in rows])


def planted(forward: Tensor, reverse: Tensor, asks_left: Tensor | None = None) -> Contributions:
    """One layer; `[pair head]`, every second pair asking for the left entity."""
    asks_left = torch.arange(len(forward)) % 2 == 0 if asks_left is None else asks_left
    return Contributions(forward[:, None].double(), reverse[:, None].double(), asks_left)


@pytest.mark.parametrize("others", [CANDIDATES, (ANSWERS + 1) % 9], ids=["role", "one token"])
@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 1, "position": "rope", "n_key_value_heads": 2},
        {"n_layers": 1, "position": "learned", "normalization_type": "LN", "qkv_bias": True},
        {"n_layers": 2, "position": "alibi", "d_mlp": 12},
        {"n_layers": 1, "position": "none", "normalization_type": None},
    ],
)
def test_contributions_and_the_rest_add_up_to_the_difference_in_logits(changes: dict[str, Any], others: Tensor) -> None:
    model = random_model(**DOUBLE, **changes)
    found, tokens = compute_contributions(model, PAIRS, others), torch.arange(FACTS.d_vocab)
    for kind in ("forward", "reverse"):
        batch = collate([getattr(pair, kind) for pair in PAIRS], model.cfg)
        logits = batch.at_readout(model(batch.tokens))[:, 0]
        parts = decompose_logits(model, batch, tokens)
        rest = (parts.embedding + parts.mlps.sum(2) + parts.bias)[:, 0]
        heads = getattr(found, kind).sum((1, 2))
        torch.testing.assert_close(heads + margin(rest, others), margin(logits, others), rtol=0, atol=1e-5)
        assert (heads - margin(logits, others)).abs().max() > 1e-3, "the rest says nothing: no test of it"
    assert found.asks_left.tolist() == [pair.side == "left" for pair in PAIRS]


def test_a_heads_contribution_is_its_routes_times_its_evidence() -> None:
    """By loops over positions and heads, from what the hooks see."""
    model = random_model(**DOUBLE, n_layers=1, position="rope", normalization_type=None, n_key_value_heads=2)
    found = compute_contributions(model, PAIRS, CANDIDATES)
    for at in (0, 3, 10):
        query = PAIRS[at].reverse
        _, cache = model.run_with_cache(torch.tensor([query.tokens]))
        (row,) = query.readout(model.cfg)
        for head in range(4):
            logits = torch.zeros(FACTS.d_vocab, dtype=torch.float64)
            for key_pos in range(FACTS.seq_len):
                written = cache["v", 0][0, key_pos, head // 2] @ model.W_O[0, head]
                logits += cache["pattern", 0][0, head, row, key_pos] * (written @ model.W_U)
            mean = logits[CANDIDATES[at]].mean()
            torch.testing.assert_close(found.reverse[at, 0, head], logits[query.answer[0]] - mean, rtol=1e-9, atol=1e-9)


def hand_made() -> HookedTransformer:
    """Two heads of one plane that turns by 1 radian per position. A source 2 positions away gets the score 100 sin(±2)
    from the first, which so reads only right ones, and cos(±2) from the second; both read values of entities only."""
    d_model, n_entities = FACTS.d_vocab, FACTS.n_entities
    shape: dict[str, Any] = {"d_model": d_model, "n_heads": 2, "d_head": 2, "normalization_type": None}
    model = HookedTransformer(ModelConfig(position="rope", **shape, **DOUBLE), generator=seeded(1))
    random = torch.randn(2, 2, d_model, 2, generator=seeded(0), dtype=torch.float64)
    with torch.no_grad():
        model.embed.W_E.copy_(torch.eye(d_model))
        attn = model.blocks[0].attn
        for weight in (attn.W_Q, attn.W_K, attn.W_V):
            weight.zero_()
        attn.W_Q[:, FACTS.mask_token_id, 0] = 2**0.5
        attn.W_K[0, :n_entities, 1] = -100
        attn.W_K[1, :n_entities, 0] = 1
        attn.W_V[:, :n_entities] = random[0, :, :n_entities]
        attn.W_O.copy_(random[1].transpose(1, 2))
    return model


def test_a_head_that_reads_only_right_sources_is_one_sided_and_an_even_one_is_not() -> None:
    contributions = compute_contributions(hand_made(), PAIRS, CANDIDATES)
    forward, reverse = contributions.means()
    assert torch.cat([forward[1, :, 0], reverse[0, :, 0]]).abs().max() < 1e-9 < forward[0, 0, 0].abs()
    found = specialisation(contributions)
    torch.testing.assert_close(found.head.effect[0], torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)
    one_sided = forward[0, 0, 0].abs() + reverse[1, 0, 0].abs()
    even = 2 * (forward[0, 0, 1].abs() + forward[1, 0, 1].abs())
    torch.testing.assert_close(found.model.effect, one_sided / (one_sided + even), rtol=1e-9, atol=0)


def test_without_positions_no_head_knows_sides() -> None:
    """The reverse query is the forward one, mirrored: up to the order in which float64 adds up."""
    model = random_model(**DOUBLE, n_layers=1, position="none")
    found = specialisation(compute_contributions(model, PAIRS, CANDIDATES))
    assert found.head.effect.max() < 1e-12 and found.model.effect < 1e-12
    other = specialisation(compute_contributions(random_model(**DOUBLE, n_layers=1), PAIRS, CANDIDATES))
    assert other.model.effect > 1e-3


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_permuting_heads_permutes_their_numbers_and_nothing_else(order: list[int], seed: int) -> None:
    model = random_model(**DOUBLE, n_layers=1, position="rope", seed=seed)
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            getattr(permuted.blocks[0].attn, name).copy_(getattr(model.blocks[0].attn, name)[order])
    plain, moved = (specialisation(compute_contributions(of, PAIRS, CANDIDATES)) for of in (model, permuted))
    torch.testing.assert_close(moved.head.effect, plain.head.effect[:, order])
    torch.testing.assert_close(moved.head.null, plain.head.null[:, :, order])
    torch.testing.assert_close(moved.model.effect, plain.model.effect)
    torch.testing.assert_close(moved.model.null, plain.model.null)


def test_the_index_is_what_its_formula_says_and_the_null_is_made_of_exchanges() -> None:
    forward, reverse = torch.randn(2, 30, 3, generator=seeded(1), dtype=torch.float64) + 0.3
    found = specialisation(planted(forward, reverse))
    above, below = torch.zeros(2, 3, dtype=torch.float64)
    for side in (0, 1):
        f, r = forward[side::2].mean(0), reverse[side::2].mean(0)
        above, below = above + (f - r).abs(), below + f.abs() + r.abs()
    torch.testing.assert_close(found.head.effect[0], above / below)
    torch.testing.assert_close(found.model.effect, above.sum() / below.sum())
    assert found.head.null.shape == (200, 1, 3) and found.model.null.shape == (200,)
    swapped = torch.rand(200, 30, generator=seeded(0)) < 0.5
    f, r = forward.where(~swapped[7, :, None], reverse), reverse.where(~swapped[7, :, None], forward)
    again = specialisation(planted(f, r))
    torch.testing.assert_close(found.head.null[7], again.head.effect)
    torch.testing.assert_close(found.model.null[7], again.model.effect)
    assert torch.equal(specialisation(planted(forward, reverse)).head.null, found.head.null)
    left_only = specialisation(planted(forward, reverse, torch.ones(30, dtype=torch.bool)))
    f, r = forward.mean(0), reverse.mean(0)
    torch.testing.assert_close(left_only.head.effect[0], (f - r).abs() / (f.abs() + r.abs()))


def test_where_sides_have_no_effect_the_rank_in_the_null_is_uniform() -> None:
    """400 heads of pure chance. Each contributes as much to both queries, with noise of its own; 5 % exceed 95 %."""
    shared, *noise = torch.randn(3, 60, 400, generator=seeded(2), dtype=torch.float64)
    found = specialisation(planted(2 + shared + noise[0], 2 + shared + noise[1]))
    ranks = (found.head.null < found.head.effect).double().mean(0).flatten()
    assert kstest(ranks.numpy(), "uniform").pvalue > 0.05
    assert 0.03 < found.side_specific().double().mean() < 0.07
    one_sided = specialisation(planted(3 + shared + noise[0], 2 + shared + noise[1]))
    assert one_sided.side_specific().double().mean() > 0.95


def test_shares_are_of_all_heads_and_signed() -> None:
    forward = torch.tensor([[1.0, 3.0, 0.0], [3.0, 5.0, 0.0]])
    reverse = torch.tensor([[-2.0, 1.0, 1.0], [-2.0, 1.0, 1.0]])
    of_forward, of_reverse = planted(forward, reverse).shares()
    torch.testing.assert_close(of_forward[0], torch.tensor([2 / 6, 4 / 6, 0.0]).double())
    torch.testing.assert_close(of_reverse[0], torch.tensor([-0.5, 0.25, 0.25]).double())


def test_heads_are_compared_by_all_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two heads that count as side-specific; of a random model none does."""
    monkeypatch.setattr(Specialisation, "side_specific", lambda found: torch.tensor([[False, True, False, True]]))
    model = random_model(**DOUBLE, n_layers=1, position="rope")
    heads, whole = compare_heads(model, PAIRS, WORLD)
    assert heads["specific"].tolist() == [[0.0, 1.0, 0.0, 1.0]] and whole["specific_heads"] == 2
    contributions, left = compute_contributions(model, PAIRS, CANDIDATES), ANSWER_LEFT
    found = specialisation(contributions)
    torch.testing.assert_close(heads["index"], found.head.effect)
    torch.testing.assert_close(heads["index_null"], found.head.null.mean(0))
    highest = np.quantile(found.head.null.numpy(), 0.95, axis=0)
    assert heads["index_null_high"].tolist()[0] == pytest.approx(highest.tolist()[0])
    torch.testing.assert_close(heads["forward_left"], contributions.forward[left].mean(0))
    torch.testing.assert_close(heads["forward_right"], contributions.forward[~left].mean(0))
    torch.testing.assert_close(heads["reverse_left"], contributions.reverse[left].mean(0))
    torch.testing.assert_close(heads["reverse_right"], contributions.reverse[~left].mean(0))
    assert heads["forward_share"].abs().sum() == pytest.approx(1) == heads["reverse_share"].abs().sum()
    rival = compute_contributions(model, PAIRS, WORLD.rivals([pair.reverse for pair in PAIRS]))
    torch.testing.assert_close(heads["forward_rival"], rival.forward.mean(0))
    torch.testing.assert_close(heads["reverse_rival"], rival.reverse.mean(0))
    torch.testing.assert_close(whole["rival_index"], specialisation(rival).model.effect)
    torch.testing.assert_close(whole["rival_index_null"], specialisation(rival).model.null.mean())
    torch.testing.assert_close(whole["index_null"], found.model.null.mean())
    reading = compute_reading(model, PAIRS, CANDIDATES)
    torch.testing.assert_close(heads["attention_left"], reading.left)
    torch.testing.assert_close(heads["attention_right"], reading.right)
    torch.testing.assert_close(heads["evidence_left"], reading.left_evidence)
    torch.testing.assert_close(heads["evidence_right"], reading.right_evidence)
    torch.testing.assert_close(heads["follows"], reading.follows)
    torch.testing.assert_close(whole["follows"], reading.model_follows)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_reading_is_what_heads_attend_to_and_store(position: Any) -> None:
    """By loops over queries, from what the hooks see; correlations by numpy."""
    model = random_model(**DOUBLE, n_layers=1, position=position)
    found, gain = compute_reading(model, PAIRS, CANDIDATES), model.get_parameter("ln_final.w").detach()
    routes: dict[str, list[np.ndarray]] = {"forward": [], "reverse": []}
    by_side: dict[bool, list[np.ndarray]] = {False: [], True: []}
    evidence = []
    for at, pair in enumerate(PAIRS):
        for kind, of_kind in routes.items():
            query: Query = getattr(pair, kind)
            _, cache = model.run_with_cache(torch.tensor([query.tokens]))
            route = cache["pattern", 0][0, :, query.answer_span[0], query.source_span[0]].detach().numpy()
            of_kind.append(route)
            by_side[query.source_span[0] > query.answer_span[0]].append(route)
            if kind == "forward":
                v = cache["v", 0][0, query.source_span[0]]
                written = torch.stack([v[head] @ model.W_O[0, head] for head in range(4)])
                toward = (written * gain) @ model.W_U
                among = CANDIDATES[at]
                evidence.append((toward[:, query.answer[0]] - toward[:, among].mean(1)).detach().numpy())
    stored, more = np.array(evidence), np.array(routes["forward"]) - np.array(routes["reverse"])
    left = np.array([pair.side == "left" for pair in PAIRS])
    expected = {
        "right": np.mean(by_side[True], axis=0),
        "left": np.mean(by_side[False], axis=0),
        "left_evidence": stored[left].mean(0),
        "right_evidence": stored[~left].mean(0),
        "follows": np.array([np.corrcoef(more[:, head], stored[:, head])[0, 1] for head in range(4)]),
    }
    for name, value in expected.items():
        assert getattr(found, name)[0].tolist() == pytest.approx(value.tolist(), rel=1e-6), name
    centred = [(x - x.mean(0)).ravel() for x in (more, stored)]
    assert found.model_follows.item() == pytest.approx(np.corrcoef(*centred)[0, 1], rel=1e-6)


def test_what_cannot_be_compared_is_named() -> None:
    model = random_model(**DOUBLE, n_layers=1)
    arm = WORLD.query_pairs("causal")
    for measure in (compute_contributions, compute_reading):
        with pytest.raises(UserError, match="what a head brings to both queries is undefined for pairs that share"):
            measure(model, arm, WORLD.candidates([pair.forward for pair in arm]))
        long = Query((12, 12, 0, 3, 4, 5), (1, 2), (0, 2), (3, 4)), Query((3, 4, 0, 12, 12, 5), (1, 2), (3, 5), (0, 1))
        with pytest.raises(UserError, match="an answer has 2 tokens; heads are compared for answers of one token"):
            measure(model, [QueryPair(*long, 0, "left")], torch.tensor([[1]]))
