"""What an update minimises. A loss says which rows of a rollout it wants, what it asks the network about them, and what
the answer costs; the learner deals, batches and accumulates the rows without knowing what they are.

Letters as in ``vipo.types``: R rows of a batch. A weight is (R,) for one ratio per sample and (R, T, H, W) for local
credit; a loss takes both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vipo import randomness, sde
from vipo.errors import UserError
from vipo.objective import clipped_surrogate
from vipo.options import LossKind, Objective, Solver
from vipo.rollout import policy_step
from vipo.types import Batched, Generator, Rollout, Transitions, sent
from vipo.user_answer import checked
from vipo.user_file import LOSS, answering, is_user_file, make, named_in_file

UNLIKELY = 6.0  # standard deviations


class Cost(NamedTuple):
    """``loss`` has the gradient, ``numbers`` are logged as means over the rows, ``deviation`` as the largest value."""

    loss: Float[Tensor, ""]
    numbers: Mapping[str, Float[Tensor, ""]]
    deviation: Float[Tensor, ""]  # largest |log ratio|; 0 on the weights that sampled, and for a loss without a ratio


class StepRows(NamedTuple):
    """Rows by solver step: how many ``steps`` they are of, and how many there are of one step, ``at_most``."""

    steps: int
    at_most: int


class Rows(Protocol):
    """Recorded rows of any loss: a ``Batched`` record that knows sample and solver step of each."""

    sample: Int[Tensor, " R"]
    step: Int[Tensor, " R"]

    def take(self, index: Int[Tensor, " k"]) -> Any: ...


PARTS = ("keep_steps", "keep_mean", "rows_per_sample", "by_step", "rows", "ask", "cost", "divergence")  # of a loss


@runtime_checkable
class Loss(Protocol):
    """One update's objective."""

    @property
    def keep_steps(self) -> bool:
        """Whether the rollout records its steps; a loss that trains on the samples alone needs none of them."""

    @property
    def keep_mean(self) -> bool:
        """Whether the rollout records the means of its steps too."""

    @property
    def rows_per_sample(self) -> int:
        """How many :meth:`rows` there are of each sample."""

    def by_step(self, samples: int) -> StepRows:
        """What the rows of so many samples come to when they are taken by solver step, as an update takes them."""

    def rows(self, rollout: Rollout, *, seed: int, iteration: int) -> Any:
        """What is trained on; a :class:`Rows` record."""

    def ask(self, generator: Generator, conditioning: Batched, rows: Any) -> Any:
        """One pass of the network under its present weights, with gradient; ``conditioning`` has a row for each."""

    def cost(self, answer: Any, rows: Any, weight: Float[Tensor, "R *position"]) -> Cost:
        """What the rows cost, averaged over them."""

    def divergence(self, answer: Any, reference: Any) -> Float[Tensor, "R T H W"]:
        """How far the answer is from that of the untrained network."""


def _per_row(values: Float[Tensor, "R T H W"], weight: Tensor) -> Tensor:
    """As the weight is: local, or the mean over a row's positions."""
    return values.mean((1, 2, 3)) if weight.ndim == 1 else values


@dataclass(frozen=True)
class Clipped:
    """GRPO's clipped surrogate, scalar or local: :func:`vipo.objective.clipped_surrogate`."""

    objective: Objective
    solver: Solver
    keep_steps: bool = True
    keep_mean: bool = False

    @property
    def rows_per_sample(self) -> int:
        return self.solver.trained_count

    def by_step(self, samples: int) -> StepRows:
        """Each sample has one row of a step, so at most all of them choose the same."""
        return StepRows(min(self.solver.stochastic_count, samples * self.rows_per_sample), samples)

    def rows(self, rollout: Rollout, *, seed: int, iteration: int) -> Transitions:  # noqa: ARG002 - nothing is drawn
        return rollout.transitions

    def ask(self, generator: Generator, conditioning: Batched, rows: Transitions) -> sde.Transition:
        return policy_step(generator, rows.latents, rows.sigma, rows.sigma_next, conditioning, self.solver)

    def cost(self, answer: sde.Transition, rows: Transitions, weight: Float[Tensor, "R *position"]) -> Cost:
        new = _per_row(sde.recorded_log_prob(rows.next_latents, answer, reduce=self.objective.reduce), weight)
        old = _per_row(rows.log_prob, weight)
        return self.surrogate(new, old, weight)

    def surrogate(self, new: Tensor, old: Tensor, weight: Tensor) -> Cost:
        found = clipped_surrogate(new, old, weight, clip_range=self.objective.clip_range, ratio=self.objective.ratio)
        numbers = {
            "loss": found.loss.detach(),
            "clipped_fraction": found.clipped_fraction,
            "approx_kl": found.approx_kl,
        }
        return Cost(found.loss, numbers, (new.detach() - old).abs().max())

    def divergence(self, answer: sde.Transition, reference: sde.Transition) -> Float[Tensor, "R T H W"]:
        return sde.kl_divergence(answer, reference, reduce=self.objective.reduce)


