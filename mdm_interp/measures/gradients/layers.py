"""Coupling layer by layer: of the mean losses, and of every pair in models whose gradients fit into memory once.

There a backward pass hands over the gradient of one parameter at a time. The forward loss's are kept, the reverse
loss's are multiplied with them and let go at once: beside the weights, memory holds one gradient of each parameter and
the activations of one layer. Formulas: docs/theory.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.gradients.alignment import component_of
from mdm_interp.measures.gradients.first_order import Direction, direction_cosine, mean_gradient
from mdm_interp.measures.nulls import draw_other_facts
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Contrast

Part = tuple[int | None, str]
"""A layer and one of :data:`~mdm_interp.measures.gradients.alignment.COMPONENTS`; None is outside of all layers."""

CHUNK = 1 << 24
"""Entries that are multiplied at a time, in float32."""


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
        layer, _ = _part(name)
        if layer is not None:
            layers.setdefault(layer, {})[name] = tensor
    return layers


@dataclass(frozen=True)
class LayerAlignment:
    """Inner products of gradients, in nats^2 per squared unit of the parameters; sums over parts are those of the
    parts together."""

    parts: tuple[Part, ...]
    facts: Int[Tensor, "pair"]
    inner: Contrast[Float[Tensor, "pair part"]]
    """Each pair's forward gradient with its reverse gradient; null: with the reverse gradient of a random pair of
    another fact, NaN where there is none."""
    forward_square: Float[Tensor, "pair part"]
    reverse_square: Contrast[Float[Tensor, "pair part"]]
    """Of the same two reverse gradients."""

    def cosine(self, layers: Sequence[int | None], components: Sequence[str]) -> Contrast[Float[Tensor, "pair"]]:
        """Compute the cosine of each pair's two gradients within these layers and components; null: of its forward
        gradient with another fact's reverse gradient. It is NaN where a gradient is zero.

        Raises:
            UserError: the model has no such part.
        """
        within = [i for i, (layer, component) in enumerate(self.parts) if layer in layers and component in components]
        if not within:
            raise UserError(f"layers, components: the model has no {list(components)} in layers {list(layers)}")

        def cosine(inner: Tensor, square: Tensor) -> Float[Tensor, "pair"]:
            norms = (self.forward_square[:, within].sum(1) * square[:, within].sum(1)).sqrt()
            return torch.where(norms > 0, inner[:, within].sum(1) / norms, torch.nan)

        return Contrast(
            cosine(self.inner.effect, self.reverse_square.effect), cosine(self.inner.null, self.reverse_square.null)
        )


def layer_alignment(
    model: HookedModel,
    query_pairs: Sequence[QueryPair],
    *,
    seed: int = 0,
    report: Callable[[int], None] | None = None,
) -> LayerAlignment:
    """Compare the forward and the reverse gradient of every pair, per layer and component, with three backward passes
    each.

    It is defined for an ARM's pairs as well. Gradients are of each query's own loss, in nats.

    Args:
        seed: Draws the null's pairs: of another fact, asked for the same side.
        report: Told after each pair how many are done.

    Raises:
        UserError: there are no pairs.

    Source: docs/theory.md, section 5.
    """
    if not query_pairs:
        raise UserError("query_pairs: gradients need at least one pair, got none")
    model = hooked(model)
    parts = list(dict.fromkeys(_part(name) for name, _ in model.named_parameters()))
    column = {part: i for i, part in enumerate(parts)}
    others, rows = draw_other_facts(query_pairs, lambda pair: pair.side, seed), list[Tensor]()
    with _trainable(model), _checkpointed(model):
        for done, (pair, other) in enumerate(zip(query_pairs, others, strict=True), start=1):
            products = torch.full((5, len(parts)), torch.nan, dtype=torch.float64)
            products[:3] = products[3:] = 0
            held: dict[str, Tensor] = {}

            def keep(name: str, gradient: Tensor, held: dict = held, products: Tensor = products) -> None:
                held[name] = gradient
                products[0, column[_part(name)]] += _inner(gradient, gradient)

            def multiply(row: int, name: str, gradient: Tensor, held: dict = held, into: Tensor = products) -> None:
                into[row, column[_part(name)]] += _inner(held[name], gradient)
                into[row + 1, column[_part(name)]] += _inner(gradient, gradient)

            _stream(model, pair.forward, keep)
            _stream(model, pair.reverse, partial(multiply, 1))
            if other is None:
                products[3:] = torch.nan
            else:
                _stream(model, query_pairs[other].reverse, partial(multiply, 3))
            rows.append(products)
            if report is not None:
                report(done)
    forward_square, inner, reverse_square, null_inner, null_square = torch.stack(rows, dim=1)
    facts = torch.tensor([pair.fact for pair in query_pairs])
    return LayerAlignment(
        tuple(parts), facts, Contrast(inner, null_inner), forward_square, Contrast(reverse_square, null_square)
    )


def _part(name: str) -> Part:
    words = name.split(".")
    return (int(words[1]) if words[0] == "blocks" else None), component_of(name)


def _stream(model: HookedModel, query: Query, take: Callable[[str, Tensor], None]) -> None:
    """Give the gradient of one query's loss to `take`, parameter by parameter, as the backward pass finds them."""

    def hand_over(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        take(name, gradient)

    parameters = list(model.named_parameters())
    handles = [p.register_post_accumulate_grad_hook(partial(hand_over, name)) for name, p in parameters]
    try:
        batch = collate([query], model.cfg)
        query_loss(model(batch.tokens, attention_mask=batch.attention_mask), batch).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for _, parameter in parameters:
            parameter.grad = None


def _inner(left: Tensor, right: Tensor) -> float:
    """Compute the inner product, entry by entry in the order in which the first lies in memory: in any other,
    flattening would copy it."""
    order = sorted(range(left.ndim), key=left.stride, reverse=True)
    chunks = (x.permute(order).flatten().split(CHUNK) for x in (left, right))
    precision = torch.promote_types(left.dtype, torch.float32)
    return sum((x.to(precision) @ y.to(precision)).item() for x, y in zip(*chunks, strict=True))


@contextmanager
def _trainable(model: HookedModel) -> Iterator[None]:
    """Give every parameter gradients inside, and touch none that was there."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for _, parameter in model.named_parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, needed, grad in before:
            parameter.requires_grad_(needed)
            parameter.grad = grad


@contextmanager
def _checkpointed(model: HookedModel) -> Iterator[None]:
    """Let each block forget its activations inside, and compute them again when the backward pass needs them."""
    if not isinstance(model, HookedTransformer):  # a bridge's blocks belong to another network
        yield
        return
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward
