"""The loop: prompts -> rollout -> (rewards, maps) -> advantage -> loss; one ``TrainStep`` per iteration.

It knows protocols only. Logging, evaluation, checkpoints and stopping live with the caller that iterates over it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from vipo import objective, randomness, sde, structuring
from vipo.generators.attention import AUTO, scope
from vipo.health import Health, where_not_finite
from vipo.policy import Policy
from vipo.prompts import PromptSampler
from vipo.rewards.background import Background
from vipo.rollout import Solver, replay, sample_groups
from vipo.types import Batched, Generator, MapSource, Prompt, Rollout, Scorer, Scores, TrainStep, Transitions, UserError

Combination = Literal["advantage", "reward"]
Report = tuple[dict[str, float], list[str]]  # metrics, and every guard that fired

WORST = ("ratio_deviation", "largest_log_ratio")  # over processes the largest counts, not the mean
GUARD_MEMORY = 20  # how many gradient norms the guard remembers


@dataclass(frozen=True)
class Objective:
    """The loss. ``clip_range`` and ``reduce`` belong together: a channel sum moves the ratio further than a mean."""

    credit: objective.CreditKind = "advantage_map"
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    reduce: sde.Reduce = "mean"
    combine: Combination = (
        "advantage"  # several rewards: "advantage" normalises each before the sum, "reward" sums first
    )
    kl_weight: float = 0.0


@dataclass(frozen=True)
class Update:
    """The optimiser's side. ``guard_factor``: an update whose gradient norm exceeds this many medians is skipped."""

    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    guard_factor: float = 20.0
    per_iteration: int = 1  # optimiser steps per iteration; only the first is exactly on-policy
    batch_size: int | None = None  # transitions replayed at once; None means all samples of one step


@dataclass
class GradientGuard:
    """Remembers recent gradient norms and says when one is out of line."""

    factor: float
    norms: list[float] = field(default_factory=list)

    def reason_to_skip(self, norm: float) -> str | None:
        """Why this update must not be applied, or None. A norm that passes is remembered."""
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        if len(self.norms) >= GUARD_MEMORY // 2 and norm > self.factor * statistics.median(self.norms):
            return f"gradient norm {norm:.3g} is over {self.factor:g} times the recent median"
        if norm > 0:  # rewards without spread give none at all: a median of 0 would refuse every later update
            self.norms = [*self.norms, norm][-GUARD_MEMORY:]
        return None


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


