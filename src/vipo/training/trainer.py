"""The loop: prompts -> rollout -> (rewards, maps) -> credit -> loss; one ``TrainStep`` per iteration.

It knows protocols only. Logging, evaluation, checkpoints and stopping live with the caller that iterates over it.
"""

from __future__ import annotations

import math
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
from vipo.options import (
    NORMALISES_POSITIONS,
    CreditKind,
    Objective,
    OptimizerOptions,
    Solver,
)
from vipo.policy import Policy
from vipo.prompts.sampler import PromptSampler
from vipo.ranks import together
from vipo.rollout import sample_groups
from vipo.secrets import redacted
from vipo.training.background import Background
from vipo.training.credit import Credit, OwnCredit, assign, combined, is_signed, step_factor, takes_maps
from vipo.training.health import Health, Record
from vipo.training.learner import Learner
from vipo.training.metrics import MOVED, SIZE, as_floats, change_of, evidence_metrics, map_metrics, reward_numbers
from vipo.training.pictures import PICTURES, picture_numbers, picture_rows
from vipo.types import Generator, KnowsPatches, MapSource, Prompt, Rollout, Scorer, Scores, TrainStep, sent
from vipo.workload import check_updates, parts, share_of


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
    """All that the next iteration depends on. Of tensors that are cut over processes this one's parts are here."""

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
        prompts: deals one prompt per group; a process has whole groups, or a group is split over several of them.
        scorer: media and prompts to :class:`Scores`.
        map_source: a rollout to allocation maps; required by the credits in ``NEEDS_MAPS``, else unused.
        group_size: samples per prompt.
        rollout_batch_size: samples per network call while sampling; None means all.
        replay_batch_size: rows per network call of an update; None means all of one solver step.
        prompts_at_once: groups sampled together; None means all. With fewer, each part is scored while the next is
            sampled, with the same result as one after the other.
        keep_per_group: train on so many samples of each group, half its best and half its worst; None means all.
        iterations: of the whole run, which a schedule of the learning rate needs.
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
        credit: CreditKind | OwnCredit,
        solver: Solver,
        objective: Objective,
        optimizer: OptimizerOptions,
        group_size: int,
        seed: int,
        rollout_batch_size: int | None = None,
        replay_batch_size: int | None = None,
        prompts_at_once: int | None = None,
        keep_per_group: int | None = None,
        iterations: int | None = None,
        attention: str = AUTO,
        health: Health | None = None,
    ) -> None:
        self.engine, self.generator, self.policy = engine, generator, policy
        self.prompts, self.scorer, self.map_source = prompts, scorer, map_source
        self.credit, self.solver, self.objective = credit, solver, objective
        self.group_size, self.seed, self.rollout_batch_size = group_size, seed, rollout_batch_size
        dealt = {"per_iteration": prompts.per_iteration, "group_size": group_size}
        self.share = share_of(engine.team, engine.teams, **dealt)
        kept = prompts.per_iteration * (keep_per_group or group_size)
        check_updates(optimizer.per_iteration, samples=kept, processes=engine.teams)
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
            iterations=iterations,
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
        everyones = self._everyones(scores)  # whatever compares samples sees those of all processes
        mine, advantage = self._mine(scores, everyones), combined(self.objective, everyones, self.group_size)
        with clock("map"):
            maps = self._maps(rollout, mine, advantage[self._here])
        with clock("update"):
            credit = self._credit(mine, everyones, advantage, maps, rollout)
            seen = self._seen(everyones, advantage, rollout)
            if self.health.watch.skips_samples:
                self.health.watch.samples(as_floats(seen))
            before = self.policy.probe()
            kept = self._kept(advantage)
            learned, events = self.learner.learn(rollout, credit, kept, iteration)
            numbers = as_floats({**seen, **change_of(before, self.policy.probe())})
        self.iteration += 1
        passes, moved, size = self.engine.sums([float(rollout.model_passes), numbers.pop(MOVED), numbers.pop(SIZE)])
        looks = {key: numbers.pop(key) for key in PICTURES if key in numbers}
        metrics = {**numbers, **self._mean(self._of_positions(maps, scores)), **learned, "model_passes": passes}
        metrics |= {"weight_change": math.sqrt(moved / size) if size else 0.0, **looks}
        events += [f"reward {name}: {why}" for name, why in everyones.failures.items()]
        events += self.health.iteration(metrics)
        failure = self.health.failure(self.iteration, last=last)
        events += [failure] if failure and not self.health.in_streak else []
        told = tuple(map(redacted, events))  # they quote what servers and libraries said
        ours = advantage[self._here], maps, self._trained_on(credit.local, kept)
        return TrainStep(iteration, metrics, clock.seconds, told, rollout, scores, *ours, failure)

    def _sample_and_score(self, iteration: int, clock: Stopwatch) -> tuple[Rollout, Scores]:
        """The iteration's samples and their scores; in parts, each scored while the next one is sampled."""
        groups = self.share.groups
        dealt = self.prompts.groups(iteration)[groups.start : groups.stop]
        places = parts(len(dealt), self.prompts_at_once)
        rollouts: list[Rollout] = []
        waiting: list[Future[Scores]] = []
        with Background(self.scorer) if len(places) > 1 else nullcontext() as background:
            for place in places:
                with clock("rollout"):
                    part = dealt[place.start : place.stop]
                    rollouts.append(self._sample(part, iteration, groups.start + place.start))
                if background is not None:
                    waiting.append(background.submit(rollouts[-1].media, rollouts[-1].prompts))
            with clock("reward"):  # of a background one, only what has to be waited for
                if background is None:
                    scores = together(self.engine, lambda: [self.scorer(rollouts[0].media, rollouts[0].prompts)])
                else:
                    scores = together(self.engine, lambda: [future.result() for future in waiting])
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
            members=self.share.members,
            batch_size=self.rollout_batch_size,
            reduce=self.objective.reduce,
            keep_steps=self.learner.loss.keep_steps,
            keep_mean=self.learner.loss.keep_mean,
        )

    def _seen(self, scores: Scores, advantage: Tensor, rollout: Rollout) -> dict[str, Tensor]:
        """What all processes' samples and scores come to, in numbers that are not waited for."""
        period = self.generator.patch_period if isinstance(self.generator, KnowsPatches) else None
        rows = self.engine.gather(picture_rows(rollout.media, period))
        return {**reward_numbers(scores, advantage, self.group_size), **picture_numbers(rows, self.group_size)}

    def _maps(self, rollout: Rollout, scores: Scores, advantage: Tensor) -> Float[Tensor, "N T H W"] | None:
        if not takes_maps(self.credit):
            return None
        if self.map_source is None:
            raise ValueError(f"credit={self.credit!r} needs a map_source")
        try:
            return self.map_source(rollout, advantage.where(scores.total.isfinite(), torch.nan), scores)
        except ValueError as error:  # the backbone's features were not finite: no map is better than an invented one
            raise UserError(f"the allocation map of iteration {self.iteration} failed: {error}") from error

    @property
    def _here(self) -> slice:
        """This process's samples among those of all."""
        return slice(self.share.samples.start, self.share.samples.stop)

    def _everyones(self, scores: Scores) -> Scores:
        """The scores of all samples, in the order of their numbers; bit for bit those of one process.

        Processes of a team score the same samples, and go by what the first of them found.
        """
        if self.engine.ranks == 1:
            return scores
        device = scores.total.device
        on_cpu = Scores({name: v.cpu() for name, v in scores.by_name.items()}, dict(scores.weights), scores.failures)
        found = Scores.join(self.engine.teams_say(on_cpu))
        return Scores({name: v.to(device) for name, v in found.by_name.items()}, scores.weights, found.failures)

    def _mine(self, scores: Scores, everyones: Scores) -> Scores:
        """This process's scores as all processes go by, with its evidence."""
        return replace(scores, by_name={name: values[self._here] for name, values in everyones.by_name.items()})

    def _credit(self, mine: Scores, scores: Scores, advantage: Tensor, maps: Tensor | None, rollout: Rollout) -> Credit:
        """The credit of this process's samples, from the scores and advantages of all."""
        steps, here = step_factor(self.objective, self.solver, rollout.sigmas), self._here
        if isinstance(self.credit, OwnCredit):
            return self.credit(self.objective, mine, advantage[here], maps, rollout, steps)
        joined = self.credit in NORMALISES_POSITIONS and self.share.splits_groups
        if joined and maps is not None:
            maps = self.engine.gather(maps)
        elif not joined:
            advantage, scores = advantage[here], mine
        given = (scores, advantage, maps, rollout.latent_grid, self.group_size, steps)
        credit = assign(self.credit, self.objective, *given)
        return replace(credit, advantage=credit.advantage[here], local=credit.local[here]) if joined else credit

    def _kept(self, advantage: Tensor) -> Tensor:
        """Numbers of the samples that are trained on, among those of all processes."""
        if self.keep_per_group is None:
            return torch.arange(len(advantage))
        return extremes(advantage, self.group_size, self.keep_per_group).cpu().nonzero().squeeze(1)

    def _trained_on(self, weight: Float[Tensor, "N *position"], kept: Tensor) -> Float[Tensor, "N *position"]:
        """The weights of this process's samples, 0 where one is not among ``kept``."""
        here = torch.zeros(self.prompts.per_iteration * self.group_size, device=weight.device)
        here[sent(kept, weight.device)] = 1.0
        return weight * here[self._here].reshape(-1, *[1] * (weight.ndim - 1))

    def _of_positions(self, maps: Tensor | None, scores: Scores) -> dict[str, float]:
        return {**map_metrics(maps, signed=is_signed(self.credit)), **evidence_metrics(scores)}

    def _mean(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Means over the teams, each of which has as many samples as any other."""
        sums = self.engine.sums(list(numbers.values()))
        return {name: value / self.engine.teams for name, value in zip(numbers, sums, strict=True)}

    def state(self) -> TrainState:
        """What a checkpoint holds, as this process has it: tensors in use, not copies of them."""
        weights, averages = self.policy.stored()
        return TrainState(
            self.iteration,
            weights,
            averages,
            self.learner.optimizer_state(),
            list(self.learner.guard.norms),
            replace(self.health.record),
        )

    def restore(self, state: TrainState) -> None:
        """Go on from a checkpoint, whose tensors are whole; the next iteration is then bit for bit the same.

        Raises:
            UserError: it belongs to another policy.
        """
        self.policy.load(state.weights, state.averages)
        self.learner.restore_optimizer(state.optimizer)
        self.iteration, self.learner.guard.norms = state.iteration, list(state.gradient_norms)
        self.health.restore(state.health)
