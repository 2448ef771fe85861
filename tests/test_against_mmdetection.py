"""The numbers that MMDetection's own modules gave, with the same weights."""

from dataclasses import replace

import pytest
import torch

from brefine.methods.mask_scoring import mask_scoring
from brefine.parts import roi
from brefine.parts.two_stage import Truth
from mmdet_golden import DEEP, SHALLOW, Golden, assert_same_results, build


def named(golden: Golden, model: torch.nn.Module) -> dict[str, float]:
    with torch.no_grad():
        losses = model.loss(golden.images(), golden.targets())
    return {key: float(value) for key, value in losses.items()}


def compare(golden: Golden, found: dict[str, float], pairs: dict[str, str]) -> None:
    for ours, theirs in pairs.items():
        expected = float(golden[f"out/loss/{theirs}"])
        assert expected > 0
        assert found[ours] == pytest.approx(expected, rel=1e-3, abs=1e-5), ours


class TestMaskRCNN:
    @pytest.fixture(scope="class")
    def golden(self) -> Golden:
        return Golden("mask_rcnn")

    @pytest.fixture(scope="class")
    def model(self, golden: Golden) -> torch.nn.Module:
        proposals = {"candidates": (100, 100), "proposals": (50, 50), "anchor_scale": 4.0}
        return build(golden, "mask_rcnn", num_convs=2, detector=proposals)

    def test_proposals(self, golden, model):
        with torch.no_grad():
            proposed = model.rpn(golden.features())
            for training in (True, False):
                found = model.rpn.propose(*proposed, golden.images().sizes, training=training)
                for i, boxes in enumerate(found):
                    apart = (boxes - golden[f"out/rpn/proposals_{i}"]).abs().amax(1)
                    # MMDetection lets a box shrink 62.5 times at most, like it lets it grow:
                    # one proposal is a sliver that wants to be thinner.
                    assert apart.max() < 0.1
                    assert (apart > 1e-3).sum() <= 1

    def test_rpn_losses(self, golden, model):
        with torch.no_grad():
            proposed = model.rpn(golden.features())
            classes, box = model.rpn.loss(*proposed, golden.targets())
        # MMDetection divides by the positives when nothing is sampled, we by all anchors used.
        weights = golden["out/target_rpn/label_weights"]
        scale = float((weights > 0).sum() / golden["out/target_rpn/avg_factor"])
        expected = golden["out/loss_rpn/loss_rpn_cls"].sum(), golden["out/loss_rpn/loss_rpn_bbox"]
        torch.testing.assert_close(classes["rpn"] * scale, expected[0], **DEEP)
        torch.testing.assert_close(box * scale, expected[1].sum(), **DEEP)

    def test_heads(self, golden, model):
        rows = golden_rows(golden)
        with torch.no_grad():
            logits, deltas = model.box_head(golden.features(), rows)
            found = model.predict(golden.images(), golden.detections())
        torch.testing.assert_close(logits, golden["out/box_head/cls_score"], **SHALLOW)
        expected = golden["out/box_head/bbox_pred"].view(-1, 5, 4)
        torch.testing.assert_close(deltas, expected, **SHALLOW)
        masks = torch.cat([instances.logits for instances in found])
        torch.testing.assert_close(masks, golden["out/mask_head/logits"], **SHALLOW)

    def test_results(self, golden, model):
        model.rpn.propose = lambda *_, **__: golden.pair("in/proposals_{}")
        assert_same_results(golden, model)

    def test_losses(self, golden, model):
        model.rpn.propose = lambda *_, **__: golden.pair("in/proposals_{}")
        pairs = {"cls": "loss_cls", "box": "loss_bbox", "mask": "loss_mask"}
        compare(golden, named(golden, model), pairs)


