"""Many runs in one folder, each a process of its own: what is finished is skipped, what broke off goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vipo.report.run import read_run
from vipo.runs.combinations import Combination
from vipo.runs.directory import RunDirectory
from vipo.runs.rules import differences
from vipo.runs.stop import StopRequest

State = Literal["to begin", "broken off", "finished"]
POLL_SECONDS = 0.2
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Ended:
    """One run's end: ``code`` is its process's exit code, None for one that was finished before."""

    name: str
    code: int | None
    seconds: float
    log: Path


def state_of(combination: Combination, folder: Path) -> State:
    """Whether a run is done as its recipe now says, with its last evaluation and its export.

    Raises:
        UserError: what is in its folder cannot be read.
    """
    directory = RunDirectory(folder)
    if not directory.exists():
        return "to begin"
    run, wanted = read_run(folder), combination.recipe.training.iterations
    whole = run.iterations_done == wanted and run.failure is None and (folder / "export").is_dir()
    evaluated = bool(run.evaluations) and run.evaluations[-1].iteration == wanted
    same = not differences(run.recipe, combination.recipe, folder)
    return "finished" if whole and evaluated and same else "broken off"


class Sweep:
    """Runs of one recipe in one folder; ``stop`` asks those under way to save and end.

    Args:
        words: what every `vipo train` is given beside its overrides and folder, such as ``--no-report``.
        jobs: how many run at a time.
    """

    def __init__(
        self, recipe: str, found: Sequence[Combination], root: Path, *, words: Sequence[str] = (), jobs: int = 1
    ) -> None:
        self.recipe, self.found, self.root, self.words, self.jobs = recipe, found, root, words, jobs
        self.stop = StopRequest()
        self._under_way: dict[int, tuple[Combination, subprocess.Popen[bytes], float]] = {}  # by place

    def states(self) -> dict[str, State]:
        """How far each run is."""
        return {one.name: state_of(one, self.root / one.name) for one in self.found}

    def run(self, begun: Callable[[str], None] = lambda _name: None) -> Iterator[Ended]:
        """Run what is not finished, yielding each as it ends; a failed one keeps no other from running.

        Args:
            begun: told the name of each run that begins.
        """
        states = self.states()
        waiting = [one for one in self.found if states[one.name] != "finished"]
        for one in self.found:
            if states[one.name] == "finished":
                yield Ended(one.name, None, 0.0, self._log(one))
        self.root.mkdir(parents=True, exist_ok=True)
        with self.stop.listening():
            try:
                yield from self._work(waiting, states, begun)
            finally:
                self._end_all()

    def _work(
        self, waiting: list[Combination], states: Mapping[str, State], begun: Callable[[str], None]
    ) -> Iterator[Ended]:
        told = False
        while (waiting and not self.stop.asked) or self._under_way:
            if self.stop.asked and not told:
                told = True
                self._signal()
            for place in [place for place in range(self.jobs) if place not in self._under_way]:
                if waiting and not self.stop.asked:
                    one = waiting.pop(0)
                    begun(one.name)
                    self._under_way[place] = one, self._start(one, states[one.name], place), time.monotonic()
            yield from self._ended()
            time.sleep(POLL_SECONDS)

    def _ended(self) -> Iterator[Ended]:
        for place, (one, process, since) in list(self._under_way.items()):
            if (code := process.poll()) is not None:
                del self._under_way[place]
                yield Ended(one.name, code, time.monotonic() - since, self._log(one))

    def _start(self, one: Combination, state: State, place: int) -> subprocess.Popen[bytes]:
        """In a session of its own: a terminal's Ctrl-C comes here only, and is handed on once."""
        with self._log(one).open("ab") as log:
            return subprocess.Popen(
                self._command(one, state),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._share(place)},
                start_new_session=True,
            )

    def _command(self, one: Combination, state: State) -> list[str]:
        resume = ["--resume"] if state == "broken off" else []
        folder = ["--output", str(self.root / one.name)]
        return [sys.executable, "-m", "vipo", "train", self.recipe, *one.overrides, *folder, *resume, *self.words]

    def _share(self, place: int) -> dict[str, str]:
        """What a run gets of the machine beside others: one accelerator of several, its part of the cores."""
        share = {}
        if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        if self.jobs > 1 and len(devices := _devices()) > 1:
            share[DEVICES] = devices[place % len(devices)]
        return share

    def _log(self, one: Combination) -> Path:
        """Beside the run's folder, which must be empty when the run begins."""
        return self.root / f"{one.name}.log"

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
