"""The solver steps: densities, marginals, limits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vipo import sde


def make(n: int = 3, c: int = 4, size: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    latents, velocity, noise = (torch.randn(n, c, 1, size, size, generator=rng) for _ in range(3))
    return latents, velocity, noise


def test_schedule_is_the_one_diffusers_uses() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 16, 16).tolist())
    assert torch.allclose(sde.shifted_sigmas(16, 3.0), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0), (4, math.nan)])
def test_impossible_schedules_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match=r"steps=|shift="):
        sde.shifted_sigmas(steps, shift)


@pytest.mark.parametrize("kind", ["dance", "flow", "cps"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_log_prob_is_torchs_normal(kind: sde.Kind, reduce: sde.Reduce) -> None:
    latents, velocity, noise = make()
    step = sde.transition(velocity, latents, 0.8, 0.6, kind=kind, eta=0.4)
    nexts = sde.sample(step, noise)
    theirs = torch.distributions.Normal(step.mean.double(), step.std.double()).log_prob(nexts.double())
    expected = theirs.mean(1) if reduce == "mean" else theirs.sum(1)
    ours = sde.log_prob(nexts, step, reduce=reduce)
    assert ours.shape == (3, 1, 5, 5) and ours.dtype == torch.float32
    assert torch.allclose(ours.double(), expected, atol=1e-5)


def test_published_noise_levels_of_the_first_step() -> None:
    """S = 16, shift 3: Flow-GRPO at 0.7 injects 0.70, DanceGRPO at 0.3 injects 0.044."""
    latents, velocity, _ = make()
    sigmas = sde.shifted_sigmas(16, 3.0)
    flow = sde.transition(velocity, latents, sigmas[0], sigmas[1], kind="flow", eta=0.7).std
    dance = sde.transition(velocity, latents, sigmas[0], sigmas[1], kind="dance", eta=0.3).std
    assert flow[0].item() == pytest.approx(0.70, abs=0.005)
    assert dance[0].item() == pytest.approx(0.044, abs=0.0005)


@pytest.mark.parametrize("kind", ["dance", "flow", "cps", "ode"])
def test_without_noise_every_kind_is_diffusers_euler_step(kind: sde.Kind) -> None:
    latents, velocity, _ = make()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 8, 8).tolist())
    scheduler.set_begin_index(3)
    theirs = scheduler.step(velocity, scheduler.timesteps[3], latents, return_dict=False)[0]
    step = sde.transition(velocity, latents, scheduler.sigmas[3], scheduler.sigmas[4], kind=kind, eta=1e-9)
    assert torch.allclose(step.mean, theirs, atol=1e-6)
    assert step.std.max() < 1e-8


def gaussian_velocity(z: torch.Tensor, t: float, mean: float, std: float) -> torch.Tensor:
    """E[e - x | z] for data x ~ N(mean, std^2): the exact velocity of the rectified flow."""
    variance = (1 - t) ** 2 * std**2 + t**2
    residual = z - (1 - t) * mean
    clean = mean + (1 - t) * std**2 / variance * residual
    noise = t / variance * residual
    return noise - clean


def run_to_data(kind: sde.Kind, eta: float, steps: int = 300) -> torch.Tensor:
    """Many samples through a full schedule with the exact velocity; the data are N(0.7, 0.5^2)."""
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(1, 1, 1, 100, 200, generator=rng)
    sigmas = sde.shifted_sigmas(steps, 1.0).tolist()
    for now, after in pairwise(sigmas):
        step = sde.transition(gaussian_velocity(z, now, 0.7, 0.5), z, now, after, kind=kind, eta=eta)
        z = sde.sample(step, torch.randn(z.shape, generator=rng))
    return z


@pytest.mark.parametrize(("kind", "eta"), [("ode", 0.0), ("dance", 0.3), ("dance", 1.0), ("flow", 0.7)])
def test_the_marginal_is_kept(kind: sde.Kind, eta: float) -> None:
    data = run_to_data(kind, eta)
    assert data.mean().item() == pytest.approx(0.7, abs=0.02)
    assert data.std().item() == pytest.approx(0.5, abs=0.02)


def test_cps_keeps_the_noise_level_but_not_the_marginal() -> None:
    latents, velocity, _ = make()
    step = sde.transition(velocity, latents, 0.8, 0.6, kind="cps", eta=0.5)
    clean = sde.clean_prediction(velocity, latents, 0.8)
    kept = (step.mean - 0.4 * clean) / (latents + 0.2 * velocity)  # what stands before the predicted noise
    assert torch.allclose(kept.square() + step.std.square(), torch.full_like(kept, 0.36), atol=1e-4)
    assert abs(run_to_data("cps", 0.7).std().item() - 0.5) > 0.02


def test_the_last_step_of_the_ode_is_the_clean_prediction() -> None:
    latents, velocity, _ = make()
    step = sde.transition(velocity, latents, 0.3, 0.0, kind="ode", eta=0.0)
    assert torch.allclose(step.mean, sde.clean_prediction(velocity, latents, 0.3), atol=1e-6)


def test_a_noise_level_per_sample_equals_one_at_a_time() -> None:
    latents, velocity, _ = make()
    sigma, after = torch.tensor([0.9, 0.7, 0.4]), torch.tensor([0.8, 0.5, 0.3])
    together = sde.transition(velocity, latents, sigma, after, kind="flow", eta=0.7)
    for i in range(3):
        alone = sde.transition(velocity[i : i + 1], latents[i : i + 1], sigma[i], after[i], kind="flow", eta=0.7)
        assert torch.equal(together.mean[i : i + 1], alone.mean) and torch.equal(together.std[i : i + 1], alone.std)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    latents, velocity, _ = make()
    step = sde.transition(velocity.bfloat16(), latents.bfloat16(), 0.5, 0.4, kind="dance", eta=0.3)
    assert step.mean.dtype == step.std.dtype == torch.float32


def test_kl_is_torchs_kl() -> None:
    latents, velocity, noise = make()
    ours, theirs = (sde.transition(v, latents, 0.8, 0.6, kind="dance", eta=0.4) for v in (velocity, noise))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(ours.mean, ours.std.expand_as(ours.mean)), normal(theirs.mean, theirs.std.expand_as(theirs.mean))
    )
    assert torch.allclose(sde.kl_divergence(ours, theirs, reduce="sum"), expected.sum(1), rtol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_refused_with_the_shapes() -> None:
    latents, velocity, _ = make()
    with pytest.raises(ValueError, match="deterministic"):
        sde.log_prob(latents, sde.transition(velocity, latents, 0.5, 0.4, kind="ode", eta=0.0))
    with pytest.raises(ValueError, match="dance, flow, cps, ode"):
        sde.transition(velocity, latents, 0.5, 0.4, kind="euler", eta=0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(N, C, T, H, W\)"):
        sde.transition(velocity[:, :2], latents, 0.5, 0.4, kind="ode", eta=0.0)
    with pytest.raises(ValueError, match=r"one value per sample"):
        sde.transition(velocity, latents, torch.tensor([0.5, 0.4]), 0.3, kind="ode", eta=0.0)
