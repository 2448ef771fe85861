"""The edge branch of Boundary-preserving Mask R-CNN."""

import math

import pytest
import torch
from torch.nn import functional as F

from brefine.methods.bmask import EdgeMaskHead, edges


def test_edges_are_where_the_laplacian_is_positive() -> None:
    masks = (torch.rand(6, 1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    masks = F.max_pool2d(masks, 3, 1, 1) * (torch.rand(6, 1, 9, 9) > 0.1)
    kernel = -torch.ones(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = 8
    expected = F.conv2d(masks, kernel, padding=1) > 0.1
    assert torch.equal(edges(masks[:, 0]).bool(), expected[:, 0])
    assert expected.any()
    assert (masks.bool() & ~expected).any()


def test_edges_by_hand() -> None:
    mask = torch.zeros(2, 5, 6)
    mask[0, 1:4, 1:5] = 1
    mask[1] = 0.9  # counts as set; the border of the grid is an edge
    found = edges(mask)
    ring = torch.zeros(2, 5, 6)
    ring[0, 1:4, 1:5] = 1
    ring[0, 2, 2:4] = 0
    ring[1] = 1
    ring[1, 1:4, 1:5] = 0
    assert torch.equal(found, ring)


class Square:
    """A truth that is a square in every RoI."""

    def __call__(self, side: int) -> torch.Tensor:
        mask = torch.zeros(2, side, side)
        mask[:, side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
        return mask


def test_losses_of_an_ignorant_head_by_hand() -> None:
    head = EdgeMaskHead(8, 3, edge_weight=2.0)
    for layer in (head.logits, head.edge_logits):
        layer.weight.data.zero_()
    features = [torch.randn(1, 8, 32 >> i, 32 >> i) for i in range(5)]
    rois = torch.tensor([[0.0, 8, 8, 88, 88], [0, 0, 0, 120, 120]])
    found = head.loss(features, rois, torch.tensor([0, 2]), Square())  # type: ignore[arg-type]
    ring = 4 * 13  # of 14 x 14 cells
    dice = 1 - (ring + 1) / (28 * 28 / 4 + ring + 1)
    assert found["mask"].tolist() == pytest.approx([math.log(2)] * 2)
    assert found["edge"].tolist() == pytest.approx([2 * (math.log(2) + dice)] * 2)


def test_the_mask_sees_the_edge_and_the_edge_the_mask() -> None:
    head = EdgeMaskHead(8, 3)
    rois = torch.tensor([[0.0, 32, 32, 352, 352]])  # large: the mask reads a coarse level, not P2
    features = [torch.randn(1, 8, 96 >> i, 96 >> i) for i in range(5)]
    coarse = int((torch.tensor(320.0) / 56).log2().floor())
    assert coarse > 0
    before = head.meet(features, rois)
    for level, part in ((0, 0), (coarse, 1)):  # what only the other one reads
        changed = list(features)
        changed[level] = torch.randn_like(changed[level])
        assert not torch.equal(head.meet(changed, rois)[part], before[part])
    head.to_edge.weight.data.zero_()
    changed = [features[0], *(torch.randn_like(level) for level in features[1:])]
    assert torch.equal(head.meet(changed, rois)[1], head.meet(features, rois)[1])
