"""Each loss against its own equation, on tensors alone: no network is needed to say what an answer costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vipo import randomness, sde
from vipo.objective import clipped_surrogate
from vipo.options import Objective, Solver
from vipo.training.losses import LOSSES, Clipped, Guard, Matching, Noised
from vipo.types import Batched, Prompt, Rollout, Transitions

SHAPE = (3, 2, 4, 5)  # C T H W
ROWS = 6
SOLVER = Solver(steps=4, shift=2.0, kind="flow", eta=0.7)


def normal(*shape: int, purpose: str) -> Tensor:
    return randomness.normal(shape, [(0,)], seed=0, purpose=purpose)[0]


def recorded() -> Transitions:
    """Steps as the weights that sampled them recorded them, two rows at each of three noise levels."""
    sigmas = sde.shifted_sigmas(SOLVER.steps, 2.0)
    step = torch.tensor([0, 0, 1, 1, 2, 2])
    z, u = normal(ROWS, *SHAPE, purpose="z"), normal(ROWS, *SHAPE, purpose="u")
    old = sde.transition(u, z, sigmas[step], sigmas[step + 1], kind="flow", eta=0.7)
    nexts = sde.sample(old, normal(ROWS, *SHAPE, purpose="noise"))
    log_prob = sde.log_prob(nexts, old)
    return Transitions(torch.arange(ROWS), step, sigmas[step], sigmas[step + 1], z, nexts, log_prob, old.mean)


def answered(rows: Transitions, shift: float) -> tuple[Tensor, sde.Transition]:
    """A velocity that differs from the old one by ``shift`` of another draw, and the step it makes."""
    moved = normal(ROWS, *SHAPE, purpose="u") + shift * normal(ROWS, *SHAPE, purpose="change")
    velocity = moved.requires_grad_(True)
    return velocity, sde.transition(velocity, rows.latents, rows.sigma, rows.sigma_next, kind="flow", eta=0.7)


LOCAL = normal(ROWS, *SHAPE[1:], purpose="weight")
WEIGHTS = {"scalar": LOCAL.mean((1, 2, 3)), "local": LOCAL}


@pytest.mark.parametrize("name", ["clipped", "guard"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("ratio", ["local", "detached"])
def test_on_the_weights_that_sampled_every_ratio_is_exactly_one(name: str, weight: str, ratio: str) -> None:
    loss = LOSSES[name](Objective(clip_range=1e-3, ratio=ratio), SOLVER)  # type: ignore[index, arg-type]
    rows = recorded()
    cost = loss.cost(answered(rows, 0.0)[1], rows, WEIGHTS[weight])
    assert cost.deviation == 0 and cost.numbers["clipped_fraction"] == 0 and cost.numbers["approx_kl"] == 0


def gradient(loss: Clipped, rows: Transitions, weight: Tensor, shift: float = 0.0) -> Tensor:
    velocity, step = answered(rows, shift)
    (found,) = torch.autograd.grad(loss.cost(step, rows, weight).loss, velocity)
    return found


def test_a_local_and_a_detached_ratio_have_one_gradient_at_ratio_one() -> None:
    rows = recorded()
    ours, theirs = (gradient(Clipped(Objective(clip_range=1e-3, ratio=r), SOLVER), rows, LOCAL) for r in RATIOS)
    assert torch.allclose(ours, theirs, atol=1e-7) and ours.abs().max() > 0


RATIOS = ("local", "detached")


def test_away_from_it_a_detached_ratio_has_the_samples_value_and_clips_whole_samples() -> None:
    rows = recorded()
    _, step = answered(rows, 0.05)
    new, old = sde.log_prob(rows.next_latents, step).detach(), rows.log_prob
    of_sample = (new - old).mean((1, 2, 3)).exp()
    clip = float((of_sample - 1).abs().sort().values[2:4].mean())  # half of the samples lie outside
    found = clipped_surrogate(new, old, LOCAL, clip_range=clip, ratio="detached")
    assert float(found.clipped_fraction) == pytest.approx(float(((of_sample - 1).abs() > clip).float().mean()))
    rho = of_sample[:, None, None, None].expand_as(LOCAL)
    assert float(found.loss) == pytest.approx(
        float(-torch.minimum(rho * LOCAL, rho.clamp(1 - clip, 1 + clip) * LOCAL).mean()), abs=1e-6
    )
    local = clipped_surrogate(new, old, LOCAL, clip_range=clip)
    assert local.clipped_fraction > found.clipped_fraction  # a position moves further than the mean of all


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="choose from local, detached"):
        clipped_surrogate(torch.ones(2), torch.ones(2), torch.ones(2), clip_range=0.1, ratio="global")  # type: ignore[arg-type]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_guards_ratio_is_centred_and_of_one_scale(reduce: str) -> None:
    """s (log rho + |d|^2 / 2 s^2) = <d, xi> per channel with d the change of the mean and xi the step's noise."""
    rows = recorded()
    objective = Objective(clip_range=10.0, reduce=reduce)  # type: ignore[arg-type]
    rows = Transitions(**{**vars(rows), "log_prob": sde.log_prob(rows.next_latents, old_step(rows), reduce=reduce)})  # type: ignore[arg-type]
    _, step = answered(rows, 0.3)
    with torch.no_grad():
        change, noise = step.mean - rows.mean, (rows.next_latents - rows.mean) / step.std
        expected = (change * noise).mean(1) if reduce == "mean" else (change * noise).sum(1)
        weight, length = LOCAL, (rows.sigma - rows.sigma_next)[:, None, None, None]
        cost = Guard(objective, SOLVER).cost(step, rows, weight)
    assert float(cost.deviation) == pytest.approx(float(expected.abs().max()), rel=1e-3)
    assert float(cost.loss) == pytest.approx(float(-(expected.exp() * weight / length).mean()), rel=1e-3)


