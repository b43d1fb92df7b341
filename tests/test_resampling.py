"""Resampled statistics are those of explicitly repeated facts, and nulls pair different facts in the same context."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import seeded
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.queries import Query, QueryPair
from mdm_interp.resampling import N_RESAMPLES, Draws, FactSample, estimates_in, head_agreement, rows_at
from mdm_interp.routing import correlate

FACTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4])
CONTEXTS = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 0, 2, 0, 1, 2])
SAMPLE = FactSample(FACTS, CONTEXTS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def repeated(draw: int) -> Tensor:
    """The pairs of one draw, each fact's as often as it was drawn."""
    counts = SAMPLE._weights[draw].long()
    return torch.cat([FACTS.eq(fact).nonzero().flatten() for fact in range(5) for _ in range(int(counts[fact]))])


def pooled(x: Tensor, y: Tensor, contexts: Tensor) -> float:
    products = np.zeros(3)
    for context in contexts.unique():
        a, b = ((side := of[contexts == context].numpy()) - side.mean() for of in (x, y))
        products += [(a * b).sum(), (a * a).sum(), (b * b).sum()]
    return float(products[0] / np.sqrt(products[1] * products[2]))


def test_the_first_draw_is_the_facts_as_they_are_and_each_draw_has_as_many() -> None:
    weights = SAMPLE._weights
    assert weights.shape == (N_RESAMPLES + 1, 5)
    assert (weights[0] == 1).all() and (weights.sum(1) == 5).all()
    assert weights[1:].mean(0).sub(1).abs().max() < 0.1


def test_the_mean_is_over_facts_of_the_mean_of_each() -> None:
    values = drawn(len(FACTS), 2, 3)
    values[3] = torch.nan  # one of two pairs of fact 1
    values[[8, 9]] = torch.nan  # all of fact 3
    per_fact = torch.stack([values[FACTS.eq(fact)].nanmean(0) for fact in range(5)])
    draws = SAMPLE.mean(values)
    assert_close(draws.value, per_fact.nanmean(0))
    for draw in (1, 7):
        counts = SAMPLE._weights[draw].long()
        assert_close(draws.draws[draw - 1], per_fact.repeat_interleave(counts, dim=0).nanmean(0))
    assert_close(SAMPLE.mean(values[:, 0, 0]).value, draws.value[0, 0])


def test_a_ratio_is_of_means() -> None:
    part, whole = drawn(len(FACTS), 2), drawn(len(FACTS), 2, seed=1) + 5
    ratio = SAMPLE.ratio(part, whole)
    assert_close(ratio.value, SAMPLE.mean(part).value / SAMPLE.mean(whole).value)
    assert_close(ratio.draws[4], SAMPLE.mean(part).draws[4] / SAMPLE.mean(whole).draws[4])


def test_correlation_is_pooled_within_contexts_for_every_draw() -> None:
    x, y = drawn(len(FACTS), 2, 3), drawn(len(FACTS), 2, 3, seed=1)
    x, y = x + 100 * CONTEXTS[:, None, None], y - 50 * CONTEXTS[:, None, None]  # contexts differ far more than facts
    correlation = SAMPLE.correlation(x, y)
    for layer, head in ((0, 0), (1, 2)):
        of = x[:, layer, head], y[:, layer, head]
        assert correlation.value[layer, head].item() == pytest.approx(pooled(*of, CONTEXTS), abs=1e-9)
        for draw in (1, 2, 30):
            rows = repeated(draw)
            expected = pooled(of[0][rows], of[1][rows], CONTEXTS[rows])
            assert correlation.draws[draw - 1, layer, head].item() == pytest.approx(expected, abs=1e-9)


def test_in_one_context_it_is_the_correlation() -> None:
    x, y = drawn(20, 2), drawn(20, 2, seed=1)
    one = FactSample(torch.arange(20), torch.zeros(20, dtype=torch.long))
    assert_close(one.correlation(x, y).value, correlate(x, y))


def test_what_does_not_vary_has_no_correlation() -> None:
    x = torch.full((len(FACTS), 1), 0.1)
    assert SAMPLE.correlation(x, drawn(len(FACTS), 1)).value.isnan().all()
    once = FactSample(torch.zeros(2, dtype=torch.long), torch.tensor([0, 1]))
    assert once.correlation(drawn(2, 1), drawn(2, 1, seed=1)).value.isnan().all()
    assert once.null_correlation(drawn(2, 1), drawn(2, 1, seed=1)).value.isnan().all()


def test_partners_are_any_of_the_same_context() -> None:
    met = torch.zeros(len(FACTS), len(FACTS))
    for partner in SAMPLE.partners():
        assert sorted(partner.tolist()) == list(range(len(FACTS)))
        met[torch.arange(len(FACTS)), partner] += 1
    assert (met[CONTEXTS[:, None] != CONTEXTS] == 0).all()
    assert (met[CONTEXTS[:, None] == CONTEXTS] > 20).all()  # 40 to 70 are expected of 200
    crossed = FactSample(torch.arange(6).repeat(3), torch.arange(3).repeat_interleave(6))
    for partner in crossed.partners():  # all contexts have all facts
        assert len({tuple((partner % 6)[at : at + 6].tolist()) for at in (0, 6, 12)}) == 1