class TestPointRend:
    @pytest.fixture(scope="class")
    def golden(self) -> Golden:
        return Golden("pointrend")

    @pytest.fixture(scope="class")
    def model(self, golden: Golden) -> torch.nn.Module:
        sizes = {"hidden": 48, "point_channels": 24, "subdivisions": 3, "train_points": 49}
        return build(golden, "pointrend", **sizes, detector={"detections": 5})

    def test_heads(self, golden, model):
        rows = roi.rows(golden.pair("out/det/bboxes_{}"))
        labels = torch.cat(golden.pair("out/det/labels_{}"))
        points = golden["in/points"][: len(rows)]
        head, features = model.mask_head, golden.features()
        with torch.no_grad():
            coarse = head.predict_coarse(features, rows)
            refined = head(features, rows, labels)
            decided = torch.stack(
                [head.decide(features, rows, torch.full_like(labels, label), points, coarse)
                 for label in range(5)], 1
            )  # fmt: skip
        torch.testing.assert_close(coarse, golden["out/mask_head/coarse_logits"], **SHALLOW)
        torch.testing.assert_close(decided, golden["out/point/logits"], **SHALLOW)
        expected = torch.cat(golden.pair("out/point/refined_logits_{}"))
        torch.testing.assert_close(refined, expected, **DEEP)

    def test_results(self, golden, model):
        assert_same_results(golden, model)

    def test_losses(self, golden, model):
        points = golden["in/points_train"]
        model.mask_head.sample = lambda coarse: points[: len(coarse)]
        pairs = {"cls": "loss_cls", "box": "loss_bbox", "mask": "loss_mask", "point": "loss_point"}
        compare(golden, named(golden, model), pairs)


class TestMaskScoring:
    @pytest.fixture(scope="class")
    def golden(self) -> Golden:
        return Golden("mask_scoring")

    @pytest.fixture(scope="class")
    def model(self, golden: Golden) -> torch.nn.Module:
        return build(golden, "mask_scoring", num_convs=2, iou_hidden=32, binarize=0.5)

    def test_heads(self, golden, model):
        rows = roi.rows(golden.pair("out/det/bboxes_{}"))
        labels = torch.cat(golden.pair("out/det/labels_{}"))
        head, features = model.mask_head, golden.features()
        with torch.no_grad():
            logits = head(features, rows, labels)
            judged = head.quality(features, rows, labels, logits)
        torch.testing.assert_close(logits, golden["out/mask_head/logits"], **SHALLOW)
        expected = golden["out/mask_iou/pred_det"][torch.arange(len(labels)), labels]
        torch.testing.assert_close(judged, expected, **SHALLOW)

    def test_results(self, golden, model):
        # MMDetection keeps the order of the box scores
        assert_same_results(golden, model, order=lambda s: s.argsort(descending=True))

    def test_losses(self, golden, model):
        pairs = {"cls": "loss_cls", "box": "loss_bbox", "mask": "loss_mask",
                 "mask_iou": "loss_mask_iou"}  # fmt: skip
        compare(golden, named(golden, model), pairs)

    def test_true_iou(self, golden, model):
        """Of MMDetection's logits: with its threshold the same, with the paper's the IoU."""
        proposals = golden.pair("in/proposals_{}")
        rows = roi.rows([b[golden[f"out/target/pos_inds_{i}"]] for i, b in enumerate(proposals)])
        index = torch.cat(golden.pair("out/target/pos_gt_inds_{}"))
        truth = Truth(rows, index, golden.targets(), model.convention)
        torch.testing.assert_close(truth.share(), golden["out/mask_iou/area_ratios"])
        logits = golden["out/mask_iou/pos_mask_logits"]
        found = model.mask_head.true_iou(logits, truth(28), truth.share())
        torch.testing.assert_close(found, golden["out/mask_iou/targets"], **SHALLOW)
        plain = mask_scoring(5, backbone="lcnet_035", channels=8, iou_hidden=8).mask_head
        masks = (torch.rand(3, 28, 28) > 0.4).float()
        exact = plain.true_iou(0.1 * (2 * masks - 1), masks, torch.tensor([1.0, 0.5, 0.25]))
        torch.testing.assert_close(exact, torch.tensor([1.0, 0.5, 0.25]))


def compare_stages(golden: Golden, model: torch.nn.Module) -> None:
    """Each stage's outputs at MMDetection's RoIs, and what all of them make of the first."""
    features = model.features(golden.images())
    head = model.box_head
    for stage in range(3):
        rows = golden[f"out/stage{stage}/rois"]
        logits, deltas = head.stages[stage](features, rows)
        torch.testing.assert_close(logits, golden[f"out/stage{stage}/cls_score"], **SHALLOW)
        torch.testing.assert_close(deltas[:, 0], golden[f"out/stage{stage}/bbox_pred"], **SHALLOW)
    limits = roi.limits(golden["out/stage0/rois"], golden.images().sizes)
    scores, _ = head.score(features, golden["out/stage0/rois"], limits)
    expected = golden["out/avg_cls_logits"].softmax(1)[:, :-1]
    torch.testing.assert_close(scores, expected, **DEEP)


