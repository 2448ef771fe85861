"""Small instance segmenters of others beside torchvision's Mask R-CNN and BRefine, on a CPU.

    python benchmarks/peers.py [--threads 1 2] [--rounds 7] [--short-side 400] [--venv FOLDER]

RF-DETR-Seg Nano (package rfdetr) and YOLO26s-seg (ultralytics) get a virtual environment in a
temporary folder, which reads torch from this one; they are never needed by the product. All have
random weights, built from their configurations: nothing is downloaded but the packages. Each runs
in a process of its own, and they take turns on one picture, each at its own size for the network
(RF-DETR 312 x 312, YOLO 640, ours by ``--short-side``). Others end with dense masks at the
picture's size, ours and torchvision's with COCO's RLE. YOLO drops empty masks in the end, which
random weights have: it has worked out 100.

What cannot be installed or built is told in a line and left out. Figures go to
benchmarks/results/peers.json, and from there to docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from brefine import speed
from brefine.progress import Progress
from page import (
    describe_machine,
    print_machine,
    read_results,
    table,
    write_results,
    write_tables,
)
from peer import PEERS, serve

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
DETECTIONS = 100


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short-side", type=int, default=400)
    parser.add_argument("--full", default="brefine_r50_1x", help="recipe")
    parser.add_argument(
        "--light",
        nargs="*",
        default=["brefine_light_r50_1x", "brefine_light_lite0"],
        help="recipes",
    )
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--venv", type=Path, help="keep the environment of the others there")
    parser.add_argument("--tables-only", action="store_true", help="write the page, no more")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/peers.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/speed.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # one of ours, in its process
    options = parser.parse_args(arguments)
    if options.worker:
        serve(lambda: ours(options))
        return
    if not options.tables_only:
        with tempfile.TemporaryDirectory() as place:
            measure(options, Path(place))
    write_tables(options.page, "peers", tables(read_results(options.results)))
    print(options.page)


def ours(options: argparse.Namespace) -> Any:
    """One of the ways of speed.py."""
    import torch

    from speed import Bench, Case  # its file, which is not the package's module

    torch.set_num_threads(options.threads[0])
    options.baseline, options.classes = options.full, 80
    case = Case(options.short_side, options.threads[0], DETECTIONS)
    return Bench(options).open(options.worker, case)


def measure(options: argparse.Namespace, place: Path) -> None:
    picture = place / "picture.jpg"
    picture.write_bytes(speed.draw_picture())
    own = [sys.executable, str(HERE / "peers.py"), "--short-side", str(options.short_side)]
    own += ["--full", options.full, "--light", *options.light]
    python = install(options.venv or place / "venv", options.peers)
    results = {"cases": {}} | read_results(options.results) | {"machine": describe_machine()}
    for threads in options.threads:
        names = ["torchvision", Path(options.full).stem, *(Path(n).stem for n in options.light)]
        commands = {name: [*own, "--threads", str(threads), "--worker", name] for name in names} | {
            name: [str(interpreter), str(HERE / "peer.py"), name, str(picture), str(threads)]
            for name, interpreter in python.items()
        }
        case = {
            "rounds": options.rounds,
            "ways": take_turns(commands, threads, place, options.rounds),
        }
        results["cases"][f"{options.short_side}/{threads}"] = case
        write_results(options.results, results)


def install(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """An environment with the packages of peers; those that could be installed."""
    python = folder / "bin" / "python"
    if names and not python.is_file():
        venv.create(folder, with_pip=True)
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        here = sysconfig.get_paths()["purelib"]
        (Path(paths["purelib"]) / "torch_and_more.pth").write_text(f"{here}\n")
    found = {}
    for name in names:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        print(f"{name}: pip install {PEERS[name][0]}", file=sys.stderr)
        done = subprocess.run([*command, PEERS[name][0]], capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            print(f"{name}: left out: {''.join(last)}", file=sys.stderr)
        else:
            found[name] = python
    return found


def take_turns(
    commands: dict[str, list[str]], threads: int, place: Path, rounds: int
) -> dict[str, dict[str, Any]]:
    """Medians by name."""
    with ExitStack() as stack, Progress("peers", len(commands) * (rounds + 1)) as bar:
        workers = {}
        for name, command in commands.items():
            worker = stack.enter_context(started(command, threads, place))
            first = ask(worker)
            bar.advance(figures=name)
            if "error" in first:
                print(f"{name}: left out: {first['error']}", file=sys.stderr)
            else:
                workers[name] = worker
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                assert worker.stdin
                with suppress(BrokenPipeError):  # the answer says that it ended
                    worker.stdin.write("go\n")
                    worker.stdin.flush()
                answer = ask(worker)
                if "error" in answer:
                    raise SystemExit(f"{name}: {answer['error']}")
                answers[name].append(answer)
                bar.advance(figures=f"{threads} threads: {name}")
    medians = {
        name: {key: statistics.median(each[key] for each in given) for key in given[0]}
        for name, given in answers.items()
    }
    base = medians.get("torchvision")
    if base is None:
        raise SystemExit("torchvision's Mask R-CNN did not run: there is nothing to compare with")
    return {
        name: values | {f"{key}_ratio": values[key] / base[key] for key in ("cpu", "wall")}
        for name, values in medians.items()
    }


@contextmanager
def started(command: list[str], threads: int, place: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker that can reach nothing outside, ended with the block."""
    surroundings = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_CONFIG_DIR": str(place),
    }
    with (
        (place / "log.txt").open("a") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=surroundings,
            cwd=place,
        ) as worker,
    ):
        try:
            yield worker
        finally:
            worker.kill()


def ask(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """The next answer of a worker."""
    assert worker.stdout
    line = worker.stdout.readline()
    return dict(json.loads(line)) if line else {"error": f"ended with {worker.wait()}"}


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    if not results:
        return ""
    text = "\n" + print_machine(results["machine"])
    for key, case in results["cases"].items():
        side, threads = key.split("/")
        text += (
            f"{threads} threads, short side {side} for torchvision's and ours, medians of "
            f"{case['rounds']} rounds:\n\n"
        )
        rows = [
            [
                name,
                f"{values['cpu']:.2f}",
                f"{values['cpu_ratio']:.2f}",
                f"{values['wall']:.2f}",
                f"{values['wall_ratio']:.2f}",
                f"{values['peak']:.0f}",
                f"{values['objects']:.0f}",
            ]
            for name, values in case["ways"].items()
        ]
        head = ["", "CPU s", "ratio", "clock s", "ratio", "peak MB of the process", "masks"]
        text += table(head, rows)
    return text


if __name__ == "__main__":
    main()
