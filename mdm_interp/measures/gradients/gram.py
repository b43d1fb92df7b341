"""Inner products of all queries' gradients at once, for about the price of one batched forward and backward pass.

No gradient of a weight is ever formed. Formulas: docs/theory.md, section 5.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.measures.gradients.asked import Asked, Sentence, ask, in_one_batch, listed, numbered
from mdm_interp.measures.gradients.backward import RowLoss, SourceAttention, activations, layer_by_layer
from mdm_interp.measures.gradients.bridged import bridge_backward
from mdm_interp.measures.gradients.components import COMPONENTS, Part, part_of, parts_of
from mdm_interp.measures.gradients.recording import recording
from mdm_interp.measures.gradients.terms import Found, PackedFound, Sums, cross_products, own_products, pack
from mdm_interp.models.bridge import BridgedTransformer, hooked
from mdm_interp.models.hooks import is_watched
from mdm_interp.models.inputs import require_numbers
from mdm_interp.shards import is_shared, shared_out

Components = Collection[str] | None
"""Which of :data:`~mdm_interp.measures.gradients.components.COMPONENTS`; None is all."""
Layers = Collection[int | None] | None
"""Which layers; None among them is what lies outside of all, None alone is everything."""

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

    def among(self, left: Sequence[int], right: Sequence[int]) -> Gram:
        """Return the products of some left queries with some right ones, by their indices."""
        rows, columns = (torch.as_tensor(side, dtype=torch.long) for side in (left, right))
        inner = self.inner[:, rows[:, None], columns]
        return Gram(self.parts, inner, self.left_squares[:, rows], self.right_squares[:, columns])

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
    left: Iterable[Query | Sentence] | Int[Tensor, "sentence pos"],
    right: Iterable[Query | Sentence] | Int[Tensor, "sentence pos"] | None = None,
    *,
    loss: RowLoss | SourceAttention = answer_loss,
    n_draws: int = 16,
    seed: int = 0,
    kept: Collection[int] = (),
    report: Callable[[int], None] | None = None,
) -> Gram:
    """Compute the inner product of every left query's gradient with every right query's, per layer and component.

    Either side may be sentences, as token ids, instead: the loss is then the denoising bound on a sentence's negative
    log-probability, in nats, estimated from masked copies; a causal model's is that of each next token.

    Gradients are of each query's own loss, and computed in float32 at least. Memory holds, beside the weights, one
    layer's in float32, its activations for the right queries and a batch of the left, and the residual streams that
    enter the layers. Where these would be more than :data:`BLOCK`, queries are taken block by block; all copies of a
    sentence are in one batch, whose memory grows with their tokens. Hooks of the user's act; where a model is large or
    queries are many they run more than once, each time on some of the queries. Without hooks, and with no `loss` of the
    user's, a query that is given twice on one side is computed once, and short ones first.

    Args:
        left: Queries, or sentences.
        right: Default: the same as `left`.
        loss: Computes each query's loss from the logits at its readout positions; default: the answer's, in nats. A
            sentence's is the weighted sum over its copies. Or the attention that gradients are taken of instead.
        n_draws: How many masked copies of each sentence there are
            (:func:`~mdm_interp.data.sentences.mask_copies`).
        seed: Draws the masks: the same for a sentence on either side.
        kept: Tokens that are never masked.
        report: Told after each step how many are done: the readout (each part of a large vocabulary), each layer, and
            what comes before them; again for each block. Where workers share the queries, nobody is told.

    Raises:
        UserError: there are no queries, a sentence cannot be masked, the model was made in inference mode, the loss is
            not one of each query's logits, or the attention asked for is not there: no such layer or head, a bridge, or
            the attention of sentences, which have no source.

    Source: docs/theory.md, section 5; arXiv 1510.01799.
    """
    drawn = {"n_draws": n_draws, "seed": seed, "kept": tuple(kept)}
    sides = [listed(side, name) for side, name in ((left, "left"), (right, "right")) if side is not None]
    for side in sides:
        ask(side, hooked(model), **drawn)  # what cannot be asked is named by its place among those given
        if isinstance(loss, SourceAttention) and not isinstance(side[0], Query):
            raise UserError("loss: sentences have no source to attend to (SourceAttention); give queries")
    # A hook, or a loss of the user's, may depend on which row comes where.
    own = isinstance(loss, SourceAttention) or loss is answer_loss
    as_given = not own or isinstance(hooked(model), BridgedTransformer) or is_watched(model)
    ordered = [(side, range(len(side))) if as_given else each_once(side) for side in sides]
    (asked, rows), (others, columns) = ordered[0], ordered[1] if right is not None else (None, ordered[0][1])
    if is_shared(model):
        found = _gram(model, asked, asked if others is None else others, loss, drawn, None)
    else:
        found = _gram(model, asked, others, loss, drawn, report)
    return found.among(rows, columns)


def each_once(asked: Sequence[Query | Sentence]) -> tuple[list[Any], list[int]]:
    """Return each different query or sentence once, short ones first, and for each one given its index there."""

    def sizes(one: Query | Sentence) -> tuple[int, int]:
        return (len(one.answer), len(one.tokens)) if isinstance(one, Query) else (0, len(one))

    keys = [tuple(map(tuple, vars(one).values()) if isinstance(one, Query) else one) for one in asked]
    different = dict(zip(keys, asked, strict=True))
    ordered = sorted(different, key=lambda key: sizes(different[key]))
    place = {key: at for at, key in enumerate(ordered)}
    return [different[key] for key in ordered], [place[key] for key in keys]


def _joined(parts: Sequence[Gram], order: Tensor) -> Gram:
    """Put together the products of some left queries each with all right ones."""
    inner, squares = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("inner", "left_squares"))
    return replace(parts[0], inner=inner[:, order], left_squares=squares[:, order])


@shared_out("left", merge=_joined)
def _gram(
    model: Any,
    left: Sequence[Query | Sentence],
    right: Sequence[Query | Sentence] | None,
    loss: RowLoss | SourceAttention,
    drawn: Mapping[str, Any],
    report: Callable[[int], None] | None,
) -> Gram:
    with recording(model) as model:
        done, parts = itertools.count(1), parts_of(name for name, _ in model.named_parameters())

        def of_block(asked: Sequence[Asked], n_right: int | None) -> Gram:
            return _of_block(model, parts, asked, n_right, loss, lambda: report and report(next(done)))

        if right is not None and in_one_batch(both := [*right, *left]):
            found = of_block(ask(both, model, **drawn), len(right))
        else:
            asked = ask(left, model, **drawn)
            others = asked if right is None else ask(right, model, **drawn)
            n_left, n_right = len(left), len(left if right is None else right)
            inner = torch.zeros(len(parts), n_left, n_right, dtype=torch.float64)
            found = Gram(parts, inner, *(inner.new_zeros(len(parts), count) for count in (n_left, n_right)))
            most = BLOCK // largest(model, [*asked, *others])
            for rows, columns in blocks(most, len(asked), None if right is None else len(others)):
                sides = others[columns], asked[rows]
                if right is None and rows == columns:
                    part = of_block(numbered(asked[rows]), None)
                else:
                    part = of_block(numbered(*sides), sum(one.count for one in others[columns]))
                at_right, at_left = (slice(side[0].place.start, side[-1].place.stop) for side in sides)
                found.inner[:, at_left, at_right] = part.inner
                found.left_squares[:, at_left], found.right_squares[:, at_right] = part.left_squares, part.right_squares
                if right is None:
                    found.inner[:, at_right, at_left] = part.inner.mT
    for squares in (found.left_squares, found.right_squares):
        require_numbers(squares, model.cfg.dtype)
    return found


def _of_block(
    model: Any,
    parts: tuple[Part, ...],
    asked: Sequence[Asked],
    n_right: int | None,
    loss: RowLoss | SourceAttention,
    tell: Callable[[], None],
) -> Gram:
    """Compute the products of a block.

    Args:
        asked: What is on the right, then what is on the left.
        n_right: How many are on the right; None: all are on both sides.
    """
    count = asked[-1].place.stop
    n_columns, first_row = (count, 0) if n_right is None else (n_right, n_right)
    inner, squares = Sums(count - first_row, n_columns), Sums(count)
    held: list[tuple[slice, PackedFound]] = []
    for i, found in gradients_of(model, asked, loss, sum(one.place.start < n_columns for one in asked)):
        for (name, _), product in own_products(found, asked[i].copies):
            squares.add(part_of(name), product, asked[i].place)
        for place, rows, owner in asked[i].divided(n_columns):
            packed = pack(found, owner, rows)
            size = place.stop - place.start
            if place.start < n_columns:
                held.append((place, packed))
            if place.start < first_row:
                continue
            row = slice(place.start - first_row, place.stop - first_row)
            for column, of_column in held:
                mirrored = n_right is None and of_column is not packed
                for (name, _), product in cross_products(packed, of_column, size, column.stop - column.start):
                    inner.add(part_of(name), product, row, column)
                    if mirrored:
                        inner.add(part_of(name), product.mT, column, row)
            del packed
        del found  # before the next are computed
        if i == len(asked) - 1:
            held.clear()
            tell()
    of_right, of_left = squares.read(parts).split([n_columns, count - n_columns], dim=1)
    return Gram(parts, inner.read(parts), of_right if n_right is None else of_left, of_right)


def gradients_of(
    model: Any, asked: Sequence[Asked], loss: RowLoss | SourceAttention, n_held: int
) -> Iterator[tuple[int, Found]]:
    """Give every query's gradients, part by part, batch by batch within a part; the caller holds those of the first
    `n_held` batches until the part's end."""
    if isinstance(model, BridgedTransformer):
        if isinstance(loss, SourceAttention):
            raise UserError("loss: a bridge's attention has no gradients; load the checkpoint with load_checkpoint")
        return bridge_backward(model, asked, loss)
    return layer_by_layer(model, asked, loss, n_held)


def largest(model: Any, asked: Sequence[Asked]) -> int:
    """Tell about how many entries are kept of one batch at most."""
    shapes = [(*one.batch.tokens.shape, one.batch.readout.shape[1]) for one in asked]
    return max(n_sequence * entries(model, n_pos, n_rows) for n_sequence, n_pos, n_rows in shapes)


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