STAGES = {
    f"stage{stage}_{ours}": f"s{stage}.loss_{theirs}"
    for stage in range(3)
    for ours, theirs in {"cls": "cls", "box": "bbox", "mask": "mask"}.items()
}


class TestCascade:
    @pytest.fixture(scope="class")
    def golden(self) -> Golden:
        return Golden("cascade")

    @pytest.fixture(scope="class")
    def model(self, golden: Golden) -> torch.nn.Module:
        return build(golden, "cascade", num_convs=2, classify="own")

    def test_heads(self, golden, model):
        with torch.no_grad():
            compare_stages(golden, model)
            found = model.predict(golden.images(), golden.detections())
        masks = torch.cat([instances.logits for instances in found])
        torch.testing.assert_close(masks.sigmoid(), golden["out/mask/avg_prob_of_label"], **SHALLOW)

    def test_results(self, golden, model):
        assert_same_results(golden, model)

    def test_losses(self, golden, model):
        compare(golden, named(golden, model), STAGES)

    def test_classifiers_look_at_the_last_boxes_by_default(self, golden):
        model = build(golden, "cascade", num_convs=2)
        last, features = golden["out/stage2/rois"], golden.features()
        first = golden["out/stage0/rois"]
        with torch.no_grad():
            scores, _ = model.box_head.score(
                features, first, roi.limits(first, golden.images().sizes)
            )
            logits = [head(features, last)[0] for head in model.box_head.stages]
        expected = torch.stack(logits).mean(0).softmax(1)[:, :-1]
        torch.testing.assert_close(scores, expected, **DEEP)


class TestHTC:
    @pytest.fixture(scope="class")
    def golden(self) -> Golden:
        return Golden("htc")

    @pytest.fixture(scope="class")
    def model(self, golden: Golden) -> torch.nn.Module:
        return build_htc(golden)

    def test_heads(self, golden, model):
        with torch.no_grad():
            feature, logits = model.branch(golden.features())
            compare_stages(golden, model)
            rows = roi.rows(golden.pair("out/det/bboxes_{}"))
            labels = torch.cat(golden.pair("out/det/labels_{}"))
            head, features = model.mask_head, model.features(golden.images())
            made = head.chain(features, rows, 3)
            masks = [stage.finish(x, labels) for stage, x in zip(head.stages, made, strict=True)]
            found = head(features, rows, labels)
        torch.testing.assert_close(feature, golden["out/semantic/feat"], **SHALLOW)
        torch.testing.assert_close(logits, golden["out/semantic/pred"], **SHALLOW)
        expected = [golden[f"out/mask/logits_stage{stage}"] for stage in range(3)]
        for ours, theirs in zip(masks, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **SHALLOW)
        mean = torch.stack(expected).sigmoid().mean(0)
        torch.testing.assert_close(found.sigmoid(), mean, **SHALLOW)

    def test_results(self, golden, model):
        assert_same_results(golden, model, final="out/final_avg3")
        assert_same_results(golden, build_htc(golden, masks="last"))

    def test_losses(self, golden, model):
        maps = golden["in/gt/semantic"][:, 0].to(torch.uint8)
        targets = [
            replace(target, semantic=each)
            for target, each in zip(golden.targets(), maps, strict=True)
        ]
        with torch.no_grad():
            found = model.loss(golden.images(), targets)
        figures = {key: float(value) for key, value in found.items()}
        compare(golden, figures, {**STAGES, "semantic": "loss_semantic_seg"})


def build_htc(golden: Golden, **options: str) -> torch.nn.Module:
    detector = {"score_threshold": 0.001}
    convs = {"num_convs": 2, "semantic_convs": 4, "semantic_classes": 7}
    return build(golden, "htc", **convs, **options, detector=detector)


def golden_rows(golden: Golden) -> torch.Tensor:
    """The fixed proposals as RoIs."""
    pair = golden.pair("in/proposals_{}")
    index = torch.arange(2.0).repeat_interleave(torch.tensor([len(boxes) for boxes in pair]))
    return torch.cat([index[:, None], torch.cat(pair)], 1)
