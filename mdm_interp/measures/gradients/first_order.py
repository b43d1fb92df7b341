"""The first-order effect of a forward step on the reverse loss. Formulas: docs/theory.md, section 8."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from mdm_interp.data.queries import Query, QueryBatch, QueryPair, batches
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.gradients.components import COMPONENTS, component_of
from mdm_interp.measures.gradients.recording import recording
from mdm_interp.models.bridge import BridgedTransformer, hooked
from mdm_interp.models.layers import precise
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast

Direction = Mapping[str, Tensor]
"""One tensor per parameter, by its name."""


def _logits(model: Any, parameters: Mapping[str, Tensor], batch: QueryBatch) -> Tensor:
    """Compute the logits of a batch under other parameters."""
    if isinstance(model, BridgedTransformer):
        return model.functional(parameters, batch.tokens, batch.attention_mask)
    mask = {"attention_mask": batch.attention_mask}
    return functional_call(model, dict(parameters), (batch.tokens,), mask)


def mean_loss(model: HookedModel, parameters: Mapping[str, Tensor], batch: QueryBatch, count: int) -> Tensor:
    """Return what a batch adds to the mean loss of `count` queries."""
    return query_loss(_logits(model, parameters, batch), batch).sum() / count


def mean_gradient(model: HookedModel, queries: Sequence[Query]) -> dict[str, Tensor]:
    """Compute the gradient of the mean loss (nats) over the queries, per parameter, with one backward pass per batch of
    them. It is computed in float32 at least, which takes the memory of the weights once more in a model of half
    precision."""
    with recording(model) as model:
        parameters = {name: precise(weight.detach()).requires_grad_() for name, weight in model.named_parameters()}
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for batch in batches(queries, model.cfg):
            loss = mean_loss(model, parameters, batch, len(queries))
            for name, part in zip(total, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total[name] = total[name] + part
        return total


def inner_products(left: Direction, right: Direction) -> dict[str, float]:
    """Compute the inner product of two directions in every component that has parameters, and last in `all`."""
    inner: dict[str, float] = {}
    for name in left:
        product = (left[name].double() * right[name].double()).sum().item()
        inner[component_of(name)] = inner.get(component_of(name), 0.0) + product
    ordered = {component: inner[component] for component in COMPONENTS if component in inner}
    return {**ordered, "all": sum(ordered.values())}


def direction_cosine(left: Direction, right: Direction, components: Sequence[str]) -> float:
    """Return the cosine of two directions within these components; NaN where one of them is zero there, or has none."""

    def inner(one: Direction, other: Direction) -> float:
        products = inner_products(one, other)
        return sum(products.get(component, 0.0) for component in components)

    norms = (inner(left, left) * inner(right, right)) ** 0.5
    return inner(left, right) / norms if norms > 0 else float("nan")


def random_direction(like: Direction, seed: int) -> dict[str, Tensor]:
    """Draw a random direction that has the norm of `like` in every component: the null of a step."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in like.items()}
    wanted, got = inner_products(like, like), inner_products(drawn, drawn)
    scale = {component: (wanted[component] / got[component]) ** 0.5 for component in wanted}
    return {name: scale[component_of(name)] * tensor for name, tensor in drawn.items()}


@dataclass(frozen=True)
class FirstOrder:
    """Steps theta - eta d: the change of the mean losses that gradients predict, and the one that comes. In nats;
    negative is learnt."""

    components: tuple[str, ...]
    """Those that were moved, and last `all`, their sum."""
    etas: Float[Tensor, "eta"]
    """Step sizes, in increasing order."""
    predicted: Float[Tensor, "component eta"]
    """Of the reverse loss: -eta <d, g_r>."""
    predicted_forward: Float[Tensor, "component eta"]
    """Of the forward loss: -eta <d, g_f>."""
    reverse: Float[Tensor, "eta"]
    """Actual change of the mean reverse loss."""
    forward: Float[Tensor, "eta"]
    """Actual change of the mean forward loss."""
    steepness: float
    """The square of the norm of g_f: what the forward loss drops by per unit of step, to first order, if everything
    moves down it."""

    def slope(self) -> Float[Tensor, "eta"]:
        """Divide the actual by the predicted change of the reverse loss: 1 to first order; NaN where nothing is
        predicted."""
        predicted = self.predicted[-1]
        return torch.where(predicted != 0, self.reverse / predicted, torch.nan)

    def regime_end(self, tolerance: float = 0.1) -> float:
        """Find the largest step up to which the slope stays within `tolerance` of 1; NaN if no step does."""
        inside = ((self.slope() - 1).abs() <= tolerance).cumprod(0)
        return self.etas[int(inside.sum()) - 1].item() if inside.any() else float("nan")

    def transfer(self) -> Float[Tensor, "eta"]:
        """Return the nats of reverse loss won per nat of forward loss: the drop of the one over the first-order drop of
        the other, had everything moved down it."""
        return -self.reverse / (self.etas * self.steepness)

    def predicted_transfer(self) -> Float[Tensor, "eta"]:
        """Return what :meth:`transfer` is to first order."""
        return -self.predicted[-1] / (self.etas * self.steepness)


