"""A pretended accelerator: a device whose tensors refuse to mix with the CPU's, as a GPU's do.

torch knows the device type `lazy` and has no backend for it. Each of its tensors here holds one on the CPU, where
everything is really computed, so code that looks at values (`bool(tensor)`, `.tolist()`) runs as on a GPU.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

PRETENDED = "lazy"
"""What torch calls the device."""

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
"""What carries values from one device to another."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""What takes indices from the CPU, too."""
FILLED = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor, *INDEXED}
"""What takes a number in a tensor of the CPU, like whatever is computed entry by entry."""


class There(Tensor):
    """A tensor on the pretended device."""

    here: Tensor
    """Its values."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        layout: dict[str, Any] = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=PRETENDED, **layout)  # pyright: ignore
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    # What torch refuses for subclasses of its tensors, or does without asking.

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # pyright: ignore

    @data.setter
    def data(self, given: Tensor) -> None:
        Tensor.data.__set__(self, given)  # pyright: ignore
        self.here = _values(given)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.here.untyped_storage()


def compute(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute one of torch's operations, with a result on the device on which a GPU's would be.

    Raises:
        RuntimeError: it mixes devices.
    """
    there, here = tensors_of(args, kwargs)
    if there and here and func not in COPIES:
        _refuse_mixed(func, args, here)
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == PRETENDED:
        kwargs, stays = {**kwargs, "device": torch.device("cpu")}, False
    else:
        stays = asked is not None or not there
    out = func(*map(_values, args), **{name: _values(x) for name, x in kwargs.items()})
    if there and torch.Tag.inplace_view in func.tags:  # the shape that torch sees changes, too
        with no_dispatch(), _shapes_only():
            func(*args, **kwargs)
    same = {id(x.here): x for x in there} | {id(x): x for x in here}  # what is changed in place comes back itself

    def placed(x: Any) -> Any:
        if isinstance(x, Tensor):
            return same.get(id(x), x if stays else There(x))
        return type(x)(map(placed, x)) if type(x) in (list, tuple) else x

    return placed(out)


@contextmanager
def _shapes_only() -> Iterator[None]:
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        yield
    finally:
        torch._C._set_meta_in_tls_dispatch_include(False)


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[There], list[Tensor]]:
    """Return the tensors of the pretended device, and those of the CPU."""
    there, here = list[There](), list[Tensor]()
    for given in (*args, *kwargs.values()):
        for x in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(x, There):
                there.append(x)
            elif isinstance(x, Tensor):
                here.append(x)
    return there, here


def _values(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(map(_values, x))
    return x.here if isinstance(x, There) else x


def _refuse_mixed(func: OpOverload, args: tuple[Any, ...], here: list[Tensor]) -> None:
    numbers = func in FILLED or torch.Tag.pointwise in func.tags
    fitting = [x for x in here if numbers and x.ndim == 0]
    if func in INDEXED and isinstance(args[0], There):
        fitting += [index for index in args[1] if index is not None]
    strangers = [x for x in here if not any(x is one for one in fitting)]
    if strangers:
        shapes = ", ".join(str(list(x.shape)) for x in strangers)
        raise RuntimeError(f"{func}: expected all tensors on one device, but shape {shapes} is on the CPU")


class Accelerator(TorchDispatchMode):
    """Makes tensors on the pretended device, and counts how often the CPU and the device wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """By what for: `to CPU` and `to device` (copies), `value` (one number), `size` (of a result that depends on
        values)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there, here = tensors_of(args, kwargs)
        asked = kwargs.get("device")
        if not there and (asked is None or asked.type != PRETENDED):
            return func(*args, **kwargs)
        if why := _waits(func, args, there, here, asked):
            self.waits[why] += 1
        return compute(func, args, kwargs)


def _waits(func: Any, args: Any, there: list[There], here: list[Tensor], asked: torch.device | None) -> str | None:
    """Say what for the CPU and the device wait for each other in an operation."""
    if func is aten._to_copy.default and asked is not None and (asked.type == PRETENDED) != bool(there):
        return "to CPU" if there else "to device"
    if func in COPIES and there and here:
        return "to device" if isinstance(args[0], There) else "to CPU"
    if func in INDEXED and isinstance(args[0], There):
        indices = [index for index in args[1] if index is not None]
        by_mask = any(index.dtype == torch.bool for index in indices)
        return "size" if by_mask else None if all(isinstance(index, There) for index in indices) else "to device"
    if torch.Tag.data_dependent_output in func.tags:
        return "value"
    return "size" if torch.Tag.dynamic_output_shape in func.tags else None


@contextmanager
def accelerator() -> Iterator[Accelerator]:
    """Have a pretended accelerator inside."""
    optimizer = importlib.import_module("torch.optim.optimizer")  # which torch.optim hides
    fusing = [*optimizer._get_fused_kernels_supported_devices(), PRETENDED]
    with pytest.MonkeyPatch.context() as patch, Accelerator() as made:
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: fusing)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) copies what it made on the CPU
        try:
            yield made
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
