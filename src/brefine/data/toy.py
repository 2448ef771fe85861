"""Toy pictures with exact labels, for the demo, tests and benchmarks: nothing to download.

Four kinds of objects whose outlines a coarse mask cannot follow: stars (spikes), clouds (lobes),
gears (teeth and a hole), leaves (thin tips). Colours and textures say nothing about the kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from brefine.files import replacing, require_empty
from brefine.parts.masks import encode
from brefine.progress import track
from brefine.structures import Category, InputError

Array = NDArray[Any]  # of floats

#: with gaps, as real sets have them
CATEGORIES = [
    Category(3, "star"),
    Category(7, "cloud"),
    Category(8, "gear"),
    Category(20, "leaf"),
]
OVERSAMPLING = 4  # sub-pixels a pixel and axis, for coverage and labels
MIN_VISIBLE = 0.3  # of an object's own area; a picture never shows less of an object
MIN_PIXELS = 48  # visible pixels of the smallest object


def draw(
    folder: Path | str,
    *,
    train: int = 200,
    val: int = 50,
    size: tuple[int, int] = (256, 320),
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Write ``images/*.png``, ``train.json`` and ``val.json`` (COCO) to a new folder.

    A picture depends on the seed, its split and its number alone, so more pictures of one split
    change nothing in the others; the same seed gives the same bytes.

    Args:
        folder: made; may exist if it is empty.
        train: number of training pictures.
        val: number of validation pictures.
        size: (height, width) of every picture, at least 64.
        seed: of everything.
        progress: show it.

    Raises:
        InputError: the folder has content, or an impossible argument.
    """
    folder = Path(folder)
    require_empty(folder)
    if min(size) < 64 or max(size) > 4096:
        raise InputError(f"size {size[0]} x {size[1]}: expected sides of 64 to 4096 pixels")
    if min(train, val, seed) < 0:
        raise InputError("train, val and seed: expected numbers of at least 0")
    with replacing(folder) as aside:
        (aside / "images").mkdir(parents=True)
        jobs = [(0, number) for number in range(train)] + [(1, number) for number in range(val)]
        sets = {"train": _empty_set(), "val": _empty_set()}
        for split, number in track(jobs, "drawing", len(jobs)) if progress else jobs:
            name = list(sets)[split]
            random = np.random.default_rng((seed, split, number))
            pixels, objects = draw_picture(size, random)
            file = f"{name}_{number:05}.png"
            Image.fromarray(pixels).save(aside / "images" / file, compress_level=3)
            _append(sets[name], file, size, objects)
        for name, content in sets.items():
            (aside / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _empty_set() -> dict[str, Any]:
    return {
        "info": {"description": "brefine toy pictures", "version": "1"},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [category._asdict() for category in CATEGORIES],
    }


def _append(
    content: dict[str, Any],
    file: str,
    size: tuple[int, int],
    objects: list[tuple[int, NDArray[np.bool_]]],
) -> None:
    """Add one picture and its objects, with COCO's ids from 1."""
    image_id = len(content["images"]) + 1
    content["images"].append(
        {"id": image_id, "file_name": file, "height": size[0], "width": size[1]}
    )
    for label, mask in objects:
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        y1, y2, x1, x2 = int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": CATEGORIES[label].id,
                "segmentation": encode(mask[y1:y2, x1:x2], (x1, y1), size),
                "area": int(mask.sum()),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0,
            }
        )


@dataclass(frozen=True)
class Shape:
    """An object that was placed.

    Attributes:
        label: row of ``CATEGORIES``.
        origin: (x, y) of the window, maybe outside of the picture.
        coverage: ``[h, w]`` 0..1, the covered part of each pixel.
    """

    label: int
    origin: tuple[int, int]
    coverage: Array


def draw_picture(
    size: tuple[int, int], random: Generator
) -> tuple[NDArray[np.uint8], list[tuple[int, NDArray[np.bool_]]]]:
    """One picture and its objects.

    Args:
        size: (height, width).
        random: of everything.

    Returns:
        ``[H, W, 3]`` uint8, and (label, visible mask ``[H, W]``) of each object. A pixel belongs
        to the topmost object that covers at least half of it.
    """
    shapes, masks = _place(size, random)
    canvas = _background(size, random)
    light = random.uniform(0, 2 * math.pi)
    for shape in shapes:
        _paint(canvas, shape, light, random)
    return _photograph(canvas, random), [
        (shape.label, mask) for shape, mask in zip(shapes, masks, strict=True)
    ]


# ---------------------------------------------------------------------------- outlines


