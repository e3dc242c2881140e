"""Processes, several at a time: each with a log, its share of the machine, and an end that is told."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vipo.runs.stop import StopRequest

POLL_SECONDS = 0.2
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Task:
    """One process. What it says is added to ``log``; ``environment`` stands above what it is given of the machine."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """One task's end: ``code`` is its process's exit code, None for one that was finished before."""

    name: str
    code: int | None
    seconds: float
    log: Path


class Pool:
    """Runs tasks; ``stop`` asks those under way, by SIGTERM, to save and end.

    Args:
        jobs: how many run at a time.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        self.stop = StopRequest()
        self._under_way: dict[int, tuple[Task, subprocess.Popen[bytes], float]] = {}  # by place

    def run(self, tasks: Sequence[Task], begun: Callable[[str], None] = lambda _name: None) -> Iterator[Ended]:
        """Run them in their order, yielding each as it ends; a failed one keeps no other from running.

        Args:
            begun: told the name of each task that begins.
        """
        with self.stop.listening():
            try:
                yield from self._work(list(tasks), begun)
            finally:
                self._end_all()

    def _work(self, waiting: list[Task], begun: Callable[[str], None]) -> Iterator[Ended]:
        told = False
        while (waiting and not self.stop.asked) or self._under_way:
            if self.stop.asked and not told:
                told = True
                self._signal()
            for place in [place for place in range(self.jobs) if place not in self._under_way]:
                if waiting and not self.stop.asked:
                    task = waiting.pop(0)
                    begun(task.name)
                    self._under_way[place] = task, self._start(task, place), time.monotonic()
            yield from self._ended()
            time.sleep(POLL_SECONDS)

    def _ended(self) -> Iterator[Ended]:
        for place, (task, process, since) in list(self._under_way.items()):
            if (code := process.poll()) is not None:
                del self._under_way[place]
                yield Ended(task.name, code, time.monotonic() - since, task.log)

    def _start(self, task: Task, place: int) -> subprocess.Popen[bytes]:
        """In a session of its own: a terminal's Ctrl-C comes here only, and is handed on once."""
        with task.log.open("ab") as log:
            return subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.share(place), **task.environment},
                start_new_session=True,
            )

    def share(self, place: int) -> dict[str, str]:
        """What a task gets of the machine beside others: one accelerator of several, its part of the cores."""
        share = {}
        if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        if self.jobs > 1 and len(devices := _devices()) > 1:
            share[DEVICES] = devices[place % len(devices)]
        return share

    def _signal(self) -> None:
        for _, process, _ in self._under_way.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _end_all(self) -> None:
        """After a second Ctrl-C: they stop at once."""
        self._signal()
        for _, process, _ in self._under_way.values():
            process.wait()


def _devices() -> list[str]:
    """The accelerators that CUDA shows this process, as its environment variable has them."""
    if DEVICES in os.environ:
        return [name for name in os.environ[DEVICES].split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
