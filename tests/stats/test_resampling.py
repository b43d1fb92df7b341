"""Statistics over facts: what is left without a cluster is computed again, intervals cover, nulls shuffle clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import seeded
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.stats.correlations import correlate
from mdm_interp.stats.estimates import Contrast, mean_estimate
from mdm_interp.stats.resampling import (
    CorrelationDraws,
    Draws,
    FactSample,
    NullDraws,
    head_agreement,
    places_above,
    rows_at,
)
from mdm_interp.stats.summary import Summary
from mdm_interp.stats.tables import estimates_in

FACTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4])
CONTEXTS = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 0, 2, 0, 1, 2])
SAMPLE = FactSample(FACTS, CONTEXTS, torch.arange(5))
CLUSTERED = FactSample(FACTS, CONTEXTS, torch.tensor([0, 1, 0, 2, 2]))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def alone(n: int) -> FactSample:
    """Facts of one pair and one context each, that share nothing."""
    return FactSample(torch.arange(n), torch.zeros(n, dtype=torch.long), torch.arange(n))


def in_clusters(of_facts: Tensor) -> FactSample:
    """Facts of one pair each and one context."""
    return FactSample(torch.arange(len(of_facts)), torch.zeros(len(of_facts), dtype=torch.long), of_facts)


def together(*sizes: int) -> Tensor:
    """Clusters of these sizes."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def pooled(x: Tensor, y: Tensor, contexts: Tensor) -> float:
    products = np.zeros(3)
    for context in contexts.unique():
        a, b = ((side := of[contexts == context].numpy()) - side.mean() for of in (x, y))
        products += [(a * b).sum(), (a * a).sum(), (b * b).sum()]
    return float(products[0] / np.sqrt(products[1] * products[2]))


def test_the_mean_is_over_facts_of_the_mean_of_each() -> None:
    values = drawn(len(FACTS), 2, 3)
    values[3] = torch.nan  # one of two pairs of fact 1
    values[[8, 9]] = torch.nan  # all of fact 3
    per_fact = torch.stack([values[FACTS.eq(fact)].nanmean(0) for fact in range(5)])
    for sample, clusters in ((SAMPLE, ([0], [1], [2], [3], [4])), (CLUSTERED, ([0, 2], [1], [3, 4]))):
        mean = sample.mean(values)
        assert_close(mean.value, per_fact.nanmean(0))
        for draw, left_out in zip(mean.draws, clusters, strict=True):
            assert_close(draw, per_fact[[fact for fact in range(5) if fact not in left_out]].nanmean(0))
    assert (SAMPLE.mean(values).n == 4).all() and (CLUSTERED.mean(values).n == 3).all()
    assert_close(SAMPLE.mean(values[:, 0, 0]).value, SAMPLE.mean(values).value[0, 0])


def test_of_facts_that_share_nothing_the_interval_is_students() -> None:
    values = drawn(7, 3)
    values[2, 1] = torch.nan
    for column, estimate in enumerate(alone(7).mean(values).estimates()):
        expected = mean_estimate(values[:, column].numpy())
        assert vars(estimate) == pytest.approx(vars(expected), abs=1e-12)


def test_a_ratio_is_of_means() -> None:
    part, whole = drawn(len(FACTS), 2), drawn(len(FACTS), 2, seed=1) + 5
    ratio = SAMPLE.ratio(part, whole)
    assert_close(ratio.value, SAMPLE.mean(part).value / SAMPLE.mean(whole).value)
    assert_close(ratio.draws[4], SAMPLE.mean(part).draws[4] / SAMPLE.mean(whole).draws[4])
    part[FACTS.eq(2)] = torch.nan
    assert ratio.n.tolist() == [5, 5] and SAMPLE.ratio(part, whole).n.tolist() == [4, 4]