def _star(random: Generator) -> list[Array]:
    """5 to 9 straight spikes of unequal length."""
    spikes = int(random.integers(5, 10))
    angles = np.arange(2 * spikes) * (math.pi / spikes)
    angles += random.uniform(-0.12, 0.12, 2 * spikes) * math.pi / spikes
    radii = np.where(
        np.arange(2 * spikes) % 2,
        random.uniform(0.34, 0.52),
        random.uniform(0.8, 1, 2 * spikes),
    )
    return [_polar(angles, radii)]


def _cloud(random: Generator) -> list[Array]:
    """A round outline with lobes of smooth noise."""
    angles = np.linspace(0, 2 * math.pi, 180, endpoint=False)
    radii = np.ones_like(angles)
    for waves in range(2, 5):
        radii += random.uniform(0, 0.13) * np.cos(waves * angles + random.uniform(0, 6.3))
    lobes = int(random.integers(6, 12))
    phase = lobes * angles + random.uniform(0, 6.3) + 0.8 * np.sin(angles + random.uniform(0, 6.3))
    # |sin| has round lobes and sharp valleys between them.
    radii += random.uniform(0.16, 0.26) * np.abs(np.sin(phase / 2))
    return [_polar(angles, radii / radii.max())]


def _gear(random: Generator) -> list[Array]:
    """7 to 13 teeth around a disc with a hole."""
    teeth = int(random.integers(7, 14))
    root = random.uniform(0.7, 0.8)
    pitch = 2 * math.pi / teeth
    corners = np.array([0.0, 0.3, 0.42, 0.82]) + 0.06  # root, root, tip, tip of one pitch
    angles = (np.arange(teeth)[:, None] + corners).ravel() * pitch
    radii = np.tile([root, root, 1.0, 1.0], teeth)
    circle = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    if random.random() < 0.3:  # a square or six-sided hole
        circle = np.linspace(0, 2 * math.pi, int(random.choice([4, 6])), endpoint=False)
    hole = _polar(circle + random.uniform(0, 6.3), np.full(len(circle), random.uniform(0.28, 0.5)))
    return [_polar(angles, radii), hole]


def _leaf(random: Generator) -> list[Array]:
    """A bent blade with a thin tip at both ends, its edge sawn or smooth."""
    t = np.linspace(0, 1, 90)
    width = random.uniform(0.3, 0.48) * np.sin(math.pi * t ** random.uniform(0.7, 1.2)) ** 1.35
    if random.random() < 0.7:
        saw = (t * random.integers(7, 12)) % 1
        width *= 1 - random.uniform(0.15, 0.3) * saw
    width += 0.012
    bend = random.uniform(-1.5, 1.5)  # radians from one end to the other
    heading = (t - 0.5) * bend
    step = np.stack([np.cos(heading), np.sin(heading)], 1)
    spine = step.cumsum(0)
    spine -= (spine[0] + spine[-1]) / 2
    normal = np.stack([-step[:, 1], step[:, 0]], 1)
    spine *= 2 / np.linalg.norm(spine[-1] - spine[0])
    sides = [spine + normal * width[:, None], spine - normal * width[:, None]]
    outline = np.concatenate([sides[0], sides[1][::-1]])
    return [(outline / np.linalg.norm(outline, axis=1).max()).astype(np.float32)]


def _polar(angles: NDArray[Any], radii: NDArray[Any]) -> Array:
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    return np.asarray(points, dtype=np.float32)


#: the outline, then holes, within radius 1; in the order of CATEGORIES
OUTLINES: list[Callable[[Generator], list[Array]]] = [_star, _cloud, _gear, _leaf]


# ---------------------------------------------------------------------------- placing


def _place(size: tuple[int, int], random: Generator) -> tuple[list[Shape], list[NDArray[np.bool_]]]:
    """2 to 7 shapes, lowest first, and their visible masks ``[H, W]``."""
    height, width = size
    shapes: list[Shape] = []
    masks: list[NDArray[np.bool_]] = []
    areas: list[float] = []
    wanted = int(random.integers(2, 8))
    for attempt in range(60):
        if len(shapes) == wanted or (len(shapes) >= 2 and attempt >= 24):
            break
        shape = _make(_diameter(min(size), random), size, random)
        mask = np.zeros(size, dtype=bool)
        x, y = shape.origin
        h, w = shape.coverage.shape
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if x1 >= x2 or y1 >= y2:
            continue
        mask[y1:y2, x1:x2] = shape.coverage[y1 - y : y2 - y, x1 - x : x2 - x] >= 0.5
        area = float(shape.coverage.sum())
        if mask.sum() < max(MIN_PIXELS, 0.5 * area):
            continue
        left = [old & ~mask for old in masks]
        if any(
            old.sum() < max(MIN_PIXELS, MIN_VISIBLE * whole)
            for old, whole in zip(left, areas, strict=True)
        ):
            continue
        shapes.append(shape)
        masks = [*left, mask]
        areas.append(area)
    return shapes, masks


