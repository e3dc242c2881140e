"""Pictures for the page, as data URIs: pairs before and after, the way in between, allocation maps over training.

Of clips there are fewer pairs, and all of them together take at most ``CLIP_ROOM`` bytes, whatever the model makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vipo.errors import UserError
from vipo.evaluation.records import EvaluationRecord
from vipo.media.clips import cut, resized, spaced, table
from vipo.media.sheets import load_sheet, open_sheet
from vipo.report.embed import clip_uri, data_uri
from vipo.report.outcome import before_and_after, total_change
from vipo.report.run import RunRecord

FIRST, EXTREMES = 16, 3  # pictures, and prompts
STRIP_ROWS, STRIP_COLUMNS = 6, 8
SLIDER = 8  # evaluations that can be slid through
MAP_SHEETS = 4
FIRST_CLIPS, CLIP_ROOM = 8, 1_900_000  # pairs, and bytes of all clips before base64 makes a third more of them
SAMPLES, SAMPLES_CLIPS = 4, 1  # of a prompt
LAID_OUT, LAID_OUT_SIDE = 8, 96  # frames of a clip side by side, and pixels of each
STILL_SIDE = 64  # pixels; larger stills of a clip are compressed


@dataclass(frozen=True)
class ScoreChange:
    """One score of one picture, or of a prompt's pictures, before and after training."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Pair:
    """The same prompt and starting noise, before and after."""

    prompt: str
    before: str  # data URI
    later: tuple[str, ...]  # data URIs at the gallery's iterations; the last is after training
    frames: str  # data URI of both clips laid out, before above after; empty for pictures
    scores: tuple[ScoreChange, ...]


@dataclass(frozen=True)
class PromptGroup:
    """A prompt's samples, and its mean scores."""

    prompt: str
    pairs: tuple[Pair, ...]
    scores: tuple[ScoreChange, ...]


