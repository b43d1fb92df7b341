"""Inner products of all queries' gradients at once, for about the price of one batched forward and backward pass.

No gradient of a weight is ever formed. Formulas: docs/theory.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Query, batches
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.measures.gradients.backward import RowLoss, layer_by_layer
from mdm_interp.measures.gradients.bridged import bridge_backward
from mdm_interp.measures.gradients.components import COMPONENTS, Part, part_of
from mdm_interp.measures.gradients.terms import add_products
from mdm_interp.models.bridge import BridgedTransformer, hooked


@dataclass(frozen=True)
class Gram:
    """Inner products of gradients, in nats^2 per squared unit of the parameters; sums over parts are those of the
    parts together."""

    parts: tuple[Part, ...]
    """All that the model has: what lies outside of layers, then layer by layer."""
    inner: Float[Tensor, "part left right"]
    """In float64, on the CPU."""

    @property
    def components(self) -> tuple[str, ...]:
        """The components that the model has."""
        held = {component for _, component in self.parts}
        return tuple(component for component in COMPONENTS if component in held)

    def within(
        self, components: Collection[str] | None = None, layers: Collection[int | None] | None = None
    ) -> Float[Tensor, "left right"]:
        """Sum over components and layers.

        Args:
            components: Which of :data:`~mdm_interp.measures.gradients.components.COMPONENTS`. Default: all.
            layers: Which layers; None among them is what lies outside of all layers. Default: all, and what lies
                outside.

        Raises:
            UserError: the model has no such part.
        """
        chosen = [
            i
            for i, (layer, component) in enumerate(self.parts)
            if (layers is None or layer in layers) and (components is None or component in components)
        ]
        if not chosen:
            asked = "all layers" if layers is None else f"layers {list(layers)}"
            raise UserError(
                f"components, layers: the model has no {'part' if components is None else list(components)} in {asked}"
            )
        return self.inner[chosen].sum(0)


def gram(
    model: Any,
    left: Sequence[Query],
    right: Sequence[Query] | None = None,
    *,
    loss: RowLoss = answer_loss,
    report: Callable[[int], None] | None = None,
) -> Gram:
    """Compute the inner product of every left query's gradient with every right query's, per layer and component.

    Gradients are of each query's own loss, and computed in float32 at least. Memory holds, beside the weights, one
    layer's in float32, its activations for all queries, and the residual streams that enter the layers. Hooks of the
    user's act; where a model is large they run twice.

    Args:
        right: Default: the same as `left`.
        loss: Computes each query's loss from the logits at its readout positions. Default: the answer's, in nats.
        report: Told after each step how many are done: the readout, each layer, and what comes before them.

    Raises:
        UserError: there are no queries.

    Source: docs/theory.md, section 5; arXiv 1510.01799.
    """
    asked = [*left, *(right or [])]
    if not left or not (right is None or right):
        raise UserError("queries: gradients need at least one query on either side, got none")
    model = hooked(model)
    total = {
        part: torch.zeros(len(left), len(left if right is None else right), dtype=torch.float64)
        for part in sorted({part_of(name) for name, _ in model.named_parameters()}, key=_place)
    }
    with torch.enable_grad():
        backward: Any = bridge_backward if isinstance(model, BridgedTransformer) else layer_by_layer
        for done, found in enumerate(backward(model, list(batches(asked, model.cfg)), loss), start=1):
            for (name, _), terms in found.items():
                if right is None:
                    add_products(total[part_of(name)], terms)
                else:
                    sides = (0, len(left)), (len(left), len(asked))
                    add_products(total[part_of(name)], *([one.between(*side) for one in terms] for side in sides))
            found.clear()
            if report is not None:
                report(done)
    return Gram(tuple(total), torch.stack(list(total.values())))


def _place(part: Part) -> tuple[int, int]:
    """Return where a part comes among all."""
    layer, component = part
    return -1 if layer is None else layer, COMPONENTS.index(component)
