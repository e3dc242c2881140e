"""The tables of the claims experiment as text, for the page and for the Markdown file alike.

Every line says how many seeds it rests on. An arm without a result is listed as not trained yet; no figure is
filled in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from cells import (
    NONE,
    Cell,
    Table,
    arm_cell,
    bounded_cell,
    effect_cell,
    gain_cell,
    interval_cell,
    level_cell,
    optional_cell,
    seeds_cell,
)
from matrix import ARMS, WATCHED
from results import (
    SCALAR,
    Level,
    Results,
    Spread,
    gain,
    levels,
    overlap,
    paired,
    planned_seeds,
    reach,
    signals,
    spread,
)
from vipo.report.svg import fixed, signed

SCORES = ("emoji_match", "emoji_judge", "emoji_layout")
"""The first is trained on, the others only watch."""
MAIN = tuple(arm for arm in ARMS if arm in ("sample", "vipo") or re.search(r"^stride-|^(?!clips).*-rate-", arm))
CLIPPED = tuple(arm for arm in ARMS if "-clip-" in arm)
SOURCES = tuple(arm for arm in ARMS if arm.startswith("source-"))
REDNESS = tuple(arm for arm in ARMS if arm.startswith("redness-"))
GROUPS = tuple(arm for arm in ARMS if arm.startswith("groups-") and ARMS[arm].trained)
CONTROLS = ("groups-noise", "groups-shuffled")
CLIPS = tuple(arm for arm in ARMS if arm.startswith("clips-") and ARMS[arm].trained)
CLIP_SCORES = ("emoji_motion", "emoji_match", "emoji_motion_judge", "emoji_judge", "emoji_layout")
"""The first two are trained on."""
SCALAR_CLIPS = "clips-sample"
LEVELS_AFTER = (16, 32, 48)
JUDGES = tuple(WATCHED.split(", "))
SCALAR_GROUPS = "groups-sample-1e-3"
SCALAR_REDNESS = "redness-sample"
ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "Credit": ("reward-map", *(arm for arm in CLIPPED if arm.startswith("uniform-"))),
    "Aggregation of the components": ("average", "first"),
    "Number of components": tuple(arm for arm in ARMS if arm.startswith("components-")),
    "Smoothing": tuple(arm for arm in ARMS if arm.startswith("sigma-")),
    "Normalisation": ("minmax",),
    "Orientation": tuple(arm for arm in ARMS if arm.startswith("orientation-")),
}
STRUCTURE = ("emoji_judge", "emoji_layout", "edges_kept", "features_kept", "diversity")
SHARES = (0.25, 0.5, 0.75, 1.0)


def tables(results: Results) -> list[Table]:
    builders: tuple[Callable[[Results], Table], ...] = (main, ablations, clipping, collapse, agreement, orientation)
    return [
        *(build(results) for build in builders),
        *(sources(results), full_groups(results), watched(results), clips(results)),
    ]


PAIRED = (
    "A difference is taken on the same seed, prompt and starting noise; in brackets its 95 % interval from a bootstrap "
    "over seeds and prompts, below it each seed's own. "
)


def main(results: Results) -> Table:
    note = PAIRED + "“Ranges” says whether the seeds' smallest and largest gains leave those of scalar GRPO alone."
    note += " An arm at another learning rate is compared with scalar GRPO at that rate."
    columns = (*HEAD, "minus scalar GRPO", "Ranges")
    return Table(
        "main", "ViPO, scalar GRPO and depths of the backbone", note, columns, by_iteration(results, MAIN, ("sample",))
    )


def full_groups(results: Results) -> Table:
    note = "Gains over the untrained model. Times: how many times fewer pictures an arm needs to what scalar GRPO had "
    note += (
        "gained at 1e-3 after so many iterations; linear between evaluations, bootstrap over seeds and prompts; 0 is "
    )
    note += "not at all in 48. " + PAIRED
    reward = [f"{SCORES[0]} after {after}" for after in LEVELS_AFTER]
    against = [f"minus scalar GRPO at 1e-3, after {after}" for after in LEVELS_AFTER]
    times = [f"Times, to scalar's {after}" for after in LEVELS_AFTER]
    columns = ("Arm", "Seeds", *reward, *against, *times)
    lines = [_by_pictures(results, arm, len(columns)) for arm in GROUPS if "clean" not in arm and arm not in CONTROLS]
    return Table("groups", "Full groups, and pictures to scalar GRPO's level", note, columns, tuple(lines))


def _by_pictures(results: Results, arm: str, columns: int) -> tuple[Cell, ...]:
    """What an arm gained after so many iterations, beside scalar GRPO, and how much sooner it got there."""
    if last(results, arm) is None:
        return _not_trained(arm, columns)
    head = (arm_cell(arm), seeds_cell(results, arm, max(LEVELS_AFTER)))
    gains = [gain_cell(gain(results, arm, SCORES[0], after)) for after in LEVELS_AFTER]
    if arm == SCALAR_GROUPS:
        return (*head, *gains, *[(NONE, "")] * (columns - 2 - len(gains)))
    against = [effect_cell(paired(results, arm, SCALAR_GROUPS, SCORES[0], after)) for after in LEVELS_AFTER]
    found = [reach(results, arm, SCALAR_GROUPS, SCORES[0], after) for after in LEVELS_AFTER]
    times = [(NONE, "") if each is None else interval_cell(each.times, each.low, each.high) for each in found]
    return (*head, *gains, *against, *times)


def watched(results: Results) -> Table:
    note = "Gains over the untrained model at the end, with their 95 % intervals, a bootstrap over seeds and prompts; "
    note += (
        "“clean” arms are trained on emoji_clean, too, noise and shuffled on rewards that teach nothing. No judge is "
    )
    note += "trained on."
    columns = ("Arm", "Seeds", SCORES[0], *JUDGES)
    lines = []
    for arm in GROUPS:
        end = last(results, arm)
        if end is None:
            lines.append(_not_trained(arm, len(columns)))
            continue
        found = [gain(results, arm, score, end) for score in columns[2:]]
        lines.append((arm_cell(arm), seeds_cell(results, arm, end), *map(bounded_cell, found)))
    return Table("judges", "What judges see", note, columns, tuple(lines))


def clips(results: Results) -> Table:
    note = (
        PAIRED
        + "32 clips of 17 frames an iteration; the first two scores are trained on, each normalised in its groups."
    )
    columns = (*HEAD, "minus scalar GRPO", "Ranges")
    lines = by_iteration(results, CLIPS, (SCALAR_CLIPS,), CLIP_SCORES) + _sooner(results)
    return Table("clips", "Clips: ViPO, scalar GRPO and maps of our own", note, columns, lines)


def _sooner(results: Results) -> tuple[tuple[Cell, ...], ...]:
    """How many times fewer clips each arm needs to where scalar GRPO ends at its rate."""
    lines: list[tuple[Cell, ...]] = []
    for arm in CLIPS:
        for score in CLIP_SCORES[:2]:
            other = rival(arm, SCALAR_CLIPS)
            found = None if arm.startswith(SCALAR_CLIPS) else reach(results, arm, other, score)
            if found is not None and found.seeds > 2:  # of two, a resample may have one that gained nothing
                times = interval_cell(found.times, found.low, found.high)
                lines.append(((arm, ""), (str(found.seeds), ""), (score, ""), times, (NONE, ""), (NONE, "")))
    return ((("Times fewer clips to what scalar GRPO has in the end at that rate", ""),), *lines) if lines else ()


def sources(results: Results) -> Table:
    note = PAIRED + "Each arm takes its map from somewhere else than the paper's components, or from both."
    columns = (*HEAD, "minus ViPO", "minus scalar GRPO", "Ranges")
    return Table(
        "sources", "Other sources of the map", note, columns, by_iteration(results, SOURCES, ("vipo", "sample"))
    )


def ablations(results: Results) -> Table:
    note = PAIRED + "Each arm is compared where its own training ended. The map of ones is compared with arms of its "
    note += "own clip range: with one optimiser step an iteration it is scalar GRPO exactly."
    lines: list[tuple[Cell, ...]] = []
    for title, arms in ABLATIONS.items():
        lines.append(((title, ""),))
        for arm in arms:
            lines += _lines(results, arm, ("vipo", "sample"), last(results, arm))
    return Table(
        "ablations",
        "Ablations",
        note,
        (*HEAD, "minus ViPO", "minus scalar GRPO", "Ranges"),
        tuple(lines),
    )


HEAD = ("Arm", "Seeds", "Score", "Gain over untrained")


def last(results: Results, arm: str) -> int | None:
    found = results.iterations(arm)
    return found[-1] if found else None


def by_iteration(
    results: Results, arms: Sequence[str], bases: Sequence[str], scores: Sequence[str] = SCORES
) -> tuple[tuple[Cell, ...], ...]:
    """A block of lines for each iteration that an arm was evaluated at, then the arms still missing."""
    lines: list[tuple[Cell, ...]] = []
    for iteration in sorted({k for arm in arms for k in results.iterations(arm)}):
        lines.append(((f"After {iteration} iterations", ""),))
        for arm in arms:
            if iteration in results.iterations(arm):
                lines += _lines(results, arm, bases, iteration, scores)
    missing = [arm for arm in arms if not results.iterations(arm)]
    return (*lines, *(_not_trained(arm, len(HEAD) + len(bases) + 1) for arm in missing))


def _lines(
    results: Results, arm: str, bases: Sequence[str], iteration: int | None, scores: Sequence[str] = SCORES
) -> list[tuple[Cell, ...]]:
    """A line per score, the arm named in the first; ranges are beside those of the last of ``bases``, scalar GRPO."""
    if iteration is None:
        return [_not_trained(arm, len(HEAD) + len(bases) + 1)]
    lines = []
    for score in scores:
        found = gain(results, arm, score, iteration)
        head = (arm_cell(arm), seeds_cell(results, arm, iteration)) if score == scores[0] else (("", ""), ("", ""))
        differences = [_difference(results, arm, base, score, iteration) for base in bases]
        ranges = _ranges(results, arm, rival(arm, bases[-1]), found, score, iteration)
        lines.append((*head, (score, ""), gain_cell(found), *differences, (ranges, "")))
    return lines


def _not_trained(arm: str, columns: int) -> tuple[Cell, ...]:
    return (arm_cell(arm), (f"0 of {planned_seeds(arm)}", ""), ("not trained yet", ""), *[("", "")] * (columns - 3))


def rival(arm: str, base: str) -> str:
    """The arm of that credit with the same clip range or learning rate, where there is one."""
    suffix = re.search(r"-(clip|rate)-.*", arm)
    twin = base + (suffix.group() if suffix else "")
    return twin if twin in ARMS and twin != arm else base


def _difference(results: Results, arm: str, base: str, score: str, iteration: int) -> Cell:
    other = rival(arm, base)
    if other == arm:
        return NONE, ""
    text, seeds = effect_cell(paired(results, arm, other, score, iteration))
    return text, seeds if other == base or not seeds else f"{seeds}; from {other}"


def _ranges(results: Results, arm: str, other: str, found: Spread | None, score: str, iteration: int) -> str:
    theirs = gain(results, other, score, iteration) if other != arm else None
    if found is None or theirs is None or min(found.seeds, theirs.seeds) < 2:
        return NONE
    if overlap(found, theirs):
        return "overlap"
    return "apart, above" if found.mean > theirs.mean else "apart, below"


def clipped_share(results: Results, arm: str) -> dict[int, Tensor]:
    """Seed -> the share of ratios outside the clip range, per iteration."""
    runs = results.arms.get(arm, {})
    return {seed: run.training["clipped_fraction"] for seed, run in runs.items() if "clipped_fraction" in run.training}


def clipping(results: Results) -> Table:
    note = "Four optimiser steps an iteration, so that all but the first are off-policy. Clipped share: of all "
    note += "likelihood ratios, mean over iterations. " + PAIRED + "Scalar GRPO means that of the same clip range."
    columns = ("Arm", "Seeds", "Clipped share", "Gain in emoji_match", *(f"{s} minus scalar GRPO" for s in SCORES))
    return Table("clipping", "Clip range and credit", note, columns, tuple(_clipped(results, arm) for arm in CLIPPED))


def _clipped(results: Results, arm: str) -> tuple[Cell, ...]:
    iteration = last(results, arm)
    if iteration is None:
        return _not_trained(arm, 4 + len(SCORES))
    means = {seed: float(values.nanmean()) for seed, values in clipped_share(results, arm).items()}
    own = ", ".join(fixed(value, 4) for value in means.values())
    share = (fixed(sum(means.values()) / len(means), 4), own if len(means) > 1 else "1 seed") if means else (NONE, "")
    head = (arm_cell(arm), seeds_cell(results, arm, iteration), share)
    gained = gain_cell(gain(results, arm, SCORES[0], iteration))
    if arm.startswith("sample-"):
        return (*head, gained, *[(NONE, "")] * len(SCORES))
    return (*head, gained, *(_difference(results, arm, "sample", score, iteration) for score in SCORES))


def collapse(results: Results) -> Table:
    note = "What is left of the pictures when a run has gained this much redness, linear between its evaluations; the "
    note += "last level is the smallest final gain of all runs. " + PAIRED
    trained = [arm for arm in REDNESS if results.arms.get(arm)]
    others = [arm for arm in trained if arm != SCALAR_REDNESS]
    columns = ("Measure", *trained, *(f"{arm} minus scalar GRPO" for arm in others))
    seeds = ", ".join(f"{arm} {len(results.arms.get(arm, {}))} of {planned_seeds(arm)}" for arm in REDNESS)
    lines: list[tuple[Cell, ...]] = [((f"Seeds: {seeds}", ""),)]
    for level in levels(results, trained, SHARES):
        title = f"At {signed(level.gain)} redness, {level.share:.0%} of what every run reached"
        lines += [((title, ""),), *(_kept(level, name, trained, others) for name in STRUCTURE)]
    if len(lines) == 1:
        lines.append((("There is no redness that every run reached.", ""),))
    return Table("collapse", "Structure at equal redness", note, columns, tuple(lines))


def _kept(level: Level, name: str, trained: Sequence[str], others: Sequence[str]) -> tuple[Cell, ...]:
    means = (level_cell(spread(level.measures[arm].get(name, {}))) for arm in trained)
    return ((name, ""), *means, *(effect_cell(kept_more(level, name, arm)) for arm in others))


def kept_more(level: Level, name: str, arm: str) -> Spread | None:
    """``arm`` minus scalar GRPO, of the seeds that both have."""
    scalar, mine = (level.measures.get(which, {}).get(name, {}) for which in (SCALAR_REDNESS, arm))
    return spread({seed: mine[seed] - scalar[seed] for seed in mine if seed in scalar})


def agreement(results: Results) -> Table:
    note = "Signal: mean over standard deviation of one iteration's slope along the direction in which training raised "
    note += "the reward. Worth: the square of its ratio to scalar GRPO, as so many times the pictures. AUC: agreement "
    note += (
        "with the objects' masks. In brackets 95 % intervals from a bootstrap over iterations, paired for the ratio."
    )
    columns = ("Map", "AUC", "Mass in top quarter", "Signal", "Ratio to scalar GRPO", "Worth")
    if results.gradient is None or SCALAR not in results.gradient["maps"]:
        return Table("agreement", "Maps against the gradient", note, columns, NOT_MEASURED)
    found = signals(results.gradient)
    stored = results.gradient["maps"]
    lines = []
    for name, signal in sorted(found.items(), key=lambda item: -item[1].ratio_to_noise):
        ratio = interval_cell(signal.relative, signal.relative_low, signal.relative_high)
        own = interval_cell(signal.ratio_to_noise, signal.low, signal.high)
        places = (optional_cell(stored[name]["auc"]), optional_cell(stored[name]["top_quarter"]))
        worth = f"{fixed(signal.relative**2, 2)} x" if signal.relative > 0 else NONE
        lines.append(((name, ""), *places, own, (NONE, "") if name == SCALAR else ratio, (worth, "")))
    title = f"Maps against the gradient, {results.gradient['iterations']} iterations"
    return Table("agreement", title, note, columns, tuple(lines))


NOT_MEASURED = ((("Not measured yet.", ""),),)


def orientation(results: Results) -> Table:
    note = "Area under the ROC curve of the map against exact masks, in brackets the share of pictures below one half."
    stored = (results.orientation or {}).get("rules") or {}
    rules = tuple(dict.fromkeys(rule for row in stored.values() for rule in row))
    lines = [((setting, ""), *(_area(row.get(rule)) for rule in rules)) for setting, row in stored.items()]
    columns = ("Pictures, input, stride", *rules)
    return Table("orientation", "Orientation rules by depth", note, columns, tuple(lines) or NOT_MEASURED)


def _area(found: Mapping[str, float] | None) -> Cell:
    if found is None:
        return NONE, ""
    return f"{fixed(found['auc'])} ({fixed(found['inverted_percent'], 1)} %)", ""