def first_order(
    model: Any,
    query_pairs: Sequence[QueryPair],
    etas: Sequence[float],
    components: Sequence[str] | None = None,
    direction: Direction | None = None,
) -> FirstOrder:
    """Step down the mean forward loss and see what that does to the mean reverse loss, against the prediction.

    This is computed in a float64 copy of the model, as a change of 1e-9 nats is lost in float32. The model stays as it
    is. It is defined for an ARM's pairs as well. Parts of a bridge that compute in float32 by themselves (norms, rotary
    embeddings) go on doing so, and steps below 1e-4 are lost in that.

    Args:
        etas: Step sizes.
        components: Which of :data:`COMPONENTS` move. Default: all that the model has.
        direction: Step along this instead of the mean forward gradient (:func:`random_direction` for a null).

    Raises:
        UserError: there are no pairs or no steps, a step is not positive, or the model lacks a component.

    Source: docs/theory.md, section 8.
    """
    if not query_pairs:
        raise UserError("query_pairs: a mean loss needs at least one pair, got none")
    if not etas or min(etas) <= 0:
        raise UserError(f"etas: expected positive step sizes, got {list(etas)}; a step of 0 changes nothing")
    with recording(model):
        model = hooked(copy.deepcopy(model).to(torch.float64))
    queries = {"forward": [pair.forward for pair in query_pairs], "reverse": [pair.reverse for pair in query_pairs]}
    gradients = {kind: mean_gradient(model, asked) for kind, asked in queries.items()}
    along = gradients["forward"] if direction is None else direction
    inner = {kind: inner_products(along, gradient) for kind, gradient in gradients.items()}
    moved = tuple(inner["forward"])[:-1] if components is None else tuple(components)
    unknown = set(moved) - set(inner["forward"])
    if unknown:
        has = ", ".join(list(inner["forward"])[:-1])
        raise UserError(f"components: the model has no {sorted(unknown)[0]!r}; choose among {has}")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def losses(eta: float) -> dict[str, float]:
        stepped = {
            name: parameter - eta * along[name].to(parameter) if component_of(name) in moved else parameter
            for name, parameter in parameters.items()
        }
        return {
            kind: sum(mean_loss(model, stepped, batch, len(asked)).item() for batch in batches(asked, model.cfg))
            for kind, asked in queries.items()
        }

    steps, before = sorted(etas), losses(0.0)
    after = [losses(eta) for eta in steps]
    size = torch.tensor(steps, dtype=torch.float64)

    def predicted(kind: str) -> Tensor:
        parts = torch.tensor([inner[kind][component] for component in moved], dtype=torch.float64)
        return -torch.cat([parts, parts.sum(0, keepdim=True)])[:, None] * size

    def actual(kind: str) -> Tensor:
        return torch.tensor([losses[kind] - before[kind] for losses in after], dtype=torch.float64)

    return FirstOrder(
        components=(*moved, "all"),
        etas=size,
        predicted=predicted("reverse"),
        predicted_forward=predicted("forward"),
        reverse=actual("reverse"),
        forward=actual("forward"),
        steepness=inner_products(gradients["forward"], gradients["forward"])["all"],
    )


def contrast_steps(
    model: Any, query_pairs: Sequence[QueryPair], etas: Sequence[float], components: Sequence[str], seed: int
) -> Contrast[FirstOrder]:
    """Compare a step down the mean forward loss with its null, a step as far in a random direction
    (:func:`random_direction`), each as in :func:`first_order`.

    Args:
        components: Which of :data:`COMPONENTS` move; those that the model lacks are left out.
        seed: Draws the random direction, which is the same whatever moves.

    Raises:
        UserError: there are no pairs or no steps, or a step is not positive.

    Source: docs/theory.md, section 8.
    """
    gradient = mean_gradient(model, [pair.forward for pair in query_pairs])
    held = {component_of(name) for name in gradient}
    moved = [component for component in components if component in held]
    random = random_direction(gradient, seed)
    return Contrast(
        first_order(model, query_pairs, etas, moved), first_order(model, query_pairs, etas, moved, direction=random)
    )
