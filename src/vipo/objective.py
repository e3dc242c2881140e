"""From rewards to a loss: group advantage, credit per latent position, clipped surrogate.

    A_i   = (r_i - mean_group) / (std_group + eps)                                 GRPO (arXiv 2402.03300, eq. 3)
    A_i^p = M_i(p) A_i                                                             ViPO (arXiv 2511.18719)
    A_i^p = group advantage at p of R_i + std_group(R) e_i(p)                      BoxFlow-GRPO (arXiv 2606.06113)
    J     = mean over samples, steps and positions of min(rho A, clip(rho, 1 - c, 1 + c) A),   rho = pi_new / pi_old

GRPO is ViPO with one position: the same functions take (N,) and (N, T, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vipo.options import Ratio


class Surrogate(NamedTuple):
    """``loss`` is -J. ``approx_kl`` is mean(rho - 1 - log rho), the estimator that is never negative."""

    loss: Float[Tensor, ""]
    clipped_fraction: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]


def _in_groups(values: Tensor, group_size: int) -> Tensor:
    if group_size < 1 or values.shape[0] % group_size:
        raise ValueError(f"{values.shape[0]} samples do not divide into groups of group_size={group_size}")
    return values.double().unflatten(0, (-1, group_size))


EPS = 1e-4  # added to a group's deviation, so that scores that differ by far less than that teach next to nothing


def group_advantage(
    rewards: Float[Tensor, "N *position"], group_size: int, *, eps: float = EPS
) -> Float[Tensor, "N *position"]:
    """How much better than its group each sample is, in the group's standard deviations (unbiased).

    Groups are consecutive. A reward that is not finite means "no score": the sample is left out of its group's mean and
    deviation and gets advantage 0. A group without spread gets 0, not rounding noise. Trailing dimensions are
    normalised independently (``reward_map`` uses that).

    Examples:
        >>> import torch
        >>> from vipo import objective
        >>> objective.group_advantage(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2)
        tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    grouped = _in_groups(rewards, group_size)
    deviation, std = _moments(grouped)
    advantage = deviation / (std + eps)
    return advantage.where(_differ(grouped), torch.zeros_like(advantage)).flatten(0, 1).to(rewards.dtype)


def _differ(grouped: Float[Tensor, "P G *position"]) -> Bool[Tensor, "P one *position"]:
    """Whether a group has two different scores; rounding makes a deviation of equal ones too."""
    scored = grouped.isfinite()
    highest = grouped.where(scored, torch.full_like(grouped, -torch.inf)).amax(1, keepdim=True)
    lowest = grouped.where(scored, torch.full_like(grouped, torch.inf)).amin(1, keepdim=True)
    return highest > lowest


