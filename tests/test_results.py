"""The result of a prediction: what it holds, how it is cut, drawn and handed on."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import brefine
from brefine.predict import Predictor
from brefine.results import Masks, Object, Result, of_records
from brefine.structures import Category, InputError, Instances
from samples import dense_rle
from test_predict import CATEGORIES, picture, predictor


@pytest.fixture
def found() -> Result:
    return predictor()(picture(), threshold=0)


def test_what_it_holds(found: Result) -> None:
    assert found.size == (90, 160)
    assert found.labels.tolist() == [0, 1, 0]
    assert found.names == ["a", "b", "a"]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert found.boxes.shape == (3, 4)
    assert len(found) == 3
    assert bool(found)
    assert not predictor()(picture(), threshold=1)


def test_masks_are_those_of_the_records(found: Result) -> None:
    records = found.to_coco(5)
    assert records == predictor().records(
        torch.zeros(3, 90, 160, dtype=torch.uint8), 5, threshold=0
    )
    dense = np.stack([coco_mask.decode(record["segmentation"]) for record in records]) > 0
    assert found.masks.shape == (3, 90, 160)
    assert dense.any((1, 2)).all()
    np.testing.assert_array_equal(np.asarray(found.masks), dense)
    np.testing.assert_array_equal(np.asarray(found.masks, dtype=np.uint8), dense)
    np.testing.assert_array_equal(found.masks[-1], dense[-1])
    np.testing.assert_array_equal(np.asarray(found.masks[1:]), dense[1:])
    assert len(list(found.masks)) == 3
    for i, (thing, mask) in enumerate(zip(found, dense, strict=True)):
        window, (x, y) = found.mask(i)
        assert isinstance(thing, Object)
        np.testing.assert_array_equal(thing.mask, window)
        assert thing.origin == (x, y)
        assert window.any(0).all() or window.any(1).all()
        whole = np.zeros_like(mask)
        whole[y : y + window.shape[0], x : x + window.shape[1]] = window
        np.testing.assert_array_equal(whole, mask)
        assert thing.name == found.names[i]
        assert thing.box == pytest.approx(tuple(found.boxes[i].tolist()))


def test_masks_are_not_drawn_before_they_are_asked_for(found: Result) -> None:
    big = Result(
        Instances((60_000, 60_000), found.boxes, found.labels, found.scores,
                  logits=found.instances.logits),
        CATEGORIES,
    )  # fmt: skip
    assert big.masks.shape == (3, 60_000, 60_000)  # 10 GB, were it one array
    assert big.mask(0)[0].sum() == found.mask(0)[0].sum()
    assert "drawn when asked for" in repr(big.masks)


def test_choosing_some(found: Result) -> None:
    condition = found.scores > 0.5
    for index in (condition, condition.numpy(), condition.tolist(), slice(0, 2), [0, 1], range(2)):
        some = found[index]
        assert isinstance(some, Result)
        assert some.names == ["a", "b"]
        assert some.to_coco(1) == found.to_coco(1)[:2]
        np.testing.assert_array_equal(np.asarray(some.masks), np.asarray(found.masks)[:2])
    assert found[torch.tensor([2, 0])].scores.tolist() == pytest.approx([0.3, 0.9])
    assert found[::-1].names == ["a", "b", "a"]
    assert found[::-1].scores.tolist() == pytest.approx([0.3, 0.6, 0.9])
    for nothing in ([], found.scores > 2, slice(0, 0)):
        none = found[nothing]
        assert len(none) == 0
        assert np.asarray(none.masks).shape == (0, 90, 160)
        assert none.polygons() == none.to_coco(1) == list(none) == []
    assert found[-1].score == pytest.approx(0.3)
    with pytest.raises(IndexError, match="object 3 of 3"):
        found[3]


def test_polygons_draw_the_masks(found: Result) -> None:
    for parts, mask in zip(found.polygons(), found.masks, strict=True):
        flat = [ring.ravel().tolist() for part in parts for ring in part]
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, 90, 160)))
        np.testing.assert_array_equal(drawn, mask)  # discs have no holes
    fewer = sum(len(part[0]) for parts in found.polygons(1.0) for part in parts)
    assert fewer < sum(len(part[0]) for parts in found.polygons() for part in parts) / 2


def test_polygons_have_holes() -> None:
    ring = np.zeros((20, 30), bool)
    ring[2:12, 3:20] = True
    ring[5:8, 6:9] = False
    record = {"category_id": 7, "score": 0.5, "bbox": [3, 2, 17, 10],
              "segmentation": dense_rle(ring)}  # fmt: skip
    found = Result(of_records([record], (20, 30), CATEGORIES), CATEGORIES)
    ((outline, hole),) = found.polygons()[0]
    assert sorted(outline.tolist()) == [[3, 2], [3, 12], [20, 2], [20, 12]]
    assert sorted(hole.tolist()) == [[6, 5], [6, 8], [9, 5], [9, 8]]
    assert found.to_coco(1) == [{"image_id": 1, **record}]
    assert found.boxes.tolist() == [[3, 2, 20, 12]]


def test_tiles_give_a_result_too(tiny_model: Path) -> None:
    p = brefine.load(tiny_model, device="cpu")
    pixels = picture(150, 200)
    options: dict[str, Any] = {"threshold": 0, "tile": 96, "overlap": 20}
    found = p(pixels, **options)
    records = p.records(pixels, 3, **options)
    assert len(found) == len(records) > 10
    for mine, theirs in zip(found.to_coco(3), records, strict=True):
        assert mine["segmentation"] == theirs["segmentation"]
        assert mine["score"] == theirs["score"]
        assert mine["category_id"] == theirs["category_id"]
        assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)
    assert p(picture(40, 40), threshold=1, tile=20).to_coco(1) == []


def test_the_order_of_channels_is_said(tiny_model: Path) -> None:
    p = brefine.load(tiny_model, device="cpu")
    array = picture(50, 70).permute(1, 2, 0).numpy()
    straight = p(array, threshold=0)
    turned = p(np.ascontiguousarray(array[:, :, ::-1]), threshold=0, channels="BGR")
    assert torch.equal(straight.boxes, turned.boxes)
    assert np.array_equal(straight.draw(), turned.draw())
    assert not torch.equal(straight.boxes, p(array, threshold=0, channels="BGR").boxes)


def test_drawing(found: Result, tmp_path: Path) -> None:
    image = found.draw()
    assert image.size == (160, 90)
    assert np.array_equal(found[found.scores > 2].draw(), found.picture.permute(1, 2, 0))  # type: ignore[union-attr]
    changed = (np.array(image) != found.picture.permute(1, 2, 0).numpy()).any(2)  # type: ignore[union-attr]
    assert changed[np.asarray(found.masks).any(0)].mean() > 0.9
    content = found._repr_png_()
    assert content is not None
    assert Image.open(io.BytesIO(content)).size == (160, 90)
    # A file is read again, not kept.
    Image.new("RGB", (2000, 30)).save(tmp_path / "a.png")
    of_file = predictor()(str(tmp_path / "a.png"))
    assert of_file.picture == str(tmp_path / "a.png")
    content = of_file._repr_png_()
    assert content is not None
    assert Image.open(io.BytesIO(content)).size == (1280, 19)
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: 30 x 20 pixels, but 30 x 2000 when"):
        of_file.draw()
    without = Result(found.instances, found.categories)
    assert without._repr_png_() is None
    with pytest.raises(InputError, match="has no picture to draw on"):
        without.draw()


def test_repr_is_one_line(found: Result) -> None:
    assert repr(found) == "Result 90 x 160: 2 a (0.90 to 0.30), 1 b (0.60)"
    assert repr(found[:0]) == "Result 90 x 160: no objects"
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 5, 4, 5])
    many = Instances((9, 8), torch.zeros(9, 4), labels, torch.linspace(0.9, 0.1, 9))
    names = [Category(i, name) for i, name in enumerate("abcdef")]
    assert repr(Result(many, names)) == (
        "Result 9 x 8: 3 f (0.40 to 0.10), 2 e (0.50 to 0.20), 1 a (0.90), 1 b (0.80), "
        "2 of 2 more classes"
    )


def test_supervision(found: Result) -> None:
    supervision = pytest.importorskip("supervision")
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections)
    np.testing.assert_array_equal(detections.mask, np.asarray(found.masks))
    np.testing.assert_allclose(detections.xyxy, found.boxes.numpy())
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert detections.class_id.tolist() == [0, 1, 0]
    assert detections["class_name"].tolist() == ["a", "b", "a"]
    assert detections.area.tolist() == [mask.sum() for mask in found.masks]
    assert len(detections[detections.confidence > 0.5]) == 2
    assert len(found[:0].to_supervision()) == 0


def test_without_supervision_there_is_one_line(
    found: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(InputError, match=r"pip install 'brefine\[supervision\]'"):
        found.to_supervision()


def test_public_name(tiny_model: Path) -> None:
    assert brefine.Result is Result
    assert isinstance(Predictor.load(tiny_model, "cpu")(picture()), brefine.Result)
    assert isinstance(Masks([], (3, 4)), Masks)


def test_any_number_gives_one_object_and_bytes_are_numbers():
    result = predictor()(picture(), threshold=0.0)
    assert len(result)
    for index in (torch.tensor(0), np.array(0), np.uint8(0)):
        assert isinstance(result[index], Object)
    assert len(result[np.zeros(2, np.uint8)]) == 2
    assert len(result[np.zeros(len(result), bool)]) == 0
    with pytest.raises(IndexError, match="a list of numbers"):
        result[torch.zeros(1, 1, dtype=torch.int64)]


def test_a_result_keeps_the_picture_that_was_predicted():
    frame = np.full((60, 80, 3), 90, np.uint8)
    result = predictor()(frame)
    frame[:] = 0
    assert torch.as_tensor(result.picture).float().mean() == 90
