"""Samples a group and replays its steps; one function, :func:`policy_step`, does both, so the first ratio is exactly 1.

An iteration takes S solver steps. Some are stochastic (they carry the policy's likelihood), the others follow the ODE.
Of the stochastic ones, each sample is trained on all or on a random share. The last step is always deterministic and
never trained on: what is decoded, scored and mapped is the clean prediction x^ made there.

Samples of a group that share their initial noise stay identical until the first stochastic step, so up to there one
sample per group is computed (Flow-GRPO and DanceGRPO compute all of them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vipo import randomness, sde
from vipo.types import Batched, Generator, Prompt, Rollout, Transitions, UserError

Schedule = Literal["random", "sliding", "fixed"]
StepContext = Callable[[int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Window:
    """A run of consecutive stochastic steps (MixGRPO, arXiv 2507.21802); outside it the ODE is followed.

    ``starts`` is how many first steps the window may begin at: ``random`` draws one per iteration, ``sliding`` moves by
    one every ``every`` iterations and starts over, ``fixed`` stays at ``first``.
    """

    size: int
    starts: int = 1
    first: int = 0
    schedule: Schedule = "random"
    every: int = 1

    def start(self, seed: int, iteration: int) -> int:
        if self.schedule == "fixed":
            return self.first
        if self.schedule == "sliding":
            return self.first + iteration // self.every % self.starts
        return randomness.integer(
            self.first, self.first + self.starts, seed=seed, purpose="window", indices=(iteration,)
        )


@dataclass(frozen=True)
class Solver:
    """How latents get from noise to picture.

    Args:
        steps, shift: the sigma grid (:func:`vipo.sde.shifted_sigmas`).
        kind, eta: the stochastic step (:func:`vipo.sde.transition`).
        window: which steps are stochastic; None means all but the last.
        train_fraction: share of the stochastic steps each sample is trained on, drawn per sample, rounded down.
        same_noise: samples of a group start from one noise.
    """

    steps: int
    shift: float
    kind: sde.Kind = "dance"
    eta: float = 0.3
    window: Window | None = None
    train_fraction: float = 1.0
    same_noise: bool = True

    def __post_init__(self) -> None:
        last = self.steps - 1 if self.window is None else self.window.first + self.window.starts - 1 + self.window.size
        if last > self.steps - 1:
            raise UserError(
                f"the window reaches step {last} of steps={self.steps}, but the last step is never stochastic:"
                " lower window.size, window.starts or window.first, or take more steps"
            )
        if self.kind != "ode" and not bool((sde.shifted_sigmas(self.steps, self.shift).diff() < 0).all()):
            raise UserError(
                f"a shift of {self.shift:g} crowds the noise levels of steps={self.steps} until two are the same number"
                " in float32, and no noise fits between them; give a solver.shift nearer to 1 (models have 1 to 12)"
            )

    def deterministic(self, steps: int | None = None) -> Solver:
        """The same grid without noise between the steps, each sample from its own start: for evaluation."""
        return replace(self, kind="ode", eta=0.0, window=None, steps=steps or self.steps, same_noise=False)

    def stochastic_steps(self, seed: int, iteration: int) -> range:
        if self.kind == "ode":
            return range(0)
        if self.window is None:
            return range(self.steps - 1)
        start = self.window.start(seed, iteration)
        return range(start, start + self.window.size)

    def trained(self, seed: int, iteration: int, samples: Sequence[int]) -> Bool[Tensor, "S N"]:
        """Which step of which sample is recorded; ``samples`` are indices over all ranks."""
        stochastic = list(self.stochastic_steps(seed, iteration))
        keep = int(self.train_fraction * len(stochastic))
        chosen = torch.zeros(self.steps, len(samples), dtype=torch.bool)
        for column, sample in enumerate(samples):
            order = randomness.permutation(
                len(stochastic), seed=seed, purpose="trained steps", indices=(iteration, sample)
            )
            chosen[[stochastic[place] for place in order[:keep]], column] = True
        return chosen


def policy_step(
    generator: Generator,
    latents: Float[Tensor, "m C T H W"],
    sigma: Float[Tensor, " m"],
    sigma_next: Float[Tensor, " m"],
    conditioning: Batched,
    solver: Solver,
) -> sde.Transition:
    """The Gaussian of one solver step under the network's present weights, for sampling and for replay alike."""
    velocity = generator.velocity(latents, sigma, conditioning)
    return sde.transition(velocity, latents, sigma, sigma_next, kind=solver.kind, eta=solver.eta)


def replay(
    generator: Generator, conditioning: Batched, recorded: Transitions, solver: Solver, *, reduce: sde.Reduce
) -> tuple[Float[Tensor, "m T H W"], sde.Transition]:
    """Log-probability of recorded steps under the present weights, with gradient, and the step's Gaussian."""
    rows = conditioning.take(recorded.sample)
    step = policy_step(generator, recorded.latents, recorded.sigma, recorded.sigma_next, rows, solver)
    return sde.log_prob(recorded.next_latents, step, reduce=reduce), step


