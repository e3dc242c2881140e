"""A run's folder to iterations, groups and samples: what was kept of them, and in words what was not.

Of some iterations a run keeps its first groups (``rollouts/``); evaluations have pictures and scores, and neither
advantages nor credit, since nothing was trained on them. A map that was not kept is made again where a picture is
enough for it, by the recipe's own settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vipo.errors import UserError
from vipo.explorer.look import kept_source, map_grid
from vipo.explorer.settings import Settings
from vipo.media.map_sheets import coloured, fitted, largest, lit, signed_heat
from vipo.media.recordings import PRODUCT, ROLLOUTS, SUFFIX, Recording, as_media, load_recording
from vipo.media.sheets import load_sheet
from vipo.options import COMPARE_SAMPLES, SOURCE_MEANINGS, SourceName, needs_sources
from vipo.recipe import parse_section
from vipo.report.run import RunRecord, read_run
from vipo.schema import StructuringSection
from vipo.user_file import is_user_file

TILE, SMALL = 320, 112  # pixels of a picture's longer side: looked at, and to choose by
WHITE = 0.6  # of a picture under colours, so that they show on a dark one
_STEP = re.compile(r"step-(\d+)")

UNKEPT: Mapping[str, str] = {
    "reward_gradient": "needs the reward's gradient while the iteration runs",
    "text_relevance": "needs the generator as it was in that iteration",
    "evidence": "no reward gave evidence",
    **dict.fromkeys(sorted(COMPARE_SAMPLES), "compares whole groups, and the process that kept this had parts of them"),
}
"""Why a source has no map in a recording."""


@dataclass(frozen=True, order=True)
class Moment:
    """An iteration whose samples were kept, or the evaluation before it."""

    iteration: int
    trained: bool

    @property
    def words(self) -> str:
        return f"iteration {self.iteration}: trained on" if self.trained else f"evaluation after {self.iteration}"


@dataclass(frozen=True)
class Samples:
    """What there is of a moment.

    Args:
        tiles: of an evaluation, as ``load_sheet`` gives them: clips as strips, which as numbers would take four times
            the memory. recording: what was kept of an iteration; None of an evaluation.
    """

    moment: Moment
    group_size: int
    prompts: tuple[str, ...]
    scores: Mapping[str, Float[Tensor, " N"]]
    frames: int
    tiles: tuple[Image.Image, ...] = ()
    recording: Recording | None = None

    @property
    def groups(self) -> list[str]:
        """The prompt of each."""
        return list(self.prompts[:: self.group_size])

    def of(self, group: int) -> range:
        """The places of a group's samples."""
        return range(group * self.group_size, min((group + 1) * self.group_size, len(self.prompts)))

    def clip(self, place: int) -> Float[Tensor, "3 F Y X"]:
        """The frames of one of them in [0, 1]."""
        if self.recording is not None:
            return self.recording.media[place]
        return as_media(self.tiles[place], self.frames)


