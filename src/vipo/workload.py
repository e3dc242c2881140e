"""What an iteration comes to, in numbers. The loop deals its work by these functions, and a plan counts it by them.

No torch here: groups, samples, solver steps and rows are counted, not made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vipo.errors import UserError
from vipo.options import Solver


@dataclass(frozen=True)
class Share:
    """What one process samples of an iteration: ``members`` of each of the ``groups``.

    Every process has as many groups and members as any other, so that all make the same network calls.
    """

    groups: range
    members: range
    group_size: int

    @property
    def samples(self) -> range:
        """Their numbers among those of all processes; they are consecutive."""
        first = self.groups.start * self.group_size + self.members.start
        return range(first, first + len(self.groups) * len(self.members))

    @property
    def splits_groups(self) -> bool:
        return len(self.members) < self.group_size


def teams_of(processes: int, context_parallel: int) -> int:
    """How many teams of ``context_parallel`` processes there are; those of a team work on the same samples.

    Raises:
        UserError: they cannot be made of so many processes.
    """
    if processes % context_parallel:
        raise UserError(
            f"training.context_parallel={context_parallel} shares each sample over so many processes, but there"
            f" {'is' if processes == 1 else 'are'} {processes}; start a multiple of {context_parallel} with torchrun,"
            " or take training.context_parallel=1"
        )
    return processes // context_parallel


def share_of(rank: int, processes: int, *, per_iteration: int, group_size: int) -> Share:
    """Whole groups for each process (or team of them), or each group split evenly over processes of its own.

    Raises:
        UserError: they cannot be dealt evenly.
    """
    each, over = per_iteration // processes, processes // per_iteration  # groups of a process; processes of a group
    if each * processes == per_iteration:
        return Share(range(rank * each, (rank + 1) * each), range(group_size), group_size)
    if over * per_iteration != processes or group_size % over:
        more = math.ceil(per_iteration / processes) * processes
        raise UserError(
            f"prompts.per_iteration={per_iteration} must be a multiple of {processes} processes, one per GPU (or per"
            " training.context_parallel GPUs), or divide them so that"
            f" prompts.group_size={group_size} splits evenly; take another number of processes, or"
            f" prompts.per_iteration={more}"
        )
    group, place = divmod(rank, over)
    members = group_size // over
    return Share(range(group, group + 1), range(place * members, (place + 1) * members), group_size)


def check_updates(updates: int, *, samples: int, processes: int) -> None:
    """Raises:
    UserError: of the ``samples`` that are trained on, a process has fewer than there are optimiser steps.
    """
    if processes > 1 and samples // processes < updates:
        raise UserError(
            f"optimizer.per_iteration={updates} needs as many samples of an iteration on each process, but {processes}"
            f" processes share {samples}; take fewer optimiser steps or processes, or more prompts.per_iteration"
        )


def parts(count: int, at_once: int | None) -> list[range]:
    """``count`` things in consecutive parts of ``at_once``, the last one with what is left; None is all at once."""
    size = at_once or max(count, 1)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def shared_steps(solver: Solver, stochastic: range) -> int:
    """How many first steps are computed once for a whole group: those before noise tells its samples apart.

    Never the last one, because every sample's own clean prediction is made there.
    """
    if not solver.same_noise:
        return 0
    return min(stochastic.start if stochastic else solver.steps, solver.steps - 1)


def widths(solver: Solver, stochastic: range, groups: int, group_size: int) -> list[int]:
    """How many samples go through the network at each solver step."""
    shared = shared_steps(solver, stochastic)
    return [groups] * shared + [groups * group_size] * (solver.steps - shared)


def possible_steps(solver: Solver) -> list[range]:
    """The stochastic steps of an iteration for each place that the window may be at; one place without a window."""
    window = solver.window
    if window is None or solver.kind == "ode":
        return [solver.candidates]
    return [range(first, first + window.size) for first in window.places]


def shares(samples: int, updates: int) -> list[int]:
    """Which of an iteration's updates each sample goes to, in the order in which they are dealt."""
    return [place * updates // samples for place in range(samples)]


def share_sizes(samples: int, updates: int) -> Sequence[int]:
    """Samples of each update."""
    dealt = shares(samples, updates)
    return [dealt.count(update) for update in range(updates)]
