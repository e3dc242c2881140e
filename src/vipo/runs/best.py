"""The best checkpoint of a run, worked out anew from its evaluations on record and the checkpoints that there are.

Nothing else remembers it, so it is the same after any kill and any resume.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from vipo.errors import UserError
from vipo.evaluation.best import Best, best_of, fall_of, latest_series, place, series_of
from vipo.runs.directory import RunDirectory
from vipo.training.saved import listed, name_of

BEST = "best"  # where a checkpoint's name is asked for


def spared(directory: RunDirectory, name: str | None) -> frozenset[int]:
    """The iterations whose checkpoints are never pruned: the best of each series of evaluations.

    Args:
        name: as ``training.keep_best``.
    """
    if name is None:
        return frozenset()
    kept = directory.kept()
    found = (best_of(series, name, kept) for series in series_of(directory.evaluations()))
    return frozenset(one.iteration for one in found if one is not None)


def best_so_far(directory: RunDirectory, name: str, present: Collection[int] = ()) -> Best | None:
    """The best whose weights are the untrained model's, in a checkpoint, or at hand in one of the ``present``."""
    return best_of(latest_series(directory.evaluations()), name, directory.kept().union(present))


def fallen(directory: RunDirectory, name: str, iteration: int) -> str | None:
    """A sentence if the evaluation after so many iterations is the last, and below the best by more than chance."""
    fall = fall_of(latest_series(directory.evaluations()), name)
    return None if fall is None or fall.iteration != iteration else f"stopped by training.stop_when: {fall}"


def best_told(directory: RunDirectory, name: str) -> str:
    """The best in a sentence; of the untrained model, that there is no better one."""
    best = best_so_far(directory, name)
    if best is None:
        return f"No evaluation has a score of {name}, so no checkpoint is the best by it."
    if best.is_untrained:
        return f"Best by {name}: {best}; no later evaluation was better, so no checkpoint is kept as the best."
    kept = directory.checkpoints / name_of(best.iteration)
    return f"Best by {name}: {best}, kept as {str(kept)!r}.{_lost(directory, name, best)}"


def _lost(directory: RunDirectory, name: str, best: Best) -> str:
    """What to add if there was a better one."""
    higher = best_of(latest_series(directory.evaluations()), name)
    if higher is None or higher.iteration == best.iteration:
        return ""
    return f" {place(higher.iteration).capitalize()} was better ({higher.mean:.4g}), but its checkpoint is gone."


def best_checkpoint(directory: RunDirectory, name: str | None) -> Path:
    """The folder of the best checkpoint.

    Args:
        name: as ``training.keep_best``.

    Raises:
        UserError: none is kept, or nothing better than the untrained model was found.
    """
    where, there = f"{str(directory.root)!r}", listed(directory.checkpoints)
    if name is None:
        raise UserError(f"{where} keeps no best checkpoint: its recipe has no training.keep_best; {there}")
    best = best_so_far(directory, name)
    if best is None:
        raise UserError(f"{where} has no evaluation with a score of {name} yet; {there}")
    if best.is_untrained:
        raise UserError(
            f"nothing better than the untrained model was found in {where}: by {name}, its evaluation"
            f" ({best.mean:.4g}) is not beaten by one that has a checkpoint; name a checkpoint instead, {there}"
        )
    return directory.checkpoints / name_of(best.iteration)
