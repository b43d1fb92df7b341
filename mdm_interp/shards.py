"""Queries shared out over workers, each of which holds the model.

    with shared({model: Opening(load_checkpoint, "GSAI-ML/LLaDA-8B-Base", {"device": "cuda"})}, shards=8):
        routes = compute_routes(model, queries)    # each worker takes an eighth of the queries

What a function of :func:`shared_out` returns does not depend on it, but for rounding. A worker opens the model once,
when it is first asked; of a machine with several GPUs, each takes another. Hooks on the model here are not on theirs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import pickle
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mdm_interp.devices import check_device
from mdm_interp.parallel import Workers, worker_number, workers_of

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Opening:
    """How a worker opens a model."""

    load: Callable[..., Any]
    """Called with `source` and `options`; a module's function."""
    source: str
    options: Mapping[str, Any]
    """Of them `device` is the worker's: a `cuda` without number becomes one of the GPUs there are."""


@contextlib.contextmanager
def shared(openings: Mapping[Any, Opening], shards: int, workers: Workers = None) -> Iterator[None]:
    """Share out, while this lasts, what is asked of models.

    Args:
        openings: How workers open each model.
        shards: Into how many parts queries are divided.
        workers: How many processes, or the address of a Dask scheduler, whose workers reach the checkpoints under the
            same path. Default: as many processes as shards.

    Raises:
        UserError: no scheduler answers.
    """
    with workers_of(workers or shards) as (submit, _):
        try:
            for model, opening in openings.items():
                _HOLDERS[model] = _Holders(submit, pickle.dumps(opening), shards)
            yield
        finally:
            for model in openings:
                _HOLDERS.pop(model, None)


@dataclass(frozen=True)
class _Holders:
    """The workers that hold a model."""

    submit: Callable[[Callable[..., Any], tuple[Any, ...]], Any]
    opening: bytes
    shards: int


_HOLDERS: weakref.WeakKeyDictionary[Any, _Holders] = weakref.WeakKeyDictionary()
"""By the model here."""


def is_shared(model: Any) -> bool:
    """Tell whether workers hold a model."""
    return model in _HOLDERS


Merge = Callable[[Sequence[Any], Tensor], Any]
"""Puts the parts together, in an order: at which place of all parts each query's is."""


def merged(parts: Sequence[Any], order: Tensor) -> Any:
    """Put parts together whose tensors begin with an axis of queries, whose lists have an entry for each query, or
    a tensor for each layer."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))[order]
    if is_dataclass(first) and not isinstance(first, type):
        of_fields = {one.name: [getattr(part, one.name) for part in parts] for one in fields(first)}
        return replace(first, **{name: merged(values, order) for name, values in of_fields.items()})
    if isinstance(first, list) and first and isinstance(first[0], Tensor):
        return [merged(of_layer, order) for of_layer in zip(*parts, strict=True)]
    if isinstance(first, list):
        flat = [entry for part in parts for entry in part]
        return [flat[at] for at in order.tolist()]
    return first


def shared_out(
    *names: str, together: Callable[[Any], Hashable] | None = None, merge: Merge = merged
) -> Callable[[Function], Function]:
    """Make a function of a `model` ask the workers that hold it (:func:`shared`), if any do.

    Args:
        names: Of its arguments, those that have an entry for each query.
        together: What entries of the first have in common that one worker should get.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def ask(*args: Any, **options: Any) -> Any:
            given = signature.bind(*args, **options).arguments
            entries = given[names[0]]
            if not is_shared(given["model"]) or len(entries) < 2:
                return function(*args, **options)
            holders = _HOLDERS[given["model"]]
            shares = _divide(entries, holders.shards, together)
            rest = {name: value for name, value in given.items() if name not in ("model", *names)}
            futures = []
            for share in shares:
                part = {name: _taken(given[name], share) for name in names if name in given}
                futures.append(holders.submit(_ask_there, (holders.opening, ask, {**rest, **part})))
            parts = [future.result() for future in futures]
            place = torch.tensor([index for share in shares for index in share])
            return merge(parts, place.argsort())

        return cast(Function, ask)

    return decorate


def _divide(entries: Sequence[Any], shards: int, together: Callable[[Any], Hashable] | None) -> list[list[int]]:
    """Deal entries out, one to each shard in turn: neighbours are of similar length."""
    groups: dict[Hashable, list[int]] = {}
    for index, entry in enumerate(entries):
        groups.setdefault(together(entry) if together else index, []).append(index)
    shares: list[list[int]] = [[] for _ in range(min(shards, len(groups)))]
    for at, members in enumerate(groups.values()):
        shares[at % len(shares)] += members
    return shares


def _taken(entries: Any, share: Sequence[int]) -> Any:
    return entries if entries is None else [entries[index] for index in share]


# ---- where the model is


def _ask_there(opening: bytes, function: Callable[..., Any], given: Mapping[str, Any], report: Any) -> Any:
    return function(model=_opened(opening), **given)


@functools.lru_cache(maxsize=2)  # a checkpoint and its twin
def _opened(pickled: bytes) -> Any:
    opening: Opening = pickle.loads(pickled)
    options = dict(opening.options)
    if "device" in options:
        options["device"] = _own_device(options["device"])
    return opening.load(opening.source, **options)


def _own_device(device: str) -> str:
    """Return this worker's own of several GPUs."""
    device = check_device(device)
    return f"cuda:{worker_number() % torch.cuda.device_count()}" if device == "cuda" else device
