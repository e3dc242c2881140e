"""Going on with a run: from which checkpoint, and with what of the past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vipo.errors import UserError
from vipo.runs.directory import METRICS, Past
from vipo.runs.rules import Change, changed
from vipo.schema import Recipe
from vipo.training.saved import Saved


class Ending(NamedTuple):
    """Why a run would end at once where it goes on, and the override with which it would not."""

    why: str
    without: str


@dataclass(frozen=True)
class Start:
    """From where a run goes on; ``events`` are for its first iteration, ``notes`` for whoever started it."""

    resumed: bool = False
    saved: Saved | None = None
    events: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    evaluates_anew: bool = False  # what was evaluated before cannot be compared with what comes
    evaluated: frozenset[int] = frozenset()  # iterations after which an evaluation is on record and stays
    comparable_since: int = 0  # the first evaluation that later ones are compared with
    inputs: Mapping[str, str] = field(default_factory=dict)  # fingerprints of what the recipe names

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.saved.head.iteration if self.saved else 0

    @property
    def evaluations_end(self) -> int:
        """From which iteration on there is no evaluation that stays."""
        return self.iteration if self.evaluates_anew else self.iteration + 1


def beginning(past: Past, inputs: Mapping[str, str]) -> Start:
    """A run that failed before its first iteration was done is begun again; nothing else is written over.

    Raises:
        UserError: the folder holds a run, or something that is not a run's.
    """
    if past.saved is not None or (past.recipe is not None and past.logged):
        raise UserError(f"{str(past.root)!r} already holds a run; add --resume to go on, or choose another --output")
    if past.recipe is None and past.others:
        raise UserError(
            f"{str(past.root)!r} is not empty and holds no run (it has {past.others[0]!r}); choose another --output"
        )
    return Start(inputs=inputs)


def resumption(
    recipe: Recipe,
    past: Past,
    inputs: Mapping[str, str],
    *,
    allowed: Sequence[str] = (),
    scores_by_rate: bool = False,
    processes: int = 1,
    ending: Ending | None = None,
) -> Start:
    """Decide how ``recipe`` goes on from what there is; without a checkpoint it begins.

    Args:
        inputs: fingerprints of what the recipe names (:func:`vipo.runs.inputs.fingerprints`).
        ending: if its last evaluation and the recipe would end it at once.
        allowed, scores_by_rate: see :func:`vipo.runs.rules.changed`.

    Raises:
        UserError: there is no run, a key differs that may not, or the log would get a hole.
    """
    saved = past.saved
    _check_whole(past)
    notes = (_note(past),)
    recorded = saved.head.recipe if saved else past.recipe or {}
    fed = (saved.head.inputs if saved else {}, inputs)
    found = changed(recorded, recipe, fed, allowed=allowed, scores_by_rate=scores_by_rate, root=past.root)
    told = [str(change) for change in found if change.rule != "free"]
    if saved is not None and processes != saved.head.processes:
        told.append(f"processes {saved.head.processes} -> {processes}")
    iteration = saved.head.iteration if saved else 0
    anew = any(change.moves_scores for change in found)
    _check_left(found, iteration, recipe.training.iterations, past, None if anew else ending)
    told += [f"a newer checkpoint passed over: {why}" for why in saved.damaged] if saved else []
    if past.logged < iteration:
        told.append(f"a log of only {past.logged} iterations: lines of metrics.jsonl were lost")
    told += [f"another {name} than was saved with it: lines were changed or lost" for name in _rewritten(past)]
    return Start(
        resumed=True,
        saved=saved,
        events=tuple(f"resumed at iteration {iteration} with {change}" for change in told if saved),
        notes=notes,
        evaluates_anew=anew,
        evaluated=frozenset(number for number in past.evaluated if number < iteration + (not anew)),
        comparable_since=iteration if anew else past.comparable_since,
        inputs=inputs,
    )


def _check_left(found: Sequence[Change], done: int, planned: int, past: Past, ending: Ending | None) -> None:
    """Else the recipe on record, the report and the card would claim what nothing was trained with."""
    where = f"cannot resume {str(past.root)!r}"
    if done > planned:
        raise UserError(
            f"{where}: {done} iterations are done, more than training.iterations={planned}; give at least as many, or"
            " an earlier checkpoint with --from"
        )
    idle = [str(change) for change in found if change.needs_training]
    if done == planned and idle:
        raise UserError(
            f"{where}: all {done} iterations are done, so {', '.join(idle)} would change nothing; give more"
            " training.iterations, an earlier checkpoint with --from, or another --output"
        )
    if ending is not None and idle:
        raise UserError(
            f"{where}: it would end at once, {ending.why}, so {', '.join(idle)} would change nothing; give"
            f" {ending.without}, an earlier checkpoint with --from, or another --output"
        )


def _rewritten(past: Past) -> list[str]:
    """Logs of this run that say something else now; one that is too short is told in other words."""
    if past.saved is None or not past.owns_saved:
        return []
    short = past.logged < past.saved.head.iteration
    return [name for name in past.rewritten if not (short and name == METRICS)]


def _check_whole(past: Past) -> None:
    """A folder without a recipe is no run's; a checkpoint from elsewhere must not leave a hole in the log."""
    if past.recipe is None:
        what = "has checkpoints but its recipe.yaml is gone" if past.saved else "holds no run"
        raise UserError(
            f"cannot resume {str(past.root)!r}: it {what}; leave out --resume to start in an empty folder, or give a"
            " run's folder as --output"
        )
    if past.saved and past.logged < past.saved.head.iteration and not past.owns_saved:
        raise UserError(
            f"the checkpoint holds {past.saved.head.iteration} iterations, but {str(past.root)!r} has a log of"
            f" {past.logged}; take one of this run"
        )


def _note(past: Past) -> str:
    """Where it goes on, and what that costs."""
    if past.saved is None:
        return f"{str(past.root)!r} has no checkpoint yet: it begins again at iteration 0."
    left = past.logged - past.saved.head.iteration
    told = f"Going on after iteration {past.saved.head.iteration}."
    if left > 0:
        told += f" What was logged of {left} later {'iteration' if left == 1 else 'iterations'} is dropped."
    told += "".join(f" The last line of {name} was cut short and is dropped." for name in past.torn)
    told += "".join(f" A newer one is passed over: {why}." for why in past.saved.damaged)
    if past.saved.later:
        told += f" Removed, because later: {', '.join(path.name for path in past.saved.later)}."
    return told