@pytest.mark.parametrize("sample", [SAMPLE, CLUSTERED], ids=["alone", "clustered"])
def test_correlation_is_pooled_within_contexts_for_every_draw(sample: FactSample) -> None:
    x, y = drawn(len(FACTS), 2, 3), drawn(len(FACTS), 2, 3, seed=1)
    x, y = x + 100 * CONTEXTS[:, None, None], y - 50 * CONTEXTS[:, None, None]  # contexts differ far more than facts
    correlation = sample.correlation(x, y)
    assert (correlation.n == sample.n_clusters).all() and len(correlation.draws) == sample.n_clusters
    for layer, head in ((0, 0), (1, 2)):
        of = x[:, layer, head], y[:, layer, head]
        assert correlation.value[layer, head].item() == pytest.approx(pooled(*of, CONTEXTS), abs=1e-9)
        for cluster in range(sample.n_clusters):
            rows = sample.clusters != cluster
            expected = pooled(of[0][rows], of[1][rows], CONTEXTS[rows])
            assert correlation.draws[cluster, layer, head].item() == pytest.approx(expected, abs=1e-9)


def test_a_fact_alone_in_its_context_says_nothing_of_a_correlation() -> None:
    sample = FactSample(torch.arange(6), torch.tensor([0, 0, 0, 0, 1, 2]), torch.arange(6))
    x, y = drawn(6, 1), drawn(6, 1, seed=1)
    lonely, without = sample.correlation(x, y), alone(4).correlation(x[:4], y[:4])
    assert sample.n_clusters == 6 and lonely.n.tolist() == [4]
    assert lonely.estimates() == [pytest.approx(estimate, abs=1e-9) for estimate in without.estimates()]


def test_in_one_context_it_is_the_correlation() -> None:
    x, y = drawn(20, 2), drawn(20, 2, seed=1)
    assert_close(alone(20).correlation(x, y).value, correlate(x, y))


def test_what_does_not_vary_has_no_correlation() -> None:
    x = torch.full((len(FACTS), 1), 0.1)
    assert SAMPLE.correlation(x, drawn(len(FACTS), 1)).value.isnan().all()
    once = FactSample(torch.zeros(2, dtype=torch.long), torch.tensor([0, 1]), torch.tensor([0]))
    assert once.correlation(drawn(2, 1), drawn(2, 1, seed=1)).value.isnan().all()
    assert once.null_correlation(drawn(2, 1), drawn(2, 1, seed=1)).value.isnan().all()


def test_partners_are_any_of_the_same_context() -> None:
    met = torch.zeros(len(FACTS), len(FACTS))
    for partner in SAMPLE.partners():
        assert sorted(partner.tolist()) == list(range(len(FACTS)))
        met[torch.arange(len(FACTS)), partner] += 1
    assert (met[CONTEXTS[:, None] != CONTEXTS] == 0).all()
    assert (met[CONTEXTS[:, None] == CONTEXTS] > 20).all()  # 40 to 70 are expected of 200
    crossed = FactSample(torch.arange(6).repeat(3), torch.arange(3).repeat_interleave(6), torch.arange(6))
    for partner in crossed.partners():  # all contexts have all facts
        assert len({tuple((partner % 6)[at : at + 6].tolist()) for at in (0, 6, 12)}) == 1


