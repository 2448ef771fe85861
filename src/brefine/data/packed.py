"""Many small Python values in one array that loader processes share."""

from __future__ import annotations

import marshal
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch

T = TypeVar("T")


def pack(value: Any) -> bytes:
    """A plain value (None, numbers, texts, lists, dicts) as bytes, for this process only.

    Marshal is exact and several times as fast as json; what it makes is never written to a file
    nor read from one.
    """
    return marshal.dumps(value)


def unpack(data: Any) -> Any:
    """The value that ``pack`` made bytes of."""
    return marshal.loads(data)


class Packed(Sequence[T], Generic[T]):
    """A read-only sequence of plain values, kept as bytes in one tensor.

    Reading a Python object writes its reference count, so every process of a loader ends up with
    a copy of a list it only reads. These bytes are not written to: forked processes share them,
    and for spawned ones torch moves the tensor to shared memory.

    Args:
        items: what ``pack`` made of each value.
        make: called with each value that is read; must itself be known to a spawned process.
    """

    def __init__(self, items: Iterable[bytes], make: Callable[[Any], T]) -> None:
        pieces = list(items)
        ends = np.fromiter(map(len, pieces), np.int64, len(pieces)).cumsum()
        self._ends = torch.from_numpy(ends)
        # A bytearray, since torch warns of tensors over memory that must not be written.
        self._bytes = torch.frombuffer(bytearray().join(pieces) or bytearray(1), dtype=torch.uint8)
        self._make = make

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._make(unpack(self._bytes.numpy()[start : int(self._ends[index])]))
