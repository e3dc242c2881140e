"""Fixed prompts and fixed noise to scores, part by part, so that two models are compared sample by sample.

One evaluator for a run and for ``vipo evaluate``. It holds the media of one part at a time, and several processes share
the parts. The noise of a sample depends on a seed and on the sample's number among those of the whole list, so scores
do not depend on the parts, except for how a network rounds in batches of another size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vipo.evaluation.ranks import everyones_parts, in_vain, share
from vipo.evaluation.records import Evaluation, Keeper, Models, Part, Scored
from vipo.generators import attention
from vipo.options import Solver
from vipo.ranks import ALONE, Ranks, together
from vipo.rollout import StepContext, sample_groups
from vipo.types import Generator, Prompt, Rollout, Scorer

EVALUATION_SEED = 20_251_118  # the same for every run, so that runs compare


@runtime_checkable
class Sampling(Protocol):
    """Prompts to media; :class:`Sampler` is one."""

    @property
    def samples_per_prompt(self) -> int: ...

    def __call__(self, prompts: Sequence[Prompt], first: int = 0) -> Rollout:
        """Samples of consecutive prompts; ``first`` is the place of the first of them in the whole list."""


@dataclass(frozen=True)
class Sampler:
    """Samples without noise between the solver's steps. Equal arguments give equal noise, whatever the weights.

    Args:
        steps: of the solver; None takes its own.
        batch_size: samples per network call; None means a whole part.
        around: what to enter around the network's part of each step, see :func:`vipo.rollout.sample_groups`.
        at_least: make as many network calls as so many samples need, where processes go in step.
    """

    generator: Generator
    solver: Solver
    samples_per_prompt: int
    steps: int | None = None
    batch_size: int | None = None
    seed: int = EVALUATION_SEED
    around: StepContext = lambda _step: nullcontext()
    at_least: int = 0

    def __call__(self, prompts: Sequence[Prompt], first: int = 0) -> Rollout:
        return sample_groups(
            self.generator,
            prompts,
            self.solver.deterministic(self.steps),
            group_size=self.samples_per_prompt,
            seed=self.seed,
            first_group=first,
            batch_size=self.batch_size,
            at_least=self.at_least,
            around=self.around,
        )


def scored(sampler: Sampling, scorer: Scorer, prompts: Sequence[Prompt], first: int = 0) -> Scored:
    """Sample some prompts and score them, under the present weights."""
    rollout = sampler(prompts, first)
    scores = scorer(rollout.media, rollout.prompts)
    return Scored(rollout.prompts, rollout.media, scores.by_name, sampler.samples_per_prompt, scores.failures)


@dataclass(frozen=True)
class Evaluator:
    """Scores of every model on every prompt.

    Args:
        models: how to be the base and the policy.
        scorer: rewards as one; a sample without a score is NaN.
        prompts_at_once: in a part, of which the media are in memory together.
        attention: as ``generator.attention``, while the networks work.
        ranks: the processes that share the parts; each comes to know all scores.
    """

    models: Models
    sampler: Sampling
    scorer: Scorer
    prompts_at_once: int
    attention: str = attention.AUTO
    ranks: Ranks = ALONE

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        keeper: Keeper | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """The whole list. ``progress`` is told about how many prompts all processes have done."""

        def all_of_mine() -> list[Part]:
            parts = []
            for part in self.parts(prompts, keeper):
                parts.append(part)
                if progress:
                    progress(min(len(parts) * self.prompts_at_once * self.ranks.teams, len(prompts)))
            return parts

        parts = everyones_parts(together(self.ranks, all_of_mine), self.ranks)
        return Evaluation.join(parts, prompts, self.sampler.samples_per_prompt)

    def parts(self, prompts: Sequence[Prompt], keeper: Keeper | None = None) -> Iterator[Part]:
        """This process's parts, each given to ``keeper`` with its media; what that has already is not done again."""
        starts = range(0, len(prompts), self.prompts_at_once)
        mine = share(starts, self.ranks)
        for first in mine:
            known = keeper.read(first) if keeper else None
            yield known or self._part(prompts[first : first + self.prompts_at_once], first, keeper)
        for _ in range(in_vain(starts, self.ranks)):
            self._accompany(prompts[mine[-1] : mine[-1] + self.prompts_at_once], mine[-1])

    def _accompany(self, prompts: Sequence[Prompt], first: int) -> None:
        """Sample as the others do, for nothing: their network is cut over all processes."""
        for present in self.models.values():
            with attention.scope(self.attention), present():
                self.sampler(prompts, first)

    def _part(self, prompts: Sequence[Prompt], first: int, keeper: Keeper | None) -> Part:
        results = {}
        for model, present in self.models.items():
            with attention.scope(self.attention), present():
                results[model] = scored(self.sampler, self.scorer, prompts, first)
        part = Part.of(results, first)
        if keeper:
            keeper.keep(part, results)
        return part