def _diameter(side: int, random: Generator) -> float:
    """Pixels; half of the objects are larger than 0.44 of the picture's short side."""
    if random.random() < 0.5:
        return float(side * random.uniform(0.44, 0.98))
    return float(np.exp(random.uniform(math.log(16), math.log(max(0.44 * side, 20)))))


def _make(diameter: float, size: tuple[int, int], random: Generator) -> Shape:
    """A shape of some kind at some place, turned and a little squeezed."""
    label = int(random.integers(len(OUTLINES)))
    rings = OUTLINES[label](random)
    angle, turn = random.uniform(0, 2 * math.pi, 2)
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]], dtype=np.float32)
    cos, sin = math.cos(turn), math.sin(turn)
    second = np.array([[cos, -sin], [sin, cos]], dtype=np.float32)
    squeeze = np.diag([1, random.uniform(0.72, 1)]).astype(np.float32)
    matrix = diameter / 2 * rotation @ squeeze @ second
    x, y = (_centre(side, diameter, random) for side in (size[1], size[0]))
    rings = [ring @ matrix.T + np.array([x, y], dtype=np.float32) for ring in rings]
    low = np.floor(rings[0].min(0)).astype(int) - 1
    w, h = np.ceil(rings[0].max(0)).astype(int) + 1 - low
    image = Image.new("L", (int(w) * OVERSAMPLING, int(h) * OVERSAMPLING))
    pen = ImageDraw.Draw(image)
    for ring, value in zip(rings, [255] + [0] * (len(rings) - 1), strict=True):
        points = (ring - low) * OVERSAMPLING - 0.5
        pen.polygon(points.ravel().tolist(), fill=value)
    coverage = np.asarray(image.reduce(OVERSAMPLING), dtype=np.float32) / 255
    return Shape(label, (int(low[0]), int(low[1])), coverage)


def _centre(side: int, diameter: float, random: Generator) -> float:
    """Along one axis: mostly such that the object is inside, else anywhere."""
    margin = min(diameter / 2, side / 2) if random.random() < 0.75 else 0.04 * side
    return random.uniform(margin, side - margin)


# ---------------------------------------------------------------------------- painting


def _noise(size: tuple[int, int], random: Generator, coarse: float, octaves: int) -> Array:
    """Smooth noise in 0..1: ``octaves`` grids, the first with cells of ``coarse`` pixels."""
    height, width = size
    total = np.zeros(size, dtype=np.float32)
    for octave in range(octaves):
        cell = max(coarse / 2**octave, 1)
        grid = random.random((math.ceil(height / cell) + 2, math.ceil(width / cell) + 2))
        image = Image.fromarray(grid.astype(np.float32))
        total += np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    low, high = total.min(), total.max()
    return np.asarray((total - low) / max(float(high - low), 1e-6))


def _colour(random: Generator, vivid: float = 0.9) -> Array:
    """RGB in 0..1, neither black nor white; ``vivid`` is the greatest saturation."""
    hue, saturation = random.random(), random.uniform(0.1, vivid)
    channels = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    colour = random.uniform(0.22, 0.95) * (1 - saturation * (1 - channels))
    return np.asarray(colour, dtype=np.float32)


def _background(size: tuple[int, int], random: Generator) -> Array:
    """``[H, W, 3]`` in 0..1: noise between colours, a gradient; soft discs, lines and specks."""
    height, width = size
    first = _colour(random, vivid=0.5) * 0.85
    second, third = (first + random.uniform(-0.25, 0.25, 3).astype(np.float32) for _ in "23")
    coarse = random.uniform(20, 110)
    canvas = first + (second - first) * _noise(size, random, coarse, 5)[:, :, None]
    veins = 1 - np.abs(2 * _noise(size, random, coarse * 0.7, 3) - 1)  # ridges of the noise
    canvas += (third - first) * (veins**4 * random.uniform(0, 0.9))[:, :, None]
    direction, slope = random.uniform(0, 2 * math.pi), random.uniform(0, 0.25)
    ys = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    xs = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None]
    canvas += (slope * (math.cos(direction) * xs + math.sin(direction) * ys))[:, :, None]

    discs, marks = Image.new("L", (width, height)), Image.new("L", (width * 2, height * 2))
    pen = ImageDraw.Draw(discs)
    for _ in range(random.integers(0, 5)):
        x, y, r = random.random(3) * [width, height, 0.15 * height] + [0, 0, 4]
        pen.ellipse((x - r, y - r, x + r, y + r), fill=int(random.integers(40, 150)))
    discs = discs.filter(ImageFilter.GaussianBlur(random.uniform(4, 9)))
    pen = ImageDraw.Draw(marks)
    for _ in range(random.integers(0, 7)):
        ends = (random.random(4) * [width, height, width, height] * 2).tolist()
        pen.line(ends, fill=int(random.integers(60, 200)), width=int(random.integers(1, 6)))
    for _ in range(random.integers(0, 40)):
        x, y, r = random.random(3) * [width * 2, height * 2, 3] + [0, 0, 1]
        pen.ellipse((x - r, y - r, x + r, y + r), fill=int(random.integers(60, 220)))
    for layer in (discs, marks.reduce(2)):
        alpha = np.asarray(layer, dtype=np.float32)[:, :, None] / 255
        canvas += (_colour(random) - canvas) * alpha * random.uniform(0.3, 0.8)
    return canvas


