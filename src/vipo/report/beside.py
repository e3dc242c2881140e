"""Pictures of several groups of runs for one page: the same prompts and noise side by side, and what moved most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vipo.errors import UserError
from vipo.evaluation.records import EvaluationRecord
from vipo.media.clips import cut
from vipo.report.arms import Arm, one_model
from vipo.report.embed import clip_uri, data_uri
from vipo.report.gallery import CLIP_ROOM, ScoreChange, Tiles, moved_most, score_changes, tiles_of
from vipo.report.outcome import before_and_after, check_pairs, total_change
from vipo.report.run import RunRecord

PROMPTS = 8
SIDE = 256  # pixels; larger pictures are embedded smaller and compressed
AT_HAND = 2  # sheets kept, a run's before and after: one of 16 clips of 81 frames at 480 x 832 takes 1.6 GB


@dataclass(frozen=True)
class Tile:
    """Data URIs of a picture, or of a clip and its middle frame; ``still`` is empty for pictures."""

    uri: str
    still: str = ""


@dataclass(frozen=True)
class Row:
    """What one group makes of the prompts; ``seed`` and ``iteration`` are of its run that made them."""

    words: str
    style: str
    seed: int | None
    iteration: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Moved:
    """A prompt, what its score that was trained on gained over training, and its first picture before and after."""

    prompt: str
    gain: float
    pictures: tuple[Tile, ...]
    scores: tuple[ScoreChange, ...]


@dataclass(frozen=True)
class Movement:
    """The prompts that gained and lost most in one group, as means over its ``seeds``."""

    words: str
    style: str
    seeds: tuple[int, ...]
    gained: tuple[Moved, ...]
    lost: tuple[Moved, ...]


@dataclass
class Sheets:
    """Reads sheets, of which it keeps the last ``AT_HAND``, and what was wrong, in words, in ``problems``."""

    clips: int = 0  # that are expected on the page, so that all of them share one room
    problems: list[str] = field(default_factory=list)
    _read: dict[tuple[str, int], Tiles | None] = field(default_factory=dict)  # None of one that cannot be read
    _known: dict[tuple[str, int], bool] = field(default_factory=dict)

    def of(self, run: RunRecord, record: EvaluationRecord) -> Tiles | None:
        key = str(run.folder), record.iteration
        if key not in self._read:
            try:
                self._read[key] = tiles_of(run, record)
            except UserError as error:
                self._read[key] = None
                self.problems.append(f"{run.folder}: its pictures are not shown: {error}")
            for old in [kept for kept, tiles in self._read.items() if tiles is not None][:-AT_HAND]:
                del self._read[old]
        return self._read[key]

    def readable(self, run: RunRecord, record: EvaluationRecord) -> bool:
        """Whether its sheet can be read; found out once."""
        key = str(run.folder), record.iteration
        if key not in self._known:
            self._known[key] = self.of(run, record) is not None
        return self._known[key]

    def tile(self, run: RunRecord, record: EvaluationRecord, row: int) -> Tile | None:
        """The picture or clip of one row; None if its sheet cannot be read."""
        tiles = self.of(run, record)
        if tiles is None:
            return None
        if tiles.frames == 1:
            return Tile(data_uri(tiles.strips[row], SIDE))
        clip = clip_uri(cut(tiles.strips[row], tiles.frames), run.fps, CLIP_ROOM // max(1, self.clips))
        return Tile(clip, data_uri(tiles.middle(row), SIDE))


def shown_runs(found: Sequence[Arm], sheets: Sheets) -> dict[str, RunRecord]:
    """By label the run whose pictures are shown: of one seed for all groups, where they share one that can be read."""
    shared = [seed for seed in found[0].runs if all(seed in arm.runs for arm in found)]
    for seed in shared:
        if all(_readable(arm.runs[seed], sheets) for arm in found):
            return {arm.group.label: arm.runs[seed] for arm in found}
    firsts = {arm.group.label: next((r for r in arm.runs.values() if _readable(r, sheets)), None) for arm in found}
    return {label: run for label, run in firsts.items() if run is not None}


def _readable(run: RunRecord, sheets: Sheets) -> bool:
    return sheets.readable(run, run.evaluations[-1])


def beside(found: Sequence[Arm], sheets: Sheets) -> tuple[list[str], list[Row]]:
    """The first prompts, and a row of their first pictures for the untrained model and each group."""
    shown, last = shown_runs(found, sheets), next(iter(found[0].runs.values())).evaluations[-1]
    places = range(0, len(last.prompts), last.samples_per_prompt)[:PROMPTS]
    rows = [*_untrained(found, shown, places, sheets)]
    for arm in found:
        if run := shown.get(arm.group.label):
            end = run.evaluations[-1]
            rows.append(Row(arm.words, arm.style, run.seed, end.iteration, _tiles(run, end, places, sheets)))
    return [last.prompts[place] for place in places], rows


def _untrained(found: Sequence[Arm], shown: Mapping[str, RunRecord], places: range, sheets: Sheets) -> list[Row]:
    """Nothing where the groups did not begin with one model, or it was not evaluated on these pictures."""
    run = shown.get(found[0].group.label)
    first = run.evaluations[0] if run else None
    if run is None or first is None or not one_model(found) or first.iteration or len(run.evaluations) == 1:
        return []
    if first.prompts != run.evaluations[-1].prompts or sheets.of(run, first) is None:
        return []
    return [Row("untrained", "", None, 0, _tiles(run, first, places, sheets))]


def _tiles(run: RunRecord, record: EvaluationRecord, places: Sequence[int], sheets: Sheets) -> tuple[Tile, ...]:
    return tuple(tile for place in places if (tile := sheets.tile(run, record, place)))


def movements(found: Sequence[Arm], sheets: Sheets) -> list[Movement]:
    """Of each group that has a first evaluation and another; what it lacks goes to the sheets' problems."""
    shown = shown_runs(found, sheets)
    return [one for arm in found if (one := _movement(arm, shown.get(arm.group.label), sheets))]


