"""Tiles and seams, with an oracle that finds every object of a tile exactly as it is shown."""

import math
import re
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brefine import runs
from brefine.rle import Runs, decode
from brefine.structures import InputError
from brefine.tiling import Grid, choose_tile, lay, merge


@st.composite
def grids(draw, most: int = 50, least: int = 2):
    size = draw(st.integers(1, most)), draw(st.integers(1, most))
    tile = draw(st.integers(least, most))
    return lay(size, tile, draw(st.integers(1, tile // 2))), tile


@settings(max_examples=200, deadline=None)
@given(grids(), st.data())
def test_tiles_cover_the_picture_and_cores_share_it_out(case, data):
    grid, tile = case
    height, width = grid.size
    owners = np.zeros(grid.size, dtype=int)
    for (x1, y1, x2, y2), (left, top, right, bottom) in zip(grid.tiles, grid.cores, strict=True):
        assert (x2 - x1, y2 - y1) == (min(tile, width), min(tile, height))
        assert 0 <= x1 <= left < right <= x2 <= width
        assert 0 <= y1 <= top < bottom <= y2 <= height
        owners[top:bottom, left:right] += 1
    assert (owners == 1).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(2, 100), st.data())
def test_what_is_smaller_than_the_overlap_is_whole_in_some_tile(side, tile, data):
    overlap = data.draw(st.integers(1, tile // 2))
    grid = lay((1, side), tile, overlap)
    start = data.draw(st.integers(0, side - 1))
    stop = min(start + overlap, side)
    assert any(x1 <= start and stop <= x2 for x1, _, x2, _ in grid.tiles)
    steps = np.diff([x1 for x1, *_ in grid.tiles])
    assert steps.max(initial=0) - steps.min(initial=side) <= 1  # even
    # One tile less would not do.
    assert len(grid.tiles) == 1 or side > tile + (len(grid.tiles) - 2) * (tile - overlap)


def test_how_tiles_are_chosen():
    assert lay((30, 40), None) == Grid((30, 40), [(0, 0, 40, 30)], [(0, 0, 40, 30)], 1)
    assert lay((1, 1), None).tiles == [(0, 0, 1, 1)]
    assert len(lay((1000, 1000), 1024, 128).tiles) == 1
    assert lay((10_000, 10_000), 1024).edge == 8
    for tile, overlap in [(100, 0), (100, 51), (100, -3), (0, 1), (-5, 1), (1, 1)]:
        with pytest.raises(InputError, match="overlap must be"):
            lay((500, 500), tile, overlap)
    assert choose_tile((3000, 4000), 800, 1333) is None  # a photograph is looked at as a whole
    assert choose_tile((10_000, 10_000), 800, 1333) == 800
    assert choose_tile((500, 9000), 800, 1333) == 800
    assert choose_tile((256, 320), 256, 512) is None


# --- merging


def look(truth, grid, *, hide=()):
    """What an oracle finds in each tile. ``truth``: (mask, class, score) of the whole picture."""
    found = []
    boxes = [mask.box() for mask, _, _ in truth]
    for k, (x1, y1, x2, y2) in enumerate(grid.tiles):
        records = []
        for i, (mask, category, score) in enumerate(truth):
            left, top, right, bottom = boxes[i]
            if left >= x2 or top >= y2 or right <= x1 or bottom <= y1:
                continue
            part = runs.cut(mask, (x1, y1, x2, y2))
            if not part.area() or (i, k) in hide:
                continue
            part = runs.move(part, (-x1, -y1), (y2 - y1, x2 - x1))
            records.append(record(part, category, score))
        found.append(records)
    return found


def record(mask: Runs, category: int = 1, score: float = 0.5):
    x1, y1, x2, y2 = mask.box()
    return {
        "image_id": 9,
        "category_id": category,
        "score": score,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "segmentation": mask.encode(),
    }


def as_set(records):
    return sorted((r["segmentation"]["counts"], r["category_id"], r["score"]) for r in records)


def check(truth, grid):
    found = merge(look(truth, grid), grid)
    expected = [record(*one) for one in truth]
    assert as_set(found) == as_set(expected)
    assert [r["score"] for r in found] == sorted((r["score"] for r in found), reverse=True)
    for one in found:
        box = decode(one["segmentation"], grid.size).box()
        assert one["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def blobs(size, count, seed, largest):
    """Objects in one piece without common pixels; many touch."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    masks = []
    for _ in range(count):
        cy, cx = random.uniform(0, size[0]), random.uniform(0, size[1])
        radius = np.exp(random.uniform(0, math.log(largest)))
        wave = 1 + 0.4 * np.sin(3 * np.arctan2(y - cy, x - cx) + random.uniform(0, 6))
        masks.append(runs.of_window(np.hypot(y - cy, x - cx) < radius * wave, (0, 0), size))
    masks = sorted(masks, key=Runs.area)
    masks = [runs.drop_islands(mask) for mask in runs.separate(masks)]
    masks = [mask for mask in masks if mask.area()]
    scores = sorted(random.random(len(masks)).round(2).tolist(), reverse=True)
    return [
        (mask, int(random.integers(1, 3)), score) for mask, score in zip(masks, scores, strict=True)
    ]


@settings(max_examples=80, deadline=None)
@given(grids(least=10), st.integers(1, 20), st.integers(0, 2**32))
def test_an_oracle_gets_every_object_back(case, count, seed):
    grid, _ = case
    check(blobs(grid.size, count, seed, largest=max(grid.size)), grid)


def rectangle(size, x1, y1, x2, y2):
    return runs.of_window(np.ones((y2 - y1, x2 - x1), dtype=bool), (x1, y1), size)


SIZE = (100, 180)
GRID = lay(SIZE, 100, 20)  # x 0..100 and 80..180


def test_two_tiles_by_hand():
    assert GRID.tiles == [(0, 0, 100, 100), (80, 0, 180, 100)]
    assert GRID.cores == [(0, 0, 90, 100), (90, 0, 180, 100)]
    check([(rectangle(SIZE, 60, 10, 140, 30), 1, 0.9)], GRID)  # cut by both
    check([(rectangle(SIZE, 84, 10, 95, 30), 1, 0.9)], GRID)  # whole in both
    check([(rectangle(SIZE, 60, 10, 95, 30), 1, 0.9)], GRID)  # whole in one
    # Neighbours that touch along a line inside the band, and along its edges.
    for x in (80, 81, 90, 99, 100):
        left, right = rectangle(SIZE, 50, 10, x, 30), rectangle(SIZE, x, 10, 130, 30)
        check([(left, 1, 0.9), (right, 1, 0.8)], GRID)
    for y in (10, 20):
        upper, lower = rectangle(SIZE, 50, 5, 130, y), rectangle(SIZE, 50, y, 130, 60)
        check([(upper, 1, 0.9), (lower, 1, 0.9)], GRID)


def test_classes_and_scores():
    mask = rectangle(SIZE, 60, 10, 140, 30)
    found = look([(mask, 1, 0.4)], GRID)
    found[1][0]["score"] = 0.7
    [one] = merge(found, GRID)
    assert one["score"] == 0.7  # the best of the parts
    assert one["image_id"] == 9
    found[1][0]["category_id"] = 2
    assert [r["category_id"] for r in merge(found, GRID)] == [2, 1]  # two classes, two objects
    # Of an object that is whole in both, the mask comes from where it is farther from the edge.
    whole = rectangle(SIZE, 82, 10, 92, 30)
    found = look([(whole, 1, 0.4)], GRID)
    found[1][0]["segmentation"] = rectangle((100, 100), 2, 10, 12, 29).encode()
    found[1][0]["score"] = 0.8
    [one] = merge(found, GRID)
    assert one["segmentation"] == whole.encode()
    assert one["score"] == 0.8


def test_two_detections_of_one_object_stay_two():
    """As without tiles: a seam neither adds detections nor takes any away."""
    one, other = rectangle(SIZE, 60, 10, 140, 30), rectangle(SIZE, 61, 11, 142, 32)
    check([(one, 1, 0.9), (other, 1, 0.5)], GRID)


def test_a_fragment_is_not_reported_beside_the_whole():
    """A tile that sees only the end of an object gets its outline wrong."""
    whole = rectangle(SIZE, 82, 10, 140, 60)
    found = look([(whole, 1, 0.6)], GRID)
    tile = (100, 100)
    found[0] = [record(rectangle(tile, 84, 12, 100, 30), 1, 0.8)]  # IoU in the band below 0.5
    [one] = merge(found, GRID)
    assert one["segmentation"] == whole.encode()
    found[0][0]["category_id"] = 2  # the end of an object may look like something else
    assert [r["category_id"] for r in merge(found, GRID)] == [1]
    # What is no part of it, or not cut off, stays an object of its own.
    for box in [(90, 70, 100, 80), (84, 12, 95, 30)]:
        for category in (1, 2):
            found[0] = [record(rectangle(tile, *box), category, 0.8)]
            assert len(merge(found, GRID)) == 2
    # So does what is found once more, as the same, by another tile.
    size = (180, 180)
    grid = lay(size, 100, 20)
    found = look([(rectangle(size, 82, 10, 140, 70), 1, 0.6)], grid)
    small = rectangle(size, 84, 60, 140, 96)
    found[0] += look([(small, 2, 0.4)], grid)[0]
    assert len(merge(found, grid)) == 1 + 1
    found[2] += look([(small, 2, 0.4)], grid)[2]
    assert len(merge(found, grid)) == 1 + 1


def test_a_fragment_of_what_no_tile_sees_whole_is_joined():
    size = (100, 260)
    grid = lay(size, 100, 20)
    assert len(grid.tiles) == 3
    whole = rectangle(size, 70, 10, 200, 60)
    found = look([(whole, 1, 0.6)], grid)
    found[0] = [record(rectangle((100, 100), 70, 12, 100, 30), 1, 0.8)]  # a part of its height
    [one] = merge(found, grid)
    expected = runs.union([rectangle(size, 70, 12, 100, 30), rectangle(size, 90, 10, 200, 60)])
    assert one["segmentation"] == expected.encode()
    assert one["score"] == 0.8
    found[0][0]["category_id"] = 2
    assert len(merge(found, grid)) == 2


def test_what_only_one_tile_found_is_kept():
    mask = rectangle(SIZE, 60, 10, 140, 30)
    [left] = merge(look([(mask, 1, 0.5)], GRID, hide={(0, 1)}), GRID)
    assert left["segmentation"] == rectangle(SIZE, 60, 10, 100, 30).encode()
    # Of four tiles one found nothing: its neighbours decide in its core as far as they see.
    size = (180, 180)
    grid = lay(size, 100, 20)
    whole = rectangle(size, 60, 60, 120, 120)
    [one] = merge(look([(whole, 1, 0.5)], grid, hide={(0, 3)}), grid)
    missing = rectangle(size, 100, 100, 120, 120)
    assert one["segmentation"] == runs.subtract(whole, [missing]).encode()
    assert one["bbox"] == [60, 60, 60, 60]


def test_noise_beyond_the_core_does_not_enter_the_union():
    """Masks are least certain next to the edge of a tile: the other tile decides there."""
    mask = rectangle(SIZE, 60, 10, 140, 30)
    found = look([(mask, 1, 0.5)], GRID)
    noisy = runs.union(
        [rectangle((100, 100), 60, 10, 100, 30), rectangle((100, 100), 96, 5, 100, 35)]
    )
    found[0][0]["segmentation"] = noisy.encode()
    [one] = merge(found, GRID)
    assert one["segmentation"] == mask.encode()


def test_objects_across_many_tiles():
    size = (300, 300)
    grid = lay(size, 110, 12)
    assert len(grid.tiles) == 9
    ring = np.zeros(size, dtype=bool)
    ring[20:280, 20:280] = True
    ring[45:255, 45:255] = False  # a thin ring through eight tiles, not through the middle one
    inner = np.zeros(size, dtype=bool)
    inner[60:240, 60:240] = True
    y, x = np.mgrid[:300, :300]
    spiral = (np.hypot(y - 150, x - 150) - 18 * np.arctan2(y - 150, x - 150)) % 113.1 < 25
    masks = [runs.of_window(mask, (0, 0), size) for mask in (ring, inner)]
    check([(mask, 1, 0.9) for mask in masks], grid)
    check([(runs.drop_islands(runs.of_window(spiral, (0, 0), size)), 1, 0.9)], grid)
    check([(rectangle(size, 0, 0, 300, 300), 1, 0.9)], grid)


def test_one_tile_changes_nothing():
    grid = lay(SIZE, 1000, 100)
    records = [record(rectangle(SIZE, 0, 0, 5, 5), 1, 0.1), record(rectangle(SIZE, 3, 3, 9, 9))]
    assert merge([records], grid) == records
    assert merge([[], []], GRID) == []
    with pytest.raises(ValueError, match="RLE of size"):
        merge([records, []], GRID)


# --- 100 megapixels


def draw_large(grid, count=2000, seed=0):
    """Wavy objects of 6 to 3,000 pixels: some on seams and corners, many touching."""
    random = np.random.default_rng(seed)
    height, width = grid.size
    radius = np.exp(random.uniform(np.log(3), np.log(130), round(count * 1.2)))
    radius[:12] = random.uniform(600, 1500, 12)
    centres = random.uniform(0, (width, height), (len(radius), 2))
    crossings = np.array(sorted({(x2, y2) for _, _, x2, y2 in grid.cores}), dtype=float)
    radius[12 : 12 + len(crossings)] = random.uniform(90, 200, len(crossings))
    centres[12 : 12 + len(crossings)] = crossings + random.uniform(-20, 20, crossings.shape)
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    masks = []
    for (x, y), reach in zip(centres, radius, strict=True):
        r = reach * (1 + 0.25 * np.sin(3 * angle + x) + 0.1 * np.sin(7 * angle + y))
        outline = np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], 1)
        outline = outline.clip(0, (width, height))
        masks.append(decode([outline.ravel().tolist()], grid.size))
    masks = runs.separate([mask for mask in sorted(masks, key=Runs.area) if mask.area()])
    masks = [runs.drop_islands(mask) for mask in masks if mask.area()]
    keep = [*masks[: count - 300], *masks[-300:]]
    return [(mask, int(random.integers(1, 4)), float(random.random())) for mask in keep]


def predict_large() -> None:
    """In a process of its own, for its memory: prints seconds and the peak in MB."""
    grid = lay((10_000, 10_000), 1024, 128)
    truth = draw_large(grid)
    boxes = np.array([mask.box() for mask, _, _ in truth])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
    crossed = sum(
        not any(x1 <= a and y1 <= b and c <= x2 and d <= y2 for x1, y1, x2, y2 in grid.tiles)
        for a, b, c, d in boxes.tolist()
    )
    assert len(truth) == 2000
    assert (sides > 1024).sum() >= 8
    assert crossed > 50
    whole = runs.union([mask for mask, _, _ in truth])
    assert whole.area() == sum(mask.area() for mask, _, _ in truth)
    picture = torch.full((3, *grid.size), 7, dtype=torch.uint8)
    found = []
    for (x1, y1, x2, y2), records in zip(grid.tiles, look(truth, grid), strict=True):
        assert picture[:, y1:y2, x1:x2].float().mean() == 7
        found.append(records)
    start = time.process_time()
    merged = merge(found, grid)
    seconds = time.process_time() - start
    assert as_set(merged) == as_set([record(*one) for one in truth])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    count = sum(map(len, found))
    print(f"{count} parts merged in {seconds:.1f} CPU seconds; the process took {peak:.0f} MB")


def test_2000_objects_in_100_megapixels():
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    parts, seconds, peak = map(float, re.findall(r"[\d.]+", done.stdout))
    assert parts > 2200  # seams did cut
    assert seconds < 30
    assert peak < 2000  # MB, of which 300 are the picture


if __name__ == "__main__":
    predict_large()


@pytest.mark.parametrize("overlap", [1, 100, 5000])
def test_nothing_overlaps_in_a_picture_seen_whole(overlap):
    assert lay((50, 80), None, overlap) == lay((50, 80), None)
