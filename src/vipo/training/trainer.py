"""The loop: prompts -> rollout -> (rewards, maps) -> credit -> loss; one ``TrainStep`` per iteration.

It knows protocols only. Logging, evaluation, checkpoints and stopping live with the caller that iterates over it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.engine import Engine
from vipo.errors import UserError
from vipo.generators.attention import AUTO, scope
from vipo.objective import extremes
from vipo.options import NEEDS_MAPS, CreditKind, Objective, OptimizerOptions, Solver
from vipo.policy import Policy
from vipo.prompts.sampler import PromptSampler
from vipo.rollout import sample_groups
from vipo.training.background import Background
from vipo.training.credit import Credit, assign, combined, step_factor
from vipo.training.health import Health, Record
from vipo.training.learner import Learner
from vipo.training.metrics import map_metrics, reward_metrics
from vipo.types import Generator, MapSource, Prompt, Rollout, Scorer, Scores, TrainStep
from vipo.workload import groups_per_process, parts

WORST = ("ratio_deviation", "largest_log_ratio")  # over processes the largest counts, not the mean


class Stopwatch:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True)
class TrainState:
    """All that the next iteration depends on, whole tensors on this process."""

    iteration: int
    weights: Mapping[str, Tensor]
    averages: Mapping[str, Tensor]  # empty if no moving average is kept
    optimizer: Mapping[str, Tensor]
    gradient_norms: list[float]
    health: Record


class Trainer:
    """Post-trains ``policy`` (the weights of ``generator.network``) on ``scorer``'s rewards.

    Args:
        engine: processes and precision; the network is prepared here.
        prompts: deals one prompt per group; ``prompts.per_iteration`` must divide by the number of processes.
        scorer: media and prompts to :class:`Scores`.
        map_source: a rollout to allocation maps; required by the credits in ``NEEDS_MAPS``, else unused.
        group_size: samples per prompt.
        rollout_batch_size: samples per network call while sampling; None means all.
        replay_batch_size: rows per network call of an update; None means all of one solver step.
        prompts_at_once: groups sampled together; None means all. With fewer, each part is scored while the next is
            sampled, with the same result as one after the other.
        keep_per_group: train on so many samples of each group, half its best and half its worst; None means all.
        attention: of the generator, as ``generator.attention``: what holds while an iteration runs.
        health: says when nothing is learned; by default after three iterations or updates in vain.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        generator: Generator,
        policy: Policy,
        prompts: PromptSampler,
        scorer: Scorer,
        map_source: MapSource | None,
        credit: CreditKind,
        solver: Solver,
        objective: Objective,
        optimizer: OptimizerOptions,
        group_size: int,
        seed: int,
        rollout_batch_size: int | None = None,
        replay_batch_size: int | None = None,
        prompts_at_once: int | None = None,
        keep_per_group: int | None = None,
        attention: str = AUTO,
        health: Health | None = None,
    ) -> None:
        self.engine, self.generator, self.policy = engine, generator, policy
        self.prompts, self.scorer, self.map_source = prompts, scorer, map_source
        self.credit, self.solver, self.objective = credit, solver, objective
        self.group_size, self.seed, self.rollout_batch_size = group_size, seed, rollout_batch_size
        self.groups_here = groups_per_process(prompts.per_iteration, engine.ranks)
        self.prompts_at_once = prompts_at_once
        self.keep_per_group, self.attention = keep_per_group, attention
        self.health = health or Health()
        self.iteration = 0
        self.learner = Learner(
            engine=engine,
            generator=generator,
            policy=policy,
            solver=solver,
            objective=objective,
            optimizer=optimizer,
            health=self.health,
            seed=seed,
            replay_batch_size=replay_batch_size,
        )

    def __iter__(self) -> Iterator[TrainStep]:
        while True:
            yield self.step()

    def step(self, *, last: bool = False) -> TrainStep:
        """One iteration: sample, score, map, and update the policy.

        After the ``last`` one a run that has not moved a weight is a failure. Whoever iterates keeps the step, and
        raises :class:`vipo.errors.RunFailed` with its ``failure`` if there is one.

        Raises:
            UserError: latents or maps stop being finite, or a reward fails.
        """
        with scope(self.attention):
            return self._step(last)

    def _step(self, last: bool) -> TrainStep:
        clock, iteration = Stopwatch(), self.iteration
        rollout, scores = self._sample_and_score(iteration, clock)
        advantage = combined(self.objective, scores, self.group_size)
        with clock("map"):
            maps = self._maps(rollout, scores, advantage)
        with clock("update"):
            credit = self._credit(scores, advantage, maps, rollout)
            learned, events = self.learner.learn(rollout, credit, self._kept(credit), iteration)
        self.iteration += 1
        numbers = {**reward_metrics(scores, credit.advantage, self.group_size), **map_metrics(maps), **learned}
        metrics = self._across_ranks({**numbers, "model_passes": float(rollout.model_passes)})
        events += [f"reward {name}: {why}" for name, why in scores.failures.items()]
        events += self.health.iteration(metrics)
        failure = self.health.failure(self.iteration, last=last)
        events += [failure] if failure and not self.health.in_streak else []
        return TrainStep(iteration, metrics, clock.seconds, tuple(events), rollout, scores, maps, failure)

    def _sample_and_score(self, iteration: int, clock: Stopwatch) -> tuple[Rollout, Scores]:
        """The iteration's samples and their scores; in parts, each scored while the next one is sampled."""
        first_group = self.engine.rank * self.groups_here
        dealt = self.prompts.groups(iteration)[first_group : first_group + self.groups_here]
        places = parts(len(dealt), self.prompts_at_once)
        rollouts: list[Rollout] = []
        waiting: list[Future[Scores]] = []
        with Background(self.scorer) if len(places) > 1 else nullcontext() as background:
            for place in places:
                with clock("rollout"):
                    part = dealt[place.start : place.stop]
                    rollouts.append(self._sample(part, iteration, first_group + place.start))
                if background is not None:
                    waiting.append(background.submit(rollouts[-1].media, rollouts[-1].prompts))
            with clock("reward"):  # of a background one, only what has to be waited for
                scores = [future.result() for future in waiting]
                if background is None:
                    scores = [self.scorer(rollouts[0].media, rollouts[0].prompts)]
        return Rollout.join(rollouts), Scores.join(scores)

    def _sample(self, prompts: Sequence[Prompt], iteration: int, first_group: int) -> Rollout:
        return sample_groups(
            self.generator,
            prompts,
            self.solver,
            group_size=self.group_size,
            seed=self.seed,
            iteration=iteration,
            first_group=first_group,
            batch_size=self.rollout_batch_size,
            reduce=self.objective.reduce,
            keep_steps=self.learner.loss.keep_steps,
            keep_mean=self.learner.loss.keep_mean,
        )

    def _maps(self, rollout: Rollout, scores: Scores, advantage: Tensor) -> Float[Tensor, "N T H W"] | None:
        if self.credit not in NEEDS_MAPS:
            return None
        if self.map_source is None:
            raise ValueError(f"credit={self.credit!r} needs a map_source")
        try:
            return self.map_source(rollout, advantage.where(scores.total.isfinite(), torch.nan))
        except ValueError as error:  # the backbone's features were not finite: no map is better than an invented one
            raise UserError(f"the allocation map of iteration {self.iteration} failed: {error}") from error

    def _credit(self, scores: Scores, advantage: Tensor, maps: Tensor | None, rollout: Rollout) -> Credit:
        steps, grid = step_factor(self.objective, self.solver, rollout.sigmas), rollout.latent_grid
        return assign(self.credit, self.objective, scores, advantage, maps, grid, self.group_size, steps)

    def _kept(self, credit: Credit) -> Tensor:
        """Indices of the samples that are trained on."""
        if self.keep_per_group is None:
            return torch.arange(len(credit.advantage))
        return extremes(credit.advantage, self.group_size, self.keep_per_group).cpu().nonzero().squeeze(1)

    def _across_ranks(self, metrics: Mapping[str, float]) -> dict[str, float]:
        if self.engine.ranks == 1:
            return dict(metrics)
        values = torch.tensor([list(metrics.values())], device=self.engine.device, dtype=torch.float64)
        every = self.engine.gather(values)  # (ranks, metrics)
        merged = dict(zip(metrics, every.nanmean(0).tolist(), strict=True))
        worst = every.max(0).values.tolist()
        return {key: worst[i] if key in WORST else value for i, (key, value) in enumerate(merged.items())}

    def state(self) -> TrainState:
        """What a checkpoint holds; with sharded weights every process has to ask."""
        return TrainState(
            self.iteration,
            self.policy.state(),
            self.policy.averages(),
            self.learner.optimizer_state(),
            list(self.learner.guard.norms),
            replace(self.health.record),
        )

    def restore(self, state: TrainState) -> None:
        """Go on from a checkpoint; the next iteration is then bit for bit the same.

        Raises:
            UserError: it belongs to another policy.
        """
        self.policy.load(state.weights, state.averages)
        self.learner.restore_optimizer(state.optimizer)
        self.iteration, self.learner.guard.norms = state.iteration, list(state.gradient_norms)
        self.health.record = state.health
