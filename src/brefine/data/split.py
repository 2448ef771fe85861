"""A labelled set cut into train, val and test, with like shares of every class."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from brefine.data.convert import coco_content, name_pictures
from brefine.data.read import read
from brefine.files import replacing, require_empty
from brefine.structures import InputError

PASSES = 10  # over all units, at most, to move them to a better part

#: key of the number of pictures beside the classes in what a unit holds
PICTURES = -1


def split(
    path: Path | str,
    out: Path | str,
    *,
    val: float,
    test: float = 0.0,
    seed: int = 0,
    group: str | None = None,
    images: Path | str | None = None,
    part: str = "train",
) -> tuple[dict[str, dict[str, Any]], Path]:
    """Write ``train.json``, ``val.json`` and, if asked for, ``test.json``.

    Pictures are not copied; ``file_name`` is relative to one folder, which holds them all. Ids
    and whatever else a COCO or LVIS json says are kept. The split depends on the names of the
    pictures and on their labels, not on their order. It is not stable: more pictures later change
    the balance, and may move others.

    Args:
        path: a set of any format, as ``data.read.read`` takes it.
        out: new or empty folder.
        val: share of the pictures, and of the objects of each class, in ``val.json``.
        test: the same for ``test.json``.
        seed: of everything random.
        group: regular expression searched in each picture's name. Pictures in which its first
            group (without one, the whole of it) matches the same text stay together; those
            without a match go each for itself.
        images: folder of the pictures, if not where the format has them.
        part: what to read of a set that has parts.

    Returns:
        The contents of the jsons by name, and the folder of the pictures.

    Raises:
        InputError: impossible shares, a faulty ``group``, too few pictures, or ``out`` has
            content.
    """
    out = Path(out)
    shares = {"train": 1 - val - test, "val": val}
    if test:
        shares["test"] = test
    if not all(0 < share < 1 for share in shares.values()):
        raise InputError(
            f"--val {val:g} --test {test:g}: expected shares above 0 that leave some for train"
        )
    pattern = _compile(group)
    require_empty(out)
    dataset = read(path, images, split=part)
    folder, names = name_pictures(dataset, images, as_written=True)
    content = coco_content(dataset, names)
    keys = [_key(name, pattern) for name in names]
    if pattern and not any(pattern.search(name) for name in names):
        first = f", such as {names[0]}" if names else ""
        raise InputError(f"--group {group}: matches no picture{first}")
    units: dict[str, Counter[int]] = {key: Counter() for key in keys}
    for key in keys:
        units[key][PICTURES] += 1
    key_of = {image["id"]: key for image, key in zip(content["images"], keys, strict=True)}
    for entry in content["annotations"]:
        if not entry.get("iscrowd"):
            units[key_of[entry["image_id"]]][entry["category_id"]] += 1
    chosen = assign(units, list(shares.values()), seed)
    of_picture = {number: chosen[key] for number, key in key_of.items()}
    parts = {}
    for number, name in enumerate(shares):
        if number not in chosen.values():
            what = "groups" if pattern else "pictures"
            raise InputError(f"{path}: {len(units)} {what} are too few: {name} would have none")
        objects = [a for a in content["annotations"] if of_picture[a["image_id"]] == number]
        mine = [image for image in content["images"] if of_picture[image["id"]] == number]
        parts[name] = {**content, "images": mine, "annotations": objects}
    with replacing(out) as aside:
        aside.mkdir()
        for name, values in parts.items():
            (aside / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return parts, folder


def assign(
    units: Mapping[str, Mapping[int, int]], shares: Sequence[float], seed: int
) -> dict[str, int]:
    """Share out units so that each part has its share of every class, and of the pictures.

    What is made small is the sum, over parts and classes, of ``(has - due)^2 / due``, counted in
    shares of the class. Units with the rarest classes choose first, as in iterative
    stratification (Sechidis et al., 2011), while every part still has room for them; then units
    move to a better part until none gains.

    Args:
        units: by name: how many objects of each class it holds, and how many ``PICTURES``.
        shares: of the parts; their sum is 1.
        seed: decides between units that are alike.

    Returns:
        The part of each unit.
    """
    total: Counter[int] = Counter()
    for held in units.values():
        total.update(held)
    column = {kind: i for i, kind in enumerate(sorted(total))}
    # The number of pictures counts as much as all classes do, which pull in many directions.
    weight = {kind: 1 / count for kind, count in total.items() if count}
    if total[PICTURES]:
        weight[PICTURES] *= max(1, len(weight) - 1) ** 0.5
    rows: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
    for name, held in units.items():
        kinds = [kind for kind, count in held.items() if count]
        values = np.array([held[kind] * weight[kind] for kind in kinds])
        rows[name] = np.array([column[kind] for kind in kinds], dtype=np.int64), values

    def rank(name: str) -> tuple[int, int, str]:
        rarest = min(units[name], key=lambda kind: (kind == PICTURES, total[kind], kind))
        random = hashlib.sha256(f"{seed} {name}".encode(errors="surrogatepass")).hexdigest()
        return total[rarest], -units[name][rarest], random

    due = np.array(shares, dtype=np.float64)[:, None]
    room = due * np.array([total[kind] * weight.get(kind, 0.0) for kind in column])

    def choose(name: str) -> int:
        """The part whose error shrinks most, or grows least, with this unit; it is put there."""
        columns, values = rows[name]
        gain = ((2 * room[:, columns] - values) * values / due).sum(1)
        part = int(gain.argmax())
        room[part, columns] -= values
        return part

    order = sorted(units, key=rank)
    chosen = {name: choose(name) for name in order}
    for _ in range(PASSES):
        before = dict(chosen)
        for name in order:
            columns, values = rows[name]
            room[chosen[name], columns] += values
            chosen[name] = choose(name)
        if chosen == before:
            break
    return chosen


def _compile(group: str | None) -> re.Pattern[str] | None:
    try:
        return None if group is None else re.compile(group)
    except re.error as error:
        raise InputError(f"--group {group}: no regular expression: {error}") from None


def _key(name: str, pattern: re.Pattern[str] | None) -> str:
    """What names the unit of a picture."""
    found = pattern.search(name) if pattern else None
    if found is None:
        return f"picture {name}"
    took_part = [each for each in found.groups() if each is not None]
    return f"group {(took_part or [found[0]])[0]}"


def print_split(parts: dict[str, dict[str, Any]], console: Console) -> None:
    """Pictures and objects of each part, and the classes that one of them lacks."""
    names = {entry["id"]: entry["name"] for entry in next(iter(parts.values()))["categories"]}
    counts = {
        part: Counter(a["category_id"] for a in content["annotations"] if not a.get("iscrowd"))
        for part, content in parts.items()
    }
    pictures = {part: len(content["images"]) for part, content in parts.items()}
    total: Counter[int] = sum(counts.values(), Counter())
    table = Table("", "pictures", "", "objects", "", "share of a class, least to most")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, count in counts.items():
        spread = [count[kind] / total[kind] for kind in total]
        table.add_row(
            part,
            f"{pictures[part]:,}",
            f"{pictures[part] / sum(pictures.values()):.1%}",
            f"{count.total():,}",
            f"{count.total() / total.total():.1%}" if total else "-",
            f"{min(spread):.1%} to {max(spread):.1%}" if spread else "-",
        )
    console.print(table)
    for part, count in counts.items():
        if missing := [names[kind] for kind in sorted(total) if not count[kind]]:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            console.print(
                f"{part} has no object of: {shown}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