@dataclass(frozen=True)
class Guard(Clipped):
    """GRPO-Guard (arXiv 2510.22319): the log-ratio without its bias and with one scale for every step.

        log rho' = s (log rho + |mean - mean_old|^2 / (2 s^2)),   loss / (sigma - sigma')

    E[log rho] is minus that square, so a ratio is below 1 on average and the clip range binds from one side only; s,
    the step's standard deviation, takes the noise level out of its width, and the division that of the gradient.
    """

    keep_mean: bool = True

    def cost(self, answer: sde.Transition, rows: Transitions, weight: Float[Tensor, "R *position"]) -> Cost:
        reduce, std = self.objective.reduce, answer.std.flatten(1)
        drift = sde.kl_divergence(answer, sde.Transition(rows.mean, answer.std), reduce=reduce)
        gained = sde.recorded_log_prob(rows.next_latents, answer, reduce=reduce) - rows.log_prob
        log_ratio = _per_row(std[:, :, None, None] * (gained + drift), weight)
        length = (rows.sigma - rows.sigma_next).reshape(-1, *[1] * (weight.ndim - 1))
        return self.surrogate(log_ratio, torch.zeros_like(log_ratio), weight / length)


@dataclass(frozen=True)
class Noised(Batched):
    """Clean samples that were noised again: z = (1 - sigma) x + sigma e, with the velocity e - x that made it."""

    sample: Int[Tensor, " R"]
    step: Int[Tensor, " R"]  # the solver step whose noise level was drawn
    sigma: Float[Tensor, " R"]
    latents: Float[Tensor, "R C T H W"]
    velocity: Float[Tensor, "R C T H W"]


@dataclass(frozen=True)
class Matching:
    """Advantage weighted matching (AWM, arXiv 2509.25050): the flow-matching loss of the samples, times their weight.

        loss = mean over samples, draws of sigma and positions of   A(p) mean over channels of |v(z, sigma) - (e - x)|^2

    No ratio and no likelihood: any solver samples. A negative weight pushes away without a bound; ``kl_weight``, here
    of |v - v_untrained|^2, is what holds it.
    """

    objective: Objective
    solver: Solver
    keep_steps: bool = False
    keep_mean: bool = False

    @property
    def rows_per_sample(self) -> int:
        return self.objective.matching_draws

    def by_step(self, samples: int) -> StepRows:
        """Steps are drawn for each row alone: the mean and six standard deviations, which no run is likely to see."""
        rows, steps = samples * self.rows_per_sample, self.solver.steps
        mean = rows / steps
        spread = math.sqrt(mean * (1 - 1 / steps))
        return StepRows(min(steps, rows), min(rows, math.ceil(mean + UNLIKELY * spread)))

    def rows(self, rollout: Rollout, *, seed: int, iteration: int) -> Noised:
        """``matching_draws`` noise levels of the solver's grid and a noise for each, by sample."""
        clean, draws, steps = rollout.latents, self.objective.matching_draws, self.solver.steps
        keys = [(iteration, rollout.first_sample + i, k) for k in range(draws) for i in range(len(clean))]
        levels = [randomness.integer(0, steps, seed=seed, purpose="matched step", indices=key) for key in keys]
        drawn = randomness.normal(tuple(clean.shape[1:]), keys, seed=seed, purpose="matched noise")
        sample, step = torch.arange(len(clean)).repeat(draws), torch.tensor(levels)
        noise, sigma = sent(drawn, clean.device), rollout.sigmas[sent(step, clean.device)]
        x, s = clean[sent(sample, clean.device)], sigma.reshape(-1, 1, 1, 1, 1)
        return Noised(sample, step, sigma, (1 - s) * x + s * noise, noise - x)

    def ask(self, generator: Generator, conditioning: Batched, rows: Noised) -> Float[Tensor, "R C T H W"]:
        return generator.velocity(rows.latents, rows.sigma, conditioning)

    def cost(self, answer: Float[Tensor, "R C T H W"], rows: Noised, weight: Float[Tensor, "R *position"]) -> Cost:
        error = _per_row((answer - rows.velocity).square().mean(1), weight)
        loss = (weight.detach() * error).mean()
        numbers = {"loss": loss.detach(), "matching_error": error.detach().mean()}
        return Cost(loss, numbers, torch.zeros((), device=error.device))

    def divergence(self, answer: Tensor, reference: Tensor) -> Float[Tensor, "R T H W"]:
        return (answer - reference).square().mean(1)


