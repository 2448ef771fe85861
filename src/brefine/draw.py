"""Pictures for people: overlays, pictures side by side, and a report page in one HTML file."""

from __future__ import annotations

import base64
import colorsys
import html
import io
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from brefine.files import replacing
from brefine.metrics.boundary import Mask, band_width, boundary_band, mask_iou
from brefine.metrics.tables import COLUMNS, table_cells
from brefine.rle import decode
from brefine.structures import Category, InputError, Instances

if TYPE_CHECKING:  # an exported model's results are drawn, too, where there is no torch
    from torch import Tensor

    from brefine.evaluate import Report

Colour = tuple[int, int, int]
Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, told apart by colour-blind people too; black is left out.
COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
TRUE, FOUND = "#ffffff", "#ff7a1a"  # outlines in the zooms
ZOOMS = 2  # objects a picture
WIDEST = 720  # pixels of a picture in the page
#: with more letters than Pillow's own, of Linux, macOS and Windows
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")


@dataclass(frozen=True)
class Panel:
    """One picture of a report.

    Attributes:
        name: shown above it.
        picture: ``[3, H, W]`` uint8.
        label: true objects, as COCO results in the picture's size (`parts.masks.to_records`).
        found: for each method its COCO results, those below its threshold left out.
    """

    name: str
    picture: Tensor
    label: Records
    found: Mapping[str, Records]


def colour(index: int) -> Colour:
    """The RGB colour of label or object ``index``: seven distinct ones, then shades on a wheel."""
    if index < len(COLOURS):
        return COLOURS[index]
    hue = index * 0.618034 % 1  # the golden ratio keeps neighbours far apart
    light = (0.45, 0.62, 0.78)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def overlay(
    picture: Tensor | NDArray[np.uint8],
    objects: Records | Instances,
    categories: Sequence[Category],
    *,
    names: bool = True,
    fill: float = 0.5,
) -> Image.Image:
    """A picture with its objects: half-transparent masks, outlines, and names with scores.

    Inside a mask the picture turns gray, so that its colour is the legend's whatever lies below.
    The best score is drawn last, on top. Colours go by label, or by object when there is one
    class only; names are then left out. Lines and letters grow with the picture; in one too
    small for letters (short side below 64 pixels) there are none.

    Args:
        picture: ``[3, H, W]`` uint8, or an array ``[H, W, 3]``.
        objects: COCO results in the picture's size, or Instances in its frame.
        categories: the category table.
        names: write names and scores.
        fill: opacity of the masks, 0..1.

    Raises:
        InputError: a mask is not of the picture's size, or its category is not in the table.
    """
    pixels = pixels_of(picture)
    size = (pixels.shape[0], pixels.shape[1])
    if isinstance(objects, Instances):
        from brefine.parts.masks import to_records

        objects = to_records(objects, 0, categories, size)
    label = {category.id: i for i, category in enumerate(categories)}
    for record in objects:
        if record["category_id"] not in label:
            known = "give the table that the results were made with"
            raise InputError(f"category_id {record['category_id']} is not in the table: {known}")
    width = max(1, round(math.hypot(*size) / 450))
    order = sorted(range(len(objects)), key=lambda i: objects[i].get("score", 1.0))
    colours = [
        colour(i if len(categories) == 1 else label[r["category_id"]])
        for i, r in enumerate(objects)
    ]
    shapes = shapes_of(objects, size)
    for i in order:
        window, (x, y) = shapes[i]
        part = pixels[y : y + window.shape[0], x : x + window.shape[1]]
        inside = window.astype(bool)
        gray = part[inside] @ np.array([0.299, 0.587, 0.114])
        part[inside] = np.round(gray[:, None] * (1 - fill) + np.array(colours[i]) * fill)
        part[boundary_band(window, width).astype(bool)] = _lighten(colours[i])
    image = Image.fromarray(pixels)
    if names and min(size) >= 64:
        letters = ImageDraw.Draw(image)
        for i in order:
            record, (window, corner) = objects[i], shapes[i]
            # the name says nothing where there is one class, and hides small objects
            text = categories[label[record["category_id"]]].name if len(categories) > 1 else ""
            if record.get("score", 1.0) < 1:
                text = f"{text} {record['score']:.2f}".lstrip()
            if window.size and text:
                peak = corner[0] + int(window[0].nonzero()[0].mean()), corner[1]
                _write(letters, text, peak, size, colours[i])
    return image


