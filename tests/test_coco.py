import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from brefine import rle
from brefine.data.coco import CocoSet, find_folder
from brefine.data.pictures import MAX_PIXELS
from brefine.data.read import read
from brefine.data.transforms import resize
from brefine.rle import decode
from brefine.structures import Category, InputError

SIZE = (37, 53)
SQUARE = [10.0, 8.0, 30.0, 8.0, 30.0, 28.0, 10.0, 28.0]


def content(**changes):
    """A small valid set: two pictures, three objects, one crowd region."""
    rle = coco_mask.encode(np.asfortranarray(ring()))
    base = {
        "images": [
            {"id": 5, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]},
            {"id": 2, "file_name": "sub/b.png", "height": SIZE[0], "width": SIZE[1]},
            {"id": 9, "file_name": "c.png", "height": 20, "width": 10},
        ],
        "categories": [{"id": 20, "name": "leaf"}, {"id": 3, "name": "star"}],
        "annotations": [
            note(0, segmentation=[SQUARE], bbox=[10, 8, 20, 20], area=400.5),
            note(1, category_id=20, segmentation={**rle, "counts": rle["counts"].decode()}),
            note(
                2,
                image_id=2,
                segmentation={"size": list(SIZE), "counts": [0, SIZE[0] * 3, SIZE[0] * 50]},
            ),
            note(3, iscrowd=1, segmentation={"size": list(SIZE), "counts": [SIZE[0] * 52, 37]}),
        ],
    }
    return {**base, **changes}


def note(number, **changes):
    return {"id": number, "image_id": 5, "category_id": 3, "segmentation": [SQUARE], **changes}


def ring():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot(y - 17, x - 25)
    return ((distance < 14) & (distance > 6)).astype(np.uint8)


def write(folder, values):
    path = Path(folder) / "set.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def with_note(**changes):
    return content(annotations=[note(1), note(77, **changes)])


# ------------------------------------------------------------------------------- what it reads


def test_table_pictures_and_targets(tmp_path):
    (tmp_path / "images").mkdir()
    dataset = CocoSet(write(tmp_path, content()))
    assert dataset.categories == [Category(3, "star"), Category(20, "leaf")]
    assert [picture.id for picture in dataset.pictures] == [5, 2, 9]
    assert dataset.pictures[1].file == tmp_path / "images" / "sub" / "b.png"
    assert dataset.pictures[2].size == (20, 10)
    assert dataset.skipped == []
    assert len(dataset) == 3
    assert dataset.usable() == [0, 1]
    assert [entry["id"] for entry in dataset.annotations(0)] == [0, 1, 3]  # the crowd too

    target = dataset.target(0)
    assert target.size == SIZE
    assert target.labels.tolist() == [0, 1]
    assert target.boxes.dtype == torch.float32
    assert target.boxes[0].tolist() == [10, 8, 30, 28]
    dense = target.masks.dense(SIZE).numpy()
    assert np.array_equal(dense[1], ring())
    assert target.masks.windows[1].shape == (27, 27)  # its box, not the picture
    assert target.boxes[1].tolist() == [12, 4, 39, 31]  # without bbox: the mask's own
    assert dataset.target(1).boxes.tolist() == [[0, 0, 3, 37]]
    empty = dataset.target(2)
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert empty.masks.origins.shape == (0, 2)


def test_where_pictures_are_looked_for(tmp_path):
    path = write(tmp_path, content())
    assert CocoSet(path).pictures[0].file == tmp_path / "a.png"
    other = tmp_path / "other"
    other.mkdir()
    assert CocoSet(str(path), str(other)).pictures[0].file == other / "a.png"
    with pytest.raises(InputError, match="nowhere: no such folder"):
        CocoSet(path, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "folder"),
    [
        ([], "images"),
        (["a.png"], "."),  # beside the json, where `images` holds something else
        (["images/a.png", "a.png"], "images"),
        (["c.png", "images/sub/b.png"], "images"),  # one of the first is enough
    ],
)
def test_the_first_pictures_say_which_folder_it_is(tmp_path, files, folder):
    (tmp_path / "images/sub").mkdir(parents=True)
    for file in files:
        (tmp_path / file).touch()
    path = write(tmp_path, content())
    for dataset in (CocoSet(path), read(path)):
        assert dataset.folder == tmp_path / folder
        assert [p.file for p in dataset.pictures] == [
            tmp_path / folder / name for name in ("a.png", "sub/b.png", "c.png")
        ]


