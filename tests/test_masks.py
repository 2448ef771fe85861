import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.nn import functional as F
from torchvision.ops import roi_align

from brefine.parts.masks import crop, encode, paste, to_records
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


def dense_paste(logits: torch.Tensor, box: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The mask from its definition, with grid_sample over the whole picture."""
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
    return (value > 0) & inside


@pytest.mark.parametrize("side", [1, 2, 14, 28, 56])
def test_paste_is_grid_sample_at_pixel_centres(side):
    boxes = random_boxes(40, seed=side)
    logits = torch.randn(40, side, side, generator=torch.Generator().manual_seed(side))
    seen = 0
    for box, logit in zip(boxes, logits, strict=True):
        window, (x, y) = paste(logit, box, FRAME)
        assert window.dtype == torch.bool
        dense = torch.zeros(FRAME, dtype=torch.bool)
        dense[y : y + window.shape[0], x : x + window.shape[1]] = window
        assert torch.equal(dense, dense_paste(logit, box, FRAME))
        seen += int(dense.sum())
    assert seen > 1000


def test_paste_is_interpolate_when_the_box_is_a_multiple_of_the_grid():
    logits = torch.randn(14, 14, generator=torch.Generator().manual_seed(5))
    window, origin = paste(logits, torch.tensor([10.0, 3, 52, 31]), FRAME)
    expected = F.interpolate(logits[None, None], size=(28, 42), mode="bilinear")[0, 0] > 0
    assert origin == (10, 3)
    assert torch.equal(window, expected)


def test_paste_then_crop_returns_the_label():
    """The two grids agree: no half-pixel shift between training targets and pasted masks."""
    y, x = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    label = ((x - 10.3) ** 2 + (y - 15.8) ** 2 < 60).float()
    box = torch.tensor([[5.0, 2, 5 + 56, 2 + 56]])
    window, origin = paste(label * 2 - 1, box[0], FRAME)
    masks = Bitmaps([window.to(torch.uint8)], torch.tensor([origin]))
    again = crop(masks, box, torch.tensor([0]), 28, FRAME)[0]
    assert (again != label).sum() <= 4


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
