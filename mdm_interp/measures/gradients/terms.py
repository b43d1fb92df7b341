"""Gradients as sums of products, which are never multiplied out. Formulas: docs/theory.md, section 5."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mdm_interp.models.layers import precise

Weight = tuple[str, int]
"""A parameter's name, and which of its heads."""


@dataclass(frozen=True)
class Terms:
    """What one batch of queries adds to the gradients of one weight: each term is the outer product of its factors, and
    a query's gradient is the sum of its terms."""

    factors: tuple[Shaped[Tensor, "query term ..."], ...]
    """Vectors, one of each factor for a term; a factor of integers stands for one-hot vectors."""
    at: Int[Tensor, "query term"] | None = None
    """The position of the token that each term is of. None: terms are of queries, not of tokens."""

    @classmethod
    def of_tokens(cls, *factors: Shaped[Tensor, "query pos ..."]) -> Terms:
        """Return one term for each token, in order."""
        n_query, n_pos = factors[0].shape[:2]
        return cls(factors, torch.arange(n_pos, device=factors[0].device).expand(n_query, n_pos))

    @classmethod
    def of_vectors(cls, vectors: Float[Tensor, "query *size"]) -> Terms:
        """Return one term for each query: its gradient itself."""
        return cls((vectors.flatten(1)[:, None],))

    @classmethod
    def of_map(
        cls, x: Float[Tensor, "query pos *head input"], d: Float[Tensor, "query pos *other_head output"]
    ) -> list[Terms]:
        """List the gradients of a linear map from its inputs and its outputs' gradients: one, or one per head where
        both sides have heads."""
        if x.ndim == d.ndim == 4:
            return [cls.of_tokens(*pair) for pair in zip(x.unbind(2), d.unbind(2), strict=True)]
        return [cls.of_tokens(x if x.ndim == 3 else x.flatten(2), d.flatten(2))]


Found = Mapping[Weight, Sequence[Terms]]
"""What one batch of queries adds to the gradients of some weights."""


class Step(NamedTuple):
    """One batch of queries in one part of a model."""

    batch: int
    found: Found
    held: Sequence[Found]
    """What was found of the first batches in this part, up to this one, as many as are to be held."""


def steps(count: int, n_held: int, find: Callable[[int], Found]) -> Iterator[Step]:
    """Go over the batches in a part of a model. All but the first `n_held` are let go one by one."""
    held: list[Found] = []
    for batch in range(count):
        found = find(batch)
        if batch < n_held:
            held.append(found)
        yield Step(batch, found, held)
        del found


class Sums:
    """Sums of products by what they belong to. They stay in float64 where products are computed, so that a device is
    waited for once."""

    def __init__(self, *size: int) -> None:
        self.size = size
        self._of: dict[Hashable, Tensor] = {}

    def add(self, key: Hashable, products: Tensor, *at: slice) -> None:
        if key not in self._of:
            self._of[key] = products.new_zeros(self.size, dtype=torch.float64)
        self._of[key][at] += products.to(self._of[key].device)

    def read(self, keys: Sequence[Hashable]) -> Float[Tensor, "key *size"]:
        """Return the sums on the CPU, 0 where there were no products."""
        sums = torch.zeros(len(keys), *self.size, dtype=torch.float64)
        for device in {of.device for of in self._of.values()}:
            there = [key for key in keys if key in self._of and self._of[key].device == device]
            for key, of in zip(there, torch.stack([self._of[key] for key in there]).cpu(), strict=True):
                sums[keys.index(key)] = of
        return sums


def without_zeros(found: Found) -> dict[Weight, list[Terms]]:
    """Leave out terms whose last factor is 0, as far as all queries have some: padding, and what no loss sees."""
    listed = [(weight, terms, (terms.factors[-1] != 0).any(-1)) for weight in found for terms in found[weight]]
    counts = torch.stack([seen.sum(1).amax() for *_, seen in listed]).tolist()
    kept: dict[Weight, list[Terms]] = {}
    for (weight, terms, seen), count in zip(listed, counts, strict=True):
        if count < seen.shape[1]:
            rows = torch.arange(len(seen), device=seen.device)[:, None]
            chosen = seen.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
            at = None if terms.at is None else terms.at[rows, chosen]
            terms = Terms(tuple(factor[rows, chosen] for factor in terms.factors), at)
        kept.setdefault(weight, []).append(terms)
    return kept