@dataclass(frozen=True)
class OpenedRun:
    """A run whose samples can be looked at."""

    record: RunRecord
    moments: tuple[Moment, ...]
    notes: tuple[str, ...]  # what is missing as a whole

    def samples(self, moment: Moment) -> Samples:
        """Raises:
        UserError: the files are damaged, or gone.
        """
        return self._trained(moment) if moment.trained else self._evaluated(moment)

    def _trained(self, moment: Moment) -> Samples:
        told = load_recording(self.record.folder / ROLLOUTS / f"step-{moment.iteration:06d}.png")
        return Samples(moment, told.group_size, told.prompts, told.scores, told.media.shape[2], recording=told)

    def _evaluated(self, moment: Moment) -> Samples:
        """Of clips every frame is there; the scores are those on record."""
        tiles, info = load_sheet(self.record.sheets[moment.iteration])
        listed = {name: [math.nan if v is None else v for v in values] for name, values in info["scores"].items()}
        scores = {name: torch.tensor(values) for name, values in listed.items()}
        found = [one for one in self.record.evaluations if one.iteration == moment.iteration]
        prompts = tuple(map(str, info["prompts"]))
        each = found[0].samples_per_prompt if found else 1
        return Samples(moment, each, prompts, scores, int(info["frames"]), tuple(tiles))

    @cached_property
    def untrained(self) -> Samples | None:
        """Those of the evaluation before training, if there are any."""
        first = Moment(0, False)
        return self.samples(first) if first in self.moments else None

    @cached_property
    def structuring(self) -> StructuringSection:
        """The recipe's; it says how a map that was not kept is made again."""
        section = self.record.recipe.get("structuring") or {}
        return parse_section(StructuringSection, section, source=f"recipe of {self.record.folder}")

    def number(self, moment: Moment, key: str) -> float:
        """What the iteration logged under a key; NaN if nothing."""
        return next(
            (step.metrics.get(key, math.nan) for step in self.record.steps if step.iteration == moment.iteration),
            math.nan,
        )

    def events(self, moment: Moment) -> list[str]:
        """What was told of an iteration, such as an update that was left out."""
        return [told for at, told in self.record.events if at == moment.iteration and moment.trained]

    def total(self, scores: Mapping[str, Float[Tensor, " N"]], place: int) -> float:
        """The weighted sum of what was trained on; NaN where a part is."""
        parts = [weight * float(scores[name][place]) for name, weight in self.record.rewards.items() if name in scores]
        return sum(parts) if parts else math.nan


def open_run(folder: Path) -> OpenedRun:
    """Raises:
    UserError: it is no run's folder, or there are no pictures in it yet.
    """
    record = read_run(folder)
    kept = {_STEP.fullmatch(path.stem) for path in (folder / ROLLOUTS).glob(f"step-*{SUFFIX}")}
    moments = sorted([Moment(int(m[1]), True) for m in kept if m] + [Moment(at, False) for at in record.sheets])
    if not moments:
        raise UserError(
            f"{str(folder)!r} holds no pictures yet: {ROLLOUTS}/ and samples/ are empty; wait for its first evaluation"
        )
    notes = () if any(kept) else (f"There is no {ROLLOUTS}/ in this run: of its training nothing was kept but logs.",)
    opened = OpenedRun(record, tuple(moments), notes)
    _ = opened.structuring  # one that cannot be read is told at once
    return opened


def summary(run: OpenedRun) -> str:
    """A run in a line."""
    record, used = run.record, _used(run)
    credit = f"credit {record.recipe.get('credit')}" + (f" of {' x '.join(used)}" if used else "")
    done = f"{record.iterations_done} of {record.iterations_planned or '?'} iterations"
    kept = sum(moment.trained for moment in run.moments)
    pictures = f"samples kept of {kept} of them, pictures of {len(record.sheets)} evaluations"
    return f"{record.name} · {credit} · {done} · {pictures}"


@dataclass(frozen=True)
class Shown:
    """One map of one sample.

    Args:
        source: its name. meaning: what it is, and whether the credit took it.
        picture: the map in colours. lit: the sample where the map is large. None where there is no map, as
            ``meaning`` says.
    """

    source: str
    meaning: str
    picture: Image.Image | None
    lit: Image.Image | None
    weights: str = ""
    taken: bool = False


@dataclass(frozen=True)
class Detail:
    """One sample, one of its frames.

    Args:
        before: of a later evaluation, what the untrained model made of it.
        pushed: the sample under its credit; None of an evaluation. pushed_words: what that says.
        scores: name and value. advantage: None of an evaluation.
    """

    prompt: str
    picture: Image.Image
    before: Image.Image | None
    frames: int
    advantage: float | None
    rank: str
    scores: tuple[tuple[str, float], ...]
    pushed: Image.Image | None
    pushed_words: str
    maps: tuple[Shown, ...]


def detail(run: OpenedRun, samples: Samples, place: int, frame: int = 0) -> Detail:
    """A sample with every map beside each other."""
    clip, told = samples.clip(place), samples.recording
    still = fitted(clip[:, frame], TILE)
    scores = tuple((name, float(values[place])) for name, values in samples.scores.items())
    pushed, words = _pushed(samples, place, frame, still)
    if pushed is not None and run.number(samples.moment, "weight_change") == 0:
        words = f"Not applied, no weight moved in this iteration. It asked for {words}"
    return Detail(
        prompt=samples.prompts[place],
        picture=still,
        before=_before(run, samples, place, frame),
        frames=samples.frames,
        advantage=None if told is None else float(told.advantage[place]),
        rank=_rank(run, samples, place),
        scores=scores,
        pushed=pushed,
        pushed_words=words,
        maps=tuple(_maps(run, samples, place, frame, still)),
    )


