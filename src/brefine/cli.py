"""The command line: each command reads its arguments and calls one function.

Figures go to stdout, everything else to stderr. Exit codes: 0 done, 2 wrong input (one line that
starts with ``error:``), 130 interrupted, 143 terminated, 75 stopped by a signal and saved. Heavy
imports wait inside the commands, so that help and mistakes in arguments answer at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from brefine import __version__
from brefine.data.commands import ImagesFolder, data_app

app = typer.Typer(
    help="Instance segmentation with crisp boundaries: BRefine and the Mask R-CNN family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")

#: the class of every complaint about arguments, wherever this version of typer keeps it
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class Boxes(StrEnum):
    """What ``evaluate`` measures."""

    BOTH = "both"
    DETECTED = "detected"
    TRUTH = "ground-truth"


def _size(text: str) -> tuple[int, int]:
    """``800x1333`` as (height, width)."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise typer.BadParameter(f"--size: {text!r} is no HEIGHTxWIDTH, such as 800x1333")
    return int(height), int(width)


def _formats(text: str) -> list[str]:
    """``coco,idmap`` as a list, checked."""
    from brefine.formats import FORMATS

    names = [name.strip() for name in text.split(",")]
    names = ["idmap" if name == "png" else name for name in names]  # its old name
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise typer.BadParameter(f"--save: {unknown[0]!r} is none of {', '.join(FORMATS)}")
    return names


def _threshold(text: str | None) -> float | Literal["overall"] | None:
    """A number of 0..1, or ``overall``."""
    if text is None or text == "overall":
        return text  # type: ignore[return-value]
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"--threshold: {text!r} is neither overall nor a number of 0 to 1")
    return value


def _tile(text: str | None) -> int | Literal["auto"] | None:
    """A number of pixels, or ``auto``."""
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(f"--tile: {text!r} is neither auto nor a number of pixels")
    return int(text)


def _islands(text: str | None) -> int | None:
    """A number of pixels; None for ``all``; 0 for nothing."""
    if text == "all":
        return None
    if text is not None and not text.isdecimal():
        raise typer.BadParameter(f"--drop-islands: {text!r} is neither all nor a number of pixels")
    return int(text or 0)


def _views(text: str | None) -> dict[str, Any]:
    """``flip,1,1.5`` as the arguments of ``views.combine``."""
    words = [word.strip() for word in (text or "1").split(",")]
    try:
        scales = [float(word) for word in words if word != "flip"]
    except ValueError:
        raise typer.BadParameter(f"--tta: {text!r}: expected flip and scales: flip,1,1.5") from None
    return {"flip": "flip" in words, "scales": scales or [1.0]}


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, such as train.lr=0.01."),
]


@app.command()
def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A recipe (YAML); see the folder recipes.", show_default=False),
    ] = None,
    preset: Annotated[
        Literal["finetune"] | None,
        typer.Option(help="In place of a recipe: choose everything from the pictures in --data."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="For --preset: the labels, COCO json or another format.")
    ] = None,
    val: Annotated[
        Path | None, typer.Option(help="For --preset: to validate on.  [default: a part of --data]")
    ] = None,
    images: ImagesFolder = None,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, new or empty.  [default: runs/RECIPE or runs/DATA]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="The same if there is one, else start it.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits each time: train.deterministic.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on each machine.  [default: one a GPU, else 1]"),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines, each with this command: see the docs.")
    ] = None,
) -> None:
    """Train a model as a recipe says, or as suits the pictures (--preset finetune)."""
    asked = [*(settings or []), *(["train.deterministic=true"] if deterministic else [])]
    if preset:
        if recipe or not data:
            raise typer.BadParameter("--preset finetune: give --data, and no recipe")
        if {devices, nodes} - {None, 1}:
            raise typer.BadParameter(
                "--preset finetune: trains in one process: leave out --devices and --nodes"
            )
        devices = 1  # however many GPUs there are
        out = out or Path("runs") / data.stem
        from brefine.finetune import finetune, require_same

        if not (resume or (auto_resume and (out / "recipe.yaml").is_file())):
            print(finetune(data, out, val=val, images=images, settings=asked))
            return
        require_same(out, data, val=val, images=images)
        recipe = out / "recipe.yaml"
    elif data or val or images:
        raise typer.BadParameter(
            "--data, --val and --images go with --preset finetune; a recipe names its data: "
            "--set data.train=..."
        )
    if not recipe:
        raise typer.BadParameter("name a recipe, or give --preset finetune and --data")
    from brefine.recipe import Recipe

    chosen = Recipe.load(recipe).with_settings(asked)
    from brefine.processes import is_first
    from brefine.train import train

    run = out or Path("runs") / recipe.stem
    going_on: bool | Literal["auto"] = "auto" if auto_resume else resume
    model = train(chosen, run, resume=going_on, devices=devices, nodes=nodes)
    if is_first():
        print(model)