class Trainer:
    """Post-trains ``policy`` (the weights of ``generator.network``) on ``scorer``'s rewards.

    Args:
        accelerator: engine and precision; the network is prepared here.
        prompts: deals one prompt per group; ``prompts.per_iteration`` must divide by the number of processes.
        scorer: media and prompts to :class:`Scores`.
        map_source: a rollout to allocation maps; required by the credits in ``objective.NEEDS_MAPS``, else unused.
        rollout_batch_size: samples per network call while sampling; None means all.
        prompts_at_once: groups sampled together; None means all. With fewer, each part is scored while the next is
            sampled, with the same result as one after the other.
        keep_per_group: train on so many samples of each group, half its best and half its worst; None means all.
        attention: of the generator, as ``generator.attention``: what holds while an iteration runs.
        health: says when nothing is learned; by default after three iterations or updates in vain.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        generator: Generator,
        policy: Policy,
        prompts: PromptSampler,
        scorer: Scorer,
        map_source: MapSource | None,
        solver: Solver,
        objective: Objective,
        update: Update,
        group_size: int,
        seed: int,
        rollout_batch_size: int | None = None,
        prompts_at_once: int | None = None,
        keep_per_group: int | None = None,
        attention: str = AUTO,
        health: Health | None = None,
    ) -> None:
        ranks = accelerator.num_processes
        if prompts.per_iteration % ranks:
            raise UserError(f"prompts.per_iteration={prompts.per_iteration} must be a multiple of {ranks} processes")
        self.accelerator, self.generator, self.policy = accelerator, generator, policy
        self.prompts, self.scorer, self.map_source = prompts, scorer, map_source
        self.solver, self.objective, self.update = solver, objective, update
        self.group_size, self.seed, self.rollout_batch_size = group_size, seed, rollout_batch_size
        self.groups_here = prompts.per_iteration // ranks
        self.prompts_at_once = prompts_at_once or self.groups_here
        self.keep_per_group, self.attention = keep_per_group, attention
        self.health = health or Health()
        self.iteration = 0
        self.guard = GradientGuard(update.guard_factor)
        self.optimizer = torch.optim.AdamW(
            policy.parameters.values(), lr=update.learning_rate, betas=update.betas, weight_decay=update.weight_decay
        )
        generator.network, self.optimizer = accelerator.prepare(generator.network, self.optimizer)

    def __iter__(self) -> Iterator[TrainStep]:
        while True:
            yield self.step()

    def step(self, *, last: bool = False) -> TrainStep:
        """One iteration: sample, score, map, and update the policy.

        After the ``last`` one a run that has not moved a weight is a failure. Whoever iterates keeps the step, and
        raises :class:`vipo.types.RunFailed` with its ``failure`` if there is one.

        Raises:
            UserError: latents or maps stop being finite, or a reward fails.
        """
        with scope(self.attention):
            return self._step(last)

    def _step(self, last: bool) -> TrainStep:
        clock, iteration = Stopwatch(), self.iteration
        first_group = self.accelerator.process_index * self.groups_here
        rollout, scores = self._sample_and_score(iteration, first_group, clock)
        with clock("map"):
            maps = self._maps(rollout)
        with clock("update"):
            weight, advantage = self._weights(scores, maps, rollout)
            report, events = self._train(rollout, weight, self._kept(advantage), iteration)
        self.iteration += 1
        metrics = {**self._reward_metrics(scores, advantage), **_map_metrics(maps), **report}
        metrics["model_passes"] = float(rollout.model_passes)
        metrics = self._across_ranks(metrics)
        events += [f"reward {name}: {why}" for name, why in scores.failures.items()]
        events += self.health.iteration(metrics)
        failure = self.health.failure(self.iteration, last=last)
        events += [failure] if failure and not self.health.in_streak else []
        return TrainStep(iteration, metrics, clock.seconds, tuple(events), rollout, scores, maps, failure)

    def _sample_and_score(self, iteration: int, first_group: int, clock: Stopwatch) -> tuple[Rollout, Scores]:
        """The iteration's samples and their scores; in parts, each scored while the next one is sampled."""
        dealt = self.prompts.groups(iteration)[first_group : first_group + self.groups_here]
        starts = range(0, len(dealt), self.prompts_at_once)
        rollouts: list[Rollout] = []
        waiting: list[Future[Scores]] = []
        with Background(self.scorer) if len(starts) > 1 else nullcontext() as background:
            for start in starts:
                with clock("rollout"):
                    part = dealt[start : start + self.prompts_at_once]
                    rollouts.append(self._sample(part, iteration, first_group + start))
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
        )

    def _maps(self, rollout: Rollout) -> Float[Tensor, "N T H W"] | None:
        if self.objective.credit not in objective.NEEDS_MAPS:
            return None
        if self.map_source is None:
            raise ValueError(f"credit={self.objective.credit!r} needs a map_source")
        try:
            return self.map_source(rollout)
        except ValueError as error:  # the backbone's features were not finite: no map is better than an invented one
            raise UserError(f"the allocation map of iteration {self.iteration} failed: {error}") from error

    def _weights(self, scores: Scores, maps: Tensor | None, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The weight on each ratio, (N,) or (N, T, H, W), and the advantage it came from, (N,)."""
        rewards = scores.total
        if self.objective.combine == "reward":
            advantage = objective.group_advantage(rewards, self.group_size)
        else:
            advantage = objective.combine_advantages(scores.by_name, scores.weights, self.group_size)
        if maps is None:
            maps = torch.ones(len(advantage), *rollout.latent_grid, device=advantage.device)
        weight = objective.assign_credit(self.objective.credit, rewards, advantage, maps, self.group_size)
        return weight.clamp(-self.objective.advantage_clip, self.objective.advantage_clip), advantage

    def _kept(self, advantage: Tensor) -> Tensor:
        """Indices of the samples that are trained on."""
        if self.keep_per_group is None:
            return torch.arange(len(advantage))
        return objective.extremes(advantage, self.group_size, self.keep_per_group).nonzero().squeeze(1).cpu()

    def _train(self, rollout: Rollout, weight: Tensor, kept: Tensor, iteration: int) -> Report:
        """All optimiser steps of one iteration."""
        shares = self._split(rollout.transitions, kept, iteration)
        reports, events, skipped = [], [], 0
        for number, share in enumerate(shares):
            report, odd = self._optimise(rollout.conditioning, share, weight)
            reason = self.guard.reason_to_skip(report["grad_norm"])
            if reason:
                skipped += 1
                events += self.health.skipped(reason + odd, finite=math.isfinite(report["grad_norm"]))
            else:
                self._apply(report["grad_norm"])
            self.optimizer.zero_grad()
            if number == 0:  # every log-ratio of the first update must be 0: the weights are those that sampled
                report["ratio_deviation"] = report["largest_log_ratio"]
            reports.append(report)
        merged = {key: statistics.fmean(r[key] for r in reports) for key in reports[-1] if key != "ratio_deviation"}
        return {**merged, "ratio_deviation": reports[0]["ratio_deviation"], "skipped": float(skipped)}, events

    def _apply(self, norm: float) -> None:
        """One step of the optimiser; until one has moved a weight, look whether this one does."""
        before = None if self.health.record.learned or norm == 0 else self.policy.fingerprint()
        self.optimizer.step()
        self.policy.update_average()
        self.health.applied(moved=before is not None and self.policy.fingerprint() != before)

    def _split(self, recorded: Transitions, kept: Tensor, iteration: int) -> list[Transitions]:
        """The kept samples' transitions, dealt to the optimiser steps by sample, in an order of their own."""
        steps, samples = self.update.per_iteration, self.groups_here * self.group_size
        if steps == 1 and len(kept) == samples:
            return [recorded]
        order = torch.tensor(
            randomness.permutation(len(kept), seed=self.seed, purpose="update order", indices=(iteration,))
        )
        share_of = torch.full((samples,), -1)  # -1: not kept
        share_of[kept[order]] = torch.arange(len(kept)) * steps // len(kept)
        return [recorded.take((share_of[recorded.sample] == share).nonzero().squeeze(1)) for share in range(steps)]

    def _optimise(self, conditioning: Batched, share: Transitions, weight: Tensor) -> tuple[dict[str, float], str]:
        """Accumulate the gradient of one optimiser step and clip it; its numbers, and where it is not finite."""
        total = len(share.sample)
        batches = self._batches(share)
        sums: dict[str, Tensor] = {}
        largest = torch.zeros((), device=weight.device)
        for number, rows in enumerate(batches):
            last = number == len(batches) - 1
            with self._sync_only_if(last):
                loss, numbers, deviation = self._loss(conditioning, share.take(rows), weight)
                self.accelerator.backward(loss * (len(rows) / total))
            largest = torch.maximum(largest, deviation)
            for key, value in numbers.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value * (len(rows) / total)
        peaks = self.policy.gradient_peaks()  # clipping by a norm that is NaN makes every gradient NaN
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters.values(), self.update.max_grad_norm)
        keys = [*sums, "largest_log_ratio", "grad_norm"]
        values = torch.stack([*sums.values(), largest, torch.as_tensor(norm, device=weight.device).detach()])
        report = dict(zip(keys, values.tolist(), strict=True))
        return report, "" if math.isfinite(report["grad_norm"]) else where_not_finite(peaks)

    def _sync_only_if(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced over processes once per optimiser step, with its last batch."""
        return nullcontext() if last else self.accelerator.no_sync(self.generator.network)

    def _batches(self, share: Transitions) -> list[Tensor]:
        """Row indices of each replayed batch. By default one solver step at a time: the batch that sampled it."""
        if self.update.batch_size:
            return list(torch.arange(len(share.sample)).split(self.update.batch_size))
        return [(share.step == step).nonzero().squeeze(1) for step in share.step.unique().tolist()]

    def _loss(
        self, conditioning: Batched, rows: Transitions, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        reference = self._reference_step(conditioning, rows) if self.objective.kl_weight else None
        log_prob, step = replay(self.generator, conditioning, rows, self.solver, reduce=self.objective.reduce)
        old, chosen = rows.log_prob, weight[rows.sample.to(weight.device)]
        if chosen.ndim == 1:  # one ratio per sample: the mean over its positions
            log_prob, old = log_prob.mean((1, 2, 3)), old.mean((1, 2, 3))
        surrogate = objective.clipped_surrogate(log_prob, old, chosen, clip_range=self.objective.clip_range)
        loss = surrogate.loss
        numbers = {
            "loss": surrogate.loss.detach(),
            "clipped_fraction": surrogate.clipped_fraction,
            "approx_kl": surrogate.approx_kl,
        }
        if reference is not None:
            kl = sde.kl_divergence(step, reference, reduce=self.objective.reduce).mean()
            loss = loss + self.objective.kl_weight * kl
            numbers["kl_reference"] = kl.detach()
        return loss, numbers, (log_prob.detach() - old).abs().max()

    @torch.no_grad()
    def _reference_step(self, conditioning: Batched, rows: Transitions) -> sde.Transition:
        with self.policy.reference():
            return replay(self.generator, conditioning, rows, self.solver, reduce=self.objective.reduce)[1]

    def _reward_metrics(self, scores: Scores, advantage: Tensor) -> dict[str, float]:
        numbers: dict[str, Tensor] = {}
        for name, values in scores.by_name.items():
            numbers[f"reward/{name}"] = values.nanmean()
            numbers[f"spread/{name}"] = objective.spread(values, self.group_size)
            numbers[f"unscored/{name}"] = values.isnan().float().mean()
            if len(scores.by_name) > 1:  # normalised in its groups: how far this reward pulls where the sum goes
                own = objective.group_advantage(values, self.group_size)
                numbers[f"agreement/{name}"] = torch.cosine_similarity(own.float(), advantage.float(), dim=0)
        flat = objective.groups_without_spread(scores.total, self.group_size)
        numbers["reward"] = scores.total.nanmean()
        numbers["flat_groups"] = flat.float().mean()
        numbers["advantage_size"] = advantage.abs().mean()
        return dict(zip(numbers, torch.stack([v.float() for v in numbers.values()]).tolist(), strict=True))

    def _across_ranks(self, metrics: Mapping[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return dict(metrics)
        values = torch.tensor([list(metrics.values())], device=self.accelerator.device, dtype=torch.float64)
        every = self.accelerator.gather(values)  # (ranks, metrics)
        merged = dict(zip(metrics, every.nanmean(0).tolist(), strict=True))
        worst = every.max(0).values.tolist()
        return {key: worst[i] if key in WORST else value for i, (key, value) in enumerate(merged.items())}


def _map_metrics(maps: Tensor | None) -> dict[str, float]:
    """Mean of M (it scales the learning rate), the share of its mass in the heaviest quarter, and a clip's flicker."""
    if maps is None:
        return {}
    flat = maps.flatten(1)
    top = flat.topk(max(1, flat.shape[1] // 4), 1).values.sum(1) / flat.sum(1).clamp_min(1e-12)
    numbers = {"map/mean": flat.mean(), "map/top_quarter_mass": top.mean()}
    if maps.shape[1] > 1:
        numbers["map/flicker"] = structuring.flicker(maps).mean()
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))
