"""What one process, or team of them, does in an iteration of a recipe, in numbers of samples, rows and passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from vipo.schema import Recipe
from vipo.training.losses import without_code
from vipo.workload import check_updates, parts, possible_steps, share_of, share_sizes, teams_of, widths


@dataclass(frozen=True)
class Work:
    """What one process does in an iteration.

    Args:
        recorded: transitions that the rollout keeps.
        trained: rows that the updates go through.
        passes: samples x steps through the network while sampling; with a window, on average over its places.
        calls: of the network while sampling, on the same average.
        replays: batches of rows, over all updates.
    """

    samples: int
    groups: int
    recorded: int
    trained: int
    passes: float
    calls: float
    replays: int
    sampled_at_once: int
    replayed_at_once: int


def work_of(recipe: Recipe, processes: int) -> Work:
    """How the rollout, the loss and the learner share a recipe's iteration out.

    Raises:
        UserError: the prompts cannot be dealt to so many processes.
    """
    section, steps = recipe.prompts, recipe.optimizer.per_iteration
    teams = teams_of(processes, recipe.training.context_parallel)
    share = share_of(0, teams, per_iteration=section.per_iteration, group_size=section.group_size)
    groups, group_size = len(share.groups), len(share.members)
    training, loss = recipe.training, without_code(recipe.objective, recipe.solver)
    together = [len(part) for part in parts(groups, training.prompts_at_once)]
    at_once = training.rollout_batch_size or together[0] * group_size
    sampling = [_sampling(recipe, stochastic, together, group_size) for stochastic in possible_steps(recipe.solver)]
    kept_of_all = section.per_iteration * (training.keep_per_group or section.group_size)
    check_updates(steps, samples=kept_of_all, processes=teams)
    kept = math.ceil(kept_of_all / teams)
    batches = [_batches(recipe, samples) for samples in share_sizes(kept, steps)]
    return Work(
        samples=groups * group_size,
        groups=groups,
        recorded=groups * group_size * loss.rows_per_sample if loss.keep_steps else 0,
        trained=kept * loss.rows_per_sample,
        passes=fmean(passes for passes, _ in sampling),
        calls=fmean(calls for _, calls in sampling),
        replays=sum(count for count, _ in batches),
        sampled_at_once=min(at_once, together[0] * group_size),
        replayed_at_once=max(largest for _, largest in batches),
    )


def _sampling(recipe: Recipe, stochastic: range, together: list[int], group_size: int) -> tuple[int, int]:
    """Passes and calls of the network for groups of which so many are sampled together."""
    steps = [width for groups in together for width in widths(recipe.solver, stochastic, groups, group_size)]
    at_once = recipe.training.rollout_batch_size
    return sum(steps), sum(math.ceil(width / (at_once or width)) for width in steps)


def _batches(recipe: Recipe, samples: int) -> tuple[int, int]:
    """How many batches the rows of an update with so many samples make, and the most rows of one."""
    loss = without_code(recipe.objective, recipe.solver)
    rows, at_once = samples * loss.rows_per_sample, recipe.training.replay_batch_size
    if at_once:
        return math.ceil(rows / at_once), min(at_once, rows)
    return loss.by_step(samples)
