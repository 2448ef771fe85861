"""Masks as runs, against dense arrays: set algebra, parts and holes by naive flood fill."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from brefine import runs
from brefine.rle import Runs, decode

EIGHT = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
FOUR = [(-1, 0), (1, 0), (0, -1), (0, 1)]


def of(dense: np.ndarray) -> Runs:
    return runs.of_window(dense, (0, 0), dense.shape)


def dense(mask: Runs) -> np.ndarray:
    assert len(mask.counts) % 2 == 0
    assert mask.counts.min() >= 0
    assert mask.counts.sum() == mask.size[0] * mask.size[1]
    return coco_mask.decode(mask.encode()).astype(bool)


def canonical(mask: Runs) -> bool:
    """Whether the RLE is the one that pycocotools makes of these pixels."""
    pixels = np.asfortranarray(coco_mask.decode(mask.encode()))
    return mask.encode()["counts"] == coco_mask.encode(pixels)["counts"].decode()


@st.composite
def pictures(draw, count: int = 1, most: int = 14):
    """Some masks of one size, from empty to full."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    shares = draw(st.lists(st.sampled_from([0, 0.1, 0.4, 0.6, 0.9, 1]), min_size=count))
    masks = [random.random((height, width)) < share for share in (shares * count)[:count]]
    return masks if count > 1 else masks[0]


def flood(mask: np.ndarray, steps) -> tuple[np.ndarray, list[int]]:
    """Number of the connected part of each pixel set, -1 elsewhere, and the areas."""
    parts, areas = np.full(mask.shape, -1), []
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if not mask[y, x] or parts[y, x] >= 0:
                continue
            todo, area = [(y, x)], 0
            parts[y, x] = len(areas)
            while todo:
                here = todo.pop()
                area += 1
                for step in steps:
                    there = here[0] + step[0], here[1] + step[1]
                    if not (0 <= there[0] < mask.shape[0] and 0 <= there[1] < mask.shape[1]):
                        continue
                    if mask[there] and parts[there] < 0:
                        parts[there] = len(areas)
                        todo.append(there)
            areas.append(area)
    return parts, areas


@settings(max_examples=150, deadline=None)
@given(pictures(count=4), st.data())
def test_set_algebra_is_that_of_dense_masks(masks, data):
    a, b, c, d = masks
    one, *others = (of(mask) for mask in masks)
    height, width = a.shape
    assert np.array_equal(dense(one), a)
    spans = runs.spans(one)
    assert (spans[1] < spans[2]).all()
    assert np.array_equal(dense(runs.of_spans(*spans, one.size)), a)
    results = {
        "union": (runs.union([one, *others]), a | b | c | d),
        "alone": (runs.union([one]), a),
        "intersect": (runs.intersect(one, others[0]), a & b),
        "subtract": (runs.subtract(one, others), a & ~(b | c | d)),
        "nothing": (runs.subtract(one, []), a),
    }
    x1, y1 = data.draw(st.integers(-2, width)), data.draw(st.integers(-2, height))
    x2, y2 = data.draw(st.integers(x1, width + 2)), data.draw(st.integers(y1, height + 2))
    inside = np.zeros_like(a)
    inside[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)] = True
    results["cut"] = runs.cut(one, (x1, y1, x2, y2)), a & inside
    x, y = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    wide = np.pad(a, ((y, 2), (x, 3)))
    moved = runs.move(one, (x, y), wide.shape)
    results["moved"] = moved, wide
    results["moved back"] = runs.move(moved, (-x, -y), a.shape), a
    results["window"] = runs.of_window(a, (x, y), wide.shape), wide
    for name, (found, expected) in results.items():
        assert np.array_equal(dense(found), expected), name
        assert canonical(found), name


def test_runs_with_zero_lengths_are_understood():
    """Uncompressed RLE of other tools may hold runs of no length."""
    mask = decode({"size": [4, 3], "counts": [0, 2, 0, 1, 4, 0, 0, 3, 2]}, (4, 3))
    assert [edge.tolist() for edge in runs.intervals(mask)] == [[0, 2, 7], [2, 3, 10]]
    assert runs.union([mask]).counts.tolist() == [0, 3, 4, 3, 2, 0]


