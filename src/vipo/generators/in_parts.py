"""Quantised layers as FSDP2 can cut them: what a weight is stored in becomes plain parameters of its layer.

A compiled block needs that too: of inputs that are torchao's tensors AOTAutograd makes no graph whose outputs are views
of one tensor (torch 2.13), as those of FLUX's single blocks are.

torchao's tensors do not know the operators that FSDP2 cuts with (0.18: no ``aten.split``), and Accelerate leaves whole
what is a ``Params4bit`` of integers. Plain integers and their scales are cut and gathered like any other frozen weight;
the layer's ``weight`` is put together from what is gathered at the time, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vipo.generators.quantization import is_quantised
from vipo.options import Quantization

KINDS: tuple[Quantization, ...] = ("nf4", "int8", "float8")  # that can be taken apart
Join = Callable[[Mapping[str, Tensor]], Tensor]


def take_apart(network: nn.Module, *, four_bit: bool = True) -> None:
    """Before FSDP2 cuts it, or blocks are compiled. Called as before, the network computes what it did.

    Args:
        four_bit: nf4 too, which no graph can put together.
    """
    for module in network.modules():
        if is_quantised(module) and (four_bit or is_traceable_wrapper_subclass(module.weight)):
            _take_apart(module)


def _take_apart(layer: nn.Module) -> None:
    parts, join = (_torchao if is_traceable_wrapper_subclass(layer.weight) else _four_bit)(layer.weight)
    del layer.weight
    names = {name: f"weight_{name}" for name in parts}
    for name, part in parts.items():
        layer.register_parameter(names[name], nn.Parameter(part, requires_grad=False))

    def weight(self: nn.Module) -> Tensor:
        return join({name: getattr(self, kept) for name, kept in names.items()})

    layer.__class__ = type(type(layer).__name__, (type(layer),), {"weight": property(weight)})


def _torchao(weight: Any) -> tuple[dict[str, Tensor], Join]:
    names, rest = weight.__tensor_flatten__()
    kind, size, stride = type(weight), weight.shape, weight.stride()
    parts = {name: getattr(weight, name) for name in names}
    return parts, lambda now: kind.__tensor_unflatten__(dict(now), rest, size, stride)


def _four_bit(weight: Any) -> tuple[dict[str, Tensor], Join]:
    from bitsandbytes.nn import Params4bit

    state = weight.quant_state

    def join(now: Mapping[str, Tensor]) -> Tensor:
        state.absmax = now["absmax"]  # an operator that was called keeps the state, and FSDP2 refills what it holds
        made: Tensor = Params4bit(now["packed"], quant_state=state, bnb_quantized=True)
        return made

    return {"packed": weight.data, "absmax": state.absmax}, join
