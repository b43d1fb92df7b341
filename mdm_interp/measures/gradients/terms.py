"""Gradients as sums of products, which are never multiplied out. Formulas: docs/theory.md, section 5."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mdm_interp.models.layers import precise

ROWS = 2048
"""Terms of one side that are multiplied with as many of the other at a time: 16 MB in float32."""
FEW, PIECES = 256, 4
"""A list of more than so many terms is cut into so many pieces at least: products that mirror each other are computed
once, except within a piece."""


@dataclass(frozen=True)
class Terms:
    """What batches of queries add to the gradients of one weight: each term is the outer product of its factors, and a
    query's gradient is the sum of its terms."""

    query: Int[Tensor, "term"]
    """Whose term this is, in increasing order."""
    factors: tuple[Shaped[Tensor, "term ..."], ...]
    """Vectors, one of each factor for a term; a factor of integers stands for one-hot vectors."""

    @classmethod
    def of_map(
        cls, first: int, x: Float[Tensor, "query pos *head input"], d: Float[Tensor, "query pos *other_head output"]
    ) -> list[Terms]:
        """List the gradients of a linear map from its inputs and its outputs' gradients: one, or one per head where
        both sides have heads. Terms that are 0 are left out: padding, and what the loss does not see.

        Args:
            first: The number of the batch's first query.
        """
        if x.ndim == d.ndim == 4:
            heads = zip(x.unbind(2), d.unbind(2), strict=True)
        else:
            heads = iter([(x.flatten(2), d.flatten(2))])
        return [cls.of_tokens(first, d_of_head, of_head, d_of_head) for of_head, d_of_head in heads]

    @classmethod
    def of_tokens(
        cls, first: int, d: Float[Tensor, "query pos size"], *factors: Shaped[Tensor, "query pos ..."]
    ) -> Terms:
        """Return one term for each token at which the gradient `d` is not 0."""
        seen = (d.amax(-1) != 0) | (d.amin(-1) != 0)
        query = first + torch.arange(len(seen), device=seen.device)[:, None].expand_as(seen)
        if bool(seen.all()):
            return cls(query.flatten(), tuple(factor.detach().flatten(0, 1) for factor in factors))
        return cls(query[seen], tuple(factor.detach()[seen] for factor in factors))

    @classmethod
    def of_vectors(cls, first: int, vectors: Float[Tensor, "query *size"]) -> Terms:
        """Return one term for each query: its gradient itself."""
        return cls(first + torch.arange(len(vectors), device=vectors.device), (vectors.detach().flatten(1),))

    @cached_property
    def asked(self) -> tuple[int, int]:
        """The range of queries that have terms."""
        first, last = self.query[[0, -1]].tolist()
        return first, last + 1

    def between(self, start: int, stop: int) -> Terms:
        """Return the terms of some of the queries, which are numbered from `start` on."""
        kept = (self.query >= start) & (self.query < stop)
        return Terms(self.query[kept] - start, tuple(factor[kept] for factor in self.factors))

    def pieces(self) -> Iterator[Terms]:
        """Cut the list into pieces of at most :data:`ROWS` terms."""
        size = min(ROWS, max(FEW, math.ceil(len(self.query) / PIECES)))
        cut = [tensor.split(size) for tensor in (self.query, *self.factors)]
        for query, *factors in zip(*cut, strict=True):
            if len(query):
                yield Terms(query, tuple(factors))


def add_products(
    total: Float[Tensor, "left right"], left: Sequence[Terms], right: Sequence[Terms] | None = None
) -> None:
    """Add the inner products of all queries' gradients of one weight, each of which is the sum of its lists of terms.

    Args:
        total: In float64, on the CPU.
        right: Default: the same as `left`.
    """
    rows = [piece for terms in left for piece in terms.pieces()]
    columns = None if right is None else [piece for terms in right for piece in terms.pieces()]
    for i, row in enumerate(rows):
        for column in rows[i:] if columns is None else columns:
            (top, bottom), (near, far), products = _products(row, column)
            total[top:bottom, near:far] += products
            if columns is None and column is not row:
                total[near:far, top:bottom] += products.T


def _products(left: Terms, right: Terms) -> tuple[tuple[int, int], tuple[int, int], Float[Tensor, "left right"]]:
    """Return the range of queries on either side, and their inner products."""
    by_term = functools.reduce(torch.mul, map(_dots, left.factors, right.factors))
    for terms in (left, right):
        start, stop = terms.asked
        summed = by_term.new_zeros(stop - start, by_term.shape[1])
        by_term = summed.index_add_(0, terms.query - start, by_term).T
    return left.asked, right.asked, by_term.cpu().double()


def _dots(left: Shaped[Tensor, "left ..."], right: Shaped[Tensor, "right ..."]) -> Float[Tensor, "left right"]:
    """Multiply every vector of one side with every one of the other."""
    if not left.is_floating_point():
        return right.T[left] if right.is_floating_point() else (left[:, None] == right).float()
    return left[:, right] if not right.is_floating_point() else precise(left) @ precise(right).T
