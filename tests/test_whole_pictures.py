"""Masks predicted for the whole picture: pasted, bounded, turned, averaged, tiled."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from brefine.methods import create
from brefine.parts.masks import boxes_around, on_boxes, paste_all, to_records
from brefine.predict import Predictor
from brefine.rle import decode
from brefine.structures import Category, Instances
from brefine.views import View, combine

FRAME = (64, 96)
SPAN = torch.tensor([0.0, 0, 96, 64])


def found(logits: torch.Tensor, boxes: torch.Tensor, margin: float = 0.0) -> Instances:
    count = len(logits)
    labels = torch.zeros(count, dtype=torch.int64)
    spans = SPAN.expand(count, 4)
    scores = torch.linspace(0.9, 0.5, count)
    return Instances(FRAME, boxes, labels, scores, logits=logits, margin=margin, spans=spans)


def blobs(count: int, seed: int) -> torch.Tensor:
    """Smooth logits on a grid of 16 x 24."""
    random = torch.Generator().manual_seed(seed)
    return functional.interpolate(
        torch.randn(count, 1, 4, 6, generator=random) * 3 - 1, (16, 24), mode="bicubic"
    )[:, 0]


def dense(instances: Instances, size: tuple[int, int]) -> torch.Tensor:
    masks = torch.zeros(len(instances), *size, dtype=torch.bool)
    for mask, runs in zip(masks, paste_all(instances, size), strict=True):
        window, (x, y) = runs.window()
        mask[y : y + window.shape[0], x : x + window.shape[1]] = torch.as_tensor(window)
    return masks


@pytest.mark.parametrize("size", [FRAME, (128, 192), (96, 96)])
def test_masks_are_interpolated_logits_inside_the_box(size):
    logits = blobs(5, 0)
    boxes = torch.tensor([[10.0, 8, 60, 40]]).repeat(5, 1)
    whole = functional.interpolate(logits[:, None], size, mode="bilinear")[:, 0] > 0
    y, x = size[0] / FRAME[0], size[1] / FRAME[1]
    for margin in (0.0, 0.2):
        reach = torch.tensor([-50.0, -32, 50, 32]) * margin
        x1, y1, x2, y2 = ((boxes[0] + reach) * torch.tensor([x, y, x, y])).tolist()
        inside = torch.zeros(size, dtype=torch.bool)
        rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
        inside |= ((rows >= y1) & (rows < y2))[:, None] & (columns >= x1) & (columns < x2)
        masks = dense(found(logits, boxes, margin), size)
        assert masks.any()
        assert (masks != whole & inside).sum() <= 2  # where a logit is 0 but for rounding


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 7]))
def test_boxes_around_hold_their_masks_and_no_more(seed, scale):
    logits = blobs(6, seed)
    boxes = boxes_around(logits, SPAN)
    everywhere = found(logits, SPAN.expand(6, 4))
    size = (FRAME[0] * scale, FRAME[1] * scale)
    free, held = dense(everywhere, size), dense(replace(everywhere, boxes=boxes), size)
    assert torch.equal(free, held)
    for logit, box in zip(logits, boxes, strict=True):
        if not (logit > 0).any():
            assert not box.any()
            continue
        # The best logit along a side is 0, or the side is the picture's.
        for axis, side in enumerate(box.tolist()):
            lines = logit if axis % 2 == 0 else logit.T
            place = min(max(side / 4 - 0.5, 0), lines.shape[1] - 1)  # 4 pixels a cell
            low = min(int(place), lines.shape[1] - 2)
            best = float(torch.lerp(lines[:, low], lines[:, low + 1], place - low).max())
            edge = side in (0, FRAME[1 - axis % 2])
            assert best > 0 if edge else abs(best) < 1e-3


def test_boxes_around_by_hand():
    logits = torch.full((3, 4, 4), -1.0)
    logits[1, 1, 2] = 1.0  # zeros half way to each neighbour
    logits[2] = 1.0
    boxes = boxes_around(logits, torch.tensor([8.0, 0, 48, 40]))
    assert boxes.tolist() == [[0, 0, 0, 0], [28, 10, 38, 20], [8, 0, 48, 40]]


def test_logits_on_boxes_draw_the_same_masks():
    logits = blobs(4, 3)
    boxes = torch.tensor([[10.0, 8, 60, 40]]).repeat(4, 1)
    one = found(logits, boxes, margin=0.1)
    other = replace(one, logits=on_boxes(one, 112), spans=None)
    masks, again = dense(one, FRAME), dense(other, FRAME)
    assert masks.any()
    assert (masks != again).float().mean() < 0.002


def test_turning_and_choosing_keep_what_logits_span():
    one = replace(found(blobs(3, 1), SPAN.expand(3, 4)), spans=torch.tensor([[0.0, 0, 80, 64]] * 3))
    turned = View(flip=True).turn(one)
    assert turned.spans[0].tolist() == [16, 0, 96, 64]
    assert torch.equal(View(flip=True).turn(turned).spans, one.spans)
    assert len(one[torch.tensor([2])].spans) == 1
    assert torch.equal(dense(turned, FRAME), dense(one, FRAME).flip(2))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    model = create(
        "solo",
        2,
        backbone="test_efficientnet_gn.r160_in1k",
        channels=16,
        width=16,
        groups=4,
        num_convs=1,
        grids=(6, 5, 4, 3, 2),
        ranking=True,  # scores begin at a half
        detector={"fpn_norm": "group"},
    )
    for layer in model.mask_head.logits:
        layer.weight.data.normal_()
    table = [Category(3, "a"), Category(9, "b")]
    return Predictor(model, table, short_side=96, long_side=128, device="cpu")


def picture() -> torch.Tensor:
    return torch.randint(0, 255, (3, 72, 90), generator=torch.Generator().manual_seed(0)).byte()


def test_a_predictor_finds_masks_in_the_picture_s_pixels(predictor):
    pixels = picture()
    instances = predictor.detect(pixels, threshold=0)
    assert len(instances) > 5
    records = to_records(instances, 1, predictor.categories, (72, 90))
    for record in records:
        x1, y1, x2, y2 = decode(record["segmentation"], (72, 90)).box()
        x, y, width, height = record["bbox"]
        assert width > 0
        if x2 > x1:  # the box is around the mask
            assert x - 1 <= x1 <= x2 <= x + width + 1
            assert y - 1 <= y1 <= y2 <= y + height + 1
    tiled = predictor.records(pixels, 1, threshold=0, tile=64, overlap=16)
    assert tiled
    assert all(record["segmentation"]["size"] == [72, 90] for record in tiled)


def test_known_boxes_bound_their_masks_and_views_of_one_are_that_one(predictor):
    pixels = picture()
    target = Instances((72, 90), torch.tensor([[10.0, 10, 50, 60], [0, 0, 90, 72]]),
                       torch.tensor([1, 0]))  # fmt: skip
    one = predictor.given(pixels, target)
    masks = dense(one, (72, 90))
    assert torch.equal(one.boxes, target.boxes)
    assert masks[1].any()
    outside = masks[0].clone()
    outside[10:60, 10:50] = False
    assert not outside.any()
    both = predictor.both(pixels, target)[1]
    assert torch.equal(dense(both, (72, 90)), masks)
    twice = predictor.given(pixels, target, views=combine(flip=True, scales=(1.0, 0.5)))
    assert twice.logits.shape == (2, 112, 112)
    assert twice.spans is None
    fused = predictor.detect(pixels, threshold=0, views=combine(flip=True))
    assert len(fused)
    assert fused.logits.shape[1:] == (112, 112)