def _paint(canvas: Array, shape: Shape, light: float, random: Generator) -> None:
    """Shadow and object onto the canvas, in place."""
    height, width = canvas.shape[:2]
    diameter = max(shape.coverage.shape)
    pad = max(4, round(0.08 * diameter))
    cover = np.pad(shape.coverage, pad)
    h, w = cover.shape
    x, y = shape.origin[0] - pad, shape.origin[1] - pad
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    there = (slice(y1, y2), slice(x1, x2))
    here = (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))

    toward = np.array([math.cos(light), math.sin(light)])
    shift = (-toward * random.uniform(0.2, 0.6) * pad).round().astype(int)
    shadow = np.roll(_blur(cover, pad / 3), (shift[1], shift[0]), (0, 1))
    canvas[there] *= 1 - random.uniform(0.15, 0.5) * shadow[here][:, :, None]

    # A pillow: the blurred outline is its height, the slope towards the light its shading.
    relief = _blur(cover, max(1.0, 0.06 * diameter))
    dy, dx = np.gradient(relief)
    shade = (toward[0] * dx + toward[1] * dy) * -max(2.0, 0.11 * diameter)
    texture = _texture((h, w), random)
    local = canvas[there][cover[here] > 0.5].mean(0)
    body = _contrasting(local, random)
    paint = body * (1 + 0.9 * shade + texture)[:, :, None]
    alpha = cover[here][:, :, None]
    canvas[there] += (paint[here] - canvas[there]) * alpha


def _texture(size: tuple[int, int], random: Generator) -> Array:
    """Brightness around 0: noise, and sometimes stripes or dots."""
    h, w = size
    diameter = max(size)
    texture = (_noise(size, random, max(4, 0.3 * diameter), 4) - 0.5) * random.uniform(0.15, 0.5)
    kind = random.random()
    if kind < 0.5:
        angle = random.uniform(0, 2 * math.pi)
        period = random.uniform(0.08, 0.3) * diameter + 3
        ys, xs = np.mgrid[:h, :w].astype(np.float32) * (2 * math.pi / period)
        wave = np.sin(xs * math.cos(angle) + ys * math.sin(angle))
        if kind < 0.25:
            wave = wave * np.sin(ys * math.cos(angle) - xs * math.sin(angle))
        texture += np.tanh(3 * wave) * random.uniform(0.04, 0.16)
    return np.asarray(texture, dtype=np.float32)


def _contrasting(local: Array, random: Generator) -> Array:
    """A colour that differs from the one around."""
    best, most = local, -1.0
    for _ in range(12):
        colour = _colour(random)
        difference = colour - local
        luminance = abs(float(difference @ np.array([0.3, 0.59, 0.11])))
        distance = luminance + 0.4 * float(np.abs(difference).max())
        if distance > most:
            best, most = colour, distance
        if distance > 0.42:
            break
    return best


def _blur(values: Array, radius: float) -> Array:
    """Gaussian blur of values in 0..1."""
    image = Image.fromarray((values * 255).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(blurred, dtype=np.float32) / 255


def _photograph(canvas: Array, random: Generator) -> NDArray[np.uint8]:
    """Slight blur, uneven light and sensor noise."""
    image = Image.fromarray((canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.7)))
    noise = random.standard_normal(canvas.shape, dtype=np.float32) * random.uniform(1.5, 7)
    pixels = np.asarray(blurred, dtype=np.float32) * random.uniform(0.9, 1.08) + noise
    return (pixels.clip(0, 255) + 0.5).astype(np.uint8)
