"""Stochastic sampling of a rectified flow, with a density.

z_t = (1 - t) x + t e, velocity u = e - x, sigma = t. From (z, u): x^ = z - t u, e^ = z + (1 - t) u, score = -e^ / t.
The reverse-time SDE  dz = (u - eps_t^2 score / 2) dt + eps_t dw  has the marginals of the ODE for every eps_t; one
Euler-Maruyama step from sigma to sigma' < sigma is the Gaussian

    mean = z + (u + eps_t^2 e^ / (2 sigma)) (sigma' - sigma),    std = eps_t sqrt(sigma - sigma').

========= ======================================= ==========================================
kind      eps_t                                   used by
========= ======================================= ==========================================
``dance`` eta                                     DanceGRPO (arXiv 2505.07818), ViPO
``flow``  eta sqrt(t / (1 - t))                   Flow-GRPO (arXiv 2505.05470)
``cps``   not an SDE: mixes x^, e^ and fresh      Flow-CPS (arXiv 2509.05952)
          noise so that the noise level is kept
``ode``   0                                       evaluation, steps outside a mixed window
========= ======================================= ==========================================

Everything is computed in float32, whatever the dtype of the model.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.options import Kind, Reduce

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Transition(NamedTuple):
    """The Gaussian of one solver step; ``std`` broadcasts against ``mean`` and is 0 for a deterministic step."""

    mean: Float[Tensor, "N C T H W"]
    std: Float[Tensor, "N 1 1 1 1"]


def shifted_sigmas(steps: int, shift: float) -> Float[Tensor, " levels"]:
    """Noise levels from 1 to 0, crowded towards 1 by ``shift``: sigma = shift s / (1 + (shift - 1) s), s linear.

    The static time shift of Stable Diffusion 3 (arXiv 2403.03206, eq. 23); ``shift=1`` is the linear grid.

    Examples:
        >>> from vipo import sde
        >>> sde.shifted_sigmas(4, shift=3.0)
        tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a schedule needs at least 1 step")
    if not shift > 0:
        raise ValueError(f"shift={shift}: the time shift must be positive; 1 means no shift")
    linear = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * linear / (1 + (shift - 1) * linear)).float()


def _per_sample(sigma: Tensor | float, latents: Tensor, name: str) -> Tensor:
    """A scalar or (N,) noise level as (N, 1, 1, 1, 1) float32."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
    if sigma.ndim == 0:
        sigma = sigma.expand(latents.shape[0])
    if sigma.shape != (latents.shape[0],):
        raise ValueError(
            f"{name} has shape {tuple(sigma.shape)}; give a scalar or one value per sample, ({latents.shape[0]},)"
        )
    return sigma.reshape(-1, 1, 1, 1, 1)


def _diffusion(kind: Kind, eta: float, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """eps_t of the table above. ``flow`` is infinite at t = 1: there 1 - t takes the next sigma, as Flow-GRPO does."""
    if kind == "ode":
        return torch.zeros_like(sigma)
    if kind == "dance":
        return torch.full_like(sigma, eta)
    below_one = torch.where(sigma >= 1, sigma_next, sigma)
    return eta * (sigma / (1 - below_one)).sqrt()


def transition(
    velocity: Float[Tensor, "N C T H W"],
    latents: Float[Tensor, "N C T H W"],
    sigma: Float[Tensor, "..."] | float,
    sigma_next: Float[Tensor, "..."] | float,
    *,
    kind: Kind,
    eta: float,
) -> Transition:
    """One solver step from ``sigma`` down to ``sigma_next``, as a Gaussian over the next latents.

    Args:
        velocity: the model's u = e - x at ``sigma``.
        sigma, sigma_next: noise levels in [0, 1], scalar or one per sample.
        kind: ``dance``, ``flow``, ``cps`` or ``ode``; ``eta`` is its noise strength (ignored by ``ode``).

    Raises:
        ValueError: latents that are not (N, C, T, H, W), a shape mismatch, or an unknown kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is not a solver step; choose from {', '.join(get_args(Kind))}")
    if latents.ndim != 5 or velocity.shape != latents.shape:
        raise ValueError(
            f"latents {tuple(latents.shape)} and velocity {tuple(velocity.shape)} must both be (N, C, T, H, W);"
            " an image has T = 1"
        )
    z, u = latents.float(), velocity.float()
    s, s_next = _per_sample(sigma, latents, "sigma"), _per_sample(sigma_next, latents, "sigma_next")
    if kind == "cps":
        clean, noise = z - s * u, z + (1 - s) * u
        angle = eta * math.pi / 2
        return Transition((1 - s_next) * clean + s_next * math.cos(angle) * noise, s_next * math.sin(angle))
    eps = _diffusion(kind, eta, s, s_next)
    drift = u if kind == "ode" else u + eps.square() / (2 * s) * (z + (1 - s) * u)
    return Transition(z + drift * (s_next - s), eps * (s - s_next).clamp_min(0).sqrt())