def cross_products(
    left: Found, right: Found, rows: slice, columns: slice
) -> Iterator[tuple[Weight, Float[Tensor, "left right"]]]:
    """Compute inner products of two batches' gradients, of every left query with every right one: each belongs to one
    weight, and a weight's are to be added up.

    Args:
        rows, columns: Which queries of either batch.
    """
    return ((weight, by_term.sum((1, 3))) for weight, _, by_term in _cross_terms(left, right, rows, columns))


def own_products(found: Found) -> Iterator[tuple[Weight, Float[Tensor, "query"]]]:
    """Compute inner products of each query's gradients with themselves, as :func:`cross_products` does."""
    return ((weight, by_term.sum((1, 2))) for weight, _, by_term in _by_term(found, found, _dots))


def token_products(
    left: Found, right: Found, n_pos: int
) -> tuple[list[tuple[Weight, Float[Tensor, "left right"]]], Float[Tensor, "left pos right"]]:
    """Do as :func:`cross_products` for whole batches, and sum what the terms of each left token give, over all weights.
    What biases, norms and position schemes give is no token's."""
    by_token: Tensor | None = None
    everything = slice(None)
    products = []
    for weight, terms, by_term in _cross_terms(left, right, everything, everything):
        by_left = by_term.sum(3)
        products.append((weight, by_left.sum(1)))
        if by_token is None:
            by_token = by_left.new_zeros(len(by_left), n_pos, by_left.shape[2])
        if terms.at is not None:
            by_token.scatter_add_(1, terms.at.to(by_left.device)[..., None].expand_as(by_left), by_left)
    assert by_token is not None
    return products, by_token


def _cross_terms(
    left: Found, right: Found, rows: slice, columns: slice
) -> Iterator[tuple[Weight, Terms, Float[Tensor, "left left_term right right_term"]]]:
    """Give the products of every left with every right term."""

    def dots(x: Tensor, y: Tensor) -> Tensor:
        chosen = x[rows], y[columns]
        by_term = _dots(*(factor.flatten(0, 1) for factor in chosen))
        return by_term.view(*chosen[0].shape[:2], *chosen[1].shape[:2])

    return _by_term(left, right, dots)


def _by_term(
    left: Found, right: Found, dots: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[Weight, Terms, Tensor]]:
    """Give, weight by weight, the left terms and their products with the right ones: the products of the dot products
    of all factors. Dot products of what several weights read are computed once."""
    seen: dict[tuple[int, int], Tensor] = {}

    def once(x: Tensor, y: Tensor) -> Tensor:
        if (id(x), id(y)) not in seen:
            seen[id(x), id(y)] = dots(x, y)
        return seen[id(x), id(y)]

    for weight in left:
        for one in left[weight]:
            for other in right.get(weight, ()):  # an expert may be asked on one side only
                with torch.no_grad():
                    by_term = functools.reduce(torch.mul, map(once, one.factors, other.factors))
                yield weight, one, by_term


def _dots(left: Shaped[Tensor, "..."], right: Shaped[Tensor, "..."]) -> Float[Tensor, "*query left_term right_term"]:
    """Multiply every vector of one side with every one of the other; both have one more dimension where they are not
    one-hot."""
    if left.is_floating_point() and right.is_floating_point():
        return precise(left) @ precise(right).mT
    if left.is_floating_point():
        return _dots(right, left).mT
    if right.is_floating_point():
        return precise(torch.take_along_dim(right.mT, left[..., None], dim=-2))
    return (left[..., :, None] == right[..., None, :]).float()
