"""What moves the weights, ``optimizer.kind``, and its state as plain tensors, for a checkpoint.

``adamw8bit`` keeps both moments in 8 bits, with a scale per 256 numbers and one table of 256 values (arXiv 2110.02861),
for weights of 4096 numbers or more; smaller ones have the float32 moments of ``adamw``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.options import OptimizerKind, OptimizerOptions
from vipo.pretrained import quiet
from vipo.sharding import spread_like
from vipo.zero import ZeroOptimizer

COUNT = "step"  # the slot that counts steps
TABLES = ("qmap1", "qmap2")  # what the 256 codes of each moment stand for


def build(options: OptimizerOptions, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a recipe on ``parameters``.

    Raises:
        UserError: its library is not installed.
    """
    made: torch.optim.Optimizer = _class(options.kind)(
        parameters, lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
    )
    return made


def _class(kind: OptimizerKind) -> Any:
    if kind == "adamw":
        return torch.optim.AdamW
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"optimizer.kind={kind} needs bitsandbytes, which is not installed: pip install 'vipo[bitsandbytes]', or"
            " take optimizer.kind=adamw"
        )
    with quiet("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit
    return AdamW8bit


def state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What the optimiser remembers, cut as the weights are, under flat names: ``<parameter>|<slot>``."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.slots(parameters)
    return {
        f"{name}|{slot}": _tensor(slot, value)
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def _tensor(slot: str, value: Any) -> Tensor:
    """A slot as a tensor of its own: bitsandbytes counts in whole numbers, and all weights share its tables."""
    if not isinstance(value, Tensor):
        return torch.tensor(value)
    return value.detach().clone() if slot in TABLES else value.detach()


def restore(optimizer: Any, parameters: Mapping[str, nn.Parameter], slots: Mapping[str, Tensor]) -> None:
    """Put back what :func:`state` gave, made whole, once the weights are back."""
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.adopt()
        optimizer.restore(parameters, slots)
        return
    order, found = list(parameters), dict[str, dict[str, Any]]()
    for key, value in slots.items():
        name, slot = key.rsplit("|", 1)
        found.setdefault(name, {})[slot] = _slot(slot, value, parameters[name])
    packed = optimizer.state_dict()
    packed["state"] = {order.index(name): slots_of for name, slots_of in found.items()}
    optimizer.load_state_dict(packed)


def _slot(slot: str, value: Tensor, parameter: nn.Parameter) -> Any:
    """A slot as the optimiser has it: where its parameter is, and spread like it if it has that shape."""
    if slot == COUNT:
        return value if value.is_floating_point() else int(value)
    return (spread_like(value, parameter) if value.shape == parameter.shape else value).to(parameter.device)
