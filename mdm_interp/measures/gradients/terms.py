"""Gradients as sums of products, which are never multiplied out. Formulas: docs/theory.md, section 5."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mdm_interp.models.layers import precise

Weight = tuple[str, int]
"""A parameter's name, and which of its heads."""


@dataclass(frozen=True)
class Real:
    """Which terms may be other than 0; all others are 0."""

    index: Int[Tensor, "real"]
    """Indices into all sequences' terms, one sequence after the other."""
    counts: Sequence[int]
    """How many each sequence has."""

    @classmethod
    def where(cls, mask: Bool[Tensor, "sequence term"]) -> Real | None:
        """Return where a mask is true; None if it is everywhere."""
        counts = mask.sum(1).tolist()
        return None if sum(counts) == mask.numel() else cls(mask.flatten().nonzero().flatten(), counts)

    def within(self, start: int, stop: int) -> Int[Tensor, "real"]:
        """Return those of some sequences."""
        first = sum(self.counts[:start])
        return self.index[first : first + sum(self.counts[start:stop])]


@dataclass(frozen=True)
class Terms:
    """What one batch of sequences adds to the gradients of one weight: each term is the outer product of its factors,
    and a sequence's gradient is the sum of its terms."""

    factors: tuple[Shaped[Tensor, "sequence term ..."], ...]
    """Vectors, one of each factor for a term; a factor of integers stands for one-hot vectors."""
    at: Int[Tensor, "sequence term"] | None = None
    """The position of the token that each term is of. None: terms are of sequences, not of tokens."""
    real: Real | None = None
    """None: any term may be something else than 0."""

    @classmethod
    def of_tokens(cls, *factors: Shaped[Tensor, "sequence pos ..."], real: Real | None = None) -> Terms:
        """Return one term for each token, in order."""
        n_sequence, n_pos = factors[0].shape[:2]
        return cls(factors, torch.arange(n_pos, device=factors[0].device).expand(n_sequence, n_pos), real)

    @classmethod
    def of_vectors(cls, vectors: Float[Tensor, "sequence *size"]) -> Terms:
        """Return one term for each sequence: its gradient itself."""
        return cls((vectors.flatten(1)[:, None],))

    @classmethod
    def of_map(
        cls,
        x: Float[Tensor, "sequence pos *head input"],
        d: Float[Tensor, "sequence pos *other_head output"],
        real: Real | None = None,
    ) -> list[Terms]:
        """List the gradients of a linear map from its inputs and its outputs' gradients: one, or one per head where
        both sides have heads."""
        if x.ndim == d.ndim == 4:
            return [cls.of_tokens(*pair, real=real) for pair in zip(x.unbind(2), d.unbind(2), strict=True)]
        return [cls.of_tokens(x if x.ndim == 3 else x.flatten(2), d.flatten(2), real=real)]


Found = Mapping[Weight, Sequence[Terms]]
"""What one batch of sequences adds to the gradients of some weights."""


class Packed(NamedTuple):
    """Terms of a batch, one after the other, without those that are known to be 0."""

    factors: tuple[Shaped[Tensor, "term ..."], ...]
    owner: Int[Tensor, "term"]
    """Whose gradient each is part of."""
    at: Int[Tensor, "term"] | None


PackedFound = Mapping[Weight, Sequence[Packed]]


def pack(found: Found, owner: Int[Tensor, "sequence"], rows: slice = slice(None)) -> PackedFound:
    """Pack what was found of a batch.

    Args:
        owner: Whose gradient each sequence's is part of.
        rows: Which sequences; default: all.
    """
    start, stop, _ = rows.indices(len(owner))
    seen: dict[tuple[int, int], Tensor] = {}

    def chosen(x: Tensor, real: Real | None) -> Tensor:
        return x[rows].flatten(0, 1) if real is None else x.flatten(0, 1)[real.within(start, stop).to(x.device)]

    def once(x: Tensor, real: Real | None) -> Tensor:
        """Keep one tensor of what several weights share."""
        if (id(x), id(real)) not in seen:
            seen[id(x), id(real)] = chosen(x, real)
        return seen[id(x), id(real)]

    def packed(terms: Terms) -> Packed:
        n_sequence, n_term = terms.factors[0].shape[:2]
        owners = owner.to(terms.factors[0].device)[:, None].expand(n_sequence, n_term)
        at = None if terms.at is None else once(terms.at, terms.real)
        factors = tuple(once(factor, terms.real) for factor in terms.factors)
        return Packed(factors, chosen(owners, terms.real), at)

    return {weight: [packed(terms) for terms in listed] for weight, listed in found.items()}


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
    left: PackedFound, right: PackedFound, n_left: int, n_right: int
) -> Iterator[tuple[Weight, Float[Tensor, "left right"]]]:
    """Compute inner products of two batches' gradients, of every left owner's with every right one's: each belongs to
    one weight, and a weight's are to be added up."""
    for weight, one, other, by_term in _by_term(left, right, _dots):
        of_left = _summed(by_term, one.owner, n_left)
        yield weight, _summed(of_left.mT, other.owner, n_right).mT


def token_products(
    left: PackedFound, right: PackedFound, n_left: int, n_right: int, n_pos: int
) -> tuple[list[tuple[Weight, Float[Tensor, "left right"]]], Float[Tensor, "left pos right"]]:
    """Do as :func:`cross_products`, and sum what the terms of each left token give, over all weights. What biases,
    norms and position schemes give is no token's."""
    by_token: Tensor | None = None
    products = []
    for weight, one, other, by_term in _by_term(left, right, _dots):
        of_right = _summed(by_term.mT, other.owner, n_right).mT
        products.append((weight, _summed(of_right, one.owner, n_left)))
        if by_token is None:
            by_token = of_right.new_zeros(n_left * n_pos, n_right)
        if one.at is not None:
            token = one.owner.to(by_token.device) * n_pos + one.at.to(by_token.device)
            by_token.index_add_(0, token, of_right.to(by_token.device))
    assert by_token is not None
    return products, by_token.unflatten(0, (n_left, n_pos))


def own_products(found: Found, copies: int = 1) -> Iterator[tuple[Weight, Float[Tensor, "owner"]]]:
    """Compute inner products of gradients with themselves, as :func:`cross_products` does.

    Args:
        copies: How many sequences, one after the other, each owner has.
    """

    for copy in range(copies):

        def dots(x: Tensor, y: Tensor, copy: int = copy) -> Tensor:
            one, all_copies = x.unflatten(0, (-1, copies))[:, copy], y.unflatten(0, (-1, copies)).flatten(1, 2)
            return _dots(one, all_copies)

        for weight, *_, by_term in _by_term(found, found, dots):
            yield weight, by_term.sum((1, 2))


def _summed(
    rows: Float[Tensor, "term column"], owner: Int[Tensor, "term"], count: int
) -> Float[Tensor, "owner column"]:
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, owner.to(rows.device), rows)


OfWeight = TypeVar("OfWeight", Terms, Packed)


def _by_term(
    left: Mapping[Weight, Sequence[OfWeight]],
    right: Mapping[Weight, Sequence[OfWeight]],
    dots: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[tuple[Weight, OfWeight, OfWeight, Float[Tensor, "*owner left_term right_term"]]]:
    """Give, weight by weight, the terms of both sides and the products of the dot products of all their factors. Dot
    products of what several weights read are computed once."""
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
                yield weight, one, other, by_term


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
