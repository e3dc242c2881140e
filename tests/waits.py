"""Where the host would wait for an accelerator, found on a CPU: what is read off, or sent blocking, by line of code.

Nothing waits on a CPU, so tensors are followed from the network's parameters, the generator's own tensors and what is
made with ``device=``: what is computed from one of them would be on the accelerator. A call that turns such a tensor
into a Python value, or whose result has a size that depends on its values, waits; so does moving a tensor of the host
there without ``non_blocking``, and taking rows of one there by an index on the host.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

READS = {
    f"torch.Tensor.{name}"
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__")
} | {f"torch.{name}" for name in ("equal", "allclose", "is_nonzero")}
SIZED_BY_VALUES = {"nonzero", "unique", "masked_select", "argwhere", "unique_consecutive", "equal", "bincount"}


class Waits(TorchFunctionMode):
    """Counts waits as ``file.py:function``, within the modules of vipo."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.there: dict[int, Tensor] = {}  # kept alive, so that no id is used again
        self.sent: dict[int, Tensor] = {}
        self._follow([*generator.network.parameters(), *generator.network.buffers()])
        self._follow([value for value in vars(generator).values() if isinstance(value, Tensor)])

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if id(tensor) in self.there]
        name = str(resolve_name(func) or func)
        if (there and self._reads(name, args)) or self._sends(name, args, kwargs or {}, there):
            self.found[_caller()] += 1
        result = func(*args, **(kwargs or {}))
        if name == "torch.Tensor.cpu":
            return result.clone()  # here it is the same tensor, which would be followed on
        if name == "torch.Tensor.to" and (kwargs or {}).get("non_blocking"):
            result = result.clone()  # so it is here, where a row's number may be sent to either side
            self.sent[id(result)] = result
        made_there = not given and (kwargs or {}).get("device") is not None
        if there or made_there:
            self._follow([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result

    def _follow(self, tensors: Sequence[Tensor]) -> None:
        self.there.update({id(tensor): tensor for tensor in tensors})

    def _reads(self, name: str, args: Sequence[Any]) -> bool:
        by_mask = name.endswith(("__getitem__", "__setitem__")) and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        return name in READS or name.rpartition(".")[2] in SIZED_BY_VALUES or by_mask

    def _sends(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], there: Sequence[Tensor]) -> bool:
        if name.endswith(("__getitem__", "__setitem__")) and there and id(args[0]) in self.there:
            return any(
                isinstance(leaf, Tensor) and id(leaf) not in self.there | self.sent for leaf in tree_leaves(args[1])
            )
        if name == "torch.tensor" or name == "torch.as_tensor":
            return kwargs.get("device") is not None and not isinstance(args[0], Tensor)
        to_device = [*args[1:], kwargs.get("device")]
        moves = any(isinstance(value, torch.device | str) for value in to_device)
        return name == "torch.Tensor.to" and moves and not there and not kwargs.get("non_blocking")


@contextmanager
def counted(generator: Any) -> Any:
    """Inside, waits are counted."""
    mode = Waits(generator)
    with mode:
        yield mode.found


def _caller() -> str:
    """The nearest function of the package that asked."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "vipo" in file.parts and "site-packages" not in file.parts:
            return f"{file.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