def test_names_may_begin_with_the_folder_of_the_pictures(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    entry = {"id": 5, "file_name": "images/a.png", "height": SIZE[0], "width": SIZE[1]}
    path = write(tmp_path, content(images=[entry], annotations=[]))
    assert read(path).pictures[0].file == tmp_path / "images/a.png"


@pytest.mark.parametrize("name", ["x\0y.png", "n" * 5000, "", "/"])
def test_names_that_no_file_can_have_leave_the_folder_images(tmp_path, name):
    (tmp_path / "images").mkdir()
    assert find_folder(tmp_path / "set.json", None, [name]) == tmp_path / "images"


def test_ground_truth_is_what_cocoeval_reads(tmp_path):
    dataset = CocoSet(write(tmp_path, content()))
    truth = json.loads(json.dumps(dataset.ground_truth()))  # plain values only
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3, 4]
    assert [entry["iscrowd"] for entry in truth["annotations"]] == [0, 0, 1, 0]
    assert truth["annotations"][0]["area"] == 400.5  # the json's own
    assert truth["annotations"][0]["bbox"] == [10, 8, 20, 20]
    assert truth["annotations"][1]["area"] == ring().sum()
    assert truth["annotations"][1]["bbox"] == [12, 4, 27, 27]
    api = COCO()
    api.dataset = truth
    api.createIndex()
    assert np.array_equal(api.annToMask(truth["annotations"][1]), ring())
    assert [category["id"] for category in truth["categories"]] == [3, 20]
    assert {picture["id"] for picture in truth["images"]} == {2, 5, 9}


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([10.4, 8.2, 19.3, 19.9], [10.4, 8.2, 29.7, 28.1]),  # sub-pixel: kept
        ([9, 8, 24, 20], [9, 8, 33, 28]),  # a thin end that the mask does not show: kept
        ([10, 8, 30, 28], [10, 8, 30, 28]),  # corners instead of a size
        ([8, 10, 20, 20], [8, 10, 28, 30]),  # kept, but grown to hold the mask: see below
        ([10, 8, 0, 20], [10, 8, 30, 28]),
        ([10, 8, -20, 20], [10, 8, 30, 28]),
        ([math.nan, 8, 20, 20], [10, 8, 30, 28]),
        ([10, 8, math.inf, 20], [10, 8, 30, 28]),
        ([10, 8, 20], [10, 8, 30, 28]),
        (["10", 8, 20, 20], [10, 8, 30, 28]),
        ({"x": 10}, [10, 8, 30, 28]),
        ([10**400, 8, 20, 20], [10, 8, 30, 28]),
        (None, [10, 8, 30, 28]),
    ],
)
def test_box_is_the_given_one_if_it_agrees_with_the_mask(tmp_path, bbox, expected):
    dataset = CocoSet(write(tmp_path, content(annotations=[note(1, bbox=bbox)])))
    x1, y1, x2, y2 = expected
    # Every pixel's centre lies inside.
    grown = [min(x1, 10.5), min(y1, 8.5), max(x2, 29.5), max(y2, 27.5)]
    assert dataset.target(0).boxes[0].tolist() == pytest.approx(grown)


def test_boxes_end_at_the_frame(tmp_path):
    polygon = [-5, -3, 20, -3, 20, 45, -5, 45]
    entry = note(1, segmentation=[polygon], bbox=[-2, -1.5, 22, 40])
    dataset = CocoSet(write(tmp_path, content(annotations=[entry])))
    target = dataset.target(0)
    assert target.boxes[0].tolist() == [0, 0, 20, 37]
    assert target.masks.windows[0].shape == (37, 20)


# -------------------------------------------------------------------- masks against pycocotools


@st.composite
def bitmaps(draw):
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.asfortranarray(np.array(bits, dtype=np.uint8).reshape(height, width))


def dense(runs):
    window, (x, y) = runs.window()
    mask = np.zeros(runs.size, dtype=np.uint8)
    mask[y : y + window.shape[0], x : x + window.shape[1]] = window.numpy()
    return mask


