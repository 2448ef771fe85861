"""Augmentation: picture and masks move together, nothing disappears but by the rule."""

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

from brefine.data.augment import (
    adjust_colours,
    call,
    choose,
    crop_randomly,
    paste,
    place,
    shift_colours,
)
from brefine.data.coco import CocoSet
from brefine.data.loader import TrainSet, train_loader
from brefine.data.transforms import GREY, VISIBLE, resize
from brefine.recipe import DataRecipe, Recipe
from brefine.structures import Bitmaps, InputError, Instances
from brefine.train import train

SIZE = (40, 60)
#: neither resized nor flipped
STILL = DataRecipe(short_side=40, long_side=60, flip=0, workers=0)

# ------------------------------------------------------------------------------- scenes
# The picture is a map of ids, 0 where nothing is; object `id` is its pixels and has label `id`.


def scene(seed, first=1, size=SIZE, objects=6):
    """A map of ids ``first ..``, some in several parts, some hidden in part by others."""
    noise = torch.randn(objects, 1, 4, 6, generator=torch.Generator().manual_seed(seed))
    blobs = F.interpolate(noise, size=size, mode="bicubic")[:, 0] > 0.6
    ids = torch.zeros(size, dtype=torch.uint8)
    for number, blob in enumerate(blobs):
        ids[blob] = first + number
    return ids


def labelled(ids):
    """Picture and labels of a scene."""
    numbers = torch.unique(ids)
    numbers = numbers[numbers > 0]
    masks = Bitmaps.of(ids[None] == numbers[:, None, None])
    target = Instances(tuple(ids.shape), masks.boxes(), numbers.long(), masks=masks)
    return torch.stack([ids, 255 - ids, 2 * ids]), target


def areas(ids):
    return dict(zip(*(x.tolist() for x in torch.unique(ids, return_counts=True)), strict=True))


def check(pixels, target, before):
    """Objects are where their colours are; those with less left than the rule says are gone."""
    assert pixels.dtype == torch.uint8
    assert tuple(pixels.shape[1:]) == target.size
    ids = pixels[0].clone()
    ids[ids == GREY] = 0
    colours = torch.stack([ids, 255 - ids, 2 * ids])
    assert torch.equal(torch.where((pixels == GREY).all(0), colours, pixels), colours)
    left = areas(ids)
    left.pop(0, None)
    assert left.keys() <= before.keys()
    keep = [n for n, count in left.items() if count >= max(1, VISIBLE * before[n])]
    assert sorted(target.labels.tolist()) == keep
    dense = target.masks.dense(target.size)
    for mask, label in zip(dense, target.labels, strict=True):
        assert torch.equal(mask.bool(), ids == label)
    assert torch.equal(target.boxes, Bitmaps.of(dense).boxes())


seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=80)
@given(seeds, st.booleans(), st.booleans(), st.booleans(), st.none() | st.integers(1, 90))
def test_picture_and_masks_move_together(seed, across, down, turn, crop):
    ids = scene(seed)
    recipe = STILL.model_copy(
        update={"flip": float(across), "flip_vertical": float(down), "rotate90": turn, "crop": crop}
    )
    pixels, target = place(*labelled(ids), recipe, np.random.default_rng(seed))
    check(pixels, target, areas(ids))
    if crop:
        assert target.size == (crop, crop)


def test_every_way_to_turn_and_mirror_comes_as_often():
    ids = torch.arange(6, dtype=torch.uint8).view(2, 3)
    ways = {}
    for k in range(4):
        turned = torch.rot90(ids, k)
        ways[tuple(turned.flatten().tolist()), tuple(turned.shape)] = f"turned {k}"
        mirrored = turned.flip(1)
        ways[tuple(mirrored.flatten().tolist()), tuple(mirrored.shape)] = f"mirrored {k}"
    assert len(ways) == 8
    recipe = STILL.model_copy(update={"flip": 0.5, "rotate90": True})
    random = np.random.default_rng(0)
    seen = dict.fromkeys(ways.values(), 0)
    for _ in range(800):
        pixels, _ = place(*labelled(ids), recipe, random)
        seen[ways[tuple(pixels[0].flatten().tolist()), tuple(pixels.shape[1:])]] += 1
    assert min(seen.values()) > 60  # of 100
    assert max(seen.values()) < 145
    only_down = STILL.model_copy(update={"flip_vertical": 1.0})
    assert torch.equal(place(*labelled(ids), only_down, random)[0][0], ids.flip(0))
    turns = STILL.model_copy(update={"rotate90": True})
    seen = {tuple(place(*labelled(ids), turns, random)[0][0].flatten().tolist()) for _ in range(60)}
    assert seen == {tuple(torch.rot90(ids, k).flatten().tolist()) for k in range(4)}


