"""From a rollout and its credit to updated weights: deal the rows to optimiser steps, accumulate, guard, step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vipo import randomness
from vipo.engine import Engine
from vipo.objective import check_maps
from vipo.options import Objective, OptimizerOptions, Solver
from vipo.policy import Policy
from vipo.training import losses, optimizers
from vipo.training.credit import Credit
from vipo.training.health import GradientGuard, Health, where_not_finite
from vipo.training.losses import Cost
from vipo.training.schedule import learning_rate, varies
from vipo.types import Batched, Generator, Rollout
from vipo.workload import shares

Report = tuple[dict[str, float], list[str]]  # metrics, and every guard that fired


@dataclass(frozen=True)
class Update:
    """One optimiser step's rows, as far as they are this process's.

    Args:
        batches: row indices of each pass; empty where another process has rows and this one has none.
        total: rows of all processes.
        spare: a row for a pass that only accompanies the others.
    """

    rows: Any
    batches: list[Tensor]
    total: int
    spare: Any


class Learner:
    """Updates a policy. The network is prepared by the engine here, so the policy's copies begin here too.

    Args:
        replay_batch_size: rows per pass of the network; None means all of one solver step, the batch that sampled it.
        health: told of every update that is applied or skipped.
        seed: of the order in which samples are dealt to several optimiser steps, and of what a loss draws.
        iterations: of the whole run, which a schedule of the learning rate needs.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        generator: Generator,
        policy: Policy,
        solver: Solver,
        objective: Objective,
        optimizer: OptimizerOptions,
        health: Health,
        seed: int,
        replay_batch_size: int | None = None,
        iterations: int | None = None,
    ) -> None:
        if iterations is None and optimizer.schedule != "constant":
            raise ValueError(f"schedule={optimizer.schedule!r} needs iterations, the length of the run")
        self.engine, self.generator, self.policy = engine, generator, policy
        self.objective, self.options, self.health, self.seed = objective, optimizer, health, seed
        self.replay_batch_size, self.iterations = replay_batch_size, iterations or 0
        self.loss = losses.build(objective, solver)
        self.guard = GradientGuard(optimizer.guard_factor)
        self.optimizer: Any = optimizers.build(optimizer, policy.parameters.values())
        generator.network, self.optimizer = engine.prepare(generator.network, self.optimizer)
        policy.begin()

    def learn(self, rollout: Rollout, credit: Credit, kept: Tensor, iteration: int) -> Report:
        """All optimiser steps of one iteration; its numbers are those of all processes together.

        Args:
            credit: of this process's samples.
            kept: which samples are trained on, by their numbers among those of all processes.
        """
        rows = self.loss.rows(rollout, seed=self.seed, iteration=iteration)
        reports, events, skipped = [], [], 0
        rate = self._set_rate(iteration)
        for number, update in enumerate(self._updates(rows, rollout, kept, iteration)):
            report, odd = self._accumulate(rollout.conditioning, update, credit)
            if number == 0:  # every log-ratio of the first update must be 0: the weights are those that sampled
                report["ratio_deviation"] = report["largest_log_ratio"]
            refused, told = self._judged(report, odd)
            events += told
            skipped += refused
            if not refused:
                self._apply(report["grad_norm"])
            self.optimizer.zero_grad()
            reports.append(report)
        merged = {key: statistics.fmean(r[key] for r in reports) for key in reports[-1] if key != "ratio_deviation"}
        return {**merged, "ratio_deviation": reports[0]["ratio_deviation"], "skipped": float(skipped), **rate}, events

    def _judged(self, report: Mapping[str, float], odd: str) -> tuple[bool, list[str]]:
        """Whether an update with these numbers must not be applied, and what to report of it.

        Args:
            odd: where its gradient is not finite, to end a sentence.
        """
        reason = self.guard.reason_to_skip(report["grad_norm"])
        if reason and not math.isfinite(report["grad_norm"]):
            return True, self.health.skipped(reason + odd, finite=False)
        refused, told = self.health.outlier(reason) if reason else (False, [])
        refusal = self.health.watch.refusal(report)
        return (refused, told) if refused or refusal is None else (True, told + self.health.refused(refusal))

    def _set_rate(self, iteration: int) -> dict[str, float]:
        """Give the optimiser this iteration's learning rate; what is returned is for the log, if it ever changes."""
        if not varies(self.options):
            return {}
        rate = learning_rate(self.options, iteration, self.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return {"learning_rate": rate}

    def _apply(self, norm: float) -> None:
        """One step of the optimiser; until one has moved a weight, look whether this one does."""
        before = None if self.health.record.learned or norm == 0 else self.policy.fingerprint()
        self.optimizer.step()
        self.policy.update_average()
        moved = before is not None and self.policy.fingerprint() != before
        self.health.applied(moved=self.engine.any(moved) if before is not None else False)

    def _updates(self, rows: Any, rollout: Rollout, kept: Tensor, iteration: int) -> list[Update]:
        """The kept samples' rows, dealt to the optimiser steps; all processes make as many passes in each of them."""
        samples = len(rollout.prompts) * self.engine.teams
        dealt = self._deal(rows, samples, kept, iteration, rollout.first_sample)
        own = [self._batches(share) for share in dealt]
        everyones = self.engine.everyones([list(batches) for batches in own])
        totals = self.engine.sums([float(len(share.sample)) for share in dealt])
        spare, none = rows.take(torch.zeros(1, dtype=torch.long)), torch.empty(0, dtype=torch.long)
        updates = []
        for share, batches, total, keys in zip(dealt, own, totals, zip(*everyones, strict=True), strict=True):
            passes = [batches.get(key, none) for key in sorted(set().union(*keys))]
            updates.append(Update(share, passes, int(total), spare))
        return updates

    def _deal(self, rows: Any, samples: int, kept: Tensor, iteration: int, first: int = 0) -> list[Any]:
        """The rows by optimiser step: which step a sample goes to is drawn, and the same for any number of processes.

        Args:
            samples: of all processes; the rows' own begin with number ``first``.
        """
        steps = self.options.per_iteration
        if steps == 1 and len(kept) == samples:
            return [rows]
        order = torch.tensor(
            randomness.permutation(len(kept), seed=self.seed, purpose="update order", indices=(iteration,))
        )
        share_of = torch.full((samples,), -1)  # -1: not kept
        share_of[kept[order]] = torch.tensor(shares(len(kept), steps))
        return [rows.take((share_of[first + rows.sample] == share).nonzero().squeeze(1)) for share in range(steps)]

    def _accumulate(self, conditioning: Batched, update: Update, credit: Credit) -> tuple[dict[str, float], str]:
        """Accumulate the gradient of one optimiser step and clip it; its numbers, and where it is not finite.

        Raises:
            ValueError: the credit's maps are negative or not finite.
        """
        sums: dict[str, Tensor] = {}
        largest = torch.zeros((), device=credit.local.device)
        for number, index in enumerate(update.batches):
            part = len(index) / update.total
            last = number == len(update.batches) - 1
            with self.engine.syncing(self.generator.network, last=last):
                cost = self._cost(conditioning, update.rows.take(index) if len(index) else update.spare, credit)
                # Processes' gradients are averaged. Those of a team have a part of the tokens' each: they are summed.
                self.engine.backward(cost.loss * (part * self.engine.ranks), last=last)
            if len(index):
                largest = torch.maximum(largest, cost.deviation)
            for key, value in cost.numbers.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value * part
        peaks = self.policy.gradient_peaks()  # clipping by a norm that is NaN makes every gradient NaN
        norm = self.engine.clip(self.policy.parameters.values(), self.options.max_grad_norm)
        values = torch.stack([*sums.values(), largest, norm, credit.sound.to(norm)])  # one wait for the accelerator
        report = self._joined(list(sums), values.tolist())
        if math.isfinite(report["grad_norm"]):
            return report, ""
        zero = self.engine.zero
        return report, where_not_finite(zero.peaks(self.policy.parameters) if zero else self._everyones_peaks(peaks))

    def _joined(self, names: list[str], values: list[float]) -> dict[str, float]:
        """Sums over all processes, the largest log-ratio of any, and the norm, which is one for all.

        Raises:
            ValueError: the maps of one were not sound.
        """
        table = torch.tensor(self.engine.teams_say(values), dtype=torch.float64)  # (teams, numbers)
        *sums, largest, norm, sound = table.unbind(1)
        check_maps(bool(sound.all()))
        report = {name: float(column.sum()) for name, column in zip(names, sums, strict=True)}
        return {**report, "largest_log_ratio": float(largest.max()), "grad_norm": float(norm[0])}

    def _everyones_peaks(self, peaks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The largest of all processes: a shard's gradient is finite where another's is not."""
        table = torch.tensor(self.engine.everyones([float(peak) for peak in peaks.values()]))
        return dict(zip(peaks, table.amax(0), strict=True))

    def _batches(self, share: Any) -> dict[int, Tensor]:
        """Row indices of each pass of this process; by solver step, or numbered."""
        if self.replay_batch_size:
            return dict(enumerate(torch.arange(len(share.sample)).split(self.replay_batch_size)))
        return {step: (share.step == step).nonzero().squeeze(1) for step in share.step.unique().tolist()}

    def _cost(self, conditioning: Batched, rows: Any, credit: Credit) -> Cost:
        here, reference = conditioning.take(rows.sample), None
        if self.objective.kl_weight:
            with torch.no_grad(), self.policy.reference():
                reference = self.loss.ask(self.generator, here, rows)
        answer = self.loss.ask(self.generator, here, rows)
        cost = self.loss.cost(answer, rows, credit.weight(rows.sample, rows.step))
        if reference is None:
            return cost
        kl = self.loss.divergence(answer, reference).mean()
        numbers = {**cost.numbers, "kl_reference": kl.detach()}
        return Cost(cost.loss + self.objective.kl_weight * kl, numbers, cost.deviation)

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimiser remembers, cut as the weights are, under flat names."""
        return optimizers.state(self.optimizer, self.policy.parameters)

    def restore_optimizer(self, slots: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`optimizer_state` gave, made whole."""
        optimizers.restore(self.optimizer, self.policy.parameters, slots)