@settings(deadline=None, max_examples=300)
@given(bitmaps())
def test_both_kinds_of_rle_decode_to_the_same_pixels(mask):
    rle = coco_mask.encode(mask)
    size = mask.shape
    runs = decode({"size": list(size), "counts": rle["counts"].decode()}, size)
    assert np.array_equal(dense(runs), mask)
    assert runs.area() == mask.sum()
    assert runs.encode() == {"size": list(size), "counts": rle["counts"].decode()}
    again = decode({"size": list(size), "counts": runs.counts.tolist()}, size)
    assert np.array_equal(dense(again), mask)
    ys, xs = np.nonzero(mask)
    tight = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0)
    assert runs.box() == tight


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 400))
def test_long_runs_decode_too(seed, height, width):
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    for _ in range(3):
        y, x = random.integers(0, (height, width))
        mask[y : y + random.integers(1, 300), x : x + random.integers(1, 300)] = 1
    rle = coco_mask.encode(mask)
    runs = decode({"size": [height, width], "counts": rle["counts"].decode()}, (height, width))
    assert np.array_equal(dense(runs), mask)
    assert runs.encode()["counts"] == rle["counts"].decode()


coordinate = st.floats(-30, 90, allow_nan=False).map(lambda value: round(value, 2))
polygon = st.integers(3, 8).flatmap(
    lambda points: st.lists(coordinate, min_size=2 * points, max_size=2 * points)
)


@settings(deadline=None, max_examples=300)
@given(st.lists(polygon, min_size=1, max_size=3))
def test_polygons_decode_to_the_pixels_of_pycocotools(polygons):
    height, width = SIZE
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    assert np.array_equal(dense(decode(polygons, SIZE)), coco_mask.decode(rle))


tenths = st.integers(-100, 600).map(lambda v: v / 10)  # half of them end on a fifth's border
near = st.lists(st.tuples(tenths | st.floats(-9, 49), tenths | st.floats(-9, 49)), min_size=3)


@pytest.mark.parametrize("dense", [0, 2**20])
def test_windows_of_many_corners_are_drawn_with_the_pixels_of_pycocotools(monkeypatch, dense):
    """Their sides end between pixels so often that rounding decides: shifting them would show."""
    monkeypatch.setattr(rle, "DENSE", dense)
    random = np.random.default_rng(0)
    for _ in range(300):
        outline = random.uniform(-3, 45, (9, 2)).ravel().tolist()
        window, (x, y) = rle.draw([outline], (40, 60))
        whole = np.zeros((40, 60), np.uint8)
        whole[y : y + window.shape[0], x : x + window.shape[1]] = window.numpy()
        assert np.array_equal(
            whole, coco_mask.decode(coco_mask.frPyObjects([outline], 40, 60))[..., 0]
        )


@settings(deadline=None, max_examples=400)
@given(
    st.lists(near, min_size=1, max_size=3),
    st.sampled_from([(1.0, 1.0), (0.37, 0.41), (2.5, 2.6)]),
    st.booleans(),
)
def test_windows_are_drawn_with_the_pixels_of_pycocotools(polygons, scale, inside):
    size = math.ceil(30 * scale[1]), math.ceil(40 * scale[0])
    arrays = [np.array(points) for points in polygons]
    if inside:
        arrays = [points.clip(0, [40, 30]) for points in arrays]
    window, (x, y) = rle.draw([points.ravel().tolist() for points in arrays], size, scale)
    scaled = [(points * scale).ravel().tolist() for points in arrays]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, *size)))
    whole = np.zeros(size, np.uint8)
    whole[y : y + window.shape[0], x : x + window.shape[1]] = window.numpy()
    assert np.array_equal(whole, expected)
    if window.numel():  # tight
        for side in (window[0], window[-1], window[:, 0], window[:, -1]):
            assert side.any()