def side_by_side(
    pictures: Sequence[Image.Image], titles: Sequence[str] | None = None, gap: int = 8
) -> Image.Image:
    """Pictures in a row at one height (the lowest one's), on white, with titles above.

    Raises:
        InputError: there is no picture, or not one title for each.
    """
    if not pictures:
        raise InputError("no pictures to put side by side")
    if titles is not None and len(titles) != len(pictures):
        raise InputError(f"{len(titles)} titles for {len(pictures)} pictures: give one for each")
    height = min(picture.height for picture in pictures)
    resized = [
        p.convert("RGB").resize((max(1, round(p.width * height / p.height)), height))
        if p.height != height
        else p.convert("RGB")
        for p in pictures
    ]
    letter = max(11, round(height / 24))
    top = round(letter * 1.8) if titles is not None else 0
    width = sum(p.width for p in resized) + gap * (len(resized) + 1)
    page = Image.new("RGB", (width, height + top + 2 * gap), "white")
    pen, x = ImageDraw.Draw(page), gap
    for i, picture in enumerate(resized):
        page.paste(picture, (x, gap + top))
        if titles is not None:
            title, font = lettering(titles[i], letter)
            while font.getlength(title) > picture.width and len(title) > 4:
                title = f"...{title[4:]}"  # names differ at their ends
            pen.text((x, gap), title, "black", font)
        x += picture.width + gap
    return page


def report(
    path: Path | str,
    title: str,
    table: Mapping[str, Report],
    panels: Sequence[Panel],
    categories: Sequence[Category],
    *,
    settings: Mapping[str, object] | None = None,
    intro: str = "",
) -> None:
    """Write a report as one HTML file that needs nothing beside it.

    Args:
        path: the file to write.
        title: head of the page.
        table: one report a method, in the order of the columns.
        panels: the pictures to show.
        categories: the category table.
        settings: what the runs have in common, shown as a list.
        intro: a paragraph below the title, plain text.

    Raises:
        InputError: the file cannot be written, or a record does not fit its picture.
    """
    body = [f"<header><h1>{html.escape(title)}</h1>"]
    if intro:
        body.append(f"<p>{html.escape(intro)}</p>")
    body.append("</header>")
    if settings:
        rows = "".join(
            f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd></div>"
            for key, value in settings.items()
        )
        body.append(f"<section><h2>Settings</h2><dl>{rows}</dl></section>")
    body.append(_results(table))
    if panels:
        body.append(f"<section><h2>Pictures</h2>{legend(categories)}</section>")
        body += [show(panel, categories) for panel in panels]
    with replacing(path) as aside:
        aside.write_text(page(title, body), encoding="utf-8")


def page(title: str, body: Sequence[str], style: str = "") -> str:
    """A whole HTML page, light or dark as the reader's system is.

    Args:
        title: plain text.
        body: pieces of HTML. ``.panel`` is a card, ``.grid`` in it a row of ``<figure>``s of
            ``--columns``; ``.legend`` is a line of ``chips``.
        style: more of a style sheet.
    """
    head, _, tail = _PAGE.replace("{title}", html.escape(title)).partition("{body}")
    return head.replace("</style>", f"{style}</style>") + "\n".join(body) + tail


