import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.nn import functional as F
from torchvision.ops import roi_align

from brefine.parts.masks import crop, encode, paste, to_records, touching
from brefine.structures import Bitmaps, Category, Instances

FRAME = (61, 83)


def blobs(count: int, seed: int, frame: tuple[int, int] = FRAME) -> torch.Tensor:
    """Random curved masks [N, H, W], some of which touch the border."""
    noise = torch.randn(count, 1, 6, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=frame, mode="bicubic")[:, 0] > 0.4


def random_boxes(count: int, seed: int, frame: tuple[int, int] = FRAME) -> torch.Tensor:
    """RoIs inside, across and outside the frame, from a fraction of a pixel to larger than it."""
    random = torch.Generator().manual_seed(seed)
    height, width = frame
    span = torch.tensor([width, height])
    corner = (torch.rand(count, 2, generator=random) * 1.4 - 0.3) * span
    side = torch.rand(count, 2, generator=random) ** 2 * span * 1.2
    return torch.cat([corner, corner + side], 1)


HARD_BOXES = torch.tensor(
    [
        [0, 0, 83, 61],
        [-0.5, -0.5, 83.5, 61.5],
        [-1, -1, 84, 62],
        [-40, -40, -2, -2],
        [90, 70, 120, 90],
        [82, 60, 83, 61],
        [10, 10, 10, 10],
        [10, 10, 10.2, 40],
        [30, 30, 20, 20],  # inverted
        [82.6, 3, 83.9, 8],
        [-3, 20, 100, 21],
    ]
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 14, 28])
def test_crop_is_roi_align(aligned, sampling_ratio, size):
    masks = blobs(7, seed=0)
    masks[3] = False
    boxes = torch.cat([random_boxes(60, seed=size), HARD_BOXES])
    index = torch.arange(len(boxes)) % len(masks)
    expected = roi_align(
        masks.float()[:, None],
        torch.cat([index[:, None], boxes], 1),
        size,
        1.0,
        sampling_ratio,
        aligned,
    )[:, 0]
    options = {"aligned": aligned, "sampling_ratio": sampling_ratio}
    soft = crop(Bitmaps.of(masks), boxes, index, size, FRAME, soft=True, **options)
    assert (soft - expected).abs().max() < 2e-6
    hard = crop(Bitmaps.of(masks), boxes, index, size, FRAME, **options)
    clear = (expected - 0.5).abs() > 1e-5
    assert torch.equal(hard[clear], (expected >= 0.5).float()[clear])
    assert set(hard.unique().tolist()) <= {0.0, 1.0}


def test_crop_of_nothing_and_of_empty_masks():
    none = Bitmaps.of(torch.zeros(0, *FRAME))
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert crop(none, *empty, 14, FRAME).shape == (0, 14, 14)
    blank = Bitmaps.of(torch.zeros(2, *FRAME))
    cut = crop(blank, torch.tensor([[3.0, 3, 40, 40]]), torch.tensor([1]), 14, FRAME)
    assert cut.shape == (1, 14, 14)
    assert cut.sum() == 0


