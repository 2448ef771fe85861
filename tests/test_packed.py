"""Packed sequences: equal to a list, shared with other processes."""

import multiprocessing
import pickle

import pytest
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from brefine.data.packed import Packed, pack, unpack

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def _same(value):
    return value


@given(st.lists(VALUES, max_size=6))
def test_it_reads_like_the_list_it_was_made_of(values):
    packed = Packed(map(pack, values), _same)
    assert repr(list(packed)) == repr(values)  # repr: NaN equals itself, True is not 1
    assert len(packed) == len(values)
    assert repr(packed[1:-1]) == repr(values[1:-1])
    assert repr(packed[::-2]) == repr(values[::-2])
    if values:
        assert repr(packed[-1]) == repr(values[-1])


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError):
        Packed(map(pack, range(3)), _same)[index]


def test_what_is_packed_does_not_change_with_its_source():
    value = {"a": [1.5, 2]}
    data = pack(value)
    value["a"].append(3)
    assert unpack(data) == {"a": [1.5, 2]}


def test_it_survives_pickling():
    packed = Packed(map(pack, [[1], "two"]), _same)
    assert list(pickle.loads(pickle.dumps(packed))) == [[1], "two"]


def _move(packed, queue):
    packed._bytes[0] = 0  # the child writes where the parent must see it: one memory, no copy
    queue.put(len(packed))


def test_a_spawned_process_reads_the_same_memory():
    packed = Packed([pack("x")], _same)
    before = int(packed._bytes[0])
    context = torch.multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue = context.Queue()
    process = context.Process(target=_move, args=(packed, queue))
    process.start()
    assert queue.get(timeout=60) == 1
    process.join(60)
    assert before != 0
    assert int(packed._bytes[0]) == 0