def test_a_crop_is_anywhere_in_the_picture_and_a_small_picture_anywhere_in_the_crop():
    ids = torch.arange(1, 13, dtype=torch.uint8).view(2, 6)
    random = np.random.default_rng(0)
    corners = set()
    for _ in range(300):
        pixels, _ = crop_randomly(*labelled(ids), (4, 4), random)
        y = int((pixels[0] != GREY).any(1).nonzero()[0])
        corners.add((int(pixels[0, y, 0]), y))
    assert corners == {(left, y) for left in (1, 2, 3) for y in (0, 1, 2)}


# ------------------------------------------------------------------------------- copy-paste


@settings(deadline=None, max_examples=80)
@given(seeds, seeds)
def test_pasted_objects_lie_in_front(seed, other):
    ids, theirs = scene(seed), scene(other, first=51)
    picture, target = labelled(ids)
    source, objects = labelled(theirs)
    objects = choose(objects, np.random.default_rng(seed))
    pixels, result = paste(picture, target, source, objects)
    front = torch.isin(theirs, objects.labels)
    assert torch.equal(pixels[0], torch.where(front, theirs, ids))
    check(pixels, result, areas(ids) | areas(theirs))
    assert set(objects.labels.tolist()) <= set(result.labels.tolist())
    # The input is as it was.
    assert torch.equal(picture[0], ids)
    assert torch.equal(target.masks.dense(SIZE), labelled(ids)[1].masks.dense(SIZE))


def test_objects_that_are_nearly_hidden_are_dropped():
    ids = torch.zeros(10, 40, dtype=torch.uint8)
    ids[:, :20] = 1
    for columns, labels in [(18, [1, 60]), (19, [60]), (20, [60])]:
        theirs = torch.zeros_like(ids)
        theirs[:, :columns] = 60
        _, result = paste(*labelled(ids), *labelled(theirs))
        assert result.labels.tolist() == labels
    assert result.boxes.tolist() == [[0, 0, 20, 10]]


def test_nothing_to_paste_and_nothing_to_paste_on():
    ids, empty = scene(3), torch.zeros(SIZE, dtype=torch.uint8)
    for blend in (False, True):
        pixels, result = paste(*labelled(ids), *labelled(empty), blend=blend)
        check(pixels, result, areas(ids))
        pixels, result = paste(*labelled(empty), *labelled(ids), blend=blend)
        assert torch.equal(result.masks.dense(SIZE), labelled(ids)[1].masks.dense(SIZE))
    assert len(choose(labelled(empty)[1], np.random.default_rng(0))) == 0


@settings(deadline=None, max_examples=50)
@given(seeds, st.sampled_from([SIZE, (5, 6), (1, 1), (3, 30)]))
def test_blending_changes_pixels_near_the_outline_only(seed, size):
    ids, theirs = scene(seed, size=size), scene(seed + 1, first=51, size=size)
    hard, expected = paste(*labelled(ids), *labelled(theirs))
    soft, result = paste(*labelled(ids), *labelled(theirs), blend=True)
    assert torch.equal(result.boxes, expected.boxes)
    assert torch.equal(result.masks.dense(size), expected.masks.dense(size))
    front = (theirs > 0).float()[None, None]
    near = F.max_pool2d(front, 7, 1, 3) != -F.max_pool2d(-front, 7, 1, 3)
    assert torch.equal(soft[:, ~near[0, 0]], hard[:, ~near[0, 0]])
    low, high = torch.minimum(*(labelled(x)[0] for x in (ids, theirs))), hard.new_zeros(0)
    high = torch.maximum(*(labelled(x)[0] for x in (ids, theirs)))
    assert (soft >= low).all()
    assert (soft <= high).all()