def sample(step: Transition, noise: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N C T H W"]:
    """The next latents: mean + std * noise."""
    return step.mean + step.std * noise.float()


def clean_prediction(
    velocity: Float[Tensor, "N C T H W"], latents: Float[Tensor, "N C T H W"], sigma: Float[Tensor, "..."] | float
) -> Float[Tensor, "N C T H W"]:
    """x^ = z - t u, the picture the model believes in at this noise level."""
    return latents.float() - _per_sample(sigma, latents, "sigma") * velocity.float()


def _reduce_channels(elementwise: Tensor, reduce: Reduce) -> Tensor:
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce={reduce!r}; choose 'mean' or 'sum' over the latent channels")
    return elementwise.mean(1) if reduce == "mean" else elementwise.sum(1)


def log_prob(
    next_latents: Float[Tensor, "N C T H W"], transition: Transition, *, reduce: Reduce = "mean"
) -> Float[Tensor, "N T H W"]:
    """log N(z'; mean, std) at every latent position, reduced over channels, float32.

    ``mean`` keeps the scale of the peers' log-probabilities; ``sum`` is the exact density of the position's channels.

    Raises:
        ValueError: shapes differ, or a deterministic step (std = 0), which has no density.

    Examples:
        >>> import torch
        >>> from vipo import sde
        >>> latents = velocity = torch.zeros(2, 16, 1, 8, 8)
        >>> step = sde.transition(velocity, latents, 0.9, 0.75, kind="dance", eta=0.3)
        >>> sde.log_prob(sde.sample(step, torch.randn_like(latents)), step).shape
        torch.Size([2, 1, 8, 8])
    """
    check_density(transition.std)
    return recorded_log_prob(next_latents, transition, reduce=reduce)


def check_density(std: Float[Tensor, "..."]) -> None:
    """Refuse steps without noise; on an accelerator it waits for them.

    Raises:
        ValueError: a step is deterministic.
    """
    if bool((std <= 0).any()):
        raise ValueError("this step is deterministic (std = 0) and has no density; record only stochastic steps")


def recorded_log_prob(
    next_latents: Float[Tensor, "N C T H W"], transition: Transition, *, reduce: Reduce
) -> Float[Tensor, "N T H W"]:
    """:func:`log_prob` of a step that is known to have a density: it waits for no accelerator.

    Raises:
        ValueError: shapes differ.
    """
    mean, std = transition
    if next_latents.shape != mean.shape:
        raise ValueError(f"next_latents {tuple(next_latents.shape)} and the mean {tuple(mean.shape)} must be the same")
    deviation = (next_latents.float() - mean) / std
    return _reduce_channels(-0.5 * deviation.square() - std.log() - LOG_SQRT_2PI, reduce)


def step_scale(
    sigma: Float[Tensor, " R"], sigma_next: Float[Tensor, " R"], *, kind: Kind, eta: float
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """(d mean / d u, std) of steps: the mean is linear in the velocity, so a velocity of ones says by how much."""
    nothing = sigma.new_zeros(len(sigma), 1, 1, 1, 1)
    still = transition(nothing, nothing, sigma, sigma_next, kind=kind, eta=eta)
    moved = transition(nothing + 1, nothing, sigma, sigma_next, kind=kind, eta=eta)
    return (moved.mean - still.mean).flatten(), moved.std.flatten()


def kl_divergence(policy: Transition, reference: Transition, *, reduce: Reduce = "mean") -> Float[Tensor, "N T H W"]:
    """KL(policy || reference) per position of two steps with the same std: (mean - mean_ref)^2 / (2 std^2)."""
    return _reduce_channels(((policy.mean - reference.mean) / policy.std).square() / 2, reduce)
