"""Which keys of a recipe may change when a run goes on. No torch here: ``vipo list keys`` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

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
    "optimizer.kind": "never",
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


def rule_of(key: str, rules: Mapping[str, Rule] = RULES) -> Rule:
    """Whether a dotted key may change when a run goes on."""
    parts = key.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((rules[prefix] for prefix in prefixes if prefix in rules), OTHERWISE)