def pixels_of(picture: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[H, W, 3]``, a copy."""
    if isinstance(picture, np.ndarray):
        return picture.copy()
    return picture.detach().cpu().permute(1, 2, 0).contiguous().numpy().astype(np.uint8)


def shapes_of(records: Records, size: tuple[int, int]) -> list[Mask]:
    """Masks in windows.

    Raises:
        InputError: a segmentation is not one of a picture of ``size`` (height, width).
    """
    shapes: list[Mask] = []
    for i, record in enumerate(records):
        try:
            window, corner = decode(record["segmentation"], size).pixels()
        except ValueError as error:
            raise InputError(f"record {i} does not fit its picture: {error}") from None
        shapes.append((window, corner))
    return shapes


@lru_cache(maxsize=32)
def _font(size: int, ascii: bool) -> ImageFont.FreeTypeFont:
    for name in () if ascii else FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def lettering(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Text as it can be drawn, and a font of so many pixels to draw it with.

    The font that comes with Pillow has little more than ASCII, so for other texts one of the
    system is taken. A letter that is in neither loses its accent, or becomes a question mark.
    """
    font = _font(size, text.isascii())
    if text.isascii():
        return text, font
    none = bytes(font.getmask("\uffff"))

    def known(letter: str) -> str:
        plain = unicodedata.normalize("NFKD", letter)[:1]
        fits = (each for each in (letter, plain) if bytes(font.getmask(each)) != none)
        return next(fits, "?")

    return "".join(map(known, text)), font


def _lighten(shade: Colour) -> Colour:
    """The colour of an outline: tells apart neighbours of one class."""
    red, green, blue = (round(0.4 * value + 0.6 * 255) for value in shade)
    return red, green, blue


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    point: tuple[int, int],
    size: tuple[int, int],
    shade: Colour,
) -> None:
    """A line of text on a plate of its colour, above a point but inside the picture."""
    letter = max(10, round(math.hypot(*size) / 65))
    text, font = lettering(text, letter)
    left, top, right, bottom = pen.textbbox((0, 0), text, font)
    margin = max(2, letter // 5)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(point[0] - width // 2, size[1] - width))
    y = max(0, min(point[1] - height, size[0] - height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), shade)
    bright = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2]
    ink = "black" if bright > 120 else "white"
    pen.text((x + margin - left, y + margin - top), text, ink, font)


def inline(
    image: Image.Image, *, exact: bool = False, widest: int = WIDEST, most: int | None = None
) -> str:
    """A picture as a data address: PNG if every pixel counts, else JPEG.

    Args:
        image: the picture.
        exact: every pixel counts.
        widest: of a JPEG, pixels of the longer side.
        most: of a JPEG, bytes: its quality falls until it has no more, or is poor.
    """
    buffer = io.BytesIO()
    if exact:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((widest, widest), Image.Resampling.LANCZOS)
        for quality in (90, 75, 50, 25):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, subsampling=0)
            if most is None or buffer.tell() <= most:
                break
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _results(table: Mapping[str, Report]) -> str:
    """The table of results, with the difference when there are two methods."""
    keys, cells = table_cells(table)
    lines = ["<tr><th>percent</th>" + "".join(f"<th>{COLUMNS[key]}</th>" for key in keys) + "</tr>"]
    for name, row in cells.items():
        marked = "".join(f'<td class="{"best" if best else ""}">{text}</td>' for text, best in row)
        lines.append(f"<tr><th>{html.escape(name)}</th>{marked}</tr>")
    if len(table) == 2:
        first, second = (one.values for one in table.values())
        gains = [round(100 * (second.get(k, math.nan) - first.get(k, math.nan)), 1) for k in keys]
        marked = "".join(
            f'<td class="{"up" if gain > 0 else "down" if gain < 0 else ""}">'
            + ("-" if math.isnan(gain) else f"{gain:+.1f}".replace("-", "−"))
            + "</td>"
            for gain in gains
        )
        lines.append(f'<tr class="difference"><th>difference</th>{marked}</tr>')
    result = f'<section><h2>Results</h2><div class="wide"><table>{"".join(lines)}</table></div>'
    return result + _classes(table) + "</section>"


