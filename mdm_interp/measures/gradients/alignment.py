"""Coupling: how a change that the forward loss makes moves the reverse query.

Gradients of query losses, split by layer and by what the parameters do. Positive alignment means that a small step down
the forward loss also lowers the reverse loss; taking that step tells how far this reaches. Formulas: docs/theory.md,
sections 5 and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mdm_interp.data.queries import QueryPair
from mdm_interp.errors import UserError
from mdm_interp.measures.gradients.gram import Gram, gram
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast

Components = Collection[str] | None
"""Which of :data:`~mdm_interp.measures.gradients.components.COMPONENTS` a cosine is taken within; None is all."""
Layers = Collection[int | None] | None
"""Which layers a cosine is taken within; None among them is what lies outside of all, None alone is everything."""


@dataclass(frozen=True)
class Alignment:
    """Inner products of all pairs' forward and reverse gradients, and the cosines that they make.

    Every cosine is of gradients within some components and layers, NaN where one of the two is zero there. Asking for
    what the model does not have raises a UserError.
    """

    gram: Gram
    """Of all pairs' forward queries, then all their reverse queries."""
    query_pairs: tuple[QueryPair, ...]

    @property
    def components(self) -> tuple[str, ...]:
        """Those that the model has."""
        return self.gram.components

    @cached_property
    def other_facts(self) -> Bool[Tensor, "forward_pair reverse_pair"]:
        """Which two pairs are of different facts."""
        facts = torch.tensor([pair.fact for pair in self.query_pairs])
        return facts[:, None] != facts

    def inner(self, components: Components = None, layers: Layers = None) -> Float[Tensor, "forward_pair reverse_pair"]:
        """Return the inner product of every forward with every reverse gradient, in nats^2 per squared unit of the
        parameters."""
        count = len(self.query_pairs)
        return self.gram.within(components, layers)[:count, count:]

    def cosine(
        self, components: Components = None, layers: Layers = None
    ) -> Float[Tensor, "forward_pair reverse_pair"]:
        """Compute the cosine of every forward with every reverse gradient."""
        inner, count = self.gram.within(components, layers), len(self.query_pairs)
        forward, reverse = inner.diagonal().clamp(min=0).sqrt().split(count)
        return _ratio(inner[:count, count:], forward[:, None] * reverse)

    def pair_cosine(self, components: Components = None, layers: Layers = None) -> Contrast[Float[Tensor, "sample"]]:
        """Compute the cosine of each pair's own forward and reverse gradients; null: of the forward gradient of every
        fact with the reverse gradients of all others, one by one."""
        cosine = self.cosine(components, layers)
        return Contrast(cosine.diagonal(), cosine[self.other_facts])

    def fact_cosine(self, components: Components = None, layers: Layers = None) -> Contrast[Float[Tensor, "pair"]]:
        """Compute the cosine of each pair's own forward and reverse gradients; null: that of its forward gradient with
        the reverse gradients of the pairs of other facts that are asked for the same side, in the mean. It is NaN where
        there are none."""
        cosine = self.cosine(components, layers)
        sides = [pair.side for pair in self.query_pairs]
        same_side = torch.tensor([[side == other for other in sides] for side in sides])
        return Contrast(cosine.diagonal(), cosine.where(self.other_facts & same_side, torch.nan).nanmean(1))

    def mean_cosine(self, components: Components = None, layers: Layers = None) -> float:
        """Compute the cosine of the gradients of the mean forward and the mean reverse loss: the direction training
        takes."""
        inner, count = self.gram.within(components, layers), len(self.query_pairs)
        forward, reverse = (inner[part, part].mean().clamp(min=0).sqrt() for part in _halves(count))
        return _ratio(inner[:count, count:].mean(), forward * reverse).item()


def _halves(count: int) -> tuple[slice, slice]:
    return slice(None, count), slice(count, None)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y > 0, x / y, torch.nan)


def gradient_alignment(
    model: HookedModel, query_pairs: Sequence[QueryPair], *, report: Callable[[int], None] | None = None
) -> Alignment:
    """Compare the forward gradient of every pair with the reverse gradient of every pair, per layer and component.

    It is defined for an ARM's pairs as well. Gradients are of each query's own loss, in nats.

    Args:
        report: As of :func:`~mdm_interp.measures.gradients.gram.gram`.

    Raises:
        UserError: there are no pairs.

    Source: docs/theory.md, section 5.
    """
    if not query_pairs:
        raise UserError("query_pairs: gradients need at least one pair, got none")
    asked = [pair.forward for pair in query_pairs] + [pair.reverse for pair in query_pairs]
    return Alignment(gram(model, asked, report=report), tuple(query_pairs))
