"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from vipo.evaluation.vbench import Totals


def evaluation_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of :func:`vipo.evaluation.estimate.summary`."""
    table = Table("reward", "model", "scored", "mean", "95 % interval", "gain over base")
    for row in rows:
        scored = f"{row['scored']} of {row['samples']}"
        gain = " ".join(_estimate(row["gain"] or {}, "+"))
        table.add_row(*map(Text, (row["reward"], row["model"], scored, *_estimate(row), gain)))
    return table


def _estimate(found: Mapping[str, Any], sign: str = "") -> tuple[str, str]:
    """Mean and interval; two empty strings if nothing was scored."""
    if found.get("mean") is None:
        return "", ""
    mean, low, high = (f"{found[key]:{sign}.4f}" for key in ("mean", "low", "high"))
    return mean, f"[{low}, {high}]"


def vbench_table(rows: Sequence[Mapping[str, Any]], totals: Totals) -> Table:
    """The rows of :func:`vipo.evaluation.vbench.table` and the three totals, in per cent as they are published."""
    table = Table("dimension", "group", "raw", "normalised", "weight")
    for row in rows:
        table.add_row(
            row["dimension"], row["group"], _percent(row["score"]), _percent(row["normalized"]), f"{row['weight']:g}"
        )
    table.add_section()
    for name in ("quality", "semantic", "total"):
        table.add_row(name.capitalize(), "", "", _percent(getattr(totals, name)), "")
    return table


def _percent(share: float | None) -> str:
    return "missing" if share is None else f"{100 * share:.2f}"
