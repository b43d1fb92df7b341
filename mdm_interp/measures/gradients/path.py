"""Where learning went: what every part of a model added to the change of a loss, over a whole training run.

Formulas: docs/theory.md, section 13.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Query, batches
from mdm_interp.errors import UserError
from mdm_interp.measures.gradients.components import Part, part_of, parts_of
from mdm_interp.measures.gradients.first_order import mean_loss
from mdm_interp.measures.gradients.recording import recording
from mdm_interp.models.bridge import hooked
from mdm_interp.models.layers import precise
from mdm_interp.models.protocol import HookedModel

HALVINGS = 8
"""How often a step is halved at most."""


class LearningPath:
    """Adds up the changes of mean losses along the way that a model's weights take, part by part.

    Call :meth:`advance` after every change of the weights, whatever changed them: each step of an optimizer, say. Such
    a change counts as one straight step, along which the gradient is the mean of those at its ends. Where that misses
    what the step really changed, the step is halved. Every step, and every half, takes one backward pass per loss. The
    memory is that of two copies of the weights, and two more for each loss. Losses are computed in float32 at least:
    at half precision a small step would be lost in their rounding.

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
            UserError: a loss has no queries, or nothing of the model can be trained or differentiated.

        Warns:
            UserWarning: later, where the parts of a step leave out more than that however often it is halved.
        """
        self._model = hooked(model)
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not losses:
            raise UserError("losses: none are given; name the queries whose mean loss is to be followed")
        if empty := [name for name, queries in losses.items() if not queries]:
            raise UserError(f"losses: {empty[0]!r} has no queries; a mean needs at least one")
        if not trained:
            raise UserError("model: no parameter requires a gradient, so nothing can be learnt; unfreeze one")
        self._trained, self._tolerance = trained, tolerance
        self.parts = parts_of(trained)
        self._part_of_each = torch.tensor([self.parts.index(part_of(name)) for name in trained])
        with recording(model):
            self.learnt = {name: torch.zeros(len(self.parts), dtype=torch.float64) for name in losses}
            self._batches = {name: list(batches(queries, self._model.cfg)) for name, queries in losses.items()}
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
        with recording(self._model):
            before, self._here = self._here, self._look()
            for name, here in self._here.items():
                missing = self._add(name, before[name], here, HALVINGS)
                if missing > self._tolerance:
                    warnings.warn(
                        f"losses: the parts of this step's change of {name!r} leave out {missing:.1g} nats, however "
                        f"often it is halved, more than the tolerance of {self._tolerance:g}; take shorter steps, if "
                        "the loss does not jump there, as where other experts are chosen",
                        stacklevel=2,
                    )

    def _add(self, name: str, start: _Point, end: _Point, halvings: int) -> float:
        """Add a straight step; return what its parts leave out, or if it is halved, those of the worse half."""
        ends = zip(start.weights, end.weights, start.gradient, end.gradient, strict=True)
        each = torch.stack(
            [
                ((last.double() - first.double()) * (d_first.double() + d_last.double())).sum().cpu() / 2
                for first, last, d_first, d_last in ends
            ]
        )
        missing = abs(end.loss - start.loss - each.sum().item())
        if halvings and missing > self._tolerance:
            half_way = [(first + last) / 2 for first, last in zip(start.weights, end.weights, strict=True)]
            middle = self._measure(name, half_way)
            halves = (self._add(name, *ends, halvings - 1) for ends in ((start, middle), (middle, end)))
            return max(halves)
        self.learnt[name].index_add_(0, self._part_of_each, each)
        return missing

    def _look(self) -> dict[str, _Point]:
        """Measure every loss where the weights are, in float32 at least."""
        weights = [precise(parameter.detach().clone()) for parameter in self._trained.values()]
        return {name: self._measure(name, weights) for name in self._batches}

    def _measure(self, name: str, weights: list[Tensor]) -> _Point:
        """Measure a loss at other weights than the model's own."""
        at = [weight.detach().requires_grad_() for weight in weights]
        parameters = {name: precise(parameter.detach()) for name, parameter in self._model.named_parameters()}
        parameters |= zip(self._trained, at, strict=True)
        total, gradient = 0.0, [torch.zeros_like(weight) for weight in weights]
        count = sum(len(batch.tokens) for batch in self._batches[name])
        for batch in self._batches[name]:
            loss = mean_loss(self._model, parameters, batch, count)
            found = torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True)
            gradient = [so_far + of_batch for so_far, of_batch in zip(gradient, found, strict=True)]
            total += loss.item()
        return _Point(weights, total, gradient)


@dataclass(frozen=True)
class _Point:
    """A place in the space of weights, and a loss there."""

    weights: list[Tensor]
    loss: float
    gradient: list[Tensor]
