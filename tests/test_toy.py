import hashlib
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from brefine.data import toy
from brefine.data.coco import CocoSet
from brefine.data.loader import read_labelled
from brefine.structures import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys") / "toy"
    toy.draw(folder, train=24, val=6, progress=False)
    return folder


def digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def objects(dataset):
    """(picture number, label, mask [H, W]) of every object."""
    for index in range(len(dataset)):
        target = dataset.target(index)
        masks = target.masks.dense(target.size).numpy()
        yield from zip([index] * len(target), target.labels.tolist(), masks, strict=True)


def test_an_ordinary_coco_set(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["images", "train.json", "val.json"]
    for name, count in (("train", 24), ("val", 6)):
        dataset = CocoSet(folder / f"{name}.json")
        assert dataset.skipped == []
        assert dataset.usable() == list(range(count))
        assert len(dataset.categories) >= 4
        ids = [category.id for category in dataset.categories]
        assert ids != list(range(ids[0], ids[0] + len(ids)))  # with gaps
        for index in range(count):
            pixels = read_labelled(dataset, index)
            assert pixels.shape == (3, 256, 320)
            assert 2 <= len(dataset.target(index)) <= 7
            for entry in dataset.annotations(index):
                assert isinstance(entry["segmentation"]["counts"], str)
                assert entry["iscrowd"] == 0
        values = json.loads((folder / f"{name}.json").read_text())
        assert len({entry["id"] for entry in values["annotations"]}) == len(values["annotations"])
    assert len(list((folder / "images").iterdir())) == 30


def test_area_and_box_are_those_of_the_mask(folder):
    dataset = CocoSet(folder / "train.json")
    for index in range(len(dataset)):
        target = dataset.target(index)
        for entry, window, box in zip(
            dataset.annotations(index), target.masks.windows, target.masks.boxes(), strict=True
        ):
            x, y, w, h = entry["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()
            assert entry["area"] == int(window.sum())


def test_no_pixel_belongs_to_two_objects_and_none_is_nearly_hidden(folder):
    dataset = CocoSet(folder / "train.json")
    for index in range(len(dataset)):
        target = dataset.target(index)
        dense = target.masks.dense(target.size)
        assert dense.sum(0).max() == 1
        assert dense.flatten(1).sum(1).min() >= toy.MIN_PIXELS


def test_small_to_large_every_class_holes_and_overlaps(folder):
    dataset = CocoSet(folder / "train.json")
    found = list(objects(dataset))
    assert {label for _, label, _ in found} == set(range(len(dataset.categories)))
    boxes = torch.cat([dataset.target(index).boxes for index in range(len(dataset))])
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    assert sides.min() < 32
    assert sides.max() > 180
    assert 0.2 < (sides > 112).float().mean() < 0.7

    def has_hole(mask):
        # Background that cannot be reached from outside, walking over background pixels.
        outside = np.zeros(np.array(mask.shape) + 2, bool)
        outside[0] = True
        free = ~np.pad(mask.astype(bool), 1)
        while True:
            grown = outside.copy()
            grown[1:] |= outside[:-1]
            grown[:-1] |= outside[1:]
            grown[:, 1:] |= outside[:, :-1]
            grown[:, :-1] |= outside[:, 1:]
            grown &= free
            if (grown == outside).all():
                return bool((free & ~outside).sum() > 8)
            outside = grown

    gear = [category.name for category in dataset.categories].index("gear")
    gears = [mask for _, label, mask in found if label == gear and mask.sum() > 1000]
    assert len(gears) >= 5
    assert sum(has_hole(mask[::2, ::2]) for mask in gears) >= 0.4 * len(gears)
    touching = sum(
        bool((mask[:, :-1] & other[:, 1:]).any())
        for number, (index, _, mask) in enumerate(found)
        for place, _, other in found[:number]
        if place == index
    )
    assert touching >= 5


def test_the_label_is_where_the_object_is(folder):
    # Colours change at the outline: across it more than along a copy moved by 4 pixels.
    dataset = CocoSet(folder / "train.json")
    at_outline, beside = [], []
    for index, _, mask in objects(dataset):
        grey = read_labelled(dataset, index).float().mean(0).numpy()
        step = np.abs(np.diff(grey, axis=1))
        edge = mask[:, 1:] != mask[:, :-1]
        if edge[:, :-4].sum() > 20:
            at_outline.append(step[edge].mean())
            beside.append(np.median(step[:, 4:][edge[:, :-4]]))
    assert len(at_outline) > 40
    assert np.mean(np.array(at_outline) > 2 * np.array(beside)) > 0.8


def test_objects_stand_out_but_colour_does_not_give_the_class_away(folder):
    dataset = CocoSet(folder / "train.json")
    contrast, colours = [], [[] for _ in dataset.categories]
    for index, label, mask in objects(dataset):
        pixels = read_labelled(dataset, index).float().numpy()
        inside = pixels[:, mask > 0].mean(1)
        around = np.asarray(
            Image.fromarray(mask * np.uint8(255))
            .resize((40, 32), Image.Resampling.BOX)
            .resize((320, 256))
        )
        near = (around > 0) & (mask == 0)
        if near.sum() > 50:
            contrast.append(np.abs(inside - pixels[:, near].mean(1)).max())
        colours[label].append(inside)
    assert np.median(contrast) > 40
    spread = np.mean([np.std(kind, axis=0).mean() for kind in colours])
    between = np.std([np.mean(kind, axis=0) for kind in colours], axis=0).mean()
    assert between < 0.6 * spread


def test_same_seed_same_bytes_and_counts_change_nothing_else(folder, tmp_path):
    toy.draw(tmp_path / "again", train=5, val=6, progress=False)
    again, all_files = digests(tmp_path / "again"), digests(folder)
    assert again["val.json"] == all_files["val.json"]
    pictures = {name: digest for name, digest in again.items() if name.endswith(".png")}
    assert len(pictures) == 11
    assert pictures.items() <= all_files.items()
    assert len(set(all_files.values())) == 32  # no picture twice, train and val included
    train = json.loads((folder / "train.json").read_text())
    fewer = json.loads((tmp_path / "again" / "train.json").read_text())
    assert fewer["annotations"] == train["annotations"][: len(fewer["annotations"])]

    toy.draw(tmp_path / "other", train=1, val=1, seed=1, progress=False)
    other = digests(tmp_path / "other")
    assert not set(other.values()) & set(all_files.values())


@pytest.mark.parametrize("size", [(64, 64), (80, 200), (400, 130)])
def test_other_sizes(tmp_path, size):
    toy.draw(tmp_path / "toy", train=8, val=0, size=size, progress=False)
    dataset = CocoSet(tmp_path / "toy" / "train.json")
    assert len(CocoSet(tmp_path / "toy" / "val.json")) == 0
    for index in range(8):
        assert read_labelled(dataset, index).shape == (3, *size)
        assert len(dataset.target(index)) >= 1


def test_an_existing_folder_is_left_alone(folder, tmp_path):
    before = digests(folder)
    with pytest.raises(InputError, match="is there already: give a new folder or remove it"):
        toy.draw(folder, train=1, val=1, progress=False)
    assert digests(folder) == before
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="is there already"):
        toy.draw(tmp_path / "file", train=1, val=1, progress=False)
    assert (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    toy.draw(tmp_path / "empty", train=1, val=1, progress=False)
    assert len(list((tmp_path / "empty" / "images").iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize(
    "wrong", [{"size": (63, 100)}, {"size": (100, 5000)}, {"train": -1}, {"val": -1}, {"seed": -1}]
)
def test_impossible_arguments(tmp_path, wrong):
    with pytest.raises(InputError, match="expected"):
        toy.draw(tmp_path / "toy", progress=False, **wrong)
    assert not (tmp_path / "toy").exists()


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "draw_picture", stop)
    with pytest.raises(KeyboardInterrupt):
        toy.draw(tmp_path / "toy", train=1, val=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_stderr_and_only_if_asked(tmp_path, capfd):
    toy.draw(tmp_path / "a", train=2, val=1)
    shown = capfd.readouterr()
    assert "3/3" in shown.err
    assert shown.out == ""
    toy.draw(tmp_path / "b", train=2, val=1, progress=False)
    assert capfd.readouterr().err == ""


def test_drawing_is_quick():
    start = time.process_time()
    for number in range(6):
        toy.draw_picture((256, 320), np.random.default_rng(number))
    assert (time.process_time() - start) / 6 < 0.2  # about 0.04 s