@dataclass(frozen=True)
class Tiles:
    """What an evaluation made: one tile per sample, for clips a strip of ``frames``."""

    strips: list[Image.Image]
    frames: int

    def middle(self, row: int) -> Image.Image:
        return cut(self.strips[row], self.frames)[self.frames // 2]


@dataclass(frozen=True)
class Gallery:
    """``first`` is chosen by place alone; ``groups`` are prompts chosen by the trained score, under what they are.

    Args:
        iterations: what ``Pair.later`` shows; more than one can be slid through.
        side: of a tile, pixels.
    """

    first: tuple[Pair, ...]
    groups: Mapping[str, tuple[PromptGroup, ...]]
    one_per_prompt: bool
    iterations: tuple[int, ...]
    side: int
    problem: str = ""


@dataclass(frozen=True)
class Strip:
    """A few prompts at several evaluations: ``rows`` of (prompt, data URIs)."""

    iterations: tuple[int, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class _Shown:
    """Makes the pairs of one page: the evaluations that are shown and how many bytes a clip may take."""

    run: RunRecord
    records: tuple[EvaluationRecord, ...]
    tiles: tuple[Tiles, ...]
    room: int

    def pair(self, row: int) -> Pair:
        base, last = self.records[0], self.records[-1]
        return Pair(base.prompts[row], *self._pictures(row), score_changes(base, last, row))

    def _pictures(self, row: int) -> tuple[str, tuple[str, ...], str]:
        """Before, later and, for clips, both laid out, as data URIs; each clip of at most ``room`` bytes."""
        strips = [tiles.strips[row] for tiles in self.tiles]
        if self.tiles[0].frames == 1:
            before, *later = map(data_uri, strips)
            return before, tuple(later), ""
        clips = [cut(strip, self.tiles[0].frames) for strip in (strips[0], strips[-1])]
        frames = data_uri(table([resized(spaced(clip, LAID_OUT), LAID_OUT_SIDE) for clip in clips]), 768)
        before, after = (clip_uri(clip, self.run.fps, self.room) for clip in clips)
        return before, (after,), frames

    def group(self, prompt: int, count: int) -> PromptGroup:
        base, last = self.records[0], self.records[-1]
        every = base.samples_per_prompt
        rows = range(prompt * every, (prompt + 1) * every)
        return PromptGroup(base.prompts[rows[0]], tuple(map(self.pair, rows[:count])), score_changes(base, last, rows))


def gallery(run: RunRecord) -> Gallery | None:
    """Pairs of the first and the last evaluation; None while there is no second one."""
    pair = before_and_after(run)
    if pair is None:
        return None
    base, last = pair
    try:
        ends = tiles_of(run, base), tiles_of(run, last)
    except UserError as error:
        return Gallery((), {}, False, (), 0, str(error))
    clips = ends[0].frames > 1
    count, samples = (FIRST_CLIPS, SAMPLES_CLIPS) if clips else (FIRST, SAMPLES)
    one_per_prompt = len(base.prompts) // base.samples_per_prompt >= count
    first = range(0, len(base.prompts), base.samples_per_prompt if one_per_prompt else 1)[:count]
    chosen = _chosen(run, base, last)
    room = CLIP_ROOM // (2 * (len(first) + samples * sum(map(len, chosen.values()))))
    between = [] if clips else _between(run, base, last)
    records = (base, *(record for record, _ in between), last)
    shown = _Shown(run, records, (ends[0], *(tiles for _, tiles in between), ends[1]), room)
    groups = {title: tuple(shown.group(prompt, samples) for prompt in prompts) for title, prompts in chosen.items()}
    side = max(ends[0].strips[0].width // ends[0].frames, ends[0].strips[0].height)
    iterations = tuple(record.iteration for record in records[1:])
    return Gallery(tuple(map(shown.pair, first)), groups, one_per_prompt, iterations, side)


def _between(run: RunRecord, base: EvaluationRecord, last: EvaluationRecord) -> list[tuple[EvaluationRecord, Tiles]]:
    """Evaluations between the two whose pictures can be read and are those of the same prompts, evenly spaced."""
    found = []
    for record in spaced(run.evaluations[1:-1], SLIDER - 1):
        try:
            tiles = tiles_of(run, record)
        except UserError:
            continue  # one place less on the slider; the gallery says so where it concerns the first or last
        if record.prompts == base.prompts == last.prompts:
            found.append((record, tiles))
    return found


def tiles_of(run: RunRecord, record: EvaluationRecord) -> Tiles:
    """What an evaluation made.

    Raises:
        UserError: its sheet is gone, damaged, or of another evaluation.
    """
    path = run.sheets.get(record.iteration)
    if path is None:
        raise UserError(f"the pictures of iteration {record.iteration} are not in samples/")
    tiles, info = load_sheet(path)
    if len(tiles) != len(record.prompts):
        raise UserError(f"{path.name} holds {len(tiles)} pictures, its evaluation {len(record.prompts)}")
    return Tiles(tiles, info["frames"])


def score_changes(base: EvaluationRecord, last: EvaluationRecord, rows: int | range) -> tuple[ScoreChange, ...]:
    """Of one picture, or the means of several."""
    at = list(rows) if isinstance(rows, range) else [rows]
    names = [name for name in base.values if name in last.values]
    return tuple(ScoreChange(n, *(float(record.values[n][at].nanmean()) for record in (base, last))) for n in names)


def _chosen(run: RunRecord, base: EvaluationRecord, last: EvaluationRecord) -> dict[str, list[int]]:
    """Numbers of the prompts whose trained score rose, fell, is highest and is lowest, as means over their pictures."""
    gains = total_change(base, last, run.rewards)
    if gains is None:
        return {}
    level = torch.stack([weight * last.values[name] for name, weight in run.rewards.items()]).sum(0)
    levels = level.unflatten(0, (-1, last.samples_per_prompt)).nanmean(1)
    gained, lost = moved_most(gains)
    by_level = _ordered(levels)
    return {
        "Prompts that gained most": gained,
        "Prompts that lost most": lost,
        "Best prompt after training": by_level[-1:],
        "Worst prompt after training": by_level[:1],
    }


def moved_most(gains: Tensor) -> tuple[list[int], list[int]]:
    """Places of the few prompts that gained most, and of those that lost most; neither has one that did the other."""
    rising = _ordered(gains)
    gained = [i for i in reversed(rising) if gains[i] > 0][:EXTREMES]
    return gained, [i for i in rising if gains[i] < 0][:EXTREMES]


def _ordered(values: Tensor) -> list[int]:
    """Places of the finite values, smallest first."""
    return [i for i in torch.argsort(values.nan_to_num(0.0), stable=True).tolist() if values[i].isfinite()]


def strip(run: RunRecord) -> Strip | None:
    """The first prompts over the run; None with fewer than three evaluations whose pictures can be read."""
    readable: dict[int, Tiles] = {}
    for iteration in spaced([r.iteration for r in run.evaluations if r.iteration in run.sheets], STRIP_COLUMNS):
        record = next(r for r in run.evaluations if r.iteration == iteration)
        try:
            readable[iteration] = tiles_of(run, record)
        except UserError:
            continue  # a column less; the gallery says so where it concerns the first or last
    if len(readable) < 3:
        return None
    first = run.evaluations[0]
    return Strip(tuple(readable), tuple(_strip_row(first, readable, i) for i in _strip_indices(first, readable)))


def _strip_indices(first: EvaluationRecord, readable: Mapping[int, Tiles]) -> list[int]:
    shortest = min(len(first.prompts), *(len(tiles.strips) for tiles in readable.values()))
    return list(range(0, shortest, first.samples_per_prompt))[:STRIP_ROWS]


def _strip_row(first: EvaluationRecord, readable: Mapping[int, Tiles], row: int) -> tuple[str, tuple[str, ...]]:
    return first.prompts[row], tuple(_still(tiles, row) for tiles in readable.values())


def _still(tiles: Tiles, row: int) -> str:
    """The picture, or a clip's middle frame."""
    return (
        data_uri(tiles.strips[row], 192) if tiles.frames == 1 else data_uri(tiles.middle(row), 192, lossless=STILL_SIDE)
    )


@dataclass(frozen=True)
class MapFigures:
    """Evenly spaced map sheets as (iteration, data URI), and the iterations of those that cannot be read."""

    shown: tuple[tuple[int, str], ...]
    unreadable: tuple[int, ...]


def map_figures(run: RunRecord) -> MapFigures:
    found = {at: _opened(run.map_sheets[at]) for at in spaced(sorted(run.map_sheets), MAP_SHEETS)}
    shown = tuple((at, data_uri(sheet, 1700)) for at, sheet in found.items() if sheet is not None)
    return MapFigures(shown, tuple(at for at, sheet in found.items() if sheet is None))


def _opened(path: Path) -> Image.Image | None:
    try:
        return open_sheet(path)
    except UserError:
        return None
