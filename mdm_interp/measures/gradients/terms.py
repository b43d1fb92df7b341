"""Gradients as sums of products, which are never multiplied out. Formulas: docs/theory.md, section 5."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
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
            return [cls(pair) for pair in zip(x.unbind(2), d.unbind(2), strict=True)]
        return [cls((x if x.ndim == 3 else x.flatten(2), d.flatten(2)))]


Found = Mapping[Weight, Sequence[Terms]]
"""What one batch of queries adds to the gradients of some weights."""


def without_zeros(found: Found) -> dict[Weight, list[Terms]]:
    """Leave out terms whose last factor is 0, as far as all queries have some: padding, and what no loss sees."""
    listed = [(weight, terms, (terms.factors[-1] != 0).any(-1)) for weight in found for terms in found[weight]]
    counts = torch.stack([seen.sum(1).amax() for *_, seen in listed]).tolist()
    kept: dict[Weight, list[Terms]] = {}
    for (weight, terms, seen), count in zip(listed, counts, strict=True):
        if count < seen.shape[1]:
            rows = torch.arange(len(seen), device=seen.device)[:, None]
            chosen = seen.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
            terms = Terms(tuple(factor[rows, chosen] for factor in terms.factors))
        kept.setdefault(weight, []).append(terms)
    return kept


Dots = Callable[[Tensor, Tensor], Tensor]


def cross_products(
    left: Found, right: Found, rows: slice, columns: slice
) -> tuple[list[Weight], Float[Tensor, "product left right"]]:
    """Compute inner products of two batches' gradients, of every left query with every right one: each belongs to one
    weight, and a weight's are to be added up.

    Args:
        rows, columns: Which queries of either batch.
    """

    def dots(x: Tensor, y: Tensor) -> Float[Tensor, "left left_term right right_term"]:
        chosen = x[rows], y[columns]
        by_term = _dots(*(factor.flatten(0, 1) for factor in chosen))
        return by_term.view(*chosen[0].shape[:2], *chosen[1].shape[:2])

    return _products(left, right, dots, (1, 3))


def own_products(found: Found) -> tuple[list[Weight], Float[Tensor, "product query"]]:
    """Compute inner products of each query's gradients with themselves, as :func:`cross_products` does."""
    return _products(found, found, _dots, (1, 2))


@torch.no_grad()
def _products(left: Found, right: Found, dots: Dots, terms: tuple[int, int]) -> tuple[list[Weight], Tensor]:
    """Multiply the dot products of all factors and sum over terms; those of what several weights read are computed
    once. What is summed is in float64, on the CPU."""
    seen: dict[tuple[int, int], Tensor] = {}
    weights, products = [], []

    def once(x: Tensor, y: Tensor) -> Tensor:
        if (id(x), id(y)) not in seen:
            seen[id(x), id(y)] = dots(x, y)
        return seen[id(x), id(y)]

    for weight in left:
        for one in left[weight]:
            for other in right[weight]:
                weights.append(weight)
                by_term = functools.reduce(torch.mul, map(once, one.factors, other.factors))
                products.append(by_term.sum(terms))
    return weights, torch.stack(products).cpu().double()


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
