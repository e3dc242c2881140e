"""Whole tensors out of shards and back, and a sharded network's blocks. What is not sharded passes through unchanged.

Nothing is a shard before somebody has imported what makes one, and that import takes a second: so it is looked up, not
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def _known(module: str, name: str) -> Any:
    """A class of torch's, or None while nobody has imported it."""
    return getattr(sys.modules.get(module), name, None)


def is_sharded(tensor: Tensor) -> bool:
    kind = _known("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def wrapped_blocks(network: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers one at a time: instances of the classes that a diffusers model names as not to be split."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    return [module for module in network.modules() if type(module).__name__ in names]


def _units(network: nn.Module) -> list[Any]:
    """The modules that FSDP2 has wrapped."""
    kind = _known("torch.distributed.fsdp", "FSDPModule")
    return [] if kind is None else [module for module in network.modules() if isinstance(module, kind)]


def settle(network: nn.Module) -> None:
    """Let a sharded network hold its shards: after a forward pass FSDP2 keeps some weights gathered, as copies."""
    for module in _units(network):
        module.reshard()


@contextmanager
def under_own_name(network: nn.Module) -> Iterator[None]:
    """Inside, a module that FSDP2 has wrapped is of its own class again: diffusers writes the class's name to disk."""
    renamed = [(module, type(module)) for module in _units(network)]
    for module, wrapper in renamed:
        module.__class__ = wrapper.__bases__[1]  # (FSDPModule, the class itself)
    try:
        yield
    finally:
        for module, wrapper in renamed:
            module.__class__ = wrapper


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on this process. Of a sharded one every process of its mesh must ask at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole ``value`` cut as ``like`` is cut; on the device of ``like``. Every process has the whole of it."""
    if is_sharded(value) or not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def cut_in_rows(tensor: Tensor) -> bool:
    """Whether a sharded tensor is cut along its first dimension, over all processes in their order."""
    placements = tensor.placements  # type: ignore[attr-defined]
    return len(placements) == 1 and placements[0].is_shard(0)