@app.command()
def find_rate(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    settings: Settings = None,
    steps: Annotated[int, typer.Option(min=20, help="From the lowest to the highest.")] = 100,
    low: Annotated[float, typer.Option(help="The first rate.")] = 1e-6,
    high: Annotated[float, typer.Option(help="The last, if the loss does not diverge.")] = 1.0,
) -> None:
    """Try rising learning rates, and print the one at which the loss falls fastest."""
    from brefine.rates import find_rate
    from brefine.recipe import Recipe

    chosen = Recipe.load(recipe).with_settings(settings or [])
    found = find_rate(chosen, low=low, high=high, steps=steps)
    print("the loss fell fastest at this rate: a train.lr to begin with", file=sys.stderr)
    print(f"{found.suggestion:.2g}")


@app.command()
def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...", help="Model folders, and COCO results (json) of any system."
        ),
    ],
    data: Annotated[Path, typer.Option(help="The labels: COCO json or another format.")],
    images: ImagesFolder = None,
    boxes: Annotated[
        Boxes, typer.Option(help="AP of what the model detects, masks in true boxes, or both.")
    ] = Boxes.BOTH,
    boundary: Annotated[bool, typer.Option(help="Boundary AP, too.")] = True,
    official: Annotated[
        bool, typer.Option("--official", help="The official score of Cityscapes, too.")
    ] = False,
    classes: Annotated[bool, typer.Option("--classes", help="A table by class, too.")] = False,
    store: Annotated[
        bool,
        typer.Option("--store", help="Keep thresholds and calibration from this set in MODEL."),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every figure to this json.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.html", help="Show curves, errors and pictures of one MODEL."),
    ] = None,
) -> None:
    """Box, mask and Boundary AP, and mask quality in true boxes, one row a model."""
    if report and len(models) > 1:
        raise typer.BadParameter("--report: the page is about one MODEL, see also brefine compare")
    if classes and boxes == Boxes.TRUTH:
        raise typer.BadParameter("--classes: of what is detected: not with --boxes ground-truth")
    if report and boxes == Boxes.TRUTH:
        raise typer.BadParameter("--report: shows what is detected: not with --boxes ground-truth")
    from rich.console import Console

    from brefine.data.read import read
    from brefine.evaluate import evaluate_paths
    from brefine.files import check_target
    from brefine.metrics.tables import print_classes, print_kinds, print_table, print_thresholds

    if out:
        ours = r'\{\s*"([^"\\]|\\.)*": \{\s*"values": \{'
        check_target("--out", out, ".json", ours, [data, *models])
    if report:
        ours = r'<!doctype html>\s<html lang="en"><head>(<meta [^>]*>|\s)*<title>Evaluation of '
        check_target("--report", report, ".html", ours, [data, *models])
    dataset = read(data, images)
    rows = evaluate_paths(
        models,
        dataset,
        detected=boxes != Boxes.TRUTH,
        given_boxes=boxes != Boxes.DETECTED,
        boundary=boundary,
        official=official,
        store=store,
        limit=limit,
    )
    if out:
        _write_json(out, {name: report.as_dict() for name, report in rows.items()})
    print_table(rows, Console())
    print_kinds(rows, Console())
    if classes:
        print_classes(rows, Console())
    if classes or store:
        print_thresholds(rows, Console())
    if report:
        from brefine.report import write

        for name, measured in rows.items():
            write(report, name, measured, dataset, limit=limit)
        print(f"report: {report}", file=sys.stderr)


@app.command()
def compare(
    systems: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B...",
            help="Model folders, and COCO results (json) of any system; A is what the others are "
            "compared with.",
        ),
    ],
    data: Annotated[Path, typer.Option(help="The labels: COCO json or another format.")],
    images: ImagesFolder = None,
    boundary: Annotated[bool, typer.Option(help="Boundary AP, too.")] = True,
    resamples: Annotated[int, typer.Option(min=100, help="Draws for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure there.")
    ] = None,
) -> None:
    """Differences between systems, with intervals that say which are more than noise."""
    from rich.console import Console

    if len(systems) < 2:
        raise typer.BadParameter("give two systems or more: nothing to compare one with")
    from brefine.compare import compare, print_comparison
    from brefine.data.read import read
    from brefine.files import check_target

    if json_file:
        ours = r'\{\s*"pictures": \d+,\s*"resamples": \d+,\s*"seed": \d+,\s*"systems": '
        check_target("--json", json_file, ".json", ours, [data, *systems])
    found = compare(
        systems,
        read(data, images),
        boundary=boundary,
        resamples=resamples,
        seed=seed,
        limit=limit,
    )
    if json_file:
        _write_json(json_file, found.as_dict())
    print_comparison(found, Console())


