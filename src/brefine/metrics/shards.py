"""Several processes that share the pictures of one evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import distributed

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
    """`merge` of the parts of all processes, in every one of them.

    Args:
        part: by picture, what this process found.
        fault: what stopped this process. All processes must come here, or the others would wait.

    Raises:
        InputError: the first process's fault that has one.
    """
    _, processes = _place()
    everything: list[Any] = [(dict(part), fault and str(fault))]
    if processes > 1:
        everything = [None] * processes
        distributed.all_gather_object(everything, (dict(part), fault and str(fault)))
    for _, message in everything:
        if message:
            raise fault or InputError(message)
    return merge(found for found, _ in everything)


def _place() -> tuple[int, int]:
    """Number of this process, and of all."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
