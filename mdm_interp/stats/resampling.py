"""Statistics over facts for all heads at once, with their intervals and nulls.

    sample = FactSample.of(pairs, templates)
    sample.mean(routes)                            # mean over facts, per layer and head
    sample.correlation(forward, reverse)           # a correlation over facts
    sample.null_correlation(forward, reverse)      # the same of one fact's forward and another's reverse

A fact's pairs (templates, sides) are not independent of each other, nor are facts that share a name: the children of a
parent, the parents of a child. What is independent is a *cluster*: facts that names connect, with all their pairs. An
interval comes from leaving out one cluster at a time, a null from shuffling whole clusters, and `n` counts clusters.

Pairs that are asked in the same way for the same side are of one *context*. Contexts differ in their words, so what
varies between facts is looked at within each. Formulas: docs/theory.md, section 11.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import false_discovery_control, rankdata
from scipy.stats import t as student_t
from torch import Tensor

from mdm_interp.data.queries import QueryPair
from mdm_interp.errors import require_some
from mdm_interp.stats.correlations import correlate
from mdm_interp.stats.estimates import LEVEL, Contrast, Estimate

N_SHUFFLES = 200
"""Of clusters, for the null of a statistic over facts."""
N_HEAD_SHUFFLES = 1000
"""Of heads, for the null of their agreement."""

AnyDraws = TypeVar("AnyDraws", bound="Draws")


def mean_over(values: Float[Tensor, "*all"], axes: int) -> Float[Tensor, "*rest"]:
    """Take the mean over the last so many axes; NaNs are left out."""
    return values.flatten(-axes).nanmean(-1) if axes else values


@dataclass(frozen=True)
class Draws:
    """A statistic, and what it becomes when one cluster after the other is left out."""

    value: Float[Tensor, "*rest"]
    """Of all data."""
    draws: Float[Tensor, "draw *rest"]
    """Without each cluster in turn; the same as `value` for a cluster that says nothing."""
    n: Int[Tensor, "*rest"]
    """How many clusters say something."""

    @classmethod
    def nothing(cls, shape: Sequence[int]) -> Draws:
        """Return what is undefined or was not measured."""
        nowhere = torch.full(tuple(shape), torch.nan)
        return cls(nowhere, nowhere[None], torch.zeros(tuple(shape), dtype=torch.long))

    def over(self: AnyDraws, axes: int) -> AnyDraws:
        """Take the mean over the last so many axes, in each draw; `n` is that of the place with the fewest clusters."""
        if not axes:
            return self
        n = self.n.flatten(-axes).amin(-1)
        return replace(self, value=mean_over(self.value, axes), draws=mean_over(self.draws, axes), n=n)

    @cached_property
    def error(self) -> Float[Tensor, "*rest"]:
        """The standard error of `value`: sqrt((n - 1) / n * sum over clusters of (draw - value)^2).

        It is that of a mean of independent observations where each cluster is one fact, and NaN where leaving out a
        cluster leaves nothing to measure.

        Source: docs/theory.md, section 11.
        """
        kept = (self.n - 1).double() / self.n
        return (kept * (self.draws - self.value).pow(2).sum(0)).sqrt()

    @cached_property
    def interval(self) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
        """The 95 % interval, value +- t error with n - 1 degrees of freedom; NaN for a single cluster.

        Source: docs/theory.md, section 11.
        """
        half = torch.as_tensor(student_t.ppf((1 + LEVEL) / 2, self.n.numpy() - 1)) * self.error
        return self.value - half, self.value + half

    @cached_property
    def p_above_zero(self) -> Float[Tensor, "*rest"]:
        """The chance of a value so far above 0 if the true one were 0, by the same t; NaN for a single cluster.

        Source: docs/theory.md, section 11.
        """
        return torch.as_tensor(student_t.sf((self.value / self.error).numpy(), self.n.numpy() - 1))

    def estimates(self) -> list[Estimate]:
        """List every place's value with its interval."""
        columns = (self.value, *self.interval, self.n)
        return [Estimate(*numbers) for numbers in zip(*(column.flatten().tolist() for column in columns), strict=True)]


@dataclass(frozen=True)
class CorrelationDraws(Draws):
    """A correlation. Its interval is that of Fisher's z = arctanh(value), turned back: within -1 and 1."""

    @cached_property
    def interval(self) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
        value, draws = (side.clamp(-1 + 1e-12, 1 - 1e-12).arctanh() for side in (self.value, self.draws))
        low, high = Draws(value, draws, self.n).interval
        return low.tanh(), high.tanh()


