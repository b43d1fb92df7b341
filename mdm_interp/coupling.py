"""Coupling: how a change that the forward loss makes moves the reverse query.

Gradients of query losses, split by what the parameters do. Positive alignment means that a small step down the forward
loss also lowers the reverse loss. Formulas: docs/theory.md, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, grad, vmap

from mdm_interp.prediction import query_loss
from mdm_interp.queries import Query, QueryBatch, QueryPair, batches

COMPONENTS = ("embedding", "position", "Q", "K", "V", "O", "norms", "MLP", "unembedding")
"""`embedding` is W_E (also when it is tied), `position` a learned position table, Q, K, V include their biases."""

_BY_LEAF = {
    "W_E": "embedding",
    "W_pos": "position",
    "table": "position",
    "W_Q": "Q",
    "b_Q": "Q",
    "W_K": "K",
    "b_K": "K",
    "W_V": "V",
    "b_V": "V",
    "W_O": "O",
    "w": "norms",
    "b": "norms",
    "W_in": "MLP",
    "W_gate": "MLP",
    "W_out": "MLP",
    "W_U": "unembedding",
}


def component_of(parameter: str) -> str:
    """Which of :data:`COMPONENTS` a parameter of a HookedTransformer belongs to, by its name."""
    return _BY_LEAF[parameter.rsplit(".", 1)[-1]]


def query_gradients(model: Any, queries: Sequence[Query], *, chunk: int = 64) -> dict[str, Float[Tensor, "query size"]]:
    """The gradient of each query's own loss (nats) in every component that has parameters, flattened.

    Args:
        chunk: How many queries' gradients are computed at once.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        unpadded: dict[str, Any] = {"attention_mask": None}
        one = QueryBatch(**unpadded | {name: tensor[None] for name, tensor in row.items()})
        logits = functional_call(model, parameters, (one.tokens,), {"attention_mask": one.attention_mask})
        return query_loss(logits, one)[0]

    per_component: dict[str, list[Tensor]] = {}
    for batch in batches(queries, model.cfg, size=chunk):
        rows = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
        gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, rows)
        flat: dict[str, list[Tensor]] = {}
        for name, gradient in gradients.items():
            flat.setdefault(component_of(name), []).append(gradient.flatten(1))
        for component, parts in flat.items():
            per_component.setdefault(component, []).append(torch.cat(parts, dim=1))
    return {component: torch.cat(per_component[component]) for component in COMPONENTS if component in per_component}


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

    def cosine(self) -> Float[Tensor, "component forward_pair reverse_pair"]:
        """Cosine of every forward gradient with every reverse gradient; NaN where a gradient is zero."""
        forward = self.forward_square.diagonal(dim1=1, dim2=2).sqrt()
        reverse = self.reverse_square.diagonal(dim1=1, dim2=2).sqrt()
        return _ratio(self.inner, forward[:, :, None] * reverse[:, None, :])

    def matched(self) -> Float[Tensor, "component pair"]:
        """Cosine of each pair's own forward and reverse gradients."""
        return self.cosine().diagonal(dim1=1, dim2=2)

    def mismatched(self) -> Float[Tensor, "component sample"]:
        """The null: cosine of the forward gradient of one fact with the reverse gradient of another."""
        return self.cosine()[:, self.facts[:, None] != self.facts[None, :]]

    def mean_cosine(self) -> Float[Tensor, "component"]:
        """Cosine of the gradients of the mean forward and the mean reverse loss: the direction training takes."""
        norms = (
            self.forward_square.mean((1, 2)).clamp(min=0).sqrt() * self.reverse_square.mean((1, 2)).clamp(min=0).sqrt()
        )
        return _ratio(self.inner.mean((1, 2)), norms)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y > 0, x / y, torch.nan)


def gradient_alignment(model: Any, query_pairs: Sequence[QueryPair]) -> Alignment:
    """Forward against reverse gradients of every pair of pairs, per component.

    Defined for an ARM's pairs as well.

    Source: docs/theory.md, section 5.
    """
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