def test_a_blended_edge_is_a_ramp():
    dark = torch.zeros(20, 20, dtype=torch.uint8)
    bright = dark.clone()
    bright[:, 10:] = 100
    _, target = labelled(bright)
    above = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    soft, _ = paste(above * 0, labelled(dark)[1], above, target, blend=True)
    row = soft[0, 0].int()
    phi = [0.5 * (1 + math.erf((x - 9.5) / math.sqrt(2))) * 100 for x in range(20)]
    assert (row - torch.tensor(phi)).abs().max() < 4
    assert (soft == soft[:1, :1]).all()  # no shadow at the border


def test_every_number_of_objects_is_as_likely():
    _, target = labelled(torch.arange(1, 5, dtype=torch.uint8)[None])
    random = np.random.default_rng(0)
    chosen = [choose(target, random).labels.tolist() for _ in range(2000)]
    sizes = np.bincount([len(labels) for labels in chosen])
    assert sizes[0] == 0
    assert (np.abs(sizes[1:] - 500) < 90).all()
    assert {label for labels in chosen for label in labels} == {1, 2, 3, 4}
    assert all(labels == sorted(set(labels)) for labels in chosen)


# ------------------------------------------------------------------------------- colours


def photograph(seed=0):
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=random) * 255
    return F.interpolate(coarse, size=(50, 70), mode="bilinear")[0].to(torch.uint8)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
def test_brightness_contrast_and_saturation_are_those_of_torchvision(factor):
    picture = photograph()
    functional = v2.functional
    for ours, theirs in (
        ((factor, 1, 1), functional.adjust_brightness(picture, factor)),
        ((1, factor, 1), functional.adjust_contrast(picture, factor)),
        ((1, 1, factor), functional.adjust_saturation(picture, factor)),
    ):
        result = adjust_colours(picture, *ours, 0)
        assert result.dtype == torch.uint8
        assert (result.int() - theirs.int()).abs().max() <= 2  # they round on the way


def test_hue_turns_about_the_grey_axis():
    picture = photograph()
    assert torch.equal(adjust_colours(picture, 1, 1, 1, 1 / 3), picture[[2, 0, 1]])
    assert torch.equal(adjust_colours(picture, 1, 1, 1, 1), picture)
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    assert adjust_colours(red, 1, 1, 1, 1 / 3).flatten().tolist() == [0, 200, 0]
    green = v2.functional.adjust_hue(red, 1 / 3).flatten()
    assert green.argmax() == 1
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    assert torch.equal(adjust_colours(grey, 1, 1, 0.3, 0.2), grey)


def test_all_at_once_is_one_after_the_other():
    # In the middle of the range, where nothing is clipped on the way.
    picture = (photograph().float() / 4 + 90).to(torch.uint8)
    factors = (1.1, 0.8, 1.2, 0.05)
    once = adjust_colours(picture, *factors)
    step = picture
    for place_, value in ((0, 1.1), (1, 0.8), (2, 1.2), (3, 0.05)):
        single = [1.0, 1.0, 1.0, 0.0]
        single[place_] = value
        step = adjust_colours(step, *single)
    assert (once.int() - step.int()).abs().max() <= 2


def test_strength_bounds_the_change():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    random = np.random.default_rng(0)
    values = [int(shift_colours(grey, 0.3, random)[0, 0, 0]) for _ in range(400)]
    assert 70 <= min(values) < 73  # of a plain grey only brightness is left
    assert 127 < max(values) <= 130
    assert torch.equal(shift_colours(photograph(), 0, random), photograph())
    different = {shift_colours(photograph(), 0.3, random).sum().item() for _ in range(20)}
    assert len(different) > 15


