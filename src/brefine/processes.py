"""Several processes that train one model: who is who, and who has gone.

When a process dies the others would wait for it in the next sum of gradients: for half an hour if
its machine is gone or the network between is cut. So each gives a sign of life every other
second, through a store of the first process, and looks at those of the others.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from brefine.structures import InputError, Stopped

BEAT = 2.0  # seconds between two signs of life
SILENCE = 40.0  # seconds after which a process counts as gone
MEETING = timedelta(minutes=30)  # in which all processes of a run must have come together
GO_ON = "--resume goes on"  # how messages end of a run that stopped
LINGER = 6.0  # seconds in which a process that fails tells the others, and they end by themselves

#: what launchers set before a process starts; the first process has 0 in all that are there
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def is_first() -> bool:
    """Whether this process is the one that writes, known before any of them are connected."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def count(devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Processes a machine, and machines.

    Args:
        devices: as asked for; None: what torchrun or SLURM started, else all GPUs, else 1.
        nodes: as asked for; None: what torchrun or SLURM started, else 1.

    Raises:
        InputError: it is not what torchrun or SLURM started.
    """
    env = os.environ
    started: tuple[int, int] | None = None
    if "LOCAL_WORLD_SIZE" in env and "TORCHELASTIC_RUN_ID" in env:
        local = int(env["LOCAL_WORLD_SIZE"])
        started = local, int(env["WORLD_SIZE"]) // local
    elif "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        machines = int(env.get("SLURM_NNODES", 1))
        started = max(1, int(env["SLURM_NTASKS"]) // machines), machines
    if started is None:
        return devices or max(1, torch.cuda.device_count()), nodes or 1
    for name, asked, got in (("--devices", devices, started[0]), ("--nodes", nodes, started[1])):
        if asked not in (None, got):
            raise InputError(f"{name} {asked}: the launcher started {got}: leave it out")
    return started


class Pulse(L.Callback):
    """Says within a minute which other process has gone, and ends this one.

    A process that fails says why before it goes; one that was killed or whose machine is gone
    falls silent.
    """

    def __init__(self) -> None:
        self.store: TCPStore | None = None
        self.rank, self.world, self.step = 0, 1, 0
        self.names: list[str] = []  # of the processes: number, host, process id
        self.last: list[tuple[bytes, float]] = []  # sign of life of each, and when it changed
        self.faults: dict[int, str] = {}
        self.children: list[Any] = []  # processes on this machine that this one has started
        self.ended = threading.Event()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Begin, once the processes are connected."""
        if trainer.world_size == 1 or self.store is not None:
            return
        self.rank, self.world = trainer.global_rank, trainer.world_size
        environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        host, wait = environment.main_address, timedelta(seconds=SILENCE)
        store = None
        if self.rank == 0:
            store = TCPStore(host, 0, is_master=True, timeout=wait, wait_for_workers=False)
        port = trainer.strategy.broadcast(store.port if store else 0)
        self.store = store or TCPStore(host, port, is_master=False, timeout=wait)
        started = getattr(trainer.strategy.launcher, "procs", [])
        self.children = list(started)
        started.clear()  # else Lightning kills this process, without a word, when one of them ends
        name = f"process {self.rank} ({socket.gethostname()}, pid {os.getpid()})"
        self.names = [""] * self.world
        distributed.all_gather_object(self.names, name)
        self.store.set(f"beat{self.rank}", "0")
        trainer.strategy.barrier()
        self.last = [(b"0", time.monotonic())] * self.world
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Remember the step, to say it."""
        self.step = trainer.global_step

    def on_fit_end(self, *_: Any) -> None:
        """All that is done together is done."""
        if self.store is not None and not self.ended.is_set():
            # the store goes with the first process, which may have ended already
            with suppress(RuntimeError):
                self.store.set(f"beat{self.rank}", "bye")
        self.ended.set()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Tell the others why this process ends, unless it is because of one of them."""
        if self.store is None or self.ended.is_set() or lost_touch(exception):
            return
        self.ended.set()
        if isinstance(exception, Stopped):
            return
        line = " ".join(f"{type(exception).__name__}: {exception}".split())[:500]
        try:
            self.store.set(f"fault{self.rank}", line)
        except Exception:  # the first process is gone
            return
        if self.rank == 0:  # the store goes with this process
            time.sleep(2 * BEAT)

    def explain(self, error: BaseException) -> Stopped | InputError:
        """What to raise when something done by all processes failed; waits until we know why.

        Args:
            error: what it failed with.
        """
        if self.store is None:  # they never met
            env, (cause, *_) = os.environ, str(error).splitlines() or [type(error).__name__]
            return InputError(
                "the processes of this run did not come together at "
                f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')} ({cause[:200]}): start the "
                f"same command on every machine within {MEETING} hours, with the same address and "
                "a free port"
            )
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            if reason := self._gone(silence=3 * BEAT):
                break
            time.sleep(0.1)
        else:
            reason = "the connection between the processes broke, though all of them live"
        self.ended.set()
        return Stopped(self._line(reason))

    def _gone(self, silence: float) -> str | None:
        """Who has gone and why, if anybody has."""
        for rank, fault in self.faults.items():
            return f"{self.names[rank]} failed: {fault}"
        for number, child in enumerate(self.children):
            if (code := child.poll()) not in (None, 0):
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                local = [name for name in self.names if f"pid {child.pid})" in name]
                return f"{local[0] if local else f'process {number + 1}'} {how}"
        now = time.monotonic()
        for rank, (beat, since) in enumerate(self.last):
            if rank != self.rank and beat != b"bye" and now - since > silence:
                return (
                    f"{self.names[rank]} has given no sign of life for {now - since:.0f} seconds: "
                    "killed, or its machine or the network is down"
                )
        return None

    def _line(self, reason: str) -> str:
        return f"{reason}; this run stopped after step {self.step}: {GO_ON}"

    def _beat(self) -> None:
        """Give signs of life and read those of the others; hangs if the network is cut."""
        assert self.store is not None
        number, others = 0, [rank for rank in range(self.world) if rank != self.rank]
        while not self.ended.wait(BEAT):
            number += 1
            try:
                self.store.set(f"beat{self.rank}", str(number))
                for rank in others:
                    beat = self.store.get(f"beat{rank}")
                    if beat != self.last[rank][0]:
                        self.last[rank] = beat, time.monotonic()
                    if self.store.check([f"fault{rank}"]):
                        self.faults[rank] = self.store.get(f"fault{rank}").decode()
            except Exception:  # no connection: the first process falls silent
                time.sleep(BEAT)

    def _watch(self) -> None:
        """End this process if another has gone and the main thread does not notice by itself."""
        while not self.ended.wait(1):
            reason = self._gone(silence=SILENCE)
            if reason and not self.ended.wait(LINGER):
                # The main thread hangs in a sum of gradients that nobody will answer.
                print(f"error: {self._line(reason)}", file=sys.stderr, flush=True)
                os._exit(75)


def lost_touch(error: BaseException) -> bool:
    """Whether an error means that another process does not answer any more."""
    words = ("connection", "broken pipe", "timed out", "socket", "nccl", "gloo", "peer", "store")
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in words)
