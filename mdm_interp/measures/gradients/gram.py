"""Inner products of all queries' gradients at once, for about the price of one batched forward and backward pass.

No gradient of a weight is ever formed. Formulas: docs/theory.md, section 5.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Query, QueryBatch, batches
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.measures.gradients.backward import LOGITS, RowLoss, SourceAttention, activations, layer_by_layer
from mdm_interp.measures.gradients.bridged import bridge_backward
from mdm_interp.measures.gradients.components import COMPONENTS, Part, part_of, parts_of
from mdm_interp.measures.gradients.recording import recording
from mdm_interp.measures.gradients.terms import Step, Sums, cross_products, own_products
from mdm_interp.models.bridge import BridgedTransformer
from mdm_interp.models.inputs import require_numbers
from mdm_interp.shards import is_shared, shared_out

Components = Collection[str] | None
"""Which of :data:`~mdm_interp.measures.gradients.components.COMPONENTS`; None is all."""
Layers = Collection[int | None] | None
"""Which layers; None among them is what lies outside of all, None alone is everything."""

TOKENS = 2048
"""How many a batch has at most, in queries of one length: their products with those of another are 16 MB in float32."""
BLOCK = 2**29
"""Entries that are kept of all queries in a block at most: 2 GB in float32."""


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
    left: Iterable[Query],
    right: Iterable[Query] | None = None,
    *,
    loss: RowLoss | SourceAttention = answer_loss,
    report: Callable[[int], None] | None = None,
) -> Gram:
    """Compute the inner product of every left query's gradient with every right query's, per layer and component.

    Gradients are of each query's own loss, and computed in float32 at least. Memory holds, beside the weights, one
    layer's in float32, its activations for the right queries and a batch of the left, and the residual streams that
    enter the layers. Where these would be more than :data:`BLOCK`, queries are taken block by block. Hooks of the
    user's act; where a model is large or queries are many they run more than once.

    Args:
        right: Default: the same as `left`.
        loss: Computes each query's loss from the logits at its readout positions; default: the answer's, in nats. Or
            the attention that gradients are taken of instead.
        report: Told after each step how many are done: the readout (each part of a large vocabulary), each layer, and
            what comes before them; again for each block. Where workers share the queries, nobody is told.

    Raises:
        UserError: there are no queries, the model was made in inference mode, the loss is not one of each query's
            logits, or the attention asked for is not there: no such layer or head, or a bridge.

    Source: docs/theory.md, section 5; arXiv 1510.01799.
    """
    left, right = list(left), None if right is None else list(right)
    if not left or not (right is None or right):
        raise UserError("queries: gradients need at least one query on either side, got none")
    if is_shared(model):
        return _gram(model, left, left if right is None else right, loss, None)
    return _gram(model, left, right, loss, report)


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
    with recording(model) as model:
        others, done = left if right is None else right, itertools.count(1)
        parts = parts_of(name for name, _ in model.named_parameters())
        inner = torch.zeros(len(parts), len(left), len(others), dtype=torch.float64)
        squares = [torch.zeros(len(parts), len(side), dtype=torch.float64) for side in (left, others)]
        longest, span = (max(len(getattr(query, name)) for query in [*left, *others]) for name in ("tokens", "answer"))
        most = BLOCK // entries(model, longest, span)

        def tell() -> None:
            if report is not None:
                report(next(done))

        for rows, columns in blocks(most, len(left), None if right is None else len(right)):
            same = right is None and rows == columns
            found, *own = _of_block(model, parts, left[rows], None if same else others[columns], loss, tell)
            inner[:, rows, columns] = found
            for side, at, of_side in zip(squares, (rows, columns), own, strict=True):
                side[:, at] = of_side
            if right is None:
                inner[:, columns, rows] = found.mT
    for side in squares:
        require_numbers(side, model.cfg.dtype)
    return Gram(parts, inner, *squares)


def _of_block(
    model: Any,
    parts: Sequence[Part],
    left: Sequence[Query],
    right: Sequence[Query] | None,
    loss: RowLoss | SourceAttention,
    tell: Callable[[], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's inner products and either side's squares."""
    asked = left if right is None else [*right, *left]
    n_right = len(left if right is None else right)
    size = max(1, min(TOKENS, LOGITS // model.cfg.d_vocab) // max(len(query.tokens) for query in asked))
    columns = list(_pieces(0, n_right, size))
    rows = {row.batch: row for row in (columns if right is None else _pieces(n_right, len(asked), size))}
    queries = list(batches(asked, model.cfg, size))
    inner, squares = Sums(len(left), n_right), Sums(len(asked))
    for i, found, held in gradients_of(model, queries, loss, len(columns)):
        if found:
            for (name, _), product in own_products(found):
                squares.add(part_of(name), product, slice(i * size, (i + 1) * size))
            for row, column in ((rows[i], column) for column in columns[: i + 1] if i in rows):
                for (name, _), product in cross_products(found, held[column.batch], row.within, column.within):
                    inner.add(part_of(name), product, row.place, column.place)
                    if right is None and column is not row:
                        inner.add(part_of(name), product.mT, column.place, row.place)
        del found, held  # before the next are computed
        if i == len(queries) - 1:
            tell()
    of_right, of_left = squares.read(parts).split([n_right, len(asked) - n_right], dim=1)
    return inner.read(parts), of_right if right is None else of_left, of_right


def gradients_of(
    model: Any, queries: Sequence[QueryBatch], loss: RowLoss | SourceAttention, n_held: int
) -> Iterator[Step]:
    """Give every query's gradients, part by part, batch by batch within a part; those of the first `n_held` batches are
    held until the part's end."""
    if isinstance(model, BridgedTransformer):
        if isinstance(loss, SourceAttention):
            raise UserError("loss: a bridge's attention has no gradients; load the checkpoint with load_checkpoint")
        return bridge_backward(model, queries, loss, n_held)
    return layer_by_layer(model, queries, loss, n_held)


def entries(model: Any, n_pos: int, n_rows: int) -> int:
    """Tell about how many entries are kept of one sequence: the residual streams, what is found in a layer, or of a
    bridge in all at once, and until the end what is found in a tied unembedding at `n_rows` positions."""
    cfg = model.cfg
    at_once = cfg.n_layers if isinstance(model, BridgedTransformer) else 1
    tied = n_rows * cfg.d_vocab if cfg.tie_word_embeddings else 0
    return n_pos * cfg.d_model * (cfg.n_layers + 2) + at_once * activations(cfg, 1, n_pos) + tied


def blocks(most: int, n_left: int, n_right: int | None) -> list[tuple[slice, slice]]:
    """Cut two sides into blocks, so that one of either make `most` at most; a small side stays whole, as everything on
    it is computed again for each block of the other. With one side alone, pair its blocks in one order only."""
    if n_right is None:
        side = _cut(n_left, most if n_left <= most else most // 2)
        return [(rows, columns) for i, rows in enumerate(side) for columns in side[i:]]
    n_rows = min(n_left, most - min(n_right, most // 2))
    return [(rows, columns) for rows in _cut(n_left, n_rows) for columns in _cut(n_right, most - n_rows)]


def _cut(count: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


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
