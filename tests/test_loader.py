import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from brefine.data.coco import CocoSet
from brefine.data.loader import (
    TrainSet,
    collate,
    read_labelled,
    read_picture,
    train_loader,
)
from brefine.data.pictures import MAX_PIXELS, to_rgb
from brefine.data.samplers import EpochSampler
from brefine.recipe import DataRecipe
from brefine.structures import Images, InputError

RECIPE = DataRecipe(short_side=(40, 48, 64), long_side=100, workers=0)


def colours(height=12, width=20):
    """Smooth colours [H, W, 3] with four distinct corners: survive JPEG, show orientation."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([x * 255, y * 255, 255 - 120 * x - 120 * y], 2).astype(np.uint8)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def read(path):
    tensor = read_picture(path)
    assert tensor.dtype == torch.uint8
    assert tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------- kinds of pictures


def test_rgb_as_it_is(tmp_path):
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(colours()))), colours())


def test_grey_and_black_and_white_are_repeated(tmp_path):
    grey = colours()[:, :, 0]
    assert np.array_equal(
        read(saved(tmp_path, Image.fromarray(grey))), grey[:, :, None].repeat(3, 2)
    )
    bits = Image.fromarray(grey > 100)
    assert bits.mode == "1"
    expected = ((grey > 100) * np.uint8(255))[:, :, None].repeat(3, 2)
    assert np.array_equal(read(saved(tmp_path, bits, "b.png")), expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_divided_by_257(tmp_path, name):
    values = np.linspace(0, 65535, 240).round().astype(np.uint16).reshape(12, 20)
    image = read(saved(tmp_path, Image.fromarray(values), name))
    assert np.abs(image[:, :, 0] - values / 257).max() <= 0.5
    assert image[0, 0, 0] == 0
    assert image[-1, -1, 2] == 255
    assert (image[:, :, 0] == image[:, :, 1]).all()


def test_32_bit_grey_follows_the_same_rule_or_is_refused(tmp_path):
    values = np.array([[0, 257], [65535, 129]], dtype=np.int32)
    image = read(saved(tmp_path, Image.fromarray(values), "a.tif"))
    assert image[:, :, 0].tolist() == [[0, 1], [255, 1]]
    for wrong in (65536, -1):
        values[0, 0] = wrong
        with pytest.raises(InputError, match=r"a\.tif.*convert it to 8 or 16 bits"):
            read(saved(tmp_path, Image.fromarray(values), "a.tif"))
    with pytest.raises(InputError, match=r"a\.tif.*floating-point"):
        read(saved(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), "a.tif"))


def test_transparent_parts_show_white(tmp_path):
    alpha = np.zeros((12, 20), np.uint8)
    alpha[:, 5:] = 255
    alpha[:, 10:] = 128
    rgba = np.dstack([colours(), alpha])
    share = alpha[:, :, None] / 255
    expected = colours() * share + 255 * (1 - share)
    assert np.abs(read(saved(tmp_path, Image.fromarray(rgba))) - expected).max() <= 1

    la = np.dstack([colours()[:, :, 0], alpha])
    image = read(saved(tmp_path, Image.fromarray(la, "LA"), "b.png"))
    expected = la[:, :, :1] * share + 255 * (1 - share)
    assert np.abs(image - expected).max() <= 1


def test_palette_is_looked_up_and_its_transparent_colour_shows_white(tmp_path):
    image = Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20) % 4, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    pixels = read(saved(tmp_path, image))
    assert pixels[0, :4].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]]
    pixels = read(saved(tmp_path, image, transparency=1))
    assert pixels[0, :4].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255], [9, 8, 7]]
    gif = read(saved(tmp_path, image, "a.gif", transparency=3))
    assert gif[0, :4].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


def test_rgb_with_one_transparent_colour(tmp_path):
    pixels = colours()
    pixels[0, 0] = 1, 2, 3
    image = read(saved(tmp_path, Image.fromarray(pixels), transparency=(1, 2, 3)))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(image[1:], pixels[1:])


def test_cmyk(tmp_path):
    image = Image.fromarray(colours(64, 64)).convert("CMYK")
    pixels = read(saved(tmp_path, image, "a.jpg", quality=98, subsampling=0))
    assert np.abs(pixels.astype(int) - colours(64, 64)).mean() < 4  # not inverted


def test_first_frame_of_several(tmp_path):
    frames = [Image.fromarray(np.full((4, 5), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "a.tif") == 10).all()


ORIENTED = {  # what was done to the upright picture before it was stored
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p),  # shown after a quarter turn clockwise
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    upright = colours(48, 80)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(ORIENTED[orientation](upright)))
    image = read(
        saved(tmp_path, stored, name, exif=exif, **({"quality": 95} if "j" in name else {}))
    )
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).max() < 12


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_exif_orientation_of_every_mode(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    if mode == "I;16":
        image = Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20) * 257)
    else:
        image = Image.fromarray(colours()).convert(mode)
    plain = read(saved(tmp_path, image, "a.tif"))
    turned = read(saved(tmp_path, image, "b.tif", exif=exif))
    assert np.array_equal(turned, np.rot90(plain, -1))


def test_nonsense_in_exif_does_not_matter(tmp_path):
    for value in (0, 9, 77):
        exif = Image.Exif()
        exif[0x0112] = value
        assert read(saved(tmp_path, Image.fromarray(colours()), exif=exif)).shape == (12, 20, 3)


def test_a_pillow_picture_is_converted_by_the_same_rules():
    assert np.array_equal(to_rgb(Image.fromarray(colours())), colours())
    with pytest.raises(InputError, match="floating-point"):
        to_rgb(Image.fromarray(np.zeros((2, 2), np.float32)))


# ------------------------------------------------------------------------------- no pictures


def fails(path, words):
    with pytest.raises(InputError, match=words) as caught:
        read_picture(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_no_picture(tmp_path):
    fails(tmp_path / "none.png", "no such picture")
    fails(tmp_path, "cannot read")
    (tmp_path / "text.png").write_text("not a picture\n")
    fails(tmp_path / "text.png", "no picture")
    (tmp_path / "empty.jpg").touch()
    fails(tmp_path / "empty.jpg", "no picture")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.bmp", "a.webp"])
def test_truncated_files(tmp_path, name):
    whole = saved(tmp_path, Image.fromarray(colours(60, 80)), name).read_bytes()
    path = tmp_path / f"cut_{name}"
    for share in (0.02, 0.3, 0.6, 0.85):
        path.write_bytes(whole[: int(len(whole) * share)])
        fails(path, "cannot read|no picture")


def test_damaged_bytes_are_one_line_or_a_picture(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "b"
    for name in ("a.png", "a.jpg", "a.tif", "a.gif", "a.webp"):
        whole = saved(tmp_path, Image.fromarray(colours(40, 40)), name).read_bytes()
        for _ in range(60):
            content = np.frombuffer(whole, np.uint8).copy()
            content[random.integers(0, min(len(content), 400), 5)] = random.integers(0, 256, 5)
            path.write_bytes(content.tobytes())
            try:
                line = str(read_picture(path).shape[0])
            except InputError as error:
                line = str(error)
            assert "\n" not in line


def header_of_png(width, height):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", ihdr)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("width", [MAX_PIXELS // 10_000 + 1, 10**6, 2**31 - 1])
def test_a_picture_that_says_it_is_huge_is_refused_before_it_is_decoded(tmp_path, width):
    path = tmp_path / "huge.png"
    path.write_bytes(header_of_png(width, 10_000))
    fails(path, "larger than 178 million pixels")


def test_the_limit_comes_before_that_of_pillow():
    assert MAX_PIXELS < 2 * Image.MAX_IMAGE_PIXELS


# ------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures of different sizes; the last one without objects."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(5):
        height, width = 50 + 4 * number, 70
        pixels = np.full((height, width, 3), 40 * number + 20, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        for part in range(number if number < 4 else 0):
            x = 5 + 20 * part
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 1 + part % 2,
                    "segmentation": [[x, 5, x + 15, 5, x + 15, 30, x, 40]],
                }
            )
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    values = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(values))
    return folder


def same(a, b):
    """Two batches hold the same pictures and labels, bit for bit."""
    assert torch.equal(a[0].pixels, b[0].pixels)
    assert torch.equal(a[0].sizes, b[0].sizes)
    assert len(a[1]) == len(b[1])
    for p, q in zip(a[1], b[1], strict=True):
        assert p.size == q.size
        assert torch.equal(p.boxes, q.boxes)
        assert torch.equal(p.labels, q.labels)
        assert torch.equal(p.masks.origins, q.masks.origins)
        assert len(p.masks) == len(q.masks)
        for u, v in zip(p.masks.windows, q.masks.windows, strict=True):
            assert u.dtype == v.dtype == torch.uint8
            assert torch.equal(u, v)


def test_items_follow_from_seed_epoch_and_index(folder):
    dataset = CocoSet(folder / "set.json")
    items = TrainSet(dataset, RECIPE, seed=3)
    assert len(items) == 5
    first = [items[index] for index in range(5)]
    again = TrainSet(dataset, RECIPE, seed=3)
    for index in (4, 2, 0, 1, 3):  # whatever the order
        same(collate([again[index]]), collate([first[index]]))
    again.set_epoch(1)
    for index in range(5):
        same(collate([again[index]]), collate([items[1, index]]))
    sizes = {items[epoch, 3][1].size for epoch in range(30)}
    assert {min(size) for size in sizes} == {40, 48, 64}
    assert sum(items[epoch, 0][0].shape == first[0][0].shape for epoch in range(30)) < 25
    others = TrainSet(dataset, RECIPE, seed=4)
    assert any(others[e, 3][1].size != items[e, 3][1].size for e in range(10))


@pytest.mark.parametrize(
    ("chance", "expected"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})]
)
def test_flip_happens_as_often_as_asked(folder, chance, expected):
    dataset = CocoSet(folder / "set.json")
    items = TrainSet(dataset, RECIPE.model_copy(update={"flip": chance}), seed=0)
    left = {bool(items[epoch, 1][1].boxes[0, 0] > 30) for epoch in range(20)}
    assert left == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(folder, workers):
    dataset = CocoSet(folder / "set.json")
    recipe = RECIPE.model_copy(update={"workers": workers})
    loader = train_loader(dataset, recipe, batch_size=2, seed=1)
    items, sampler = TrainSet(dataset, RECIPE, seed=1), EpochSampler(5, seed=1, batch_size=2)
    assert len(loader) == 3  # one picture comes again
    for _ in range(3):  # workers persist and still know the epoch
        keys = list(sampler)
        batches = list(loader)
        assert len(batches) == 3
        for number, batch in enumerate(batches):
            assert isinstance(batch[0], Images)
            same(batch, collate([items[key] for key in keys[2 * number : 2 * number + 2]]))


def test_a_sampler_of_ones_own(folder):
    dataset = CocoSet(folder / "set.json")
    keys = [(4, 3), (0, 3), (9, 1)]
    loader = train_loader(dataset, RECIPE, batch_size=3, seed=1, sampler=keys)
    items = TrainSet(dataset, RECIPE, seed=1)
    same(next(iter(loader)), collate([items[key] for key in keys]))


def test_every_batch_is_full(folder):
    dataset = CocoSet(folder / "set.json")
    for batch_size, count in [(8, 1), (5, 1), (3, 2), (1, 5)]:
        loader = train_loader(dataset, RECIPE, batch_size=batch_size, seed=0)
        assert len(loader) == count
        assert [len(targets) for _, targets in loader] == [batch_size] * count


def test_a_last_batch_of_ones_own_sampler_is_left_out_unless_it_is_the_only_one(folder):
    dataset = CocoSet(folder / "set.json")
    keys = [(0, index) for index in range(5)]
    for batch_size, sizes in [(8, [5]), (5, [5]), (3, [3]), (1, [1] * 5)]:
        loader = train_loader(dataset, RECIPE, batch_size=batch_size, seed=0, sampler=keys)
        assert [len(targets) for _, targets in loader] == sizes


def test_a_picture_that_comes_again_is_drawn_differently(folder):
    items = TrainSet(CocoSet(folder / "set.json"), RECIPE, seed=0)
    sizes = [items[0, 3, copy][1].size for copy in range(20)]
    assert {min(size) for size in sizes} == {40, 48, 64}
    same(collate([items[0, 3, 0]]), collate([items[0, 3]]))
    again = [items[0, 3, copy][1].size for copy in range(20)]
    assert sizes == again


def test_a_loader_goes_on_in_the_middle_of_an_epoch(folder):
    dataset = CocoSet(folder / "set.json")
    whole = train_loader(dataset, RECIPE, batch_size=1, seed=1)
    first, second = list(whole), list(whole)
    broken = train_loader(dataset, RECIPE, batch_size=1, seed=1)
    for number, batch in enumerate(broken):
        same(batch, first[number])
        if number == 2:
            break
    resumed = train_loader(dataset, RECIPE, batch_size=1, seed=1)
    resumed.load_state_dict(broken.state_dict())
    rest = list(resumed)
    assert len(rest) == 2
    for batch, expected in zip(rest + list(resumed), first[3:] + second, strict=True):
        same(batch, expected)
    assert resumed.state_dict() == {"batches": 0}  # at the end there is nothing to leave out
    # Without a state, a pass that was broken off leaves nothing behind.
    next(iter(broken))
    assert len(list(broken)) == 5


def test_pictures_without_objects_come_along(folder):
    dataset = CocoSet(folder / "set.json")
    loader = train_loader(dataset, RECIPE, batch_size=1, seed=0)
    assert sorted(len(targets[0]) for _, targets in loader) == [0, 0, 1, 2, 3]


def test_collate_pads(folder):
    items = TrainSet(CocoSet(folder / "set.json"), RECIPE, seed=0)
    images, targets = collate([items[0], items[3]])
    assert images.sizes.tolist() == [list(target.size) for target in targets]
    assert images.pixels.shape[2] % 32 == images.pixels.shape[3] % 32 == 0
    assert images.pixels.dtype == torch.uint8


def test_thousands_of_masks_do_not_exhaust_open_files(tmp_path):
    import resource

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    squares = [(x, y) for x in range(0, 64, 2) for y in range(0, 64, 2)]
    annotations = [
        {
            "id": i,
            "image_id": 1,
            "category_id": 1,
            "segmentation": [[x, y, x + 2, y, x + 2, y + 2, x, y + 2]],
        }
        for i, (x, y) in enumerate(squares)
    ]
    values = {
        "images": [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "set.json").write_text(json.dumps(values))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        recipe = DataRecipe(short_side=64, long_side=64, flip=0, workers=1)
        loader = train_loader(CocoSet(tmp_path / "set.json"), recipe, batch_size=1, seed=0)
        kept = [targets[0] for _ in range(2) for _, targets in loader]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [len(target) for target in kept] == [1024, 1024]
    assert kept[0].masks.dense((64, 64)).sum() == 64 * 64


# ------------------------------------------------------------------------------- faults


def edited(folder, tmp_path, edit):
    values = json.loads((folder / "set.json").read_text())
    edit(values)
    (tmp_path / "set.json").write_text(json.dumps(values))
    return CocoSet(tmp_path / "set.json", folder / "images")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_in_one_line(folder, tmp_path, workers):
    (folder / "images" / "broken.png").write_bytes((folder / "images" / "1.png").read_bytes()[:80])
    dataset = edited(folder, tmp_path, lambda v: v["images"][1].update(file_name="broken.png"))
    recipe = RECIPE.model_copy(update={"workers": workers})
    line = None
    try:  # pytest.raises would keep the workers' iterator until they time out
        list(train_loader(dataset, recipe, batch_size=1, seed=0))
    except InputError as error:
        line = str(error)
    assert line.startswith(str(folder))
    assert "broken.png: cannot read the picture" in line
    assert "\n" not in line


def test_missing_pictures_are_named_before_training(folder, tmp_path):
    dataset = edited(folder, tmp_path, lambda v: v["images"][2].update(file_name="gone.png"))
    with pytest.raises(InputError, match=r"gone\.png: no such picture.* 5 in .*set\.json"):
        train_loader(dataset, RECIPE, batch_size=1, seed=0)


def test_nothing_to_learn_from(folder, tmp_path):
    dataset = edited(folder, tmp_path, lambda v: v.update(annotations=[]))
    with pytest.raises(InputError, match=r"set\.json: no usable annotation to train on$"):
        train_loader(dataset, RECIPE, batch_size=1, seed=0)

    def spoil(values):
        for entry in values["annotations"]:
            entry["category_id"] += 10

    dataset = edited(folder, tmp_path, spoil)
    with pytest.raises(InputError, match=r"no usable.*\(6 unusable, first: annotation 0: unknown"):
        train_loader(dataset, RECIPE, batch_size=1, seed=0)


def test_labels_of_another_size_than_the_picture(folder, tmp_path):
    dataset = edited(folder, tmp_path, lambda v: v["images"][1].update(height=55))
    with pytest.raises(InputError, match=r"1\.png: 54 x 70 pixels.* 55 x 70 .*correct the json"):
        read_labelled(dataset, 1)
    dataset = edited(folder, tmp_path, lambda v: v["images"][1].update(height=70, width=54))
    with pytest.raises(InputError, match="turned upright"):
        read_labelled(dataset, 1)
    assert read_labelled(dataset, 0).shape == (3, 50, 70)