def test_the_null_is_0_in_the_mean_even_in_contexts_of_two() -> None:
    of_fact = drawn(40, 50)
    twos = FactSample(torch.arange(40), torch.arange(40) // 2, torch.arange(40))
    assert_close(twos.correlation(of_fact, of_fact).value, torch.ones(50, dtype=torch.float64))
    assert twos.null_correlation(of_fact, of_fact).value.mean().abs() < 0.03
    for partner in list(twos.partners())[:3]:
        null = pooled(of_fact[:, 0], of_fact[partner, 0], twos.contexts)
        assert any(abs(null - float(draw)) < 1e-9 for draw in twos.null_correlation(of_fact, of_fact).draws[:3, 0])


def test_a_cluster_meets_a_whole_cluster_and_no_pair_is_likelier_than_for_another() -> None:
    sample = in_clusters(together(1, 2, 2, 3))
    met = torch.zeros(8, 8)
    for partner in sample.partners():
        other = sample.clusters[partner]
        assert all(len(other[sample.clusters == cluster].unique()) == 1 for cluster in range(4))
        for cluster in range(4):  # no pair twice before all of its cluster
            times = partner[sample.clusters == cluster].bincount()
            assert times[times > 0].max() <= -(
                -3 // int(sample.clusters.eq(other[sample.clusters == cluster][0]).sum())
            )
        met[torch.arange(8), partner] += 1 / 200
    expected = torch.tensor([1, 1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]) / 4  # a quarter of its cluster
    assert (met - expected).abs().max() < 0.1  # standard deviation 0.03


def test_a_null_of_clusters_scatters_as_far_as_chance_would_have_it() -> None:
    """Of 300 unrelated pairs of quantities that are alike within clusters; shuffled facts would scatter too little."""
    clusters = together(*[1, 2, 4] * 8)
    x, y = (drawn(24, 300, seed=seed)[clusters] + 0.3 * drawn(56, 300, seed=seed + 2) for seed in (0, 1))
    sample = in_clusters(clusters)
    observed, null = sample.correlation(x, y).value.std(), sample.null_correlation(x, y)
    assert null.value.mean().abs() < 0.01
    assert null.draws.std(0).mean() == pytest.approx(float(observed), rel=0.1)
    assert alone(56).null_correlation(x, y).draws.std(0).mean() < 0.7 * observed


def test_a_planted_correlation_leaves_the_null_and_chance_does_not() -> None:
    n, contexts = 60, 4
    sample = FactSample(torch.arange(n).repeat(contexts), torch.arange(contexts).repeat_interleave(n), torch.arange(n))
    of_fact = drawn(n, 8).repeat(contexts, 1)
    noise = [drawn(n * contexts, 8, seed=seed) for seed in (1, 2, 3)]
    planted = sample.correlation(of_fact + noise[0], of_fact + noise[1])
    null = sample.null_correlation(of_fact + noise[0], of_fact + noise[1])
    assert (planted.interval[0] > null.interval[1]).all()
    low, high = null.interval
    assert (low < 0).all() and (high > 0).all()
    low, high = sample.correlation(noise[1], noise[2]).over(1).interval
    assert low < 0 < high


# ---- intervals


def covered(draws: Draws, truth: float) -> float:
    low, high = draws.interval
    return float(((low < truth) & (high > truth)).double().mean())


@pytest.mark.parametrize("n", [5, 10, 24])
def test_intervals_of_a_mean_have_their_coverage(n: int) -> None:
    """Of 4,000 samples of n clusters of four pairs that are alike."""
    values = drawn(n, 4000).repeat(4, 1) + 0.1 * drawn(4 * n, 4000, seed=1)
    facts = torch.arange(n).repeat(4)
    assert covered(FactSample(facts, torch.zeros_like(facts), torch.arange(n)).mean(values), 0.0) == pytest.approx(
        0.95, abs=0.02
    )


@pytest.mark.parametrize(("n", "truth"), [(10, 0.0), (10, 0.8), (24, 0.8)])
def test_intervals_of_a_correlation_have_their_coverage(n: int, truth: float) -> None:
    x, noise = drawn(n, 4000), drawn(n, 4000, seed=1)
    correlation = alone(n).correlation(x, truth * x + (1 - truth**2) ** 0.5 * noise)
    assert covered(correlation, truth) == pytest.approx(0.95, abs=0.02)
    low, high = correlation.interval
    assert (low >= -1).all() and (high <= 1).all()


def test_the_standard_error_is_that_of_clusters() -> None:
    """Of 4,000 samples in which facts that share a name share a random effect."""
    clusters = together(*[1, 2, 4] * 8)
    values = drawn(24, 4000)[clusters] + 0.5 * drawn(56, 4000, seed=1)
    mean, unclustered = in_clusters(clusters).mean(values), alone(56).mean(values)
    true = float(mean.value.std())
    assert mean.error.pow(2).mean().sqrt() == pytest.approx(true, rel=0.1)
    assert unclustered.error.pow(2).mean().sqrt() < 0.7 * true
    assert covered(mean, 0.0) == pytest.approx(0.95, abs=0.02) and covered(unclustered, 0.0) < 0.85


def test_one_cluster_has_no_interval_and_no_null() -> None:
    values = drawn(4, 2)
    one = in_clusters(together(4))
    for draws in (one.mean(values), one.correlation(values, values.flip(1))):
        assert not draws.value.isnan().any() and draws.n.tolist() == [1, 1]
        assert all(end.isnan().all() for end in (*draws.interval, draws.p_above_zero))
    assert one.null_correlation(values, values).value.isnan().all()


# ---- clusters


def pair_of(source: tuple[int, ...], answer: tuple[int, ...], fact: int) -> QueryPair:
    stop = len(source) + len(answer)
    forward = Query((*source, *answer), answer, (len(source), stop), (0, len(source)))
    reverse = Query((*answer, *source), answer, (0, len(answer)), (len(answer), stop))
    return QueryPair(forward, reverse, fact, "right")


def test_facts_that_share_a_name_are_of_one_cluster() -> None:
    asked = [
        ((1, 2), (3,), 10),  # a child and its mother
        ((1, 2), (4, 5), 11),  # and its father,
        ((6,), (4, 5), 12),  # who has another child,
        ((3,), (1, 2), 10),
        ((7,), (6,), 13),  # which has a child
        ((1,), (2,), 14),  # names that only hold the same tokens
        ((5, 4), (8,), 15),
    ]
    sample = FactSample.of([pair_of(*values) for values in asked])
    assert sample.of_facts.tolist() == [0, 0, 0, 0, 1, 2]
    assert sample.clusters.tolist() == [0, 0, 0, 0, 0, 1, 2]
    assert sample.counts == {"facts": 6, "clusters": 3}


def test_an_arms_reverse_query_has_its_names_swapped_and_no_others() -> None:
    mine, other = pair_of((1,), (2,), 0), pair_of((3,), (2,), 1)
    arm = QueryPair(mine.forward, Query((2, 1), (1,), (1, 2), (0, 1)), 0, "right")
    assert FactSample.of([arm, other]).n_clusters == 1
    assert FactSample.of([arm, pair_of((3,), (4,), 1)]).n_clusters == 2


# ---- places above their null


def test_among_32_layers_without_effect_one_is_seldom_above() -> None:
    p_values = alone(24).mean(drawn(24, 400, 32)).p_above_zero
    named = [places_above(of_model).any() for of_model in p_values.numpy()]
    assert np.mean(named) < 0.05 + 2 * 0.011  # two standard errors of 400 models
    assert (p_values < 0.05).any(1).double().mean() > 0.6  # what looking at one layer would say


def test_a_planted_layer_is_above_and_what_is_below_or_undefined_is_not() -> None:
    values = drawn(24, 32)
    values[:, 7] += 2
    values[:, 9] -= 2
    values[:, 11] = torch.nan
    p_values = alone(24).mean(values).p_above_zero.numpy()
    assert places_above(p_values).nonzero()[0].tolist() == [7]
    assert np.isnan(p_values[11]) and p_values[9] > 0.999
    assert places_above([float("nan")]).tolist() == [False] and places_above([]).tolist() == []


# ---- layers, rows


def test_layers_and_models_are_means_of_each_draw() -> None:
    values = drawn(len(FACTS), 2, 3)
    values[FACTS.eq(1), 0, 2] = torch.nan
    draws = SAMPLE.mean(values)
    assert draws.over(0) is draws
    assert_close(draws.over(1).draws, draws.draws.mean(2))
    assert_close(draws.over(2).value, draws.value.mean())
    assert draws.over(1).n.tolist() == [4, 5] and draws.over(2).n == 4  # of the head with the fewest
    correlation, null = SAMPLE.correlation(values, values + 1), SAMPLE.null_correlation(values, values)
    assert isinstance(correlation.over(1), CorrelationDraws) and isinstance(null.over(2), NullDraws)
    ends = torch.tensor([0.025, 0.975]).double()
    assert_close(torch.stack(null.interval)[:, 1, 1], null.draws[:, 1, 1].quantile(ends))


def test_a_sample_is_of_pairs_with_template_and_side() -> None:
    forward, reverse = Query((9, 1, 5), (3,), (0, 1), (2, 3)), Query((5, 1, 9), (3,), (2, 3), (0, 1))
    asked: list[tuple[int, Any]] = [(7, "left"), (7, "right"), (2, "left"), (7, "left")]
    pairs = [QueryPair(forward, reverse, fact, side) for fact, side in asked]
    sample = FactSample.of(pairs, [0, 0, 0, 1])
    assert sample.facts.tolist() == [1, 1, 0, 1] and sample.n_facts == 2
    assert sample.contexts.tolist() == [0, 1, 0, 2]
    assert [members.tolist() for members in sample.members()] == [[0, 2], [1], [3]]


def test_rows_hold_every_place_and_can_be_read_again() -> None:
    draws, plain = CLUSTERED.mean(drawn(len(FACTS), 2, 3)), torch.arange(6.0).reshape(2, 3)
    about = {"kind": "positional", **CLUSTERED.counts}
    rows = rows_at({"route": draws, "plain": plain}, ("layer", "head"), about)
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    low, high = draws.interval
    assert rows[5] == {
        "kind": "positional",
        "facts": 5,
        "clusters": 3,
        "layer": 1,
        "head": 2,
        "route": draws.value[1, 2].item(),
        "route_low": low[1, 2].item(),
        "route_high": high[1, 2].item(),
        "route_n": 3,
        "plain": 5.0,
    }
    whole = {"route": draws.over(2), "nothing": Draws.nothing(())}
    (of_model,) = rows_at(whole, (), {**about, "layer": None})
    assert of_model["route"] == pytest.approx(draws.value.mean().item())
    read = estimates_in(pd.DataFrame(rows), "route")
    assert read["value"].tolist() == draws.value.flatten().tolist() and set(read["n"]) == {3}
    assert estimates_in(pd.DataFrame([of_model]), "nothing").empty
    assert estimates_in(pd.DataFrame(rows)[:0], "route").empty
    (entry,) = Summary.read(pd.DataFrame([of_model]), ("kind",), ("route", "nothing"))
    assert (entry.quantity, entry.of, entry.effect) == ("route", {"kind": "positional"}, draws.over(2).estimates()[0])


def test_rows_take_the_mean_over_further_axes_and_tell_an_effect_from_its_null() -> None:
    draws, plain = CLUSTERED.mean(drawn(len(FACTS), 2, 3)), torch.arange(6.0).reshape(2, 3)
    other = CLUSTERED.mean(drawn(len(FACTS), 2, seed=1))
    rows = rows_at({"route": Contrast(draws, other), "plain": plain}, ("layer",), {"kind": "positional"})
    low, high = draws.over(1).interval
    assert [row["layer"] for row in rows] == [0, 1]
    assert [row["plain"] for row in rows] == [1.0, 4.0]
    for layer, row in enumerate(rows):
        assert (row["route"], row["route_low"], row["route_high"]) == tuple(
            part[layer].item() for part in (draws.over(1).value, low, high)
        )
        assert (row["route_null"], row["route_null_low"]) == (
            other.value[layer].item(),
            other.interval[0][layer].item(),
        )
        assert row["route_n"] == row["route_null_n"] == 3


def heads(values: Tensor) -> Draws:
    """The mean of each head over 24 facts, which scatter little."""
    return alone(24).mean(values + 0.01 * drawn(24, *values.shape, seed=9))


def test_the_same_heads_agree_and_other_heads_do_not() -> None:
    one, other = (torch.randn(6, 8, generator=seeded(seed)) for seed in (0, 1))
    alike = head_agreement(heads(one), heads(one.exp()))
    assert alike.effect.value > 0.999 and alike.effect.interval[0] > alike.null.interval[1]
    assert abs(float(alike.null.value)) < 0.1
    unlike = head_agreement(heads(one), heads(other))
    assert unlike.null.interval[0] < unlike.effect.value < unlike.null.interval[1]


def test_what_only_layers_share_is_in_the_null() -> None:
    layers = 5 * torch.arange(6.0)[:, None]
    one, other = (layers + torch.rand(6, 8, generator=seeded(seed)) for seed in (0, 1))
    alike = head_agreement(heads(one), heads(other))
    assert alike.effect.value > 0.9 and alike.null.value > 0.9
    assert alike.null.interval[0] < alike.effect.value < alike.null.interval[1]


def test_a_cluster_is_the_mean_of_its_facts_whatever_they_have_of_pairs() -> None:
    """Facts 0 and 2 are one cluster; fact 0 has two pairs, one of them undefined in the second column."""
    sample = FactSample(torch.tensor([0, 0, 1, 2]), torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 0]))
    values = torch.tensor([[1.0, 5.0], [3.0, torch.nan], [7.0, torch.nan], [10.0, 1.0]])
    found = sample.per_cluster(values)
    torch.testing.assert_close(found, torch.tensor([[6.0, 3.0], [7.0, torch.nan]], dtype=torch.float64), equal_nan=True)
