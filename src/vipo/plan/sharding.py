"""How a network falls into the units that FSDP2 gathers one at a time, and what each process then keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from vipo.sharding import wrapped_blocks


@dataclass(frozen=True)
class Sharding:
    """Parameters of a network by unit.

    Args:
        units: class name of a block -> parameters of each of them.
        outside: parameters in no block; they are gathered for the whole pass.
    """

    units: Mapping[str, tuple[int, ...]]
    outside: int

    @property
    def parameters(self) -> int:
        return sum(sum(sizes) for sizes in self.units.values()) + self.outside

    @property
    def largest(self) -> int:
        """Parameters of the largest block, which are whole on every process while it works."""
        return max((size for sizes in self.units.values() for size in sizes), default=0)

    def bytes_per_rank(self, ranks: int, bytes_each: int) -> int:
        """What a process keeps of ``bytes_each`` per parameter; each unit is cut into ``ranks`` equal parts."""
        sizes = [*(size for unit in self.units.values() for size in unit), self.outside]
        return sum(-(-size // ranks) for size in sizes) * bytes_each


def sharding(network: nn.Module) -> Sharding:
    """The units of a diffusers transformer: the blocks that its class names as not to be split."""
    units: dict[str, list[int]] = {}
    for block in wrapped_blocks(network):
        units.setdefault(type(block).__name__, []).append(sum(p.numel() for p in block.parameters()))
    inside = sum(map(sum, units.values()))
    total = sum(parameter.numel() for parameter in network.parameters())
    return Sharding({name: tuple(sizes) for name, sizes in units.items()}, total - inside)