@settings(max_examples=150, deadline=None)
@given(pictures(), st.booleans())
def test_parts_are_those_of_a_flood_fill(mask, corners):
    parts, areas = flood(mask, EIGHT if corners else FOUR)
    x, top, bottom = runs.spans(of(mask))
    found, found_areas = runs.label_parts(x, top, bottom, mask.shape[0], corners=corners)
    assert found_areas.tolist() == areas
    labels = np.full(mask.shape, -1)
    for span in zip(x, top, bottom, found, strict=True):
        labels[span[1] : span[2], span[0]] = span[3]
    assert np.array_equal(labels, parts)


@settings(max_examples=200, deadline=None)
@given(pictures(), st.integers(0, 12))
def test_holes_are_those_of_a_flood_fill(mask, area):
    parts, areas = flood(~mask, FOUR)
    border = {*parts[0], *parts[-1], *parts[:, 0], *parts[:, -1]}
    expected = mask.copy()
    for part, size in enumerate(areas):
        if part not in border and size < area:
            expected |= parts == part
    assert np.array_equal(dense(runs.fill_holes(of(mask), area)), expected)


@settings(max_examples=200, deadline=None)
@given(pictures(), st.none() | st.integers(0, 12))
def test_islands_are_those_of_a_flood_fill(mask, area):
    parts, areas = flood(mask, EIGHT)
    largest = int(np.argmax(areas)) if areas else -1
    expected = np.zeros_like(mask)
    for part, size in enumerate(areas):
        if part == largest or (area is not None and size >= area):
            expected |= parts == part
    assert np.array_equal(dense(runs.drop_islands(of(mask), area)), expected)


def test_a_snail_is_one_part():
    """Parts joined only after many turns need many rounds of union-find."""
    side = 101
    mask = np.zeros((side, side), dtype=bool)
    top, left, bottom, right = 0, 0, side - 1, side - 1
    while top <= bottom and left <= right:
        mask[top, left : right + 1] = mask[top : bottom + 1, right] = True
        mask[bottom, left + 2 : right + 1] = mask[top + 2 : bottom + 1, left + 2] = True
        mask[top + 2, left + 2 : left + 4] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    comb = np.zeros((side, side), dtype=bool)
    comb[::2], comb[:, -1] = True, True  # joined in the last column alone
    for shape in (mask, comb, mask.T, comb.T):
        parts, areas = flood(shape, FOUR)
        spans = runs.spans(of(shape))
        found, found_areas = runs.label_parts(*spans, side, corners=False)
        assert found_areas.tolist() == areas
        assert len(np.unique(found)) == parts.max() + 1


@settings(max_examples=150, deadline=None)
@given(pictures(count=5))
def test_separate_gives_each_pixel_to_the_first(masks):
    apart = [dense(mask) for mask in runs.separate([of(mask) for mask in masks])]
    owner = np.argmax(masks, axis=0)
    for i, (mask, found) in enumerate(zip(masks, apart, strict=True)):
        assert np.array_equal(found, mask & (owner == i))
    assert runs.separate([]) == []


def records_of(masks, scores):
    return [
        {"image_id": 1, "category_id": i % 2, "score": score, "segmentation": of(mask).encode()}
        for i, (mask, score) in enumerate(zip(masks, scores, strict=True))
    ]


@settings(max_examples=100, deadline=None)
@given(
    pictures(count=5),
    st.lists(st.sampled_from([0.2, 0.5, 0.9]), min_size=5, max_size=5),
    st.integers(0, 6),
    st.none() | st.integers(0, 6),
)
def test_clean_disjoint_leaves_no_pixel_in_two_masks(masks, scores, holes, islands):
    records = records_of(masks, scores)
    before = [dict(record) for record in records]
    found = runs.clean(records, holes=holes, islands=islands, disjoint=True)
    assert records == before
    drawn = [coco_mask.decode(record["segmentation"]) for record in found]
    assert np.sum(drawn, 0).max(initial=0) <= 1
    # The best loses nothing but what cleaning takes; nobody gets a pixel that was not cleaned in.
    best = max(range(5), key=lambda i: (scores[i], -i))
    alone = runs.clean([records[best]], holes=holes, islands=islands)[0]
    kept = [record for record in found if record["score"] == scores[best]]
    assert alone["segmentation"] in [record["segmentation"] for record in kept]
    if holes < 2 and islands == 0:
        assert np.array_equal(np.sum(drawn, 0) > 0, np.any(masks, 0))
        hidden = [
            i
            for i, mask in enumerate(masks)
            if mask.any()
            and not (mask & ~np.any([masks[j] for j in better(scores, i)], 0)).any()
            and better(scores, i)
        ]
        assert len(found) == 5 - len(hidden)


