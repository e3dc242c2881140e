"""Which batch sizes a recipe should have on a machine: the largest that fit, and leave room for what is not counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vipo.plan.account import Machine, Plan, plan
from vipo.plan.ledger import Ledger
from vipo.plan.work import work_of
from vipo.schema import Recipe
from vipo.workload import share_sizes

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
    """The largest sizes up to a group with which sampling and updates leave ``HEADROOM`` of the memory free.

    They divide a group, and the rows of every update, so that each batch is full. 1 where not even that fits; the plan
    says so.
    """
    ledger = ledger or Ledger()
    work, group = work_of(recipe, machine.processes), recipe.prompts.group_size
    kept = work.groups * (recipe.training.keep_per_group or group)
    updates = [size * work.trained // kept for size in share_sizes(kept, recipe.optimizer.per_iteration)]
    rollout = _largest(recipe, machine, ledger, ("rollout_batch_size", "sample"), _divisors(group, group))
    replay = _largest(recipe, machine, ledger, ("replay_batch_size", "update"), _divisors(math.gcd(*updates), group))
    both = _with(recipe, rollout_batch_size=rollout, replay_batch_size=replay)
    return Batches(rollout, replay, plan(both, machine, ledger))


def _divisors(number: int, most: int) -> list[int]:
    """The largest first, without 1."""
    return [size for size in range(most, 1, -1) if number % size == 0]


def _largest(recipe: Recipe, machine: Machine, ledger: Ledger, where: tuple[str, str], sizes: list[int]) -> int:
    """Of a key of ``training``, with which its phase has room; the other size is 1, which is quickest to measure."""
    key, phase = where
    allowed = (1 - HEADROOM) * machine.memory
    alone = _with(recipe, rollout_batch_size=1, replay_batch_size=1)
    tried = (size for size in sizes if plan(_with(alone, **{key: size}), machine, ledger).total(phase) <= allowed)
    return next(tried, 1)


def _with(recipe: Recipe, **training: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})
