"""torchvision's Mask R-CNN with its random weights copied in: the same numbers everywhere."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn

from brefine.methods import create
from brefine.pretrained import from_torchvision
from brefine.structures import Bitmaps, Images, Instances

CLASSES = 3
# torchvision takes P6's stride from picture / cells, which is 64 only for multiples of 64
SIZES = [(128, 192), (192, 128)]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def reference() -> MaskRCNN:
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=128, max_size=192
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # biases start at 0, which would hide a missing one
            nn.init.normal_(parameter, std=0.05)
    nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.1)
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.02)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.02)
    # Statistics of noise, so that 50 random layers neither vanish nor explode
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.0)
    with torch.no_grad():
        model.backbone(torch.randn(4, 3, 128, 128))
        for block in model.backbone.fpn.inner_blocks:
            block[0].weight /= 14  # pyramid levels near unit variance: scores don't saturate
    model.transform.postprocess = lambda found, *_: found  # masks as [N, 1, 28, 28]
    return model.eval()


def ours(model: MaskRCNN) -> nn.Module:
    """Our Mask R-CNN with the reference's weights, and torchvision's small rules."""
    mine = create(
        "mask_rcnn",
        CLASSES,
        detector={
            "convention": "torchvision",
            "frozen_stages": 0,
            "proposals": (2000, 1000),
            "rpn_samples": None,
            "roi_samples": None,
            "mask_rois": None,
        },
    )
    mine.load_state_dict(from_torchvision(model.state_dict()))
    return mine.eval()


def pictures(seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *s), generator=random, dtype=torch.uint8) for s in SIZES]


def nearest(boxes: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Row of ``boxes`` for each expected one: scores equal to 1e-5 may change places."""
    distance = (expected[:, None] - boxes).abs().amax(2)
    assert len(boxes) == len(expected)
    assert distance.amin(0).max() < 1e-3  # none that the reference does not have
    return distance.argmin(1)


def test_proposals_boxes_scores_and_masks_are_equal(reference):
    proposals = []
    hook = reference.rpn.register_forward_hook(lambda *args: proposals.append(args[-1][0]))
    mine = ours(reference)
    for i, picture in enumerate(pictures()):
        with torch.inference_mode():
            (expected,) = reference([picture / 255])
            images = Images.stack([picture])
            features = mine.trunk(images)
            (proposed,) = mine.rpn.propose(*mine.rpn(features), images.sizes, training=False)
            (found,) = mine.predict(images)
        assert len(proposed) > 100
        proposed = proposed[nearest(proposed, proposals[i][0])]
        torch.testing.assert_close(proposed, proposals[i][0], **TOLERANCE)
        assert len(found) > 10
        found = found[nearest(found.boxes, expected["boxes"])]
        torch.testing.assert_close(found.boxes, expected["boxes"], **TOLERANCE)
        torch.testing.assert_close(found.scores, expected["scores"], **TOLERANCE)
        assert torch.equal(found.labels, expected["labels"] - 1)
        assert len(found.labels.unique()) > 1
        probability = expected["masks"][:, 0]
        assert probability.std() > 0.01
        torch.testing.assert_close(found.logits.sigmoid(), probability, **TOLERANCE)
    hook.remove()


@pytest.mark.parametrize("counts", [(4, 2), (3, 0)])
def test_training_losses_are_equal_when_nothing_is_sampled(reference, counts):
    reference.train()
    reference.backbone.eval()
    for part in (reference.rpn.fg_bg_sampler, reference.roi_heads.fg_bg_sampler):
        part.batch_size_per_image = 10**6
    random = torch.Generator().manual_seed(1)
    theirs, targets = [], []
    for size, count in zip(SIZES, counts, strict=True):
        height, width = size
        corner = torch.rand(count, 2, generator=random) * torch.tensor([width, height]) * 0.6
        side = 12 + torch.rand(count, 2, generator=random) * 50
        boxes = torch.cat([corner, corner + side], 1)
        ys, xs = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
        # half of each box, cut along its diagonal
        x1, y1, x2, y2 = (value[:, None, None] for value in boxes.unbind(1))
        inside = (xs > x1) & (xs < x2) & (ys > y1) & (ys < y2)
        masks = inside & ((xs - x1) / (x2 - x1) > (ys - y1) / (y2 - y1))
        labels = torch.randint(CLASSES, (count,), generator=random)
        theirs.append({"boxes": boxes, "labels": labels + 1, "masks": masks.to(torch.uint8)})
        targets.append(Instances(size, boxes, labels, masks=Bitmaps.of(masks)))
    # one size a batch, so that neither side pads
    mine = ours(reference)
    for picture, their, target in zip(pictures(1), theirs, targets, strict=True):
        with torch.no_grad():
            expected = reference([picture / 255], [their])
            found = mine.loss(Images.stack([picture]), [target])
        for name, key in {
            "rpn": "loss_objectness",
            "rpn_box": "loss_rpn_box_reg",
            "cls": "loss_classifier",
            "box": "loss_box_reg",
            "mask": "loss_mask",
        }.items():
            torch.testing.assert_close(found[name], expected[key], **TOLERANCE, msg=name)
