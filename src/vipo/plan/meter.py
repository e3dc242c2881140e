"""How many bytes are alive at worst, and how many floating-point operations are done by how many operators,
while some code runs.

Every operator that PyTorch dispatches is seen: storages that it creates count from then on until they are freed. What
was there before (weights, inputs) does not count. Nothing depends on values, so tensors without storage will do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

READ = torch.ops.aten._local_scalar_dense.default
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Meter(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        known: tensors that are there already.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.operators = 0
        self._seen = {id(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is READ and isinstance(args[0], FakeTensor) and args[0].dtype is torch.bool:
            return False  # a guard asks whether any value is wrong: there are no values
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        self.flops += _flops(func, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # PyTorch keeps the object for as long as the storage itself
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = func.overloadpacket
    if packet is CPU_ATTENTION:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is CPU_ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


# What CUDA's autocast runs in float32 and the CPU's does not, of the functions that these networks call.
# https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-autocast-to-float32
IN_FLOAT32 = ("layer_norm", "group_norm", "softmax")


@contextmanager
def cuda_casts() -> Iterator[None]:
    """Inside, the CPU's autocast also casts what CUDA's would.

    The functions themselves are exchanged, because a ``TorchFunctionMode`` is left while checkpoints are recomputed.
    """
    before = {name: getattr(F, name) for name in IN_FLOAT32}
    for name, function in before.items():
        setattr(F, name, _in_float32(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(tensor.float() if torch.is_autocast_enabled("cpu") else tensor, *args, **kwargs)

    return widened
