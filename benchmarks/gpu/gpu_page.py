"""The check's result as one page of Markdown: the device, the parts, the cases as in docs/gpu.md, the comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PHASES = ("rollout", "reward", "map", "update")
NONE = "-"


def page(result: Mapping[str, Any]) -> str:
    """``gpu-check.json`` for people."""
    machine, lines = result["machine"], list[str]()
    lines += [f"# gpu-check: {machine['device']}", ""]
    lines += [f"{result['date']}, size {result['size']}, {result['seconds']:.0f} s. {_versions(machine)}", ""]
    lines += [f"**{result['verdict']}**", ""]
    lines += [*_parts(result["parts"]), "", *_cases(result), "", *_other(result), ""]
    return "\n".join([*lines, *_comparison(result["comparison"]), ""])


def _versions(machine: Mapping[str, Any]) -> str:
    names = ("torch", "cuda", "cudnn", "driver", "diffusers", "accelerate", "python")
    return ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name)) + "."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _parts(parts: Mapping[str, Any]) -> list[str]:
    rows = [[name, part["outcome"] + _reason(part), f"{part['seconds']:.0f}"] for name, part in parts.items()]
    return table(["part", "outcome", "seconds"], rows)


def _reason(part: Mapping[str, Any]) -> str:
    said = part.get("why") or next((line for line in reversed(part.get("said", [])) if line.strip()), "")
    return f": {said.replace('|', '/')}" if said else ""


def _cases(result: Mapping[str, Any]) -> list[str]:
    cases = {name: record for name, record in result["records"].items() if name.startswith("case-") and record}
    if not cases:
        return ["No case was measured."]
    columns = [dict(_rows(name.removeprefix("case-"), record, result)) for name, record in cases.items()]
    names = list(dict.fromkeys(row for column in columns for row in column))
    head = [_heading(name, record) for name, record in cases.items()]
    return table(["", *head], [[name, *(column.get(name, NONE) for column in columns)] for name in names])


def _heading(name: str, record: Mapping[str, Any]) -> str:
    return record["title"] + (", training.compile" if name.endswith("-compiled") else "")


def _rows(case: str, record: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows of one case, as in docs/gpu.md."""
    found, bare, credits = result["figures"], record.get("bare"), record.get("credits", {})
    computed = record.get("computes_in", {})
    yield "weights; passes in", f"{computed.get('frozen weights', NONE)}; {computed.get('passes', NONE)}"
    if bare:
        yield "batch", f"{bare['batch']:g}, replayed {bare['replay_batch']:g}"
        rate = _rate(found, case)
        yield "forward; forward and backward", _both(bare, "", rate)
        yield "the same at batch 1", _both(bare, "_one", {})
        without = f"{bare['forward_untrained']:.3f} s (batch 1: {bare['forward_untrained_one']:.3f} s)"
        yield "forward without LoRA", without
        yield "decoding one batch", f"{bare['decode']:.3f} s"
        yield "bare passes; at batch 1", f"{bare['bare_passes']:.1f} s; {bare['bare_passes_one']:.1f} s"
    yield "iteration, scalar; ViPO", _pair(credits, lambda each: f"{each['iteration']:.1f} s")
    yield "counted iterations", _pair(credits, lambda each: f"{each['iterations']}")
    for phase in PHASES:
        yield f"of it {phase}", _pair(credits, lambda each, phase=phase: f"{each['seconds'][phase]:.2f} s")
    yield "over bare passes", _figures(found, case, credits, "iteration_over_bare", "{:.3f}")
    yield "peak allocated", _pair(credits, lambda each: _gigabytes(each["peak_allocated"]))
    yield "peak reserved", _pair(credits, lambda each: _gigabytes(each["peak_reserved"]))
    planned = result["records"].get(f"plan-{case.removesuffix('-compiled')}")
    if planned:
        yield "predicted by the plan", "; ".join(_gigabytes(value) for value in planned["peak_bytes"].values())
        share = f"{planned['utilisation']:.0%}"
        seconds = planned["iteration_seconds"]
        yield "predicted seconds", f"sample {seconds['sample']:.1f}, update {seconds['update']:.1f} at {share}"
    yield "first ratio, off 1 by", _figures(found, case, credits, "first_ratio", "{:.1e}")
    yield "clipped share", _figures(found, case, credits, "clipped_share", "{:.1%}")
    yield "updates skipped", _figures(found, case, credits, "skipped", "{:g}")


def _rate(found: Mapping[str, float], case: str) -> dict[str, str]:
    works = ("forward", "forward_backward")
    named = {work: found.get(f"{case}.{work}_tflops") for work in works}
    return {work: f" ({value:.3g} TFLOP/s)" for work, value in named.items() if value is not None}


def _both(bare: Mapping[str, float], one: str, rate: Mapping[str, str]) -> str:
    works = ("forward", "forward_backward")
    return "; ".join(f"{bare[work + one]:.3f} s{rate.get(work, '')}" for work in works)


def _pair(credits: Mapping[str, Any], shown: Any) -> str:
    return "; ".join(shown(each) for each in credits.values()) or NONE


def _figures(found: Mapping[str, float], case: str, credits: Mapping[str, Any], name: str, form: str) -> str:
    return "; ".join(form.format(found[f"{case}.{credit}.{name}"]) for credit in credits) or NONE


def _gigabytes(size: float | None) -> str:
    return NONE if size is None else f"{size / 1e9:.1f} GB"


def _other(result: Mapping[str, Any]) -> list[str]:
    """Sentences on the quickstart, the killed run and the tests."""
    records, told = result["records"], []
    if quickstart := records.get("quickstart"):
        gained = ", ".join(f"{score} {gain:+.3f}" for score, gain in quickstart["gains"].items())
        told.append(
            f"Quickstart: {gained} in {quickstart['seconds']:.0f} s ({quickstart['iterations']} iterations in"
            f" {quickstart['iteration_seconds']:.0f} s)."
        )
    if kill := records.get("kill"):
        equal = "bit for bit as if never stopped" if kill["equal"] else f"differs in {', '.join(kill['differences'])}"
        again = (
            "" if "repeats" not in kill else f"; an unbroken run {'repeats' if kill['repeats'] else 'does not repeat'}"
        )
        told.append(f"SIGKILL after {kill['iterations_done']} iterations and --resume: {equal}{again}.")
    for suite, tests in (records.get("tests") or {}).items():
        seen = "with the GPU" if tests["device_visible"] else "without a GPU"
        failed = "".join(f"; failed: `{name}`" for name in tests["failed"])
        whole = "" if tests["complete"] else ", not to their end"
        told.append(
            f"Tests ({suite}, {seen}): {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']}"
            f" skipped in {tests['seconds']:.0f} s{whole}{failed}."
        )
    return [line for sentence in told for line in (sentence, "")]


def _comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    sign = {"higher": "at most", "lower": "at least"}
    shown = [
        [
            row["figure"],
            f"{row['value']:.4g}",
            f"{row['baseline']:g}",
            f"{sign[row['worse']]} {row['limit']:.4g}",
            "ok" if row["ok"] else "**worse**",
            row["why"],
        ]
        for row in rows
    ]
    return table(["figure", "here", "baseline", "accepted", "", "baseline is"], shown)
