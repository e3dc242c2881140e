"""The quickstart as ``make quickstart`` has it, and what it gained: each score after training less the one before.

python benchmarks/gpu/quickstart_gain.py --out quickstart.json --run runs/gpu-check/quickstart
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from records import read_all, write

CHANGES = {
    "full": (),
    "toy": (
        "training.iterations=2",
        "prompts.per_iteration=1",
        "prompts.group_size=4",
        "evaluation.limit=2",
        "evaluation.samples_per_prompt=1",
    ),
}


def gains(run: Path) -> dict[str, float]:
    """Mean over the evaluation's samples, by score."""
    first, *_, last = read_all(run / "evaluations.jsonl")
    return {
        name: statistics.fmean(after - before for after, before in zip(last["values"][name], values, strict=True))
        for name, values in first["values"].items()
    }


def quickstart(run: Path, size: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "vipo", "train", "quickstart", *CHANGES[size]]
    begin = time.monotonic()
    done = subprocess.run([*command, "--no-report", "--output", run], stdout=subprocess.DEVNULL, check=False)
    took = time.monotonic() - begin
    if done.returncode:
        raise RuntimeError(f"vipo train quickstart ended with code {done.returncode}")
    phases = [{k: v for k, v in line.items() if k != "iteration"} for line in read_all(run / "timing.jsonl")]
    metrics = read_all(run / "metrics.jsonl")
    return {
        "gains": gains(run),
        "seconds": took,
        "iterations": len(phases),
        "iteration_seconds": sum(sum(each.values()) for each in phases),
        "skipped": sum(line["skipped"] for line in metrics),
        "first_ratio": max(line["ratio_deviation"] for line in metrics),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CHANGES, default="full")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, removed before")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.run, ignore_errors=True)
    write(args.out, quickstart(args.run, args.size))


if __name__ == "__main__":
    main()
