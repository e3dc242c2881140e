"""Which end of a component is the subject.

An axis has no sign: v_j and -v_j are equally right, and which one a solver returns is an accident. An orientation rule
turns z_j into z'_j such that the accident has no consequence. Three rules choose a sign and stretch z_j to [0, 1]:

==================== ==================================================================================
``border``           the interior's mean lies above the border's
``skewness``         the longer tail (the smaller cluster) is the subject
``energy``           z_j correlates with |X|, the distance of a cell from the mean
==================== ==================================================================================

The others need no sign:

==================== ==================================================================================
``background``       the mean of |z_j - z_j(e)| over the border cells e, each weighted by how much it looks like ground,
                     stretched to [0, 1]. A border cell looks like ground if its likes lie along the border rather than
                     inside, so a subject that is cut by the border does not count as ground. The default.
``border_distance``  |z_j - median of z_j over the border|, stretched to [0, 1]
``release``          (max - z_j) / (max - min), whatever the solver returned; for comparison only: it depends on the
                     library, the device and the order of the tokens, so its maps are not reproducible elsewhere
==================== ==================================================================================

docs/orientation.md measures them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vipo.options import MapOptions, Orientation
from vipo.structuring.components import NEGLIGIBLE, Components
from vipo.types import sent

LIKENESS, SHARPNESS = 0.35, 4  # of ``background``; measured in experiments/orientation, flat around these values


def oriented(found: Components, orientation: Orientation = MapOptions.orientation) -> Float[Tensor, "B K *grid"]:
    """z'_j in [0, 1] for each component: high where the rule sees the subject. A component without spread gives 0."""
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation={orientation!r} is not known; choose from {', '.join(get_args(Orientation))}")
    with torch.no_grad():
        return _stretch(ORIENTATIONS[orientation](found), keep=2)


def _stretch(values: Tensor, keep: int) -> Tensor:
    """Min-max to [0, 1] over all but the first ``keep`` dimensions; 0 where there is no spread."""
    flat = values.flatten(keep)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    spread = high - low
    unit = (flat - low) / spread.where(spread > 0, torch.ones_like(spread))
    return unit.reshape(values.shape)


def _edge_cells(found: Components) -> Int[Tensor, " edge"]:
    """Places of the cells on the edge of the picture, among a frame's h w; the host knows them, so nothing waits."""
    return sent(_edge(found).nonzero().squeeze(1), found.projections.device)


def _inner_cells(found: Components) -> Int[Tensor, " inner"]:
    """Places of the others."""
    return sent((~_edge(found)).nonzero().squeeze(1), found.projections.device)


def _edge(found: Components) -> Bool[Tensor, " n"]:
    edge = torch.ones(found.projections.shape[-2:], dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge.flatten()


def _at(values: Float[Tensor, "B K *grid"], cells: Int[Tensor, " k"]) -> Float[Tensor, "B K n"]:
    """Values in these cells of every frame."""
    return values.flatten(-2)[..., cells].flatten(2)


def _signed(found: Components, statistic: Tensor) -> Tensor:
    """Projections times the sign of a (B, K) statistic that is odd in them; a tie tells nothing and gives 0."""
    sign = statistic.sign() * (statistic.abs() > NEGLIGIBLE)
    return found.projections * sign.reshape(*sign.shape, *[1] * (found.projections.ndim - 2))


def _standard(found: Components) -> Float[Tensor, "B K n"]:
    flat = found.projections.flatten(2)
    deviation = flat.square().mean(-1, keepdim=True).sqrt()
    return flat / deviation.where(deviation > 0, torch.ones_like(deviation))


def _by_border(found: Components) -> Tensor:
    inner, z = _inner_cells(found), _standard(found).reshape(found.projections.shape)
    if not len(inner):
        return _signed(found, torch.zeros_like(found.explained))
    return _signed(found, _at(z, inner).mean(-1) - _at(z, _edge_cells(found)).mean(-1))


def _by_skewness(found: Components) -> Tensor:
    return _signed(found, _standard(found).pow(3).mean(-1))


def _by_energy(found: Components) -> Tensor:
    energy = found.energy.flatten(1)
    energy = energy / energy.mean(1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    return _signed(found, (_standard(found) * (energy - 1)[:, None]).mean(-1))


def _border_distance(found: Components) -> Tensor:
    grid, middle = found.projections.shape[2:], _median(_at(found.projections, _edge_cells(found)))
    return (found.projections - middle[(..., *[None] * len(grid))]).abs()


def _median(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """The middle value, or the mean of the two middle ones: symmetric under a change of sign."""
    ordered, n = values.sort(dim=-1).values, values.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def _release(found: Components) -> Tensor:
    return -found.projections


def _background(found: Components) -> Tensor:
    z = found.projections.flatten(-2)
    edge = _edge_cells(found)
    weight = _ground_likeness(found, edge).unsqueeze(1).unsqueeze(-1)
    distance = (z[..., :, None] - z[..., None, edge]).abs()
    return (distance @ weight).reshape(found.projections.shape)


def _ground_likeness(found: Components, edge: Tensor) -> Float[Tensor, "B *F edge"]:
    """Weights of the border cells of each frame, summing to 1: boundary connectivity to the power ``SHARPNESS``.

    Likeness is a(e, q) = exp(-|z(e) - z(q)|^2 / 2 (LIKENESS s)^2), with s^2 the mean squared distance of two cells. A
    border cell's connectivity is sum_{q on the border} a(e, q) / sqrt(sum_q a(e, q)): the length of its region along
    the border over the root of its area (after Zhu et al., CVPR 2014). All K components count together.
    """
    cells = found.projections.flatten(-2).movedim(1, -1)
    spread = 2 * found.projections.flatten(2).square().sum(1).mean(1) * LIKENESS**2
    squared = torch.cdist(cells[..., edge, :], cells, compute_mode="donot_use_mm_for_euclid_dist").square()
    spread = spread.where(spread > 0, torch.ones_like(spread)).reshape(-1, *[1] * (squared.ndim - 1))
    like = torch.exp(-squared / (2 * spread))
    connectivity = like[..., edge].sum(-1) / like.sum(-1).sqrt()
    weight = connectivity.pow(SHARPNESS)
    return weight / weight.sum(-1, keepdim=True)


ORIENTATIONS: dict[str, Callable[[Components], Tensor]] = {
    "background": _background,
    "border_distance": _border_distance,
    "border": _by_border,
    "skewness": _by_skewness,
    "energy": _by_energy,
    "release": _release,
}
