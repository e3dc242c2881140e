"""The principal components of features, exact to rounding whatever their spectrum.

Centred, X (D features, n cells) is sum_j v_j z_j^T. The axes are eigenvectors of the smaller of X X^T (D, D) and
X^T X (n, n): solved in full where that is small; where it is large, by rounds of a block Krylov iteration that never
forms it (Musco and Musco, arXiv 1504.05477), and in full where a picture's residual says that more would not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vipo.options import MapOptions
from vipo.structuring.krylov import leading_vectors

NEGLIGIBLE = 1e-6  # a share of the variance below this is rounding noise, not a component
BLANK = 1e-10  # variance of the cells over their mean square, below which a picture has no structure

LARGE, BLOCK, DEPTH = 128, 8, 4  # side of a matrix too large to solve in full; columns and products of a round
SETTLED = 3e-5  # bound of an axis' angle (radians) before the last half step, which takes nine tenths of it away
HOPELESS = 1.0  # bound after the first round (radians) from which on a second does not pay
FALL = 4.0  # what each round must divide the bound by for the next to pay
CORRECTED = 1e-7  # largest last correction (radians) that leaves less than a hundredth of itself
AT_ONCE = {"cpu": 2**21}  # numbers solved together: on a CPU what stays in its caches
ELSEWHERE = 2**26  # the same on an accelerator


class Components(NamedTuple):
    """The principal components of each picture's features, with the signs the solver returned, largest first.

    ``energy`` is |X|: each cell's distance from the mean feature, over all D dimensions.
    """

    projections: Float[Tensor, "B K *grid"]
    explained: Float[Tensor, "B K"]
    energy: Float[Tensor, "B *grid"]


class Axes(NamedTuple):
    """What an iteration found of each picture: v^T M, v^T M M^T and theta of its axes v, and a bound of their angle."""

    images: Float[Tensor, "B K l"]
    products: Float[Tensor, "B K m"]
    values: Float[Tensor, "B K"]
    bound: Float[Tensor, " B"]


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
    for the device after each round of the iteration, and to hear which pictures are bad or need solving in full; beside
    that only where an eigensolver of the device's library does.

    Raises:
        ValueError: features that are not (B, D, ..., h, w) or not finite, or components < 1.
    """
    _check_shape(features, components)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False), _exact_products():
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


@contextmanager
def _exact_products() -> Iterator[None]:
    """float32 products in float32, whatever the program allows elsewhere: with TF32's ten bits the iteration settles
    nowhere, and every picture is then solved in full, at twenty times the cost (measured on an H100).

    torch has two ways to say so, and refuses the one where a program has used the other.
    """
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        found: list[str] = [backend.fp32_precision for backend in backends]
        restore = partial(_set_products, backends, found)
        _set_products(backends, ["ieee"] * len(backends))
    else:
        restore = partial(torch.set_float32_matmul_precision, allowed)
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        restore()


def _set_products(backends: Sequence[Any], precisions: Sequence[str]) -> None:
    for backend, precision in zip(backends, precisions, strict=True):
        backend.fp32_precision = precision


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
    """The leading eigenvectors; of large matrices from those in single precision, which are half the work, corrected.

    Where the correction does not arrive, because values are nearly equal, in the matrix's own precision.
    """
    if matrix.shape[1] <= LARGE or matrix.dtype == torch.float32:
        return _in_own_precision(matrix, components)
    vectors, arrived = _corrected(matrix, components)
    at = (~arrived).nonzero().flatten()
    return vectors.index_copy(0, at, _in_own_precision(matrix[at], components)) if len(at) else vectors


def _in_own_precision(matrix: Float[Tensor, "B m m"], components: int) -> Float[Tensor, "B m k"]:
    return torch.linalg.eigh(matrix).eigenvectors[..., -components:].flip(-1)


