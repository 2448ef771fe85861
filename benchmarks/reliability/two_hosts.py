"""Train one toy model on two hosts, cut the link between them, and go on when it is back.

    sudo python benchmarks/reliability/two_hosts.py

The hosts are two network namespaces joined by a veth pair (Linux, root, ``ip``); each runs
``brefine train --nodes 2``. First the link is cut in the middle of a run: both processes must end
by themselves with a line that says so. Then the link comes back and the same command with
``--auto-resume`` must end with the weights, bit by bit, of a run whose link was never cut. Writes
``two_hosts.json`` beside this file and the section between the markers of ``docs/distributed.md``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill import RECIPE, fill, weights

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/distributed.md"
MARKERS = "<!-- hosts: begin -->", "<!-- hosts: end -->"
HOSTS = ("brefine-a", "brefine-b")  #: namespaces; the interfaces are veth-HOST
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LIMIT = 60  #: seconds in which a cut must be noticed


def main() -> None:
    if "--tell" in sys.argv:  # only say what was stored
        return tell()
    if os.geteuid():
        raise SystemExit("network namespaces need root")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = ["--size", "64x80", "--train", "10", "--val", "3"]
        subprocess.run([sys.executable, "-m", "brefine", "toy", f"{folder}/toy", *size], check=True)
        recipe = RECIPE.replace("TOY", f"{folder}/toy").replace("steps: 40", "steps: 400")
        (folder / "recipe.yaml").write_text(recipe.replace("validate_every: 3", "seed: 1"))
        try:
            connect()
            run = folder / "cut"
            started = start(folder, run, 29501)
            wait(lambda: reached(run) >= 5, started)
            ip("-n", HOSTS[1], "link", "set", f"veth-{HOSTS[1]}", "down")
            began, step = time.monotonic(), reached(run)
            seconds, said = [], []
            for process in started:
                said.append(process.communicate(timeout=3 * LIMIT)[0].strip().splitlines()[-1])
                seconds.append(round(time.monotonic() - began))
            codes = [process.returncode for process in started]
            ip("-n", HOSTS[1], "link", "set", f"veth-{HOSTS[1]}", "up")
            left = reached(run)
            length = ["--set", f"train.steps={left + 5}"]
            resumed = finish(start(folder, run, 29502, *length))
            whole = finish(start(folder, folder / "whole", 29503, *length))
            same = weights(run) == weights(folder / "whole")
        finally:
            disconnect()
    result = {
        "cut after step": step,
        "last checkpoint": left,
        "seconds until the end": seconds,
        "exit codes": codes,
        "said": said,
        "exit codes of the resumed run": resumed,
        "exit codes of the run that was not cut": whole,
        "same bits": same,
    }
    (HERE / "two_hosts.json").write_text(json.dumps(result, indent=1) + "\n")
    tell()
    raise SystemExit(not (same and max(seconds) <= LIMIT and codes == [75, 75]))


def tell() -> None:
    """Say in words what was stored, here and on the page."""
    result = json.loads((HERE / "two_hosts.json").read_text())
    seconds = result["seconds until the end"]
    same = "the same bits as" if result["same bits"] else "OTHER BITS than"
    text = (
        f"The link was cut after step {result['cut after step']}. The processes ended by "
        f"themselves {min(seconds)} and {max(seconds)} seconds later with code "
        f"{result['exit codes'][0]}, the last checkpoint being that of step "
        f"{result['last checkpoint']}. Resumed with the link back, the run ended with {same} one "
        "that was not cut. The two said:\n\n```\n" + "\n".join(result["said"]) + "\n```"
    )
    print(text)
    fill(PAGE, MARKERS, text)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect() -> None:
    """Two namespaces, a cable between, and nothing else."""
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", f"veth-{HOSTS[0]}", "type", "veth", "peer", "name", f"veth-{HOSTS[1]}")
    for host, address in zip(HOSTS, ADDRESSES, strict=True):
        ip("link", "set", f"veth-{host}", "netns", host)
        ip("-n", host, "addr", "add", f"{address}/24", "dev", f"veth-{host}")
        ip("-n", host, "link", "set", f"veth-{host}", "up")
        ip("-n", host, "link", "set", "lo", "up")


def disconnect() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], check=False)


def start(folder: Path, run: Path, port: int, *more: str) -> list[subprocess.Popen[str]]:
    """The command on both hosts."""
    started = []
    for number, host in enumerate(HOSTS):
        place = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port), "NODE_RANK": str(number)}
        command = [sys.executable, "-m", "brefine", "train", f"{folder}/recipe.yaml", *more]
        command += ["--out", str(run), "--auto-resume", "--nodes", "2", "--devices", "1"]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command],
                env={**os.environ, **place, "GLOO_SOCKET_IFNAME": f"veth-{host}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(started: list[subprocess.Popen[str]]) -> list[int]:
    for process in started:
        out = process.communicate(timeout=600)[0]
        if process.returncode:
            print(out, file=sys.stderr)
    return [process.returncode for process in started]


def reached(run: Path) -> int:
    """Step of the newest checkpoint."""
    steps = [int(path.stem.partition("_")[2]) for path in run.glob("checkpoints/step_*")]
    return max(steps, default=0)


def wait(done: object, started: list[subprocess.Popen[str]]) -> None:
    while not done():  # type: ignore[operator]
        for process in started:
            if process.poll() is not None:
                raise SystemExit(process.communicate()[0])
        time.sleep(0.05)


if __name__ == "__main__":
    main()