@pytest.mark.parametrize("short", [17, 80, 100])
def test_a_target_of_another_size_shows_what_resizing_shows(tmp_path, short):
    dataset = CocoSet(write(tmp_path, content()))
    whole = dataset.target(0)
    _, resized = resize(torch.zeros(3, *whole.size, dtype=torch.uint8), whole, short, 999)
    scaled = dataset.target(0, resized.size)
    assert resized.size != whole.size
    assert (scaled.size, scaled.labels.tolist()) == (resized.size, resized.labels.tolist())
    assert torch.allclose(scaled.boxes, resized.boxes, atol=0.5)
    ours, theirs = (one.masks.dense(resized.size).bool() for one in (scaled, resized))
    overlap = (ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2))
    assert len(overlap) == 2
    assert overlap.min() > 0.85  # drawn against resampled: they differ along the outline
    assert torch.equal(ours[1], theirs[1])  # RLE can only be resampled


def test_no_object_disappears_in_a_small_frame(tmp_path):
    needle = note(1, segmentation=[[2, 5, 38, 5, 38, 7, 2, 7]], bbox=[2, 5, 36, 2])
    dataset = CocoSet(write(tmp_path, content(annotations=[needle])))
    index = [bool(dataset.annotations(i)) for i in range(3)].index(True)
    target = dataset.target(index, (4, 5))
    assert len(target) == 1
    assert target.masks.windows[0].any()


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=[chr(code) for code in range(40, 120)], max_size=30), st.data())
def test_any_counts_are_refused_or_fill_the_picture(text, data):
    try:
        runs = decode({"size": [6, 7], "counts": text}, (6, 7))
    except ValueError:
        return
    assert runs.counts.sum() == 42
    assert runs.counts.min() >= 0
    assert dense(runs).sum() == runs.area()


def test_a_mask_takes_memory_for_its_columns_only():
    # 100 million pixels: the frame is never unrolled.
    import tracemalloc

    size = (10_000, 10_000)
    counts = [20_000_000 + 500, 100, 9900, 100, 100_000_000 - 20_000_000 - 500 - 10_100]
    tracemalloc.start()
    window, origin = decode({"size": list(size), "counts": counts}, size).window()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert origin == (2000, 500)
    assert window.shape == (100, 2)
    assert window.all()
    assert peak < 1_000_000


# --------------------------------------------------------------------------- one bad annotation


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"image_id": 1234}, "unknown image_id 1234"),
        ({"image_id": "5"}, "unknown image_id '5'"),
        ({"category_id": 99}, "unknown category_id 99"),
        ({"segmentation": None}, "no segmentation"),
        ({"segmentation": []}, "empty segmentation"),
        ({"segmentation": [[]]}, "at least 3 points"),
        ({"segmentation": [[1, 2, 3, 4]]}, "at least 3 points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "flat list"),
        ({"segmentation": SQUARE}, "flat list"),
        ({"segmentation": [[[1, 2], [3, 4], [5, 6]]]}, "flat list"),
        ({"segmentation": [[1, 2, 3, 4, [5], 6]]}, "list of numbers"),
        ({"segmentation": [[1, 2, "x", 4, 5, 6]]}, "list of numbers"),
        ({"segmentation": [["1", "2", "9", "4", "5", "6"]]}, "list of numbers"),
        ({"segmentation": [[1, 2, None, 4, 5, 6]]}, "not a list of numbers"),
        ({"segmentation": [[1, 2, math.nan, 4, 5, 6]]}, "not finite"),
        ({"segmentation": [[1, 2, 10**400, 4, 5, 6]]}, "list of numbers"),
        ({"segmentation": [[1, 2, 1e9, 4, 5, 6]]}, "far outside"),
        ({"segmentation": [[5, 5, 5, 5, 5, 5]]}, "no pixel"),
        ({"segmentation": [[60, 5, 70, 5, 70, 9]]}, "no pixel"),
        ({"segmentation": "poly"}, "neither polygons nor RLE"),
        ({"segmentation": {"counts": [1961]}}, "RLE of size null"),
        ({"segmentation": {"size": [53, 37], "counts": [1, 1960]}}, "RLE of size [53, 37]"),
        ({"segmentation": {"size": [37, 53], "counts": [1, 2]}}, "covers 3 pixels"),
        ({"segmentation": {"size": [37, 53], "counts": [1961]}}, "no pixel"),
        ({"segmentation": {"size": [37, 53], "counts": []}}, "covers 0 pixels"),
        ({"segmentation": {"size": [37, 53], "counts": [-1, 1962]}}, "negative"),
        ({"segmentation": {"size": [37, 53], "counts": [1, 1960.0]}}, "counts are neither"),
        ({"segmentation": {"size": [37, 53], "counts": [10**30]}}, "huge"),
        ({"segmentation": {"size": [37, 53]}}, "counts are neither"),
        ({"segmentation": {"size": [37, 53], "counts": ""}}, "damaged"),
        ({"segmentation": {"size": [37, 53], "counts": "oooo"}}, "damaged"),
        ({"segmentation": {"size": [37, 53], "counts": "ooooooooo0"}}, "damaged"),
        ({"segmentation": {"size": [37, 53], "counts": "\u00e9\u4e2d"}}, "damaged"),
        ({"segmentation": {"size": [37, 53], "counts": "11"}}, "covers 2 pixels"),
        ({"iscrowd": "yes"}, 'iscrowd is "yes"'),
        ({"iscrowd": [1]}, "iscrowd is [1]"),
    ],
)
def test_an_unusable_annotation_costs_itself_only(tmp_path, changes, fault):
    dataset = CocoSet(write(tmp_path, with_note(**changes)))
    assert len(dataset.skipped) == 1
    assert dataset.skipped[0].startswith("annotation 77: ")
    assert fault in dataset.skipped[0]
    assert "\n" not in dataset.skipped[0]
    assert [entry["id"] for entry in dataset.annotations(0)] == [1]
    assert len(dataset.target(0)) == 1
    assert len(dataset.ground_truth()["annotations"]) == 1


