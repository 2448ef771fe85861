"""``brefine data ...``: each command reads its arguments and calls one function.

Heavy imports wait inside the commands, as in ``brefine.cli``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Look at a data set before training on it.", no_args_is_help=True)

ImagesFolder = Annotated[
    Path | None, typer.Option("--images", help="Folder of the pictures, if not beside the labels.")
]


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="COCO json with the labels.")],
    images: ImagesFolder = None,
    against: Annotated[
        Path | None, typer.Option(help="Json of the other split: same classes? no picture twice?")
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

    from brefine.data.check import check, exit_code, print_faults

    faults = check(path, images, against=against, against_images=against_images)
    if as_json:
        print(json.dumps([asdict(fault) for fault in faults], indent=1))
    else:
        print_faults(faults, Console(), examples=None if show_all else 3)
    raise typer.Exit(exit_code(faults, strict=strict))
