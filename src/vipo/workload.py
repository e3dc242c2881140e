"""What an iteration comes to, in numbers. The loop deals its work by these functions, and a plan counts it by them.

No torch here: groups, samples, solver steps and rows are counted, not made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vipo.errors import UserError
from vipo.options import Solver


def groups_per_process(per_iteration: int, processes: int) -> int:
    """Groups of an iteration that each process samples.

    Raises:
        UserError: they cannot be dealt evenly.
    """
    if per_iteration % processes:
        more = math.ceil(per_iteration / processes) * processes
        raise UserError(
            f"prompts.per_iteration={per_iteration} must be a multiple of {processes} processes, one per GPU; take a"
            f" number of them that divides it, or prompts.per_iteration={more}"
        )
    return per_iteration // processes


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
