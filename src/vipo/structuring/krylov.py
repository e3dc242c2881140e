"""The leading left singular vectors of many matrices at once by block Krylov iteration, without forming M M^T.

The vectors are sought in the span of S, A S, A^2 S, ... with A = M M^T, S the starting block: it holds every polynomial
in A of that degree, among them the best one, so it arrives in fewer products than powers of A do (Musco and Musco,
arXiv 1504.05477). Products are in the matrix's own precision; what is small enough to be cheap is in double.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Squared length, of 1, at which a new direction counts half: a few times single precision's rounding. A direction that
# counts less is made zero, because rounding need not be orthogonal to anything.
LOST = 1e-12


def leading_vectors(
    matrix: Float[Tensor, "B m l"], start: Float[Tensor, "B block m"], depth: int, precise: torch.dtype
) -> tuple[Float[Tensor, "B block m"], Float[Tensor, "B values"]]:
    """As many vectors as the start has, as rows, and all eigenvalues of A in the space that was searched.

    Both are sorted, largest first. The vectors are what rounding to single precision leaves: the caller says whether
    that is good enough. Matrices may be zero, of any rank, or not finite; the last get numbers without meaning.
    """
    basis, images = (rows.to(precise) for rows in _spaces(matrix, start, depth, precise))
    lower, solve = _factor(basis @ basis.mT), torch.linalg.solve_triangular
    small = solve(lower, solve(lower, images @ images.mT, upper=False).mT, upper=False)
    found = torch.linalg.eigh(_finite(small))
    mixing = solve(lower.mT, found.eigenvectors.flip(-1)[..., : start.shape[1]], upper=True)
    return mixing.mT @ basis, found.eigenvalues.flip(-1)


def _finite(matrix: Float[Tensor, "B d d"]) -> Float[Tensor, "B d d"]:
    """Zero where it is not: eigensolvers refuse what is not finite."""
    return torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)


def _spaces(
    matrix: Float[Tensor, "B m l"], start: Float[Tensor, "B block m"], depth: int, precise: torch.dtype
) -> tuple[Float[Tensor, "B d m"], Float[Tensor, "B d l"]]:
    """A basis of the searched space as rows, orthonormal or zero, and its products with the matrix.

    Rows, because a few rows times a matrix stored by rows is what libraries are quick at.
    """
    size = start.shape[1]
    basis = matrix.new_zeros(len(matrix), size * (depth + 1), matrix.shape[1])
    images = matrix.new_zeros(len(matrix), size * (depth + 1), matrix.shape[2])
    rows = start
    for step in range(depth + 1):
        here = slice(step * size, (step + 1) * size)
        basis[:, here] = rows = _new(_unit(rows), basis[:, : here.start], precise)
        images[:, here] = image = rows @ matrix
        if step < depth:
            rows = image @ matrix.mT
    return basis, images


def _unit(rows: Float[Tensor, "B k m"]) -> Float[Tensor, "B k m"]:
    """Scaled as a whole so that no row is longer than 1."""
    return rows / rows.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _against(rows: Float[Tensor, "B k m"], basis: Float[Tensor, "B d m"]) -> Float[Tensor, "B k m"]:
    """What of the rows is orthogonal to the basis."""
    return rows - (rows @ basis.mT) @ basis


def _new(rows: Float[Tensor, "B k m"], basis: Float[Tensor, "B d m"], precise: torch.dtype) -> Float[Tensor, "B k m"]:
    """Orthonormal rows for what is not in the basis, zero where that is rounding; twice, because once leaves some."""
    first = _orthonormal(_against(rows, basis), LOST, precise)
    rounding = first.square().sum(2, keepdim=True) < 0.5
    return _orthonormal(_against(first.masked_fill(rounding, 0), basis), 0.0, precise)


def _orthonormal(rows: Float[Tensor, "B k m"], lost: float, precise: torch.dtype) -> Float[Tensor, "B k m"]:
    wide = rows.to(precise)
    gram = wide @ wide.mT
    gram.diagonal(dim1=1, dim2=2).add_(lost)
    return torch.linalg.solve_triangular(_factor(gram), wide, upper=False).to(rows.dtype)


def _factor(gram: Float[Tensor, "B d d"]) -> Float[Tensor, "B d d"]:
    """Cholesky's factor, with ones for rows that are zero."""
    lengths = gram.diagonal(dim1=1, dim2=2)
    lengths.add_((lengths == 0).to(lengths))
    return torch.linalg.cholesky_ex(gram).L
