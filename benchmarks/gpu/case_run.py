"""One case as it runs: the network's bare passes, then whole iterations with scalar credit and with ViPO's.

    python benchmarks/gpu/case_run.py --case flux --size full --out case-flux.json

The loop, the adapter, the solver and the learner are vipo's own; the network has random weights. What is measured is
written after every step, so that a part that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from published_cases import BACKBONE, CASES, CREDITS, Case
from random_weights import RandomText, pipeline, save_backbone
from records import write
from vipo.assemble import Session, build
from vipo.engine import Engine
from vipo.generators import attention
from vipo.plan.work import Work, work_of
from vipo.schema import Recipe
from vipo.types import TrainStep

REPEATS = 3  # of a bare pass, after one to warm up
WARM = 1  # iterations that do not count
TIMED = ("forward", "forward_backward", "forward_untrained")  # the last is the forward without the LoRA's layers

Step = tuple[dict[str, float], dict[str, float], tuple[str, ...]]  # metrics, seconds by phase, events


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget() -> None:
    """Give memory back, and begin to watch its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, int | None]:
    """Bytes since the last :func:`forget`; a CPU has no such account."""
    found = torch.cuda.is_available()
    return {
        "peak_allocated": torch.cuda.max_memory_allocated() if found else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if found else None,
    }


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call, everything that it started included."""
    synchronise()
    begin = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - begin


def median_seconds(work: Callable[[], Any]) -> float:
    work()
    return statistics.median(seconds(work) for _ in range(REPEATS))


def opened(recipe: Recipe) -> Session:
    """A session of the recipe, around random weights."""
    engine = Engine(precision=recipe.training.precision)
    torch.manual_seed(0)
    session = build(recipe, engine=engine, pipeline=pipeline(recipe.generator, engine.device))
    generator: Any = session.generator
    generator.text = RandomText(generator.reader)
    return session


def computes_in(recipe: Recipe) -> dict[str, str]:
    """What the phases compute in, beside what their figures are."""
    return {
        "frozen weights": recipe.generator.dtype,
        "trained weights": "float32",
        "passes": "bfloat16 autocast" if recipe.training.precision == "bf16" else recipe.generator.dtype,
        "float32 products": torch.get_float32_matmul_precision(),
        "float32 convolutions": "TF32" if torch.backends.cudnn.allow_tf32 else "float32",
        "attention": recipe.generator.attention,
    }


class Passes:
    """The network alone, at the batch sizes of the loop.

    Args:
        rows: samples of a batch.
    """

    def __init__(self, session: Session, rows: int) -> None:
        self.generator, self.policy = session.generator, session.policy
        device = next(self.generator.network.parameters()).device
        self.latents = torch.randn(rows, *self.generator.latent_shape(), device=device)
        self.sigma = torch.full((rows,), 0.5, device=device)
        self.conditioning = self.generator.encode(["a prompt"]).take(torch.zeros(rows, dtype=torch.long))

    def velocity(self) -> torch.Tensor:
        return self.generator.velocity(self.latents, self.sigma, self.conditioning)

    def forward(self) -> None:
        with torch.no_grad():
            self.velocity()

    def forward_backward(self) -> None:
        self.velocity().square().mean().backward()

    def decode(self) -> None:
        self.generator.decode(self.latents)

    def end(self) -> None:
        for parameter in self.policy.parameters.values():
            parameter.grad = None


def timed(session: Session, sampling: Passes, replaying: Passes) -> dict[str, float]:
    """Median seconds of the three passes of ``TIMED``."""
    forward, both = median_seconds(sampling.forward), median_seconds(replaying.forward_backward)
    with session.policy.reference():
        return dict(zip(TIMED, (forward, both, median_seconds(sampling.forward)), strict=True))


def bare(session: Session, work: Work) -> dict[str, float]:
    """Median seconds of the passes; ``*_one`` are of a batch of 1."""
    found: dict[str, float] = {"batch": work.sampled_at_once, "replay_batch": work.replayed_at_once}
    with attention.scope(session.model.attention):
        sampling, replaying, one = (Passes(session, rows) for rows in (work.sampled_at_once, work.replayed_at_once, 1))
        found |= timed(session, sampling, replaying)
        alone = (work.sampled_at_once, work.replayed_at_once) == (1, 1)
        ones = found if alone else timed(session, one, one)
        found |= {f"{name}_one": ones[name] for name in TIMED}
        found["decode"] = median_seconds(sampling.decode)
    sampling.end()
    return {**found, "bare_passes": bare_passes(found, work), "bare_passes_one": bare_passes(found, work, "_one")}


def bare_passes(found: Mapping[str, float], work: Work, one: str = "") -> float:
    """Seconds of an iteration if it were its network passes and nothing else."""
    sampled, replayed = (1, 1) if one else (work.sampled_at_once, work.replayed_at_once)
    forwards, both = found["forward" + one], found["forward_backward" + one]
    return work.passes / sampled * forwards + work.trained / replayed * both


def iterations(session: Session, wanted: int, until: float) -> dict[str, Any]:
    """So many counted iterations, fewer but one at least if there is no time left ``until`` then."""
    forget()
    steps, took = list[Step](), list[float]()
    while len(took) < WARM + wanted:
        if len(took) > WARM and time.monotonic() + took[-1] > until:
            break
        took.append(seconds(lambda: steps.append(numbers_of(session.trainer.step()))))
    return {**summary(steps, took), **peaks()}


def numbers_of(step: TrainStep) -> Step:
    """An iteration without its pictures, which would count as memory of the next one."""
    return dict(step.metrics), dict(step.seconds), step.events


def summary(steps: list[Step], took: list[float]) -> dict[str, Any]:
    metrics, phases, events = zip(*steps, strict=True)
    counted = phases[WARM:]
    return {
        "iterations": len(counted),
        "iteration": statistics.median(took[WARM:]),
        "slowest": max(took[WARM:]),
        "seconds": {phase: statistics.median(each[phase] for each in counted) for phase in counted[0]},
        "first_ratio": max(each["ratio_deviation"] for each in metrics),
        "clipped_share": statistics.fmean(each["clipped_fraction"] for each in metrics),
        "skipped": sum(each["skipped"] for each in metrics),
        "gradient_norm": metrics[-1]["grad_norm"],
        "model_passes": metrics[-1]["model_passes"],
        "events": sorted({event for told in events for event in told}),
    }


def measure(case: Case, backbones: Path, *, compiled: bool, wanted: int, limit: float, out: Path) -> None:
    """Everything about a case, written to ``out`` as it comes."""
    changes, credits = (["training.compile=true"] if compiled else []), {}
    record: dict[str, Any] = {"title": case.title, "recipe": case.recipe, "changes": [*case.changes, *changes]}
    until = time.monotonic() + limit
    for number, credit in enumerate(CREDITS):
        recipe = case.load(credit, backbones, changes)
        session = opened(recipe)
        if number == 0:
            work = work_of(recipe, 1)
            record |= {"computes_in": computes_in(recipe), "bare": bare(session, work)}
            write(out, record)
        share = (until - time.monotonic()) / (len(CREDITS) - number)
        credits[credit] = iterations(session, wanted, time.monotonic() + share)
        write(out, {**record, "credits": credits})
        del session
        forget()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True)
    parser.add_argument("--size", choices=CASES, default="full")
    parser.add_argument("--compiled", action="store_true", help="with training.compile=true")
    parser.add_argument("--iterations", type=int, default=2, help="counted, of each credit, after one to warm up")
    parser.add_argument("--seconds", type=float, default=120, help="no further iteration is begun after these")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    case = CASES[args.size][args.case]
    place = tempfile.TemporaryDirectory() if case.backbone else nullcontext("")
    with place as folder:
        if case.backbone:
            save_backbone(Path(folder), BACKBONE, "cuda" if torch.cuda.is_available() else "cpu")
        measure(
            case,
            Path(folder),
            compiled=args.compiled,
            wanted=args.iterations,
            limit=args.seconds,
            out=args.out,
        )


if __name__ == "__main__":
    main()
