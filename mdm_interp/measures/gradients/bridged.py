"""The backward pass of a bridge for many queries at once: other people's modules, without weight gradients.

The modules that own the parameters are watched while the network runs. Of linear maps and embeddings, inputs and the
gradients at outputs are every query's own gradient (:class:`~mdm_interp.measures.gradients.terms.Terms`); any other
module's is computed query by query, within that module alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mdm_interp.data.queries import QueryBatch
from mdm_interp.measures.gradients.asked import Asked
from mdm_interp.measures.gradients.backward import RowLoss, at_logits
from mdm_interp.measures.gradients.terms import Found, Terms, Weight
from mdm_interp.models.bridge import BridgedTransformer
from mdm_interp.models.layers import precise

ZEROS: Any = {"allow_unused": True, "materialize_grads": True}
"""What has no say in a loss has a gradient of 0."""


@dataclass
class _Call:
    """One call of a module that owns parameters."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor


def bridge_backward(model: BridgedTransformer, asked: Sequence[Asked], loss: RowLoss) -> Iterator[tuple[int, Found]]:
    """Give every query's gradients in a bridge, batch by batch. They are computed in float32 at least, which takes the
    memory of the weights once more in a model of half precision."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = {
        module: {leaf: names[id(p)] for leaf, p in module.named_parameters(recurse=False) if id(p) in names}
        for module in model.bridge.modules()
    }
    owners = {module: owned for module, owned in owners.items() if owned}
    weights = {name: precise(parameter.detach()) for name, parameter in model.named_parameters()}

    def find(i: int) -> Found:
        found: dict[Weight, list[Terms]] = {}
        unseen = {name: weight.requires_grad_() for name, weight in weights.items()}
        calls, rows = _run(model, list(owners), weights, asked[i].batch)
        d_rows = at_logits(loss, rows, asked[i].batch, asked[i].weight)
        for call in calls:
            for name in owners[call.module].values():
                unseen.pop(name, None)
        outs = [call.out for call in calls]
        at = torch.autograd.grad(rows, outs, d_rows, retain_graph=bool(unseen), **ZEROS)
        for call, d in zip(calls, at, strict=True):
            _add(found, call, owners[call.module], weights, d)
        if unseen:  # their modules were never called: somebody else reads the parameters
            by_query = [
                torch.autograd.grad(of_query, list(unseen.values()), d, retain_graph=True, **ZEROS)
                for of_query, d in zip(rows, d_rows, strict=True)
            ]
            for name, grads in zip(unseen, zip(*by_query, strict=True), strict=True):
                found.setdefault((name, 0), []).append(Terms.of_vectors(torch.stack(grads)))
        return found

    return ((i, find(i)) for i in range(len(asked)))


def _run(
    model: BridgedTransformer, owners: Sequence[nn.Module], weights: dict[str, Tensor], batch: QueryBatch
) -> tuple[list[_Call], Tensor]:
    """Return every call of the modules that own parameters, and the logits at readout positions."""
    calls: list[_Call] = []
    n_query = len(batch.tokens)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        shared = args[0].ndim == 1 or len(args[0]) != n_query
        if shared and isinstance(module, nn.Embedding):  # of places, the same for all queries: each gets its own
            args = (args[0].expand(n_query, args[0].shape[-1]),)
            out = out.expand(n_query, *out.shape[-2:])
        calls.append(_Call(module, args, kwargs, out))
        return out.clone()  # others may edit in place

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in owners]
    try:
        logits = model.functional(weights, batch.tokens, batch.attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return calls, batch.at_readout(logits)


def _add(
    found: dict[Weight, list[Terms]], call: _Call, owned: dict[str, str], weights: dict[str, Tensor], d: Tensor
) -> None:
    """Add the gradients that one call gives to the parameters its module owns."""
    forward, x = type(call.module).forward, call.args[0]
    if forward is nn.Embedding.forward:
        never = getattr(call.module, "padding_idx", None)
        d = d if never is None else d.masked_fill((x == never)[..., None], 0.0)
        terms = {"weight": Terms.of_tokens(x, d)}
    elif forward is nn.Linear.forward:
        terms = {"weight": Terms.of_tokens(d, x), "bias": Terms.of_vectors(d.flatten(1, -2).sum(1))}
    elif type(call.module).__name__ == "Conv1D":
        terms = {"weight": Terms.of_tokens(x, d), "bias": Terms.of_vectors(d.flatten(1, -2).sum(1))}
    else:
        terms = _query_by_query(call, {leaf: weights[name] for leaf, name in owned.items()}, d)
    for leaf, name in owned.items():
        found.setdefault((name, 0), []).append(terms[leaf])


def _query_by_query(call: _Call, parameters: dict[str, Tensor], d: Tensor) -> dict[str, Terms]:
    """Return the gradients of a module's parameters, one query after the other, within this module alone."""
    leaves = {leaf: parameter.detach().requires_grad_() for leaf, parameter in parameters.items()}

    def of_query(row: int) -> tuple[Tensor, ...]:
        args, kwargs = (
            [value[row : row + 1].detach() if isinstance(value, Tensor) else value for value in values]
            for values in (call.args, call.kwargs.values())
        )
        out = functional_call(call.module, leaves, tuple(args), dict(zip(call.kwargs, kwargs, strict=True)))
        return torch.autograd.grad(out, list(leaves.values()), d[row : row + 1], **ZEROS)

    by_query = zip(*(of_query(row) for row in range(len(d))), strict=True)
    return {leaf: Terms.of_vectors(torch.stack(rows)) for leaf, rows in zip(leaves, by_query, strict=True)}
