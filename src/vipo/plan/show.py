"""A plan as text for a terminal."""

from __future__ import annotations

import re

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vipo.errors import UserError
from vipo.plan.account import Plan
from vipo.plan.advice import Advice
from vipo.plan.batches import HEADROOM, Batches

MINUTE, HOUR = 60, 3600  # seconds


def memory_size(text: str) -> int:
    """Bytes of "80GB", "40 GiB" or a plain number.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[KMGT]i?B)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise UserError(f"memory {text!r} is not understood; give it like 80GB, 40GiB or a number of bytes")
    prefix = match[2].upper().rstrip("B")
    base = 1024 if prefix.endswith("I") else 1000
    return int(float(match[1]) * base ** (" KMGT".index(prefix[0]) if prefix else 0))


def gigabytes(size: float) -> str:
    """Bytes for people, in units of 1e9 and below."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale / 10:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"


def lasting(seconds: float) -> str:
    """A time for people, no finer than a plan is."""
    if seconds < 1:
        return "under a second"
    if seconds < 2 * MINUTE:
        return f"about {seconds:.3g} s"
    return f"about {seconds / MINUTE:.3g} min" if seconds < 2 * HOUR else f"about {seconds / HOUR:.3g} h"


def plan_view(found: Plan, advice: Advice, batches: Batches | None = None) -> RenderableType:
    """Tables of memory and time, and what follows from them."""
    lines = [*sentences(found, advice), *(_batches(found, batches) if batches else [])]
    return Group(_resident(found), _phases(found), _time(found), *(Text(f"  {line}") for line in lines))


def _batches(found: Plan, proposed: Batches) -> list[str]:
    keys = f"training.rollout_batch_size={proposed.rollout} training.replay_batch_size={proposed.replay}"
    there = gigabytes(proposed.plan.peak)
    if not proposed.plan.fits:
        return [f"No batch sizes fit; with the smallest, {keys}, it needs {there}."]
    return [
        f"Batch sizes that leave {HEADROOM:.0%} free where they work: {keys}; then it needs {there}"
        f" and about {proposed.plan.iteration_seconds:.3g} s an iteration instead of {found.iteration_seconds:.3g}."
    ]


def _resident(found: Plan) -> Table:
    table = Table("always there", "per GPU")
    for name, size in found.resident.items():
        table.add_row(name, gigabytes(size))
    table.add_section()
    table.add_row("together", gigabytes(sum(found.resident.values())))
    return table


def _phases(found: Plan) -> Table:
    table = Table("phase", "adds", "together")
    for phase, items in found.phases.items():
        if items:
            added = ", ".join(f"{name} {gigabytes(size)}" for name, size in items.items())
            table.add_row(phase, added, gigabytes(found.total(phase)), style="bold" if phase == found.worst else "")
    return table


def _time(found: Plan) -> Table:
    table = Table("work", "seconds of an iteration")
    for name, seconds in found.seconds.items():
        table.add_row(name, f"{seconds:.3g}")
    return table


def sentences(found: Plan, advice: Advice) -> list[str]:
    """What fits, what to change, how long it takes."""
    machine, verdict = found.machine, "fits" if found.fits else "does not fit"
    lies = "on each of" if found.sharding == "none" else "sharded over"
    where = f"{lies} {machine.processes} GPU(s), in phase {found.worst!r}"
    rate = f"{machine.utilisation:.0%} of {machine.tflops:g} TFLOP/s"
    lines = [
        f"{found.recipe} {verdict}: {gigabytes(found.peak)} of {gigabytes(machine.memory)} {where}.",
        f"{lasting(found.iteration_seconds).capitalize()} an iteration at {rate},"
        f" {lasting(found.hours * HOUR)} for {found.iterations} iterations, without evaluations.",
        f"Start it with: {found.launch}",
        *(_advice(found, advice)),
        *found.notes,
    ]
    return lines


def _advice(found: Plan, advice: Advice) -> list[str]:
    changes = ", ".join(map(str, advice.changes))
    if found.fits:
        return [f"There is room to be faster by {-advice.seconds:.3g} s: {changes}."] if changes else []
    if advice.plan.fits:
        more = f"{advice.seconds:+.3g} s an iteration"
        return [f"It would fit, with {gigabytes(advice.plan.peak)} and {more}, with: {changes}."]
    best = f"; the best found needs {gigabytes(advice.plan.peak)}, with: {changes}" if changes else ""
    return [f"Nothing that vipo can change makes it fit{best}. Plan with more GPUs or more memory."]
