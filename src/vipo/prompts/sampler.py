"""Deals prompts: which ones an iteration trains on is a function of (seed, iteration) alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from vipo import randomness
from vipo.types import Prompt


@lru_cache(maxsize=2)
def _order(count: int, seed: int, lap: int) -> tuple[int, ...]:
    """How one pass over the prompts goes."""
    return tuple(randomness.permutation(count, seed=seed, purpose="prompts", indices=(lap,)))


class PromptSampler:
    """Deals ``per_iteration`` prompts to each iteration, every prompt once before any comes again.

    The order is reshuffled for each pass over the file from ``seed`` alone, so iteration 500 can be asked for directly.
    """

    def __init__(self, prompts: Sequence[Prompt], *, per_iteration: int, seed: int) -> None:
        if not prompts:
            raise ValueError("no prompts to sample from")
        self.prompts = tuple(prompts)
        self.per_iteration = per_iteration
        self.seed = seed

    def groups(self, iteration: int) -> list[Prompt]:
        """The prompts of one iteration, one per group, over all ranks."""
        first = iteration * self.per_iteration
        return [self._at(position) for position in range(first, first + self.per_iteration)]

    def dealt(self, iterations: int) -> list[Prompt]:
        """The prompts of the first so many iterations, each once, in the order in which they come."""
        return [self._at(position) for position in range(min(iterations * self.per_iteration, len(self.prompts)))]

    def _at(self, position: int) -> Prompt:
        lap, place = divmod(position, len(self.prompts))
        return self.prompts[_order(len(self.prompts), self.seed, lap)[place]]
