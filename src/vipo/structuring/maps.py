"""The map itself: components added up, smoothed, brought to the latent grid, normalised; and what a group says."""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vipo.options import Aggregation, ConsensusOptions, DeviationOptions, MapOptions, Normalization, Orientation
from vipo.structuring.components import NEGLIGIBLE, principal_components
from vipo.structuring.orientation import oriented
from vipo.types import Grid


def _aggregate(maps: Float[Tensor, "B K *grid"], explained: Float[Tensor, "B K"], how: Aggregation) -> Tensor:
    """S = sum_j weight_j z'_j, with weights that ignore components that are not there."""
    if how == "variance":
        weight = explained
    elif how == "average":
        there = (explained > 0).to(explained)
        weight = there / there.sum(1, keepdim=True).clamp_min(1)
    elif how == "first":
        weight = F.one_hot(torch.zeros_like(explained[:, 0], dtype=torch.long), explained.shape[1]).to(explained)
    else:
        raise ValueError(f"aggregation={how!r} is not known; choose from {', '.join(get_args(Aggregation))}")
    return torch.einsum("bk,bk...->b...", weight, maps)


def smooth(maps: Float[Tensor, "... h w"], sigma: float) -> Float[Tensor, "... h w"]:
    """A Gaussian of ``sigma`` cells whose weights are normalised over the cells that exist, so no edge is darkened."""
    if not sigma >= 0:
        raise ValueError(f"smoothing_sigma={sigma}: give a width in cells of the feature grid, or 0 for none")
    if sigma == 0:
        return maps
    rows, columns = (_gaussian(size, sigma, maps) for size in maps.shape[-2:])
    return rows @ maps @ columns.mT


