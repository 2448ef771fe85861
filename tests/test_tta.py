"""Several views of a picture, RoIs with a margin, and tiles, through a whole predictor."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

import brefine
from brefine.data.coco import CocoSet
from brefine.data.loader import read_picture
from brefine.parts.boxes import enlarge
from brefine.predict import Predictor
from brefine.structures import Category, Images, InputError, Instances
from brefine.views import PLAIN, View, combine, fuse

CATEGORIES = [Category(7, "red"), Category(30, "green")]
FLIPPED = combine(flip=True)


def test_views_are_combinations() -> None:
    assert combine() == PLAIN == (View(False, 1.0),)
    assert combine(flip=True, scales=[1.0, 0.5]) == (
        View(False, 1.0),
        View(True, 1.0),
        View(False, 0.5),
        View(True, 0.5),
    )
    for scales in ([], [1.0, 1.0], [0.0], [-1.0], [5.0], [float("nan")]):
        with pytest.raises(InputError, match="scales"):
            combine(scales=scales)


def some(boxes: list[list[float]], scores: list[float], labels: list[int] | None = None) -> Any:
    return Instances(
        (100, 200),
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(labels or [0] * len(boxes)),
        torch.tensor(scores, dtype=torch.float64),
    )


def test_turning_twice_is_nothing() -> None:
    found = replace(some([[10.0, 20, 50, 60]], [0.5]), logits=torch.randn(1, 4, 4))
    turned = View(flip=True).turn(found)
    assert turned.boxes.tolist() == [[150, 20, 190, 60]]
    assert torch.equal(turned.logits, found.logits.flip(2))
    again = View(flip=True).turn(turned)
    assert torch.equal(again.boxes, found.boxes)
    assert torch.equal(again.logits, found.logits)
    assert View(scale=2).turn(found) is found


def test_fusion_by_hand() -> None:
    one = some([[0.0, 0, 40, 40], [100, 0, 140, 40], [0, 50, 40, 90]], [0.9, 0.6, 0.2])
    other = some([[4.0, 0, 44, 40], [100, 0, 140, 40]], [0.3, 0.8])
    found = fuse([one, other])
    assert found.boxes.tolist() == [[100, 0, 140, 40], [1, 0, 41, 40], [0, 50, 40, 90]]
    assert found.scores.tolist() == pytest.approx([0.7, 0.6, 0.1])
    assert found.logits is None
    # Another class is another object; so is one that overlaps too little.
    apart = fuse([one, replace(other, labels=torch.tensor([1, 1]))])
    assert len(apart) == 3  # no more than the view with the most
    assert apart.scores.tolist() == pytest.approx([0.45, 0.4, 0.3])
    assert len(fuse([some([[0.0, 0, 40, 40]], [0.5]), some([[20.0, 0, 60, 40]], [0.5])])) == 1
    # Two of one view are never joined: here the better overlap is taken, the other one stays.
    close = some([[0.0, 0, 41, 40], [0.0, 0, 46, 40]], [0.5, 0.7])
    first = fuse([some([[0.0, 0, 40, 40]], [0.9]), close])
    assert first.scores.tolist() == pytest.approx([0.7, 0.35])
    assert first.boxes[1].tolist() == [0, 0, 46, 40]


def test_fusion_of_nothing_and_of_one() -> None:
    one = some([[0.0, 0, 40, 40], [1.0, 0, 41, 40]], [0.9, 0.6])
    alone = fuse([one])
    assert torch.equal(alone.boxes, one.boxes)
    assert torch.equal(alone.scores, one.scores)
    twice = fuse([one, one])
    torch.testing.assert_close(twice.boxes, one.boxes)
    torch.testing.assert_close(twice.scores, one.scores)
    none = some([], [])
    assert len(fuse([none, none])) == 0
    assert fuse([none, one]).scores.tolist() == pytest.approx([0.45, 0.3])
    assert fuse([some([[0.0, 0, 1, 1]], [0.0])] * 2).boxes.tolist() == [[0, 0, 1, 1]]


# --- a model that can be checked: it finds rectangles by their colour


class Finder(nn.Module):
    """Finds what is more than half red or green, as one box a class; masks fill the box.

    Logits tell where they come from: the left half is 1, the right half the mean of the picture's
    blue, which a test can choose.
    """

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        raise AssertionError("prediction must not train")

    def features(self, images: Images) -> Any:
        return images.pixels.float()

    def predict(
        self,
        images: Images,
        given: Sequence[Instances] | None = None,
        *,
        features: Any = None,
        margin: float = 0.0,
    ) -> list[Instances]:
        [(height, width)] = images.sizes.tolist()
        self.seen.append((height, width))
        picture = images.pixels[0, :, :height, :width].float()
        if features is not None:
            assert torch.equal(features, images.pixels.float())
        if given is None:
            boxes, labels = [], []
            for label in range(2):
                ys, xs = (picture[label] > 127).nonzero(as_tuple=True)
                if len(ys):
                    box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
                    boxes.append(box)
                    labels.append(label)
            one = Instances(
                (height, width),
                torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                torch.tensor(labels, dtype=torch.int64),
                torch.tensor([0.9, 0.6])[labels],
            )
        else:
            [one] = given
            assert one.size == (height, width)
        logits = torch.ones(len(one), 8, 8)
        logits[:, :, 4:] = picture[2].mean()
        return [replace(one, logits=logits, margin=margin)]


def picture(*rectangles: tuple[int, int, int, int, int], size: tuple[int, int] = (96, 160)) -> Any:
    """Black, blue 1, with rectangles (channel, x1, y1, x2, y2)."""
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    pixels[2] = 1
    for channel, x1, y1, x2, y2 in rectangles:
        pixels[channel, y1:y2, x1:x2] = 255
    return pixels


def finder(**options: Any) -> Predictor:
    options = {"short_side": 96, "long_side": 1000, "device": "cpu", **options}
    return Predictor(Finder(), CATEGORIES, **options)


def boxes_of(records: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    return {r["category_id"]: coco_mask.toBbox(r["segmentation"]).tolist() for r in records}


VIEWS = [PLAIN, FLIPPED, combine(flip=True, scales=(0.5, 1.0, 2.0))]


@pytest.mark.parametrize("views", VIEWS, ids=len)
def test_every_view_comes_back_to_the_picture(views: Any) -> None:
    model = finder()
    pixels = picture((0, 10, 20, 50, 80), (1, 100, 8, 156, 40))
    found = model.detect(pixels, views=views)
    assert found.labels.tolist() == [0, 1]
    assert found.boxes.tolist() == [[10, 20, 50, 80], [100, 8, 156, 40]]
    assert found.scores is not None
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])
    seen = model.model.seen  # type: ignore[attr-defined]
    assert set(seen) == {(round(96 * v.scale), round(160 * v.scale)) for v in views}
    assert boxes_of(model.records(pixels, 1, views=views)) == {
        7: [10, 20, 40, 60],
        30: [100, 8, 56, 32],
    }
    assert model.detect(pixels, views=views, threshold=0.7).labels.tolist() == [0]


def test_masks_are_averaged_on_the_grid_of_the_box() -> None:
    """The finder's logits are 1 at its left and 5 at its right: mirrored, the other way round."""
    pixels = picture((0, 10, 20, 50, 80))
    pixels[2] = 5
    plain, both = (finder().detect(pixels, views=views).logits for views in (PLAIN, FLIPPED))
    assert plain is not None
    assert both is not None
    assert plain[0, 0].tolist() == [1, 1, 1, 1, 5, 5, 5, 5]
    assert both[0, 0].tolist() == [3] * 8
    mirrored = finder().detect(pixels, views=[View(flip=True)]).logits
    assert mirrored is not None
    assert mirrored[0, 0].tolist() == [5, 5, 5, 5, 1, 1, 1, 1]
    target = Instances((96, 160), torch.tensor([[3.0, 3, 9, 9]]), torch.tensor([1]))
    given = finder().given(pixels, target, views=FLIPPED).logits
    assert given is not None
    assert given[0, 0].tolist() == [3] * 8


