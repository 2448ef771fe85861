"""RoIs of masks that are larger than boxes, in training and prediction (`mask_margin`)."""

from dataclasses import replace

import pytest
import torch

from brefine.parts.boxes import enlarge
from brefine.parts.masks import boxes_around, to_records, touching
from brefine.structures import Category
from test_methods import SMALL, batch, build, scene, worst_iou
from test_whole_pictures import blobs, dense

MARGIN = 0.2
FINER = 8
DETECTOR = {**SMALL["detector"], "mask_margin": MARGIN, "score_threshold": 0.0, "detections": 20}
METHODS = ("mask_rcnn", "brefine", "pointrend", "mask_scoring", "cascade", "htc", "bmask")


def margined(name: str) -> torch.nn.Module:
    return build(name, detector=DETECTOR)


def plain(model: torch.nn.Module) -> None:
    """Take the margin away from a model that was built with one."""
    model.detector = replace(model.detector, mask_margin=0.0)


def test_a_box_around_logits_of_its_own_span():
    logits = blobs(5, 3)
    spans = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) * 50
    spans[:, 2:] += spans[:, :2] + 5
    each = [boxes_around(logits[i : i + 1], spans[i]) for i in range(5)]
    torch.testing.assert_close(boxes_around(logits, spans), torch.cat(each))


@pytest.mark.parametrize("name", METHODS)
def test_the_head_learns_from_enlarged_rois(name):
    images, targets = batch(scene(4), scene(0), scene(3, 1))
    model = margined(name)
    learnt = []
    pooled = model.mask_head.loss

    def spy(features, rows, labels, truth, stage=0):
        torch.testing.assert_close(rows, truth.rows)
        learnt.append(rows)
        return pooled(features, rows, labels, truth, stage)

    model.mask_head.loss = spy
    torch.manual_seed(1)
    model.loss(images, targets)
    plain(model)
    torch.manual_seed(1)
    model.loss(images, targets)
    half = len(learnt) // 2
    assert half == (3 if name in ("cascade", "htc") else 1)
    for large, small in zip(learnt[:half], learnt[half:], strict=True):
        torch.testing.assert_close(large[:, 0], small[:, 0])
        torch.testing.assert_close(large[:, 1:], enlarge(small[:, 1:], MARGIN))


@pytest.mark.parametrize("name", METHODS)
def test_boxes_of_detections_hold_their_masks_and_no_more(name):
    model = margined(name).eval()
    images, _ = batch(scene(3), scene(9, 2, (64, 70)))
    with torch.inference_mode():
        found = model.predict(images)
        plain(model)
        before = model.predict(images)
    seen = 0
    for instances, other in zip(found, before, strict=True):
        assert instances.spans is not None
        if name != "mask_scoring":  # there masks have a say in the order
            torch.testing.assert_close(instances.spans, enlarge(other.boxes, MARGIN))
            torch.testing.assert_close(instances.scores, other.scores)
        free = replace(instances, boxes=instances.spans)
        size = (FINER * instances.size[0], FINER * instances.size[1])  # thin tips have pixels, too
        masks = dense(instances, size)
        assert torch.equal(masks, dense(free, size))
        for mask, box in zip(masks, instances.boxes, strict=True):
            height, width = instances.size
            inside = (box[:2] > 0).all() and box[2] < width and box[3] < height
            if mask.any() and inside:  # else parts of it may lie outside of the picture
                seen += 1
                rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
                bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert (box - torch.stack(bounds) / FINER).abs().max() < 1
    assert seen


def test_an_empty_mask_keeps_the_box_of_its_detection():
    model = margined("mask_rcnn").eval()
    images, _ = batch(scene(3))
    with torch.inference_mode():
        model.mask_head.logits.bias.fill_(-100.0)
        (found,) = model.predict(images)
        plain(model)
        (before,) = model.predict(images)
    assert len(found) > 0
    assert not dense(found, found.size).any()
    assert torch.equal(found.boxes, before.boxes)


def test_masks_of_given_boxes_end_there():
    model = margined("brefine").eval()
    target = scene(4)
    images, _ = batch(target)
    with torch.inference_mode():
        model.mask_head.logits.bias.fill_(100.0)
        (found,) = model.predict(images, [target])
        (wider,) = model.predict(images, [target], margin=0.1)
    assert torch.equal(found.boxes, target.boxes)
    torch.testing.assert_close(found.spans, enlarge(target.boxes, MARGIN))
    torch.testing.assert_close(wider.spans, enlarge(target.boxes, MARGIN + 0.1))
    for mask, box in zip(dense(found, found.size), target.boxes.long(), strict=True):
        full = torch.zeros_like(mask)
        full[box[1] : box[3], box[0] : box[2]] = True
        assert torch.equal(mask, full)


def test_a_mask_is_cut_where_its_roi_ends_not_its_box():
    model = margined("mask_rcnn").eval()
    target = scene(1, 4)
    images, _ = batch(target)
    records = [{"segmentation": one} for one in _encoded(target)]
    with torch.inference_mode():
        (found,) = model.predict(images, [target])
    assert touching(replace(found, spans=None), records).all()
    assert not touching(found, records).any()


def _encoded(target):
    categories = [Category(i + 1, str(i)) for i in range(3)]
    return [record["segmentation"] for record in to_records(target, 1, categories, target.size)]


@pytest.mark.parametrize("name", ["mask_rcnn", "brefine"])
def test_overfits_one_picture(name):
    detector = {**SMALL["detector"], "mask_margin": MARGIN}
    model = build(name, detector=detector)
    images, targets = batch(scene(3, 5))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0)
    best = 0.0
    for step in range(1, 301):
        named = model.loss(images, targets)
        optimizer.zero_grad()
        sum(value for key, value in named.items() if not key.startswith("raw_")).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 30 == 0:
            best = worst_iou(model, images, targets[0])
            if best > 0.9:
                break
    assert best > 0.9
