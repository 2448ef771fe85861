"""Kill a training run again and again, resume it each time, and compare what it ends with.

    python benchmarks/reliability/kill.py [--kills 20] [--seed 0]

A toy run is started as the command ``brefine train --auto-resume``, with two workers, and killed
with SIGKILL: in turn at any moment since its start, and while a checkpoint is being written.
When it comes to its end its weights are compared, bit by bit, with those of a run that nobody
touched; if there are kills left, it all begins again. After each kill, processes and shared
memory that stay behind are counted. Writes ``kill.json`` beside this file and the section between
the markers of ``docs/training.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/training.md"
MARKERS = "<!-- kill: begin -->", "<!-- kill: end -->"
RECIPE = """
model:
  method: brefine
  options:
    backbone: test_efficientnet_gn.r160_in1k
    channels: 16
    detector: {frozen_stages: 0, fpn_norm: group, box_hidden: 16, candidates: [50, 50],
      proposals: [20, 20], mask_rois: 4, detections: 5}
data: {train: TOY/train.json, val: TOY/val.json, short_side: 64, long_side: 80, workers: 2}
train: {steps: 40, batch_size: 2, lr: 0.01, warmup_steps: 5, milestones: 30, ema: 0.9,
  validate_every: 3, checkpoint_every: 1}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tell", action="store_true", help="only say what was stored")
    options = parser.parse_args()
    if options.tell:
        tell()
        return
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = ["--size", "64x80", "--train", "10", "--val", "2"]
        subprocess.run([sys.executable, "-m", "brefine", "toy", f"{folder}/toy", *size], check=True)
        (folder / "recipe.yaml").write_text(RECIPE.replace("TOY", f"{folder}/toy"))
        began = time.monotonic()
        with start(folder, "whole") as process:
            while not any((folder / "whole").glob("checkpoints/step_*")):
                time.sleep(0.05)
            first = time.monotonic() - began  # seconds until there is something to lose
            assert process.wait() == 0
        expected = weights(folder / "whole")
        kills: list[dict[str, object]] = []
        runs = same = 0
        while len(kills) < options.kills:
            runs += 1
            while kill(folder, f"run{runs}", first, chance, kills, options.kills):
                pass
            same += weights(folder / f"run{runs}") == expected
    result = {
        "kills": len(kills),
        "while writing": sum(bool(each["writing"]) for each in kills),
        "steps reached": [each["step"] for each in kills],
        "runs": runs,
        "runs with the same bits": same,
        "processes left": sum(int(str(each["left"])) for each in kills),
        "shared memory left": sum(int(str(each["shared"])) for each in kills),
    }
    (HERE / "kill.json").write_text(json.dumps(result, indent=1) + "\n")
    tell()
    raise SystemExit(same != runs)


def tell() -> None:
    """Say in words what was stored, here and on the page."""
    result = json.loads((HERE / "kill.json").read_text())
    text = (
        f"{result['kills']} kills in {result['runs']} runs, {result['while writing']} of them "
        f"while a checkpoint was being written: {result['runs with the same bits']} of "
        f"{result['runs']} runs ended with the same bits as the run that nobody touched; "
        f"{result['processes left']} processes and {result['shared memory left']} pieces of "
        "shared memory stayed behind."
    )
    print(text)
    fill(PAGE, MARKERS, text)


def fill(page: Path, markers: tuple[str, str], text: str) -> None:
    """Put a text between two markers of a page."""
    begin, end = (re.escape(marker) for marker in markers)
    inside = f"{markers[0]}\n{text}\n{markers[1]}"
    whole = page.read_text(encoding="utf-8")
    whole = re.sub(f"{begin}.*{end}", lambda _: inside, whole, flags=re.DOTALL)
    page.write_text(whole, encoding="utf-8")


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """The command as a process."""
    command = [sys.executable, "-m", "brefine", "train", f"{folder}/recipe.yaml"]
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen(
        [*command, "--out", f"{folder}/{name}", "--auto-resume"], stderr=log, stdout=log
    )


def kill(
    folder: Path,
    name: str,
    first: float,
    chance: random.Random,
    kills: list[dict[str, object]],
    most: int,
) -> bool:
    """Start or resume a run and kill it; False if it came to its end."""
    shared = set(Path("/dev/shm").iterdir())
    began, moment = time.monotonic(), chance.uniform(0, 1.5 * first)
    skip = chance.randrange(4) if len(kills) % 2 else None  # writes to let pass
    with start(folder, name) as process:
        seen: set[str] = set()
        while process.poll() is None:
            halves = {path.name for path in (folder / name).glob("checkpoints/.step_*")}
            seen |= {half for half in halves if half.endswith(f".{process.pid}")}
            writing = skip is not None and len(seen) > skip
            if len(kills) < most and (
                writing or (skip is None and time.monotonic() > began + moment)
            ):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005 if skip is not None else 0.01)
        code = process.wait()
    if code == 0:
        return False
    if code != -signal.SIGKILL:
        raise SystemExit((folder / f"{name}.log").read_text())
    time.sleep(7)  # workers look after their parent every five seconds
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if f"{folder}/{name}" in text_of(p)]
    steps = sorted((folder / name).glob("checkpoints/step_*"))
    halves = list((folder / name).glob(f"checkpoints/.step_*.{process.pid}"))
    kills.append(
        {
            "writing": bool(halves),
            "step": int(steps[-1].stem.partition("_")[2]) if steps else 0,
            "left": len(left),
            "shared": len(set(Path("/dev/shm").iterdir()) - shared),
        }
    )
    print(f"kill {len(kills)}: {kills[-1]}", file=sys.stderr, flush=True)
    return True


def text_of(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def weights(run: Path) -> dict[str, bytes]:
    """The bits of every tensor of the last and the best model."""
    bits = {}
    for name in ("last", "best"):
        with safe_open(run / name / "model.safetensors", "pt") as file:
            bits |= {f"{name} {k}": file.get_tensor(k).numpy().tobytes() for k in file.keys()}  # noqa: SIM118
    return bits


if __name__ == "__main__":
    main()
