"""Which keys of a recipe may change when a run goes on, and which did. No torch here: ``vipo list keys`` shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vipo.errors import UserError
from vipo.registry import did_you_mean
from vipo.schema import Recipe

Rule = Literal["free", "recorded", "on request", "never"]

RULES: Mapping[str, Rule] = {
    "name": "free",
    "seed": "never",
    "generator.name": "never",
    "generator.path": "never",
    "generator.attention": "recorded",
    "generator.fps": "free",  # of the files; not where a reward goes by it, see changed
    "generator.text_cache": "free",
    "generator.offload_text": "free",
    "prompts": "never",
    "policy": "never",
    "judges": "recorded",
    "optimizer.kind": "never",
    "optimizer.learning_rate": "recorded",
    "optimizer.weight_decay": "recorded",
    "optimizer.betas": "recorded",
    "optimizer.max_grad_norm": "recorded",
    "optimizer.guard_factor": "recorded",
    "optimizer.schedule": "recorded",
    "optimizer.warmup": "recorded",
    "optimizer.final": "recorded",
    "training.iterations": "free",  # not where the learning rate comes down towards the last one, see changed
    "training.checkpoint_every": "free",
    "training.keep_checkpoints": "free",
    "training.keep_best": "free",
    "training.maps_every": "free",
    "training.keep_rollouts": "free",
    "training.timeout": "free",
    "training.sharding": "recorded",
    "training.context_parallel": "recorded",
    "training.context_exchange": "recorded",
    "training.reward_retries": "free",
    "training.reward_pause_seconds": "free",
    "training.reward_timeout": "free",
    "training.rollout_batch_size": "recorded",
    "training.prompts_at_once": "recorded",
    "training.replay_batch_size": "recorded",
    "training.gradient_checkpointing": "recorded",
    "training.on_reward_timeout": "recorded",
    "training.max_failed_share": "recorded",
    "training.max_skipped_in_a_row": "recorded",
    "training.stop_when": "recorded",
    "evaluation": "recorded",
    "guards": "recorded",
    "tracking": "free",
    "inputs.packages": "recorded",  # inputs: what was in the files that the recipe names, see vipo.runs.inputs
    "inputs.evaluation": "recorded",
    "inputs.judges": "recorded",
    "inputs.policy": "free",  # the run has a copy of its own
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


def rule_of(key: str, rules: Mapping[str, Rule] = RULES) -> Rule:
    """Whether a dotted key may change when a run goes on."""
    parts = key.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((rules[prefix] for prefix in prefixes if prefix in rules), OTHERWISE)


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
    def needs_training(self) -> bool:
        """Whether it can only show in iterations that come: how is trained, or a judge that no evaluation asks yet."""
        if self.path[0] == "judges":
            return not self.moves_scores
        return self.path[0] == "optimizer" or (self.rule == "on request" and self.path[0] != "inputs")

    @property
    def moves_scores(self) -> bool:
        """Whether evaluations before and after it cannot be compared."""
        if self.path[0] in ("judges", "inputs") and len(self.path) < 3 and not (self.old and self.new):
            return False  # a judge more or less; the others stay what they were
        key = self.key.removeprefix("inputs.")
        scored = key.split(".")[0] in SCORED_BY and key not in NOT_SCORED_BY
        return scored and self.rule != "free"


def changed(
    recorded: Mapping[str, Any],
    recipe: Recipe,
    inputs: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
    *,
    allowed: Sequence[str],
    scores_by_rate: bool,
    root: Path,
) -> list[Change]:
    """What differs from the recipe that trained what there is in ``root``; all of it may.

    Args:
        inputs: fingerprints of what the recipe names, then and now; what is named only now or then is no change.
        allowed: keys or sections that may change though what is trained depends on them.
        scores_by_rate: a reward goes by the clips' frames per second.

    Raises:
        UserError: a key differs that may not, or one of ``allowed`` is none.
    """
    before, now = _whole(recorded, root), recipe.model_dump(mode="json")
    rules = {key: rule for key, rule in RULES.items() if key != "generator.fps" or not scores_by_rate}
    if recipe.optimizer.schedule != "constant":
        rules["training.iterations"] = "recorded"
    then, here = inputs
    both = [key for key in then if key in here]
    before, now = (
        {**before, "inputs": {key: then[key] for key in both}},
        {**now, "inputs": {key: here[key] for key in both}},
    )
    found = list(changes(before, now, rules))
    _check_allowed(allowed, before, now)
    _check(found, root, allowed)
    return found


def differences(recorded: Mapping[str, Any], recipe: Recipe, root: Path) -> list[Change]:
    """What differs from a recipe on record, allowed or not, but for what may always change.

    Raises:
        UserError: the one on record does not fit this version.
    """
    found = changes(_whole(recorded, root), recipe.model_dump(mode="json"))
    return [change for change in found if change.rule != "free"]


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


def _whole(recorded: Mapping[str, Any], root: Path) -> Mapping[str, Any]:
    """A recipe on record with the keys that came since, at their defaults."""
    try:
        return Recipe.model_validate(dict(recorded)).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"the recipe on record in {str(root)!r} does not fit this version: {where or 'recipe'}:"
            f" {first['msg']}; go on with the version that began the run, or mend it"
        ) from error


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
        if not any(f"{one}.".startswith(f"{key}.") for one in known):
            raise UserError(
                f"--allow-changes {key}: there is no such key or section.{did_you_mean(key, sorted(known))}"
                " `vipo list keys` has them all"
            )
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
