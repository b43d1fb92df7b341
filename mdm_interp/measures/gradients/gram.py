"""Inner products of all queries' gradients at once, for about the price of one batched forward and backward pass.

No gradient of a weight is ever formed. Formulas: docs/theory.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Query, QueryBatch, batches
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.measures.gradients.backward import LOGITS, RowLoss, SourceAttention, layer_by_layer
from mdm_interp.measures.gradients.bridged import bridge_backward
from mdm_interp.measures.gradients.components import COMPONENTS, Part, part_of, parts_of
from mdm_interp.measures.gradients.terms import Found, Weight, cross_products, own_products
from mdm_interp.models.bridge import BridgedTransformer, hooked
from mdm_interp.models.inputs import require_numbers
from mdm_interp.shards import is_shared, shared_out

Components = Collection[str] | None
"""Which of :data:`~mdm_interp.measures.gradients.components.COMPONENTS`; None is all."""
Layers = Collection[int | None] | None
"""Which layers; None among them is what lies outside of all, None alone is everything."""

TOKENS = 2048
"""How many a batch has at most, in queries of one length: their products with those of another are 16 MB in float32."""


@dataclass(frozen=True)
class Gram:
    """Inner products of gradients, in nats^2 per squared unit of the parameters; sums over parts are those of the
    parts together. All in float64, on the CPU."""

    parts: tuple[Part, ...]
    """All that the model has: what lies outside of layers, then layer by layer."""
    inner: Float[Tensor, "part left right"]
    left_squares: Float[Tensor, "part left"]
    """The inner product of each left query's gradient with itself."""
    right_squares: Float[Tensor, "part right"]

    @property
    def components(self) -> tuple[str, ...]:
        """The components that the model has."""
        held = {component for _, component in self.parts}
        return tuple(component for component in COMPONENTS if component in held)

    def within(self, components: Components = None, layers: Layers = None) -> Float[Tensor, "left right"]:
        """Sum the inner products over components and layers.

        Raises:
            UserError: the model has no such part.
        """
        return self.inner[self._chosen(components, layers)].sum(0)

    def cosine(self, components: Components = None, layers: Layers = None) -> Float[Tensor, "left right"]:
        """Compute the cosine of every left with every right gradient within components and layers; NaN where one of the
        two is 0 there.

        Raises:
            UserError: the model has no such part.
        """
        chosen = self._chosen(components, layers)
        left, right = (
            squares[chosen].sum(0).clamp(min=0).sqrt() for squares in (self.left_squares, self.right_squares)
        )
        norms = left[:, None] * right
        return torch.where(norms > 0, self.inner[chosen].sum(0) / norms, torch.nan)

    def _chosen(self, components: Components, layers: Layers) -> list[int]:
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
        return chosen


def gram(
    model: Any,
    left: Sequence[Query],
    right: Sequence[Query] | None = None,
    *,
    loss: RowLoss | SourceAttention = answer_loss,
    report: Callable[[int], None] | None = None,
) -> Gram:
    """Compute the inner product of every left query's gradient with every right query's, per layer and component.

    Gradients are of each query's own loss, and computed in float32 at least. Memory holds, beside the weights, one
    layer's in float32, its activations for all queries, and the residual streams that enter the layers. Hooks of the
    user's act; where a model is large they run twice.

    Args:
        right: Default: the same as `left`.
        loss: Computes each query's loss from the logits at its readout positions; default: the answer's, in nats. Or
            the attention that gradients are taken of instead.
        report: Told after each step how many are done: the readout (each part of a large vocabulary), each layer, and
            what comes before them. Where workers share the queries, nobody is told.

    Raises:
        UserError: there are no queries, or the attention asked for is not there: no such layer or head, or a bridge.

    Source: docs/theory.md, section 5; arXiv 1510.01799.
    """
    if not left or not (right is None or right):
        raise UserError("queries: gradients need at least one query on either side, got none")
    if is_shared(model):
        return _gram(model, left, left if right is None else right, loss, None)
    return _gram(hooked(model), left, right, loss, report)


def _joined(parts: Sequence[Gram], order: Tensor) -> Gram:
    """Put together the products of some left queries each with all right ones."""
    inner, squares = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("inner", "left_squares"))
    return replace(parts[0], inner=inner[:, order], left_squares=squares[:, order])


@shared_out("left", merge=_joined)
def _gram(
    model: Any,
    left: Sequence[Query],
    right: Sequence[Query] | None,
    loss: RowLoss | SourceAttention,
    report: Callable[[int], None] | None,
) -> Gram:
    asked = [*left, *(right or [])]
    model = hooked(model)
    longest = max(len(query.tokens) for query in asked)
    size = max(1, min(TOKENS, LOGITS // model.cfg.d_vocab) // longest)
    rows = list(_pieces(0, len(left), size))
    columns = rows if right is None else list(_pieces(len(left), len(asked), size))

    parts = parts_of(name for name, _ in model.named_parameters())
    inner = torch.zeros(len(parts), len(left), len(left if right is None else right), dtype=torch.float64)
    squares = torch.zeros(len(parts), len(asked), dtype=torch.float64)

    def add(total: Tensor, weights: Sequence[Weight], products: Tensor) -> None:
        total.index_add_(0, torch.tensor([parts.index(part_of(name)) for name, _ in weights]), products)

    with torch.enable_grad():
        for done, found in enumerate(gradients_of(model, list(batches(asked, model.cfg, size)), loss), start=1):
            if any(found):
                for of_batch, total in zip(found, squares.split(size, dim=1), strict=True):
                    add(total, *own_products(of_batch))
                for i, row in enumerate(rows):
                    for column in rows[i:] if right is None else columns:
                        left_found, right_found = found[row.batch], found[column.batch]
                        weights, products = cross_products(left_found, right_found, row.within, column.within)
                        add(inner[:, row.place, column.place], weights, products)
                        if right is None and column is not row:
                            add(inner[:, column.place, row.place], weights, products.mT)
            found.clear()
            if report is not None:
                report(done)
    require_numbers(squares, model.cfg.dtype)
    sides = squares.split([len(left), len(asked) - len(left)], dim=1)
    return Gram(parts, inner, sides[0], sides[0] if right is None else sides[1])


def gradients_of(model: Any, queries: Sequence[QueryBatch], loss: RowLoss | SourceAttention) -> Iterator[list[Found]]:
    """Give every query's gradients, part by part, batch by batch within a part."""
    if isinstance(model, BridgedTransformer):
        if isinstance(loss, SourceAttention):
            raise UserError("loss: a bridge's attention has no gradients; load the checkpoint with load_checkpoint")
        return bridge_backward(model, queries, loss)
    return layer_by_layer(model, queries, loss)


class _Piece(NamedTuple):
    """Those of a batch's queries that are on one side."""

    batch: int
    within: slice
    """Which of the batch's queries."""
    place: slice
    """Which of the side's."""


def _pieces(start: int, stop: int, size: int) -> Iterator[_Piece]:
    """Cut a side, the queries from `start` to `stop`, where batches of `size` end."""
    for batch in range(start // size, -(-stop // size)):
        first, last = max(start, batch * size), min(stop, (batch + 1) * size)
        yield _Piece(batch, slice(first - batch * size, last - batch * size), slice(first - start, last - start))
