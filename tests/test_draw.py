import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image

from brefine import draw
from brefine.evaluate import evaluate_records
from brefine.metrics.boundary import boundary_band
from brefine.metrics.profile import cut
from brefine.structures import Bitmaps, Category, InputError, Instances
from samples import blob, dense_rle, random_records, random_set

NAMES = [Category(3, "star"), Category(8, "gear")]


def record(mask, category=3, score=0.5):
    rle = dense_rle(mask)
    return {"image_id": 1, "category_id": category, "score": score, "segmentation": rle}


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def square(size, y, x, side):
    mask = np.zeros(size, dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


# --- overlays ------------------------------------------------------------------------------------


def test_overlay_colours_masks_and_nothing_else():
    picture = noise(80, 100)
    before = picture.clone()
    low, high = square((80, 100), 10, 10, 40), square((80, 100), 30, 30, 40)
    records = [record(high, 8, 0.9), record(low, 3, 0.4)]
    image = draw.overlay(picture, records, NAMES, names=False)
    assert torch.equal(picture, before)
    pixels, plain = np.array(image), before.permute(1, 2, 0).numpy()
    outside = ~(low | high)
    np.testing.assert_array_equal(pixels[outside], plain[outside])
    gray = plain @ np.array([0.299, 0.587, 0.114])
    # Where they overlap the better score lies on top, and the other shines through.
    for mask, label in ((low & ~high, 0), (high & ~low, 1)):
        whole = high if label else low
        edge = boundary_band(whole.astype(np.uint8), 1).astype(bool) & mask
        inner = mask & ~edge
        wanted = gray[inner][:, None] * 0.5 + np.array(draw.COLOURS[label]) * 0.5
        np.testing.assert_allclose(pixels[inner], wanted, atol=0.51)
        outline = np.array(draw.COLOURS[label]) * 0.4 + 255 * 0.6
        np.testing.assert_allclose(pixels[edge], np.broadcast_to(outline, (edge.sum(), 3)), atol=1)


def test_the_better_score_lies_on_top():
    size = (40, 40)
    black = torch.zeros(3, *size, dtype=torch.uint8)
    masks = square(size, 5, 5, 20), square(size, 10, 10, 20)
    for scores in ((0.9, 0.5), (0.5, 0.9)):
        records = [record(m, c.id, s) for m, c, s in zip(masks, NAMES, scores, strict=True)]
        pixels = np.array(draw.overlay(black, records, NAMES, names=False)).astype(int)
        top = np.array(draw.COLOURS[int(np.argmax(scores))])
        under = np.array(draw.COLOURS[int(np.argmin(scores))])
        assert np.abs(pixels[18, 18] - top).sum() < np.abs(pixels[18, 18] - under).sum()


def test_overlay_of_instances_is_that_of_their_records():
    masks = torch.stack([torch.as_tensor(square((80, 100), 5 * i, 8 * i, 30)) for i in range(3)])
    bitmaps = Bitmaps.of(masks)
    labels = torch.tensor([0, 1, 1])
    instances = Instances((80, 100), bitmaps.boxes(), labels, masks=bitmaps)
    picture = noise(80, 100)
    records = [
        record(mask, NAMES[label].id, 1.0)
        for mask, label in zip(masks.numpy(), labels.tolist(), strict=True)
    ]
    one, other = (draw.overlay(picture, objects, NAMES) for objects in (instances, records))
    np.testing.assert_array_equal(np.array(one), np.array(other))
    assert not np.array_equal(np.array(one), np.array(draw.overlay(picture, records[:2], NAMES)))


def test_objects_of_a_single_class_have_colours_of_their_own():
    size = (40, 60)
    records = [record(square(size, 5, 5 + 12 * i, 9)) for i in range(4)]
    pixels = np.array(draw.overlay(torch.zeros(3, *size, dtype=torch.uint8), records, NAMES[:1]))
    assert len({tuple(pixels[9, 9 + 12 * i]) for i in range(4)}) == 4
    pixels = np.array(draw.overlay(torch.zeros(3, *size, dtype=torch.uint8), records, NAMES))
    assert len({tuple(pixels[9, 9 + 12 * i]) for i in range(4)}) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2), (64, 64), (70, 2000)])
