"""Several processes that share the pictures of one evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from torch import distributed, nn

from brefine.structures import InputError

T = TypeVar("T")


def share(pictures: Sequence[int]) -> Sequence[int]:
    """The pictures of this process: all of them, or every so manyth under torch.distributed."""
    rank, processes = _place()
    return pictures[rank::processes]


def is_first() -> bool:
    """Whether this process is the one that shows progress and writes files."""
    return _place()[0] == 0


def merge(parts: Iterable[Mapping[int, T]]) -> dict[int, T]:
    """What several processes found, as one process would have found it.

    Args:
        parts: by picture; one that is there more than once counts once.

    Returns:
        By picture, in rising order, whoever had it.
    """
    together: dict[int, T] = {}
    for part in parts:
        for picture, found in part.items():
            together.setdefault(picture, found)
    return dict(sorted(together.items()))


def gather(part: Mapping[int, T], fault: InputError | None = None) -> dict[int, T]:
    """`merge` of the parts of all processes in the first of them; the others get nothing.

    A part may be large, and as many processes may share the memory of one machine.

    Args:
        part: by picture, what this process found.
        fault: what stopped this process. All processes must come here, or the others would wait.

    Raises:
        InputError: the first process's fault that has one.
    """
    rank, processes = _place()
    if processes == 1:
        if fault:
            raise fault
        return merge([part])
    group = _group(distributed.group.WORLD)
    messages: list[Any] = [None] * processes
    distributed.all_gather_object(messages, fault and str(fault), group)
    for message in messages:
        if message:
            raise fault or InputError(message)
    parts: list[Any] | None = None if rank else [None] * processes
    distributed.gather_object(dict(part), parts, 0, group)
    return merge(parts or [])


def tell(value: T) -> T:
    """The ``value`` of the first process, in all of them."""
    if _place()[1] == 1:
        return value
    told = [value]
    distributed.broadcast_object_list(told, 0, _group(distributed.group.WORLD))
    return told[0]


def agree(model: nn.Module) -> None:
    """Give every process the buffers of the first, as weights are the same in all.

    What a BatchNorm has counted since the last step is of each process's own pictures.
    """
    if _place()[1] > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


@cache
def _group(world: Any) -> Any:
    """The processes of ``world``, for objects: NCCL would put these into the memory of GPUs."""
    same = distributed.get_backend(world) == "gloo"
    return world if same else distributed.new_group(backend="gloo")


def _place() -> tuple[int, int]:
    """Number of this process, and of all."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
