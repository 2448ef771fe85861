"""Many small Python values in one array that loader processes share."""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")


class Packed(Sequence[T], Generic[T]):
    """A sequence of plain values (None, numbers, texts, lists, dicts), kept as bytes in one array.

    Reading a Python object writes its reference count, so every process of a loader ends up with
    a copy of a list it only reads. These bytes are not written to: forked processes share them,
    and for spawned ones torch moves them to shared memory. As objects, the annotations of a set
    would take ten times the space, too.

    The bytes are marshal's: exact and several times as fast as json. They are never written to a
    file nor read from one.

    Args:
        make: called with each value that is read; must itself be known to a spawned process.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._bytes: bytearray | Tensor = bytearray()
        self._ends = array("q")

    def append(self, value: Any) -> int:
        """Add a value, as long as this was not pickled; its index."""
        assert isinstance(self._bytes, bytearray)
        self._bytes += marshal.dumps(value)
        self._ends.append(len(self._bytes))
        return len(self._ends) - 1

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
        start = self._ends[index - 1] if index else 0
        data: Any = self._bytes if isinstance(self._bytes, bytearray) else self._bytes.numpy()
        with memoryview(data) as whole, whole[start : self._ends[index]] as piece:
            return self._make(marshal.loads(piece))

    def __getstate__(self) -> dict[str, Any]:
        # A shared tensor: torch hands it to any number of processes without a copy.
        if isinstance(self._bytes, bytearray) and self._bytes:
            tensor = torch.frombuffer(self._bytes, dtype=torch.uint8)
            self._bytes = tensor.share_memory_()  # type: ignore[no-untyped-call]
        return self.__dict__
