"""Outlines: what is traced draws the same mask again, and parts and holes are told apart."""

import time
from itertools import chain

import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from brefine.outlines import join, polygons, simple_parts, simplify, trace
from brefine.rle import decode
from samples import blob

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


def draw(rings, size):
    """What COCO's rasteriser makes of polygons."""
    if not len(rings):
        return np.zeros(size, dtype=bool)
    window, (x, y) = decode([ring.ravel().tolist() for ring in rings], size).window()
    mask = np.zeros(size, dtype=bool)
    mask[y : y + window.shape[0], x : x + window.shape[1]] = window.numpy()
    return mask


def components(mask, *, corners):
    """The parts of a mask, one pixel after the other."""
    left = {(int(y), int(x)) for y, x in zip(*mask.nonzero(), strict=True)}
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    steps += [(1, 1), (1, -1), (-1, 1), (-1, -1)] if corners else []
    parts = []
    while left:
        todo = [left.pop()]
        part = set(todo)
        while todo:
            y, x = todo.pop()
            near = {(y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            part |= near
            todo += near
        parts.append(part)
    return parts


def area(ring):
    """Pixels inside, clockwise on the screen positive."""
    (x, y), (u, v) = ring.T, np.roll(ring, -1, axis=0).T
    return float((x * v - u * y).sum()) / 2


@settings(max_examples=300, deadline=None)
@given(masks, st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_drawn_again_it_is_the_mask(mask, origin):
    x, y = origin
    whole = np.pad(mask, ((y, 2), (x, 2)))
    rings = polygons(mask, origin)
    np.testing.assert_array_equal(draw(rings, whole.shape), whole)
    if rings:  # the parts tied together
        np.testing.assert_array_equal(draw([join(rings)], whole.shape), whole)


@settings(max_examples=300, deadline=None)
@given(masks)
@example(
    np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], dtype=bool)
)
def test_parts_and_holes(mask):
    """Compared with a flood fill: a ring for every part and every hole, in the right part."""
    parts = trace(mask)
    expected = components(mask, corners=True)
    assert len(parts) == len(expected)
    background = components(~np.pad(mask, 1), corners=False)
    holes = [{(y - 1, x - 1) for y, x in hole} for hole in background if (0, 0) not in hole]
    assert sum(len(part) - 1 for part in parts) == len(holes)
    for outer, *inner in parts:
        x, y = outer.T.astype(int)
        mine = next(p for p in expected if (y[0], x[0]) in p)  # its first corner is its top left
        assert (y.min(), x.min()) == tuple(map(min, zip(*mine, strict=True)))
        assert (y.max(), x.max()) == tuple(max(v) + 1 for v in zip(*mine, strict=True))
        assert area(outer) + sum(map(area, inner)) == len(mine)
        assert area(outer) > 0
        for ring in inner:
            assert area(ring) < 0
            hx, hy = ring.T.astype(int)
            assert (hy[0] - 1, min(hx[:2])) in mine  # above the hole's top, where its ring begins


@settings(max_examples=100, deadline=None)
@given(masks)
def test_rings_are_made_of_corners(mask):
    for ring in chain.from_iterable(trace(mask)):
        steps = np.roll(ring, -1, axis=0) - ring
        level = steps[:, 1] == 0
        assert (steps[:, 0] == 0).tolist() == (~level).tolist()  # along the edges of pixels
        assert (level != np.roll(level, 1)).all()  # and each corner is one


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_simplified_outlines_stay_near(seed, tolerance):
    mask = blob(np.random.default_rng(seed), (50, 60))
    for ring in chain.from_iterable(trace(mask)):
        fewer = simplify(ring, tolerance)
        assert 3 <= len(fewer) <= len(ring)
        assert {tuple(p) for p in fewer} <= {tuple(p) for p in ring}
        start, stop = fewer[None], np.roll(fewer, -1, axis=0)[None]
        chord, way = stop - start, ring[:, None] - start
        share = ((way * chord).sum(2) / (chord**2).sum(2)).clip(0, 1)
        distance = np.hypot(*np.moveaxis(way - share[..., None] * chord, 2, 0)).min(1)
        assert distance.max() <= tolerance + 1e-9 or len(fewer) == len(ring)


def test_simplifying_saves_corners_and_little_is_lost():
    y, x = np.mgrid[:200, :200]
    mask = np.hypot(y - 100, x - 100) < 80
    exact, rough = polygons(mask)[0], polygons(mask, tolerance=1)[0]
    assert len(rough) < len(exact) / 5
    drawn = draw([rough], mask.shape)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.97


def test_what_would_become_a_line_stays():
    mask = np.ones((1, 9), dtype=bool)
    np.testing.assert_array_equal(draw(polygons(mask, tolerance=5), (1, 9)), mask)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 3)])
def test_nothing_has_no_outline(shape):
    assert polygons(np.zeros(shape)) == []


def test_a_hole_in_a_part_in_a_hole():
    mask = np.ones((9, 9), dtype=bool)
    mask[1:8, 1:8] = False
    mask[2:7, 2:7] = True
    mask[4, 4] = False
    outer, inner = trace(mask)
    assert [abs(area(ring)) for ring in outer] == [81, 49]
    assert [abs(area(ring)) for ring in inner] == [25, 1]
    assert outer[0].tolist() == [[0, 0], [9, 0], [9, 9], [0, 9]]


@settings(max_examples=200, deadline=None)
@given(masks)
def test_simple_parts_are_valid_and_cover_the_mask(mask):
    parts = simple_parts(mask, (3, 2))
    shape = shapely.MultiPolygon([(part[0], part[1:]) for part in parts])
    assert shape.is_valid, shapely.is_valid_reason(shape)
    ys, xs = np.mgrid[: mask.shape[0], : mask.shape[1]]
    inside = shapely.contains_xy(shape, xs.ravel() + 3.5, ys.ravel() + 2.5)
    np.testing.assert_array_equal(inside.reshape(mask.shape), mask)
    assert len(parts) == len(components(mask, corners=False))
    assert len(trace(mask)) == len(components(mask, corners=True))


def test_a_mask_of_thousands_of_parts_and_holes():
    """Four times the pixels take about four times as long, and what is drawn stays the same."""
    took = []
    for side in (160, 320):
        mask = np.random.default_rng(0).random((side, side)) < 0.5
        began = time.process_time()
        ring = join(polygons(mask))
        took.append(time.process_time() - began)
        window, (x, y) = decode([ring.ravel().tolist()], mask.shape).window()
        drawn = np.zeros_like(mask)
        drawn[y : y + window.shape[0], x : x + window.shape[1]] = window
        assert (drawn == mask).all()
    assert took[1] < 10 * took[0]  # comparing every ring with every other one, 16 times
