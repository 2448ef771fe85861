"""Packed sequences: equal to a list, shared with other processes."""

import multiprocessing
import pickle

import pytest
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from brefine.data.packed import Packed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def _same(value):
    return value


def packed_of(values):
    packed = Packed(_same)
    assert [packed.append(value) for value in values] == list(range(len(values)))
    return packed


@given(st.lists(VALUES, max_size=6))
def test_it_reads_like_the_list_it_was_made_of(values):
    packed = packed_of(values)
    assert repr(list(packed)) == repr(values)  # repr: NaN equals itself, True is not 1
    assert len(packed) == len(values)
    assert repr(packed[1:-1]) == repr(values[1:-1])
    assert repr(packed[::-2]) == repr(values[::-2])
    if values:
        assert repr(packed[-1]) == repr(values[-1])


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError):
        packed_of([0, 1, 2])[index]


def test_what_is_packed_does_not_change_with_its_source():
    value = {"a": [1.5, 2]}
    packed = packed_of([value])
    value["a"].append(3)
    assert packed[0] == {"a": [1.5, 2]}


def test_it_survives_pickling():
    packed = packed_of([[1], "two"])
    assert list(pickle.loads(pickle.dumps(packed))) == [[1], "two"]


def _overwrite(packed, queue):
    packed._bytes[:] = 0
    queue.put(len(packed))


def test_spawned_processes_read_the_same_memory():
    packed = packed_of(["x", [1, 2.5]])
    context = torch.multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue = context.Queue()
    process = context.Process(target=_overwrite, args=(packed, queue))
    process.start()
    assert list(packed) == ["x", [1, 2.5]] or not packed._bytes.any()
    assert queue.get(timeout=60) == 2
    process.join(60)
    assert not packed._bytes.any()  # what the child wrote is seen here: one memory, no copy
