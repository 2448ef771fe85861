"""Faults of a labelled set: what there is to find, what a reader does with it, how it is shown.

Readers call ``report`` for what costs a picture, a line or a shape, and raise InputError for what
leaves nothing to read. Training, evaluation and prediction report to ``refuse``: the first fault
ends the reading. ``brefine data check`` reports to ``collect``: all are listed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from brefine.structures import InputError, printable

Id = int | str | None
Severity = Literal["error", "warning", "note"]

#: ``report(kind, file, id, message)``: what is wrong with ``file``. ``message`` is one line that
#: starts with the place inside the file (``line 3: ...``). If the call returns, the reader leaves
#: out the faulty entry and goes on.
Report = Callable[[str, Path, Id, str], None]
#: the same of what reading takes but is likely a mistake; readers return them
Doubt = tuple[str, Path, Id, str]
#: file, id and words of what an annotation was read from, for its faults: ``line 3``
Place = tuple[Path, Id, str]

#: what there is to find, most serious first: severity and what to do
KINDS: dict[str, tuple[Severity, str]] = {
    # the set as a whole: training refuses it
    "unknown-format": ("error", "name the file or the folder that holds the labels"),
    "bad-set": ("error", "correct this first: nothing behind it was looked at"),
    "bad-json": ("error", "write the file again, as json in UTF-8"),
    "missing-key": ("error", "add the key"),
    "wrong-type": ("error", "correct the value"),
    "bad-size": ("error", "correct height and width; cut huge pictures into tiles"),
    "bad-frequency": ("error", "copy the frequencies from LVIS' own json"),
    "bad-names": ("error", "name each class once: one a line, or names: [a, b] in a yaml"),
    "no-labels": ("error", "name labels like their pictures, where the format looks for them"),
    "duplicate-category-id": ("error", "give every class an id of its own"),
    "duplicate-picture-id": ("error", "give every picture an id of its own"),
    "same-labels": ("error", "rename or remove one of the two"),
    "class-mismatch": ("error", "use one table of ids and names in training and validation"),
    # pictures: training stops there
    "missing-folder": ("error", "give the folder of the pictures as --images"),
    "missing-picture": ("error", "correct its name, or give the folder as --images"),
    "unreadable-picture": ("error", "save the picture again, or take it out of the set"),
    "wrong-size": ("error", "correct the json, or find the picture that was labelled"),
    "swapped-size": ("error", "exchange height and width in the json"),
    "turned-picture": (
        "error",
        "turn the labels with the picture, or remove the EXIF orientation if they fit without it",
    ),
    "leaked-picture": ("error", "take it out of one of the two sets: scores would be too good"),
    # files, lines, shapes of labels: training refuses them
    "bad-label-file": ("error", "write the file again, as text in UTF-8"),
    "bad-line": ("error", "write: class x1 y1 x2 y2 ..."),
    "pixel-coordinates": ("error", "divide x by the picture's width and y by its height"),
    "bad-shape": ("error", "draw it again as polygon, rectangle or circle"),
    "unreadable-mask": ("error", "save the mask again, as PNG"),
    "colour-mask": ("error", "save it with one channel of 8 or 16 bits, or a palette"),
    "wrong-mask-size": ("error", "draw the mask at the picture's height and width"),
    "turned-mask": ("error", "turn the mask as a viewer turns the picture (EXIF orientation)"),
    # annotations: training skips them (unknown classes outside of COCO: refuses)
    "unknown-picture": ("error", "correct image_id, or add the picture to images"),
    "unknown-category": ("error", "correct the class, or add it to the table of classes"),
    "shifted-ids": ("error", "count classes from the same number in labels and names"),
    "no-mask": ("error", "draw an outline: a box alone is not enough here"),
    "bad-crowd": ("error", "set iscrowd to 0 or 1"),
    "bad-polygon": ("error", "write polygons as lists of numbers x, y, x, y ... in pixels"),
    "few-points": ("error", "draw at least 3 points"),
    "bad-rle": ("error", "encode the mask again, at the picture's height and width"),
    "empty-mask": ("error", "remove the annotation, or draw its outline"),
    "outside-mask": ("error", "check the units (pixels?) and which picture it belongs to"),
    "no-objects": ("error", "there is nothing to learn from: correct the faults above"),
    # training takes these
    "sliver": ("warning", "remove it, or draw it wider: it takes part in nothing"),
    "corner-box": ("warning", "write bbox as x, y, width, height; training uses the mask's box"),
    "box-mismatch": ("warning", "see which is right; training uses the mask's box"),
    "empty-box": ("warning", "correct bbox; training uses the mask's box"),
    "bad-box": ("warning", "write bbox as 4 finite numbers; training uses the mask's box"),
    "outside-box": ("warning", "clip bbox to the picture; training does"),
    "clipped-mask": ("warning", "clip the polygon to the picture; training does"),
    "self-crossing": ("warning", "draw the outline again: where it overlaps itself it is a hole"),
    "empty-part": ("warning", "remove the part: it covers nothing"),
    "one-object-masks": ("warning", "give every object its own value, if there are several"),
    "crowd-polygons": ("warning", "see that it is a crowd region and no object: those are RLE"),
    "bad-area": ("warning", "correct area: it decides whether an object counts as small or large"),
    "duplicate-annotation-id": ("warning", "make ids unique: other tools lose one of the two"),
    "bad-id": ("warning", "give every annotation an id, a whole number"),
    "duplicate-object": ("warning", "remove one: the same object counts twice"),
    "duplicate-name": ("warning", "merge the classes, or rename one"),
    "names-disagree": ("warning", "keep one list of the classes: tools differ in which they take"),
    "unused-labels": ("warning", "see whether its picture is missing or named otherwise"),
    "dark-picture": ("warning", "stretch its values to 0..65535: they are divided by 257"),
    "orientation": ("warning", "look whether the labels fit the picture as a viewer shows it"),
    "duplicate-picture": ("warning", "keep one; merge their labels if these differ"),
    "near-leak": ("warning", "look at both; take one out if they show the same"),
    "near-duplicate": ("warning", "look at both; keep one if they show the same"),
    "empty-class": ("warning", "label some, or take the class out of the table of classes"),
    "rare-class": ("warning", "label more: so few teach and measure next to nothing"),
    "no-names": ("note", "add a classes.txt, one name a line, to have names in the results"),
    "unlabelled-pictures": ("note", "fine if nothing is there to label"),
    "pictures-without-objects": ("note", "fine if nothing is there; they are used as background"),
}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        severity: ``error``: training refuses or skips it; ``warning``: likely a mistake;
            ``note``: worth knowing.
        kind: a key of ``KINDS``.
        file: the file of labels or the picture it is in.
        id: where in it: the id of an annotation, picture or category, the number of a line, the
            index of a shape, the value of a mask; None where there is none.
        message: what is wrong, one line that starts with what it is about.
        advice: what to do.
    """

    severity: Severity
    kind: str
    file: str
    id: Id
    message: str
    advice: str


