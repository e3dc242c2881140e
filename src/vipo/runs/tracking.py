"""A run as others see it while it goes on. What goes wrong there is told and costs that one tool, never the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as TookTooLong
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vipo.environment import environment
from vipo.evaluation.records import POLICY, Evaluation
from vipo.media.pictures import to_uint8
from vipo.options import TrackerName
from vipo.runs.trackers import TRACKERS, Tracker, Whose
from vipo.schema import Recipe
from vipo.secrets import public, redacted
from vipo.threads import started
from vipo.types import TrainStep

PICTURES, CLIPS = 16, 4  # of an evaluation, at most so many are shown
CLOSING_SECONDS = 60.0  # a tool that waits longer for its network is left behind

log = logging.getLogger(__name__)


class Tracking:
    """Every tool that the recipe names, told the same.

    Args:
        recipe: what is run; ``tracking`` says where it is shown.
        root: the run's folder, which keeps the run's id for the tools that need one.
        iteration: iterations done so far.
        processes: how many train together.
    """

    def __init__(self, recipe: Recipe, root: Path, *, iteration: int, processes: int) -> None:
        self._told: list[str] = []
        self._tools: dict[str, Tracker] = {}
        settings = public({**recipe.model_dump(mode="json"), "environment": environment(processes)})
        for name, options in recipe.tracking.items():
            self._safely(name, partial(self._open, name, options, Whose(recipe.name, root, iteration)))
        self._each(lambda tool: tool.recipe(settings, redacted(recipe.to_yaml())))

    def _open(self, name: TrackerName, options: Mapping[str, Any], whose: Whose) -> None:
        self._tools[name] = TRACKERS[name](whose, options)

    def step(self, step: TrainStep, sheet: Image.Image | None) -> None:
        """One iteration: its numbers, what fired, and its sheet of maps if one was drawn."""
        self._each(lambda tool: tool.scalars(step.metrics, step.iteration))
        self.events([*step.events, *([step.failure] if step.failure else [])], step.iteration)
        if sheet is not None:
            self._each(lambda tool: tool.pictures("maps", [sheet], [f"iteration {step.iteration}"], step.iteration))

    def events(self, events: Sequence[str], iteration: int) -> None:
        """What fired; nothing if nothing did."""
        if events:
            text = redacted("\n".join(events))
            self._each(lambda tool: tool.events(text, iteration))

    def evaluation(
        self, evaluation: Evaluation, media: UInt8[Tensor, "N 3 F Y X"], *, fps: float, iteration: int
    ) -> None:
        """Mean scores after so many iterations, and the first pictures; of clips their middle frames, and a few."""
        means = {f"evaluation/{key}": float(row.nanmean()) for key, row in evaluation.scores[POLICY].items()}
        self._each(lambda tool: tool.scalars(means, iteration))
        clips = [[Image.fromarray(frame) for frame in clip] for clip in to_uint8(media[:PICTURES])]
        middle = [clip[len(clip) // 2] for clip in clips]
        captions = [redacted(text) for text in evaluation.texts[:PICTURES]]
        self._each(lambda tool: tool.pictures("samples", middle, captions, iteration))
        if media.shape[2] > 1:
            self._each(lambda tool: tool.clips("clips", clips[:CLIPS], captions[:CLIPS], fps, iteration))

    def told(self) -> tuple[str, ...]:
        """What went wrong since this was last asked, for the run's log."""
        told, self._told = tuple(self._told), []
        return told

    def close(self) -> None:
        """Let every tool finish. There is no iteration left to tell of what goes wrong, so it is a warning."""
        self._each(_finished)
        self._tools.clear()
        for sentence in self.told():
            log.warning("%s", sentence)

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tool in list(self._tools.items()):
            self._safely(name, partial(work, tool))

    def _safely(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever another's library raises, the run goes on
            self._tools.pop(name, None)
            why = " ".join(redacted(f"{type(error).__name__}: {error}").split())
            self._told.append(f"tracking: {name} failed and is left out from here on ({why}); the run goes on")


def _finished(tool: Tracker) -> None:
    """Close it, within bounds: a tool may wait for its network for ever."""
    try:
        started(tool.close, "tracking").result(CLOSING_SECONDS)
    except TookTooLong as error:
        raise TimeoutError(f"it did not finish within {CLOSING_SECONDS:g} seconds") from error
