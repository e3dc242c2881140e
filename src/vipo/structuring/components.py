"""The principal components of features, exact to rounding whatever their spectrum.

Centred, X (n cells, D) is sum_j z_j v_j^T. The axes are eigenvectors of the smaller of X X^T (n, n) and X^T X (D, D):
solved in full where that is small; by a subspace iteration where it is large, and in full where its residual says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vipo.options import MapOptions

NEGLIGIBLE = 1e-6  # a share of the variance below this is rounding noise, not a component
BLANK = 1e-10  # variance of the cells over their mean square, below which a picture has no structure

LARGE, BLOCK, POWERS = 256, 24, 16  # side of a matrix too large to solve in full; width and length of the iteration
SETTLED = 1e-6  # angle (radians) by which an iterated axis may be off: about ten times the error of the map


class Components(NamedTuple):
    """The principal components of each picture's features, with the signs the solver returned, largest first.

    ``energy`` is |X|: each cell's distance from the mean feature, over all D dimensions.
    """

    projections: Float[Tensor, "B K *grid"]
    explained: Float[Tensor, "B K"]
    energy: Float[Tensor, "B *grid"]


def principal_components(features: Float[Tensor, "B D *grid"], components: int = MapOptions.components) -> Components:
    """PCA of the cells of each picture, or of each clip when the grid is (F, h, w).

    Components beyond the rank of the features, and all components of a blank picture, are exactly zero.

    Raises:
        ValueError: features that are not (B, D, ..., h, w) or not finite, or components < 1.
    """
    _check_features(features, components)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        tokens = features.to(_precise(features.device)).flatten(2).transpose(1, 2)
        scale = tokens.square().mean((1, 2))
        centred = tokens - tokens.mean(1, keepdim=True)
        total = centred.square().sum((1, 2))
        blank = total <= BLANK * scale * centred[0].numel()
        centred.masked_fill_(blank[:, None, None], 0)  # what is left there is rounding, and has no axes to look for
        projections = _project(centred, components)
        explained = projections.square().sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
        kept = (explained > NEGLIGIBLE) & ~blank[:, None]
        explained = explained.where(kept, explained.new_zeros(()))
        projections = projections.where(kept[:, None], projections.new_zeros(()))
        grid = features.shape[2:]
        energy = centred.norm(dim=2).unflatten(1, grid)
        return Components(projections.transpose(1, 2).unflatten(2, grid), explained, energy)


def _check_features(features: Tensor, components: int) -> None:
    if features.ndim < 4 or 0 in features.shape[1:]:
        raise ValueError(f"features {tuple(features.shape)} must be (B, D, h, w), or (B, D, F, h, w) for clips")
    if components < 1:
        raise ValueError(f"components={components}: a map needs at least 1 principal component")
    if not bool(features.isfinite().all()):
        bad = (~features.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"features of picture {bad} in the batch are not finite; mask those samples out instead")


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _project(centred: Float[Tensor, "B n D"], components: int) -> Float[Tensor, "B n K"]:
    """Projections on the leading axes, from the smaller of the Gram (n, n) and the covariance (D, D) matrix."""
    n, width = centred.shape[1:]
    if width <= n:
        vectors = _leading_vectors(centred.mT @ centred, _start(centred), components)
        projections = centred @ vectors
    else:
        gram = centred @ centred.mT
        vectors = _leading_vectors(gram, centred @ _start(centred), components)
        projections = vectors * (vectors * (gram @ vectors)).sum(1, keepdim=True).clamp_min(0).sqrt()
    return F.pad(projections, (0, components - projections.shape[-1]))


def _start(centred: Float[Tensor, "B n D"]) -> Float[Tensor, "D block"]:
    """Where a subspace iteration starts: fixed directions among the features, so that token order does not matter."""
    directions = torch.randn(centred.shape[2], BLOCK, generator=torch.Generator().manual_seed(0))
    return directions.to(centred)


def _leading_vectors(
    matrix: Float[Tensor, "B m m"], start: Float[Tensor, "*B m block"], components: int
) -> Float[Tensor, "B m K"]:
    """Eigenvectors of the largest eigenvalues, largest first; of a large matrix by subspace iteration.

    The iteration multiplies what is not among the leading K by (lambda_{BLOCK+1} / lambda_K)^POWERS: nothing is left
    for the steep spectra of backbones. Pictures whose spectrum is too flat for that are solved in full.
    """
    if matrix.shape[1] <= LARGE or components > BLOCK // 2:
        return _all_vectors(matrix, components)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWERS // 2):
        basis = torch.linalg.qr(matrix @ (matrix @ basis)).Q
    image = matrix @ basis
    small = torch.linalg.eigh(basis.mT @ image)
    values, rotation = small.eigenvalues.flip(-1), small.eigenvectors.flip(-1)[..., :components]
    vectors = basis @ rotation
    moving = ~_settled(matrix, vectors, image @ rotation, values)
    if bool(moving.any()):
        vectors[moving] = _all_vectors(matrix[moving], components)
    return vectors


def _all_vectors(matrix: Float[Tensor, "B m m"], components: int) -> Float[Tensor, "B m K"]:
    return torch.linalg.eigh(matrix).eigenvectors.flip(-1)[..., :components]


def _settled(
    matrix: Float[Tensor, "B m m"],
    vectors: Float[Tensor, "B m K"],
    image: Float[Tensor, "B m K"],
    values: Float[Tensor, "B block"],
) -> Bool[Tensor, " B"]:
    """Whether each axis that counts is within ``SETTLED`` of the eigenvector: |A v - theta v| / gap bounds its angle.

    The gap is the distance of theta from the nearest other one (Davis and Kahan, sin theta theorem). ``image`` is A v,
    ``values`` all theta of the iteration's block, largest first. A share below ``NEGLIGIBLE`` does not count.
    """
    count = vectors.shape[2]
    residual = (image - vectors * values[:, None, :count]).norm(dim=1)
    distance = (values[:, :count, None] - values[:, None]).abs()
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    allowed = max(SETTLED, torch.finfo(values.dtype).eps ** 0.5)  # float32 has no 1e-6 to give
    near = residual <= allowed * distance.amin(2)
    return (near | (values[:, :count] <= NEGLIGIBLE * trace)).all(1)