def _classes(table: Mapping[str, Report]) -> str:
    kinds = [
        k
        for k in ("mask/AP", "boundary/AP", "box/AP")
        if all(k in one.values for one in table.values())
    ]
    if not table or not kinds:
        return ""
    heads = "".join(f"<th>{COLUMNS[k]}<br>{html.escape(n)}</th>" for k in kinds for n in table)
    lines = [f"<tr><th>class</th><th>objects</th>{heads}</tr>"]
    for name, values in next(iter(table.values())).per_class.items():
        cells = "".join(
            f"<td>{percent(one.per_class[name][kind])}</td>"
            for kind in kinds
            for one in table.values()
        )
        count = f"{values['objects']:.0f}"
        lines.append(f"<tr><th>{html.escape(name)}</th><td>{count}</td>{cells}</tr>")
    rows = "".join(lines)
    return (
        '<details><summary>Per class</summary><div class="wide">'
        f"<table>{rows}</table></div></details>"
    )


def percent(value: float) -> str:
    """A fraction in percent, ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def chips(categories: Sequence[Category], labels: Iterable[int] | None = None) -> str:
    """The colour and the name of each class in HTML, or of the classes ``labels`` alone."""
    return "".join(
        f'<span class="chip"><i style="background:rgb{colour(i)}"></i>'
        f"{html.escape(categories[i].name)}</span>"
        for i in (range(len(categories)) if labels is None else labels)
    )


def legend(categories: Sequence[Category]) -> str:
    """What the colours and lines of `show` mean, in HTML."""
    known = chips(categories) if 1 < len(categories) <= 30 else ""
    return (
        f'<p class="legend">{known}</p>'
        f'<p class="legend"><span class="chip"><i class="line" style="background:{TRUE}"></i>'
        "true outline</span>"
        f'<span class="chip"><i class="line" style="background:{FOUND}"></i>'
        "outline found</span>"
        f'<span class="chip"><i style="background:{FOUND};opacity:.45"></i>wrong pixels</span>'
        "<span>The zooms show the largest objects that every method found, where the true "
        "outline bends most; IoU of the whole mask and of its boundary band below.</span></p>"
    )


def show(
    panel: Panel, categories: Sequence[Category], *, widest: int = WIDEST, most: int | None = None
) -> str:
    """One picture in HTML: input, label and methods in a row, zooms of the same columns below.

    Args:
        panel: the picture.
        categories: the category table.
        widest: pixels of the longer side in the page.
        most: bytes of a picture, see `inline`.
    """
    from brefine.metrics.profile import cut  # needs torch, which an overlay does not

    size = (panel.picture.shape[1], panel.picture.shape[2])
    true = shapes_of(panel.label, size)
    found = {name: shapes_of(records, size) for name, records in panel.found.items()}
    zooms = _choose_zooms(panel, true, found)
    crops = [_choose_crop(true[i], size) for i, _ in zooms]

    plain = Image.fromarray(pixels_of(panel.picture))
    columns = {"input": plain.copy(), "label": overlay(panel.picture, panel.label, categories)}
    for name, records in panel.found.items():
        columns[name] = overlay(panel.picture, records, categories)
    cells = []
    for name, image in columns.items():
        marks, em = "", 0.05 * size[1]
        if name == "input":
            marks = "".join(
                f'<rect x="{x}" y="{y}" width="{s}" height="{s}"/>'
                f'<text x="{x + 0.15 * em:.1f}" y="{y + em:.1f}" font-size="{em:.1f}">{n}</text>'
                for n, (x, y, s) in enumerate(crops, 1)
            )
        cells.append(
            f"<figure><figcaption>{html.escape(name)}</figcaption>"
            f'<svg viewBox="0 0 {size[1]} {size[0]}" role="img" aria-label="{html.escape(name)}">'
            f'<image href="{inline(image, widest=widest, most=most)}" width="{size[1]}" '
            f'height="{size[0]}"/>'
            f"{marks}</svg></figure>"
        )
    width = band_width(size)
    for number, ((index, matches), (x, y, side)) in enumerate(zip(zooms, crops, strict=True), 1):
        crop = inline(plain.crop((x, y, x + side, y + side)), exact=True)
        square = x, y, x + side, y + side
        truth = cut(true[index], square)
        labelled = html.escape(_name(panel.label[index], categories))
        cells.append(_zoom(crop, side, None, None, f"{number}: {labelled}"))
        cells.append(_zoom(crop, side, truth, None, "true outline"))
        for name, match in matches.items():
            shape = found[name][match]
            whole = mask_iou(shape, true[index])
            bands = [(boundary_band(w, width), corner) for w, corner in (shape, true[index])]
            caption = f"IoU {100 * whole:.1f}, boundary {100 * mask_iou(*bands):.1f}"
            cells.append(_zoom(crop, side, truth, cut(shape, square), caption))
    return (
        f"<section class=panel><h3>{html.escape(panel.name)}</h3>"
        f'<div class="grid" style="--columns:{len(columns)}">{"".join(cells)}</div></section>'
    )


def _name(record: Mapping[str, Any], categories: Sequence[Category]) -> str:
    return next((c.name for c in categories if c.id == record["category_id"]), "?")


def _choose_zooms(
    panel: Panel, true: Sequence[Mask], found: Mapping[str, Sequence[Mask]]
) -> list[tuple[int, dict[str, int]]]:
    """The largest true objects that every method found, with each method's best match."""
    order = sorted(range(len(true)), key=lambda i: -int(true[i][0].sum()))
    chosen: list[tuple[int, dict[str, int]]] = []
    for i in order:
        matches = {}
        for name, shapes in found.items():
            ious = [
                mask_iou(shape, true[i])
                if record["category_id"] == panel.label[i]["category_id"]
                else 0.0
                for shape, record in zip(shapes, panel.found[name], strict=True)
            ]
            if ious and max(ious) >= 0.5:
                matches[name] = int(np.argmax(ious))
        if found and len(matches) == len(found) and true[i][0].size >= 64:
            chosen.append((i, matches))
        if len(chosen) == ZOOMS:
            break
    return chosen


