"""A table as text, and how its figures are written: three decimals, and what they rest on in small print."""

from __future__ import annotations

from dataclasses import dataclass

from matrix import ARMS
from results import Results, Spread, planned_seeds
from vipo.report.svg import fixed, signed

NONE = "\N{EN DASH}"

Cell = tuple[str, str]
"""What is said, and a remark in small print below it."""


@dataclass(frozen=True)
class Table:
    """Lines of one cell per column; a line of a single cell is a heading over those that follow."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]


def arm_cell(arm: str) -> Cell:
    return arm, ", ".join(ARMS[arm].changes) or "the shared keys alone"


def seeds_cell(results: Results, arm: str, iteration: int) -> Cell:
    return f"{len(results.arms.get(arm, {}))} of {planned_seeds(arm)}", f"{iteration} iterations"


def gain_cell(found: Spread | None) -> Cell:
    """The mean, below it the range and the standard deviation over seeds."""
    if found is None:
        return NONE, ""
    low, high = found.range
    return signed(found.mean), over_seeds(found, f"{signed(low)} to {signed(high)}")


def level_cell(found: Spread | None) -> Cell:
    if found is None:
        return NONE, ""
    low, high = found.range
    return fixed(found.mean), over_seeds(found, f"{fixed(low)} to {fixed(high)}")


def over_seeds(found: Spread, between: str) -> str:
    return f"{between}, SD {fixed(found.deviation)}" if found.seeds > 1 else "1 seed"


def effect_cell(found: Spread | None) -> Cell:
    """A paired difference with its interval, below it each seed's own."""
    if found is None:
        return NONE, ""
    own = ", ".join(signed(value) for value in found.per_seed.values())
    remark = own if found.seeds > 1 else "1 seed: interval over prompts only"
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]", remark


def t_cell(found: Spread | None) -> Cell:
    """The interval that knows how few seeds there are."""
    return (NONE, "") if found is None or found.t is None else (f"[{signed(found.t[0])}, {signed(found.t[1])}]", "")


def bounded_cell(found: Spread | None) -> Cell:
    """A mean with its interval."""
    return (NONE, "") if found is None else (f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]", "")


def optional_cell(value: float | None) -> Cell:
    return (NONE if value is None else fixed(value)), ""


def interval_cell(middle: float, low: float, high: float) -> Cell:
    return f"{fixed(middle, 2)} [{fixed(low, 2)}, {fixed(high, 2)}]", ""
