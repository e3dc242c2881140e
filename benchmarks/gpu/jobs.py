"""Parts of the check as processes: each with its own time, log and record; one that fails leaves the others alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from records import read

HERE = Path(__file__).resolve().parent
TOLD = 12  # last lines of a log that are kept of a part that failed
GRACE = 10.0  # seconds between the wish that a part ends and its end


@dataclass
class Job:
    """One part.

    Args:
        script: in this folder.
        limit: seconds.
        least: seconds without which it is not begun.
        hidden: it sees no GPU.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    limit: float
    hidden: bool = False
    least: float = 20.0
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    begun: float = field(default=0.0, init=False)  # by the clock that never jumps
    begun_at: float = field(default=0.0, init=False)  # by that of files

    def record(self, out: Path) -> Path:
        return out / f"{self.name}.json"

    def log(self, out: Path) -> Path:
        return out / "logs" / f"{self.name}.log"

    def start(self, out: Path, environment: Mapping[str, str]) -> None:
        """Begin; what an earlier check left here is removed."""
        self.record(out).unlink(missing_ok=True)
        self.log(out).parent.mkdir(parents=True, exist_ok=True)
        seen = {"CUDA_VISIBLE_DEVICES": ""} if self.hidden else {}
        command = [sys.executable, "-W", "ignore", HERE / self.script, *self.arguments, "--out", self.record(out)]
        self.begun, self.begun_at = time.monotonic(), time.time()
        with self.log(out).open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, **seen},
                start_new_session=True,  # so that it can be ended with all that it started
            )

    def end(self, out: Path, until: float) -> dict[str, Any]:
        """Wait, at the longest ``until`` and its own limit, and say what became of it."""
        if self.process is None:
            return {"outcome": "left out", "seconds": 0.0, "why": "no time was left for it"}
        try:
            code: int | None = self.process.wait(max(min(until, self.begun + self.limit) - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            code = None
            self.stop()
        took = time.monotonic() - self.begun
        if code == 0 and read(self.record(out)) is not None:
            written = self.record(out).stat().st_mtime - self.begun_at  # it may have ended long before it is asked
            return {"outcome": "done", "seconds": min(took, written)}
        said = self.log(out).read_text(errors="replace").splitlines()[-TOLD:]
        outcome = f"ended by its time limit after {took:.0f} s" if code is None else f"failed with code {code}"
        return {"outcome": outcome, "seconds": took, "said": said}

    def stop(self) -> None:
        """End the process, if it still runs, and all that it started."""
        if self.process is None or self.process.poll() is not None:
            return
        os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # whoever of the group did not listen
        self.process.wait()
