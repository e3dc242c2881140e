"""Run every arm that has no result yet, several at a time, and say how long it will take.

    python experiments/claims/run.py                     all of it; stop it whenever you like, it goes on where it was
    python experiments/claims/run.py --quick --out DIR   one seed and a few iterations: checks the machinery

Results are one JSON file per arm and seed in ``experiments/claims/results`` (or --out), which ``page.py`` reads.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matrix import ARMS, BLOCKS, QUICK, SETTING, Setting
from vipo.runs.pool import Pool, Task

HERE = Path(__file__).resolve().parent
MINUTES_PER_ITERATION = 0.1  # one thread; only for the first estimate, then this run's own times count


@dataclass(frozen=True)
class Job:
    arm: str
    seed: int
    result: Path

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"


def jobs(setting: Setting, out: Path, only: Sequence[str]) -> list[Job]:
    """What is still to do: the most telling arms first, each seed of all of them before the next seed."""
    names = [name for name in ARMS if not only or name in only]
    blocks = [list(ARMS)[start:end] for start, end in zip((0, *BLOCKS), BLOCKS, strict=False)]
    every = [
        Job(arm, seed, out / f"{arm}-{seed}.json")
        for block in blocks
        for seed in range(max(seeds(arm, setting) for arm in block))
        for arm in block
        if arm in names and seed < seeds(arm, setting)
    ]
    return [job for job in every if not job.result.is_file()]


def seeds(arm: str, setting: Setting) -> int:
    return setting.seeds if setting is QUICK else ARMS[arm].seeds or setting.seeds


def iterations(job: Job, setting: Setting) -> int:
    arm = ARMS[job.arm]
    own = None if setting is QUICK else arm.iterations
    return setting.every if arm.short else own or setting.iterations


def task(job: Job, setting: Setting, threads: int, pictures: Path) -> Task:
    command = [sys.executable, str(HERE / "arm.py"), job.arm, str(job.seed), str(job.result)]
    command += ["--iterations", str(iterations(job, setting)), "--every", str(setting.every)]
    command += ["--prompts", str(setting.prompts), "--pictures", str(pictures), "--threads", str(threads)]
    tuning = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592", "OMP_NUM_THREADS": str(threads)}
    return Task(job.name, command, job.result.with_suffix(".log"), tuning)


def work(waiting: Sequence[Job], setting: Setting, workers: int, threads: int, pictures: Path) -> int:
    """Run them all; how many failed, or were to run yet when a stop was asked for."""
    total, minutes, done = len(waiting), list[float](), 0
    guess = sum(iterations(job, setting) for job in waiting) * MINUTES_PER_ITERATION / workers
    print(f"{total} arms to train, {workers} at a time; about {guess:.0f} minutes on two cores", flush=True)
    for job in waiting:
        job.result.parent.mkdir(parents=True, exist_ok=True)
    pool = Pool(workers)
    for ended in pool.run([task(job, setting, threads, pictures) for job in waiting]):
        minutes.append(ended.seconds / 60)
        done += ended.code == 0
        left = (total - len(minutes)) * sum(minutes) / len(minutes) / workers
        verdict = "done" if ended.code == 0 else "stopped" if pool.stop.asked else f"FAILED, see {ended.log}"
        print(
            f"[{len(minutes)}/{total}] {ended.name}: {verdict}, {minutes[-1]:.1f} min; {left:.0f} min left", flush=True
        )
    return total - done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few iterations")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--pictures", type=Path, default=Path("runs/claims"), help="folder for sheets of pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="arms at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads per arm")
    parser.add_argument("--only", nargs="*", default=[], choices=[*ARMS, []], help="these arms")
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    args = parser.parse_args()
    setting = QUICK if args.quick else SETTING
    waiting = jobs(setting, args.out, args.only)
    if args.dry_run:
        print("\n".join(job.name for job in waiting))
        return
    sys.exit(1 if work(waiting, setting, args.workers, args.threads, args.pictures) else 0)


if __name__ == "__main__":
    main()
