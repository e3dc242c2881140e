"""From what the parts measured to figures, one number per name, and whether one of them became worse.

A name is ``case.credit.figure``, ``quickstart.gain.score`` or the like. Compared are ratios and other numbers that do
not depend on how fast the device is; each has a baseline, a margin and which way is worse in ``baseline.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TERA = 1e12


@dataclass(frozen=True)
class Expected:
    """What a figure should be.

    Args:
        baseline: as measured, or as it must be.
        margin: how far it may be worse, in its own unit.
        worse: ``higher`` or ``lower``.
        why: where the baseline is from.
    """

    figure: str
    baseline: float
    margin: float
    worse: str
    why: str

    @property
    def limit(self) -> float:
        return self.baseline + (self.margin if self.worse == "higher" else -self.margin)

    def holds(self, value: float) -> bool:
        """False for NaN, too."""
        return value <= self.limit if self.worse == "higher" else value >= self.limit


def figures(parts: Mapping[str, Any]) -> dict[str, float]:
    """Every figure that could be had of the parts' records, by part; a part without a record is None."""
    found: dict[str, float] = {}
    for name, record in parts.items():
        if not record:
            continue
        if name.startswith("case-"):
            case = name.removeprefix("case-")
            planned = parts.get(f"plan-{case.removesuffix('-compiled')}")
            found |= {f"{case}.{key}": value for key, value in of_case(record, planned)}
            found |= against_uncompiled(case, record, parts)
        elif name == "quickstart":
            found |= {f"quickstart.gain.{score}": value for score, value in record["gains"].items()}
            found |= {f"quickstart.{key}": record[key] for key in ("skipped", "first_ratio", "seconds")}
        elif name == "kill":
            found["kill.equal"] = float(record["equal"])
        elif name == "tests":
            found |= of_tests(record)
    return found


def of_case(record: Mapping[str, Any], planned: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    """Figures of one case, without its name."""
    bare, credits = record.get("bare"), record.get("credits", {})
    if not bare:
        return
    if planned:
        for work in ("forward", "forward_backward"):
            yield f"{work}_tflops", planned[f"{work}_flops"] / bare[work] / TERA
    for one in ("", "_one"):
        yield f"lora_over_untrained{one}", bare[f"forward{one}"] / bare[f"forward_untrained{one}"]
    for credit, measured in credits.items():
        yield f"{credit}.iteration_over_bare", measured["iteration"] / bare["bare_passes"]
        yield f"{credit}.first_ratio", measured["first_ratio"]
        yield f"{credit}.clipped_share", measured["clipped_share"]
        yield f"{credit}.skipped", measured["skipped"]
        if measured["peak_allocated"]:
            yield f"{credit}.reserved_over_allocated", measured["peak_reserved"] / measured["peak_allocated"]
            if planned:
                yield f"{credit}.allocated_over_planned", measured["peak_allocated"] / planned["peak_bytes"][credit]
    if {"sample", "advantage_map"} <= credits.keys():
        yield "vipo_over_scalar", credits["advantage_map"]["iteration"] / credits["sample"]["iteration"]


def against_uncompiled(case: str, record: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, float]:
    """Of a compiled case, its scalar iteration over the same one uncompiled."""
    plain = parts.get(f"case-{case.removesuffix('-compiled')}") if case.endswith("-compiled") else None
    sides = [each.get("credits", {}).get("sample") if each else None for each in (record, plain)]
    return {f"{case}.over_uncompiled": sides[0]["iteration"] / sides[1]["iteration"]} if all(sides) else {}


def of_tests(record: Mapping[str, Any]) -> dict[str, float]:
    suites = record.values()
    return {
        "tests.passed": sum(suite["passed"] for suite in suites),
        "tests.skipped": sum(suite["skipped"] for suite in suites),
        "tests.failed": sum(len(suite["failed"]) for suite in suites),
        "tests.unfinished": float(sum(not suite["complete"] for suite in suites)),
    }


def compare(found: Mapping[str, float], expected: list[Expected]) -> list[dict[str, Any]]:
    """One row for each figure that there is and that something is expected of."""
    return [
        {
            "figure": each.figure,
            "value": found[each.figure],
            "baseline": each.baseline,
            "worse": each.worse,
            "limit": each.limit,
            "ok": each.holds(found[each.figure]),
            "why": each.why,
        }
        for each in expected
        if each.figure in found
    ]
