"""The principal components of features, exact to rounding whatever their spectrum.

Centred, X (D features, n cells) is sum_j v_j z_j^T. The axes are eigenvectors of the smaller of X X^T (D, D) and
X^T X (n, n): solved in full where that is small; where it is large, by a block Krylov iteration that never forms it
(Musco and Musco, arXiv 1504.05477), and in full where a picture's residual says that the iteration has not arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vipo.options import MapOptions
from vipo.structuring.krylov import leading_vectors

NEGLIGIBLE = 1e-6  # a share of the variance below this is rounding noise, not a component
BLANK = 1e-10  # variance of the cells over their mean square, below which a picture has no structure

LARGE, BLOCK, DEPTH = 128, 8, 6  # side of a matrix too large to solve in full; columns and products of the iteration
SETTLED = 1e-5  # bound of an axis' angle (radians) before the last half step, which takes most of it away
AT_ONCE = {"cpu": 2**21}  # numbers solved together: on a CPU what stays in its caches
ELSEWHERE = 2**26  # the same on an accelerator


class Components(NamedTuple):
    """The principal components of each picture's features, with the signs the solver returned, largest first.

    ``energy`` is |X|: each cell's distance from the mean feature, over all D dimensions.
    """

    projections: Float[Tensor, "B K *grid"]
    explained: Float[Tensor, "B K"]
    energy: Float[Tensor, "B *grid"]


class Solved(NamedTuple):
    """What a solver found of each picture; ``bad`` where features are not finite, ``settled`` where it is exact."""

    projections: Float[Tensor, "B K n"]
    energy: Float[Tensor, "B n"]
    total: Float[Tensor, " B"]
    blank: Bool[Tensor, " B"]
    settled: Bool[Tensor, " B"]
    bad: Bool[Tensor, " B"]


def principal_components(features: Float[Tensor, "B D *grid"], components: int = MapOptions.components) -> Components:
    """PCA of the cells of each picture, or of each clip when the grid is (F, h, w).

    Components beyond the rank of the features, and all components of a blank picture, are exactly zero. The host waits
    for the device once, to hear which pictures are bad or need solving in full; beside that only where an
    eigensolver of the device's library does.

    Raises:
        ValueError: features that are not (B, D, ..., h, w) or not finite, or components < 1.
    """
    _check_shape(features, components)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        cells = features.flatten(2)
        large = min(cells.shape[1:]) > LARGE and components <= BLOCK - 2
        solved = _in_parts(_iterated, cells, components) if large else _in_full(cells, components)
        bad, moving = torch.stack([solved.bad, ~solved.settled]).cpu()
        _check_finite(bad)
        if bool(moving.any()):
            at = moving.nonzero().flatten().to(cells.device)
            exact = _in_parts(_in_full, cells[at], components)
            solved = Solved(*(all_.index_copy(0, at, new) for all_, new in zip(solved, exact, strict=True)))
        return _finished(solved, features.shape[2:])


def _finished(solved: Solved, grid: torch.Size) -> Components:
    projections, blank = solved.projections, solved.blank
    tiny = torch.finfo(solved.total.dtype).tiny
    explained = projections.square().sum(2) / solved.total.clamp_min(tiny)[:, None]
    kept = (explained > NEGLIGIBLE) & ~blank[:, None]
    zero = explained.new_zeros(())
    projections = projections.where(kept[..., None], zero)
    energy = solved.energy.where(~blank[:, None], zero)
    return Components(projections.unflatten(2, grid), explained.where(kept, zero), energy.unflatten(1, grid))


def _check_shape(features: Tensor, components: int) -> None:
    if features.ndim < 4 or 0 in features.shape[1:]:
        raise ValueError(f"features {tuple(features.shape)} must be (B, D, h, w), or (B, D, F, h, w) for clips")
    if components < 1:
        raise ValueError(f"components={components}: a map needs at least 1 principal component")


def _check_finite(bad: Bool[Tensor, " B"]) -> None:
    if bool(bad.any()):
        which = bad.nonzero().flatten().tolist()
        raise ValueError(f"features of picture {which} in the batch are not finite; mask those samples out instead")


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _in_parts(solver: Callable[[Tensor, int], Solved], cells: Float[Tensor, "B D n"], components: int) -> Solved:
    """So many pictures at once as the device works on best."""
    at_once = AT_ONCE.get(cells.device.type, ELSEWHERE) // cells[0].numel()
    parts = [solver(part, components) for part in cells.split(max(1, at_once))]
    return Solved(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


def _in_full(cells: Float[Tensor, "B D n"], components: int) -> Solved:
    """By all eigenvectors of the smaller of the covariance (D, D) and the Gram (n, n) matrix."""
    tokens = cells.to(_precise(cells.device)).transpose(1, 2)
    mean = tokens.mean(1, keepdim=True)
    bad = ~mean.isfinite().flatten(1).all(1)
    scale = tokens.square().mean((1, 2))
    centred = tokens - mean
    total = centred.square().sum((1, 2))
    blank = total <= BLANK * scale * centred[0].numel()
    centred.masked_fill_((blank | bad)[:, None, None], 0)  # what is left there has no axes to look for
    projections = F.pad(_project(centred, components), (0, max(0, components - min(centred.shape[1:]))))
    return Solved(projections.mT, centred.norm(dim=2), total, blank, torch.ones_like(blank), bad)


def _project(centred: Float[Tensor, "B n D"], components: int) -> Float[Tensor, "B n k"]:
    n, width = centred.shape[1:]
    if width <= n:
        return centred @ _all_vectors(centred.mT @ centred, components)
    gram = centred @ centred.mT
    vectors = _all_vectors(gram, components)
    return vectors * (vectors * (gram @ vectors)).sum(1, keepdim=True).clamp_min(0).sqrt()


def _all_vectors(matrix: Float[Tensor, "B m m"], components: int) -> Float[Tensor, "B m k"]:
    return torch.linalg.eigh(matrix).eigenvectors.flip(-1)[..., :components]


def _iterated(cells: Float[Tensor, "B D n"], components: int) -> Solved:
    """By iteration in single precision, finished and checked by one product there and back in double.

    That product is half a step of the iteration more: it takes most of the rounding out of the projections.
    """
    precise, wide = _precise(cells.device), cells if cells.dtype == torch.float64 else cells.float()
    mean = wide.mean(2, keepdim=True)
    bad = ~mean.isfinite().flatten(1).all(1)
    centred = (wide - mean).float()
    square = centred.square().sum(1).to(precise)
    total = square.sum(1)
    # The mean square of the features themselves is that of what is left and that of the mean.
    scale = total + mean.to(precise).square().sum((1, 2)) * cells.shape[2]
    blank = total <= BLANK * scale
    narrow = cells.shape[1] <= cells.shape[2]
    matrix = centred if narrow else centred.mT
    vectors, searched = leading_vectors(matrix, _start(matrix, narrow), DEPTH, components, precise)
    exact = matrix.to(precise)
    images = vectors.mT @ exact
    products = (exact @ images.mT).mT
    values = images.square().sum(2)
    residual = (products - vectors.mT * values[..., None]).norm(dim=2)
    settled = _settled(residual, values, searched, total) | blank
    lengths = values.rsqrt().where(values > NEGLIGIBLE * total[:, None], values.new_zeros(()))
    projections = images if narrow else products * lengths[..., None]
    return Solved(projections, square.sqrt(), total, blank, settled, bad)


def _start(matrix: Float[Tensor, "B m l"], narrow: bool) -> Float[Tensor, "B m block"]:
    """Where the iteration starts: fixed directions among the features, so that the order of cells does not matter."""
    width = matrix.shape[1 if narrow else 2]
    directions = torch.randn(width, BLOCK, generator=torch.Generator().manual_seed(0)).to(matrix)
    return directions.expand(len(matrix), -1, -1) if narrow else matrix @ directions


def _settled(
    residual: Float[Tensor, "B K"],
    values: Float[Tensor, "B K"],
    searched: Float[Tensor, "B d"],
    total: Float[Tensor, " B"],
) -> Bool[Tensor, " B"]:
    """Whether each axis that counts is within ``SETTLED`` of the eigenvector: |A v - theta v| / gap bounds its angle.

    The gap is the distance of theta from the nearest other one (Davis and Kahan, sin theta theorem). ``searched`` are
    all theta in the searched space, largest first. A share below ``NEGLIGIBLE`` does not count.
    """
    distance = (values[:, :, None] - searched[:, None]).abs()
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    allowed = max(SETTLED, torch.finfo(values.dtype).eps ** 0.5)  # float32 has no 1e-5 to give
    near = residual <= allowed * distance.amin(2)
    return (near | (values <= NEGLIGIBLE * total[:, None])).all(1)
