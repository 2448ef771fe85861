"""Matching and suppression of boxes, and where tensors go."""

import torch
from torch.overrides import TorchFunctionMode
from torchvision.ops import box_iou, nms

from brefine.parts.boxes import BELOW, match, nms_keep
from brefine.structures import Bitmaps, Images, Instances


def some_boxes(count, extent, side, seed=0):
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * extent
    return torch.cat([corner, corner + side * torch.rand(count, 2, generator=random)], 1)


def test_classes_are_suppressed_one_by_one_however_many_there_are():
    """LVIS: 1,203 classes in pictures of 1,333 pixels."""
    boxes, scores = some_boxes(4000, 80, 14), torch.rand(4000)
    boxes = torch.cat([boxes, torch.tensor([[0.0, 0, 1333, 800]])])
    scores, labels = torch.cat([scores, scores.new_ones(1)]), torch.full((4001,), 1202)
    labels[:100] = 3
    keep = nms_keep(boxes, scores, labels, 0.5)
    for label in (3, 1202):
        here = (labels == label).nonzero()[:, 0]
        alone = here[nms(boxes[here].double(), scores[here].double(), 0.5)]
        assert sorted(alone.tolist()) == here[keep[here]].tolist()
    assert not keep.all()


def test_an_object_without_area_takes_no_anchors():
    anchors = some_boxes(50, 60, 20)
    truth = torch.tensor([[10.0, 10, 30, 30], [5, 5, 5, 5]])
    index = match(anchors, truth, 0.7, 0.3, low_quality=True)
    best = box_iou(truth, anchors)[0].argmax()
    assert index[best] == 0
    assert not (index == 1).any()
    assert (index == BELOW).any()


def test_what_is_moved_is_there_when_the_call_returns():
    """A copy from a GPU that is not waited for is read before it is whole."""
    moves = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to:
                moves.append(kwargs or {})
            return func(*args, **(kwargs or {}))

    masks = Bitmaps.of(torch.ones(2, 4, 4, dtype=torch.uint8))
    boxes, labels = torch.tensor([[0.0, 0, 4, 4]] * 2), torch.zeros(2, dtype=torch.int64)
    scores, logits, spans = torch.ones(2), torch.ones(2, 28, 28), boxes
    things = Instances((4, 4), boxes, labels, scores, masks, logits, spans=spans)
    with Watch():
        things.to("cpu")
        Images.stack([torch.zeros(3, 4, 4)]).to("cpu")
    assert len(moves) >= 8
    assert not any(move.get("non_blocking") for move in moves)
