"""``brefine data ...``: each command reads its arguments and calls one function.

Heavy imports wait inside the commands, as in ``brefine.cli``.
"""

from __future__ import annotations

import json
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Look at a data set before training on it.", no_args_is_help=True)

ImagesFolder = Annotated[
    Path | None, typer.Option("--images", help="Folder of the pictures, if not beside the labels.")
]

SplitName = Annotated[
    str, typer.Option("--split", help="Part of a YOLO yaml, Cityscapes or VOC folder to read.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Every figure, as json.")]


class Format(StrEnum):
    """What ``convert`` writes."""

    COCO = "coco"
    YOLO = "yolo"
    MASKS = "masks"
    LABELME = "labelme"


class Pictures(StrEnum):
    """What ``convert`` does with the pictures."""

    COPY = "copy"
    LINK = "link"
    NONE = "none"


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A set of any format.")],
    images: ImagesFolder = None,
    split: SplitName = "train",
    against: Annotated[
        Path | None,
        typer.Option(help="The other set, or val of the same: same classes? no picture twice?"),
    ] = None,
    against_images: Annotated[
        Path | None, typer.Option(help="Folder of its pictures, if another than --images.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Every fault, not three a kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every fault, as json.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 with warnings.")] = False,
) -> None:
    """Every fault of a data set, with what to do; exit code 2 with errors. Writes nothing."""
    from dataclasses import asdict

    from rich.console import Console

    from brefine.data.check import check
    from brefine.data.faults import exit_code, print_faults

    faults = check(path, images, split=split, against=against, against_images=against_images)
    if as_json:
        print(json.dumps([asdict(fault) for fault in faults], indent=1))
    else:
        print_faults(faults, Console(), examples=None if show_all else 3)
    raise typer.Exit(exit_code(faults, strict=strict))


@data_app.command()
def convert(
    path: Annotated[Path, typer.Argument(metavar="IN", help="A set of any format.")],
    out: Annotated[Path, typer.Argument(help="New or empty folder.")],
    to: Annotated[Format, typer.Option(help="Format to write.")],
    split: SplitName = "train",
    images: Annotated[
        Pictures, typer.Option(help="Copy the pictures, link to them, or write labels only.")
    ] = Pictures.COPY,
    images_in: Annotated[
        Path | None, typer.Option(help="Folder of the pictures, if not beside the labels.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, metavar="PIXELS", help="Fewer corners, at the masks' expense.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Write a set in another format, and say what its masks lose, file by file."""
    from rich.console import Console

    from brefine.data.convert import convert, print_conversion

    conversion = convert(
        path, out, to, images=images_in, split=split, pictures=images, tolerance=tolerance
    )
    if as_json:
        print(json.dumps(conversion.as_dict(), indent=1))
    else:
        print_conversion(conversion, Console())


@data_app.command()
def stats(
    path: Annotated[Path, typer.Argument(help="A set of any format.")],
    images: ImagesFolder = None,
    split: SplitName = "train",
    short_side: Annotated[int, typer.Option(min=1, help="Pixels at the network's input.")] = 800,
    long_side: Annotated[int, typer.Option(min=1, help="Most pixels there.")] = 1333,
    as_json: AsJson = False,
) -> None:
    """Sizes, crowding, balance, objects too small for the mask head; with advice."""
    from rich.console import Console

    from brefine.data.read import read
    from brefine.data.stats import print_stats, stats

    figures = stats(read(path, images, split=split), short_side=short_side, long_side=long_side)
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        print_stats(figures, Console())


@data_app.command()
def split(
    path: Annotated[Path, typer.Argument(help="A set of any format.")],
    out: Annotated[Path, typer.Argument(help="New or empty folder.")],
    val: Annotated[float, typer.Option(help="Share of the pictures for val.json.")],
    test: Annotated[float, typer.Option(help="Share for test.json.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Pictures in whose names it finds the same text stay together."
        ),
    ] = None,
    images: ImagesFolder = None,
    part: SplitName = "train",
) -> None:
    """Cut a set into train, val and test with like shares of every class; COCO jsons."""
    from rich.console import Console

    from brefine.data.split import print_split, split

    parts, folder = split(
        path, out, val=val, test=test, seed=seed, group=group, images=images, part=part
    )
    print_split(parts, Console())
    settings = f"data.train={out}/train.json", f"data.val={out}/val.json", f"data.images={folder}"
    print("train with " + " ".join(f"--set {shlex.quote(setting)}" for setting in settings))


@data_app.command()
def preview(
    path: Annotated[Path, typer.Argument(help="A set of any format.")],
    out: Annotated[Path, typer.Option(help="New or empty folder.")] = Path("preview"),
    count: Annotated[int, typer.Option(min=1, help="Pictures to show.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Of their choice and augmentation.")] = 0,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe that says how pictures are augmented.")
    ] = None,
    images: ImagesFolder = None,
    split: SplitName = "train",
) -> None:
    """Pictures with their labels, before and after augmentation: a page and a grid."""
    from brefine.data.preview import preview
    from brefine.recipe import Recipe

    data = None if recipe is None else Recipe.load(recipe).data
    preview(path, out, count=count, seed=seed, recipe=data, images=images, split=split)
    print(out / "preview.html")