def refuse(kind: str, file: Path, id: Id, message: str) -> NoReturn:
    """The ``Report`` of training, evaluation and prediction: the first fault ends the reading.

    Raises:
        InputError: always.
    """
    raise InputError(f"{file}: {message}")


def collect(faults: list[Fault]) -> Report:
    """A ``Report`` that adds to ``faults``."""

    def report(kind: str, file: Path, id: Id, message: str) -> None:
        severity, advice = KINDS[kind]
        where = id if isinstance(id, int) or id is None else printable(id)
        text = " ".join(printable(message).split())
        faults.append(Fault(severity, kind, printable(str(file)), where, text, advice))

    return report


@contextmanager
def reporting(report: Report, kind: str, file: Path, id: Id = None) -> Iterator[None]:
    """Report what the block raises as InputError, less the name of ``file``; then go on behind it.

    Args:
        report: is called once at most.
        kind: of the fault.
        file: that the block reads.
        id: of the fault.
    """
    try:
        yield
    except InputError as error:
        report(kind, file, id, reason_of(error, file))


def reason_of(error: InputError, file: Path) -> str:
    """The error's message without the name of ``file`` in front."""
    text = str(error)
    mine = text.startswith((f"{file}:", f"{file},"))
    return text.removeprefix(str(file)).lstrip(":, ") if mine else text


def exit_code(faults: Sequence[Fault], *, strict: bool = False) -> int:
    """2 with errors, 1 with warnings if ``strict``, else 0."""
    severities = {fault.severity for fault in faults}
    return 2 if "error" in severities else int(strict and "warning" in severities)


def summarise(faults: Sequence[Fault]) -> str:
    """``2 errors, 1 warning``, or ``no faults``."""
    counts = Counter(fault.severity for fault in faults)
    names: tuple[Severity, ...] = ("error", "warning", "note")
    parts = [f"{n} {name}{'s' * (n != 1)}" for name in names if (n := counts[name])]
    return ", ".join(parts) or "no faults"


def print_faults(faults: Sequence[Fault], console: Console, *, examples: int | None = 3) -> None:
    """A table with one row a kind, and a summary line.

    Args:
        faults: of ``check``.
        console: where to print.
        examples: how many of each kind to show; None: all.
    """
    table = Table("", "fault", "what and where, and what to do", show_lines=True)
    table.columns[0].justify = "right"
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for kind, (severity, _) in KINDS.items():
        found = [fault for fault in faults if fault.kind == kind]
        if not found:
            continue
        lines = Text()
        for fault in found[:examples]:
            lines.append(f"{Path(fault.file).name}: {fault.message}\n")
        if examples is not None and len(found) > examples:
            lines.append(f"and {len(found) - examples} more\n", "dim")
        lines.append(f"-> {found[0].advice}", "italic")
        name = Text(f"{kind}\n").append(severity, colours[severity])
        table.add_row(str(len(found)), name, lines)
    if table.rows:
        console.print(table)
    console.print(summarise(faults), highlight=False)


def quote(value: Any) -> str:
    """As `shorten`, but text is in quotes: where it stands in place of a number."""
    return shorten(json.dumps(value, default=repr))


def shorten(value: Any) -> str:
    """A json value for a message, cut to a readable length, on one line."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."
