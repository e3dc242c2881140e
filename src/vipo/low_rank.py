"""A LoRA layer that computes in its base's half precision, from float32 weights: y = W x + s B (A x).

PEFT's own layer casts its input up to the adapter's dtype. Without autocast A and B then multiply in float32 at a
multiple of the base's cost; under autocast, which casts back down, that is two passes over every input for nothing.
Here it is the small A and B that are cast, at every call, and the sum is one with the second product (``addmm``), which
rounds once where PEFT rounds three times. The gradient arrives in the float32 weights.

A float32 base keeps PEFT's order of operations, so that its numbers stay the same bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class LowRank(Linear):  # type: ignore[misc]
    """PEFT's ``lora.Linear`` with one adapter, no dropout and no variant, as ``Policy.lora`` makes it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.name = adapter_name
        # Under autocast PEFT would cast each input up to the adapter's float32 and autocast straight back down.
        self.cast_input_dtype_enabled = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = self.base_layer.weight
        dtype = weight.dtype if weight.is_floating_point() else x.dtype  # a quantised one works in its input's
        if self.disable_adapters or dtype == torch.float32:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        x = x.to(dtype)  # under autocast a norm before it gave float32: once for the base and for A
        base = self.base_layer(x, *args, **kwargs)
        down, up = self.lora_A[self.name].weight.to(dtype), self.lora_B[self.name].weight.to(dtype)
        inner = F.linear(x, down).flatten(0, -2)
        return torch.addmm(base.flatten(0, -2), inner, up.t(), alpha=self.scaling[self.name]).view_as(base)
