"""The project's tests, with the device that they find, as a record: how many passed, which failed.

    python benchmarks/gpu/device_tests.py --out tests.json --limit 150

Tests that compare with what a CPU computes, bit for bit, are marked ``on_cpu`` and see none but it. Files whose tests
compute nothing on a device, or in processes that hide it, say nothing of it and are left to ``make test``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from records import write

ROOT = Path(__file__).resolve().parents[2]
MOST_WORKERS = 16
GRACE = 10.0  # seconds that an interrupted pytest has for its report
CHECKED_BY = ("pytest_timeout", "beartype")  # what the options in pyproject.toml need
ELSEWHERE = ("claims", "code_from_others", "context_parallel", "docs*", "engine_files", "faults", "fetch", "files")
ELSEWHERE += ("full_size", "gpu_check", "input_properties", "lock", "package", "plan", "prompts*", "recipe", "recipes")
ELSEWHERE += ("registry", "report", "rewards_misbehave", "rewards_remote", "rewards_server*", "runs_folder", "sharded")
ELSEWHERE += ("sweep", "together", "tracking", "workload")
SUITES = {"device": "not on_cpu", "cpu": "on_cpu"}


def present(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def options(workers: int) -> list[str]:
    """What can be had of pyproject's options and of several processes."""
    found = ["-q", "-p", "no:cacheprovider"]
    if not all(map(present, CHECKED_BY)):
        found += ["-o", "addopts=--strict-markers"]
    found += [f"--ignore-glob=tests/test_{name}.py" for name in ELSEWHERE]
    return found + (["-n", str(workers)] if present("xdist") and workers > 1 else [])


def run(suite: str, place: Path, workers: int, limit: float, chosen: Sequence[str]) -> dict[str, Any]:
    """One pytest, its counts; ``complete`` says whether it came to its end."""
    report = place / f"tests-{suite}.xml"
    report.unlink(missing_ok=True)
    seen = ["--run-needs-gpu"] if suite == "device" and torch.cuda.is_available() else []
    command = [sys.executable, "-m", "pytest", *options(workers), *seen, "-m", SUITES[suite], f"--junitxml={report}"]
    begin = time.monotonic()
    with (place / f"tests-{suite}.log").open("wb") as log:
        process = subprocess.Popen([*command, *chosen], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=_told())
        ended = True
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            ended = False
            _end(process)
    found = {**counted(report), "seconds": time.monotonic() - begin, "device_visible": bool(seen)}
    ends = (0, 1, *((5,) if chosen else ()))  # 5: of those chosen none is of this suite
    return found if ended and process.returncode in ends else {**found, "complete": False}


def _told() -> dict[str, str]:
    """The environment of a pytest that is not part of another one: that one may see a GPU."""
    return {key: value for key, value in os.environ.items() if key != "VIPO_TESTS_SEE_GPU"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it, which has pytest tell what it knows by then; xdist's workers end with it."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def counted(report: Path) -> dict[str, Any]:
    if not report.exists():
        return {"complete": False, "passed": 0, "skipped": 0, "failed": []}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if _has(case, "failure", "error")]
    skipped = sum(_has(case, "skipped") for case in cases)
    return {"complete": True, "passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def _has(case: ElementTree.Element, *tags: str) -> bool:
    return any(case.find(tag) is not None for tag in tags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=150, help="seconds")
    parser.add_argument("--workers", type=int, default=min(MOST_WORKERS, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("chosen", nargs="*", help="files or tests, instead of all")
    args = parser.parse_args()
    until, found = time.monotonic() + args.limit, {}
    for suite in SUITES:
        left = max(until - time.monotonic(), 1)
        found[suite] = run(suite, args.out.parent, args.workers, left, args.chosen)
        write(args.out, found)


if __name__ == "__main__":
    main()