@pytest.mark.parametrize("views", VIEWS, ids=len)
@pytest.mark.parametrize("short", [64, 128])
def test_tiles_and_views_together(views: Any, short: int) -> None:
    """One object across all tiles, one across a seam, at the network's size or twice that."""
    model = finder(short_side=short)
    pixels = picture((0, 5, 30, 290, 150), (1, 40, 10, 70, 25), size=(180, 300))
    found = model.records(pixels, 4, tile=64, overlap=16, views=views, progress=True)
    assert [r["image_id"] for r in found] == [4, 4]
    assert boxes_of(found) == {7: [5, 30, 285, 120], 30: [40, 10, 30, 15]}
    assert [coco_mask.area(r["segmentation"]) for r in found] == [285 * 120, 30 * 15]
    assert found[0]["bbox"] == pytest.approx([5, 30, 285, 120], abs=0.5)
    assert found[0]["score"] == pytest.approx(0.9)


def test_automatic_tiles() -> None:
    model = finder(short_side=32, long_side=64)
    pixels = picture((0, 5, 30, 290, 150), size=(180, 300))
    model.records(pixels, 1, tile="auto")
    seen = model.model.seen  # type: ignore[attr-defined]
    assert len(seen) > 50
    assert set(seen) == {(32, 32)}
    seen.clear()
    model.records(pixels[:, :100, :100], 1, tile="auto")
    assert seen == [(32, 32)]  # looked at as a whole
    with pytest.raises(InputError, match="overlap must be"):
        model.records(pixels, 1, tile=100, overlap=60)


