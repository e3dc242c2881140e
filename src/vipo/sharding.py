"""Whole tensors out of shards and back. A tensor that is not sharded passes through unchanged.

Nothing is a shard before somebody has imported what makes one, and that import takes a second: so it is looked up, not
imported.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def _known(module: str, name: str) -> Any:
    """A class of torch's, or None while nobody has imported it."""
    return getattr(sys.modules.get(module), name, None)


def is_sharded(tensor: Tensor) -> bool:
    kind = _known("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def settle(network: nn.Module) -> None:
    """Let a sharded network hold its shards: after a forward pass FSDP2 keeps some weights gathered, as copies."""
    kind = _known("torch.distributed.fsdp", "FSDPModule")
    for module in network.modules() if kind is not None else ():
        if isinstance(module, kind):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on this process. Of a sharded one every process of its mesh must ask at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole ``value`` cut as ``like`` is cut; on the device of ``like``."""
    if is_sharded(value) or not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    here = value.to(like.device)
    return distribute_tensor(here, like.device_mesh, like.placements)  # type: ignore[attr-defined]