def _network_device(generator: Generator) -> torch.device:
    return next(generator.network.parameters()).device


def _check_finite(latents: Tensor, step: int, solver: Solver) -> None:
    if not bool(latents.isfinite().all()):
        raise UserError(
            f"the latents became NaN or infinite at solver step {step + 1} of {solver.steps}: the policy has diverged;"
            " go on from an earlier checkpoint (--resume --from step-NNNNNN) with a lower optimizer.learning_rate, or a"
            " lower solver.eta (--allow-changes solver.eta)"
        )


def _batched_step(
    generator: Generator,
    latents: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    rows: Batched,
    solver: Solver,
    batch_size: int | None,
) -> sde.Transition:
    """:func:`policy_step` over any number of samples, ``batch_size`` at a time."""
    parts = [
        policy_step(generator, latents[at], sigma.expand(len(at)), sigma_next.expand(len(at)), rows.take(at), solver)
        for at in torch.arange(len(latents)).split(batch_size or len(latents))
    ]
    return sde.Transition(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))


def _record(step: int, chosen: Tensor, sigmas: Tensor, latents: Tensor, nexts: Tensor, log_prob: Tensor) -> Transitions:
    """The chosen samples' transition at one step."""
    at = chosen.nonzero().squeeze(1)
    here = at.to(latents.device)
    return Transitions(
        sample=at,
        step=torch.full_like(at, step),
        sigma=sigmas[step].expand(len(at)),
        sigma_next=sigmas[step + 1].expand(len(at)),
        latents=latents[here],
        next_latents=nexts[here],
        log_prob=log_prob[here],
    )


def _no_transitions(latents: Tensor) -> Transitions:
    empty = latents[:0]
    nothing, index = empty.new_empty(0), torch.empty(0, dtype=torch.long)
    return Transitions(index, index, nothing, nothing, empty, empty, empty[:, 0])


@torch.no_grad()
def sample_groups(
    generator: Generator,
    prompts: Sequence[Prompt],
    solver: Solver,
    *,
    group_size: int,
    seed: int,
    iteration: int = 0,
    first_group: int = 0,
    batch_size: int | None = None,
    reduce: sde.Reduce = "mean",
    around: StepContext = lambda _step: nullcontext(),
) -> Rollout:
    """Sample ``group_size`` pictures for each prompt and record the steps that will be trained.

    Args:
        prompts: one per group.
        first_group: index of the first of them among all ranks' groups; every noise depends on it.
        batch_size: samples per network call; None means all at once.
        reduce: over channels, for the recorded log-probabilities.
        around: what to enter around the network's part of each step, for instance to change its weights there.

    Raises:
        UserError: latents stopped being finite.
    """
    device = _network_device(generator)
    sigmas = sde.shifted_sigmas(solver.steps, solver.shift).to(device)
    groups = range(first_group, first_group + len(prompts))
    samples = [group * group_size + k for group in groups for k in range(group_size)]
    group_of = torch.arange(len(prompts)).repeat_interleave(group_size)
    shape = generator.latent_shape()
    stochastic, ode = solver.stochastic_steps(seed, iteration), solver.deterministic()
    trained = solver.trained(seed, iteration, samples)
    per_group = generator.encode([prompt.text for prompt in prompts])
    per_sample = per_group.take(group_of)
    rows, starts = (per_group, groups) if solver.same_noise else (per_sample, samples)
    keys = [(iteration, start) for start in starts]
    latents = randomness.normal(shape, keys, seed=seed, purpose="initial noise").to(device)
    recorded, passes = [], 0
    for i in range(solver.steps):
        noisy = i in stochastic
        if len(latents) < len(samples) and (noisy or i == solver.steps - 1):
            latents, rows = latents[group_of.to(device)], per_sample
        kind = solver if noisy else ode
        with around(i):
            step = _batched_step(generator, latents, sigmas[i], sigmas[i + 1], rows, kind, batch_size)
        passes += len(latents)
        nexts = step.mean
        if noisy:
            draws = [(iteration, i, s) for s in samples]
            nexts = sde.sample(step, randomness.normal(shape, draws, seed=seed, purpose="step noise").to(device))
            recorded.append(_record(i, trained[i], sigmas, latents, nexts, sde.log_prob(nexts, step, reduce=reduce)))
        latents = nexts
        _check_finite(latents, i, solver)
    return Rollout(
        prompts=tuple(prompt for prompt in prompts for _ in range(group_size)),
        group_size=group_size,
        conditioning=per_sample,
        latents=latents,
        media=generator.decode(latents),
        transitions=Transitions.cat(recorded) if recorded else _no_transitions(latents),
        model_passes=passes,
    )