# ------------------------------------------------------------------------------- training set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five scenes; ids 10 .. 13 in picture 1 and so on; picture 0 without objects."""
    folder = tmp_path_factory.mktemp("scenes")
    annotations, images = [], []
    for number in range(5):
        ids = scene(number, first=10 * number, objects=4) if number else torch.zeros(SIZE).byte()
        picture, target = labelled(ids)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 60})
        for label, mask in zip(target.labels, target.masks.dense(SIZE), strict=True):
            columns = mask.T.flatten().numpy()
            edges = np.flatnonzero(np.diff(columns, prepend=0, append=0))
            counts = np.diff([0, *edges, len(columns)]).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "segmentation": {"size": list(SIZE), "counts": counts},
                }
            )
    categories = [{"id": i, "name": str(i)} for i in range(60)]
    values = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(values))
    return folder


def items_of(folder, *, seed=0, transform=None, **options):
    recipe = STILL.model_copy(update=options)
    return TrainSet(CocoSet(folder / "set.json"), recipe, seed, transform)


def origin(folder, number):
    return labelled(scene(number, first=10 * number, objects=4))


@pytest.mark.parametrize("crop", [None, 30, 70])
def test_items_with_everything_on_hold_what_their_colours_say(folder, crop):
    before = {}
    for number in range(1, 5):
        before |= areas(scene(number, first=10 * number, objects=4))
    options = {"flip": 0.5, "flip_vertical": 0.5, "rotate90": True, "copy_paste": 1.0}
    items = items_of(folder, crop=crop, **options)
    partners = set()
    for epoch in range(20):
        for index in range(5):
            pixels, target = items[epoch, index]
            shown = {label // 10 for label in target.labels.tolist()}
            assert len(shown - {index}) <= 1
            partners |= {(index, other) for other in shown - {index}}
            if crop == 70:  # nothing is cut off: only what is pasted over can go
                check(pixels, target, before)
            else:  # what the crop left of an object is not known here
                dense = target.masks.dense(target.size)
                for mask, label in zip(dense, target.labels, strict=True):
                    assert torch.equal(mask.bool() & (pixels[0] == label), mask.bool())
                assert torch.equal(target.boxes, target.masks.boxes())
                assert target.masks.boxes().amax(0).tolist() <= [*target.size[::-1]] * 2 or not len(
                    target
                )
    # Every other picture with objects is pasted from, never the one without, never itself.
    assert partners == {(i, o) for i in range(5) for o in range(1, 5) if i != o}


def test_copy_paste_happens_as_often_as_asked(folder):
    items = items_of(folder, copy_paste=0.3)
    pasted = [len(items[epoch, 0][1]) > 0 for epoch in range(300)]
    assert 60 < sum(pasted) < 120
    subsets = {tuple(items_of(folder, copy_paste=1.0)[e, 0][1].labels.tolist()) for e in range(60)}
    assert len(subsets) > 20


def test_a_set_with_one_picture_has_nothing_to_paste(folder, tmp_path):
    values = json.loads((folder / "set.json").read_text())
    values["annotations"] = [a for a in values["annotations"] if a["image_id"] == 2]
    (tmp_path / "set.json").write_text(json.dumps(values))
    recipe = STILL.model_copy(update={"copy_paste": 1.0})
    items = TrainSet(CocoSet(tmp_path / "set.json", folder), recipe, seed=0)
    assert torch.equal(items[2][0], origin(folder, 2)[0])
    assert len(items[1][1]) > 0  # picture 1 is given those of picture 2


def test_paper_recipes_draw_what_they_always_drew(folder):
    # Without the new options, size and flip are the first two numbers of the generator.
    recipe = DataRecipe(short_side=(30, 40, 50), long_side=200)
    items = TrainSet(CocoSet(folder / "set.json"), recipe, seed=5)
    for epoch, index in [(0, 1), (3, 2), (7, 4), (8, 4)]:
        random = np.random.default_rng((5, epoch, index))
        short = int(random.choice([30, 40, 50]))
        expected, _ = resize(origin(folder, index)[0], None, short, 200)
        if random.random() < 0.5:
            expected = expected.flip(2)
        assert torch.equal(items[epoch, index][0], expected)


def test_jitter_makes_the_long_side_a_multiple_of_the_crop(folder):
    items = items_of(folder, crop=48, jitter=(0.25, 1.0))
    sides, corners = [], set()
    for epoch in range(100):
        pixels, target = items[epoch, 3]
        assert target.size == (48, 48)
        box = Bitmaps.of((pixels != GREY).any(0)[None]).boxes()[0].tolist()
        sides.append(box[2] - box[0])
        assert abs((box[3] - box[1]) - sides[-1] * 2 / 3) <= 1
        corners.add((box[0], box[1]))
    assert 12 <= min(sides) < 15
    assert 45 < max(sides) <= 48
    assert abs(np.mean(sides) - 30) < 3
    assert len(corners) > 50
    items = items_of(folder, crop=48, jitter=(2.0, 2.0))
    for epoch in range(20):
        pixels, _ = items[epoch, 3]
        assert not (pixels == GREY).all(0).any()  # 96 x 64 fills it
    assert len({items[epoch, 3][0].sum().item() for epoch in range(20)}) > 10


@pytest.mark.parametrize("scale", [0.5, 1.3, 2.0])
def test_picture_and_masks_are_resized_together(folder, scale):
    items = items_of(folder, crop=60, jitter=(scale, scale), copy_paste=1.0)
    seen = 0
    for epoch in range(10):
        pixels, target = items[epoch, 2]
        for mask, label in zip(target.masks.dense(target.size), target.labels, strict=True):
            inner = -F.max_pool2d(-F.pad(mask[None, None].float(), [2] * 4), 5, 1)[0, 0] > 0
            seen += int(inner.sum())
            # Where another pixel of the object lies all around, nothing else shines through.
            good = pixels[0][inner].int() - int(label)
            assert (good.abs() <= 1).float().mean() > 0.97 if inner.any() else True
    assert seen > 300


def test_items_are_the_same_in_any_process(folder):
    options = {
        "crop": 48,
        "jitter": (0.3, 1.7),
        "copy_paste": 0.5,
        "copy_paste_blend": True,
        "colour": 0.4,
        "rotate90": True,
        "flip": 0.5,
    }
    items = items_of(folder, seed=3, **options)
    recipe = STILL.model_copy(update={**options, "workers": 2})
    loader = train_loader(CocoSet(folder / "set.json"), recipe, batch_size=2, seed=3)
    keys = list(loader.sampler)
    loader.sampler.set_epoch(0)
    batches = list(loader)
    assert len(keys) == 6
    for number, key in enumerate(keys):
        images, targets = batches[number // 2]
        pixels, target = items[key]
        assert torch.equal(images.pixels[number % 2, :, :48, :48], pixels)
        found = targets[number % 2]
        assert torch.equal(found.boxes, target.boxes)
        assert torch.equal(found.labels, target.labels)
        assert torch.equal(found.masks.dense((48, 48)), target.masks.dense((48, 48)))


# ------------------------------------------------------------------------------- one's own step


def invert(picture, target, random):
    """Also drops the first object, and moves the others to where they are, in a loose window."""
    assert isinstance(random, np.random.Generator)
    keep = torch.arange(len(target)) > 0
    dense = target.masks.dense(target.size)[keep]
    loose = Bitmaps(list(dense), torch.zeros(len(dense), 2, dtype=torch.int64))
    return 255 - picture, Instances(
        target.size, torch.zeros(0, 4), target.labels[keep], None, loose
    )


def test_a_step_of_ones_own_comes_last_and_its_boxes_are_recomputed(folder):
    plain, mine = items_of(folder, flip=0.5), items_of(folder, flip=0.5, transform=invert)
    for index in range(5):
        pixels, target = plain[3, index]
        changed, found = mine[3, index]
        assert torch.equal(changed, 255 - pixels)
        keep = torch.arange(len(target)) > 0
        assert torch.equal(found.boxes, target.boxes[keep])
        assert found.labels.tolist() == target.labels[keep].tolist()
        for a, b in zip(found.masks.windows, target[keep].masks.windows, strict=True):
            assert torch.equal(a, b)  # tight


def test_what_a_step_draws_follows_from_the_key(folder):
    def brighten(picture, target, random):
        return (picture // 2 + int(random.integers(100))).to(torch.uint8), target

    first, second = (items_of(folder, transform=brighten) for _ in range(2))
    assert torch.equal(first[1, 2][0], second[1, 2][0])
    means = {first[epoch, 2][0].float().mean().item() for epoch in range(20)}
    assert len(means) > 10


def test_objects_that_a_step_empties_are_left_out():
    def empty_first(picture, target, random):
        target.masks.windows[0].zero_()
        return picture, target

    picture, target = labelled(scene(4))
    _, found = call(empty_first, picture, target, np.random.default_rng(0), 100)
    assert found.labels.tolist() == target.labels[1:].tolist()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def changed(**changes):
    """A step whose labels are changed so."""

    def step(picture, target, random):
        values = {
            name: change(target) if callable(change) else change for name, change in changes.items()
        }
        return picture, replace(target, **values)

    return step


def masks_with(*, window=None, origins=None):
    def change(target):
        windows = list(target.masks.windows)
        if window is not None:
            windows[0] = window
        return Bitmaps(windows, target.masks.origins if origins is None else origins)

    return change


FAULTS = [
    (lambda p, t, r: None, "returned NoneType, expected a tuple (picture, Instances)"),
    (lambda p, t, r: p, "returned uint8 [3, 40, 60], expected a tuple"),
    (lambda p, t, r: (p, t, r), "returned tuple of 3, expected a tuple (picture, Instances)"),
    (lambda p, t, r: (p / 255, t), "returned float32 [3, 40, 60] as the picture, expected uint8"),
    (lambda p, t, r: (p[0], t), "returned uint8 [40, 60] as the picture, expected uint8 [3, H, W]"),
    (lambda p, t, r: (p[:, :0], t), "returned uint8 [3, 0, 60] as the picture"),
    (lambda p, t, r: (p.permute(1, 2, 0), t), "returned uint8 [40, 60, 3] as the picture"),
    (lambda p, t, r: (p.numpy(), t), "returned ndarray as the picture"),
    (lambda p, t, r: (p, t.boxes), "as the labels, expected Instances"),
    (lambda p, t, r: (p[:, ::2], t), "labels of size (40, 60) with a picture of size (20, 60)"),
    (changed(labels=lambda t: t.labels.float()), "as labels, expected int64 [N]"),
    (changed(labels=lambda t: t.labels + 50), "a label is not in 0..59"),
    (changed(labels=lambda t: -t.labels), "a label is not in 0..59"),
    (changed(labels=lambda t: t.labels[1:]), "4 masks for 3 labels"),
    (changed(masks=None), "returned NoneType as masks, expected Bitmaps"),
    (changed(masks=lambda t: t.masks.dense(t.size)), "returned uint8 [4, 40, 60] as masks"),
    (changed(masks=masks_with(origins=torch.zeros(4, 2))), "float32 [4, 2] as origins"),
    (changed(masks=masks_with(origins=torch.zeros(3, 2).long())), "origins of shape [3, 2] for 4"),
    (
        changed(masks=masks_with(window=torch.ones(2, 2))),
        "mask 0 is float32 [2, 2], expected uint8",
    ),
    (changed(masks=masks_with(window=torch.ones(4).byte())), "mask 0 is uint8 [4], expected uint8"),
    (
        changed(masks=masks_with(window=torch.full((2, 2), 255).byte())),
        "mask 0 holds 255, expected",
    ),
    (changed(masks=masks_with(window=torch.ones(41, 2).byte())), "mask 0 reaches outside"),
    (changed(masks=masks_with(origins=torch.full((4, 2), -1))), "mask 0 reaches outside"),
]


@pytest.mark.parametrize(("step", "words"), FAULTS, ids=[words[:40] for _, words in FAULTS])
def test_a_result_that_cannot_be_used_is_one_line_with_the_name_of_the_step(folder, step, words):
    with pytest.raises(InputError) as caught:
        items_of(folder, transform=step)[2]
    line = str(caught.value)
    assert line.startswith(f"{folder / '2.png'}: transform {__name__}.{step.__qualname__}: ")
    assert words in line
    assert "\n" not in line


def test_a_fault_of_a_step_keeps_its_own_traceback(folder):
    def broken(picture, target, random):
        return {}["key"]

    with pytest.raises(KeyError, match="key"):
        items_of(folder, transform=broken)[2]


def halve(picture, target, random):
    return picture[:, ::2], target


def test_a_step_that_cannot_be_used_is_one_line_from_a_worker_and_from_training(folder, tmp_path):
    dataset, recipe = CocoSet(folder / "set.json"), STILL.model_copy(update={"workers": 1})
    loader = train_loader(dataset, recipe, batch_size=1, seed=0, transform=halve)
    line = None
    try:
        list(loader)
    except InputError as error:
        line = str(error)
    assert "transform test_augment.halve: labels of size (40, 60)" in line
    assert "\n" not in line
    assert pickle.loads(pickle.dumps(items_of(folder, transform=halve))).transform is halve
    model = {"backbone": "test_efficientnet_gn.r160_in1k", "channels": 16}
    values = {
        "model": {"method": "mask_rcnn", "options": model},
        "data": {"train": folder / "set.json", "short_side": 40, "long_side": 60, "workers": 0},
        "train": {"steps": 1, "lr": 0.01},
    }
    with pytest.raises(InputError, match=r"transform test_augment\.halve: labels of size"):
        train(Recipe.parse(values, "test"), tmp_path / "run", transform=halve)


# ------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("settings_", "line"),
    [
        (["jitter=[0.1, 2]"], "data.jitter: needs crop, the side of the square"),
        (["jitter=[2, 0.1]", "crop=64"], "data.jitter: the smaller multiple comes first, not [2.0"),
        (["jitter=[0, 2]", "crop=64"], "data.jitter.0: Input should be greater than 0"),
        (["jitter=[0.5]", "crop=64"], "data.jitter.1: Field required"),
        (["jitter=[1, 2, 3]", "crop=64"], "data.jitter: Tuple should have at most 2 items"),
        (["jitter=0.5", "crop=64"], "data.jitter: Input should be a valid tuple"),
        (["jitter=[.nan, 2]", "crop=64"], "data.jitter.0: Input should be"),
        (["crop=0"], "data.crop: Input should be greater than 0"),
        (["crop=-5", "jitter=[1, 2]"], "data.crop: Input should be greater than 0"),
        (["crop=2.5"], "data.crop: Input should be a valid integer"),
        (["copy_paste=-0.1"], "data.copy_paste: Input should be greater than or equal to 0"),
        (["copy_paste=1.5"], "data.copy_paste: Input should be less than or equal to 1"),
        (["copy_paste_blend=7"], "data.copy_paste_blend: Input should be a valid boolean"),
        (["colour=-1"], "data.colour: Input should be greater than or equal to 0"),
        (["colour=2"], "data.colour: Input should be less than or equal to 1"),
        (["color=0.5"], "data.color: unexpected keyword (did you mean colour?)"),
        (["flip=1.1"], "data.flip: Input should be less than or equal to 1"),
        (["flip_vertical=-1"], "data.flip_vertical: Input should be greater than or equal to 0"),
        (["rotate90=maybe"], "data.rotate90: Input should be a valid boolean"),
        (["group_by_aspect=2"], "data.group_by_aspect: Input should be a valid boolean"),
        (["repeat_threshold=0"], "data.repeat_threshold: Input should be greater than 0"),
        (["repeat_threshold=2"], "data.repeat_threshold: Input should be less than or equal to 1"),
        (["repeats=0"], "data.repeats: Input should be greater than 0"),
        (["repeats=1.5"], "data.repeats: Input should be a valid integer"),
        (["transform=my.module.step"], "data.transform: unexpected keyword"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line_with_its_path(settings_, line):
    recipe = Recipe.parse({"model": {"method": "brefine"}, "train": {"steps": 1, "lr": 1}}, "test")
    with pytest.raises(InputError) as caught:
        recipe.with_settings([f"data.{setting}" for setting in settings_])
    assert f": {line}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("data.") == 2  # one fault, and the setting that has it


def test_augmentation_is_off_unless_asked_for():
    plain = DataRecipe()
    assert (plain.crop, plain.jitter, plain.repeat_threshold) == (None, None, None)
    assert (plain.flip_vertical, plain.copy_paste, plain.colour, plain.repeats) == (0, 0, 0, 1)
    assert not plain.rotate90
    assert not plain.copy_paste_blend
    recipe = DataRecipe(crop=1024, jitter=(0.1, 2), copy_paste=0.5)
    assert DataRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
