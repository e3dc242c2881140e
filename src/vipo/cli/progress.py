"""The live line of a training run: iteration, reward, spreads, clipping, ratio check, seconds, time left."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vipo.errors import RunFailed
from vipo.evaluation.estimate import estimate, paired, pairs
from vipo.guards import fired
from vipo.report.run import read_run
from vipo.runs.run import Evaluated, Run
from vipo.types import TrainStep

RATIO_TOLERANCE = 1e-6  # a first-update log-ratio above this is reported as the noise floor


def follow(run: Run, console: Console) -> None:
    """Drive a run to its end, showing what happens, and then which guards have fired in it.

    Raises:
        RunFailed: what the run raises, after that.
    """
    try:
        _follow(run, console)
    except RunFailed:
        _show_fired(run, console)
        raise
    _show_fired(run, console)


def _show_fired(run: Run, console: Console) -> None:
    found = fired(read_run(run.directory.root).events) if run.writes else []
    for one in found:
        text = f"guard {one.name}, {one.when}: {one.guard.means}. What to do: {one.guard.advice}. See {one.anchor}."
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _follow(run: Run, console: Console) -> None:
    """A live line on a terminal, a line per iteration elsewhere."""
    seconds: list[float] = []
    known = {} if run.start.evaluates_anew else run.directory.first_scores()
    base = {name: torch.tensor(_numbers(values)) for name, values in known.items()}
    warned = False
    for note in run.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for notice in run.notices:
        console.print(notice, style="yellow", markup=False, highlight=False, soft_wrap=True)
    line = Text("sampling ...")
    with Live(line, console=console, refresh_per_second=8, transient=True) as live:
        for event in run:
            if isinstance(event, Evaluated):
                console.print(_evaluation(event, base, run.comparable_since, run.recipe.rewards))
                told = run.directory.evaluation_events(event.iteration) if run.writes else []
                for message in [*event.evaluation.failures, *told]:
                    console.print(Text(message, style="yellow"))
                continue
            seconds.append(sum(event.seconds.values()))
            status = _status(run, event, seconds)
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


def _status(run: Run, step: TrainStep, seconds: list[float]) -> Text:
    m, total = step.metrics, run.recipe.training.iterations
    done = step.iteration + 1
    recent = seconds[-10:]
    left = (total - done) * sum(recent) / len(recent)
    return Text.assemble(
        (f"{done:>4}/{total} ", "bold"),
        ("reward ", "dim"),
        (f"{m['reward']:+.4f} ", "bold green"),
        (f"{_spreads(m)}  ", "dim"),
        f"{_loss(m)}  |g| {m['grad_norm']:.2g}  ",
        (f"{seconds[-1]:.1f} s  left {_clock(left)}", "cyan"),
    )


def _spreads(m: Mapping[str, float]) -> str:
    """Standard deviations within the groups; of several rewards, each with its name and mean."""
    names = [key.removeprefix("spread/") for key in m if key.startswith("spread/")]
    if len(names) == 1:
        return f"±{m[f'spread/{names[0]}']:.3f}"
    return "  ".join(f"{name} {m[f'reward/{name}']:+.3f} ±{m[f'spread/{name}']:.3f}" for name in names)


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


def _evaluation(event: Evaluated, base: dict[str, Tensor], since: int, trained_on: Container[str]) -> Table:
    """Scores now, and their paired gain over those after ``since`` iterations; what was not trained on is held out."""
    samples_per_prompt = event.evaluation.samples_per_prompt
    best = f", the best so far by {event.best_by}" if event.best_by and event.iteration else ""
    table = Table(title=f"after {event.iteration} iterations{best}", title_justify="left")
    over = f"iteration {since}" if since else "untrained"
    for column in ("score", "mean", f"gain over {over}, 95 % interval"):
        table.add_column(column, overflow="fold")
    for name, values in event.scores.items():
        first = base.setdefault(name, values)
        change = ""
        if first is not values and pairs(values, first):
            gain = paired(values, first, samples_per_prompt)
            change = f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        role = ("", "") if name in trained_on else (" held out", "dim")
        table.add_row(Text.assemble(name, role), f"{estimate(values, samples_per_prompt).mean:.4f}", change)
    return table
