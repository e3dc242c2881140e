"""What a part of the user's own gives back, checked where it is given: a wrong answer names the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vipo.errors import UserError
from vipo.user_file import Kind


def checked(
    kind: Kind, name: str, given: Any, shapes: Sequence[tuple[int | None, ...]], said: str, *, finite: bool = True
) -> Tensor:
    """The answer, if it is a finite tensor of one of these shapes; None in one stands for any length.

    Args:
        said: the shapes for a message, "(N, T, H, W)"; their lengths are added where they are known.
        finite: False leaves the numbers alone, and so waits for no accelerator.

    Raises:
        UserError: it is not.
    """
    expected = f"{said}, here {' or '.join(_spelled(shape) for shape in shapes)}"
    if not isinstance(given, Tensor) or not given.is_floating_point():
        what = f"a tensor of {given.dtype}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise UserError(f"{kind.what} {name!r} returned {what}; return a tensor of real numbers {expected}")
    if not any(_fits(tuple(given.shape), shape) for shape in shapes):
        raise UserError(f"{kind.what} {name!r} returned the shape {tuple(given.shape)}; return {expected}")
    if finite and not bool(given.isfinite().all()):
        raise UserError(f"{kind.what} {name!r} returned numbers that are not finite; return finite ones {expected}")
    return given


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))


def _spelled(shape: tuple[int | None, ...]) -> str:
    lengths = ", ".join("any" if length is None else str(length) for length in shape)
    return f"({lengths},)" if len(shape) == 1 else f"({lengths})"


def not_negative(kind: Kind, name: str, given: Tensor) -> Tensor:
    """The same.

    Raises:
        UserError: a number is below 0.
    """
    if bool((given < 0).any()):
        least = float(torch.min(given))
        raise UserError(
            f"{kind.what} {name!r} returned {least:g} at a position; a weight below 0 would punish what was rewarded,"
            " and is cut where sources are multiplied: return numbers of 0 or more"
        )
    return given