def test_the_null_is_0_in_the_mean_even_in_contexts_of_two() -> None:
    of_fact = drawn(40, 50)
    twos = FactSample(torch.arange(40), torch.arange(40) // 2)
    assert_close(twos.correlation(of_fact, of_fact).value, torch.ones(50, dtype=torch.float64))
    assert twos.null_correlation(of_fact, of_fact).value.mean().abs() < 0.03
    for partner in list(twos.partners())[:3]:
        null = pooled(of_fact[:, 0], of_fact[partner, 0], twos.contexts)
        assert any(abs(null - float(draw)) < 1e-9 for draw in twos.null_correlation(of_fact, of_fact).draws[:3, 0])


def test_a_planted_correlation_leaves_the_null_and_chance_does_not() -> None:
    n, contexts = 60, 4
    sample = FactSample(torch.arange(n).repeat(contexts), torch.arange(contexts).repeat_interleave(n))
    of_fact = drawn(n, 8).repeat(contexts, 1)
    noise = [drawn(n * contexts, 8, seed=seed) for seed in (1, 2, 3)]
    planted = sample.correlation(of_fact + noise[0], of_fact + noise[1])
    null = sample.null_correlation(of_fact + noise[0], of_fact + noise[1])
    assert (planted.interval[0] > null.interval[1]).all()
    low, high = null.interval
    assert (low < 0).all() and (high > 0).all()
    low, high = sample.correlation(noise[1], noise[2]).over(1).interval
    assert low < 0 < high


def test_intervals_have_their_coverage() -> None:
    """Of 400 samples of a known mean; a fact's four pairs are alike, so pairs drawn by themselves would cover less."""
    facts = torch.arange(30).repeat(4)
    values = (drawn(30, 400).repeat(4, 1) + 0.1 * drawn(120, 400, seed=1)).float()
    low, high = FactSample(facts, torch.zeros(120, dtype=torch.long)).mean(values).interval
    assert 0.88 < ((low < 0) & (high > 0)).double().mean() < 0.98


def test_layers_and_models_are_means_of_each_draw() -> None:
    draws = SAMPLE.mean(drawn(len(FACTS), 2, 3))
    assert draws.over(0).draws is draws.draws
    assert_close(draws.over(1).draws, draws.draws.mean(2))
    assert_close(draws.over(2).value, draws.value.mean())
    assert_close(
        torch.stack(draws.interval)[:, 1, 2], draws.draws[:, 1, 2].quantile(torch.tensor([0.025, 0.975]).double())
    )


def test_a_sample_is_of_pairs_with_template_and_side() -> None:
    forward, reverse = Query((9, 1, 5), (3,), (0, 1), (2, 3)), Query((5, 1, 9), (3,), (2, 3), (0, 1))
    asked: list[tuple[int, Any]] = [(7, "left"), (7, "right"), (2, "left"), (7, "left")]
    pairs = [QueryPair(forward, reverse, fact, side) for fact, side in asked]
    sample = FactSample.of(pairs, [0, 0, 0, 1])
    assert sample.facts.tolist() == [1, 1, 0, 1] and sample.n_facts == 2
    assert sample.contexts.tolist() == [0, 1, 0, 2]
    assert [members.tolist() for members in sample.members()] == [[0, 2], [1], [3]]


def test_rows_hold_every_place_and_can_be_read_again() -> None:
    draws, plain = SAMPLE.mean(drawn(len(FACTS), 2, 3)), torch.arange(6.0).reshape(2, 3)
    rows = rows_at({"route": draws, "plain": plain}, ("layer", "head"), {"kind": "positional", "facts": 5})
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    low, high = draws.interval
    assert rows[5] == {
        "kind": "positional",
        "facts": 5,
        "layer": 1,
        "head": 2,
        "route": draws.value[1, 2].item(),
        "route_low": low[1, 2].item(),
        "route_high": high[1, 2].item(),
        "plain": 5.0,
    }
    (whole,) = rows_at({"route": draws.over(2), "nothing": Draws.nothing(())}, (), {"facts": 5})
    assert whole["route"] == pytest.approx(draws.value.mean().item())
    read = estimates_in(pd.DataFrame(rows), "route")
    assert read["value"].tolist() == draws.value.flatten().tolist() and set(read["n"]) == {5}
    assert estimates_in(pd.DataFrame([whole]), "nothing").empty


def heads(values: Tensor) -> Draws:
    """A number of each head, with little noise in its draws."""
    return Draws(values, values + 0.01 * torch.randn(1000, *values.shape, generator=seeded(9)))


def test_the_same_heads_agree_and_other_heads_do_not() -> None:
    one, other = (torch.randn(6, 8, generator=seeded(seed)) for seed in (0, 1))
    alike, null = head_agreement(heads(one), heads(one.exp()))
    assert alike.value > 0.999 and alike.interval[0] > null.interval[1]
    assert abs(float(null.value)) < 0.1
    alike, null = head_agreement(heads(one), heads(other))
    assert null.interval[0] < alike.value < null.interval[1]


def test_what_only_layers_share_is_in_the_null() -> None:
    layers = 5 * torch.arange(6.0)[:, None]
    one, other = (layers + torch.rand(6, 8, generator=seeded(seed)) for seed in (0, 1))
    alike, null = head_agreement(heads(one), heads(other))
    assert alike.value > 0.9 and null.value > 0.9
    assert null.interval[0] < alike.value < null.interval[1]