def _movement(arm: Arm, shown: RunRecord | None, sheets: Sheets) -> Movement | None:
    ends = {seed: pair for seed, run in arm.runs.items() if (pair := _ends(run, sheets))}
    gains = {seed: total_change(*pair, arm.runs[seed].rewards) for seed, pair in ends.items()}
    kept = {seed: gain for seed, gain in gains.items() if gain is not None}
    lacking = [seed for seed in arm.runs if seed not in kept]
    if lacking:
        seeds = f"seed{'s' * (len(lacking) > 1)} {', '.join(map(str, lacking))}"
        sheets.problems.append(
            f"{arm.words}: {seeds} without scores before and after what was trained, left out of what moved most"
        )
    if not kept:
        return None
    mean = torch.stack(list(kept.values())).nanmean(0)
    pairs = [ends[seed] for seed in kept]
    gained, lost = (
        tuple(_moved(place, float(mean[place]), pairs, shown, sheets) for place in places)
        for places in moved_most(mean)
    )
    return Movement(arm.words, arm.style, tuple(kept), gained, lost)


def _ends(run: RunRecord, sheets: Sheets) -> tuple[EvaluationRecord, EvaluationRecord] | None:
    pair = before_and_after(run)
    if pair is None:
        return None
    try:
        check_pairs(*pair, f"iteration {pair[0].iteration} and iteration {pair[1].iteration} of {str(run.folder)!r}")
    except UserError as error:
        sheets.problems.append(str(error))
        return None
    return pair


def _moved(
    place: int,
    gain: float,
    pairs: Sequence[tuple[EvaluationRecord, EvaluationRecord]],
    shown: RunRecord | None,
    sheets: Sheets,
) -> Moved:
    every = pairs[0][1].samples_per_prompt
    rows = range(place * every, (place + 1) * every)
    ends = before_and_after(shown) if shown else None
    tiles = [sheets.tile(shown, record, rows[0]) for record in ends] if shown and ends else []
    scores = _over_seeds([score_changes(*pair, rows) for pair in pairs])
    return Moved(pairs[0][1].prompts[rows[0]], gain, tuple(tile for tile in tiles if tile), scores)


def _over_seeds(by_seed: Sequence[tuple[ScoreChange, ...]]) -> tuple[ScoreChange, ...]:
    """The mean of each score over the seeds that have it."""
    names = dict.fromkeys(score.name for scores in by_seed for score in scores)
    found = {name: [score for scores in by_seed for score in scores if score.name == name] for name in names}
    return tuple(
        ScoreChange(n, _mean([s.before for s in own]), _mean([s.after for s in own])) for n, own in found.items()
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan
