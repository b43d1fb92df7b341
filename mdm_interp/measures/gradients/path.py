"""Where learning went: what every part of a model added to the change of a loss, over a whole training run.

Formulas: docs/theory.md, section 13.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Query, batches
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.gradients.components import Part, part_of, parts_of
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel

HALVINGS = 8
"""How often a step is halved at most."""


class LearningPath:
    """Adds up the changes of mean losses along the way that a model's weights take, part by part.

    Call :meth:`advance` after every change of the weights, whatever changed them: each step of an optimizer, say. Such
    a change counts as one straight step, along which the gradient is the mean of those at its ends. Where that misses
    what the step really changed, the step is halved. Every step, and every half, takes one backward pass per loss. The
    memory is that of two copies of the weights, and two more for each loss.

        path = LearningPath(model, {"forward": forward_queries, "reverse": reverse_queries})
        for batch in data:
            loss(model, batch).backward()
            optimizer.step()
            path.advance()
        path.learnt["reverse"]

    Source: docs/theory.md, section 13.
    """

    parts: tuple[Part, ...]
    """Those with parameters that can be trained: what lies outside of layers, then layer by layer."""
    learnt: dict[str, Float[Tensor, "part"]]
    """For each loss, its change through each part, in nats; negative is learnt."""

    def __init__(self, model: HookedModel, losses: Mapping[str, Sequence[Query]], *, tolerance: float = 1e-4) -> None:
        """Start where the model is.

        Args:
            losses: By name, the queries whose mean loss it is.
            tolerance: How much of a step's change its parts may leave out, in nats.

        Raises:
            UserError: a loss has no queries, or nothing of the model can be trained.
        """
        self._model = hooked(model)
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not losses:
            raise UserError("losses: none are given; name the queries whose mean loss is to be followed")
        if empty := [name for name, queries in losses.items() if not queries]:
            raise UserError(f"losses: {empty[0]!r} has no queries; a mean needs at least one")
        if not trained:
            raise UserError("model: no parameter requires a gradient, so nothing can be learnt; unfreeze one")
        self._parameters, self._tolerance = list(trained.values()), tolerance
        self.parts = parts_of(trained)
        self._part_of_each = torch.tensor([self.parts.index(part_of(name)) for name in trained])
        self._batches = {name: list(batches(queries, self._model.cfg)) for name, queries in losses.items()}
        self.learnt = {name: torch.zeros(len(self.parts), dtype=torch.float64) for name in losses}
        self._here = self._look()
        self._start = {name: here.loss for name, here in self._here.items()}

    @property
    def change(self) -> dict[str, float]:
        """How much each loss has really changed, in nats."""
        return {name: here.loss - self._start[name] for name, here in self._here.items()}

    def within(self, loss: str, components: Collection[str]) -> float:
        """Return a loss' change through some components of all layers, in nats; 0 through what the model lacks."""
        held = torch.tensor([component in components for _, component in self.parts])
        return self.learnt[loss][held].sum().item()

    def advance(self) -> None:
        """Add the step from where the weights were to where they are."""
        before, self._here = self._here, self._look()
        for name, here in self._here.items():
            self._add(name, before[name], here, HALVINGS)

    def _add(self, name: str, start: _Point, end: _Point, halvings: int) -> None:
        """Add a straight step."""
        ends = zip(start.weights, end.weights, start.gradient, end.gradient, strict=True)
        each = torch.stack(
            [
                ((last.double() - first.double()) * (d_first.double() + d_last.double())).sum().cpu() / 2
                for first, last, d_first, d_last in ends
            ]
        )
        if halvings and abs(end.loss - start.loss - each.sum().item()) > self._tolerance:
            middle = self._between(name, start, end)
            self._add(name, start, middle, halvings - 1)
            self._add(name, middle, end, halvings - 1)
        else:
            self.learnt[name].index_add_(0, self._part_of_each, each)

    def _look(self) -> dict[str, _Point]:
        """Measure every loss where the weights are."""
        weights = [parameter.detach().clone() for parameter in self._parameters]
        return {name: self._measure(name, weights) for name in self._batches}

    @torch.no_grad()
    def _between(self, name: str, start: _Point, end: _Point) -> _Point:
        """Measure a loss half-way, and bring the weights back."""
        middle = [(first + last) / 2 for first, last in zip(start.weights, end.weights, strict=True)]
        here = [parameter.clone() for parameter in self._parameters]
        try:
            for parameter, value in zip(self._parameters, middle, strict=True):
                parameter.copy_(value)
            return self._measure(name, middle)
        finally:
            for parameter, value in zip(self._parameters, here, strict=True):
                parameter.copy_(value)

    @torch.enable_grad()
    def _measure(self, name: str, weights: list[Tensor]) -> _Point:
        """Measure a loss at the weights that the model has."""
        total, gradient = 0.0, [torch.zeros_like(weight) for weight in weights]
        count = sum(len(batch.tokens) for batch in self._batches[name])
        for batch in self._batches[name]:
            logits = self._model(batch.tokens, attention_mask=batch.attention_mask)
            loss = query_loss(logits, batch).sum() / count
            found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
            gradient = [so_far + of_batch for so_far, of_batch in zip(gradient, found, strict=True)]
            total += loss.item()
        return _Point(weights, total, gradient)


@dataclass(frozen=True)
class _Point:
    """A place in the space of weights, and a loss there."""

    weights: list[Tensor]
    loss: float
    gradient: list[Tensor]
