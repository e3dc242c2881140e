"""The live line of a training run: iteration, reward, judges, clipping, ratio check, seconds, time left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vipo.evaluation.estimate import estimate, paired, pairs
from vipo.runs.run import Evaluated, Run
from vipo.types import TrainStep

RATIO_TOLERANCE = 1e-6  # a first-update log-ratio above this is reported as the noise floor


def follow(run: Run, console: Console) -> None:
    """Drive a run to its end, showing what happens: a live line on a terminal, a line per iteration elsewhere."""
    seconds: list[float] = []
    known = {} if run.start.evaluates_anew else run.directory.first_scores()
    base = {name: torch.tensor(_numbers(values)) for name, values in known.items()}
    held_out, warned = "", False
    for note in run.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for notice in run.notices:
        console.print(notice, style="yellow", markup=False, highlight=False, soft_wrap=True)
    line = Text("sampling ...")
    with Live(line, console=console, refresh_per_second=8, transient=True) as live:
        for event in run:
            if isinstance(event, Evaluated):
                console.print(_evaluation(event, base, run.comparable_since))
                for failure in event.evaluation.failures:
                    console.print(Text(failure, style="yellow"))
                held_out = _held_out(event, run.recipe.judges)
                continue
            seconds.append(sum(event.seconds.values()))
            status = _status(run, event, seconds, held_out)
            live.update(status)
            if not console.is_terminal:
                console.print(status, soft_wrap=True)
            for message in event.events[len(run.notices) if event.iteration == 0 else 0 :]:  # those were told
                console.print(Text(f"iteration {event.iteration}: {message}", style="yellow"))
            if not warned and event.metrics["ratio_deviation"] > RATIO_TOLERANCE:
                warned = True
                console.print(_noise_floor(event.metrics, run.recipe.objective.clip_range), style="yellow")


def _noise_floor(metrics: Mapping[str, float], clip_range: float) -> str:
    floor = metrics["ratio_deviation"]
    return (
        f"ratio check: on unchanged weights the likelihood ratio is off by up to {floor:.1e} (numerical noise floor);"
        f" clip_range is {clip_range:g}" + (", which is below it: raise it" if floor > clip_range else "")
    )


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _held_out(event: Evaluated, judges: Iterable[str]) -> str:
    """The judges' last word."""
    means = {name: float(event.scores[name].nanmean()) for name in judges}
    return "".join(f"  {name} {mean:.3f}" for name, mean in means.items())


def _status(run: Run, step: TrainStep, seconds: list[float], held_out: str) -> Text:
    m, total = step.metrics, run.recipe.training.iterations
    done = step.iteration + 1
    recent = seconds[-10:]
    left = (total - done) * sum(recent) / len(recent)
    spread = " ".join(f"±{value:.3f}" for key, value in m.items() if key.startswith("spread/"))
    return Text.assemble(
        (f"{done:>4}/{total} ", "bold"),
        ("reward ", "dim"),
        (f"{m['reward']:+.4f} ", "bold green"),
        (f"{spread}{held_out}  ", "dim"),
        f"{_loss(m)}  |g| {m['grad_norm']:.2g}  ",
        (f"{seconds[-1]:.1f} s  left {_clock(left)}", "cyan"),
    )


def _loss(m: Mapping[str, float]) -> str:
    """What the ratios did; the value of a loss that has none."""
    if "clipped_fraction" not in m:
        return f"loss {m['loss']:+.2g}"
    ratio = "ratio 1 ok" if m["ratio_deviation"] <= RATIO_TOLERANCE else f"ratio off {m['ratio_deviation']:.0e}"
    return f"clipped {m['clipped_fraction']:.0%}  {ratio}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _evaluation(event: Evaluated, base: dict[str, Tensor], since: int) -> Table:
    """Scores now, and their paired gain over those after ``since`` iterations."""
    samples_per_prompt = event.evaluation.samples_per_prompt
    best = f", the best so far by {event.best_by}" if event.best_by and event.iteration else ""
    table = Table(title=f"after {event.iteration} iterations{best}", title_justify="left")
    over = f"iteration {since}" if since else "untrained"
    for column in ("reward", "mean", f"gain over {over}, 95 % interval"):
        table.add_column(column)
    for name, values in event.scores.items():
        first = base.setdefault(name, values)
        change = ""
        if first is not values and pairs(values, first):
            gain = paired(values, first, samples_per_prompt)
            change = f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        table.add_row(Text(name), f"{estimate(values, samples_per_prompt).mean:.4f}", change)
    return table
