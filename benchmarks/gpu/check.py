"""``make gpu-check``: does vipo work on this GPU, how fast, in how much memory, and has a ratio become worse?

    python benchmarks/gpu/check.py --out runs/gpu-check
    python benchmarks/gpu/check.py --out runs/gpu-check --device cpu --size toy     # the same code, no GPU

Parts, each in a process of its own: ``full`` (networks of published size with random weights: bare passes, iterations
with scalar credit and with ViPO's, memory), ``quickstart`` (with its gain), ``kill`` (SIGKILL in an iteration, resume),
``tests`` (the project's, with the device that they find). A part that fails or is out of time leaves the others alone.

Writes ``gpu-check.json`` and ``gpu-check.md``. Exit code 1: a part failed, or a figure is worse than
``baseline.json`` by more than its margin. 0: all is well, or there is no GPU, which is said in a sentence.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from figures import Expected, compare, figures
from gpu_page import page
from jobs import HERE, Job
from published_cases import CASES, COMPILED
from records import read, write
from vipo.cli.commands import grow_segments
from vipo.environment import environment
from vipo.files import write_text
from vipo.schema import TrainingSection

PARTS = ("full", "quickstart", "kill", "tests")
MINUTES = 8.75  # for everything; each part below has its own seconds, the sum of those that usually come is less
NEEDED = 45 * 10**9  # bytes of memory for the cases of full size
MEASURING = {"flux": 150.0, "wan": 140.0}  # seconds of a case after which no further iteration is begun
SHORTER = 0.75  # of these, if there is a compiled case too
PATIENCE = {"full": 1.0, "toy": 2.0}  # times the limits of what is not timed: a CPU may be busy
START = 75.0  # seconds more that a case may take, for imports and the iterations that are begun

Stage = Sequence[Job]  # parts that run at the same time


def stages(parts: Sequence[str], cases: Sequence[str], size: str, out: Path) -> list[Stage]:
    """What is run, in order. What is timed runs alone; the plans need no GPU and run beside the first case."""
    found: list[Stage] = []
    compiled = "full" in parts and COMPILED in cases and "compile" in TrainingSection.model_fields
    share = SHORTER if compiled else 1.0
    if "full" in parts:
        found.append([_plan(case, size) for case in cases])
        found += [[_case(case, size, share)] for case in cases]
        if compiled:
            found.append([_case(COMPILED, size, share, "--compiled")])
    beside, limit = list[Job](), 150.0 * PATIENCE[size]
    if "quickstart" in parts:
        run = ("--size", size, "--run", str(out / "runs" / "quickstart"))
        beside.append(Job("quickstart", "quickstart_gain.py", run, limit))
    if "kill" in parts:
        beside.append(Job("kill", "kill_resume.py", ("--runs", str(out / "runs" / "kill")), limit))
    if "tests" in parts:
        beside.append(Job("tests", "device_tests.py", ("--limit", "150"), 165.0))
    found += [beside] if beside else []
    return found


def _plan(case: str, size: str) -> Job:
    return Job(f"plan-{case}", "case_plan.py", ("--case", case, "--size", size), 300.0, hidden=True)


def _case(case: str, size: str, share: float, *more: str) -> Job:
    counted, seconds = "1" if size == "toy" or more else "2", MEASURING[case] * share
    limit = ("--iterations", counted, "--seconds", str(seconds), *more)
    name = f"case-{case}{'-compiled' if more else ''}"
    arguments = ("--case", case, "--size", size, *limit)
    return Job(name, "case_run.py", arguments, seconds + START, least=seconds if more else 20.0)


def run(found: Sequence[Stage], out: Path, device: str, until: float) -> dict[str, Any]:
    """Every part's outcome, by name."""
    try:
        outcomes = _run(found, out, device, until)
    finally:  # nothing is left on the GPU, whatever ends this process
        for stage in found:
            for job in stage:
                job.stop()
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome['outcome']} ({outcome['seconds']:.0f} s)", flush=True)
    return outcomes