def test_parts_without_area_do_not_cost_the_object(tmp_path):
    polygons = [[1, 2, 3, 4], SQUARE, [7, 7]]
    dataset = CocoSet(write(tmp_path, content(annotations=[note(1, segmentation=polygons)])))
    assert dataset.skipped == []
    assert dataset.target(0).masks.windows[0].sum() == 400


def test_a_sliver_that_holds_no_pixel_is_left_out_of_the_target(tmp_path):
    sliver = [0, 0.02, 50, 0.02, 52, 0.2, 0, 0.1]  # an area of several pixels, but no pixel
    dataset = CocoSet(write(tmp_path, content(annotations=[note(1, segmentation=[sliver])])))
    assert len(dataset.target(0)) == len(dataset.ground_truth()["annotations"]) == 0


def test_no_objects_at_all(tmp_path):
    dataset = CocoSet(write(tmp_path, content(annotations=[])))
    assert dataset.usable() == []
    assert dataset.ground_truth()["annotations"] == []
    only_crowd = content(annotations=[note(1, iscrowd=1)])
    assert CocoSet(write(tmp_path, only_crowd)).usable() == []
    assert len(CocoSet(write(tmp_path, content(images=[], annotations=[])))) == 0


# ------------------------------------------------------------------------------ a bad file


def drop(values, place, key):
    values = copy.deepcopy(values)
    del values[place][0][key]
    return values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("", ["line 1", "no valid json"]),
        ('{"images": [}', ["line 1", "no valid json"]),
        ("[" * 100_000, ["cannot read"]),
        ("[]", ["expected COCO annotations"]),
        ("3", ["expected COCO annotations"]),
        ({}, ["categories: missing"]),
        (content(images=None), ["images: missing"]),
        (content(images={}), ["images: not a list"]),
        (content(annotations="x"), ["annotations: not a list"]),
        (content(categories=[3]), ["categories[0]"]),
        (content(annotations=[note(1), []]), ["annotations[1]"]),
        (drop(content(), "images", "id"), ["picture number 0", "id is missing"]),
        (drop(content(), "images", "height"), ["picture 5", "height is missing"]),
        (drop(content(), "images", "file_name"), ["picture 5", "file_name is missing"]),
        (drop(content(), "categories", "name"), ["category 20", "name is missing"]),
        (drop(content(), "annotations", "image_id"), ["annotation 0", "image_id is missing"]),
        (drop(content(), "annotations", "category_id"), ["annotation 0", "category_id is missing"]),
        (with_note(category_id="3"), ["annotation 77", 'category_id is "3", expected a whole']),
        (with_note(category_id=True), ["annotation 77", "category_id is true"]),
        (with_note(image_id=None), ["annotation 77", "image_id is null"]),
        (with_note(image_id=5.5), ["annotation 77", "image_id is 5.5"]),
        (content(categories=[{"id": 3, "name": 4}]), ["category 3", "name is 4"]),
        (content(categories=[{"id": 3, "name": "a"}] * 2), ["category id 3 is used twice"]),
        (
            content(images=[{"id": "x", "file_name": "a", "height": 1, "width": 1}] * 2),
            ["picture id 'x' is used twice"],
        ),
    ]
    + [
        (
            content(images=[{"id": 1, "file_name": "a", "height": height, "width": 1000}]),
            ["picture 1", word],
        )
        for height, word in [
            (0, "0 x 1000 pixels"),
            (-4, "-4 x 1000 pixels"),
            (10**6, "1000000 x 1000 pixels"),
            ("480", 'height is "480"'),
            (math.nan, "height is NaN"),
            (math.inf, "height is Infinity"),
            (1e300, "height is 1000"),
            (10**100, "height is 1000"),
        ]
    ],
)
def test_a_doubtful_file_is_refused_in_one_line(tmp_path, values, words):
    path = write(tmp_path, values)
    with pytest.raises(InputError) as caught:
        CocoSet(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert len(line) < len(str(path)) + 200
    for word in words:
        assert word in line


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"counts": [v]}])
def test_an_annotation_inside_of_an_annotation_is_no_mask(tmp_path, wrap):
    values = content(annotations=[note(7), note(8, segmentation=wrap(note(9)))])
    dataset = CocoSet(write(tmp_path, values))
    assert [entry["id"] for i in range(3) for entry in dataset.annotations(i)] == [7]
    assert len(dataset.skipped) == 1
    assert dataset.skipped[0].startswith("annotation 8: ")