# --- real models


def pictures(toy_set: Path) -> list[Tensor]:
    return [read_picture(one.file) for one in CocoSet(toy_set / "val.json").pictures]


def test_a_tile_larger_than_the_picture_is_the_picture(toy_set: Path, tiny_model: Path) -> None:
    model = brefine.load(tiny_model, device="cpu")
    for pixels in pictures(toy_set):
        for views in (PLAIN, FLIPPED):
            plain = model.records(pixels, 1, threshold=0.0, views=views)
            assert plain
            assert model.records(pixels, 1, threshold=0.0, views=views, tile=500) == plain
            assert model.records(pixels, 1, threshold=0.0, views=views, tile="auto") == plain


def test_the_identity_is_plain(toy_set: Path, tiny_model: Path) -> None:
    model = brefine.load(tiny_model, device="cpu")
    for pixels in pictures(toy_set):
        plain = model.detect(pixels, threshold=0.0)
        for views, exact in (([View()], True), ([View(), View()], False)):
            found = model.detect(pixels, threshold=0.0, views=views)
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-3}
            assert torch.equal(found.labels, plain.labels)
            for name in ("boxes", "scores", "logits"):
                one, other = getattr(found, name), getattr(plain, name)
                torch.testing.assert_close(one, other, **tolerance)


def test_a_flipped_picture_has_flipped_results(toy_set: Path, tiny_models: dict[str, Path]) -> None:
    for folder in tiny_models.values():
        model = brefine.load(folder, device="cpu")
        moved = 0.0
        for pixels in pictures(toy_set):
            found = model.detect(pixels, threshold=0.0, views=FLIPPED)
            mirrored = View(flip=True).turn(
                model.detect(pixels.flip(2), threshold=0.0, views=FLIPPED)
            )
            assert len(found)
            assert torch.equal(found.labels, mirrored.labels)
            torch.testing.assert_close(found.scores, mirrored.scores)
            torch.testing.assert_close(found.boxes, mirrored.boxes, rtol=0, atol=1e-3)
            torch.testing.assert_close(found.logits, mirrored.logits, rtol=1e-3, atol=1e-3)
            # One view alone is not symmetric: the test would see it.
            alone = View(flip=True).turn(model.detect(pixels.flip(2), threshold=0.0))
            plain = model.detect(pixels, threshold=0.0)
            count = min(len(alone), len(plain))
            moved += float((alone.boxes[:count] - plain.boxes[:count]).abs().sum())
        assert moved > 1


def test_a_margin_enlarges_the_roi_of_the_mask(toy_set: Path, tiny_model: Path) -> None:
    plain, wide = brefine.load(tiny_model, device="cpu"), brefine.load(tiny_model, device="cpu")
    wide.margin = 0.2
    for pixels in pictures(toy_set):
        found, loose = plain.detect(pixels, threshold=0.0), wide.detect(pixels, threshold=0.0)
        assert (found.margin, loose.margin) == (0, 0.2)
        assert torch.equal(found.boxes, loose.boxes)  # what is reported stays
        larger = plain.given(pixels, replace(found, boxes=enlarge(found.boxes, 0.2)))
        torch.testing.assert_close(loose.logits, larger.logits, rtol=1e-3, atol=1e-3)
        again = wide.given(pixels, found)
        assert again.margin == 0.2
        torch.testing.assert_close(loose.logits, again.logits, rtol=1e-3, atol=1e-3)
        detected, filled = wide.both(pixels, found)
        assert torch.equal(detected.logits, loose.logits)
        torch.testing.assert_close(filled.logits, again.logits, rtol=1e-3, atol=1e-3)
        views = wide.detect(pixels, threshold=0.0, views=FLIPPED)
        assert views.margin == 0.2
    assert not np.allclose(found.logits, loose.logits, atol=1e-3)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="margin"):
            finder(margin=wrong)


def test_masks_may_leave_their_boxes_by_the_margin() -> None:
    pixels = picture((0, 20, 20, 60, 80))
    model = finder(margin=0.25)
    [record] = model.records(pixels, 1)
    assert record["bbox"] == [20, 20, 40, 60]
    assert coco_mask.toBbox(record["segmentation"]).tolist() == [10, 5, 60, 90]