def old_step(rows: Transitions) -> sde.Transition:
    u = normal(ROWS, *SHAPE, purpose="u")
    return sde.transition(u, rows.latents, rows.sigma, rows.sigma_next, kind="flow", eta=0.7)


def test_guards_gradient_has_one_size_at_every_noise_level() -> None:
    rows, weight = recorded(), torch.ones(ROWS)
    spread = {}
    for loss in (Clipped(Objective(clip_range=10.0), SOLVER), Guard(Objective(clip_range=10.0), SOLVER)):
        size = gradient(loss, rows, weight).flatten(1).norm(dim=1).reshape(3, 2).mean(1)
        spread[type(loss).__name__] = float(size.max() / size.min())
    moved, _ = sde.step_scale(rows.sigma, rows.sigma_next, kind="flow", eta=0.7)
    expected = moved.abs() / (rows.sigma - rows.sigma_next)  # what the division by the step's length leaves
    assert spread["Guard"] == pytest.approx(float(expected.max() / expected.min()), rel=0.2)
    assert spread["Guard"] < 0.6 * spread["Clipped"]


class Text(Batched):
    """No conditioning."""


def rollout(solver: Solver = SOLVER, samples: int = 4, first: int = 8) -> Rollout:
    nothing = recorded().take(torch.arange(0))
    media = torch.zeros(samples, 3, 1, 8, 8)
    clean = normal(samples, *SHAPE, purpose="clean")
    sigmas = sde.shifted_sigmas(solver.steps, 2.0)
    prompts = tuple(Prompt("a cat") for _ in range(samples))
    return Rollout(prompts, 2, Text(), clean, media, nothing, 0, sigmas, first)


def test_matching_noises_what_was_sampled_and_knows_the_velocity() -> None:
    made, loss = rollout(), Matching(Objective(clip_range=1.0, matching_draws=3), SOLVER)
    rows = loss.rows(made, seed=5, iteration=2)
    assert len(rows.sample) == 12 and rows.sample.bincount().tolist() == [3] * 4
    assert set(rows.sigma.tolist()) <= set(made.sigmas[:-1].tolist()) and len(set(rows.sigma.tolist())) > 1
    clean = rows.latents - rows.sigma[:, None, None, None, None] * rows.velocity  # x^ = z - sigma u
    assert torch.allclose(clean, made.latents[rows.sample], atol=1e-5)
    assert not torch.equal(rows.velocity[0], rows.velocity[4])  # another draw, another noise
    alone = loss.rows(rollout(samples=2, first=10), seed=5, iteration=2)  # the third of them, on another process
    assert alone.sigma[0] == rows.sigma[2] and torch.allclose(noise_of(alone)[0], noise_of(rows)[2], atol=1e-5)


def noise_of(rows: Noised) -> Tensor:
    """e^ = z + (1 - sigma) u."""
    return rows.latents + (1 - rows.sigma[:, None, None, None, None]) * rows.velocity


@pytest.mark.parametrize("weight", WEIGHTS)
def test_matching_pulls_towards_good_samples_and_away_from_bad_ones(weight: str) -> None:
    noised = Noised(
        torch.arange(ROWS),
        torch.zeros(ROWS, dtype=torch.long),
        torch.full((ROWS,), 0.5),
        normal(ROWS, *SHAPE, purpose="z"),
        normal(ROWS, *SHAPE, purpose="target"),
    )
    answer = normal(ROWS, *SHAPE, purpose="answer").requires_grad_(True)
    cost = Matching(Objective(clip_range=1.0), SOLVER).cost(answer, noised, WEIGHTS[weight])
    (found,) = torch.autograd.grad(cost.loss, answer)
    wide = LOCAL[:, None] if weight == "local" else WEIGHTS["scalar"][:, None, None, None, None]
    expected = 2 * wide * (answer - noised.velocity).detach() / answer.numel()
    assert torch.allclose(found, expected, atol=1e-8) and cost.deviation == 0