def _run(found: Sequence[Stage], out: Path, device: str, until: float) -> dict[str, Any]:
    """One stage after the other; plans go on beside what follows them."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    outcomes: dict[str, Any] = {}
    for stage in found:
        for job in stage:
            if until - time.monotonic() > job.least:
                print(f"{job.name} ...", flush=True)
                job.start(out, environment)
        outcomes |= {job.name: job.end(out, until) for job in stage if not job.hidden}
    return outcomes | {job.name: job.end(out, until) for stage in found for job in stage if job.hidden}


def machine(device: str) -> dict[str, Any]:
    """What this ran on."""
    known = environment()
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "python": known["python"],
        **known["packages"],
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": _driver() if cuda else None,
        "cores": os.cpu_count(),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else None


def expected(file: Path, size: str) -> list[Expected]:
    return [Expected(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))[size]]


def verdict(outcomes: Mapping[str, Any], comparison: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """Whether all is well, and a sentence."""
    broken = [name for name, each in outcomes.items() if each["outcome"] not in ("done", "left out")]
    worse = [row["figure"] for row in comparison if not row["ok"]]
    left = [name for name, each in outcomes.items() if each["outcome"] == "left out"]
    told = [f"did not come to their end: {', '.join(broken)}"] if broken else []
    told += [f"worse than the baseline by more than the margin: {', '.join(worse)}"] if worse else []
    told += [f"left out: {', '.join(left)}"] if left else []
    if not told:
        return True, f"All is well: {len(outcomes)} parts, {len(comparison)} figures compared."
    return not (broken or worse), f"{'; '.join(told)[0].upper()}{'; '.join(told)[1:]}."


def check(args: argparse.Namespace) -> bool:
    """Run the parts, write both files, say what came of it."""
    begin = time.monotonic()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    grow_segments()  # for the parts, as the command line does for a run
    facts = machine(args.device)
    parts, cases = list(args.only), list(args.cases)
    outcomes: dict[str, Any] = {}
    if "full" in parts and args.size == "full" and (facts["memory"] or 0) < NEEDED:
        parts.remove("full")
        why = f"it needs {NEEDED / 1e9:.0f} GB of GPU memory, and {facts['device']} has less"
        outcomes["full"] = {"outcome": "left out", "seconds": 0.0, "why": why}
    outcomes |= run(stages(parts, cases, args.size, out), out, args.device, begin + args.minutes * 60)
    records = {name: read(out / f"{name}.json") for name, each in outcomes.items() if each["outcome"] != "left out"}
    found = figures(records)
    comparison = compare(found, expected(args.baseline, args.size))
    good, sentence = verdict(outcomes, comparison)
    result = {
        "verdict": sentence,
        "ok": good,
        "date": datetime.date.today().isoformat(),
        "size": args.size,
        "seconds": time.monotonic() - begin,
        "machine": facts,
        "parts": outcomes,
        "figures": found,
        "comparison": comparison,
        "records": records,
    }
    write(out / "gpu-check.json", result)
    write_text(out / "gpu-check.md", page(result))
    print(f"{sentence}\nSee {out / 'gpu-check.md'} and {out / 'gpu-check.json'}.", flush=True)
    return good


def listed(known: Sequence[str]) -> Any:
    """A parser of names separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for both files, the logs and the runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=CASES, default="full")
    parser.add_argument("--only", type=listed(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--cases", type=listed(list(CASES["full"])), default=list(CASES["full"]), help="of full")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--baseline", type=Path, default=HERE / "baseline.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu-check is skipped: torch {torch.__version__} finds no CUDA GPU here; its CPU form is"
            " `python benchmarks/gpu/check.py --out DIR --device cpu --size toy`."
        )
        return
    if args.device == "cpu" and args.size == "full" and "full" in args.only:
        parser.error("networks of published size need a GPU; give --size toy, or --only without full")
    sys.exit(0 if check(args) else 1)


if __name__ == "__main__":
    main()
