import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from brefine.data.transforms import (
    GREY,
    VISIBLE,
    crop,
    flip,
    network_size,
    resize,
    resize_masks,
    tighten,
    transpose,
)
from brefine.structures import Bitmaps, Instances

FRAME = (61, 83)


def blobs(count, seed, frame=FRAME):
    """Random curved masks [N, H, W], some of which touch the border."""
    noise = torch.randn(count, 1, 6, 8, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, size=frame, mode="bicubic")[:, 0] > 0.3).to(torch.uint8)


def labels_of(masks, seed=0):
    bitmaps = Bitmaps.of(masks)
    return Instances(
        tuple(masks.shape[1:]), bitmaps.boxes(), torch.arange(len(masks)), None, bitmaps
    )


def noise(frame, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *frame), dtype=torch.uint8, generator=random)


# ------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 900), 800, 1333, (444, 1333)),  # the long side decides
        ((800, 800), 800, 1333, (800, 800)),
        ((1600, 1200), 600, 1000, (800, 600)),
        ((1, 5000), 800, 1333, (1, 1333)),
        ((1, 1), 800, 1333, (800, 800)),
        ((3, 4), 100, 50, (38, 50)),
    ],
)
def test_network_size(size, short, long, expected):
    assert network_size(size, short, long) == expected


side = st.integers(1, 5000)


@given(side, side, side, side)
def test_network_size_never_exceeds_either_side(height, width, short, long):
    size = network_size((height, width), short, long)
    assert min(size) >= 1
    assert min(size) <= max(short, 1)
    assert max(size) <= max(long, 1)
    assert min(size) == short or max(size) == long


# ------------------------------------------------------------------------------- masks

SIZES = [(61, 83), (122, 166), (30, 41), (200, 91), (17, 300), (75, 102), (7, 9), (1, 1), (60, 84)]


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_those_of_the_dense_resize(size):
    masks = blobs(12, seed=sum(size))
    masks[3] = 1
    expected = F.interpolate(masks.float()[:, None], size, mode="bilinear", antialias=True)[:, 0]
    result = resize_masks(Bitmaps.of(masks), FRAME, size)
    dense = result.dense(size)
    sure = (expected - 0.5).abs() > 1e-4
    alive = (expected >= 0.5 - 1e-5).flatten(1).any(1)
    assert torch.equal(dense[alive][sure[alive]], (expected >= 0.5)[alive][sure[alive]].byte())
    assert dense.flatten(1).any(1).all()
    for window, tight in zip(result.windows, Bitmaps.of(dense).windows, strict=True):
        assert torch.equal(window, tight)  # windows are tight, uint8 and contiguous
        assert window.is_contiguous()


