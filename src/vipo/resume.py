"""Going on with a run: from which checkpoint, and which keys of its recipe may have changed since."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vipo.build import rates_clips
from vipo.checkpoint import State, list_checkpoints, read_state
from vipo.recipe import Recipe, load_recipe, parse_recipe
from vipo.rundir import RunDirectory
from vipo.types import UserError

Rule = Literal["free", "recorded", "on request", "never"]

RULES: Mapping[str, Rule] = {
    "name": "free",
    "seed": "never",
    "generator.name": "never",
    "generator.path": "never",
    "generator.attention": "recorded",
    "generator.fps": "free",  # of the files; not where a reward goes by it, see rules_of
    "generator.text_cache": "free",
    "generator.offload_text": "free",
    "prompts": "never",
    "policy": "never",
    "judges": "recorded",
    "optimizer.learning_rate": "recorded",
    "optimizer.weight_decay": "recorded",
    "optimizer.betas": "recorded",
    "optimizer.max_grad_norm": "recorded",
    "optimizer.guard_factor": "recorded",
    "training.iterations": "free",
    "training.checkpoint_every": "free",
    "training.keep_checkpoints": "free",
    "training.maps_every": "free",
    "training.reward_retries": "free",
    "training.reward_pause_seconds": "free",
    "training.rollout_batch_size": "recorded",
    "training.prompts_at_once": "recorded",
    "training.replay_batch_size": "recorded",
    "training.gradient_checkpointing": "recorded",
    "training.max_failed_share": "recorded",
    "training.max_skipped_in_a_row": "recorded",
    "evaluation": "recorded",
}
"""What may change when a run goes on, by key or whole section; the longest entry that fits counts."""
OTHERWISE: Rule = "on request"  # with --allow-changes: what is trained, on what, and how it is sampled

MEANINGS: Mapping[Rule, str] = {
    "free": "may change: it does not touch what is trained",
    "recorded": "may change; each change is an event in `metrics.jsonl` and in the report",
    "on request": "may change, as an event, with `--allow-changes KEY`",
    "never": "never: the checkpoint, or what was logged so far, would mean something else",
}

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


def rule_of(key: str, rules: Mapping[str, Rule] = RULES) -> Rule:
    """Whether a dotted key may change when a run goes on."""
    parts = key.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((rules[prefix] for prefix in prefixes if prefix in rules), OTHERWISE)


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


def check_there(directory: RunDirectory) -> None:
    """Raises:
    UserError: there is no run to go on with.
    """
    if not directory.exists():
        what = "it holds no run" if directory.root.is_dir() else "there is no such folder"
        raise UserError(
            f"cannot resume {str(directory.root)!r}: {what}; leave out --resume to start there, or give the run's"
            " folder as --output"
        )


def resumption(
    recipe: Recipe,
    directory: RunDirectory,
    *,
    checkpoint: str | None = None,
    allowed: Sequence[str] = (),
    processes: int = 1,
) -> Start:
    """Decide how ``recipe`` goes on in ``directory``; nothing is changed yet.

    Args:
        checkpoint: a folder's name under ``checkpoints/`` or a path; None takes the latest, or without one begins.
        allowed: keys or sections of the recipe that may change though what is trained depends on them.

    Raises:
        UserError: there is no such checkpoint, or a key differs that may not.
    """
    chosen = directory.latest_checkpoint() if checkpoint is None else _find(directory, checkpoint)
    state = None if chosen is None else read_state(chosen)
    old = load_recipe(directory.recipe) if state is None else parse_recipe(state.recipe, source=str(chosen))
    before, now = old.model_dump(mode="json"), recipe.model_dump(mode="json")
    found = list(changes(before, now, rules_of(recipe)))
    _check_allowed(allowed, before, now)
    _check(found, directory.root, allowed)
    anew = any(change.moves_scores for change in found)
    if state is None:
        note = f"{str(directory.root)!r} has no checkpoint yet: it begins again at iteration 0."
        return Start(True, notes=(note,), evaluates_anew=anew)
    assert chosen is not None
    _check_logged(directory, chosen, state)
    told = [str(change) for change in found if change.rule != "free"]
    if processes != state.processes:
        told.append(f"processes {state.processes} -> {processes}")
    events = tuple(f"resumed at iteration {state.iteration} with {change}" for change in told)
    return Start(True, chosen, events, _notes(directory, state), anew)


def _find(directory: RunDirectory, name: str) -> Path:
    """A checkpoint by its folder's name, or by a path to it."""
    for path in (directory.checkpoints / name, Path(name).expanduser()):
        if (path / "state.json").is_file():
            return path
    known = ", ".join(path.name for path in list_checkpoints(directory.checkpoints))
    there = f"there are {known}" if known else "there is none yet"
    raise UserError(f"there is no checkpoint {name!r}; in {str(directory.checkpoints)!r} {there}")


def _check_logged(directory: RunDirectory, checkpoint: Path, state: State) -> None:
    """A checkpoint from elsewhere must not leave a hole in the log."""
    logged, own = directory.iterations_logged(), checkpoint.resolve().parent == directory.checkpoints.resolve()
    if logged < state.iteration and not own:
        raise UserError(
            f"the checkpoint holds {state.iteration} iterations, but {str(directory.root)!r} has a log of {logged};"
            " take one of this run"
        )


def _notes(directory: RunDirectory, state: State) -> tuple[str, ...]:
    later = [path.name for path in directory.later_checkpoints(state.iteration)]
    left = directory.iterations_logged() - state.iteration
    notes = [f"Going on after iteration {state.iteration}."]
    if left > 0:
        notes.append(f"What was logged of {left} later {'iteration' if left == 1 else 'iterations'} is dropped.")
    if later:
        notes.append(f"Removed, because later: {', '.join(later)}.")
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
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
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
