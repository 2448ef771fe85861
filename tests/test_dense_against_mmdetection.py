"""One-stage methods with MMDetection's weights: the numbers that its own modules gave."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from brefine.methods import create
from brefine.methods.solo import STRIDES
from brefine.methods.yolact import match
from brefine.parts.masks import paste_all, shrink
from brefine.pretrained import from_mmdetection
from brefine.structures import Bitmaps, Images, Instances
from mmdet_golden import DEEP, ORIGINAL, SHALLOW, SIZES, Fixed, Golden

PADDED = (128, 160)


def build(golden: Golden, method: str, strides: tuple[int, ...], **options: Any) -> nn.Module:
    """Our model with the golden weights, on the golden features."""
    detector = {"frozen_stages": 0, **options.pop("detector", {})}
    model: Any = create(method, 5, backbone="lcnet_035", channels=8, detector=detector, **options)
    theirs = {key[7:]: value for key, value in golden.items() if key.startswith("weight/")}
    missing, unexpected = model.load_state_dict(from_mmdetection(theirs, model), strict=False)
    assert not unexpected
    assert all(key.startswith("trunk.") for key in missing)
    model.trunk = Fixed([golden[f"in/feat/s{stride}"] for stride in strides])
    return model.eval()  # type: ignore[no-any-return]


def whole(found: Instances, size: tuple[int, int], original: tuple[int, int]) -> torch.Tensor:
    """Masks as MMDetection makes them: probabilities enlarged, cut, and resized."""
    drawn = functional.interpolate(found.logits.sigmoid()[:, None], PADDED, mode="bilinear")
    drawn = drawn[:, :, : size[0], : size[1]]
    return functional.interpolate(drawn, original, mode="bilinear")[:, 0] > 0.5


def ours(found: Instances, size: tuple[int, int]) -> torch.Tensor:
    """Masks as we paste them, where the picture has (height, width)."""
    masks = torch.zeros(len(found), *size, dtype=torch.bool)
    for mask, runs in zip(masks, paste_all(found, size), strict=True):
        window, (x, y) = runs.window()
        mask[y : y + window.shape[0], x : x + window.shape[1]] = torch.as_tensor(window)
    return masks


@pytest.mark.parametrize("name", ["solo", "solo_decoupled"])
class TestSOLO:
    @pytest.fixture
    def golden(self, name: str) -> Golden:
        return Golden(name)

    @pytest.fixture
    def model(self, name: str, golden: Golden) -> nn.Module:
        return build(
            golden,
            "solo",
            (4, 8, 16, 32, 64),
            width=12,
            groups=4,
            num_convs=3,
            grids=(7, 6, 4, 3, 7),
            ranges=((1, 24), (16, 48), (32, 72), (56, 112), (90, 512)),
            centre=0.6,
            owner="last",
            decoupled=name == "solo_decoupled",
            candidates=30,
            least_score=0.4,
            detector={"detections": 25},
        )

    def test_heads(self, name, golden, model):
        with torch.no_grad():
            classes, maps = model.class_head(model.trunk(None)), model.mask_head(model.trunk(None))
            for k in range(5):
                torch.testing.assert_close(classes[k], golden[f"out/train/cls_{k}"], **SHALLOW)
            for k in range(2, 5):
                if name == "solo_decoupled":
                    expected = [golden[f"out/train/mask_{axis}_{k}"] for axis in "xy"]
                    torch.testing.assert_close(maps[k], torch.cat(expected, 1), **SHALLOW)
                    continue
                expected = golden[f"out/train/mask_{k}"]
                cell = torch.arange(expected.shape[1])
                read = [model.mask_head.read(k, maps[k], torch.full_like(cell, i), cell)
                        for i in range(2)]  # fmt: skip
                torch.testing.assert_close(torch.stack(read), expected, **SHALLOW)

    def test_targets(self, name, golden, model):
        targets = golden.targets()
        cells = model.assign(targets, PADDED)
        seen = 0
        for k, level in enumerate(cells):
            for i, target in enumerate(targets):
                here = level.image == i
                labels = torch.full((model.grids[k] ** 2,), 5)
                labels[level.cell[here]] = target.labels[level.object[here]]
                expected = golden[f"out/target/labels_img{i}_lvl{k}"]
                assert torch.equal(labels.view_as(expected), expected)
                masks = golden.masks(f"out/target/pos_masks_{{}}_img{i}_lvl{k}")
                factor = STRIDES[k] // 2
                size = PADDED[0] // factor, PADDED[1] // factor
                drawn = shrink(target.masks[level.object[here]], factor, size)
                assert torch.equal(drawn, masks.view(-1, *size).float())
                seen += len(drawn)
        assert seen > 40

    def test_losses(self, name, golden, model):
        with torch.no_grad():
            found = model.loss(golden.images(), golden.targets())
        assert float(found["cls"]) == pytest.approx(float(golden["out/loss/loss_cls"]), rel=1e-4)
        assert float(found["mask"]) == pytest.approx(float(golden["out/loss/loss_mask"]), rel=1e-3)

    def test_results(self, name, golden, model):
        with torch.inference_mode():
            found = model.predict(golden.images())
        for i, (instances, size, original) in enumerate(zip(found, SIZES, ORIGINAL, strict=True)):
            torch.testing.assert_close(instances.scores, golden[f"out/final/scores_{i}"], **DEEP)
            assert torch.equal(instances.labels, golden[f"out/final/labels_{i}"])
            expected = golden.masks(f"out/final/masks_{{}}_{i}").bool()
            assert expected.float().mean() > 0.02
            assert (whole(instances, size, original) != expected).sum() <= 3
            # We read logits instead of probabilities between the cells, once instead of twice.
            pasted = ours(instances, original)
            shared = (pasted & expected).sum() / (pasted | expected).sum()
            assert shared > 0.95


class TestYOLACT:
    @pytest.fixture(scope="class")
    def golden(self) -> Golden:
        return Golden("yolact")

    @pytest.fixture
    def model(self, golden: Golden) -> nn.Module:
        return build(
            golden,
            "yolact",
            (8, 16, 32, 64, 128),
            width=16,
            prototypes=8,
            prototype_width=12,
            nms=0.15,
            candidates=40,
            per_class=10,
            detector={"detections": 40},
        )

    def targets(self, golden: Golden) -> list[Instances]:
        """Both pictures fill the padding here."""
        found = []
        for i in range(2):
            masks = Bitmaps.of(golden.masks(f"in/gt/masks_{{}}_{i}"))
            boxes, labels = golden[f"in/gt/boxes_{i}"], golden[f"in/gt/labels_{i}"]
            found.append(Instances(PADDED, boxes, labels, masks=masks))
        return found

    def images(self) -> Images:
        return Images(torch.zeros(2, 3, *PADDED), torch.tensor([PADDED, PADDED]))

    def test_heads(self, golden, model):
        pyramid = model.trunk(None)
        with torch.no_grad():
            said, drawn = model.box_head(pyramid), model.mask_head(pyramid)
            semantic = model.semantic(pyramid)
        torch.testing.assert_close(drawn, golden["out/prototypes"], **SHALLOW)
        torch.testing.assert_close(semantic.roll(-1, 1), golden["out/segm_logits"], **SHALLOW)
        torch.testing.assert_close(model.anchors(pyramid), golden["out/anchors"], **SHALLOW)
        for part, name, last in ((said.logits, "cls", 6), (said.deltas, "reg", 4),
                                 (said.shares, "coeff", 8)):  # fmt: skip
            levels = [golden[f"out/head/{name}_{k}"].permute(0, 2, 3, 1) for k in range(5)]
            expected = torch.cat([level.reshape(2, -1, last) for level in levels], 1)
            torch.testing.assert_close(part, expected, **SHALLOW)

    def test_losses(self, golden, model):
        for i, target in enumerate(self.targets(golden)):
            index = match(golden["out/anchors"], target.boxes)
            positive = (index >= 0).nonzero()[:, 0]
            assert torch.equal(positive, golden[f"out/target/pos_inds_{i}"])
            assert torch.equal(index[positive], golden[f"out/target/pos_gt_inds_{i}"])
        with torch.no_grad():
            found = model.loss(self.images(), self.targets(golden))
        pairs = {"cls": "loss_cls", "box": "loss_bbox", "mask": "loss_mask"}
        for ours, theirs in {**pairs, "semantic": "loss_segm"}.items():
            expected = float(golden[f"out/loss/{theirs}"].sum())
            assert float(found[ours]) == pytest.approx(expected, rel=1e-3), ours

    def test_results(self, golden, model):
        with torch.inference_mode():
            found = model.predict(self.images())
        for i, (instances, original) in enumerate(zip(found, [PADDED, (96, 120)], strict=True)):
            scale = torch.tensor([original[1] / PADDED[1], original[0] / PADDED[0]]).repeat(2)
            torch.testing.assert_close(instances.scores, golden[f"out/final/scores_{i}"], **DEEP)
            assert torch.equal(instances.labels, golden[f"out/final/labels_{i}"])
            boxes = instances.boxes * scale
            torch.testing.assert_close(boxes, golden[f"out/final/bboxes_{i}"], **DEEP)
            # MMDetection cuts prototypes a cell outside of the box, we the mask at the box.
            x, y = torch.arange(40), torch.arange(32)
            x1, y1, x2, y2 = (instances.boxes / 4)[:, :, None].unbind(1)
            inside = ((y >= (y1 - 1).clamp(min=0)) & (y < y2 + 1))[:, :, None]
            inside = inside & ((x >= (x1 - 1).clamp(min=0)) & (x < x2 + 1))[:, None]
            drawn = instances.logits.sigmoid() * inside
            torch.testing.assert_close(drawn[:6], golden[f"out/mask_prob_cropped_{i}"], **DEEP)
            masks = functional.interpolate(drawn[:, None], original, mode="bilinear")[:, 0] > 0.5
            expected = golden.masks(f"out/final/masks_{{}}_{i}").bool()
            assert expected.float().mean() > 0.02
            assert (masks != expected).sum() <= 3
            pasted = ours(instances, original)
            assert (pasted & ~expected).sum() < 0.01 * expected.sum()
