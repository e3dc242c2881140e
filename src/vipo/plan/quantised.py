"""Stand-ins for quantised layers: tensors of the sizes that the libraries keep, and the temporaries that they make.

A plan must not need a library or a GPU, so the layers are not the libraries' own; what they hold and do is, by their
source (bitsandbytes 0.50, torchao 0.18) and by a test that compares them with trained models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipo.generators import quantization
from vipo.options import Quantization

NF4_BLOCK = 64  # weights that share a float32 scale


class Stored(nn.Linear):
    """A frozen linear layer in fewer bits; called, it makes its weight whole, multiplies and forgets it or not."""

    scale: Tensor  # of int8 and float8

    def __init__(self, layer: nn.Linear, kind: Quantization, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.bias, self.dtype, device = layer.bias, dtype, layer.weight.device
        for name, size, dtype in _held(layer, kind):
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype, device=device), False))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = PRODUCTS[self.kind](self, x)
        return made


class Forgotten(torch.autograd.Function):
    """A product with a weight that is made again for the backward, instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
        ctx.size = size
        ctx.save_for_backward(packed)
        return F.linear(x, packed.new_empty(size, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,) = ctx.saved_tensors
        return gradient @ packed.new_empty(ctx.size, dtype=gradient.dtype), None, None, None


def _nf4(layer: Stored, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # one operator of the library's, in its own dtype
        size = (layer.out_features, layer.in_features)
        made: Tensor = Forgotten.apply(x.to(layer.dtype), layer.weight, layer.bias, size)
    return made.to(x.dtype)


def _int8(layer: Stored, x: Tensor) -> Tensor:
    """What comes out is scaled, so the weight is only cast."""
    made = torch.mm(x.reshape(-1, layer.in_features), layer.weight.t().to(x.dtype))
    made = (made * layer.scale.flatten().to(made.dtype)).reshape(*x.shape[:-1], layer.out_features)
    return (made if layer.bias is None else made + layer.bias).to(x.dtype)


def _float8(layer: Stored, x: Tensor) -> Tensor:
    made = torch.matmul(x, (layer.weight.to(layer.dtype) * layer.scale.to(layer.dtype)).t())
    return made if layer.bias is None else made + layer.bias


def _float8_storage(layer: Stored, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(layer.dtype)
    return F.linear(x, layer.weight.to(layer.dtype), bias)


PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nf4": _nf4,
    "int8": _int8,
    "float8": _float8,
    "float8_storage": _float8_storage,
}


def _held(layer: nn.Linear, kind: Quantization) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """What is kept of a weight: name, size and dtype."""
    numbers, rows, whole = layer.weight.numel(), (layer.out_features, 1), (layer.out_features, layer.in_features)
    if kind == "nf4":
        blocks = -(-numbers // NF4_BLOCK)
        return [("weight", (-(-numbers // 2), 1), torch.uint8), ("absmax", (blocks,), torch.float32)]
    if kind == "int8":
        return [("weight", whole, torch.int8), ("scale", rows, torch.float32), ("zero_point", rows, torch.int8)]
    scale = [("scale", rows, torch.float32)] if kind == "float8" else []
    return [("weight", whole, quantization.STORED), *scale]


def quantise(network: nn.Module, kind: Quantization, dtype: torch.dtype) -> None:
    """Do to a network without weights what loading it quantised does to one with them."""
    if kind == "none":
        return
    names = quantization.layers(network, kind, dtype)
    if kind == "float8_storage":
        quantization.store_in_float8(network, dtype)
        names = [name for name, m in network.named_modules() if isinstance(m, nn.Linear) and _is_stored(m)]
    for name in names:
        network.set_submodule(name, Stored(network.get_submodule(name), kind, dtype))  # type: ignore[arg-type]


def _is_stored(layer: nn.Linear) -> bool:
    return layer.weight.dtype is quantization.STORED