LOSSES: Mapping[LossKind, Callable[[Objective, Solver], Loss]] = {
    "clipped": Clipped,
    "guard": Guard,
    "matching": Matching,
}
"""Name in ``objective.loss`` -> loss."""


@dataclass(frozen=True)
class OwnLoss:
    """A loss of the user's own, ``file.py:thing``, whose answers are checked."""

    name: str
    loss: Loss

    @property
    def keep_steps(self) -> bool:
        return bool(self.loss.keep_steps)

    @property
    def keep_mean(self) -> bool:
        return bool(self.loss.keep_mean)

    @property
    def rows_per_sample(self) -> int:
        return self.loss.rows_per_sample

    def by_step(self, samples: int) -> StepRows:
        return self.loss.by_step(samples)

    def rows(self, rollout: Rollout, *, seed: int, iteration: int) -> Any:
        """Raises:
        UserError: it raised, or gave no record of rows.
        """
        with answering(LOSS, self.name):
            rows = self.loss.rows(rollout, seed=seed, iteration=iteration)
        if not isinstance(rows, Batched) or not hasattr(rows, "sample") or not hasattr(rows, "step"):
            raise UserError(
                f"loss {self.name!r} returned a {type(rows).__name__} from rows; return a vipo.types.Batched record of"
                " tensors with sample and step (R,), such as rollout.transitions"
            )
        return rows

    def ask(self, generator: Generator, conditioning: Batched, rows: Any) -> Any:
        """Whatever it gives is its own affair; an error is that of the network as often as its own."""
        return self.loss.ask(generator, conditioning, rows)

    def cost(self, answer: Any, rows: Any, weight: Float[Tensor, "R *position"]) -> Cost:
        """Raises:
        UserError: it raised, or gave no finite cost with a gradient.
        """
        with answering(LOSS, self.name):
            cost = self.loss.cost(answer, rows, weight)
        if not isinstance(cost, Cost):
            raise UserError(
                f"loss {self.name!r} returned a {type(cost).__name__} from cost; return"
                " vipo.training.losses.Cost(loss, numbers, deviation)"
            )
        for number in (cost.loss, cost.deviation, *cost.numbers.values()):
            checked(LOSS, self.name, number, [()], "without dimensions, from cost")
        if not cost.loss.requires_grad:
            raise UserError(f"loss {self.name!r} returned a loss without a gradient; make it from answer, not detached")
        return cost

    def divergence(self, answer: Any, reference: Any) -> Float[Tensor, "R T H W"]:
        """Raises:
        UserError: it raised, or gave no finite divergence at each position.
        """
        with answering(LOSS, self.name):
            found = self.loss.divergence(answer, reference)
        return checked(LOSS, self.name, found, [(None, None, None, None)], "(R, T, H, W), from divergence")


def build(objective: Objective, solver: Solver) -> Loss:
    """The loss that ``objective.loss`` names; of a file, its ``thing(objective, solver, **loss_options)``.

    Raises:
        UserError: the file does not give a loss, or it records steps that the solver does not take.
    """
    name = objective.loss
    if not is_user_file(name):
        return LOSSES[cast("LossKind", name)](objective, solver)
    loss = make(name, named_in_file(LOSS, name), objective, solver, **objective.loss_options)
    if not isinstance(loss, Loss):
        lacking = [part for part in PARTS if not hasattr(loss, part)]
        raise UserError(
            f"{name} made a {type(loss).__name__}, which is no loss: it has no {', '.join(lacking)}; begin from"
            " vipo.training.losses.Clipped or Matching, or give it what vipo.training.losses.Loss lists"
        )
    if loss.keep_steps and (solver.kind == "ode" or solver.eta == 0 or solver.trained_count < 1):
        raise UserError(
            f"loss {name!r} records steps (keep_steps), but solver.kind={solver.kind} with eta={solver.eta:g} and"
            f" {solver.trained_count} steps to train on has none with a likelihood; change the solver"
        )
    return OwnLoss(name, loss)


def without_code(objective: Objective, solver: Solver) -> Loss:
    """:func:`build` for whoever only counts: no code of the user's is run, and their loss counts as ``clipped``."""
    return LOSSES[cast("LossKind", "clipped" if is_user_file(objective.loss) else objective.loss)](objective, solver)