@settings(deadline=None, max_examples=100)
# Widths from 2 on: torch's float kernel repeats the first row when the result is 1 pixel wide.
@given(st.integers(0, 2**31), st.integers(1, 90), st.integers(2, 90))
def test_masks_of_any_window_at_any_scale(seed, height, width):
    random = torch.Generator().manual_seed(seed)
    frame = (int(torch.randint(1, 40, (), generator=random)), 23)
    masks = (
        torch.rand(4, *frame, generator=random)
        < torch.tensor([0.02, 0.3, 0.7, 0.95])[:, None, None]
    )
    masks = F.max_pool2d(masks.float(), 3, 1, 1) if seed % 2 else masks.float()
    expected = F.interpolate(masks[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
    dense = resize_masks(Bitmaps.of(masks), frame, (height, width)).dense((height, width))
    for mask, result, value in zip(masks, dense, expected, strict=True):
        assert bool(mask.any()) == bool(result.any())
        if (value > 0.5 + 1e-4).any():
            sure = (value - 0.5).abs() > 1e-4
            assert torch.equal(result.bool()[sure], (value >= 0.5)[sure])


@pytest.mark.parametrize("scale", [0.37, 0.5, 0.8, 1.25, 1.5, 2, 3.3])
def test_the_outline_stays_true_to_half_a_pixel(scale):
    # A disc: each pixel's centre is inside or outside of the scaled circle.
    y, x = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    disc = ((y - 58.3) ** 2 + (x - 77.6) ** 2 < 41.2**2)[None].byte()
    size = (round(120 * scale), round(160 * scale))
    result = resize_masks(Bitmaps.of(disc), (120, 160), size).dense(size)[0].bool()
    sy, sx = size[0] / 120, size[1] / 160
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    distance = torch.hypot(y / sy - 58.3, x / sx - 77.6) - 41.2  # in old pixels
    slack = 0.5 / min(scale, 1) + 0.25  # half a pixel of the coarser grid, and the label's own
    assert result[distance < -slack].all()
    assert not result[distance > slack].any()


@pytest.mark.parametrize("kind", ["row", "column", "diagonal", "dot"])
@pytest.mark.parametrize("size", [(20, 27), (12, 80), (9, 12), (3, 4)])
def test_thin_objects_do_not_disappear(kind, size):
    mask = torch.zeros(1, *FRAME, dtype=torch.uint8)
    if kind == "row":
        mask[0, 30, 5:75] = 1
    elif kind == "column":
        mask[0, 5:55, 40] = 1
    elif kind == "diagonal":
        mask[0, torch.arange(50), torch.arange(50)] = 1
    else:
        mask[0, 60, 82] = 1
    result = resize_masks(Bitmaps.of(mask), FRAME, size).dense(size)[0]
    area = mask.sum() * size[0] * size[1] / (FRAME[0] * FRAME[1])
    assert result.sum() >= max(1, 0.5 * area)
    assert result.sum() <= max(1, 2.5 * area)


def test_an_empty_mask_stays_empty():
    masks = Bitmaps.of(torch.zeros(2, *FRAME))
    for size in SIZES:
        result = resize_masks(masks, FRAME, size)
        assert [window.numel() for window in result.windows] == [0, 0]


def test_a_window_with_a_blank_rim_gives_the_same():
    masks = blobs(1, seed=4)
    loose = Bitmaps([masks[0, 2:, 1:]], torch.tensor([[1, 2]]))
    masks[0, :2] = masks[0, :, :1] = 0
    for size in SIZES:
        a, b = resize_masks(loose, FRAME, size), resize_masks(Bitmaps.of(masks), FRAME, size)
        assert torch.equal(a.dense(size), b.dense(size))


# ------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("frame", [(60, 90), (90, 60), (31, 200)])
@pytest.mark.parametrize("short", [25, 47, 120])
def test_resize_moves_picture_boxes_and_masks_alike(frame, short):
    # A bright object on black: where the picture is bright the mask is set.
    masks = torch.zeros(2, *frame, dtype=torch.uint8)
    masks[0, 3:20, 10:50] = 1
    masks[1, 26:31, 2:22] = 1
    picture = (masks.amax(0) * 255)[None].repeat(3, 1, 1)
    pixels, target = resize(picture, labels_of(masks), short, 150)
    assert pixels.dtype == torch.uint8
    assert tuple(pixels.shape[1:]) == target.size == network_size(frame, short, 150)
    dense = target.masks.dense(target.size)
    bright = pixels[0].float()
    assert (bright[dense.amax(0) > 0] >= 126).all()
    assert (bright[dense.amax(0) == 0] <= 129).all()
    scale = torch.tensor([target.size[1] / frame[1], target.size[0] / frame[0]]).repeat(2)
    expected = torch.tensor([[10.0, 3, 50, 20], [2, 26, 22, 31]]) * scale
    assert (target.boxes - expected).abs().max() <= 0.5
    assert target.labels.tolist() == [0, 1]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 200), st.integers(2, 300))
def test_boxes_hold_the_centres_of_their_masks(seed, short, long):
    masks = blobs(5, seed)
    masks[0] = 0
    masks[0, 7, 3:80] = 1  # thin: found again by its area
    masks = masks[masks.flatten(1).any(1).bool()]
    _, target = resize(noise(FRAME), labels_of(masks), short, long)
    tight = target.masks.boxes()
    assert (target.boxes[:, :2] <= tight[:, :2] + 0.5).all()
    assert (target.boxes[:, 2:] >= tight[:, 2:] - 0.5).all()
    assert (target.boxes >= -1e-3).all()
    limit = torch.tensor(target.size[::-1]).repeat(2)
    assert (target.boxes <= limit + 1e-3).all()


def test_resize_without_labels_and_without_objects():
    picture = noise((40, 60))
    pixels, none = resize(picture, None, 20, 100)
    assert pixels.shape == (3, 20, 30)
    assert none is None
    empty = labels_of(torch.zeros(0, 40, 60))
    pixels, target = resize(picture, empty, 20, 100)
    assert len(target) == len(target.masks) == 0
    assert target.size == (20, 30)
    same, target = resize(picture, empty, 40, 100)
    assert same is picture
    assert target is empty


def test_shrinking_averages_and_enlarging_does_not_overshoot():
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture[:, ::4] = 200  # two samples a pixel would only see the black rows
    pixels, _ = resize(picture, None, 16, 100)
    assert (pixels.float() - 50).abs().max() <= 25
    picture = torch.full((3, 20, 20), 60, dtype=torch.uint8)
    picture[:, :, 10:] = 200
    pixels, _ = resize(picture, None, 60, 100)
    assert pixels.amin() == 60
    assert pixels.amax() == 200
    assert (pixels[0, 0].diff() < 60).all()  # a ramp, no stair


# ------------------------------------------------------------------------------- flip


@pytest.mark.parametrize(("vertical", "axis"), [(False, 2), (True, 1)])
def test_flip_exchanges_two_sides(vertical, axis):
    masks = blobs(6, seed=1)
    picture = noise(FRAME)
    target = labels_of(masks)
    pixels, flipped = flip(picture, target, vertical=vertical)
    assert torch.equal(pixels, picture.flip(axis))
    assert torch.equal(flipped.masks.dense(FRAME), masks.flip(axis))
    assert torch.equal(flipped.boxes, Bitmaps.of(masks.flip(axis)).boxes())
    assert torch.equal(target.masks.dense(FRAME), masks)  # the original is as it was


