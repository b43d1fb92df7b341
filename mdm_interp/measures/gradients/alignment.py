"""Coupling: how a change that the forward loss makes moves the reverse query.

Gradients of query losses, split by layer and by what the parameters do. Positive alignment means that a small step down
the forward loss also lowers the reverse loss; taking that step tells how far this reaches. Formulas: docs/theory.md,
sections 5 and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mdm_interp.data.queries import Direction, QueryPair, queries_of
from mdm_interp.errors import UserError
from mdm_interp.measures.gradients.gram import Components, Gram, Layers, gram
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast


@dataclass(frozen=True)
class Alignment:
    """Inner products of all pairs' forward and reverse gradients, and the cosines that they make.

    Every cosine is of gradients within some components and layers, NaN where one of the two is zero there. Asking for
    what the model does not have raises a UserError.
    """

    gram: Gram
    """Of all pairs' forward queries (left) with all their reverse queries (right)."""
    query_pairs: tuple[QueryPair, ...]

    @property
    def components(self) -> tuple[str, ...]:
        """Those that the model has."""
        return self.gram.components

    def among(self, pairs: Sequence[int]) -> Alignment:
        """Return the alignment of some of the pairs, by their indices."""
        return Alignment(self.gram.among(pairs, pairs), tuple(self.query_pairs[at] for at in pairs))

    @cached_property
    def other_facts(self) -> Bool[Tensor, "forward_pair reverse_pair"]:
        """Which two pairs are of different facts."""
        facts = torch.tensor([pair.fact for pair in self.query_pairs])
        return facts[:, None] != facts

    def pair_cosine(self, components: Components = None, layers: Layers = None) -> Contrast[Float[Tensor, "sample"]]:
        """Compute the cosine of each pair's own forward and reverse gradients; null: of the forward gradient of every
        fact with the reverse gradients of all others, one by one."""
        cosine = self.gram.cosine(components, layers)
        return Contrast(cosine.diagonal(), cosine[self.other_facts])

    def fact_cosine(self, components: Components = None, layers: Layers = None) -> Contrast[Float[Tensor, "pair"]]:
        """Compute the cosine of each pair's own forward and reverse gradients; null: that of its forward gradient with
        the reverse gradients of the pairs of other facts that are asked for the same side, in the mean. It is NaN where
        there are none."""
        cosine = self.gram.cosine(components, layers)
        sides = [pair.side for pair in self.query_pairs]
        same_side = torch.tensor([[side == other for other in sides] for side in sides])
        return Contrast(cosine.diagonal(), cosine.where(self.other_facts & same_side, torch.nan).nanmean(1))


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
    forward, reverse = (queries_of(query_pairs, way) for way in get_args(Direction))
    return Alignment(gram(model, forward, reverse, report=report), tuple(query_pairs))
