from dataclasses import replace

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

from brefine.parts import roi
from brefine.parts.boxes import CONVENTIONS

STRIDES = (4, 8, 16, 32)


def pyramid(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 768 // s, 1024 // s, generator=random).to(dtype) for s in STRIDES]


def boxes(count: int) -> torch.Tensor:
    """Boxes of sides 2 to 700 pixels anywhere in 768 x 1024."""
    random = torch.Generator().manual_seed(1)
    side = 2 * 350 ** torch.rand(count, 2, generator=random)
    corner = torch.rand(count, 2, generator=random) * (torch.tensor([1024.0, 768]) - side)
    return torch.cat([corner, corner + side], 1)


@pytest.mark.parametrize("size", [7, 14, 56])
def test_pooling_from_all_levels_is_torchvisions(size):
    first, second = boxes(40), boxes(60)[40:]
    features = pyramid()
    reference = MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2)
    named = {str(i): feature for i, feature in enumerate(features)}
    expected = reference(named, [first, second], [(768, 1024)] * 2)
    rows = roi.rows([first, second])
    # torchvision's canonical box of 224 pixels belongs to P4, so P2 ends at 112
    pooled = roi.pool(features, rows, size, STRIDES, CONVENTIONS["torchvision"])
    torch.testing.assert_close(pooled, expected)
    assert set(roi.level(rows, 4).tolist()) == {0, 1, 2, 3}


def test_no_rois_give_no_rows_but_a_gradient():
    features = [feature.requires_grad_() for feature in pyramid()]
    none = roi.rows([torch.zeros(0, 4), torch.zeros(0, 4)])
    pooled = roi.pool(features, none, 7, STRIDES, CONVENTIONS["detectron"])
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all((feature.grad == 0).all() for feature in features)


def test_half_precision_features_are_read_at_exact_boxes():
    rows = roi.rows([boxes(30), boxes(30)])
    exact = roi.pool(pyramid(), rows, 14, STRIDES, CONVENTIONS["detectron"])
    half = roi.pool(pyramid(torch.bfloat16), rows, 14, STRIDES, CONVENTIONS["detectron"])
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.03  # bfloat16 keeps 8 bits of values below 4


HARD = torch.tensor(
    [
        [0, 0, 0, 1024, 768],
        [1, -30, -20, 400, 300],  # out of the picture
        [1, 1000, 700, 1100, 900],
        [0, -200, -200, -50, -50],  # nothing of it inside
        [1, 1020, 764, 1024, 768],
        [0, 10, 10, 10, 10],  # no area
        [0, 10, 600, 900, 603],  # 20 points a cell one way, 1 the other
        [1, 300, 200, 310, 210],
        [0, 50, 40, 30, 20],  # upside down
    ]
)


@pytest.mark.parametrize(("aligned", "ratio"), [(True, 0), (False, 0), (False, 2)])
@pytest.mark.parametrize("size", [7, 14, 56])
@pytest.mark.parametrize("stride", [4, 32])
def test_align_is_torchvisions_in_value_and_gradient(aligned, ratio, size, stride):
    convention = replace(CONVENTIONS["detectron"], aligned=aligned, sampling_ratio=ratio)
    random = torch.cat([roi.rows([boxes(20), boxes(30)[20:]]), HARD]).double()
    found, expected = (
        pyramid(torch.float64)[STRIDES.index(stride)].requires_grad_() for _ in range(2)
    )
    mine = roi.align(found, random, size, 1 / stride, convention)
    theirs = roi_align(expected, random, size, 1 / stride, ratio, aligned)
    torch.testing.assert_close(mine, theirs)
    weights = torch.randn_like(theirs)
    (mine * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