@dataclass(frozen=True)
class NullDraws(Draws):
    """What a statistic becomes when its data are shuffled, once per draw; `value` is the mean of the draws."""

    @classmethod
    def of(cls, draws: Float[Tensor, "draw *rest"], n: Int[Tensor, "*rest"]) -> NullDraws:
        return cls(draws.nanmean(0), draws, n)

    @cached_property
    def interval(self) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
        """The central 95 % of the draws; draws that are undefined are left out."""
        ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=self.draws.dtype)
        low, high = self.draws.nanquantile(ends, dim=0)
        return low, high


def connected(facts: Int[Tensor, "pair"], names: Sequence[Collection[Hashable]]) -> Int[Tensor, "fact"]:
    """Number the clusters of facts that names connect, directly or through other facts.

    Args:
        facts: Which fact each pair is of, from 0 on, without gaps.
        names: The names in each pair.
    """
    numbers = {name: at for at, name in enumerate(dict.fromkeys(itertools.chain(*names)), start=int(facts.max()) + 1)}
    links = [(fact, numbers[name]) for fact, named in zip(facts.tolist(), names, strict=True) for name in named]
    n_nodes = max(numbers.values()) + 1
    graph = coo_array((np.ones(len(links)), tuple(np.array(links).T)), shape=(n_nodes, n_nodes))
    clusters = torch.from_numpy(connected_components(graph, directed=False)[1])
    return clusters[: int(facts.max()) + 1].long().unique(return_inverse=True)[1]


