import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brefine.metrics.profile import PERCENT, PIXELS, Profile, cut, erode, peel


def tight(mask):
    """A dense mask as a window and its corner."""
    ys, xs = np.nonzero(mask)
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(ys) else (0, 0, 0, 0)
    x1, y1, x2, y2 = map(int, box)
    return mask[y1:y2, x1:x2].astype(np.uint8), (x1, y1)


def distances(region):
    """Reference: to the nearest pixel that is not in the region, of the larger coordinate."""
    out = np.argwhere(~region)
    result = np.zeros(region.shape, dtype=int)
    for y, x in np.argwhere(region):
        result[y, x] = np.abs(out - (y, x)).max(1).min() if len(out) else 10**6
    return result


def dense_profile(found, true, depths):
    """Reference for one object: ``[2, len(depths), 2]``, on the whole picture."""
    counts = np.zeros((2, len(depths), 2), dtype=int)
    for side, region in enumerate((true, ~true)):
        away = distances(region)
        for i, depth in enumerate(depths):
            ring = (away > (depths[i - 1] if i else 0)) & (away <= depth)
            counts[side, i] = ring.sum(), (ring & (true ^ found)).sum()
    return counts


regions = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=11))


@settings(deadline=None, max_examples=80)
@given(regions, st.integers(0, 7))
def test_erosion_is_the_distance_beyond_a_depth(region, depth):
    np.testing.assert_array_equal(erode(region, depth), distances(region) > depth)


@pytest.mark.parametrize("seed", range(8))
def test_profile_is_that_of_whole_pictures(seed):
    random = np.random.default_rng(seed)
    size = tuple(random.integers(30, 80, 2).tolist())
    y, x = np.mgrid[: size[0], : size[1]]
    true = np.hypot(y - random.uniform(0, size[0]), x - random.uniform(0, size[1])) < 18
    found = np.roll(true, random.integers(-4, 5, 2), (0, 1)) ^ (random.random(size) < 0.02)
    profile = Profile()
    area = [100, 2000, 20000][seed % 3]
    profile.add(tight(found), tight(true), size, area, (0.7, 0.6))
    chosen = [0, 1 + seed % 3]
    np.testing.assert_array_equal(profile.pixels[chosen], [dense_profile(found, true, PIXELS)] * 2)
    diagonal = math.hypot(*tight(true)[0].shape)
    shares = [math.floor(diagonal * percent / 100) for percent in PERCENT]
    np.testing.assert_array_equal(profile.percent[chosen], [dense_profile(found, true, shares)] * 2)
    others = [i for i in range(4) if i not in chosen]
    assert not profile.pixels[others].any()
    assert (profile.areas, profile.mask_ious, profile.boundary_ious) == ([area], [0.7], [0.6])


def test_mask_grown_by_two_is_wrong_in_two_rings_outside():
    true = np.zeros((90, 110), bool)
    true[30:60, 30:70] = True
    found = np.zeros_like(true)
    found[28:62, 28:72] = True
    profile = Profile()
    for _ in range(3):
        profile.add(tight(found), tight(true), true.shape, true.sum(), (1, 1))
    inside, outside = profile.pixels[0, :, :, 1] / profile.pixels[0, :, :, 0].clip(1)
    assert not inside.any()
    assert outside.tolist() == [1, 1] + [0] * 14
    assert profile.pixels[0, 1, 0].tolist() == [3 * (32 * 42 - 30 * 40)] * 2


def test_only_so_many_objects_of_a_size_are_looked_at(monkeypatch):
    monkeypatch.setattr("brefine.metrics.profile.MOST", 3)
    true = np.zeros((50, 50), bool)
    true[20:30, 20:30] = True
    profile = Profile()
    for area in [100] * 5 + [2000] * 2:
        profile.add(tight(true), tight(true), true.shape, area, (1, 1))
    assert profile.seen.tolist() == [5, 3, 2, 0]
    assert profile.pixels[:, 0, 0, 0].tolist() == [5 * 36, 3 * 36, 2 * 36, 0]
    assert len(profile.areas) == len(profile.mask_ious) == 7


def test_nothing_is_beyond_the_pictures_border():
    true = np.zeros((60, 60), bool)
    true[:, :30] = True  # its one outline is the column in the middle
    profile = Profile()
    profile.add(tight(true), tight(true), true.shape, true.sum(), (1, 1))
    assert profile.pixels[0, :, :, 0].tolist() == [[60] * 16] * 2
    profile.add(tight(~true & False), tight(np.ones_like(true)), true.shape, 3600, (0, 0))
    assert profile.pixels[0, 0, :, 1].sum() == 0  # a mask that fills the picture has no outline


def test_rings_of_no_width_hold_nothing():
    region = np.ones((9, 9), bool)
    region[4, 4] = False
    rings = peel(region, region, [0, 0, 1, 1, 3])
    assert rings.tolist() == [[0, 0], [0, 0], [8, 8], [0, 0], [40, 40]]


@settings(deadline=None, max_examples=60)
@given(regions, st.tuples(*[st.integers(0, 14)] * 4))
def test_cut_of_any_box(mask, numbers):
    whole = np.zeros((16, 16), bool)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    x1, x2 = sorted(numbers[:2])
    y1, y2 = sorted(numbers[2:])
    part = cut(tight(whole), (x1, y1, x2 + 1, y2 + 1))
    np.testing.assert_array_equal(part, whole[y1 : y2 + 1, x1 : x2 + 1])
