"""Pictures for the page, as data URIs: pairs before and after, the way in between, allocation maps over training.

Of clips there are fewer pairs, and all of them together take at most ``CLIP_ROOM`` bytes, whatever the model makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vipo.errors import UserError
from vipo.evaluation.records import EvaluationRecord
from vipo.media.clips import cut, resized, spaced, table
from vipo.media.pictures import load_sheet, open_sheet
from vipo.report.embed import clip_uri, data_uri
from vipo.report.outcome import Change, before_and_after, total_change
from vipo.report.run import RunRecord

FIRST, EXTREMES = 16, 4
STRIP_ROWS, STRIP_COLUMNS = 6, 8
MAP_SHEETS = 4
FIRST_CLIPS, CLIP_ROOM = 8, 1_900_000  # pairs, and bytes of all clips before base64 makes a third more of them
LAID_OUT, LAID_OUT_SIDE = 8, 96  # frames of a clip side by side, and pixels of each
STILL_SIDE = 64  # pixels; larger stills of a clip are compressed


@dataclass(frozen=True)
class ScoreChange:
    """One score of one picture before and after training."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Pair:
    """The same prompt and starting noise, before and after."""

    prompt: str
    before: str  # data URI
    after: str
    frames: str  # data URI of both clips laid out, before above after; empty for pictures
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
    """``first`` is chosen by place alone; ``gains`` and ``losses`` are the extremes of the trained score."""

    first: tuple[Pair, ...]
    gains: tuple[Pair, ...]
    losses: tuple[Pair, ...]
    one_per_prompt: bool
    side: int  # of a tile, pixels
    problem: str = ""


@dataclass(frozen=True)
class Strip:
    """A few prompts at several evaluations: ``rows`` of (prompt, data URIs)."""

    iterations: tuple[int, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def gallery(run: RunRecord, found: Sequence[Change]) -> Gallery | None:
    """Pairs of the first and the last evaluation; None while there is no second one."""
    pair = before_and_after(run)
    if pair is None:
        return None
    base, last = pair
    try:
        before, after = _tiles(run, base), _tiles(run, last)
    except UserError as error:
        return Gallery((), (), (), False, 0, str(error))
    prompts = len(base.prompts) // base.samples_per_prompt
    count = FIRST if before.frames == 1 else FIRST_CLIPS
    one_per_prompt = prompts >= count
    step = base.samples_per_prompt if one_per_prompt else 1
    first = range(0, len(base.prompts), step)[:count]
    gains, losses = _extremes(total_change(list(found), run.rewards))
    room = CLIP_ROOM // (2 * len([*first, *gains, *losses]))

    def pairs(rows: Sequence[int]) -> tuple[Pair, ...]:
        return tuple(Pair(base.prompts[i], *_shown(before, after, i, run, room), _scores(base, last, i)) for i in rows)

    side = max(before.strips[0].width // before.frames, before.strips[0].height)
    return Gallery(pairs(first), pairs(gains), pairs(losses), one_per_prompt, side)


def _shown(before: Tiles, after: Tiles, row: int, run: RunRecord, room: int) -> tuple[str, str, str]:
    """Before, after and, for clips, both laid out, as data URIs; each clip of at most ``room`` bytes."""
    pair = before.strips[row], after.strips[row]
    if before.frames == 1:
        return data_uri(pair[0]), data_uri(pair[1]), ""
    clips = cut(pair[0], before.frames), cut(pair[1], after.frames)
    frames = data_uri(table([resized(spaced(clip, LAID_OUT), LAID_OUT_SIDE) for clip in clips]), 768)
    return clip_uri(clips[0], run.fps, room), clip_uri(clips[1], run.fps, room), frames


def _tiles(run: RunRecord, record: EvaluationRecord) -> Tiles:
    path = run.sheets.get(record.iteration)
    if path is None:
        raise UserError(f"the pictures of iteration {record.iteration} are not in samples/")
    tiles, info = load_sheet(path)
    if len(tiles) != len(record.prompts):
        raise UserError(f"{path.name} holds {len(tiles)} pictures, its evaluation {len(record.prompts)}")
    return Tiles(tiles, info.get("frames", 1))


def _scores(base: EvaluationRecord, last: EvaluationRecord, row: int) -> tuple[ScoreChange, ...]:
    names = [name for name in base.values if name in last.values]
    return tuple(ScoreChange(n, float(base.values[n][row]), float(last.values[n][row])) for n in names)


def _extremes(total: Tensor | None) -> tuple[list[int], list[int]]:
    """Rows of the largest rises and the largest falls of the trained score, largest first."""
    if total is None:
        return [], []
    order = [i for i in torch.argsort(total.nan_to_num(0.0), stable=True).tolist() if total[i].isfinite()]
    gains = [i for i in reversed(order) if total[i] > 0][:EXTREMES]
    return gains, [i for i in order if total[i] < 0][:EXTREMES]


def strip(run: RunRecord) -> Strip | None:
    """The first prompts over the run; None with fewer than three evaluations whose pictures can be read."""
    readable: dict[int, Tiles] = {}
    for iteration in spaced([r.iteration for r in run.evaluations if r.iteration in run.sheets], STRIP_COLUMNS):
        record = next(r for r in run.evaluations if r.iteration == iteration)
        try:
            readable[iteration] = _tiles(run, record)
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


def map_figures(run: RunRecord) -> list[tuple[int, str]]:
    """(iteration, data URI) of evenly spaced map sheets; a sheet that cannot be read is left out."""
    shown = []
    for iteration in spaced(sorted(run.map_sheets), MAP_SHEETS):
        picture = _opened(run.map_sheets[iteration])
        if picture is not None:
            shown.append((iteration, data_uri(picture, 1400)))
    return shown


def _opened(path: Path) -> Image.Image | None:
    try:
        return open_sheet(path)
    except UserError:
        return None
