"""Going on with a run: from which checkpoint, and which keys of its recipe may have changed since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vipo.assemble import rates_clips
from vipo.errors import UserError
from vipo.recipe import load_recipe, parse_recipe
from vipo.registry import nearest
from vipo.runs.directory import Past
from vipo.runs.rules import RULES, Rule, rule_of
from vipo.schema import Recipe
from vipo.training.checkpoint import Head

# What an evaluation's scores depend on beside the weights.
SCORED_BY = ("evaluation", "judges", "rewards", "generator", "solver")
NOT_SCORED_BY = ("evaluation.every",)


@dataclass(frozen=True)
class Change:
    """One key whose value is another now; None for one that is not there."""

    path: tuple[str, ...]
    old: Any
    new: Any
    rule: Rule

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.old)} -> {_shown(self.new)}"

    @property
    def moves_scores(self) -> bool:
        """Whether evaluations before and after it cannot be compared."""
        if self.path[0] == "judges" and len(self.path) < 3 and not (self.old and self.new):
            return False  # a judge more or less; the others stay what they were
        scored = self.path[0] in SCORED_BY and self.key not in NOT_SCORED_BY
        return scored and self.rule != "free"


@dataclass(frozen=True)
class Start:
    """From where a run goes on; ``events`` are for its first iteration, ``notes`` for whoever started it."""

    resumed: bool = False
    checkpoint: Path | None = None
    events: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    evaluates_anew: bool = False  # what was evaluated before cannot be compared with what comes


def rules_of(recipe: Recipe) -> Mapping[str, Rule]:
    """``RULES``, less what this recipe's rewards depend on: the frames per second, where one takes them."""
    return {key: rule for key, rule in RULES.items() if key != "generator.fps" or not rates_clips(recipe)}


def changes(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    rules: Mapping[str, Rule] = RULES,
    above: tuple[str, ...] = (),
) -> Iterator[Change]:
    """What differs between two nested mappings, key by key."""
    for key in {**old, **new}:
        before, now, path = old.get(key), new.get(key), (*above, key)
        if isinstance(before, Mapping) and isinstance(now, Mapping) and before and now:
            yield from changes(before, now, rules, path)
        elif before != now:
            yield Change(path, before, now, rule_of(".".join(path), rules))


def resumption(recipe: Recipe, past: Past, *, allowed: Sequence[str] = (), processes: int = 1) -> Start:
    """Decide how ``recipe`` goes on from what there is; without a checkpoint it begins.

    Args:
        allowed: keys or sections of the recipe that may change though what is trained depends on them.

    Raises:
        UserError: a key differs that may not, or the log would get a hole.
    """
    found = _changed(recipe, past, allowed)
    anew = any(change.moves_scores for change in found)
    if past.chosen is None:
        note = f"{str(past.root)!r} has no checkpoint yet: it begins again at iteration 0."
        return Start(True, notes=(note,), evaluates_anew=anew)
    path, head = past.chosen
    _check_logged(past, head)
    told = [str(change) for change in found if change.rule != "free"]
    if processes != head.processes:
        told.append(f"processes {head.processes} -> {processes}")
    events = tuple(f"resumed at iteration {head.iteration} with {change}" for change in told)
    return Start(True, path, events, _notes(past, head), anew)


def _changed(recipe: Recipe, past: Past, allowed: Sequence[str]) -> list[Change]:
    """What differs from the recipe that trained what there is; all of it may."""
    old = load_recipe(past.recipe) if past.chosen is None else _trained_by(*past.chosen)
    before, now = old.model_dump(mode="json"), recipe.model_dump(mode="json")
    found = list(changes(before, now, rules_of(recipe)))
    _check_allowed(allowed, before, now)
    _check(found, past.root, allowed)
    return found


def _trained_by(path: Path, head: Head) -> Recipe:
    return parse_recipe(head.recipe, source=str(path))


def _check_logged(past: Past, head: Head) -> None:
    """A checkpoint from elsewhere must not leave a hole in the log."""
    if past.logged < head.iteration and not past.owns_chosen:
        raise UserError(
            f"the checkpoint holds {head.iteration} iterations, but {str(past.root)!r} has a log of {past.logged};"
            " take one of this run"
        )


def _notes(past: Past, head: Head) -> tuple[str, ...]:
    left = past.logged - head.iteration
    notes = [f"Going on after iteration {head.iteration}."]
    if left > 0:
        notes.append(f"What was logged of {left} later {'iteration' if left == 1 else 'iterations'} is dropped.")
    if past.later:
        notes.append(f"Removed, because later: {', '.join(path.name for path in past.later)}.")
    return (" ".join(notes),)


def _check(found: Sequence[Change], root: Path, allowed: Sequence[str]) -> None:
    never = [change for change in found if change.rule == "never"]
    if never:
        raise UserError(
            f"cannot resume {str(root)!r}: {_listed(never)}, which can never change within a run; use the recipe and"
            " overrides it began with, or choose another --output"
        )
    asking = [change for change in found if change.rule == "on request" and not _covers(allowed, change.key)]
    if asking:
        flags = " ".join(f"--allow-changes {change.key}" for change in asking)
        raise UserError(
            f"cannot resume {str(root)!r}: {_listed(asking)}, which changes what is trained; add {flags} if that is"
            " meant, use the recipe and overrides it began with, or choose another --output"
        )


def _covers(allowed: Sequence[str], key: str) -> bool:
    """Whether one of the keys is this one, a section above it, or a key inside it."""
    return any(f"{key}.".startswith(f"{one}.") or f"{one}.".startswith(f"{key}.") for one in allowed)


def _check_allowed(allowed: Sequence[str], *recipes: Mapping[str, Any]) -> None:
    known = {key for recipe in recipes for key in _keys(recipe)}
    for key in allowed:
        if key not in known:
            near = nearest(key, sorted(known))[0]
            raise UserError(f"--allow-changes {key}: there is no such key or section; the nearest is {near!r}")
        if rule_of(key) == "never":
            raise UserError(f"--allow-changes {key}: it can never change within a run; choose another --output")


def _keys(recipe: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in recipe.items():
        yield above + key
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")


def _listed(found: Sequence[Change]) -> str:
    return ", ".join(map(str, found))


def _shown(value: Any) -> str:
    """As in a recipe."""
    if value is None:
        return "null"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else str(value)