@dataclass(frozen=True)
class FactSample:
    """Which fact and which context each pair of a list is of, and which facts depend on each other."""

    facts: Int[Tensor, "pair"]
    """From 0 on, without gaps."""
    contexts: Int[Tensor, "pair"]
    """From 0 on, without gaps."""
    of_facts: Int[Tensor, "fact"]
    """The cluster of each fact; from 0 on, without gaps."""
    seed: int = 0

    @classmethod
    def of(cls, query_pairs: Sequence[QueryPair], ways: Sequence[Hashable] | None = None, seed: int = 0) -> FactSample:
        """Take the facts of a list of pairs, in the clusters that the token ids of sources and answers connect.

        A context is a way of asking, and the side that is asked for.

        Args:
            ways: How each pair is asked: its template, say. Default: all alike.

        Raises:
            UserError: there are no pairs.
        """
        require_some("query_pairs", query_pairs)
        facts = torch.tensor([pair.fact for pair in query_pairs]).unique(return_inverse=True)[1]
        names = [
            {name for query in (pair.forward, pair.reverse) for name in (query.source, query.answer)}
            for pair in query_pairs
        ]
        ways = [None] * len(query_pairs) if ways is None else ways
        asked = [(way, pair.side) for pair, way in zip(query_pairs, ways, strict=True)]
        contexts = {context: at for at, context in enumerate(dict.fromkeys(asked))}
        return cls(facts, torch.tensor([contexts[context] for context in asked]), connected(facts, names), seed)

    @property
    def n_facts(self) -> int:
        return len(self.of_facts)

    @property
    def n_clusters(self) -> int:
        return int(self.of_facts.max()) + 1

    @property
    def clusters(self) -> Int[Tensor, "pair"]:
        """The cluster of each pair."""
        return self.of_facts[self.facts]

    @property
    def counts(self) -> dict[str, int]:
        """How many facts there are, and in how many clusters, as columns of a row."""
        return {"facts": self.n_facts, "clusters": self.n_clusters}

    def members(self) -> list[Int[Tensor, "member"]]:
        """Return the pairs of each context."""
        return [(self.contexts == context).nonzero().flatten() for context in range(int(self.contexts.max()) + 1)]

    def matched(self) -> list[Int[Tensor, "member"]]:
        """Return the pairs of each context that has several."""
        return [members for members in self.members() if len(members) > 1]

    @cached_property
    def _membership(self) -> Float[Tensor, "cluster fact"]:
        return (torch.arange(self.n_clusters)[:, None] == self.of_facts).double()

    @cached_property
    def _weights(self) -> Float[Tensor, "draw fact"]:
        """First all facts, then all but each cluster in turn."""
        return torch.cat([torch.ones(1, self.n_facts, dtype=torch.float64), 1 - self._membership])

    def per_fact(self, values: Float[Tensor, "pair *rest"]) -> Float[Tensor, "fact *rest"]:
        """Take the mean over each fact's pairs; NaNs are left out."""
        known = ~values.isnan()
        sums, counts = torch.zeros(2, self.n_facts, *values.shape[1:], dtype=torch.float64)
        sums.index_add_(0, self.facts, values.double().where(known, 0.0))
        return sums / counts.index_add_(0, self.facts, known.double())

    def per_cluster(self, values: Float[Tensor, "pair *rest"]) -> Float[Tensor, "cluster *rest"]:
        """Take the mean over each cluster's facts of the mean over each fact's pairs; NaNs are left out."""
        per_fact = self.per_fact(values)
        return torch.stack([per_fact[self.of_facts == cluster].nanmean(0) for cluster in range(self.n_clusters)])

    def mean(self, values: Float[Tensor, "pair *rest"]) -> Draws:
        """Take the mean over facts of the mean over each fact's pairs."""
        per_fact = self.per_fact(values).reshape(self.n_facts, -1)
        known = ~per_fact.isnan()
        total, count = self._weights @ per_fact.where(known, 0.0), self._weights @ known.double()
        drawn, n = total / count, (self._membership @ known.double() > 0).sum(0)
        drawn = drawn.reshape(-1, *values.shape[1:])
        return Draws(drawn[0], drawn[1:], n.reshape(values.shape[1:]))

    def ratio(self, part: Float[Tensor, "pair *rest"], whole: Float[Tensor, "pair *rest"]) -> Draws:
        """Divide the mean of one by the mean of the other."""
        above, below = self.mean(part), self.mean(whole)
        return Draws(above.value / below.value, above.draws / below.draws, torch.minimum(above.n, below.n))

    def correlation(self, x: Float[Tensor, "pair *rest"], y: Float[Tensor, "pair *rest"]) -> CorrelationDraws:
        """Correlate over the pairs of a context (Pearson), covariances and variances pooled over contexts; NaN where a
        side does not vary."""
        x, y = self.centred(x), self.centred(y)
        weights = self._weights[:, self.facts]
        pooled = torch.zeros(3, len(weights), x[0].numel(), dtype=torch.float64)
        for members in self.matched():
            x_c, y_c = (side[members].reshape(len(members), -1) for side in (x, y))
            weight = weights[:, members]
            kept = weight.sum(1, keepdim=True).clamp(min=1)
            x_sum, y_sum = weight @ x_c, weight @ y_c
            products = ((x_c, y_c, x_sum, y_sum), (x_c, x_c, x_sum, x_sum), (y_c, y_c, y_sum, y_sum))
            for moment, (one, other, one_sum, other_sum) in zip(pooled, products, strict=True):
                moment += weight @ (one * other) - one_sum * other_sum / kept
        covariance, *squares = pooled
        # Where one fact is left, rounding is left.
        varies = torch.stack([square > 1e-12 * square[:1] for square in squares]).all(0)
        correlation = (covariance / (squares[0] * squares[1]).sqrt()).where(varies, torch.nan)
        correlation = correlation.reshape(-1, *x.shape[1:])
        return CorrelationDraws(correlation[0], correlation[1:], self._n_matched(x.shape[1:]))

    def _n_matched(self, shape: Sequence[int]) -> Int[Tensor, "*rest"]:
        """Count the clusters that have a pair in a context with several."""
        clusters = {cluster for members in self.matched() for cluster in self.clusters[members].tolist()}
        return torch.full(tuple(shape), len(clusters))

    def null_correlation(self, x: Float[Tensor, "pair *rest"], y: Float[Tensor, "pair *rest"]) -> NullDraws:
        """Shuffle the clusters and take the same correlation; NaN where there is one cluster only."""
        x, y = self.centred(x), self.centred(y)
        scale = (x.pow(2).sum(0) * y.pow(2).sum(0)).sqrt()
        return self.null(lambda other: ((x * y[other]).sum(0) / scale).where(scale > 0, torch.nan))

    def centred(self, values: Float[Tensor, "pair *rest"]) -> Float[Tensor, "pair *rest"]:
        """Subtract the mean of each context; exactly 0 where a context does not vary."""
        centred = values.double()
        for members in self.members():
            inside = centred[members] - centred[members[:1]]
            centred[members] = inside - inside.mean(0)
        return centred

    def null(self, statistic: Callable[[Int[Tensor, "pair"]], Float[Tensor, "*rest"]]) -> NullDraws:
        """Compute a statistic of the pairs' partners over the shuffles of :meth:`partners`."""
        draws = torch.stack([statistic(partner) for partner in self.partners()])
        draws = draws if self.n_clusters > 1 else torch.full_like(draws, torch.nan)
        return NullDraws.of(draws, self._n_matched(draws.shape[1:]))

    def partners(self) -> Iterator[Int[Tensor, "pair"]]:
        """Shuffle the clusters: give for every pair a pair of its context.

        In each context a cluster meets one that is as likely as any, itself included, and its pairs meet that one's in
        random order, again from the first where there are fewer. Whose partner a pair becomes then does not depend on
        the pair, so that a correlation is 0 in the mean; and facts that depend on each other stay together, so that it
        scatters as far as chance would have it. A statistic without that mean must leave out partners of the own
        cluster. Clusters are shuffled alike in all contexts that have the same ones.
        """
        generator = torch.Generator().manual_seed(self.seed)
        block, of_pair = (self.contexts * self.n_clusters + self.clusters).unique(return_inverse=True)
        context, cluster, size = block // self.n_clusters, block % self.n_clusters, of_pair.bincount()
        first = size.cumsum(0) - size
        for _ in range(N_SHUFFLES):
            cluster_keys = torch.rand(2, self.n_clusters, generator=generator, dtype=torch.float64)
            fact_keys = torch.rand(2, self.n_facts, generator=generator, dtype=torch.float64)
            circle, other = (context + cluster_keys[:, cluster]).argsort(dim=1)
            met = torch.empty_like(circle).scatter(0, circle, other)
            mine, theirs = (of_pair + fact_keys[:, self.facts]).argsort(dim=1)
            rank = torch.empty_like(mine).scatter(0, mine, torch.arange(len(mine)) - first[of_pair[mine]])
            yield theirs[first[met[of_pair]] + rank % size[met[of_pair]]]


