"""From a rollout and its credit to updated weights: deal the rows to optimiser steps, accumulate, guard, step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vipo import randomness
from vipo.engine import Engine
from vipo.objective import check_maps
from vipo.options import Objective, OptimizerOptions, Solver
from vipo.policy import Policy
from vipo.sharding import spread_like, whole
from vipo.training.credit import Credit
from vipo.training.health import GradientGuard, Health, where_not_finite
from vipo.training.losses import LOSSES, Cost
from vipo.types import Batched, Generator, Rollout
from vipo.workload import shares

Report = tuple[dict[str, float], list[str]]  # metrics, and every guard that fired


class Learner:
    """Updates a policy. The network is prepared by the engine here, so the policy's copies begin here too.

    Args:
        replay_batch_size: rows per pass of the network; None means all of one solver step, the batch that sampled it.
        health: told of every update that is applied or skipped.
        seed: of the order in which samples are dealt to several optimiser steps, and of what a loss draws.
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
    ) -> None:
        self.engine, self.generator, self.policy = engine, generator, policy
        self.objective, self.options, self.health, self.seed = objective, optimizer, health, seed
        self.replay_batch_size = replay_batch_size
        self.loss = LOSSES[objective.loss](objective, solver)
        self.guard = GradientGuard(optimizer.guard_factor)
        self.optimizer: Any = torch.optim.AdamW(
            policy.parameters.values(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        )
        generator.network, self.optimizer = engine.prepare(generator.network, self.optimizer)
        policy.begin()

    def learn(self, rollout: Rollout, credit: Credit, kept: Tensor, iteration: int) -> Report:
        """All optimiser steps of one iteration, on the samples ``kept``."""
        rows = self.loss.rows(rollout, seed=self.seed, iteration=iteration)
        dealt = self._deal(rows, len(rollout.prompts), kept, iteration)
        reports, events, skipped = [], [], 0
        for number, share in enumerate(dealt):
            report, odd = self._accumulate(rollout.conditioning, share, credit)
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
        moved = before is not None and self.policy.fingerprint() != before
        self.health.applied(moved=self.engine.any(moved) if before is not None else False)

    def _deal(self, rows: Any, samples: int, kept: Tensor, iteration: int) -> list[Any]:
        """The kept samples' rows, dealt to the optimiser steps by sample, in an order of their own."""
        steps = self.options.per_iteration
        if steps == 1 and len(kept) == samples:
            return [rows]
        order = torch.tensor(
            randomness.permutation(len(kept), seed=self.seed, purpose="update order", indices=(iteration,))
        )
        share_of = torch.full((samples,), -1)  # -1: not kept
        share_of[kept[order]] = torch.tensor(shares(len(kept), steps))
        return [rows.take((share_of[rows.sample] == share).nonzero().squeeze(1)) for share in range(steps)]

    def _accumulate(self, conditioning: Batched, share: Any, credit: Credit) -> tuple[dict[str, float], str]:
        """Accumulate the gradient of one optimiser step and clip it; its numbers, and where it is not finite.

        Raises:
            ValueError: the credit's maps are negative or not finite.
        """
        total, batches = len(share.sample), self._batches(share)
        sums: dict[str, Tensor] = {}
        largest = torch.zeros((), device=credit.local.device)
        for number, index in enumerate(batches):
            with self.engine.syncing(self.generator.network, last=number == len(batches) - 1):
                cost = self._cost(conditioning, share.take(index), credit)
                self.engine.backward(cost.loss * (len(index) / total))
            largest = torch.maximum(largest, cost.deviation)
            for key, value in cost.numbers.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value * (len(index) / total)
        peaks = self.policy.gradient_peaks()  # clipping by a norm that is NaN makes every gradient NaN
        norm = self.engine.clip(self.policy.parameters.values(), self.options.max_grad_norm)
        values = torch.stack([*sums.values(), largest, norm, credit.sound.to(norm)])  # one wait for the accelerator
        *numbers, are_sound = values.tolist()
        check_maps(bool(are_sound))
        report = dict(zip([*sums, "largest_log_ratio", "grad_norm"], numbers, strict=True))
        return report, "" if math.isfinite(report["grad_norm"]) else where_not_finite(peaks)

    def _batches(self, share: Any) -> list[Tensor]:
        """Row indices of each pass."""
        if self.replay_batch_size:
            return list(torch.arange(len(share.sample)).split(self.replay_batch_size))
        return [(share.step == step).nonzero().squeeze(1) for step in share.step.unique().tolist()]

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
        """AdamW's state, whole, under flat names: ``<parameter>|<slot>``."""
        state = self.optimizer.state
        return {
            f"{name}|{slot}": whole(value.detach())
            for name, parameter in self.policy.parameters.items()
            for slot, value in state.get(parameter, {}).items()
        }

    def restore_optimizer(self, slots: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`optimizer_state` gave."""
        live = self.policy.parameters
        order, by_parameter = list(live), dict[str, dict[str, Tensor]]()
        for key, value in slots.items():
            name, slot = key.rsplit("|", 1)
            shard = spread_like(value, live[name]) if value.shape == live[name].shape else value
            by_parameter.setdefault(name, {})[slot] = shard
        packed = self.optimizer.state_dict()
        packed["state"] = {order.index(name): state for name, state in by_parameter.items()}
        self.optimizer.load_state_dict(packed)
