"""Resampling of facts: intervals and nulls of a statistic for all heads at once.

    sample = FactSample.of(pairs, templates)
    sample.mean(routes)                            # bootstrap of the mean over facts, per layer and head
    sample.correlation(forward, reverse)           # bootstrap of a correlation over facts
    sample.null_correlation(forward, reverse)      # the same of one fact's forward and another's reverse

A fact's pairs (templates, sides) are not independent of each other: whole facts are drawn, with all their pairs. Pairs
that are asked in the same way for the same side are of one *context*. Contexts differ in their words, so what varies
between facts is looked at within each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from mdm_interp.queries import QueryPair
from mdm_interp.routing import correlate
from mdm_interp.stats import LEVEL, Estimate

N_RESAMPLES = 1000
N_SHUFFLES = 200


def mean_over(values: Float[Tensor, "*all"], axes: int) -> Float[Tensor, "*rest"]:
    """Mean over the last so many axes; NaNs are left out."""
    return values.flatten(-axes).nanmean(-1) if axes else values


@dataclass(frozen=True)
class Draws:
    """A statistic and what it becomes when its data are drawn again."""

    value: Float[Tensor, "*rest"]
    """Of the data as they are; of a null, the mean of the draws."""
    draws: Float[Tensor, "draw *rest"]

    @classmethod
    def of_null(cls, draws: Float[Tensor, "draw *rest"]) -> Draws:
        return cls(draws.nanmean(0), draws)

    @classmethod
    def nothing(cls, shape: Sequence[int]) -> Draws:
        """Of what is undefined or was not measured."""
        nowhere = torch.full(tuple(shape), torch.nan)
        return cls(nowhere, nowhere[None])

    def over(self, axes: int) -> Draws:
        """Mean over the last so many axes, in each draw."""
        return Draws(mean_over(self.value, axes), mean_over(self.draws, axes))

    @cached_property
    def interval(self) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
        """The central 95 % of the draws; draws that are undefined are left out."""
        ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=self.draws.dtype)
        low, high = self.draws.nanquantile(ends, dim=0)
        return low, high


@dataclass(frozen=True)
class FactSample:
    """Which fact and which context each pair of a list is of."""

    facts: Int[Tensor, "pair"]
    """From 0 on, without gaps."""
    contexts: Int[Tensor, "pair"]
    """From 0 on, without gaps."""
    seed: int = 0

    @classmethod
    def of(cls, query_pairs: Sequence[QueryPair], ways: Sequence[Hashable], seed: int = 0) -> FactSample:
        """A context is a way of asking, and the side that is asked for.

        Args:
            ways: How each pair is asked: its template, say.
        """
        facts = torch.tensor([pair.fact for pair in query_pairs]).unique(return_inverse=True)[1]
        asked = [(way, pair.side) for pair, way in zip(query_pairs, ways, strict=True)]
        contexts = {context: at for at, context in enumerate(dict.fromkeys(asked))}
        return cls(facts, torch.tensor([contexts[context] for context in asked]), seed)

    @property
    def n_facts(self) -> int:
        return int(self.facts.max()) + 1

    def members(self) -> list[Int[Tensor, "member"]]:
        """The pairs of each context."""
        return [(self.contexts == context).nonzero().flatten() for context in range(int(self.contexts.max()) + 1)]

    @cached_property
    def _weights(self) -> Float[Tensor, "draw fact"]:
        """How often each fact is drawn: first the facts as they are, then the bootstrap."""
        n, generator = self.n_facts, torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(n, (N_RESAMPLES, n), generator=generator)
        counts = torch.zeros(N_RESAMPLES, n, dtype=torch.float64).scatter_add(
            1, drawn, torch.ones(drawn.shape).double()
        )
        return torch.cat([torch.ones(1, n, dtype=torch.float64), counts])

    def per_fact(self, values: Float[Tensor, "pair *rest"]) -> Float[Tensor, "fact *rest"]:
        """Mean over each fact's pairs; NaNs are left out."""
        known = ~values.isnan()
        sums, counts = torch.zeros(2, self.n_facts, *values.shape[1:], dtype=torch.float64)
        sums.index_add_(0, self.facts, values.double().where(known, 0.0))
        return sums / counts.index_add_(0, self.facts, known.double())

    def mean(self, values: Float[Tensor, "pair *rest"]) -> Draws:
        """Mean over facts of the mean over each fact's pairs."""
        per_fact = self.per_fact(values).reshape(self.n_facts, -1)
        known = ~per_fact.isnan()
        total, count = self._weights @ per_fact.where(known, 0.0), self._weights @ known.double()
        return _split((total / count).reshape(-1, *values.shape[1:]))

    def ratio(self, part: Float[Tensor, "pair *rest"], whole: Float[Tensor, "pair *rest"]) -> Draws:
        """The mean of one over the mean of the other."""
        above, below = self.mean(part), self.mean(whole)
        return Draws(above.value / below.value, above.draws / below.draws)

    def correlation(self, x: Float[Tensor, "pair *rest"], y: Float[Tensor, "pair *rest"]) -> Draws:
        """Pearson correlation over the pairs of a context, covariances and variances pooled over contexts; NaN where a
        side does not vary."""
        x, y = self.centred(x), self.centred(y)
        weights = self._weights[:, self.facts]
        pooled = torch.zeros(3, len(weights), x[0].numel(), dtype=torch.float64)
        for members in self.members():
            x_c, y_c = (side[members].reshape(len(members), -1) for side in (x, y))
            weight = weights[:, members]
            drawn = weight.sum(1, keepdim=True).clamp(min=1)
            x_sum, y_sum = weight @ x_c, weight @ y_c
            products = ((x_c, y_c, x_sum, y_sum), (x_c, x_c, x_sum, x_sum), (y_c, y_c, y_sum, y_sum))
            for moment, (one, other, one_sum, other_sum) in zip(pooled, products, strict=True):
                moment += weight @ (one * other) - one_sum * other_sum / drawn
        covariance, *squares = pooled
        # Of draws of one fact only, rounding is left.
        varies = torch.stack([square > 1e-12 * square[:1] for square in squares]).all(0)
        correlation = (covariance / (squares[0] * squares[1]).sqrt()).where(varies, torch.nan)
        return _split(correlation.reshape(-1, *x.shape[1:]))

    def null_correlation(self, x: Float[Tensor, "pair *rest"], y: Float[Tensor, "pair *rest"]) -> Draws:
        """The same with facts shuffled; NaN where there is one fact only."""
        x, y = self.centred(x), self.centred(y)
        scale = (x.pow(2).sum(0) * y.pow(2).sum(0)).sqrt()
        return self.null(lambda other: ((x * y[other]).sum(0) / scale).where(scale > 0, torch.nan))

    def centred(self, values: Float[Tensor, "pair *rest"]) -> Float[Tensor, "pair *rest"]:
        """Less the mean of each context; exactly 0 where a context does not vary."""
        centred = values.double()
        for members in self.members():
            inside = centred[members] - centred[members[:1]]
            centred[members] = inside - inside.mean(0)
        return centred

    def null(self, statistic: Callable[[Int[Tensor, "pair"]], Float[Tensor, "*rest"]]) -> Draws:
        """What a statistic of the pairs' partners becomes over the shuffles of :meth:`partners`."""
        draws = torch.stack([statistic(partner) for partner in self.partners()])
        return Draws.of_null(draws if self.n_facts > 1 else torch.full_like(draws, torch.nan))

    def partners(self) -> Iterator[Int[Tensor, "pair"]]:
        """Shuffles of the facts: for every pair, a pair of its context. Each is as likely as any, itself included, so
        that a correlation is 0 in the mean; facts are shuffled alike in all contexts that have the same ones."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(N_SHUFFLES):
            keys = torch.rand(2, self.n_facts, generator=generator, dtype=torch.float64)
            circle, other = (self.contexts + keys[:, self.facts]).argsort(dim=1)
            yield torch.empty_like(circle).scatter(0, circle, other)


def head_agreement(x: Draws, y: Draws, seed: int = 0) -> tuple[Draws, Draws]:
    """Rank correlation over all heads of two `[layer head]`, drawn together, and its null: the heads of `y` shuffled
    within each layer."""

    def spearman(x: Float[Tensor, "draw layer head"], y: Float[Tensor, "draw layer head"]) -> Float[Tensor, "draw"]:
        return correlate(*(torch.from_numpy(rankdata(side.flatten(1).numpy(), axis=1)).T for side in (x, y)))

    order = torch.rand(N_RESAMPLES, *x.value.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    shuffled = y.value.expand_as(order).gather(-1, order)
    alike = Draws(spearman(x.value[None], y.value[None])[0], spearman(x.draws, y.draws))
    return alike, Draws.of_null(spearman(x.value.expand_as(order), shuffled))


def rows_at(
    columns: Mapping[str, Draws | Tensor], axes: Sequence[str], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row for every place: `about`, the place's index on each axis, and every column's number there; of draws also
    `NAME_low` and `NAME_high`.

    Args:
        columns: All of one shape, which is that of `axes`.
    """
    numbers: dict[str, Tensor] = {}
    for name, column in columns.items():
        if isinstance(column, Draws):
            low, high = column.interval
            numbers |= {name: column.value, f"{name}_low": low, f"{name}_high": high}
        else:
            numbers[name] = column
    shape = next(iter(numbers.values())).shape
    listed = {name: column.flatten().tolist() for name, column in numbers.items()}
    return [
        {**about, **dict(zip(axes, place, strict=True)), **{name: column[at] for name, column in listed.items()}}
        for at, place in enumerate(itertools.product(*map(range, shape)))
    ]


def estimates_in(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """What :func:`rows_at` wrote of one column of draws, as `value`, `low`, `high` and `n` beside the places; rows
    without a value are left out."""
    of_name = {name: "value", f"{name}_low": "low", f"{name}_high": "high", "facts": "n"}
    kept = rows[[column for column in ("layer", "head") if column in rows] + list(of_name)].rename(columns=of_name)
    return kept.astype(dict.fromkeys(("value", "low", "high"), float)).dropna(subset="value")


def summary_of(frame: pd.DataFrame, places: Sequence[str], names: Sequence[str]) -> dict[str, Estimate]:
    """What :func:`rows_at` wrote of these columns of draws for all layers together (null), by place and column."""
    summary = {}
    for place, rows in frame[frame["layer"].isna()].groupby(list(places), sort=False):
        for name in names:
            for estimate in estimates_in(rows, name)[["value", "low", "high", "n"]].to_dict("records"):
                summary[" / ".join([*map(str, place), name])] = Estimate(**estimate)
    return summary


def _split(drawn: Float[Tensor, "draw *rest"]) -> Draws:
    return Draws(drawn[0], drawn[1:])
