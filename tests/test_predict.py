"""From pictures to objects: frames, thresholds, every kind of input, files in and out."""

import json
import shutil
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
from brefine.jobs import predict_files
from brefine.predict import Predictor
from brefine.sources import find_pictures
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
        self, images: Images, given: Sequence[Instances] | None = None, *, features: None = None
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
    first = p(pixels, threshold=0)
    assert len(first)
    for other in (array, image, tmp_path / "x.png", str(tmp_path / "x.png")):
        found = p(other, threshold=0)
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
        np.zeros((4, 5), np.uint8),
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


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert predictor()(tmp_path / "x.jpg").size == (40, 20)
    assert predictor()(Image.open(tmp_path / "x.jpg")).size == (40, 20)


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
    found = p(pixels, threshold=0)
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
        expected = predictor(picture.file, threshold=0), predictor.given(picture.file, target)
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


# --- files


def write_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(folder / name)


def test_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, "in/b.png", "in/a.JPG", "in/deep/a.png", "other/c.png", "odd[1].png")
    Path("in/notes.txt").touch()
    assert list(find_pictures(["in"])) == ["a.JPG", "b.png", "deep/a.png"]
    assert list(find_pictures(["other/c.png", "in"])) == ["c.png", "a.JPG", "b.png", "deep/a.png"]
    assert list(find_pictures(["in/*.png"])) == ["b.png"]
    assert list(find_pictures(["oth*/*.png"])) == ["c.png"]
    assert list(find_pictures(["odd[1].png"])) == ["odd[1].png"]  # a name, not a pattern
    assert list(find_pictures(["in/b.png", "in/*.png"])) == ["b.png"]  # twice is once
    for sources, part in [
        (["nope.png"], "nope.png: no such picture"),
        (["no*pe.png"], "no*pe.png: no pictures there"),
        (["in", "in/deep/a.png"], "into two folders"),
        ([Path("in/deep"), "in/a.JPG"], "into two folders"),
    ]:
        with pytest.raises(InputError) as caught:
            find_pictures(sources)  # type: ignore[arg-type]
        assert part in str(caught.value)


def test_outputs(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "deep/b.jpg")
    out = tmp_path / "out"
    assert predict_files(predictor(), [tmp_path / "in"], out) == []
    records = json.loads((out / "predictions.json").read_text())
    assert [r["image_id"] for r in records] == ["a.png", "a.png", "deep/b.jpg", "deep/b.jpg"]
    assert (out / "overlays" / "a.png").is_file()
    assert Image.open(out / "overlays" / "deep" / "b.png").size == (40, 30)
    assert any(path.is_file() for path in (out / "masks").rglob("a*.png"))
    assert any(path.is_file() for path in (out / "masks" / "deep").rglob("b*.png"))
    # An older result is replaced as a whole; nothing is left beside it.
    predict_files(predictor(), [tmp_path / "in" / "a.png"], out, formats=["coco"])
    assert [path.name for path in out.iterdir()] == ["predictions.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_broken_picture_stops_and_keeps_the_old(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "c.png")
    out = tmp_path / "out"
    predict_files(predictor(), [tmp_path / "in"], out)
    before = (out / "predictions.json").read_bytes()
    (tmp_path / "in" / "b.png").write_text("no picture")
    with pytest.raises(InputError, match=r"b\.png: no picture"):
        predict_files(predictor(), [tmp_path / "in"], out, threshold=0)
    assert (out / "predictions.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_broken_picture_is_skipped_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "in", "a.png", "c.png")
    (tmp_path / "in" / "b.png").write_text("no picture")
    out = tmp_path / "out"
    broken = predict_files(predictor(), [tmp_path / "in"], out, skip_broken=True)
    assert [path.name for path in broken] == ["b.png"]
    assert "b.png: no picture" in " ".join(capsys.readouterr().err.split())
    records = json.loads((out / "predictions.json").read_text())
    assert {record["image_id"] for record in records} == {"a.png", "c.png"}


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    with pytest.raises(InputError, match="holds something else"):
        predict_files(predictor(), [tmp_path / "a.png"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_ids_of_a_data_set(tmp_path: Path, toy_set: Path, tiny_model: Path) -> None:
    dataset = CocoSet(toy_set / "val.json")
    files = [picture.file for picture in dataset.pictures]
    p = brefine.load(tiny_model, device="cpu")
    predict_files(p, files, tmp_path / "out", threshold=0, formats=["coco"], data=dataset.path)
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {record["image_id"] for record in records} == {p.id for p in dataset.pictures}
    shutil.copy(files[0], tmp_path / "stranger.png")
    with pytest.raises(InputError, match=r"stranger\.png: .*does not list"):
        predict_files(p, [tmp_path / "stranger.png"], tmp_path / "out", data=dataset.path)