def test_overlay_of_pictures_of_any_size(size):
    long = [Category(3, "a very long name indeed " * 5), Category(8, "Ωψ名")]
    records = [record(np.ones(size), 3), record(square(size, 0, 0, 1), 8)]
    records.append(record(np.zeros(size), 8))
    image = draw.overlay(noise(*size), records, long)
    assert image.size == size[::-1]
    assert image.mode == "RGB"
    plain = noise(*size)
    np.testing.assert_array_equal(
        np.array(draw.overlay(plain, [], long)), plain.permute(1, 2, 0).numpy()
    )


@pytest.mark.parametrize("corner", [(0, 0), (0, 190), (140, 0), (140, 190), (70, 100)])
def test_names_are_inside_the_picture_and_readable(corner):
    size = (150, 200)
    dark = torch.zeros(3, *size, dtype=torch.uint8)
    records = [record(square(size, *corner, 10))]
    bare = np.array(draw.overlay(dark, records, NAMES, names=False)).astype(int)
    named = np.array(draw.overlay(dark, records, NAMES)).astype(int)
    rows, columns = np.nonzero((bare != named).any(2))
    assert len(rows) > 200  # a plate of about 12 by 45 pixels
    assert columns.max() - columns.min() >= 40
    plate = named[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (plate == draw.COLOURS[0]).all(2).mean() > 0.4
    assert (plate.max(2) < 60).sum() > 20  # letters, black on orange


def test_overlay_names_what_does_not_fit():
    picture = noise(20, 30)
    with pytest.raises(InputError, match="category_id 5"):
        draw.overlay(picture, [record(np.ones((20, 30)), 5)], NAMES)
    with pytest.raises(InputError, match="record 1"):
        draw.overlay(picture, [record(np.ones((20, 30))), record(np.ones((30, 20)))], NAMES)


def test_first_hundred_colours_differ():
    colours = np.array([draw.colour(i) for i in range(100)])
    assert len(np.unique(colours, axis=0)) == 100
    assert colours.min() >= 0
    assert colours.max() <= 255
    near = np.abs(np.diff(colours, axis=0)).sum(1)
    assert near.min() > 60  # neighbours in the table are told apart


def test_side_by_side_keeps_shapes():
    pictures = [Image.new("RGB", size, shade) for size, shade in (((60, 40), "red"), ((30, 80), 9))]
    row = draw.side_by_side(pictures, gap=4)
    assert row.size == (4 + 60 + 4 + 15 + 4, 48)
    assert row.getpixel((5, 5)) == (255, 0, 0)
    assert row.getpixel((2, 2)) == (255, 255, 255)
    titled = draw.side_by_side(pictures, ["one", "two"], gap=4)
    assert titled.height > row.height
    assert np.array(titled)[4:20].min() < 100  # letters
    with pytest.raises(InputError, match="1 titles for 2"):
        draw.side_by_side(pictures, ["one"])
    with pytest.raises(InputError, match="no pictures"):
        draw.side_by_side([])


# --- zooms ---------------------------------------------------------------------------------------

masks_of_bool = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


@settings(deadline=None, max_examples=80)
@given(masks_of_bool)
def test_outline_is_every_edge_between_in_and_out(mask):
    edges = set()
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", draw.outline(mask)):
        for step in range(int(length)):
            edge = (int(x) + step, int(y), "h") if way == "h" else (int(x), int(y) + step, "v")
            assert edge not in edges
            edges.add(edge)
    height, width = mask.shape
    expected = {
        (x, y, "h") for y in range(1, height) for x in range(width) if mask[y, x] != mask[y - 1, x]
    } | {
        (x, y, "v") for y in range(height) for x in range(1, width) if mask[y, x] != mask[y, x - 1]
    }
    assert edges == expected


@settings(deadline=None, max_examples=80)
@given(masks_of_bool)
def test_squares_fill_the_mask(mask):
    filled = np.zeros_like(mask)
    for x, y, length, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", draw._squares(mask)):
        assert length == back
        filled[int(y), int(x) : int(x) + int(length)] = True
    np.testing.assert_array_equal(filled, mask)


@pytest.mark.parametrize("seed", range(12))
def test_crops_lie_in_the_picture_and_on_the_outline(seed):
    random = np.random.default_rng(seed)
    size = tuple(random.integers(15, 250, 2).tolist())
    mask = blob(random, size)
    bitmap = Bitmaps.of(torch.as_tensor(mask[None]))
    shape = bitmap.windows[0].numpy(), tuple(bitmap.origins[0].tolist())
    x, y, side = draw._choose_crop(shape, size)
    assert 0 <= x <= size[1] - side
    assert 0 <= y <= size[0] - side
    assert 1 <= side <= 80
    part = mask[y : y + side, x : x + side]
    np.testing.assert_array_equal(cut(shape, (x, y, x + side, y + side)), part)
    if not mask.all():
        assert part.any()
        assert not part.all()


def test_crop_shows_the_spike_and_not_the_pictures_border():
    size = (300, 400)
    mask = square(size, 0, 0, 200)  # two of its sides lie on the picture's border
    for i in range(40):
        mask[60 + i // 2 : 100 - i // 2, 199 + i] = True  # a spike to the right
    bitmap = Bitmaps.of(torch.as_tensor(mask[None]))
    x, y, side = draw._choose_crop((bitmap.windows[0].numpy(), (0, 0)), size)
    assert x <= 237 < x + side
    assert y <= 80 < y + side


@pytest.mark.parametrize("axis", [0, 1])
def test_crop_shows_the_only_outline_that_is_not_the_pictures_border(axis):
    size = (300, 400)
    mask = np.zeros(size, np.uint8)
    mask[(slice(None),) * axis + (slice(0, 200),)] = 1
    x, y, side = draw._choose_crop((mask[mask.any(1)][:, mask.any(0)], (0, 0)), size)
    assert (y, x)[axis] < 199 < (y, x)[axis] + side


# --- the page ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are balanced and keeps what a browser would fetch."""

    VOID = frozenset(("meta", "link", "img", "br", "image", "rect", "path"))

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.tags = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("href", "src", "data", "action")]

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def demo_page(path, methods=("Mask R-CNN", "B & <Refine>")):
    dataset = random_set(11, pictures=4, objects=4, crowds=False)
    names = [Category(c.id, f"<{c.name}>") for c in dataset.categories]
    rows, records = {}, {}
    for i, name in enumerate(methods):
        records[name] = random_records(dataset, i, stray=0, copies=4)
        rows[name] = evaluate_records(records[name], dataset)
    panels = []
    for index, picture in enumerate(dataset.pictures):
        true = [record(m, names[label].id, 1.0) for i, label, m, _ in dataset.objects if i == index]
        found = {n: [r for r in records[n] if r["image_id"] == picture.id] for n in methods}
        panels.append(draw.Panel(f"<{index}>.png", noise(*picture.size), true, found))
    draw.report(path, "A & <b>title", rows, panels, names, settings={"k<y": "v&l"}, intro="x < y")
    return rows, panels


def test_report_is_one_file_that_fetches_nothing(tmp_path):
    path = tmp_path / "deep" / "report.html"
    rows, panels = demo_page(path)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "url(" not in text
    assert len(page.links) >= 4 * len(panels) + 4  # pictures, and zooms of one object at least
    for link in page.links:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", link).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format.lower() == kind
            image.load()
    for words in ("A & <b>title", "x < y", "k<y", "v&l", "B & <Refine>", "<class 1>", "<0>.png"):
        assert words in page.text
    assert "<b>" not in text
    for report in rows.values():
        assert f"{100 * report.values['mask/AP']:.1f}" in page.text
    assert "nan" not in page.text


def test_zooms_are_exact_and_show_every_method(tmp_path):
    path = tmp_path / "report.html"
    size = (100, 120)
    true = square(size, 20, 30, 60)
    found = {"one": square(size, 20, 30, 60), "two": square(size, 20, 32, 60)}
    picture = noise(*size)
    wrong = record(true, 8, 0.99)  # of another class: not the object's match
    panel = draw.Panel(
        "p", picture, [record(true)], {n: [wrong, record(m)] for n, m in found.items()}
    )
    draw.report(path, "t", {}, [panel], NAMES)
    text = path.read_text()
    assert "IoU 100.0, boundary 100.0" in text
    both, union = 58 * 60, 62 * 60
    assert f"IoU {100 * both / union:.1f}, boundary" in text
    crops = re.findall(r'class="raw" href="data:image/png;base64,([^"]*)"', text)
    assert len(crops) == 4
    assert len(set(crops)) == 1
    box = re.search(r'<rect x="(\d+)" y="(\d+)" width="(\d+)"', text)
    x, y, side = map(int, box.groups())
    with Image.open(io.BytesIO(base64.b64decode(crops[0]))) as image:
        np.testing.assert_array_equal(
            np.array(image), picture.permute(1, 2, 0).numpy()[y : y + side, x : x + side]
        )


def test_report_without_pictures_objects_or_detections(tmp_path):
    path = tmp_path / "report.html"
    draw.report(path, "t", {}, [], NAMES)
    Page(path.read_text())
    size = (50, 70)
    true = [record(square(size, 5, 5, 30))]
    panels = [
        draw.Panel("nothing", noise(*size), [], {"one": [], "two": []}),
        draw.Panel("missed", noise(*size), true, {"one": [], "two": true}),
        draw.Panel("no methods", noise(*size), true, {}),
        draw.Panel("invented", noise(1, 1), [], {"one": [record(np.ones((1, 1)))]}),
    ]
    draw.report(path, "t", {}, panels, NAMES)
    page = Page(path.read_text())
    assert "invented" in page.text
    assert "IoU" not in page.text.replace("IoU of the whole", "")


def test_an_old_report_stays_when_the_new_one_fails(tmp_path):
    path = tmp_path / "report.html"
    draw.report(path, "old", {}, [], NAMES)
    panel = draw.Panel("p", noise(9, 9), [record(np.ones((5, 5)))], {})
    with pytest.raises(InputError, match="record 0"):
        draw.report(path, "new", {}, [panel], NAMES)
    assert "old" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_one_class_needs_no_name_but_keeps_its_scores():
    picture, mask = noise(100, 120), square((100, 120), 40, 30, 30)
    sure, unsure = [record(mask, score=1.0)], [record(mask, score=0.7)]
    bare = draw.overlay(picture, sure, NAMES[:1], names=False)
    assert draw.overlay(picture, sure, NAMES[:1]) == bare
    assert draw.overlay(picture, unsure, NAMES[:1]) != bare
    assert draw.overlay(picture, sure, NAMES) != draw.overlay(picture, sure, NAMES, names=False)


@pytest.mark.parametrize("fonts", [draw.FONTS, ()])
def test_letters_of_other_languages(monkeypatch, fonts):
    monkeypatch.setattr(draw, "FONTS", fonts)
    draw._font.cache_clear()
    for text in ("plain ASCII 7 %", "Käfer", "Straße 5 µm", "ядро", "\U000e0041x"):
        shown, font = draw.lettering(text, 13)
        box = bytes(font.getmask("\uffff"))
        assert len(shown) == len(text)
        assert all(bytes(font.getmask(each)) != box for each in shown)
        assert shown == text if text.isascii() else shown
    assert draw.lettering("Käfer", 13)[0] in ("Käfer", "Kafer")
    if not fonts:
        assert draw.lettering("ядро", 13)[0] == "????"
    draw._font.cache_clear()
