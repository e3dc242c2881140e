"""Pictures for the page, as data URIs: pairs before and after, the way in between, allocation maps over training."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vipo.report.outcome import Change, before_and_after, total_change
from vipo.report.pictures import load_sheet
from vipo.report.run import EvaluationRecord, RunRecord
from vipo.types import UserError

FIRST, EXTREMES = 16, 4
STRIP_ROWS, STRIP_COLUMNS = 6, 8
MAP_SHEETS = 4
LOSSLESS_SIDE, LARGEST_SIDE = 160, 384  # pixels; larger pictures are embedded smaller and compressed


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
    scores: tuple[ScoreChange, ...]


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


def data_uri(picture: Image.Image, largest: int = LARGEST_SIDE) -> str:
    """A picture inside the page: lossless if small, else at most ``largest`` pixels a side and compressed."""
    buffer, kind = io.BytesIO(), "png"
    if max(picture.size) <= LOSSLESS_SIDE:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        smaller = picture.convert("RGB")
        smaller.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        smaller.save(buffer, format="WEBP", quality=86)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
    one_per_prompt = prompts >= FIRST
    step = base.samples_per_prompt if one_per_prompt else 1
    first = range(0, len(base.prompts), step)[:FIRST]

    def pairs(rows: Sequence[int]) -> tuple[Pair, ...]:
        return tuple(
            Pair(base.prompts[i], data_uri(before[i]), data_uri(after[i]), _scores(base, last, i)) for i in rows
        )

    gains, losses = _extremes(total_change(list(found), run.rewards))
    return Gallery(pairs(first), pairs(gains), pairs(losses), one_per_prompt, max(before[0].size))


def _tiles(run: RunRecord, record: EvaluationRecord) -> list[Image.Image]:
    path = run.sheets.get(record.iteration)
    if path is None:
        raise UserError(f"the pictures of iteration {record.iteration} are not in samples/")
    tiles, _ = load_sheet(path)
    if len(tiles) != len(record.prompts):
        raise UserError(f"{path.name} holds {len(tiles)} pictures, its evaluation {len(record.prompts)}")
    return tiles


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


def spaced(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]


def strip(run: RunRecord) -> Strip | None:
    """The first prompts over the run; None with fewer than three evaluations whose pictures can be read."""
    readable: dict[int, list[Image.Image]] = {}
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


def _strip_indices(first: EvaluationRecord, readable: Mapping[int, list[Image.Image]]) -> list[int]:
    shortest = min(len(first.prompts), *(len(tiles) for tiles in readable.values()))
    return list(range(0, shortest, first.samples_per_prompt))[:STRIP_ROWS]


def _strip_row(
    first: EvaluationRecord, readable: Mapping[int, list[Image.Image]], row: int
) -> tuple[str, tuple[str, ...]]:
    return first.prompts[row], tuple(data_uri(tiles[row], 192) for tiles in readable.values())


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
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError:
        return None