def _write_json(path: Path, value: Any) -> None:
    from brefine.files import replacing

    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1), encoding="utf-8")


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(help="A model folder, such as runs/NAME/best, or an exported file.")
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Pictures: files, folders, patterns, lists (@FILE, .txt), - for standard input, "
            "URLs, videos, camera:0.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; an older one is replaced.")] = Path(
        "predictions"
    ),
    save: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="What to write: some of coco, masks, idmap, polygons, labelme, yolo, cvat, "
            "geojson, csv, overlay.",
        ),
    ] = "coco,idmap,overlay",
    threshold: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE|overall",
            help="Lowest score; overall: the model's, one for all.  [default: its own by class]",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Pixels by which outlines may be off, to have fewer corners."),
    ] = 0.0,
    tile: Annotated[
        str | None,
        typer.Option(metavar="PIXELS|auto", help="Look at big pictures in tiles of this side."),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=1, help="Pixels that tiles share.  [default: an eighth]")
    ] = None,
    tta: Annotated[
        str | None,
        typer.Option(metavar="VIEWS", help="Average over views, such as flip or flip,1,1.5."),
    ] = None,
    fill_holes: Annotated[
        int, typer.Option(min=0, metavar="PIXELS", help="Fill holes smaller than this.")
    ] = 0,
    drop_islands: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS|all", help="Drop parts smaller than this; all but the largest."
        ),
    ] = None,
    disjoint: Annotated[
        bool, typer.Option("--disjoint", help="No pixel in two masks: the better score has it.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Labelled set: its picture ids instead of file names.")
    ] = None,
    images: ImagesFolder = None,
    skip_broken: Annotated[
        bool,
        typer.Option("--skip-broken/--fail", help="Name broken pictures and go on; exit code 2."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that stopped; the rest as before.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures predicted together.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Threads that read ahead.")] = 2,
    every: Annotated[int, typer.Option(min=1, help="Of videos, each so many-th frame.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures from http and https.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the trunk first: minutes, for a GPU.")
    ] = False,
) -> None:
    """Find the objects in pictures: COCO json, PNG masks, polygons, overlays and more."""
    names, side, islands, seen = _formats(save), _tile(tile), _islands(drop_islands), _views(tta)

    lowest = _threshold(threshold)

    from brefine import exported
    from brefine.jobs import Finder, predict_files, print_summary
    from brefine.views import combine

    predictor: Finder
    if exported.is_exported(model):
        if compile:
            raise typer.BadParameter(f"{model} is exported already: --compile is for model folders")
        predictor = exported.load(model)
    else:
        from brefine.predict import Predictor

        predictor = Predictor.load(model, compile=compile)
    summary = predict_files(
        predictor,
        sources,
        out,
        save=names,
        threshold=predictor.overall if lowest == "overall" else lowest,
        tolerance=tolerance,
        data=data,
        images=images,
        skip_broken=skip_broken,
        resume=resume,
        batch=batch,
        workers=workers,
        allow_urls=allow_urls,
        every=every,
        limit=limit,
        views=combine(**seen),
        tile=side,
        overlap=overlap,
        holes=fill_holes,
        islands=islands,
        disjoint=disjoint,
    )
    print_summary(summary)
    print(out)
    if summary.broken:
        raise typer.Exit(2)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A model folder, such as runs/NAME/best.")],
    format: Annotated[
        Literal["onnx", "openvino"], typer.Option(help="ONNX, or OpenVINO's IR (.xml and .bin).")
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="File to write.  [default: MODEL.onnx or MODEL.xml]")
    ] = None,
    int8: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="OpenVINO: compute in 8 bits; pictures to calibrate on, such as a folder.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="For --int8: labelled pictures to measure what it costs.")
    ] = None,
    images: ImagesFolder = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="For --int8: only the first so many of --data.")
    ] = None,
) -> None:
    """Write a model as one file that needs no torch, if it finds what the model finds."""
    if int8 and (format != "openvino" or not data):
        raise typer.BadParameter("--int8: give --format openvino, and --data to measure AP on")
    if not int8 and (data or images or limit):
        raise typer.BadParameter("--data, --images and --limit go with --int8")
    from brefine.export import export
    from brefine.exported import FORMATS

    named = model.resolve() if model.name in ("", "..") else model  # "." has no name
    file = out or named.parent / f"{named.name}{FORMATS[format]}"
    if int8 and data:
        from brefine.data.read import read
        from brefine.int8 import export_int8

        parity, cost = export_int8(model, file, int8, read(data, images), limit=limit)
        print(f"int8: {cost}", file=sys.stderr)
    else:
        parity = export(model, file, format)
    print(f"check: {parity}", file=sys.stderr)
    print(file)


