"""Previews: every class shown, a page that stands alone, pictures as training sees them."""

import base64
import io
import json
import re
import weakref
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from brefine import cli
from brefine.data import loader
from brefine.data.coco import CocoSet
from brefine.data.preview import DRAWS, NARROWEST, choose, preview
from brefine.draw import colour
from brefine.recipe import DataRecipe
from brefine.structures import InputError

VOID = {"meta", "br", "image", "path"}  # without an end tag, or closed in themselves


class Page(HTMLParser):
    """What the tests ask of a page: text, attributes, and that its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.titles, self.addresses = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.titles.append(data)

    def pictures(self):
        for address in self.addresses:
            yield Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1])))


def make(folder, pictures, classes, crowd=()):
    """A set with one square for each label; ``pictures`` are (name, labels)."""
    (folder / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 4 * i, "name": name} for i, name in enumerate(classes)]
    random = np.random.default_rng(0)
    for i, (name, labels) in enumerate(pictures):
        pixels = np.kron(random.integers(0, 255, (6, 8, 3)), np.ones((16, 16, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
        entry = {"id": 50 + i, "file_name": name, "height": 96, "width": 128}
        content["images"].append(entry)
        for k, label in enumerate(labels):
            x, y = 5 + 25 * (k % 4), 5 + 25 * (k // 4)
            square = [x, y, x + 20, y, x + 20, y + 20, x, y + 20]
            number = 700 + len(content["annotations"])
            content["annotations"].append(
                {
                    "id": number,
                    "image_id": 50 + i,
                    "category_id": 4 * label,
                    "segmentation": [square],
                    "iscrowd": int(number in crowd),
                }
            )
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(0, 99),
)
def test_choice_covers_the_classes(labels, count, seed):
    box = [1, 1, 5, 1, 5, 5, 1, 5]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 9, "width": 9} for i in range(len(labels))
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": label, "segmentation": [box]}
            for i, found in enumerate(labels)
            for label in found
        ],
        "categories": [{"id": i, "name": str(i)} for i in range(6)],
    }
    dataset = CocoSet.from_dict(content, Path("x.json"), Path())
    chosen = choose(dataset, count, seed)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, len(labels))
    shown = {label for index in chosen for label in labels[index]}
    every = {label for found in labels for label in found}
    assert len(shown) >= min(len(every), len(chosen))
    assert choose(dataset, count, seed) == chosen


def test_the_seed_chooses_between_pictures_that_are_alike(toy_set):
    dataset = CocoSet(toy_set / "train.json")
    assert len({tuple(choose(dataset, 1, seed)) for seed in range(20)}) > 1


def test_page_and_grid(toy_set, tmp_path):
    out = tmp_path / "out"
    preview(toy_set / "train.json", out, count=3, recipe=DataRecipe(short_side=(96,)))
    assert {p.name for p in out.iterdir()} == {"preview.html", "preview.png"}
    text = (out / "preview.html").read_text()
    found = Page(text)
    # self-contained: no script, and nothing that would be fetched
    assert "script" not in found.tags
    assert all(address.startswith("data:image/") for address in found.addresses)
    assert not re.search(r"url\(|@import|https?:", text)
    assert len(list(found.pictures())) == 3 * (1 + DRAWS)

    content = json.loads((toy_set / "train.json").read_text())
    shown = [entry for entry in content["images"] if entry["file_name"] in text]
    assert len(shown) == 3
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    expected = {
        f"annotation {entry['id']}: {names[entry['category_id']]}"
        for entry in content["annotations"]
        if entry["image_id"] in {picture["id"] for picture in shown}
    }
    assert set(found.titles[1:]) == expected
    used = {label.split(": ")[1] for label in expected}
    legend = {name for name in names.values() if f"</i>{name}</span>" in text}
    assert legend == used

    with Image.open(out / "preview.png") as grid:
        seen = {value for _, value in grid.convert("RGB").getcolors(2**24)}
    assert {colour(i) for i, name in enumerate(names.values()) if name in used} <= seen


@pytest.mark.parametrize("flip", [0, 1])
def test_what_is_drawn_is_what_training_sees(tmp_path, flip):
    start = make(tmp_path / "s", [("a.png", [0, 1, 1])], ["x", "y"])
    recipe = DataRecipe(short_side=(96,), long_side=128, flip=flip)
    preview(start, tmp_path / "out", recipe=recipe)
    text = (tmp_path / "out" / "preview.html").read_text()
    plain, *drawn = [np.asarray(p.convert("RGB"), float) for p in Page(text).pictures()]
    assert plain.shape == (96, 128, 3)
    # Names are written upright either way, above the objects: compare below them.
    rows = slice(30, 96)
    for picture in drawn:
        same = np.abs(picture[rows] - plain[rows]).mean()
        mirrored = np.abs(picture[rows] - plain[rows, ::-1]).mean()
        assert (mirrored if flip else same) < 3 < 20 < (same if flip else mirrored)
    assert f"<dt>flip</dt><dd>{float(flip)}</dd>" in text


def test_crowd_regions_odd_names_and_empty_pictures(tmp_path):
    start = make(
        tmp_path / "s", [("a&b.png", [0, 0, 1]), ("c.png", [])], ["<b>x", "y"], crowd={701}
    )
    preview(start, tmp_path / "out")
    text = (tmp_path / "out" / "preview.html").read_text()
    found = Page(text)
    assert "b" not in found.tags
    assert "a&amp;b.png" in text
    assert "crowd region 701: <b>x" in found.titles
    assert "annotation 700: <b>x" in found.titles
    assert text.count('class="crowd"') == 1
    assert "1 &lt;b&gt;x, 1 y, 1 crowd region<" in text
    assert "no objects" in text


def test_classes_without_room_are_named(tmp_path):
    start = make(tmp_path / "s", [("a.png", [0]), ("b.png", [1])], ["x", "y", "z"])
    preview(start, tmp_path / "out", count=1)
    text = (tmp_path / "out" / "preview.html").read_text()
    assert "1 of 2 pictures and 1 of 3 classes" in text
    hidden = "y" if "a.png" in text else "x"
    assert f"Not shown: {hidden};" in text


def test_command(toy_set, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": {"method": "mask_rcnn"},
        "data": {"short_side": 77},
        "train": {"steps": 1, "lr": 1},
    }
    Path("r.yaml").write_text(json.dumps(recipe))
    arguments = ["data", "preview", str(toy_set / "val.json"), "--count", "2", "--recipe", "r.yaml"]
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (0, "preview/preview.html\n"), err
    assert "epoch 1, 77 x 103" in Path("preview/preview.html").read_text()
    assert cli.main(arguments) == 2  # nothing is overwritten
    assert capsys.readouterr().err == (
        "error: preview: is there already: give a new folder or remove it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json: no such"),
        (["s/labels.json", "--count", "0"], "--count"),
        (["s/labels.json", "--recipe", "none.yaml"], "none.yaml: no such recipe"),
        (["s/labels.json", "--out", "s"], "s: is there already"),
        (["gone/labels.json"], "a.png: no such picture"),
        (["empty.json"], "empty.json: has no pictures to show"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    make(Path("s"), [("a.png", [0])], ["x"])
    make(Path("gone"), [("a.png", [0])], ["x"])
    Path("gone/images/a.png").unlink()
    Path("empty.json").write_text('{"images": [], "annotations": [], "categories": []}')
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    code = cli.main(["data", "preview", *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


def test_a_broken_picture_leaves_nothing(tmp_path):
    start = make(tmp_path / "s", [("a.png", [0])], ["x"])
    (tmp_path / "s/images/a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png: no picture"):
        preview(start, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"s"}


def test_the_smallest_object_can_be_pointed_at(tmp_path):
    def square(x, side):
        return [[x, x, x + side, x, x + side, x + side, x, x + side]]

    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 200)).save(tmp_path / "images/a.png")
    sizes = [(70, 40), (20, 150), (80, 10), (10, 190)]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 200, "width": 200}],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": 1,
                "segmentation": square(*s),
                "iscrowd": i // 3,
            }
            for i, s in enumerate(sizes)
        ],
        "categories": [{"id": 1, "name": "x"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    preview(tmp_path / "a.json", tmp_path / "out")
    titles = re.findall("<path.*?<title>(.*?):", (tmp_path / "out/preview.html").read_text())
    assert [title.split()[-1] for title in titles] == ["3", "1", "0", "2"]  # the last is on top


def test_titles_stay_in_their_cells(tmp_path):
    """Narrow pictures with long names, and augmented ones of another shape."""
    name = "IMG_20230412_103450_HDR_rotated_and_more.png"
    file = make(tmp_path / "set", [(name, [0])], ["a"])
    with Image.open(tmp_path / "set/images" / name) as picture:
        picture.resize((16, 96)).save(tmp_path / "set/images" / name)
    content = json.loads(file.read_text())
    content["images"][0]["width"] = 16
    file.write_text(json.dumps(content))
    preview(file, tmp_path / "out", recipe=DataRecipe(short_side=(64,), crop=64))
    with Image.open(tmp_path / "out/preview.png") as grid:
        pixels = np.array(grid.convert("L"))
    ends = [8 + k * (NARROWEST + 8) + NARROWEST for k in range(3)]
    assert all((pixels[:20, end : end + 8] == 255).all() for end in ends)  # between the titles
    assert (pixels[:20] < 128).any()


def test_pictures_are_drawn_one_by_one(toy_set, tmp_path, monkeypatch):
    """Large ones would fill the memory."""
    held, most = [], []
    read = loader.TrainSet.__getitem__

    def follow(self, place):
        held[:] = [each for each in held if each() is not None]
        most.append(len(held))
        pixels, target = read(self, place)
        held.append(weakref.ref(pixels))
        return pixels, target

    monkeypatch.setattr(loader.TrainSet, "__getitem__", follow)
    preview(toy_set / "train.json", tmp_path / "out", count=4)
    assert len(most) == 4 * DRAWS
    assert max(most) < DRAWS + 1