def facts(run: OpenedRun, moment: Moment, shown: Detail) -> list[tuple[str, str]]:
    """A sample's numbers, and how far its iteration moved the weights."""
    advantage = "none" if shown.advantage is None else f"{shown.advantage:+.3f}"
    scores = [(name, f"{score:.4f}" if math.isfinite(score) else "no score") for name, score in shown.scores]
    moved = run.number(moment, "weight_change") if moment.trained else math.nan
    return [
        ("advantage", advantage),
        *scores,
        *([("weights moved by", f"{moved:.2%}")] if math.isfinite(moved) else []),
    ]


def _before(run: OpenedRun, samples: Samples, place: int, frame: int) -> Image.Image | None:
    """Of a later evaluation: what the untrained model made, where it was asked for the same."""
    if samples.moment.trained or samples.moment.iteration == 0:
        return None
    then = run.untrained
    same = then is not None and (then.prompts, then.frames) == (samples.prompts, samples.frames)
    return fitted(then.clip(place)[:, frame], TILE) if then is not None and same else None


def thumbnail(samples: Samples, place: int) -> Image.Image:
    """The middle frame, to choose by."""
    return fitted(samples.clip(place)[:, samples.frames // 2], SMALL)


def credit_thumbnail(samples: Samples, place: int) -> Image.Image | None:
    """The same under its credit."""
    return _pushed(samples, place, samples.frames // 2, thumbnail(samples, place))[0]


def caption(run: OpenedRun, samples: Samples, place: int) -> str:
    """Under a thumbnail: its advantage, or its score where there is none."""
    if samples.recording is not None:
        return f"A {samples.recording.advantage[place]:+.2f}"
    total = run.total(samples.scores, place)
    return f"{total:.3f}" if math.isfinite(total) else "no score"


def _rank(run: OpenedRun, samples: Samples, place: int) -> str:
    """Its place in the group by advantage, or by the score that is trained on."""
    group, told = samples.of(place // samples.group_size), samples.recording
    if told is None:
        by, totals = "score", {at: run.total(samples.scores, at) for at in group}
    else:
        by, totals = "advantage", {at: float(told.advantage[at]) for at in group}
    here = f"sample {group.index(place) + 1} of {len(group)} in its group"
    if not math.isfinite(totals[place]):
        return f"{here}, without a score"
    return f"{here}, number {sum(value > totals[place] for value in totals.values()) + 1} by {by}"


def _pushed(samples: Samples, place: int, frame: int, still: Image.Image) -> tuple[Image.Image | None, str]:
    """The sample's credit over itself: what multiplied its ratio at each position."""
    told = samples.recording
    if told is None:
        return None, "Nothing: evaluation pictures are not trained on."
    weight = told.weight[place]
    if not bool((weight != 0).any()):
        return None, "Nothing: its advantage is 0, or it was not among those of its group that were trained on."
    most = float(told.weight[list(samples.of(place // samples.group_size))].abs().max())
    if weight.ndim == 0:
        way = "more" if weight > 0 else "less"
        words = f"one weight for the whole picture, which was made {way} likely: {weight:+.2f}"
        return _tinted(still, np.full((1, 1), float(weight)), most), words
    low, high = (round(float(end), 2) + 0.0 for end in (weight.min(), weight.max()))  # no -0.00
    words = f"weights {low:+.2f} to {high:+.2f}: blue was made more likely, orange less"
    return _tinted(still, weight[frame].numpy(), most), f"{words}; full colour is the group's largest, {most:.2f}"


def _tinted(still: Image.Image, plane: Float[np.ndarray, "H W"], most: float) -> Image.Image:
    """A grey picture under colours that are full at ``most``."""
    colours = Image.fromarray(signed_heat(plane / (most or 1.0))).resize(still.size, Image.Resampling.NEAREST)
    grey = Image.blend(still.convert("L").convert("RGB"), Image.new("RGB", still.size, "white"), WHITE)
    return Image.fromarray((np.asarray(grey, np.float32) * np.asarray(colours, np.float32) / 255).astype(np.uint8))


def _maps(run: OpenedRun, samples: Samples, place: int, frame: int, still: Image.Image) -> list[Shown]:
    """Those that were kept, what the credit took first; then the others, made again or in words."""
    told = samples.recording
    kept = {} if told is None else dict(told.maps)
    taken = "" if told is None else told.taken
    names = sorted(kept, key=lambda name: (name != taken, name not in _used(run)))
    found = [_shown(run, name, kept[name][place], frame, still, taken) for name in names]
    others = [name for name in get_args(SourceName) if name not in kept]
    return found + [_missing(run, samples, name, place, frame, still) for name in others]


def _used(run: OpenedRun) -> tuple[str, ...]:
    """The sources that the recipe's credit takes."""
    return run.structuring.sources if needs_sources(str(run.record.recipe.get("credit"))) else ()


def _meaning(run: OpenedRun, name: str, taken: str | None) -> str:
    """What a map is, and what it was for; ``taken`` is None of an evaluation, where none was."""
    if name == PRODUCT:
        return f"what the credit took: {' x '.join(_used(run))}"
    meanings: Mapping[str, str] = SOURCE_MEANINGS
    known = meanings.get(name, f"the map of credit {name}" if name == taken else "a source of the run's own")
    if taken is None:
        return known
    if name == taken:
        return f"what the credit took: {known}"
    return f"a factor of what the credit took: {known}" if name in _used(run) else f"not trained on: {known}"


def _shown(
    run: OpenedRun,
    name: str,
    maps: Float[Tensor, "T H W"],
    frame: int,
    still: Image.Image,
    taken: str | None,
    how: str = "",
) -> Shown:
    planes = maps.float().numpy()
    if not np.isfinite(planes).all():
        return Shown(name, f"{_meaning(run, name, taken)}; this sample has none", None, None)
    most = largest(np.abs(planes))
    colours = Image.fromarray(coloured(planes)[frame]).resize(still.size, Image.Resampling.NEAREST)
    words = f"{planes.min():.2f} to {planes.max():.2f}"
    lighted = lit(still, np.abs(planes[frame]), most)
    return Shown(name, _meaning(run, name, taken) + how, colours, lighted, words, name == taken)


def _missing(run: OpenedRun, samples: Samples, name: str, place: int, frame: int, still: Image.Image) -> Shown:
    if name != "perceptual":
        why = "an evaluation keeps pictures and scores alone" if samples.recording is None else UNKEPT[name]
        return Shown(name, f"{_meaning(run, name, None)}. Not kept: {why}.", None, None)
    try:
        maps = made_again(run, samples, place)
    except UserError as error:
        return Shown(name, f"Not kept, and it cannot be made again: {error}.", None, None)
    side = max(samples.clip(place).shape[-2:])
    how = f"; made again from the kept picture ({side} px), by the recipe's structuring"
    return _shown(run, name, maps, frame, still, None if samples.recording is None else "", how)


def made_again(run: OpenedRun, samples: Samples, place: int) -> Float[Tensor, "F H W"]:
    """The paper's map of a picture, on the grid of the maps that were kept, a frame each.

    Raises:
        UserError: the backbone is a file's code, which is not run here, or cannot be had.
    """
    section = run.structuring
    if is_user_file(section.backbone):
        raise UserError(f"its backbone {section.backbone} is a file of code, and looking at a run does not run any")
    width = section.source_options.perceptual.smoothing_sigma
    how = replace(section, smoothing_sigma=section.smoothing_sigma if width is None else width)
    clip, told = samples.clip(place), samples.recording
    kept = next(iter(told.maps.values()), None) if told is not None else None
    grid = map_grid(clip, 1) if kept is None else (clip.shape[1], kept.shape[2], kept.shape[3])
    return kept_source(Settings(how))(clip[None], grid)[0]