def _corrected(matrix: Float[Tensor, "B m m"], components: int) -> tuple[Float[Tensor, "B m k"], Bool[Tensor, " B"]]:
    """Single precision's eigenvectors after two corrections of first order, and whether the second was small.

    A correction solves (A - theta) d = -r for the residual r with single precision's eigenvectors x_j and values, which
    takes an error e to the order of e^2 / gap: v + sum_j x_j (x_j . r) / (theta - theta_j), j not v's own.
    """
    found = torch.linalg.eigh(matrix.float())
    values, basis = found.eigenvalues, found.eigenvectors
    vectors = basis[..., -components:].flip(-1).to(matrix)
    gaps = values[:, None, -components:].flip(2) - values[:, :, None]
    own = torch.arange(vectors.shape[2], device=gaps.device)
    gaps[:, -1 - own, own] = torch.inf
    for _ in range(2):
        images = matrix @ vectors
        residual = (images - vectors * (vectors * images).sum(1, keepdim=True)).float()
        angle = (residual.norm(dim=1) / gaps.abs().amin(1)).amax(1)
        vectors = F.normalize(vectors + basis @ (basis.mT @ residual / gaps), dim=1)
    return vectors, angle <= CORRECTED


def _iterated(cells: Float[Tensor, "B D n"], components: int) -> Solved:
    """By iteration in single precision; sums and what decides are in double."""
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
    least = (NEGLIGIBLE * total).masked_fill(blank, torch.inf)
    found = _axes(matrix, _start(matrix, narrow), least, torch.full_like(total, HOPELESS * FALL), components)
    lengths = found.values.rsqrt().where(found.values > least[:, None], total.new_zeros(()))
    projections = found.images if narrow else found.products * lengths[..., None]
    return Solved(projections, square.sqrt(), total, blank, found.bound <= _allowed(precise), bad)


def _axes(
    matrix: Float[Tensor, "B m l"],
    start: Float[Tensor, "B block m"],
    least: Float[Tensor, " B"],
    before: Float[Tensor, " B"],
    components: int,
) -> Axes:
    """Rounds of the iteration, each from the best of what the last one found, while it pays: until its bound is small
    enough, or has not fallen enough since the last round (``before``).

    A round ends with a product there and back, which is half a step of the iteration more. Values below ``least`` do
    not count.
    """
    vectors, searched = leading_vectors(matrix, start, DEPTH, _precise(matrix.device))
    vectors = vectors.to(matrix)
    leading = vectors[:, :components]
    images = leading @ matrix
    products = images @ matrix.mT
    wide, there = images.to(searched), products.to(searched)
    values = wide.square().sum(2)
    residual = (there - leading * values[..., None]).norm(dim=2)
    bound = _bound(residual, values, searched).masked_fill(values <= least[:, None], 0).amax(1)
    found = Axes(wide, there, values, bound)
    at = ((bound > _allowed(bound.dtype)) & (bound * FALL < before)).nonzero().flatten()
    if not len(at):
        return found
    rest = (matrix, vectors, least, bound)
    matrix, vectors, least, bound = rest if len(at) == len(matrix) else (part[at] for part in rest)
    better = _axes(matrix, vectors, least, bound, components)
    return Axes(*(all_.index_copy(0, at, new) for all_, new in zip(found, better, strict=True)))


def _start(matrix: Float[Tensor, "B m l"], narrow: bool) -> Float[Tensor, "B block m"]:
    """Where the iteration starts: fixed directions among the features, so that the order of cells does not matter."""
    width = matrix.shape[1 if narrow else 2]
    directions = torch.randn(width, BLOCK, generator=torch.Generator().manual_seed(0)).mT.contiguous().to(matrix)
    directions = directions.expand(len(matrix), -1, -1)
    return directions if narrow else directions @ matrix.mT


def _bound(
    residual: Float[Tensor, "B K"], values: Float[Tensor, "B K"], searched: Float[Tensor, "B d"]
) -> Float[Tensor, "B K"]:
    """Of each axis' angle from the eigenvector: |A v - theta v| / gap (Davis and Kahan, sin theta theorem).

    The gap is the distance of theta from the nearest other one. ``searched`` are all theta in the searched space,
    largest first.
    """
    distance = (values[:, :, None] - searched[:, None]).abs()
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return residual / distance.amin(2)


def _allowed(precise: torch.dtype) -> float:
    return max(SETTLED, torch.finfo(precise).eps ** 0.5)  # float32 has no 1e-5 to give