def places_above(p_values: Sequence[float] | ndarray) -> Bool[ndarray, "place"]:
    """Tell which of all the places looked at (the layers of a model, say) are above their null.

    At most 5 % of those named are expected to be none (Benjamini and Hochberg), and where no place is above its null
    the chance that any is named is at most 5 %. Places without a p-value (NaN) are not named.

    Args:
        p_values: The one-sided chance of each place's excess, as :attr:`Draws.p_above_zero`.

    Source: docs/theory.md, section 11.
    """
    p_values = np.asarray(p_values, dtype=float)
    tested = ~np.isnan(p_values)
    above = np.zeros(len(p_values), dtype=bool)
    above[tested] = false_discovery_control(p_values[tested]) <= 1 - LEVEL
    return above


def head_agreement(x: Draws, y: Draws, seed: int = 0) -> Contrast[Draws]:
    """Return the rank correlation over all heads of two `[layer head]`, over the same facts; null: the heads of `y`
    shuffled within each layer."""

    def spearman(x: Float[Tensor, "draw layer head"], y: Float[Tensor, "draw layer head"]) -> Float[Tensor, "draw"]:
        return correlate(*(torch.from_numpy(rankdata(side.flatten(1).numpy(), axis=1)).T for side in (x, y)))

    order = torch.rand(N_HEAD_SHUFFLES, *x.value.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    shuffled, n = y.value.expand_as(order).gather(-1, order), torch.minimum(x.n, y.n).amin()
    # Ranks can agree fully without one cluster and not without another: Fisher's z would then reach to infinity.
    alike = Draws(spearman(x.value[None], y.value[None])[0], spearman(x.draws, y.draws), n)
    return Contrast(alike, NullDraws.of(spearman(x.value.expand_as(order), shuffled), n))


def rows_at(
    columns: Mapping[str, Draws | Tensor | Contrast[Draws]], axes: Sequence[str], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Make one row for every place: `about`, the place's index on each axis, and every column's number there; of draws
    also `NAME_low`, `NAME_high` and `NAME_n`, and of a null the same as `NAME_null`.

    Args:
        columns: Their first axes are `axes`, of the same lengths; the mean over any further ones is taken.
    """
    numbers: dict[str, Tensor] = {}
    for name, column in _effects_and_nulls(columns):
        if isinstance(column, Draws):
            column = column.over(column.value.ndim - len(axes))
            low, high = column.interval
            numbers |= {name: column.value, f"{name}_low": low, f"{name}_high": high, f"{name}_n": column.n}
        else:
            numbers[name] = mean_over(column, column.ndim - len(axes))
    shape = next(iter(numbers.values())).shape
    listed = {name: column.flatten().tolist() for name, column in numbers.items()}
    return [
        {**about, **dict(zip(axes, place, strict=True)), **{name: column[at] for name, column in listed.items()}}
        for at, place in enumerate(itertools.product(*map(range, shape)))
    ]


def _effects_and_nulls(columns: Mapping[str, Draws | Tensor | Contrast[Draws]]) -> Iterator[tuple[str, Draws | Tensor]]:
    """Give each column by its name, nulls by their own."""
    for name, column in columns.items():
        if isinstance(column, Contrast):
            yield name, column.effect
            yield f"{name}_null", column.null
        else:
            yield name, column