def better(scores, i):
    return [j for j in range(len(scores)) if (-scores[j], j) < (-scores[i], i)]


def test_clean_in_words():
    ring = np.zeros((20, 20), dtype=bool)
    ring[2:12, 2:12] = True
    ring[5:7, 5:7] = False  # a hole of 4 pixels
    ring[9, 9] = False  # and of 1
    ring[15:17, 15:17] = True  # an island of 4
    [record] = records_of([ring], [0.5])

    def area(**options):
        [found] = runs.clean([record], **options)
        assert {**found, "segmentation": 0} == {**record, "segmentation": 0}
        return int(coco_mask.area(found["segmentation"]))

    with pytest.raises(ValueError, match="polygons do not say how large"):
        runs.clean([record | {"segmentation": [[2, 2, 9, 2, 9, 9]]}], holes=2)
    rle = record["segmentation"]
    told = record | {"segmentation": {**rle, "counts": rle["counts"].encode()}}  # pycocotools'
    assert runs.clean([told], holes=5) == runs.clean([record], holes=5)
    assert area() == 99
    assert area(holes=2) == 100
    assert area(holes=4) == 100
    assert area(holes=5) == 104
    assert area(islands=4) == 99
    assert area(islands=5) == 95
    assert area(islands=None, holes=5) == 100
    empty = records_of([ring & False], [0.5])
    assert runs.clean(empty, holes=5, islands=5, disjoint=True) == empty  # nothing was taken
    assert runs.clean([], disjoint=True) == []
    # A bar across a bar: what is below falls into two parts.
    bars = np.zeros((2, 20, 20), dtype=bool)
    bars[0, 9:11, :], bars[1, 2:, 9:11] = True, True
    both = records_of(bars, [0.9, 0.5])
    found = runs.clean(both, disjoint=True)
    assert [int(coco_mask.area(r["segmentation"])) for r in found] == [40, 32]
    found = runs.clean(both, disjoint=True, islands=None)
    assert [int(coco_mask.area(r["segmentation"])) for r in found] == [40, 18]
    with pytest.raises(ValueError, match="RLE of size"):
        runs.clean([*both, *records_of([bars[0][:10]], [0.1])], disjoint=True)


def test_separating_many_small_masks_of_a_large_picture_is_quick():
    """2,000 objects in 100 megapixels: dense masks would be 200 GB."""
    size = (10_000, 10_000)
    random = np.random.default_rng(0)
    disc = np.hypot(*np.mgrid[-60:61, -60:61]) < 60
    corners = random.integers(0, 10_000 - 121, (2000, 2)).tolist()
    masks = [runs.of_window(disc, (x, y), size) for x, y in corners]
    start = time.process_time()
    apart = runs.separate(masks)
    assert time.process_time() - start < 5
    total = sum(mask.area() for mask in apart)
    assert total == runs.union(masks).area() < 2000 * disc.sum()


def test_clean_keeps_pictures_apart():
    a, b = np.zeros((8, 9), dtype=bool), np.zeros((5, 6), dtype=bool)
    a[2:6, 2:6], b[1:4, 1:4] = True, True
    one = records_of([a, a], [0.5, 0.9])
    two = records_of([b, b], [0.5, 0.9])
    pictures = [{**r, "image_id": 1} for r in one] + [{**r, "image_id": 2} for r in two]
    mixed = [pictures[0], pictures[2], pictures[3], pictures[1]]
    assert runs.clean(mixed, disjoint=True) == [mixed[2], mixed[3]]
