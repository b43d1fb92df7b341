"""Coupling: how a change that the forward loss makes moves the reverse query.

Gradients of query losses, split by what the parameters do. Positive alignment means that a small step down the forward
loss also lowers the reverse loss; taking that step tells how far this reaches. Formulas: docs/theory.md, sections 5
and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, grad, vmap

from mdm_interp.data.queries import Query, QueryBatch, QueryPair, batches
from mdm_interp.inference.prediction import query_loss
from mdm_interp.models.bridge import BridgedTransformer, hooked
from mdm_interp.models.layers import precise
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast

COMPONENTS = ("embedding", "position", "Q", "K", "V", "O", "norms", "MLP", "unembedding")
"""`embedding` is W_E (also when it is tied), `position` what a position scheme learns; biases go with their weights."""

STORAGE, ROUTING = ("V", "O"), ("Q", "K")
"""The components that decide what is written once a source is attended, and how strongly it is attended."""

_BY_LEAF = {
    "W_E": "embedding",
    "W_Q": "Q",
    "b_Q": "Q",
    "W_K": "K",
    "b_K": "K",
    "W_V": "V",
    "b_V": "V",
    "W_O": "O",
    "b_O": "O",
    "w": "norms",
    "b": "norms",
    "W_in": "MLP",
    "b_in": "MLP",
    "W_gate": "MLP",
    "b_gate": "MLP",
    "W_out": "MLP",
    "b_out": "MLP",
    "W_U": "unembedding",
    "b_U": "unembedding",
}


def component_of(parameter: str) -> str:
    """Tell which of :data:`COMPONENTS` a parameter of a HookedTransformer belongs to, by its name."""
    return "position" if parameter.startswith("pos_embed.") else _BY_LEAF[parameter.rsplit(".", 1)[-1]]


def precise_parameters(model: HookedModel) -> dict[str, Tensor]:
    return {name: precise(parameter.detach()) for name, parameter in model.named_parameters()}


def query_gradients(
    model: HookedModel, queries: Sequence[Query], *, chunk: int = 64
) -> dict[str, Float[Tensor, "query size"]]:
    """Compute the gradient of each query's own loss (nats) in every component that has parameters, flattened, in
    float32 at least.

    Args:
        chunk: How many queries' gradients are computed at once (one after the other in a bridge).
    """
    model = hooked(model)
    parameters = precise_parameters(model)

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        unpadded: dict[str, Any] = {"attention_mask": None}
        one = QueryBatch(**unpadded | {name: tensor[None] for name, tensor in row.items()})
        return query_loss(answer_logits(model, parameters, one), one)[0]

    per_row = partial(_one_by_one, grad(loss)) if isinstance(model, BridgedTransformer) else vmap(grad(loss), (None, 0))

    per_component: dict[str, list[Tensor]] = {}
    for batch in batches(queries, model.cfg, size=chunk):
        rows = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
        flat: dict[str, list[Tensor]] = {}
        for name, gradient in per_row(parameters, rows).items():
            flat.setdefault(component_of(name), []).append(gradient.flatten(1))
        for component, parts in flat.items():
            per_component.setdefault(component, []).append(torch.cat(parts, dim=1))
    return {component: torch.cat(per_component[component]) for component in COMPONENTS if component in per_component}


def answer_logits(model: Any, parameters: Mapping[str, Tensor], batch: QueryBatch) -> Tensor:
    """Compute the logits of a batch under other parameters."""
    if isinstance(model, BridgedTransformer):
        return model.functional(parameters, batch.tokens, batch.attention_mask)
    mask = {"attention_mask": batch.attention_mask}
    return functional_call(model, dict(parameters), (batch.tokens,), mask)


def _one_by_one(
    gradient: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]],
    parameters: dict[str, Tensor],
    rows: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return what vmap would give; other people's networks branch on their input, which it does not allow."""
    each = [gradient(parameters, {name: x[row] for name, x in rows.items()}) for row in range(len(rows["tokens"]))]
    return {name: torch.stack([one[name] for one in each]) for name in parameters}


@dataclass(frozen=True)
class Alignment:
    """Inner products of forward and reverse gradients, in nats^2 per squared unit of the parameters."""

    components: tuple[str, ...]
    """Those that the model has, and last `all`, their sum."""
    facts: Int[Tensor, "pair"]
    inner: Float[Tensor, "component forward_pair reverse_pair"]
    """Forward gradient of one pair with reverse gradient of another; matched pairs on the diagonal."""
    forward_square: Float[Tensor, "component forward_pair other_pair"]
    """Forward gradients with each other; their squared norms on the diagonal."""
    reverse_square: Float[Tensor, "component reverse_pair other_pair"]

    def within(self, components: Sequence[str]) -> Alignment:
        """Return the same within these components only; `all` is their sum."""
        kept = [self.components.index(component) for component in components]

        def summed(products: Tensor) -> Tensor:
            return torch.cat([products[kept], products[kept].sum(0, keepdim=True)])

        squares = summed(self.forward_square), summed(self.reverse_square)
        return Alignment((*components, "all"), self.facts, summed(self.inner), *squares)

    def cosine(self) -> Float[Tensor, "component forward_pair reverse_pair"]:
        """Compute the cosine of every forward gradient with every reverse gradient; NaN where a gradient is zero."""
        forward = self.forward_square.diagonal(dim1=1, dim2=2).sqrt()
        reverse = self.reverse_square.diagonal(dim1=1, dim2=2).sqrt()
        return _ratio(self.inner, forward[:, :, None] * reverse[:, None, :])

    def pair_cosine(self) -> Contrast[Float[Tensor, "component sample"]]:
        """Compute the cosine of each pair's own forward and reverse gradients; null: of the forward gradient of every
        fact with the reverse gradients of all others."""
        cosine = self.cosine()
        return Contrast(cosine.diagonal(dim1=1, dim2=2), cosine[:, self.facts[:, None] != self.facts[None, :]])

    def mean_cosine(self) -> Float[Tensor, "component"]:
        """Compute the cosine of the gradients of the mean forward and the mean reverse loss: the direction training
        takes."""
        norms = (
            self.forward_square.mean((1, 2)).clamp(min=0).sqrt() * self.reverse_square.mean((1, 2)).clamp(min=0).sqrt()
        )
        return _ratio(self.inner.mean((1, 2)), norms)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y > 0, x / y, torch.nan)


def gradient_alignment(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Alignment:
    """Compare the forward gradient of every pair with the reverse gradient of every pair, per component.

    It is defined for an ARM's pairs as well.

    Source: docs/theory.md, section 5.
    """
    model = hooked(model)
    forward = query_gradients(model, [pair.forward for pair in query_pairs])
    reverse = query_gradients(model, [pair.reverse for pair in query_pairs])

    def gram(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
        parts = torch.stack([(left[name] @ right[name].T).double() for name in left])
        return torch.cat([parts, parts.sum(0, keepdim=True)]).cpu()

    return Alignment(
        components=(*forward, "all"),
        facts=torch.tensor([pair.fact for pair in query_pairs]),
        inner=gram(forward, reverse),
        forward_square=gram(forward, forward),
        reverse_square=gram(reverse, reverse),
    )
