"""A second device for machines without a GPU: tensors that say ``meta`` but have values.

What it does is done on the CPU. What would fail on a GPU fails: operations between tensors of two
devices, and random generators of another. What would wait for a GPU is counted, by the line of
the library that asks for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

THERE = torch.device("meta")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
#: take indices on the CPU, too
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
#: whose result, or its shape, the CPU asks for
ASKED = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
ASKED |= {aten.masked_select.default, aten._unique2.default}


class There(torch.Tensor):
    """A tensor of the second device; ``inner`` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
        )
        out.inner = inner
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        _count("tolist")
        return self.inner.tolist()

    def new_tensor(self, data: Any, dtype: Any = None) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(THERE)


waits: Counter[str] = Counter()


def _count(what: str) -> None:
    frame: Any = sys._getframe()
    while frame and "/brefine/" not in frame.f_code.co_filename:
        frame = frame.f_back
    where = (
        f"{frame.f_code.co_filename.rpartition('/brefine/')[2]}:{frame.f_lineno}" if frame else ""
    )
    waits[f"{where} {what}"] += 1


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if torch.is_inference_mode_enabled() and func._can_decompose():  # else that was done before
        with _Dispatch():
            return func.decompose(*args, **kwargs)
    values, shape = tree_flatten((args, kwargs))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, There)]
    there = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, There)}
    stays = bool(there)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]) == THERE
    if any(tensor.device == THERE for tensor in here):
        raise RuntimeError(f"{func}: a tensor without values")
    if kwargs.get("generator") is not None and stays:
        raise RuntimeError(f"{func}: a generator of the CPU for another device")
    if func in MOVES:
        to = isinstance(args[0], There) if func is aten.copy_.default else stays
        source = args[1] if func is aten.copy_.default else args[0]
        if isinstance(source, There) != to and (there or source.ndim):
            _count("copy")
    elif there and here:
        ours = [args[0], *args[2:3]] if func in INDEXED else here
        wrong = [one for one in ours if not isinstance(one, There) and one.ndim]
        if wrong:
            shapes = [(tuple(one.shape), str(one.device)) for one in tensors]
            raise RuntimeError(f"{func}: tensors on two devices: {shapes}")
        if func in INDEXED and not all(isinstance(one, There | None) for one in args[1]):
            _count("copy of an index")
    if there and (func in ASKED or (func in INDEXED and _looks_for_places(*args))):
        _count(str(func))

    def inner(value: Any) -> Any:
        if isinstance(value, There):
            return value.inner
        return torch.device("cpu") if value == THERE and isinstance(value, torch.device) else value

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in there:  # done in place
            return there[id(value)]
        if not stays:
            return value
        with torch.inference_mode(False):
            return There(value)

    args, kwargs = tree_unflatten([inner(value) for value in values], shape)
    return tree_map(outer, func(*args, **kwargs))


def _looks_for_places(_: Any, indices: Any, values: Any = None, *__: Any) -> bool:
    """Whether an index is a mask of unknown extent; one value is filled in without a look."""
    filled = values is not None and values.numel() == 1
    return not filled and any(one is not None and one.dtype == torch.bool for one in indices)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What never reaches a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[Counter[str]]:
    """Within it, ``meta`` is such a device. Gives what has waited for it so far."""
    real = torch.autocast

    def autocast(kind: str, *args: Any, **kwargs: Any) -> Any:
        return real("cpu" if kind == "meta" else kind, *args, **kwargs)

    waits.clear()
    torch.autocast = autocast  # type: ignore[assignment, misc]
    try:
        with _Dispatch(), _Functions():
            yield waits
    finally:
        torch.autocast = real  # type: ignore[misc]