def test_transpose_exchanges_x_and_y():
    masks = blobs(6, seed=5)
    picture = noise(FRAME)
    pixels, turned = transpose(picture, labels_of(masks))
    assert torch.equal(pixels, picture.mT)
    assert turned.size == FRAME[::-1]
    assert torch.equal(turned.masks.dense(turned.size), masks.mT)
    assert torch.equal(turned.boxes, Bitmaps.of(masks.mT).boxes())
    pixels, twice = transpose(pixels, turned)
    assert torch.equal(pixels, picture)
    assert torch.equal(twice.masks.dense(FRAME), masks)


def test_flip_twice_is_the_original():
    target = labels_of(blobs(6, seed=2))
    boxes = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) * 40
    boxes[:, 2:] += boxes[:, :2]
    target = Instances(FRAME, boxes, target.labels, masks=target.masks)
    pixels, twice = flip(*flip(noise(FRAME), target))
    assert torch.equal(pixels, noise(FRAME))
    assert torch.allclose(twice.boxes, boxes, atol=1e-5)
    assert torch.equal(twice.masks.origins, target.masks.origins)
    for a, b in zip(twice.masks.windows, target.masks.windows, strict=True):
        assert torch.equal(a, b)


def test_flip_without_objects():
    _, target = flip(noise(FRAME), labels_of(torch.zeros(0, *FRAME)))
    assert target.boxes.shape == (0, 4)
    assert target.masks.origins.shape == (0, 2)


def test_resizing_and_flipping_commute():
    # Exactly so for the labels: neither shifts the outline.
    masks = blobs(6, seed=3)
    picture = noise(FRAME)
    _, a = flip(*resize(picture, labels_of(masks), 47, 200))
    _, b = resize(*flip(picture, labels_of(masks)), 47, 200)
    assert np.mean((a.masks.dense(a.size) != b.masks.dense(b.size)).numpy()) < 1e-4
    assert torch.allclose(a.boxes, b.boxes, atol=1e-4)


# ------------------------------------------------------------------------------- crop


offset = st.integers(-70, 70)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**31), offset, offset, st.integers(1, 120), st.integers(1, 120))
def test_a_crop_is_the_dense_crop_less_what_is_hardly_visible(seed, x, y, height, width):
    masks = blobs(5, seed)
    masks = masks[masks.flatten(1).any(1).bool()]
    picture = noise(FRAME)
    pixels, target = crop(picture, labels_of(masks), (x, y), (height, width))

    # The same in a frame so large that it needs no care.
    margin = 130
    wide = F.pad(picture, [margin] * 4, value=GREY)
    deep = F.pad(masks, [margin] * 4)
    part = (..., slice(y + margin, y + margin + height), slice(x + margin, x + margin + width))
    assert torch.equal(pixels, wide[part])
    left = deep[part].flatten(1).sum(1) / masks.flatten(1).sum(1)
    keep = (left >= VISIBLE) & (left > 0)
    assert target.size == (height, width)
    assert target.labels.tolist() == keep.nonzero()[:, 0].tolist()
    assert torch.equal(target.masks.dense(target.size), deep[part][keep])
    assert torch.equal(target.boxes, Bitmaps.of(deep[part][keep]).boxes())
    for window, tight in zip(
        target.masks.windows, Bitmaps.of(deep[part][keep]).windows, strict=True
    ):
        assert torch.equal(window, tight)


def test_an_object_of_which_a_tenth_is_left_is_kept():
    mask = torch.zeros(1, 10, 40, dtype=torch.uint8)
    mask[:, :, 5:25] = 1  # 20 columns
    picture = torch.zeros(3, 10, 40, dtype=torch.uint8)
    for columns, count in [(2, 1), (1, 0)]:
        _, target = crop(picture, labels_of(mask), (25 - columns, 0), (10, 10))
        assert len(target) == count
    one = torch.zeros(1, 10, 40, dtype=torch.uint8)
    one[0, 3, 3] = 1
    assert len(crop(picture, labels_of(one), (4, 0), (10, 10))[1]) == 0
    assert len(crop(picture, labels_of(one), (3, 3), (1, 1))[1]) == 1


def test_a_crop_leaves_its_input_as_it_was():
    masks = blobs(4, seed=8)
    target, picture = labels_of(masks), noise(FRAME)
    crop(picture, target, (-3, 10), (30, 30))
    assert torch.equal(target.masks.dense(FRAME), masks)
    assert torch.equal(picture, noise(FRAME))


def test_tighten():
    mask = torch.zeros(5, 6, dtype=torch.uint8)
    assert tighten(mask)[0].shape == (0, 0)
    mask[2, 3] = mask[3, 1] = 1
    window, (x, y) = tighten(mask)
    assert (x, y) == (1, 2)
    assert window.tolist() == [[0, 0, 1], [1, 0, 0]]