def _choose_crop(shape: Mask, size: tuple[int, int]) -> tuple[int, int, int]:
    """(x, y, side) of the square in the picture where the outline bends most.

    How much it bends at a pixel is how far the share of the mask around it is from one half.
    """
    window, (left, top) = shape
    side = min(max(40, max(window.shape) // 3), 80, *size)
    radius = max(2, side // 10)
    edge = boundary_band(window, 1).astype(np.float64)
    rows, columns = np.arange(window.shape[0]) + top, np.arange(window.shape[1]) + left
    edge[(rows == 0) | (rows == size[0] - 1)] = 0  # the picture's border is no outline
    edge[:, (columns == 0) | (columns == size[1] - 1)] = 0
    share = _sums(np.pad(window.astype(np.float64), radius), 2 * radius + 1)
    bend = np.abs(share / (2 * radius + 1) ** 2 - 0.5)
    # Squares may stick out of the window by half their side.
    half = side // 2
    total = _sums(np.pad(edge * (bend**2 + 1e-3), half), side)
    y, x = np.unravel_index(int(total.argmax()), total.shape)
    x, y = int(x) + left - half, int(y) + top - half
    return max(0, min(x, size[1] - side)), max(0, min(y, size[0] - side)), side


def _sums(values: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Sum over each square of ``side`` that lies in ``values``."""
    total = np.pad(values, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    rows = total[side:] - total[:-side]
    sums: NDArray[np.float64] = rows[:, side:] - rows[:, :-side]
    return sums


def _zoom(
    crop: str,
    side: int,
    true: NDArray[np.bool_] | None,
    found: NDArray[np.bool_] | None,
    caption: str,
) -> str:
    """A crop with pixels as squares, outlines drawn along their edges, at any size sharp."""
    parts = [f'<image class="raw" href="{crop}" width="{side}" height="{side}"/>']
    if true is not None and found is not None:
        parts.append(f'<path class="wrong" d="{_squares(true ^ found)}"/>')
    if true is not None:
        parts.append(f'<path class="dark" d="{outline(true)}"/>')
        parts.append(f'<path class="true" d="{outline(true)}"/>')
    if found is not None:
        parts.append(f'<path class="found" d="{outline(found)}"/>')
    return (
        f'<figure class="zoom"><svg viewBox="0 0 {side} {side}">{"".join(parts)}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def outline(mask: NDArray[np.bool_]) -> str:
    """SVG path along the edges between pixels in and out of a mask, not along the crop's own."""
    path = []
    for y, row in enumerate(mask[1:] != mask[:-1], 1):
        path += [f"M{start} {y}h{length}" for start, length in _stretches(row)]
    for x, column in enumerate((mask[:, 1:] != mask[:, :-1]).T, 1):
        path += [f"M{x} {start}v{length}" for start, length in _stretches(column)]
    return "".join(path)


def _squares(mask: NDArray[np.bool_]) -> str:
    """SVG path that fills the pixels of a mask."""
    return "".join(
        f"M{start} {y}h{length}v1h-{length}z"
        for y, row in enumerate(mask)
        for start, length in _stretches(row)
    )


def _stretches(line: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, length) of each run of True."""
    edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --ink: #1c2024; --dim: #667;
  --rule: #dfe1e4; --good: #08744f; --bad: #b2400a; --wash: #f0f4f2; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1c1f24; --ink: #e6e7e9;
  --dim: #98a0aa; --rule: #32363d; --good: #4cc79a; --bad: #f0945f; --wash: #20302a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1440px; padding: 2.5rem 2rem 4rem; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans",
  sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0 0 .7rem; font-weight: 600; }
header p { max-width: 68ch; margin: 0; color: var(--dim); }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.2rem; margin: 0; }
dt { color: var(--dim); font-size: .8rem; } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; background: var(--card);
  border: 1px solid var(--rule); }
th, td { padding: .5rem .85rem; text-align: right; border-bottom: 1px solid var(--rule); }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 600; } th:first-child { text-align: left; white-space: nowrap; }
tr:first-child th { color: var(--dim); font-size: .8rem; font-weight: 500; line-height: 1.25;
  vertical-align: bottom; max-width: 7.5rem; }
.best { font-weight: 700; background: var(--wash); }
.difference > * { color: var(--dim); font-weight: 400; }
.difference .up { color: var(--good); } .difference .down { color: var(--bad); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--dim); margin-bottom: .6rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; align-items: center; margin: .2rem 0;
  color: var(--dim); font-size: .88rem; }
.chip { display: inline-flex; align-items: center; gap: .45rem; color: var(--ink); }
.chip i { width: .95rem; height: .95rem; border-radius: 3px; border: 1px solid #0004; }
.chip i.line { height: .35rem; border: 1px solid #0009; }
.panel { margin-top: 1.2rem; padding: 1rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; overflow-x: auto; }
.grid { display: grid; gap: .7rem; grid-template-columns:
  repeat(var(--columns), minmax(180px, 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .82rem; color: var(--dim); margin: 0 0 .25rem; }
.zoom figcaption { margin: .2rem 0 0; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; border-radius: 4px; background: #0002; }
svg image.raw { image-rendering: pixelated; }
path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: square; }
rect { fill: none; stroke: #fff; stroke-width: 2; vector-effect: non-scaling-stroke; }
svg text { fill: #fff; paint-order: stroke; stroke: #000a; stroke-width: 2px; font-weight: 700; }
.dark { stroke: #000b; stroke-width: 5; } .true { stroke: TRUE; stroke-width: 3; }
.found { stroke: FOUND; stroke-width: 1.8; } .wrong { fill: FOUND; fill-opacity: .45; }
@media print { .panel { break-inside: avoid; } }
</style></head>
<body>
{body}
</body></html>
""".replace("TRUE", TRUE).replace("FOUND", FOUND)