@app.command()
def info(
    target: Annotated[str, typer.Argument(help="A model folder, a recipe or a method's name.")],
    settings: Settings = None,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes of a recipe.")] = 80,
    size: Annotated[
        str, typer.Option(metavar="HEIGHTxWIDTH", help="Picture at the network's input.")
    ] = "800x1333",
    proposals: Annotated[int, typer.Option(min=0, help="RoIs of the box head.")] = 1000,
    detections: Annotated[int, typer.Option(min=0, help="RoIs of the mask head.")] = 100,
) -> None:
    """Parameters and multiply-adds of every part of a model."""
    from rich.console import Console

    from brefine.info import describe, print_parts

    parts, title = describe(
        target,
        settings or [],
        num_classes=classes,
        size=_size(size),
        proposals=proposals,
        detections=detections,
    )
    print_parts(parts, title, Console())


@app.command()
def profile(
    model: Annotated[
        str,
        typer.Argument(help="A model folder; or a recipe or a method's name: random weights."),
    ],
    settings: Settings = None,
    picture: Annotated[
        Path | None, typer.Option(help="To look at.  [default: a drawn one, 480x640]")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes of a recipe.")] = 80,
    detections: Annotated[int, typer.Option(min=1, help="RoIs of the mask heads.")] = 100,
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Pixels for the network.  [default: the recipe's]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch.  [default: as many as it takes]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="That medians are taken of.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print every figure as json.")] = False,
) -> None:
    """Time, multiply-adds and memory of every part, beside torchvision's Mask R-CNN."""
    from rich.console import Console

    from brefine.speed import print_profile
    from brefine.speed import profile as run

    report = run(
        model,
        settings or [],
        picture=picture,
        num_classes=classes,
        detections=detections,
        short_side=short_side,
        threads=threads,
        rounds=rounds,
    )
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print_profile(report, Console())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of pictures and training.")] = 0,
) -> None:
    """Draw toy pictures, train Mask R-CNN and BRefine on them, and compare: minutes on a CPU."""
    from brefine.demo import run

    run(out, seed=seed)


@app.command()
def reproduce(
    tables: Annotated[
        list[str], typer.Argument(metavar="TABLE...", help="table1 to table8, figure1, figure2.")
    ],
    data: Annotated[
        Path, typer.Option(help="Folder with coco, lvis or cityscapes, or one of them itself.")
    ],
    scale: Annotated[
        Literal["full", "small"],
        typer.Option(help="small: a small trunk, few pictures and steps, any labelled set."),
    ] = "full",
    out: Annotated[
        Path | None, typer.Option(help="Tables, results and runs.  [default: runs/SCALE]")
    ] = None,
    settings: Settings = None,
) -> None:
    """Train and evaluate the rows of the paper's tables, beside its figures; goes on if stopped."""
    from brefine.reproduce import find_table, recipes_of, reproduce

    small, place = scale == "small", out or Path("runs") / scale
    for name in tables:  # mistakes come out before days of training
        find_table(name)
    for name in tables:
        recipes_of(name, data, place, small=small, settings=settings or [])
    for name in tables:
        reproduce(name, data, place, small=small, settings=settings or [])


@app.command()
def toy(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.")],
    train: Annotated[int, typer.Option(min=0, help="Training pictures.")] = 200,
    val: Annotated[int, typer.Option(min=0, help="Validation pictures.")] = 50,
    size: Annotated[
        str, typer.Option(metavar="HEIGHTxWIDTH", help="Of every picture.")
    ] = "256x320",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw a toy data set with exact labels, as a COCO json."""
    from brefine.data.toy import draw

    draw(folder, train=train, val=val, size=_size(size), seed=seed)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(f"brefine {__version__}")
        raise typer.Exit


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _unwinding() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that what is written aside goes away.

    Training has handlers of its own, and processes that are forked go at once.
    """
    owner, usual = os.getpid(), signal.SIG_DFL

    def stop(number: int, _: object) -> None:
        if os.getpid() == owner:
            raise _Terminated
        signal.signal(number, usual)
        os.kill(os.getpid(), number)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) != usual:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the entry point of ``brefine``.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        with _unwinding():
            code = app(arguments, prog_name="brefine", standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        return code or 0
    except _UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if not message:  # no command at all: the help has been shown
            return 2
        context = getattr(error, "ctx", None)
        place = context.command_path if context else "brefine"
        return _fail(f"{message} (see {place} --help)")
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is wrong. Keep the exit from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision", "timm", "lightning", "safetensors"):
            raise
        return _fail(f"{error.name} is not installed: without it only exported files can predict")
    except UnicodeEncodeError as error:
        return _fail(f"{error.object[:80]!a}: is no text that can be written: change it")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}")
    except Exception as error:
        from brefine.structures import InputError, Stopped

        if isinstance(error, Stopped):
            print(error, file=sys.stderr)
            return 75
        if not isinstance(error, InputError):
            raise
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
