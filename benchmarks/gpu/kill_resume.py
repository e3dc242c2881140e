"""SIGKILL in an iteration, then resume: is the run bit for bit the one that was never stopped?

    python benchmarks/gpu/kill_resume.py --out kill.json --runs runs/gpu-check/kill

Three processes of ``vipo train`` on the embedded FLUX: one unbroken, one killed, one that resumes it. If the bits
differ, the unbroken run is made once more: a device that does not repeat itself is told from a resume that is wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from records import read_all, write

ITERATIONS = 5
KILLED_AFTER = 3  # iterations on disk; the last checkpoint is of the second
WAIT = 300.0  # seconds until those are there
LOOKS = 0.005  # seconds between two looks
RECIPE = (
    "quickstart",
    f"training.iterations={ITERATIONS}",
    "training.checkpoint_every=2",
    "prompts.per_iteration=1",
    "prompts.group_size=2",
    "solver.steps=3",
    "solver.window={size: 1, starts: 2}",
    "evaluation.limit=1",
    "evaluation.samples_per_prompt=1",
    "training.maps_every=100",
    "judges={}",
)


def training(run: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "vipo", "train", *RECIPE, "--no-report", "--output", run, *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finished(process: subprocess.Popen[bytes], what: str) -> None:
    if process.wait():
        raise RuntimeError(f"{what} ended with code {process.returncode}")


def killed(run: Path) -> dict[str, Any]:
    """Train, and kill the process half an iteration after the one that was asked for."""
    process, until = training(run), time.monotonic() + WAIT
    while len(read_all(run / "timing.jsonl")) < KILLED_AFTER:
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise RuntimeError(f"the run to kill did not come to iteration {KILLED_AFTER}: code {process.wait()}")
        time.sleep(LOOKS)
    last = read_all(run / "timing.jsonl")[-1]
    time.sleep(sum(seconds for phase, seconds in last.items() if phase != "iteration") / 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(read_all(run / "metrics.jsonl"))
    return {"signal": -process.returncode, "iterations_done": done, "finished": (run / "export").exists()}


def differences(run: Path, other: Path) -> list[str]:
    """What differs between two finished runs: lines of metrics, evaluations, and tensors of weights and optimiser."""
    found = [
        name
        for name in ("metrics.jsonl", "evaluations.jsonl")
        if (run / name).read_bytes() != (other / name).read_bytes()
    ]
    tensors = sorted(path.relative_to(run) for path in run.rglob("*.safetensors"))
    if tensors != sorted(path.relative_to(other) for path in other.rglob("*.safetensors")):
        found.append("the files of weights")
        return found
    return found + [str(name) for name in tensors if not same(run / name, other / name)]


def same(file: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    ours, theirs = load_file(file), load_file(other)
    return ours.keys() == theirs.keys() and all(
        value.numpy().tobytes() == theirs[name].numpy().tobytes() for name, value in ours.items()
    )


def check(runs: Path) -> dict[str, Any]:
    """Kill, resume, compare."""
    unbroken = training(runs / "unbroken")
    try:
        record = killed(runs / "killed")
        finished(unbroken, "the unbroken run")
    finally:
        unbroken.kill()
    finished(training(runs / "killed", "--resume"), "the resumed run")
    record["differences"] = differences(runs / "unbroken", runs / "killed")
    record["equal"] = not record["differences"] and not record["finished"]
    if record["differences"]:
        finished(training(runs / "again"), "the unbroken run made again")
        record["repeats"] = not differences(runs / "unbroken", runs / "again")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="an empty folder for the runs, removed before")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.runs, ignore_errors=True)
    write(args.out, check(args.runs))


if __name__ == "__main__":
    main()
