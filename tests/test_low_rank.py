"""The LoRA layer: PEFT's numbers on a float32 base; on a half-precision one its product, rounded less, and faster."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from vipo.low_rank import LowRank
from vipo.policy import Policy


def layers(dtype: torch.dtype, alpha: float = 8.0) -> tuple[nn.Module, nn.Module, Tensor]:
    """Ours and PEFT's on one base with equal weights, and an input."""
    made = []
    for own in (True, False):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 48)).to(dtype).requires_grad_(False)
        if own:
            policy = Policy.lora(network, rank=4, alpha=alpha, targets="0", seed=0)
        else:
            inject_adapter_in_model(LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"]), network)
            policy = Policy(network, is_lora=True)
        with torch.no_grad():
            for name, parameter in policy.parameters.items():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
        made.append(network)
    return made[0], made[1], torch.randn(2, 10, 64).to(dtype)


def answer(network: nn.Module, x: Tensor, *, autocast: bool) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = network(x)
    y.float().square().mean().backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert x.grad is not None
    return y, [*grads, x.grad]


@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_float32_base_every_bit_is_pefts(autocast: bool) -> None:
    ours, theirs, x = layers(torch.float32)
    (y, grads), (expected, expected_grads) = (answer(n, x, autocast=autocast) for n in (ours, theirs))
    assert torch.equal(y, expected)
    assert all(torch.equal(one, other) for one, other in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_half_precision_base_values_and_gradients_are_those_of_float32(autocast: bool) -> None:
    ours, _, x = layers(torch.bfloat16)
    exact, _, _ = layers(torch.bfloat16)
    y, grads = answer(ours, x, autocast=autocast)
    expected, expected_grads = answer(exact.float(), x.float(), autocast=False)
    assert y.dtype == torch.bfloat16 and grads[0].dtype == torch.float32
    for one, other in zip([y, *grads], [expected, *expected_grads], strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()  # bfloat16 has 8 bits: 0.4 % a rounding


@pytest.mark.parametrize("autocast", [False, True])
def test_the_answer_does_not_depend_on_grad_mode(autocast: bool) -> None:
    ours, _, x = layers(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        sampled = ours(x)
    assert torch.equal(sampled, answer(ours, x, autocast=autocast)[0])


class Casts(TorchDispatchMode):
    """Elements that were cast up to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.up = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.float32:
            self.up += out.numel()
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_no_input_is_cast_up(autocast: bool) -> None:
    ours, theirs, x = layers(torch.bfloat16)
    counts = []
    for network in (ours, theirs):
        with Casts() as casts, torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            network(x)
        counts.append(casts.up)
    assert counts[0] == 0 and counts[1] >= x.numel()


def test_a_disabled_adapter_leaves_the_base_alone() -> None:
    ours, _, x = layers(torch.bfloat16)
    layer = ours[0]  # type: ignore[index]
    assert isinstance(layer, LowRank)
    layer.enable_adapters(False)
    assert torch.equal(ours(x), layer.base_layer(x))


def test_a_policy_puts_it_on_every_layer_it_names(model_folder: Any) -> None:
    model = tiny.generator(model_folder)
    tiny.lora(model)
    found = [module for module in model.network.modules() if hasattr(module, "lora_A")]
    assert found and all(isinstance(module, LowRank) for module in found)