def _gaussian(size: int, sigma: float, like: Tensor) -> Float[Tensor, "size size"]:
    at = torch.arange(size, device=like.device, dtype=like.dtype)
    weights = torch.exp(-(at[:, None] - at).square() / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def resample(maps: Float[Tensor, "B *F h w"], grid: Grid) -> Float[Tensor, "B *F H W"]:
    """Bilinear to the latent grid; where cells are merged they are averaged (antialias), not skipped."""
    pictures = maps.flatten(0, -3)[:, None]
    smaller = grid[0] < maps.shape[-2] or grid[1] < maps.shape[-1]
    resized = F.interpolate(pictures, size=tuple(grid), mode="bilinear", align_corners=False, antialias=smaller)
    return resized.reshape(*maps.shape[:-2], *grid)


def normalise(maps: Float[Tensor, "B *grid"], how: Normalization) -> Float[Tensor, "B *grid"]:
    """Over all of a row: [0, 1] (``minmax``) or mean 1 (``unit_mean``). A uniform map becomes ones in both."""
    if how not in get_args(Normalization):
        raise ValueError(f"normalization={how!r} is not known; choose from {', '.join(get_args(Normalization))}")
    flat = maps.clamp_min(0).flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    uniform = high - low <= NEGLIGIBLE * high
    unit = (flat - low) / (high - low) if how == "minmax" else flat / flat.mean(1, keepdim=True)
    return unit.where(~uniform, torch.ones_like(unit)).reshape(maps.shape).float()


def structure(
    components: Float[Tensor, "B K *grid"],
    explained: Float[Tensor, "B K"],
    aggregation: Aggregation,
    smoothing_sigma: float,
) -> Float[Tensor, "B *grid"]:
    """The smoothed S of oriented components, on the feature grid."""
    return smooth(_aggregate(components, explained, aggregation), smoothing_sigma)


@torch.no_grad()
def allocation_map(
    features: Float[Tensor, "B D h w"],
    grid: Grid,
    *,
    components: int = MapOptions.components,
    aggregation: Aggregation = MapOptions.aggregation,
    smoothing_sigma: float = MapOptions.smoothing_sigma,
    normalization: Normalization = MapOptions.normalization,
    orientation: Orientation = MapOptions.orientation,
) -> Float[Tensor, "B H W"]:
    """One non-negative weight per latent position, from one picture's features.

    Args:
        grid: (H, W) of the latents.
        components: K, the number of principal components.
        aggregation: weights of the components: ``variance`` (lambda_j), ``average`` (equal) or ``first`` (only j = 1).
        smoothing_sigma: width of the Gaussian in cells of the feature grid; 0 is none.
        normalization: ``unit_mean`` (the mean over the positions is 1, so scalar GRPO is M = 1) or ``minmax`` ([0, 1]).
            A picture without structure gives ones in both.
        orientation: what makes the map independent of the sign of the axes; see ``vipo.structuring.orientation``.

    Raises:
        ValueError: features that are not (B, D, h, w) or not finite, or an option that is not known.
    """
    if features.ndim != 4:
        raise ValueError(f"features {tuple(features.shape)} must be (B, D, h, w)")
    found = principal_components(features, components)
    smoothed = structure(oriented(found, orientation), found.explained, aggregation, smoothing_sigma)
    return normalise(resample(smoothed, grid), normalization)


@torch.no_grad()
def deviation_map(
    latents: Float[Tensor, "N C T H W"],
    group_size: int,
    *,
    smoothing_sigma: float = MapOptions.smoothing_sigma,
    normalization: Normalization = MapOptions.normalization,
    power: float = DeviationOptions.power,
) -> Float[Tensor, "N T H W"]:
    """Where each sample differs from its group: |latents - the group's mean|^2, summed over channels.

    Not in the paper. Of samples that started from one noise, nothing else can explain why one scored more than another;
    docs/results.md measures what that is worth. Samples from different noises differ everywhere.

    Args:
        latents: clean ones, groups consecutive.
        smoothing_sigma: width of the Gaussian in latent cells; 0 is none.
        normalization: as in ``allocation_map``. A sample that equals its group's mean gets ones.
        power: of the smoothed square; 0.5 is its root, which is flatter.

    Raises:
        ValueError: the samples do not divide into groups, or the power is not positive.

    Examples:
        >>> import torch
        >>> from vipo.structuring import deviation_map
        >>> latents = torch.zeros(2, 4, 1, 1, 4)
        >>> latents[0, :, :, :, 0] = 1.0  # the two differ in the first position alone
        >>> deviation_map(latents, group_size=2, smoothing_sigma=0)[0]
        tensor([[[4., 0., 0., 0.]]])
    """
    if not power > 0:
        raise ValueError(f"power={power} must be positive; 1 is the squared distance, 0.5 its root")
    grouped = _in_groups(latents.float(), group_size)
    squared = (grouped - grouped.mean(1, keepdim=True)).square().sum(2).flatten(0, 1)
    smoothed = smooth(squared, smoothing_sigma)
    return normalise(smoothed if power == 1 else smoothed.clamp_min(0).pow(power), normalization)


@torch.no_grad()
def consensus_map(
    latents: Float[Tensor, "N C T H W"],
    advantage: Float[Tensor, " N"],
    group_size: int,
    *,
    smoothing_sigma: float = MapOptions.smoothing_sigma,
    normalization: Normalization = MapOptions.normalization,
    floor: float = ConsensusOptions.floor,
) -> Float[Tensor, "N T H W"]:
    """Where a sample did what its better group mates did, or, if it is a worse one, what they did not.

        M_i(p) = relu( sign(A_i) gaussian * <d_i(p), g_i(p)> ),     g_i(p) = sum over j != i of A_j d_j(p)

    with d_i = x_i - the group's mean, a vector over channels. Leaving i out of g_i keeps a sample from vouching for
    itself. Not in the paper. Samples may start from one noise or from one each. In groups of two it is
    :func:`deviation_map`.

    Args:
        latents: clean ones, groups consecutive.
        advantage: of each sample, over all rewards. NaN means no score: such a sample is left out of its group, and its
            own map is ones, as is that of a sample whose advantage is 0 or whose map is 0 everywhere.
        smoothing_sigma: width of the Gaussian in latent cells, before the relu; 0 is none.
        normalization: as in ``allocation_map``.
        floor: a of a + (1 - a) M, the least weight of a position.

    Raises:
        ValueError: the samples do not divide into groups, there is not one advantage for each, or floor is not in
            [0, 1].
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} must be from 0 (none) to 1 (a map of ones)")
    signed = _agreement(latents, advantage, group_size, smoothing_sigma)
    maps = normalise(signed.clamp_min(0), normalization)
    return maps if floor == 0 else floor + (1 - floor) * maps


@torch.no_grad()
def signed_consensus_map(
    latents: Float[Tensor, "N C T H W"],
    advantage: Float[Tensor, " N"],
    group_size: int,
    *,
    smoothing_sigma: float = MapOptions.smoothing_sigma,
) -> Float[Tensor, "N T H W"]:
    """:func:`consensus_map` before it is cut at 0, its sizes of mean 1: negative where a sample's doing speaks against
    its own advantage, because worse mates of a good sample did it too or better mates of a bad one did.

        S_i(p) = s_i(p) / mean over p of |s_i(p)|,     s_i(p) = sign(A_i) gaussian * <d_i(p), g_i(p)>

    Ones where s is 0 everywhere, so for a sample with advantage 0 or without a score. The paper allows no such sign.
    """
    signed = _agreement(latents, advantage, group_size, smoothing_sigma)
    size = signed.abs().flatten(1).mean(1)[:, None, None, None]
    return torch.where(size > 0, signed / size, torch.ones_like(signed)).float()


def _agreement(
    latents: Float[Tensor, "N C T H W"], advantage: Float[Tensor, " N"], group_size: int, smoothing_sigma: float
) -> Float[Tensor, "N T H W"]:
    """sign(A_i) gaussian * <d_i(p), g_i(p)>; 0 for a sample without a score."""
    if advantage.shape != latents.shape[:1]:
        raise ValueError(f"advantage {tuple(advantage.shape)} must be ({len(latents)},): one for each of the latents")
    grouped, credit = _in_groups(latents.float(), group_size), _in_groups(advantage.float(), group_size)
    scored = credit.isfinite()
    credit, present = credit.where(scored, 0.0)[:, :, None, None, None, None], scored[:, :, None, None, None, None]
    mean = grouped.where(present, 0.0).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp_min(1)
    deviation = (grouped - mean).where(present, 0.0)
    pull = credit * deviation
    others = pull.sum(1, keepdim=True) - pull
    agreement = (deviation * others).sum(2).flatten(0, 1)
    return credit.sign().flatten()[:, None, None, None] * smooth(agreement, smoothing_sigma)


def _in_groups(values: Float[Tensor, "N *rest"], group_size: int) -> Float[Tensor, "P G *rest"]:
    if group_size < 1 or len(values) % group_size:
        raise ValueError(f"{len(values)} samples do not divide into groups of group_size={group_size}")
    return values.unflatten(0, (-1, group_size))
