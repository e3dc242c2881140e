"""Samples a group. One function, :func:`policy_step`, samples a step and replays it, so the first ratio is exactly 1.

An iteration takes S solver steps. Some are stochastic (they carry the policy's likelihood), the others follow the ODE.
Of the stochastic ones, each sample is trained on all or on a random share. The last step is always deterministic and
never trained on: what is decoded, scored and mapped is the clean prediction x^ made there.

Samples of a group that share their initial noise stay identical until the first stochastic step, so up to there one
sample per group is computed (Flow-GRPO and DanceGRPO compute all of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vipo import randomness, sde
from vipo.errors import UserError
from vipo.options import Reduce, Solver
from vipo.types import Batched, Generator, Prompt, Rollout, Transitions, sent
from vipo.workload import possible_steps, shared_steps

StepContext = Callable[[int], AbstractContextManager[None]]


def stochastic_steps(solver: Solver, seed: int, iteration: int) -> range:
    """The steps of one iteration that carry noise."""
    places, window = possible_steps(solver), solver.window
    if len(places) == 1 or window is None:
        return places[0]
    if window.schedule == "sliding":
        return places[iteration // window.every % len(places)]
    return places[randomness.integer(0, len(places), seed=seed, purpose="window", indices=(iteration,))]


def trained_steps(solver: Solver, seed: int, iteration: int, samples: Sequence[int]) -> Bool[Tensor, "S N"]:
    """Which step of which sample is recorded; ``samples`` are indices over all ranks."""
    stochastic = list(stochastic_steps(solver, seed, iteration))
    chosen = torch.zeros(solver.steps, len(samples), dtype=torch.bool)
    for column, sample in enumerate(samples):
        indices = (iteration, sample)
        order = randomness.permutation(len(stochastic), seed=seed, purpose="trained steps", indices=indices)
        chosen[[stochastic[place] for place in order[: solver.trained_count]], column] = True
    return chosen


def sigmas_of(solver: Solver, generator: Generator) -> Float[Tensor, " levels"]:
    """The solver's grid of noise levels; without a shift of its own, the model's."""
    return sde.shifted_sigmas(solver.steps, generator.shift if solver.shift is None else solver.shift)


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
    generator: Generator, conditioning: Batched, recorded: Transitions, solver: Solver, *, reduce: Reduce
) -> tuple[Float[Tensor, "R T H W"], sde.Transition]:
    """Log-probability of recorded steps under the present weights, with gradient, and the step's Gaussian."""
    rows = conditioning.take(recorded.sample)
    step = policy_step(generator, recorded.latents, recorded.sigma, recorded.sigma_next, rows, solver)
    return sde.recorded_log_prob(recorded.next_latents, step, reduce=reduce), step


def _network_device(generator: Generator) -> torch.device:
    return next(generator.network.parameters()).device


def _check_finite(flags: Sequence[Tensor]) -> None:
    """Ask once, after the last step, whether the latents were finite after each: one wait for the accelerator."""
    finite = torch.stack(list(flags)).tolist()
    if not all(finite):
        raise UserError(
            f"the latents became NaN or infinite at solver step {finite.index(False) + 1} of {len(finite)}: the policy"
            " has diverged;"
            " go on from an earlier checkpoint (--resume --from step-NNNNNN) with a lower optimizer.learning_rate, or a"
            " lower solver.eta (--allow-changes solver.eta)"
        )


def _numbered(groups: range, members: range, group_size: int) -> tuple[list[int], Int[Tensor, " N"]]:
    """The samples' numbers among those of all processes, and which of the groups here each is of."""
    samples = [group * group_size + k for group in groups for k in members]
    return samples, torch.arange(len(groups)).repeat_interleave(len(members))


def _check_density(levels: Float[Tensor, " levels"], recorded: Sequence[int], solver: Solver) -> None:
    """Every step that is recorded has a density; told from the host's own grid, before anything is sampled."""
    if not recorded:
        return
    here = list(recorded)
    _, std = sde.step_scale(levels[here], levels[[i + 1 for i in here]], kind=solver.kind, eta=solver.eta)
    sde.check_density(std)


def _batched_step(
    generator: Generator,
    latents: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    rows: Batched,
    solver: Solver,
    batch_size: int | None,
    at_least: int,
) -> sde.Transition:
    """:func:`policy_step` over any number of samples, ``batch_size`` at a time; in as many calls as ``at_least``
    samples take."""

    def step(at: Tensor) -> sde.Transition:
        at = sent(at, latents.device)
        here = (latents[at], sigma.expand(len(at)), sigma_next.expand(len(at)), rows.take(at))
        return policy_step(generator, *here, solver)

    size = batch_size or len(latents)
    parts = [step(at) for at in torch.arange(len(latents)).split(size)]
    for _ in range(math.ceil(at_least / size) - len(parts) if batch_size else 0):
        step(torch.zeros(1, dtype=torch.long))
    return sde.Transition(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))