def _moments(grouped: Float[Tensor, "P G *position"]) -> tuple[Tensor, Tensor]:
    """Deviation of each sample from its group's mean, 0 without a score, and the group's deviation (P, 1, ...)."""
    scored = grouped.isfinite()
    values = grouped.where(scored, torch.zeros_like(grouped))
    count = scored.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / count.clamp_min(1)
    deviation = (values - mean).where(scored, torch.zeros_like(values))
    return deviation, (deviation.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()


def dense_reward(
    rewards: Float[Tensor, " N"], evidence: Float[Tensor, "N T H W"], group_size: int
) -> Float[Tensor, "N T H W"]:
    """R_i(p) = R_i + std_group(R) e_i(p): what a sample earned at each position, in float64; less the group's mean.

    BoxFlow-GRPO (arXiv 2606.06113) has e = -c W, with W in [0, 1] the flaws that a detector found and c = 0.5 for
    artefacts, 0.05 for misalignment. A group without spread has no R_i(p) but R_i: nothing dense is learned from it
    either. NaN where there is no score or no evidence.

    Raises:
        ValueError: the samples do not divide into groups, or rewards are not (N,) or evidence is not (N, T, H, W).
    """
    _check_local(rewards, evidence, "rewards", "evidence")
    grouped = _in_groups(rewards, group_size)
    deviation, std = _moments(grouped)
    spans = std.where(_differ(grouped), torch.zeros_like(std)).expand_as(deviation).flatten()
    centred = deviation.flatten().where(rewards.isfinite(), torch.nan)
    return centred[:, None, None, None] + spans[:, None, None, None] * evidence.double()


def spread(rewards: Float[Tensor, " N"], group_size: int) -> Float[Tensor, ""]:
    """How far scores differ within groups: the root of the mean variance (unbiased) of the groups' scored samples.

    A group with one score has no variance and does not count; if no group has two scores the spread is 0, and NaN if
    nothing was scored at all.
    """
    if group_size == 1:
        return torch.zeros((), device=rewards.device)
    found = _spread(rewards, group_size)
    # Squares of scores of 1e20 or 1e-30 are infinite or 0 in float32; others are left as they were first published.
    exact = _spread(rewards.double(), group_size)
    return found.where(found.isfinite() & (found > 0), exact.to(found.dtype))


def _spread(rewards: Float[Tensor, " N"], group_size: int) -> Float[Tensor, ""]:
    grouped = rewards.unflatten(0, (-1, group_size))
    scored = grouped.isfinite()
    count = scored.sum(1)
    mean = grouped.where(scored, torch.nan).nanmean(1, keepdim=True)
    squares = (grouped - mean).square().where(scored, 0.0).sum(1) / (count - 1).clamp_min(0)  # 0 / 0: no variance
    variance = grouped.var(1).where(count == group_size, squares)
    found = variance.nanmean().sqrt()
    return found.where(found.isfinite() | ~scored.any(), 0.0)


def combine_advantages(
    rewards: Mapping[str, Float[Tensor, "N *position"]], weights: Mapping[str, float], group_size: int
) -> Float[Tensor, "N *position"]:
    """Several rewards: each normalised within its groups, then summed by weight. A missing score anywhere gives 0."""
    total = torch.stack([weights[name] * group_advantage(r, group_size) for name, r in rewards.items()]).sum(0)
    scored = torch.stack([r.isfinite() for r in rewards.values()]).all(0)
    return total.where(scored, torch.zeros_like(total))


def extremes(advantage: Float[Tensor, " N"], group_size: int, keep: int) -> Bool[Tensor, " N"]:
    """Which samples to train on if only ``keep`` of each group are: its best and its worst half and half.

    DanceGRPO's best-of-n (arXiv 2505.07818, sec. 4.5). Ties go to the earlier sample, and every group keeps ``keep``.

    Raises:
        ValueError: ``keep`` is odd, or not between 2 and the group size.
    """
    if keep % 2 or not 2 <= keep <= group_size:
        raise ValueError(f"keep={keep} must be even and between 2 and group_size={group_size}: half best, half worst")
    order = _in_groups(advantage, group_size).argsort(dim=1, descending=True, stable=True)
    ends = torch.cat([order[:, : keep // 2], order[:, group_size - keep // 2 :]], 1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, ends, True).flatten()


def spatial_advantage(advantage: Float[Tensor, " N"], maps: Float[Tensor, "N T H W"]) -> Float[Tensor, "N T H W"]:
    """A_i^p = M_i(p) A_i. M >= 0, so no position's sign is flipped.

    Raises:
        ValueError: advantage is not (N,), maps are not (N, T, H, W), or a map is negative or not finite.

    Examples:
        >>> import torch
        >>> from vipo import objective
        >>> maps = torch.tensor([0.5, 1.5]).reshape(1, 1, 1, 2)
        >>> objective.spatial_advantage(torch.tensor([-2.0]), maps)
        tensor([[[[-1., -3.]]]])
    """
    spread_out = weighted(advantage, maps)
    check_maps(sound(maps))
    return spread_out


def sound(maps: Float[Tensor, "N T H W"]) -> Bool[Tensor, ""]:
    """Whether all of them are finite and none is negative anywhere; for :func:`check_maps`."""
    return (maps >= 0).all() & maps.isfinite().all()


def check_maps(are_sound: Bool[Tensor, ""] | bool) -> None:
    """On an accelerator it waits for :func:`sound`; what was brought over with other numbers costs nothing.

    Raises:
        ValueError: a map is negative or not finite.
    """
    if not bool(are_sound):
        raise ValueError("maps must be finite and non-negative: a negative weight would punish what was rewarded")


def weighted(advantage: Float[Tensor, " N"], maps: Float[Tensor, "N T H W"]) -> Float[Tensor, "N T H W"]:
    """:func:`spatial_advantage` of maps whose soundness is asked for elsewhere.

    Raises:
        ValueError: advantage is not (N,) or maps are not (N, T, H, W).
    """
    _check_local(advantage, maps, "advantage", "maps")
    return maps * advantage[:, None, None, None]


def _check_local(of_samples: Tensor, of_positions: Tensor, first: str, second: str) -> None:
    if of_samples.ndim != 1 or of_positions.ndim != 4 or of_positions.shape[0] != of_samples.shape[0]:
        raise ValueError(
            f"{first} {tuple(of_samples.shape)} and {second} {tuple(of_positions.shape)} must be (N,) and (N, T, H, W)"
        )


def _of_sample(log_ratio: Float[Tensor, "N *position"]) -> Float[Tensor, "N *one"]:
    """Each sample's mean over its positions, which are kept as dimensions of 1."""
    return log_ratio.flatten(1).mean(1).reshape(-1, *[1] * (log_ratio.ndim - 1)) if log_ratio.ndim > 1 else log_ratio


def clipped_surrogate(
    log_prob: Float[Tensor, "N *position"],
    old_log_prob: Float[Tensor, "N *position"],
    advantage: Float[Tensor, "N *position"],
    *,
    clip_range: float,
    ratio: Ratio = "local",
) -> Surrogate:
    """The clipped policy-gradient loss of PPO (arXiv 1707.06347, eq. 7), averaged over every element.

    (N, T, H, W) tensors give ViPO's local ratio, (N,) tensors scalar GRPO.

    Args:
        ratio: ``local`` is exp(log pi - log pi_old) at each position. ``detached`` has at every position the value r of
            the sample's one ratio and the gradient of its own log-probability, r exp(log pi(p) - sg(log pi(p))), with
            sg for no gradient (ImageDoctor, arXiv 2510.01010; the token form of GSPO): clip ranges tuned for scalar
            GRPO keep their meaning. At ratio 1, and for (N,), both are one.

    Raises:
        ValueError: the three shapes differ (a broadcast here would silently change the method), clip_range <= 0, or an
            unknown ratio.

    Examples:
        >>> import torch
        >>> from vipo import objective
        >>> log_prob = torch.zeros(4, 1, 8, 8, requires_grad=True)
        >>> weight = torch.ones(4, 1, 8, 8)
        >>> found = objective.clipped_surrogate(log_prob, log_prob.detach(), weight, clip_range=5e-4)
        >>> found.loss.item(), found.clipped_fraction.item()
        (-1.0, 0.0)
    """
    if ratio not in get_args(Ratio):
        raise ValueError(f"ratio={ratio!r} is not known; choose from {', '.join(get_args(Ratio))}")
    if not log_prob.shape == old_log_prob.shape == advantage.shape:
        raise ValueError(
            f"log_prob {tuple(log_prob.shape)}, old_log_prob {tuple(old_log_prob.shape)} and advantage"
            f" {tuple(advantage.shape)} must have one shape: (N,) for one ratio per sample, (N, T, H, W) for local ones"
        )
    if not clip_range > 0:
        raise ValueError(f"clip_range={clip_range}: must be positive")
    log_ratio = log_prob - old_log_prob.detach()
    if ratio == "detached":
        log_ratio = _of_sample(log_ratio).detach() + (log_prob - log_prob.detach())
    rho, weight = log_ratio.exp(), advantage.detach()
    unclipped, clipped = rho * weight, rho.clamp(1 - clip_range, 1 + clip_range) * weight
    with torch.no_grad():
        clipped_fraction = ((rho - 1).abs() > clip_range).float().mean()
        approx_kl = (rho - 1 - log_ratio).mean()
    return Surrogate(-torch.minimum(unclipped, clipped).mean(), clipped_fraction, approx_kl)
