"""Whole tensors out of shards and back, and a sharded network's blocks. What is not sharded passes through unchanged.

Two kinds of shards: FSDP2's ``DTensor``, and what DeepSpeed's ZeRO-3 leaves of a parameter, an empty tensor with an
equal part of its numbers, in one row and filled up at the end, beside it (``ds_tensor``).

Nothing is a shard before somebody has imported what makes one, and that import takes a second: so it is looked up, not
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
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
    """Let a sharded network hold its shards: after a forward pass some weights stay gathered, as copies."""
    for module in _units(network):
        module.reshard()
    for parameter in network.parameters():
        if _is_emptied(parameter) and parameter.numel():
            parameter.partition()  # type: ignore[attr-defined]


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


def _is_emptied(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has left a part of it."""
    return hasattr(tensor, "ds_tensor")


def is_whole(tensor: Tensor) -> bool:
    return not is_sharded(tensor) and not _is_emptied(tensor)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Of all of a tensor."""
    return tuple(tensor.ds_shape if _is_emptied(tensor) else tensor.shape)  # type: ignore[attr-defined]


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All of a tensor on this process. Of a sharded one every process of its mesh must ask at the same time.

    Args:
        like: the parameter that ``tensor`` is a copy of this process's part of; None is itself.
    """
    like = tensor if like is None else like
    if _is_emptied(like):
        return _gathered(own_part(tensor), like)
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _gathered(part: Tensor, like: Any) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)[: like.ds_numel].view(like.ds_shape)


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a parameter, to copy, to change in place and to compute with; not a copy."""
    return tensor.ds_tensor.detach() if _is_emptied(tensor) else tensor.detach()  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, as a plain tensor."""
    return tensor.to_local() if is_sharded(tensor) else own_part(tensor)  # type: ignore[attr-defined]


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole ``value`` cut as ``like`` is cut; on the device of ``like``. Every process has the whole of it."""
    if _is_emptied(like):
        return _filled_part(value, like)
    if is_sharded(value) or not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def _filled_part(value: Tensor, like: Any) -> Tensor:
    part = torch.zeros_like(like.ds_tensor)
    begin = torch.distributed.get_rank() * part.numel()
    here = value.flatten()[begin : begin + part.numel()]
    part[: here.numel()].copy_(here)
    return part


def stored(tensor: Tensor, like: Tensor) -> Tensor:
    """What a checkpoint takes of a process's part of a parameter ``like``: cut along its first dimension, or whole."""
    return in_rows(whole(tensor, like)) if _is_emptied(like) else own_part(tensor)


def in_rows(value: Tensor) -> Tensor:
    """A whole ``value``, which every process has, cut along its first dimension; nothing of it is kept alive."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    cut = distribute_tensor(value, _world(value.device.type), [Shard(0)], src_data_rank=None)
    own = cut.to_local().clone()
    return DTensor.from_local(own, cut.device_mesh, cut.placements, shape=cut.shape, stride=cut.stride())


@cache
def _world(device: str) -> Any:
    """All processes in one row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (torch.distributed.get_world_size(),))


def cut_in_rows(tensor: Tensor) -> bool:
    """Whether a sharded tensor is cut along its first dimension, over all processes in their order."""
    placements = tensor.placements  # type: ignore[attr-defined]
    return len(placements) == 1 and placements[0].is_shard(0)
