"""Random draws that depend on what they are for, never on when they are made.

Each draw is a function of (seed, purpose, indices). So a resumed run, another batch size or another number of processes
sees the very same noise, and two arms of a comparison share theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator for one draw. Always on the CPU, so that every device sees the same numbers."""
    key = ":".join([str(seed), purpose, *map(str, indices)])
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(
    shape: tuple[int, ...], keys: Iterable[tuple[int, ...]], *, seed: int, purpose: str
) -> Float[Tensor, "N ..."]:
    """Standard normal noise, one row of ``shape`` per key; rows with equal keys are equal."""
    drawn: dict[tuple[int, ...], Tensor] = {}
    keys = list(keys)
    for key in keys:
        if key not in drawn:
            drawn[key] = torch.randn(shape, generator=generator(seed, purpose, *key))
    return torch.stack([drawn[key] for key in keys])


def permutation(size: int, *, seed: int, purpose: str, indices: tuple[int, ...] = ()) -> list[int]:
    """A random order of range(size)."""
    return torch.randperm(size, generator=generator(seed, purpose, *indices)).tolist()


def integer(low: int, high: int, *, seed: int, purpose: str, indices: tuple[int, ...] = ()) -> int:
    """A whole number in [low, high)."""
    return int(torch.randint(low, high, (), generator=generator(seed, purpose, *indices)))
