"""Pictures with their labels drawn in, as they are and as training sees them."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from brefine.data.coco import CocoSet
from brefine.data.loader import TrainSet, read_labelled
from brefine.data.read import read
from brefine.data.transforms import resize
from brefine.draw import chips, colour, inline, lettering, overlay, page, side_by_side
from brefine.files import replacing, require_empty
from brefine.outlines import polygons
from brefine.progress import track
from brefine.recipe import DataRecipe
from brefine.rle import decode
from brefine.structures import Category, InputError, Instances

DRAWS = 3  # augmented versions of each picture
FILL = 0.25  # opacity of the masks
CELL = 240, 320  # largest height and width of a picture in the grid
NARROWEST = 100  # pixels of a cell in the grid
WIDEST = 720  # pixels of the long side in the page
NAMED = 15  # objects; in a picture with more, names would hide them
#: keys of a recipe that change no picture
SETTINGS = {
    "train",
    "val",
    "images",
    "val_images",
    "workers",
    "group_by_aspect",
    "repeat_threshold",
    "repeats",
}

_STYLE = """
.hit { fill: transparent; pointer-events: all; } .hit:hover { stroke: #fff; stroke-width: 2.5; }
.crowd { fill: transparent; pointer-events: all; stroke: #fff; stroke-width: 1.5;
  stroke-dasharray: 5 4; }
.panel h3 span { color: var(--dim); font-weight: 400; }
.panel details { margin: .6rem 0 0; font-size: .82rem; }
.panel h3 { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class _Shown:
    """What is shown of a picture, drawn: pictures themselves may be large.

    Attributes:
        index: in the set.
        labels: of its objects.
        cells: of the grid.
        panel: of the page.
    """

    index: int
    labels: set[int]
    cells: list[Image.Image]
    panel: str


def preview(
    path: Path | str,
    out: Path | str = "preview",
    *,
    count: int = 12,
    seed: int = 0,
    recipe: DataRecipe | None = None,
    images: Path | str | None = None,
    split: str = "train",
) -> None:
    """Write ``preview.png``, a grid, and ``preview.html``, a page that needs nothing beside it.

    Each row is one picture: its labels as they are, then what training would see of it in the
    first epochs. The page names picture and annotations by their ids, and shows crowd regions.

    Args:
        path: a set of any format, as ``data.read.read`` takes it.
        out: new or empty folder.
        count: most pictures to show; they are chosen to show every class.
        seed: of the choice and of the augmentation, as in ``train.seed``.
        recipe: how training changes pictures; None: the defaults.
        images: folder of the pictures, if not where the format has them.
        split: what to read of a set that has parts.

    Raises:
        InputError: ``out`` has content, there is no picture, or one cannot be read.
    """
    out, recipe = Path(out), recipe or DataRecipe()
    require_empty(out)
    dataset = read(path, images, split=split)
    if not len(dataset):
        raise InputError(f"{path}: has no pictures to show")
    train_set = TrainSet(dataset, recipe, seed)
    chosen = choose(dataset, count, seed)
    shown = [_show(train_set, index) for index in track(chosen, "drawing", len(chosen))]
    labels = sorted(set().union(*(each.labels for each in shown)))
    name = dataset.path.absolute().name
    head = _head(dataset, name, len(shown), labels, recipe)
    with replacing(out) as aside:
        aside.mkdir()
        text = page(f"{name}: preview", [*head, *(each.panel for each in shown)], _STYLE)
        (aside / "preview.html").write_text(text, encoding="utf-8")
        _grid(dataset, shown, labels).save(aside / "preview.png")


def choose(dataset: CocoSet, count: int, seed: int) -> list[int]:
    """Pictures that show as many classes as they can, in the order of the set.

    Each one adds as many new classes as any picture does; when there are no new ones, the rest is
    drawn at random. ``count`` pictures show at least ``count`` classes, if there are so many.

    Args:
        dataset: pictures and labels.
        count: most pictures.
        seed: decides between pictures that are alike.
    """
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    classes = {index: _classes(dataset, index) for index in order}
    missing = set().union(*classes.values()) if classes else set()
    chosen: list[int] = []
    while order and len(chosen) < count:
        best = max(order, key=lambda index: len(classes[index] & missing))
        missing -= classes[best]
        chosen.append(best)
        order.remove(best)
    return sorted(chosen)


def _classes(dataset: CocoSet, index: int) -> set[int]:
    entries = dataset.annotations(index)
    return {entry["category_id"] for entry in entries if not entry.get("iscrowd")}


def _draw(
    picture: Tensor,
    target: Instances,
    categories: Sequence[Category],
    box: tuple[int, int],
    *,
    names: bool,
) -> Image.Image:
    """A picture with its labels, as large as fits into ``box`` (height, width)."""
    height, width = target.size
    scale = min(box[0] / height, box[1] / width)
    sides = (max(1, round(side * scale)) for side in (min(height, width), max(height, width)))
    shown, objects = resize(picture, target, *sides)
    assert objects is not None
    return overlay(shown, objects, categories, names=names, fill=FILL)


def _show(train_set: TrainSet, index: int) -> _Shown:
    """Read a picture, as it is and as training draws it, and draw its part of grid and page."""
    dataset = train_set.dataset
    views = [
        (read_labelled(dataset, index), dataset.target(index)),
        *(train_set[epoch, index] for epoch in range(DRAWS)),
    ]
    cells = [_draw(*view, dataset.categories, CELL, names=False) for view in views]
    labels = set(views[0][1].labels.tolist())
    return _Shown(index, labels, cells, _panel(dataset, index, views))


def _grid(dataset: CocoSet, shown: Sequence[_Shown], labels: Sequence[int]) -> Image.Image:
    """A row for each picture, below the legend."""
    rows = []
    for each in shown:
        height = max(cell.height for cell in each.cells)
        cells = []
        for cell in each.cells:  # of one height, and as wide as their titles need
            cells.append(Image.new("RGB", (max(cell.width, NARROWEST), height), "white"))
            cells[-1].paste(cell)
        name = dataset.pictures[each.index].file.name
        titles = [name, *(f"epoch {epoch}" for epoch in range(1, DRAWS + 1))]
        rows.append(side_by_side(cells, titles))
    legend = _legend(dataset.categories, labels, max(row.width for row in rows))
    height = legend.height + sum(row.height for row in rows)
    sheet = Image.new("RGB", (legend.width, height), "white")
    top = 0
    for part in (legend, *rows):
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _legend(categories: Sequence[Category], labels: Sequence[int], width: int) -> Image.Image:
    """Colours and names of classes, as many lines as they take; nothing for an only class."""
    line, gap = 20, 8
    x, y, places = gap, gap, []
    for label in labels if len(categories) > 1 else ():
        name, font = lettering(categories[label].name, 13)
        length = round(font.getlength(name)) + 32
        if x + length > width and x > gap:
            x, y = gap, y + line
        places.append((label, name, font, x, y))
        x += length
    sheet = Image.new("RGB", (width, y + line if places else gap), "white")
    pen = ImageDraw.Draw(sheet)
    for label, name, font, x, y in places:
        pen.rectangle((x, y, x + 12, y + 12), colour(label))
        pen.text((x + 17, y - 2), name, "black", font)
    return sheet


def _head(
    dataset: CocoSet, name: str, count: int, labels: Sequence[int], recipe: DataRecipe
) -> list[str]:
    """Title, what is shown and how it is augmented."""
    categories = dataset.categories
    used = set().union(*(_classes(dataset, index) for index in range(len(dataset))))
    hidden = [c.name for i, c in enumerate(categories) if c.id in used and i not in labels]
    intro = (
        f"{count} of {len(dataset)} pictures and {len(labels)} of {len(categories)} classes: "
        f"the labels as they are, and what training sees in its first {DRAWS} epochs."
    )
    if hidden:
        names = ", ".join(hidden[:10]) + (", ..." if len(hidden) > 10 else "")
        intro += f" Not shown: {names}; a larger --count shows more."
    settings = recipe.model_dump(mode="json", exclude=SETTINGS)
    shown = {name: _text(value) for name, value in settings.items()}
    rows = "".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in shown.items())
    legend = chips(categories, labels) if len(categories) > 1 else "Colours tell objects apart."
    return [
        f"<header><h1>{html.escape(name)}</h1><p>{html.escape(intro)}</p></header>",
        f"<section><h2>Augmentation</h2><dl>{rows}</dl></section>",
        f'<section><h2>Pictures</h2><p class="legend">{legend}</p>'
        '<p class="legend">Point at an object for its id. Crowd regions are dashed: training and '
        "evaluation ignore them.</p></section>",
    ]


def _text(value: object) -> str:
    """A recipe's value in words."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or value is False:
        return "no"
    return "yes" if value is True else str(value)


def _panel(dataset: CocoSet, index: int, views: Sequence[tuple[Tensor, Instances]]) -> str:
    """One picture: its labels with ids, and its augmented versions in a row."""
    picture, categories = dataset.pictures[index], dataset.categories
    names = {category.id: category.name for category in categories}
    entries = dataset.annotations(index)
    marks = []
    for entry in entries:
        runs = decode(entry["segmentation"], picture.size)
        window, origin = runs.window()
        crowd = bool(entry.get("iscrowd"))
        kind = "crowd region" if crowd else "annotation"
        title = html.escape(f"{kind} {entry.get('id', '')}: {names[entry['category_id']]}")
        path = "".join(
            "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in ring.tolist()) + "z"
            for ring in polygons(window.numpy(), origin, tolerance=1)
        )
        style = "crowd" if crowd else "hit"
        mark = f'<path class="{style}" fill-rule="evenodd" d="{path}"><title>{title}</title></path>'
        marks.append((not crowd, -runs.area(), mark))
    # What is drawn last is on top: the smallest object, so that each can be pointed at.
    drawn = "".join(mark for *_, mark in sorted(marks, key=lambda mark: mark[:2]))
    cells = []
    for number, (pixels, target) in enumerate(views):
        height, width = target.size
        scale = min(1.0, WIDEST / max(height, width))
        box = max(1, round(height * scale)), max(1, round(width * scale))
        image = _draw(pixels, target, categories, box, names=len(target) <= NAMED)
        caption = f"epoch {number}" if number else "labels"
        cells.append(
            f"<figure><figcaption>{caption}, {height} x {width}</figcaption>"
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{caption}">'
            f'<image href="{inline(image)}" width="{width}" height="{height}"/>'
            f"{'' if number else drawn}</svg></figure>"
        )
    counts = Counter(names[e["category_id"]] for e in entries if not e.get("iscrowd"))
    told = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "no objects"
    if crowds := len(entries) - counts.total():
        told += f", {crowds} crowd region{'s' if crowds > 1 else ''}"
    ids = ", ".join(f"{entry.get('id', '')} {names[entry['category_id']]}" for entry in entries)
    details = f"<details><summary>annotations</summary>{html.escape(ids)}</details>" if ids else ""
    return (
        f"<section class=panel><h3>{html.escape(picture.file.name)} "
        f"<span>id {html.escape(str(picture.id))}: {html.escape(told)}</span></h3>"
        f'<div class="grid" style="--columns:{len(cells)}">{"".join(cells)}</div>'
        f"{details}</section>"
    )