def dense_paste(
    logits: torch.Tensor, box: torch.Tensor, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The mask from its definition, with grid_sample over the whole picture.

    Also where its value is so close to 0 that rounding decides.
    """
    height, width = size
    x1, y1, x2, y2 = box.double()
    xs, ys = torch.arange(width).double() + 0.5, torch.arange(height).double() + 0.5
    grid = torch.stack(
        torch.broadcast_tensors(
            (xs - x1) / (x2 - x1) * 2 - 1, ((ys - y1) / (y2 - y1) * 2 - 1)[:, None]
        ),
        -1,
    )
    value = F.grid_sample(
        logits[None, None].double(), grid[None], padding_mode="border", align_corners=False
    )[0, 0]
    inside = ((xs >= x1) & (xs < x2)) & ((ys >= y1) & (ys < y2))[:, None]
    return ((value > 0) & inside).numpy(), (value.abs() < 1e-6).numpy()


def dense(runs) -> np.ndarray:
    return coco_mask.decode(runs.encode()).astype(bool)


@pytest.mark.parametrize("side", [1, 2, 14, 28, 56])
@pytest.mark.parametrize("columns", [7, 2**12])
def test_paste_is_grid_sample_at_pixel_centres(side, columns, monkeypatch):
    monkeypatch.setattr("brefine.runs.COLUMNS", columns)  # objects may fall into several portions
    boxes = torch.cat([random_boxes(40, seed=side), HARD_BOXES])
    random = torch.Generator().manual_seed(side)
    logits = torch.randn(len(boxes), side, side, generator=random)
    logits[::5] = logits[::5].round()  # zeros and equal neighbours
    pasted = paste(logits, boxes, FRAME)
    assert len(pasted) == len(boxes)
    seen = 0
    for box, logit, runs in zip(boxes, logits, pasted, strict=True):
        assert runs.counts.sum() == FRAME[0] * FRAME[1]
        expected, doubtful = dense_paste(logit, box, FRAME)
        assert not ((dense(runs) != expected) & ~doubtful).any()
        seen += int((~doubtful & expected).sum())
    assert seen > 1000


def test_paste_of_nothing_of_zeros_and_of_what_is_no_number():
    assert paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), FRAME) == []
    box = torch.tensor([[10.0, 10, 30, 30]])
    assert paste(torch.zeros(1, 28, 28), box, FRAME)[0].area() == 0  # more than 0 is inside
    for value, area in ((torch.inf, 400), (-torch.inf, 0), (torch.nan, 0)):
        assert paste(torch.full((1, 28, 28), value), box, FRAME)[0].area() == area
    halves = torch.tensor([[[-torch.inf, torch.inf]] * 2])
    [mask] = paste(halves, box, FRAME)
    assert mask.box() == (20, 10, 30, 30)
    assert mask.area() == 200


def test_a_pixel_whose_value_is_0_is_outside():
    """The zero between -1 and 1 lies at the very centre of pixel 2 of 5."""
    rising = torch.tensor([[-1.0, -1], [1, 1]])
    logits = torch.stack([rising, -rising, rising.mT, -rising.mT])
    pasted = paste(logits, torch.tensor([[0.0, 0, 5, 5]]).expand(4, 4), (5, 5))
    boxes = [runs.box() for runs in pasted]
    assert boxes == [(0, 3, 5, 5), (0, 0, 5, 2), (3, 0, 5, 5), (0, 0, 2, 5)]


def test_paste_is_interpolate_when_the_box_is_a_multiple_of_the_grid():
    logits = torch.randn(1, 14, 14, generator=torch.Generator().manual_seed(5))
    [runs] = paste(logits, torch.tensor([[10.0, 3, 52, 31]]), FRAME)
    expected = F.interpolate(logits[None], size=(28, 42), mode="bilinear")[0, 0] > 0
    found = dense(runs)
    assert np.array_equal(found[3:31, 10:52], expected.numpy())
    assert found.sum() == expected.sum()


def test_paste_then_crop_returns_the_label():
    """The two grids agree: no half-pixel shift between training targets and pasted masks."""
    y, x = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    label = ((x - 10.3) ** 2 + (y - 15.8) ** 2 < 60).float()
    box = torch.tensor([[5.0, 2, 5 + 56, 2 + 56]])
    window, origin = paste(label[None] * 2 - 1, box, FRAME)[0].window()
    bitmaps = Bitmaps([window], torch.tensor([origin]))
    again = crop(bitmaps, box, torch.tensor([0]), 28, FRAME)[0]
    assert (again != label).sum() <= 4


# --- drawn shapes in a picture of 12 megapixels. The logits are the exact signed distance to the
# outline at the centres of 56 x 56 cells. The RoI has a cell to spare around the shape: in the
# outer half cell logits are constant, so an outline cannot be followed there.

LARGE = (3000, 4000)


def around(centre, radius):
    """RoI [4] of a shape within ``radius``, and the (x, y) of its cells' centres, [56] each."""
    half = radius / (1 - 2 / 56)
    box = torch.tensor([centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half])
    steps = (np.arange(56) + 0.5) / 56 * 2 * half - half
    return box.double(), centre[0] + steps, centre[1] + steps


def pasted_and_distance(distance, box, x, y):
    """The mask in the RoI's pixels, the distance there, and that no pixel is set elsewhere."""
    logits = torch.from_numpy(distance(x[None], y[:, None]))[None]
    [runs] = paste(logits, box[None], LARGE)
    window, (left, top) = runs.window()
    x1, y1, x2, y2 = box.round().int().clamp(min=0).tolist()
    x2, y2 = min(x2, LARGE[1]), min(y2, LARGE[0])
    mask = np.zeros((y2 - y1, x2 - x1), bool)
    mask[top - y1 : top - y1 + window.shape[0], left - x1 : left - x1 + window.shape[1]] = window
    assert mask.sum() == runs.area()
    return mask, distance(np.arange(x1, x2)[None] + 0.5, np.arange(y1, y2)[:, None] + 0.5)


@pytest.mark.parametrize(
    ("centre", "radius"),
    [((1700.3, 1250.8), 900), ((300.1, 2950.6), 1200), ((2000, 1500), 40), ((999.5, 40.2), 7.7)],
)
def test_a_disc_is_drawn_within_a_pixel(centre, radius):
    def distance(x, y):
        return radius - np.hypot(x - centre[0], y - centre[1])

    mask, exact = pasted_and_distance(distance, *around(centre, radius))
    wrong = mask != (exact > 0)
    assert np.abs(exact[wrong]).max(initial=0) < 1
    assert mask.any()


def star(centre, radius, points=5):
    angle = np.arange(2 * points) * np.pi / points + 0.2
    reach = np.where(np.arange(2 * points) % 2, 0.45, 1) * radius
    return np.stack([centre[0] + reach * np.cos(angle), centre[1] + reach * np.sin(angle)], 1)


def polygon_distance(corners, x, y):
    """Signed distance to a polygon, more than 0 inside."""
    x, y = np.broadcast_arrays(x, y)
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        share = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
        share = share.clip(0, 1)
        squared = (x - ax - share * (bx - ax)) ** 2 + (y - ay - share * (by - ay)) ** 2
        nearest = np.minimum(nearest, squared)
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.sqrt(nearest) * np.where(inside, 1, -1)


def test_a_star_is_drawn_within_a_pixel_but_for_its_corners():
    """Straight sides are exact; a corner is finer than a grid of 56 and is rounded off."""
    centre, radius = (2100.4, 1400.7), 600
    corners = star(centre, radius)
    box, x, y = around(centre, radius)
    mask, exact = pasted_and_distance(lambda *at: polygon_distance(corners, *at), box, x, y)
    rows, columns = np.nonzero((mask != (exact > 0)) & (np.abs(exact) >= 1))
    left, top = box[:2].round().int().tolist()
    points = np.stack([columns + left + 0.5, rows + top + 0.5], 1)
    to_corner = np.hypot(*(points[:, None] - corners).transpose(2, 0, 1)).min(1)
    cell = float(box[2] - box[0]) / 56
    assert to_corner.max(initial=0) < 3 * cell
    inside = exact > 0
    assert (mask & inside).sum() / (mask | inside).sum() > 0.99


def test_a_star_that_the_grid_can_hold_is_exact():
    """A star with four curved spikes, bilinear in each quadrant, whose axes are cell centres."""
    centre, radius, bend = (2000.0, 1500.0), 1100, 4.0

    def height(x, y):  # of a tent with spikes; 0 on the outline
        across, down = np.abs(x - centre[0]) / radius, np.abs(y - centre[1]) / radius
        return 1 - across - down - bend * across * down

    cell = 2 * radius / 52
    left, top = centre[0] - 28.5 * cell, centre[1] - 28.5 * cell  # cell 28's centre is the star's
    box = torch.tensor([left, top, left + 56 * cell, top + 56 * cell], dtype=torch.float64)
    steps = (np.arange(56) + 0.5) * cell
    mask, exact = pasted_and_distance(height, box, left + steps, top + steps)
    assert np.abs(exact[mask != (exact > 0)]).max(initial=0) < 1e-5  # rounding on the outline
    assert mask.sum() > 100_000


def test_paste_takes_little_memory_for_an_object_of_100_megapixels():
    """The dense logits of this window would be 400 MB."""
    y, x = torch.meshgrid(torch.arange(56), torch.arange(56), indexing="ij")
    logits = 15.0 - torch.hypot(x - 27.5, y - 27.5)[None]
    box = torch.tensor([[0.0, 0, 10_000, 10_000]])
    tracemalloc.start()
    [runs] = paste(logits, box, (10_000, 10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    radius = 15 / 56 * 10_000
    assert runs.area() == pytest.approx(np.pi * radius**2, rel=0.001)
    assert peak < 10_000_000


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_encode_is_pycocotools_encode(data):
    height, width = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    y = data.draw(st.integers(0, height))
    x = data.draw(st.integers(0, width))
    h = data.draw(st.integers(0, height - y))
    w = data.draw(st.integers(0, width - x))
    bits = data.draw(st.lists(st.booleans(), min_size=h * w, max_size=h * w))
    window = np.array(bits, dtype=bool).reshape(h, w)
    dense = np.zeros((height, width), dtype=np.uint8, order="F")
    dense[y : y + h, x : x + w] = window
    rle = encode(torch.from_numpy(window), (x, y), (height, width))
    expected = coco_mask.encode(dense)
    assert rle == {"size": [height, width], "counts": expected["counts"].decode()}
    assert np.array_equal(coco_mask.decode(rle), dense)


@pytest.mark.parametrize("fill", [False, True])
def test_encode_of_blank_and_full_pictures(fill):
    dense = np.full((5, 7), fill, dtype=np.uint8, order="F")
    expected = coco_mask.encode(dense)["counts"].decode()
    assert encode(dense, (0, 0), (5, 7))["counts"] == expected
    if not fill:
        assert encode(dense[:0, :0], (3, 2), (5, 7))["counts"] == expected


def test_to_records_scales_boxes_and_keeps_objects_without_pixels():
    categories = [Category(7, "a"), Category(90, "b")]
    boxes = [
        [10, 10, 30, 20],
        [-50, -50, -20, -20],
        [500, 5, 600, 9],
        [4.6, 4.6, 4.7, 4.7],
        [8, 8, 8, 8],
    ]
    found = Instances(
        size=(40, 60),
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor([1, 0, 1, 0, 1]),
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]),
        logits=torch.ones(5, 28, 28),
    )
    records = to_records(found, 42, categories, (80, 180))
    assert [r["category_id"] for r in records] == [90, 7, 90, 7, 90]
    assert [r["image_id"] for r in records] == [42] * 5
    assert records[0]["bbox"] == [30, 20, 60, 20]
    assert records[0]["score"] == pytest.approx(0.9)
    mask = coco_mask.decode(records[0]["segmentation"])
    assert mask.shape == (80, 180)
    assert mask.sum() == 60 * 20
    assert mask[20:40, 30:90].all()
    for record in records[1:]:
        assert coco_mask.area(record["segmentation"]) == 0
        assert record["segmentation"]["size"] == [80, 180]


def test_to_records_of_labels_keeps_their_masks():
    masks = blobs(3, seed=9)
    bitmaps = Bitmaps.of(masks)
    labels = Instances(FRAME, bitmaps.boxes(), torch.tensor([0, 0, 0]), masks=bitmaps)
    records = to_records(labels, 1, [Category(1, "a")], FRAME)
    for record, mask in zip(records, masks, strict=True):
        assert np.array_equal(coco_mask.decode(record["segmentation"]), mask.numpy())
        assert record["score"] == 1
    with pytest.raises(ValueError, match="size"):
        to_records(labels, 1, [Category(1, "a")], (2 * FRAME[0], FRAME[1]))


def test_a_margin_is_where_logits_span_more_than_the_box():
    """Masks may leave the box then; the box that is reported stays."""
    one = Instances(
        size=(40, 60),
        boxes=torch.tensor([[10.0, 10, 30, 20]]),
        labels=torch.tensor([0]),
        scores=torch.tensor([0.9]),
        logits=torch.ones(1, 28, 28),
        margin=0.25,
    )
    [record] = to_records(one, 1, [Category(1, "a")], (80, 120))
    assert record["bbox"] == [20, 20, 40, 20]
    assert coco_mask.toBbox(record["segmentation"]).tolist() == [10, 15, 60, 30]


def test_masks_that_touch_their_roi():
    """Four discs: inside, cut at the left, cut only by the picture's border, and empty."""
    y, x = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")

    def disc(cx, radius=9.0):
        return radius - torch.hypot(x - cx, y - 13.5)

    found = Instances(
        size=(60, 80),
        boxes=torch.tensor([[20.0, 10, 60, 50], [20, 10, 60, 50], [0, 10, 40, 50], [5, 5, 30, 30]]),
        labels=torch.zeros(4, dtype=torch.int64),
        logits=torch.stack([disc(13.5), disc(2.0), disc(2.0), disc(13.5, -1.0)]),
    )

    def reach(things):
        return touching(things, to_records(things, 0, [Category(1, "a")], things.size)).tolist()

    assert reach(found) == [False, True, False, False]
    assert reach(replace(found, margin=0.2)) == [False, True, False, False]
    assert reach(found[torch.zeros(0, dtype=torch.int64)]) == []
    # A box that leaves the picture is cut by the border, not by itself.
    outside = replace(found, boxes=torch.tensor([[-0.4, -0.4, 80.4, 60.4]]).expand(4, 4))
    assert not any(reach(outside))