def test_missing_or_unreadable_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such annotation file"):
        CocoSet(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot read"):
        CocoSet(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(InputError, match=r"bytes\.json: cannot read"):
        CocoSet(tmp_path / "bytes.json")


def test_byte_order_mark_and_whole_floats_are_read(tmp_path):
    picture = {"id": 1.0, "file_name": "a", "height": 20.0, "width": 30.0}
    values = content(images=[picture], annotations=[note(1, image_id=1)])
    path = tmp_path / "set.json"
    path.write_text(json.dumps(values), encoding="utf-8-sig")
    dataset = CocoSet(path)
    assert dataset.pictures[0].size == (20, 30)
    assert dataset.usable() == [0]


def test_the_largest_picture_is_a_limit_and_not_an_error(tmp_path):
    picture = {"id": 1, "file_name": "a", "height": 1000, "width": MAX_PIXELS // 1000}
    path = write(tmp_path, content(images=[picture], annotations=[]))
    assert CocoSet(path).pictures[0].size == (1000, MAX_PIXELS // 1000)


# --------------------------------------------------------------------- whatever else is in a json

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just(10**400),
    st.just([[0, 0, 1e5, 1e5, 3, 9]]),
    st.lists(st.floats(), max_size=8),
)


def places(value, path=()):
    """The path of every value inside a json."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        if isinstance(child, list | dict):
            yield from places(child, (*path, key))
        else:
            yield (*path, key)


PLACES = list(places(content()))[1:]


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.tuples(st.sampled_from(PLACES), st.none() | junk.map(lambda v: [v])), max_size=3)
)
def test_a_changed_json_is_refused_in_one_line_or_read(tmp_path_factory, changes):
    values = content()
    for path, change in changes:
        place = values
        try:
            for key in path[:-1]:
                place = place[key]
            if change is None:
                del place[path[-1]]
            else:
                place[path[-1]] = copy.deepcopy(change[0])  # the same value may be drawn twice
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took this place away
    folder = tmp_path_factory.getbasetemp()
    try:
        dataset = CocoSet(write(folder, values))
    except InputError as error:
        line = str(error)
    else:
        line = ""
    assert "\n" not in line
    if line:
        return
    kept = 0
    for index, picture in enumerate(dataset.pictures):
        target = dataset.target(index)
        assert torch.isfinite(target.boxes).all()
        assert (target.boxes[:, 2:] > target.boxes[:, :2]).all()
        assert target.masks.dense(picture.size).flatten(1).any(1).all()
        kept += len(dataset.annotations(index))
    assert kept + len(dataset.skipped) == len(values["annotations"])  # nothing silently lost
    json.dumps(dataset.ground_truth())
