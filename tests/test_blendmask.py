"""The parts of BlendMask by hand: places, centerness, attention, the classes of pixels."""

import math

import pytest
import torch
from torch.nn import functional as F

from brefine.methods import create
from brefine.methods.blendmask import (
    Bases,
    Places,
    Semantic,
    Towers,
    assign,
    blend,
    centerness,
    decode,
)
from brefine.structures import Bitmaps, Images, Instances

RANGES = (64.0, 128.0, 256.0, 512.0)


def places(*rows: tuple[float, float, int]) -> Places:
    """(x, y, level) of each."""
    point = torch.tensor([row[:2] for row in rows])
    level = torch.tensor([row[2] for row in rows])
    return Places(point, 8.0 * 2**level, level)


def test_places_near_the_centre_of_a_box_of_their_level_s_size_are_its_own() -> None:
    boxes = torch.tensor([[0.0, 0, 100, 40], [40, 10, 60, 30]])
    found = assign(
        places(
            (60, 20, 0),  # within 12 pixels of both centres: the smaller box
            (37, 20, 0),  # 13 pixels from them
            (40, 20, 0),  # on the side of the smaller box, and 60 from a side of the large one
            (35, 20, 1),  # within 24: 65 from a side, its level's
            (50, 20, 1),  # 50 from any side: another level's
            (50, 41, 1),  # outside of both
        ),
        boxes,
        RANGES,
    )
    assert found.tolist() == [0, -1, 0, 0, -1, -1]
    found = assign(places((52, 22, 0), (59, 20, 0)), boxes, RANGES)
    assert found.tolist() == [1, 1]
    assert assign(places((52, 22, 0)), boxes[:0], RANGES).tolist() == [-1]


def test_boxes_and_centerness_by_hand() -> None:
    point, stride = torch.tensor([[40.0, 24]]), torch.tensor([8.0])
    box = decode(point, torch.tensor([[1.0, 2, 3, 0.5]]), stride)
    assert box.tolist() == [[32, 8, 64, 28]]
    # 8 and 24 to the left and right, 16 and 4 above and below
    assert centerness(point, box).item() == pytest.approx(math.sqrt(8 / 24 * 4 / 16))
    assert centerness(torch.tensor([[48.0, 18]]), box).item() == 1


def test_attention_is_a_softmax_over_bases_at_each_cell() -> None:
    pooled = torch.randn(3, 2, 8, 8)
    attention = torch.randn(3, 2 * 4 * 4)
    weight = F.interpolate(attention.view(3, 2, 4, 4), (8, 8), mode="bilinear").softmax(1)
    torch.testing.assert_close(blend(pooled, attention), (pooled * weight).sum(1))
    # certain attention picks a base
    one = torch.tensor([[[50.0] * 16, [-50.0] * 16]]).flatten(1)
    torch.testing.assert_close(blend(pooled[:1], one), pooled[:1, 0])


def test_attention_keeps_its_place_in_the_box_when_the_roi_is_larger() -> None:
    pooled, attention = torch.randn(1, 2, 12, 12), torch.randn(1, 2 * 4 * 4)
    larger = blend(pooled, attention, margin=0.25)  # 12 cells over 1.5 boxes: 8 over the box
    inner = blend(pooled[:, :, 2:10, 2:10], attention)
    torch.testing.assert_close(larger[:, 2:10, 2:10], inner)


def test_the_smallest_object_says_the_class_of_a_pixel() -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, 8:16, 8:16] = 1
    masks[1, :, :16] = 1
    bitmaps = Bitmaps.of(masks)
    target = Instances((32, 32), bitmaps.boxes(), torch.tensor([2, 0]), masks=bitmaps)
    expected = torch.full((4, 4), 3)
    expected[:, :2] = 0
    expected[1, 1] = 2
    semantic = Semantic(8, 8, 3, 2)
    logits = 20.0 * F.one_hot(expected, 4).permute(2, 0, 1)[None].float()
    assert semantic.loss(logits, [target]) < 1e-6
    assert semantic.loss(torch.zeros(1, 4, 4, 4), [target]).item() == pytest.approx(math.log(4))
    swapped = target[torch.tensor([1, 0])]
    assert semantic.loss(logits, [swapped]) < 1e-6


def test_bases_have_stride_4_and_towers_a_row_a_place() -> None:
    pyramid = [torch.randn(2, 8, 32 >> k, 64 >> k) for k in range(5)]
    assert Bases(8, 8, 4, 2)(pyramid).shape == (2, 4, 64, 128)
    said = Towers(8, 3, 4 * 9, 1, 2, ranking=False)(pyramid)
    count = sum(level.shape[2] * level.shape[3] for level in pyramid)
    assert said.logits.shape == (2, count, 3)
    assert said.attention.shape == (2, count, 36)
    assert said.centre is not None
    assert said.centre.shape == (2, count)
    assert (said.reach >= 0).all()
    assert Towers(8, 3, 4, 1, 2, ranking=True)(pyramid).centre is None


def test_a_narrow_model_sees_pictures_whose_last_level_is_one_cell() -> None:
    model = create("blendmask", 1, backbone="test_efficientnet_gn", channels=16).eval()
    pixels = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        model.predict(Images(pixels, torch.tensor([[64, 64]])))
