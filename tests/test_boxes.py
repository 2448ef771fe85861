"""Matching and suppression of boxes, and where tensors go."""

import torch
from torch.overrides import TorchFunctionMode
from torchvision.ops import box_iou, nms

from brefine.parts import boxes as B
from brefine.parts.backbone import Backbone
from brefine.parts.boxes import BELOW, match, nms_keep
from brefine.parts.rpn import RPN
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
    index = match(anchors, truth, 0.7, 0.3, low_quality=0.0)
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


def test_an_object_that_no_anchor_fits_has_its_best_ones_from_a_least_iou_on():
    """MMDetection's ``min_pos_iou``; an object inside two anchors ties exactly."""
    anchors = torch.tensor([[0.0, 0, 20, 20], [10, 0, 30, 20], [50, 50, 80, 80]])
    truth = torch.tensor([[14.0, 5, 16, 10], [50, 50, 80, 70]])  # IoU 0.025, 0.025; 2 / 3
    for least, expected in (
        (None, [-1, -1, -2]),
        (0.0, [0, 0, 1]),
        (0.02, [0, 0, 1]),
        (0.3, [-1, -1, 1]),
        (0.7, [-1, -1, -2]),
    ):
        assert match(anchors, truth, 0.7, 0.3, low_quality=least).tolist() == expected


def test_many_boxes_go_group_by_group_and_nothing_else_changes(monkeypatch):
    boxes, scores = some_boxes(3000, 60, 20), torch.rand(3000).mul(50).round() / 50  # with ties
    groups = torch.randint(0, 40, (3000,)) * 7
    calls = []
    monkeypatch.setattr(B, "nms", lambda *given: calls.append(len(given[0])) or nms(*given))
    at_once = nms_keep(boxes, scores, groups, 0.5)
    monkeypatch.setattr(B, "MANY", 2999)
    assert torch.equal(nms_keep(boxes, scores, groups, 0.5), at_once)
    assert 0 < at_once.sum() < 3000
    assert calls == [3000, *torch.unique(groups, return_counts=True)[1].tolist()]


def test_deltas_divided_by_ten_give_the_same_boxes_and_a_gradient_a_tenth_as_large():
    """As Rank & Sort's authors have them; GIoU on decoded boxes of the only positive anchor."""
    found = []
    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        torch.manual_seed(0)
        net = RPN(8, (4,), B.CONVENTIONS["detectron"], ranking=True, delta_weights=weights)
        anchors, logits, _ = net([torch.randn(1, 8, 10, 10)])
        moved = torch.tensor([0.1, -0.2, 0.3, -0.1])
        deltas = (moved * torch.tensor(weights)).expand(1, len(anchors[0]), 4).requires_grad_()
        target = Instances((40, 40), anchors[0][150:151] + 1, torch.zeros(1, dtype=torch.int64))
        _, box = net.loss(anchors, logits, [deltas], [target])
        proposed = net.propose(anchors, logits, [deltas], torch.tensor([[40, 40]]), training=True)
        (gradient,) = torch.autograd.grad(box, deltas)
        found.append((box, proposed[0], gradient[0, 150]))
    (loss, proposed, gradient), (same_loss, same_proposed, smaller) = found
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_proposed, proposed, rtol=0, atol=1e-4)
    assert (gradient != 0).sum() >= 3
    torch.testing.assert_close(smaller * smaller.new_tensor([10, 10, 5, 5]), gradient)


def test_norms_of_frozen_stages_keep_their_statistics_while_others_learn():
    net = Backbone("test_resnet", 16, norm="batch", frozen_stages=1).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(Images.stack([torch.rand(3, 64, 64) * 255]))
    moved = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    means = {name for name in before if name.endswith("running_mean")}
    frozen = {n for n in means if n.split(".")[1] in ("conv1", "bn1", "layer1")}
    assert frozen
    assert moved & means == means - frozen
    assert means - frozen
