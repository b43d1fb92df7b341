"""Coupling of the mean losses, layer by layer. Formulas: docs/theory.md, section 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import QueryPair
from mdm_interp.measures.gradients.components import part_of
from mdm_interp.measures.gradients.first_order import Direction, direction_cosine, mean_gradient
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast


def layer_cosines(
    model: HookedModel, query_pairs: Sequence[QueryPair], groups: Mapping[str, Sequence[str]]
) -> dict[str, Contrast[Float[Tensor, "layer"]]]:
    """Compare in every layer the gradients of the mean forward and the mean reverse loss over one half of the facts:
    their cosine, mean over both halves; null: that of forward over one half with reverse over the other.

    Args:
        groups: The components that each cosine is taken within, by name; NaN in layers that have none of them.

    Source: docs/theory.md, section 5.
    """
    halves = [[pair for pair in query_pairs if pair.fact % 2 == half] for half in (0, 1)]
    forward = [_by_layer(mean_gradient(model, [pair.forward for pair in half])) for half in halves]
    reverse = [_by_layer(mean_gradient(model, [pair.reverse for pair in half])) for half in halves]

    def cosines(components: Sequence[str], reverse: Sequence[Mapping[int, Direction]]) -> Float[Tensor, "layer"]:
        both = list(zip(forward, reverse, strict=True))
        return torch.tensor(
            [sum(direction_cosine(f[layer], r[layer], components) for f, r in both) / 2 for layer in forward[0]]
        )

    return {
        name: Contrast(cosines(components, reverse), cosines(components, reverse[::-1]))
        for name, components in groups.items()
    }


def _by_layer(direction: Direction) -> dict[int, dict[str, Tensor]]:
    """Return the part of a direction in every layer."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in direction.items():
        layer, _ = part_of(name)
        if layer is not None:
            layers.setdefault(layer, {})[name] = tensor
    return layers
