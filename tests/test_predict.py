"""From pictures to objects: frames, thresholds, every kind of input."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn

import brefine
from brefine.data.coco import CocoSet
from brefine.predict import Predictor
from brefine.sources import as_array
from brefine.structures import Category, Images, InputError, Instances

CATEGORIES = [Category(7, "a"), Category(30, "b")]


class Oracle(nn.Module):
    """A model that knows: boxes at fixed fractions of the picture, masks that are discs."""

    num_classes = 2
    fractions = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.3, 0.3]])

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Images] = []

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        raise AssertionError("prediction must not train")

    def features(self, images: Images) -> None:
        return None

    def predict(
        self,
        images: Images,
        given: Sequence[Instances] | None = None,
        *,
        features: None = None,
        margin: float = 0.0,
    ) -> list[Instances]:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.seen.append(images)
        centre = (torch.arange(28) + 0.5) / 28 - 0.5
        disc = 10 * (0.25 - centre[:, None] ** 2 - centre**2)
        found = []
        for i, (height, width) in enumerate(images.sizes.tolist()):
            if given is None:
                scale = torch.tensor([width, height, width, height])
                labels, scores = torch.tensor([0, 1, 0]), torch.tensor([0.9, 0.6, 0.3])
                box = self.fractions * scale
                one = Instances((height, width), box, labels, scores)
            else:
                one = given[i]
                assert one.size == (height, width)
            found.append(replace(one, logits=disc.expand(len(one), 28, 28)))
        return found


def predictor(**options: Any) -> Predictor:
    options = {"short_side": 64, "long_side": 100, "device": "cpu", **options}
    return Predictor(Oracle(), CATEGORIES, **options)


def picture(height: int = 90, width: int = 160) -> Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("size", [(90, 160), (64, 64), (31, 17), (1, 1), (40, 700), (300, 333)])
def test_results_are_in_the_original_frame(size: tuple[int, int]) -> None:
    p = predictor()
    found = p(picture(*size), threshold=0)
    assert found.size == size
    expected = Oracle.fractions * torch.tensor([size[1], size[0], size[1], size[0]])
    torch.testing.assert_close(found.boxes, expected)
    # The network saw the picture inside its limits.
    seen = p.model.seen[0].sizes[0].tolist()  # type: ignore[attr-defined]
    assert min(seen) <= 64
    assert max(seen) <= 100
    assert min(seen) == 64 or max(seen) == 100
    assert (found.boxes[:, 2] <= size[1]).all()
    assert (found.boxes[:, 3] <= size[0]).all()


def test_thresholds() -> None:
    assert predictor(thresholds=[0.95, 0.5])(picture()).labels.tolist() == [1]
    assert predictor(thresholds=[0.2, 0.7])(picture()).labels.tolist() == [0, 0]
    assert predictor(thresholds=0.6)(picture()).scores.tolist() == pytest.approx([0.9, 0.6])
    strict = predictor(thresholds=1.0)
    assert len(strict(picture())) == 0
    assert len(strict(picture(), threshold=0)) == 3
    assert len(strict(picture(), threshold=0.5)) == 2
    with pytest.raises(InputError, match="2 categories and 3 thresholds"):
        predictor(thresholds=[0.5] * 3)
    with pytest.raises(InputError, match="model has 2 classes"):
        Predictor(Oracle(), CATEGORIES[:1], device="cpu")


def test_every_input_gives_the_same(tmp_path: Path, tiny_model: Path) -> None:
    p = brefine.load(tiny_model, device="cpu")
    assert (p.short_side, p.long_side) == (96, 128)
    assert p.thresholds == [0.1, 0.2, 0.3, 0.4]
    pixels = picture(50, 70)
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image.save(tmp_path / "x.png")
    first = p.detect(pixels, threshold=0)
    assert len(first)
    for other in (array, image, tmp_path / "x.png", str(tmp_path / "x.png")):
        found = p.detect(other, threshold=0)
        assert torch.equal(found.boxes, first.boxes)
        assert torch.equal(found.scores, first.scores)
        assert torch.equal(found.logits, first.logits)
    # Rows run backwards in memory here.
    flipped = p(np.ascontiguousarray(array[::-1])[::-1], threshold=0)
    assert torch.equal(flipped.boxes, first.boxes)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
        torch.zeros(4, 5, 3, dtype=torch.uint8),
        torch.zeros(3, 4, 5),
        None,
        b"bytes",
        "no/such.jpg",
    ],
    ids=repr,
)
def test_wrong_input_is_one_line(wrong: Any) -> None:
    with pytest.raises(InputError) as caught:
        predictor()(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": math.nan}, "threshold nan: expected a score, 0 to 1"),
        ({"threshold": 2}, "threshold 2: expected"),
        ({"views": "flip"}, r"views 'flip': expected those of brefine"),
        ({"views": ()}, "views"),
    ],
)
def test_options_of_a_call_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        predictor()(np.zeros((40, 50, 3), np.uint8), **options)


def test_a_margin_is_a_share() -> None:
    p = predictor()
    p.margin = 0.5
    for wrong in (math.nan, -0.1, 1.5):
        with pytest.raises(InputError, match="margin"):
            p.margin = wrong
    assert p.margin == 0.5


def test_a_read_only_array_is_taken_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    pixels = np.asarray(Image.new("RGB", (50, 40), "red"))
    assert not pixels.flags.writeable
    predictor()(pixels)
    assert not recwarn.list
    assert as_array(pixels).flags.writeable  # torch warns only once a process


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert predictor()(tmp_path / "x.jpg").size == (40, 20)
    assert predictor()(Image.open(tmp_path / "x.jpg")).size == (40, 20)


def test_several_pictures_give_what_each_gives_alone(tiny_model: Path) -> None:
    p = brefine.load(tiny_model, device="cpu")
    pictures = [picture(*size) for size in [(50, 70), (70, 50), (50, 70), (9, 200), (50, 70)]]
    passes = []
    p.model.trunk.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[attr-defined]
    together = p.several(pictures, threshold=0)
    assert len(passes) == 3  # one a size
    assert p.several([]) == []
    for pixels, found in zip(pictures, together, strict=True):
        alone = p.detect(pixels, threshold=0)
        assert len(alone)
        assert found.size == alone.size
        for name in ("boxes", "labels", "scores", "logits"):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name))
    limits = [len(found) for found in p.several(pictures)]
    assert limits == [len(p(pixels)) for pixels in pictures]


def test_given_boxes_keep_frame_order_and_labels() -> None:
    target = Instances(
        (90, 160),
        torch.tensor([[100.0, 10, 140, 70], [-5.0, 0, 20, 30], [0.0, 0, 160, 90]]),
        torch.tensor([1, 0, 1]),
    )
    found = predictor().given(picture(), target)
    assert torch.equal(found.boxes, target.boxes)
    assert torch.equal(found.labels, target.labels)
    assert found.size == (90, 160)
    assert found.logits is not None
    assert found.logits.shape == (3, 28, 28)
    nothing = predictor().given(picture(), target[torch.zeros(0, dtype=torch.int64)])
    assert len(nothing) == 0


def test_given_boxes_agree_with_detection(tiny_model: Path) -> None:
    p = brefine.load(tiny_model, device="cpu")
    pixels = picture(80, 120)
    found = p.detect(pixels, threshold=0)
    again = p.given(pixels, found)
    assert found.logits is not None
    assert again.logits is not None
    torch.testing.assert_close(again.logits, found.logits, rtol=1e-3, atol=1e-4)


def test_both_is_detecting_and_filling_with_one_pass_of_the_trunk(
    toy_set: Path, tiny_model: Path
) -> None:
    predictor = Predictor.load(tiny_model, "cpu")
    dataset = CocoSet(toy_set / "val.json")
    passes = []
    predictor.model.trunk.register_forward_hook(lambda *_: passes.append(1))
    for index, picture in enumerate(dataset.pictures):
        target = dataset.target(index)
        expected = (
            predictor.detect(picture.file, threshold=0),
            predictor.given(picture.file, target),
        )
        passes.clear()
        both = predictor.both(picture.file, target)
        assert len(passes) == 1
        for mine, theirs in zip(both, expected, strict=True):
            assert mine.size == theirs.size
            for name in ("boxes", "labels", "scores", "logits"):
                torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))


def test_records_are_coco_results() -> None:
    records = predictor().records(picture(), 12, threshold=0.5)
    assert [record["category_id"] for record in records] == [7, 30]
    assert {record["image_id"] for record in records} == {12}
    x, y, w, h = records[0]["bbox"]
    assert (x, y, w, h) == pytest.approx((16, 18, 80, 45))
    mask = coco_mask.decode(records[0]["segmentation"])
    assert mask.shape == (90, 160)
    assert mask.sum() == pytest.approx(np.pi / 4 * 80 * 45, rel=0.02)  # the disc, stretched
    ys, xs = mask.nonzero()
    assert (xs.min(), xs.max() + 1) == pytest.approx((16, 96), abs=1)
    assert (ys.min(), ys.max() + 1) == pytest.approx((18, 63), abs=1)