@dataclass(frozen=True)
class Recorder:
    """Keeps what will be trained on. ``keep_mean`` also keeps the mean of each step, for losses that compare means."""

    sigmas: Float[Tensor, " levels"]
    chosen: Bool[Tensor, "S N"]
    reduce: Reduce
    keep_mean: bool
    kept: list[Transitions] = field(default_factory=list)

    def record(self, step: int, latents: Tensor, nexts: Tensor, gaussian: sde.Transition) -> None:
        """The chosen samples' transition at one step."""
        at = self.chosen[step].nonzero().squeeze(1)
        here = sent(at, latents.device)
        self.kept.append(
            Transitions(
                sample=at,
                step=torch.full_like(at, step),
                sigma=self.sigmas[step].expand(len(at)),
                sigma_next=self.sigmas[step + 1].expand(len(at)),
                latents=latents[here],
                next_latents=nexts[here],
                log_prob=sde.recorded_log_prob(nexts, gaussian, reduce=self.reduce)[here],
                mean=gaussian.mean[here] if self.keep_mean else latents[here, :0],
            )
        )

    def all(self, latents: Tensor) -> Transitions:
        """Everything recorded, in the order of the steps; ``latents`` says the shape if that is nothing."""
        if self.kept:
            return Transitions.cat(self.kept)
        empty = latents[:0]
        nothing, index = empty.new_empty(0), torch.empty(0, dtype=torch.long)
        return Transitions(index, index, nothing, nothing, empty, empty, empty[:, 0], empty[:, :0])


def _noise(
    shape: tuple[int, ...], purpose: str, keys: Sequence[tuple[int, ...]], *, seed: int, device: torch.device
) -> Tensor:
    return sent(randomness.normal(shape, keys, seed=seed, purpose=purpose), device)


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
    members: range | None = None,
    batch_size: int | None = None,
    at_least: int = 0,
    reduce: Reduce = "mean",
    keep_steps: bool = True,
    keep_mean: bool = False,
    around: StepContext = lambda _step: nullcontext(),
) -> Rollout:
    """Sample ``group_size`` pictures for each prompt and record the steps that will be trained.

    Args:
        prompts: one per group.
        first_group: index of the first of them among all ranks' groups; every noise depends on it.
        members: which samples of each group; None is all of them. The rollout's groups are then of so many.
        batch_size: samples per network call; None means all at once.
        at_least: make as many network calls as so many samples need; what there is not is computed in vain.
        reduce: over channels, for the recorded log-probabilities.
        keep_steps, keep_mean: record the steps that will be trained, which some losses do without; each one's mean too.
        around: what to enter around the network's part of each step, for instance to change its weights there.

    Raises:
        UserError: latents stopped being finite.
    """
    device, levels = _network_device(generator), sigmas_of(solver, generator)
    sigmas, members = sent(levels, device), members or range(group_size)
    groups, ode = range(first_group, first_group + len(prompts)), solver.deterministic()
    samples, group_of = _numbered(groups, members, group_size)
    stochastic = stochastic_steps(solver, seed, iteration)
    _check_density(levels, stochastic if keep_steps else (), solver)
    recorder = Recorder(sigmas, trained_steps(solver, seed, iteration, samples), reduce, keep_mean)
    per_group = generator.encode([prompt.text for prompt in prompts])
    per_sample, calls = per_group.take(group_of), (batch_size, at_least)
    rows, starts = (per_group, groups) if solver.same_noise else (per_sample, samples)
    noise = partial(_noise, generator.latent_shape(), seed=seed, device=device)
    latents, passes, finite = noise("initial noise", [(iteration, start) for start in starts]), 0, []
    for i in range(solver.steps):
        noisy = i in stochastic
        if solver.same_noise and i == shared_steps(solver, stochastic):
            latents, rows = latents[sent(group_of, device)], per_sample
        with around(i):
            step = _batched_step(generator, latents, sigmas[i], sigmas[i + 1], rows, solver if noisy else ode, *calls)
        passes += len(latents)
        nexts = sde.sample(step, noise("step noise", [(iteration, i, s) for s in samples])) if noisy else step.mean
        if noisy and keep_steps:
            recorder.record(i, latents, nexts, step)
        latents = nexts
        finite.append(latents.isfinite().all())
    _check_finite(finite)
    whose = tuple(prompts[group] for group in group_of.tolist())
    media, recorded = generator.decode(latents), recorder.all(latents)
    return Rollout(whose, len(members), per_sample, latents, media, recorded, passes, sigmas, first_sample=samples[0])
