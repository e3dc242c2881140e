"""Which batch sizes a recipe should have on a machine: the largest that fit, and leave room for what is not counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vipo.plan.account import Machine, Plan, plan
from vipo.plan.ledger import Ledger
from vipo.schema import Recipe

HEADROOM = 0.1  # of the memory, for CUDA's context, the allocator's gaps and the workspaces of kernels


@dataclass(frozen=True)
class Batches:
    """What ``training.rollout_batch_size`` and ``training.replay_batch_size`` may be, and the plan with them."""

    rollout: int
    replay: int
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        return {
            "rollout_batch_size": self.rollout,
            "replay_batch_size": self.replay,
            "headroom": HEADROOM,
            "plan": self.plan.as_json(),
        }


def propose(recipe: Recipe, machine: Machine, ledger: Ledger | None = None) -> Batches:
    """The largest divisors of a group with which sampling and updates leave ``HEADROOM`` of the memory free.

    Divisors, so that every batch of a group is full. 1 where not even that fits; the plan says so.
    """
    ledger = ledger or Ledger()
    rollout = _largest(recipe, machine, ledger, "rollout_batch_size", "sample")
    replay = _largest(recipe, machine, ledger, "replay_batch_size", "update")
    both = _with(recipe, rollout_batch_size=rollout, replay_batch_size=replay)
    return Batches(rollout, replay, plan(both, machine, ledger))


def _largest(recipe: Recipe, machine: Machine, ledger: Ledger, key: str, phase: str) -> int:
    allowed = (1 - HEADROOM) * machine.memory
    # The other size is 1 meanwhile: it has no part in this phase, and is quickest to measure.
    alone = _with(recipe, rollout_batch_size=1, replay_batch_size=1)
    size = recipe.prompts.group_size
    fitting = (
        batch
        for batch in range(size, 1, -1)
        if size % batch == 0 and plan(_with(alone, **{key: batch}), machine, ledger).total(phase) <= allowed
    )
    return next(fitting, 1)


def _with(recipe: Recipe, **training: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})
