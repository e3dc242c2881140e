"""A command line in a fork, and what may befall it there: killed at a file operation, or refused one by the system."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gloo
from vipo.training.saved import list_checkpoints

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")
Happening = Literal["nothing", "kill", "stop", "interrupt", "twice", "vanish", "full", "read-only"]
SIGNALS = {"kill": [signal.SIGKILL], "stop": [signal.SIGSTOP], "interrupt": [signal.SIGINT]}
SIGNALS["twice"] = [signal.SIGTERM, signal.SIGTERM]
REFUSALS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
FREED = ("os.rename", "os.remove", "os.rmdir", "os.chmod")  # what a full disk still lets be done


@dataclass
class Fault:
    """What happens before the ``at``-th file operation under ``folders``, counted from 1.

    Operations are what Python announces (``sys.addaudithook``): opening, making, renaming, removing. A full or
    read-only disk stays one. ``told`` gets the path of each operation, one a line.
    """

    folders: tuple[Path, ...]
    happening: Happening = "nothing"
    at: int = 0
    told: Path | None = None
    count: int = 0

    def install(self) -> None:
        self._told = None if self.told is None else os.open(self.told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(self._heard)

    def _heard(self, event: str, given: tuple[Any, ...]) -> None:
        path = _path(event, given)
        if path is None or not any(path.is_relative_to(folder) for folder in self.folders):
            return
        self.count += 1
        if self._told is not None:
            os.write(self._told, f"{path}\n".encode())
        if self.happening in REFUSALS:
            self._refuse(event, given, path)
        elif self.count == self.at:
            self._strike()

    def _refuse(self, event: str, given: tuple[Any, ...], path: Path) -> None:
        writes = event in CHANGES or bool(given[2] & WRITES)
        if self.count >= self.at and writes and not (self.happening == "full" and event in FREED):
            number = REFUSALS[self.happening]
            raise OSError(number, os.strerror(number), str(path))

    def _strike(self) -> None:
        if self.happening == "vanish":
            self.at = 0
            for folder in self.folders:
                os.rename(folder, f"{folder}-vanished")
        for number in SIGNALS.get(self.happening, []):
            os.kill(os.getpid(), number)


def _path(event: str, given: tuple[Any, ...]) -> Path | None:
    """What an operation is about; a name in an open folder is put after that folder's."""
    if event not in ("open", *CHANGES) or not isinstance(given[0], str | os.PathLike):
        return None
    path = Path(os.fspath(given[0]) if isinstance(given[0], str) else given[0])
    folder = given[-1] if event in CHANGES and event != "os.rename" else -1
    if not path.is_absolute() and isinstance(folder, int) and folder >= 0:
        with suppress(OSError):
            return Path(os.readlink(f"/proc/self/fd/{folder}")) / path
    return path


class Fork:
    """``vipo WORDS`` in a process forked from one that has imported everything; what it says goes to ``said``."""

    def __init__(self, said: Path, *words: str | Path, fault: Fault | None = None, before: Any = None) -> None:
        self.said = said
        said.unlink(missing_ok=True)
        work = (list(map(str, words)), said, fault, before)
        self.process = gloo.forks().Process(target=_call, args=work, daemon=True)
        self.process.start()

    def ended(self, seconds: float = 120) -> int:
        """The exit code; negative the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still going after {seconds} s: {self.words()}")
        return self.process.exitcode

    def words(self) -> str:
        return self.said.read_text() if self.said.exists() else ""


def call(said: Path, *words: str | Path, fault: Fault | None = None, before: Any = None) -> tuple[int, str]:
    """The exit code of ``vipo WORDS`` in a fork, and all that it said."""
    fork = Fork(said, *words, fault=fault, before=before)
    return fork.ended(), fork.words()


def _call(words: Sequence[str], said: Path, fault: Fault | None, before: Callable[[], None] | None) -> None:
    os.environ["COLUMNS"] = "200"
    gloo.command(words, said, said, before=partial(prepare, fault, before))


def prepare(fault: Fault | None, before: Callable[[], None] | None = None, rank: int | None = None) -> None:
    """What is done in a fork before its command; of several processes, the fault strikes the one of ``rank``."""
    if before is not None:
        before()
    if fault is not None and (rank is None or int(os.environ["RANK"]) == rank):
        fault.install()


def clock_jumps() -> None:
    """From now on the clock of the wall goes back by an hour at every third look, and on by a day at every seventh."""
    real, looks = time.time, 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return real() - 3600 * (looks // 3) + 86400 * (looks // 7)

    time.time = jumping


@dataclass(frozen=True)
class Place:
    """A recipe, where it is run again and again under the same paths, and what undisturbed it comes to."""

    root: Path
    recipe: Path
    calm: dict[str, bytes]
    operations: tuple[Path, ...]
    seconds: float

    @property
    def output(self) -> Path:
        return self.root / "run"

    @property
    def folders(self) -> tuple[Path, ...]:
        return self.output, self.root / "cache"

    def clear(self) -> None:
        for folder in (*self.folders, self.root / "run-vanished"):
            shutil.rmtree(folder, ignore_errors=True)

    def words(self) -> list[str | Path]:
        """As docs/resume.md has it for a job that is started again and again."""
        going_on = ["--resume"] if (self.output / "metrics.jsonl").exists() else []
        return ["train", self.recipe, "--output", self.output, *going_on]

    def start(self, fault: Fault | None = None, before: Any = None) -> Fork:
        return Fork(self.root / "said.txt", *self.words(), fault=fault, before=before)

    def fault(self, happening: Happening, at: int) -> Fault:
        return Fault(self.folders, happening, at)

    def differences(self) -> list[str]:
        """What is not as after the undisturbed run; empty if all is."""
        ours = outcome(self.output)
        return sorted(name for name in ours.keys() | self.calm.keys() if ours.get(name) != self.calm.get(name))


def undisturbed(root: Path, recipe: Path, runner: Callable[[list[str | Path], Fault], object] | None = None) -> Place:
    """The place of a recipe, after one run that nothing happened to; ``runner`` runs the words of another kind."""
    place = Place(root, recipe, {}, (), 0.0)
    fault = Fault(place.folders, told=root / "operations.txt")
    began = time.monotonic()
    if runner is not None:
        runner(place.words(), fault)
    else:
        fork = place.start(fault)
        assert fork.ended() == 0, fork.words()
    seconds = time.monotonic() - began
    operations = tuple(map(Path, (root / "operations.txt").read_text().splitlines()))
    return replace(place, calm=outcome(place.output), operations=operations, seconds=seconds)


TIMED = ("timing.jsonl", "environment.json", "report.html")  # their names count, their bytes hold times


def outcome(folder: Path) -> dict[str, bytes]:
    """What must not depend on whether the run was disturbed: every file but the board's, the last checkpoint's too."""
    names = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    kept = {str(path.relative_to(folder)): b"" if path.name in TIMED else path.read_bytes() for path in names}
    assert list_checkpoints(folder / "checkpoints")
    return kept


def kind_of(operation: Path, place: Place) -> str:
    """What an operation belongs to."""
    if not operation.is_relative_to(place.output):
        return "text cache"
    part = operation.relative_to(place.output).parts[:1]
    known = {"checkpoints": "checkpoint", "samples": "pictures", "maps": "pictures", ".export.partial": "export"}
    known |= {"export": "export", "tensorboard": "board", "metrics.jsonl": "log", "timing.jsonl": "log"}
    known |= {"evaluations.jsonl": "evaluation", "report.html": "report", ".report.html.partial": "report"}
    return known.get(part[0] if part else "", "beginning")
