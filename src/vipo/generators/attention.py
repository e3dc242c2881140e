"""Which attention a network runs with: ``generator.attention``.

On recent NVIDIA GPUs PyTorch prefers cuDNN's attention. For the networks here its backward gives NaN in bfloat16, and
at FLUX.1-dev's size an illegal memory access (H100, torch 2.11, cuDNN 9.19; its forward is right, and so are the other
kernels both ways). So ``auto`` lets PyTorch choose from anything but cuDNN's. PyTorch keeps that setting for the whole
process: :func:`scope` makes it while a network works, and puts back what the caller had.

A name of diffusers' ``set_attention_backend`` is written into the network instead, for sampling and replay alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vipo.errors import UserError

AUTO = "auto"
EXACT = "_native_math"  # plain matrix products: slower, everywhere the same, and differentiable everywhere
# What a kernel that cannot run here raises, when it is chosen or when it is tried.
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError)
PROBE_TOKENS, PROBE_HEADS, USUAL_WIDTH = 32, 2, 64


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Inside, ``auto`` holds for the whole process; with a named backend PyTorch's settings are left alone.

    Enter it around work that is done at once, never around a ``yield``: what runs between is the caller's.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and name != AUTO)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def check(name: str) -> None:
    """Look a name up in diffusers' list, before anything large is loaded.

    Raises:
        UserError: it is not there, or names attention that has no backward.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [str(entry.value) for entry in AttentionBackendName]
    if name != AUTO and name not in known:
        trainable = ", ".join([AUTO, *(entry for entry in known if not is_inference_only(entry))])
        raise UserError(f"generator.attention={name!r} is not known to diffusers; choose from {trainable}")
    if is_inference_only(name):
        raise UserError(f"generator.attention={name!r} {_NO_BACKWARD}. Take {AUTO} or {EXACT}")


_NO_BACKWARD = "has no backward, so nothing could be trained through it"


def is_inference_only(name: str) -> bool:
    return "sage" in name


def install(network: nn.Module, name: str, *, dtype: torch.dtype, masked: bool = False) -> None:
    """Give every attention of a diffusers network this backend, which must work here in ``dtype``, both ways.

    ``auto`` changes nothing, but diffusers' own default, ``DIFFUSERS_ATTN_BACKEND``, must have a backward as well.

    Args:
        masked: whether the network hides tokens from its attention, as it does the padding of shorter prompts.

    Raises:
        UserError: the backend is unknown, cannot be used here, has no backward or reads what a mask hides, or the
            network takes none.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    check(name)
    default = _AttentionBackendRegistry.get_active_backend()[0]
    chosen, said, instead = name, f"generator.attention={name!r}", f"Take {AUTO} or {EXACT}"
    if name == AUTO:
        chosen, said = str(default.value), f"diffusers' attention backend {default.value!r} (DIFFUSERS_ATTN_BACKEND)"
        instead = f"Unset that variable, or take generator.attention={EXACT}"
        if chosen == "native" or not takes_backend(network):
            return
    elif not takes_backend(network):
        raise UserError(f"{said}: the attention of {type(network).__name__} takes no backend; leave it {AUTO}")
    try:
        network.set_attention_backend(chosen)  # type: ignore[operator]
        problem = _tried(chosen, network, dtype, masked=masked)
    except FAULTS as error:
        raise UserError(f"{said} cannot be trained with here in {dtype}: {_why(error)}. {instead}") from error
    finally:
        _AttentionBackendRegistry.set_active_backend(default)  # diffusers sets it for every other model, too
    if problem is not None:
        raise UserError(f"{said} {problem}. {instead}")


def _why(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _tried(name: str, network: nn.Module, dtype: torch.dtype, *, masked: bool) -> str | None:
    """What is wrong with a backend, found on a few tokens, both ways; for a network that masks also with a mask."""
    if not _all_finite(_gradients(name, network, dtype)):
        return _NO_BACKWARD
    if not masked:
        return None
    needs = f"{type(network).__name__} hides the padding of prompts that are shorter than others"
    try:
        _, *of_keys = gradients = _gradients(name, network, dtype, hidden=PROBE_TOKENS // 4)
    except FAULTS as error:
        return f"takes no mask here ({_why(error)}), but {needs}"
    if not _all_finite(gradients) or any(bool(of[:, -PROBE_TOKENS // 4 :].any()) for of in of_keys if of is not None):
        return f"does not keep to a mask here, but {needs}"
    return None


def _all_finite(gradients: Sequence[torch.Tensor | None]) -> bool:
    return all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def takes_backend(network: nn.Module) -> bool:
    """Whether all of a network's attention goes through diffusers' choice of a backend; that of SD3 does not."""
    found = processors(network)
    return bool(found) and all(hasattr(processor, "_attention_backend") for processor in found)


def processors(network: nn.Module) -> list[Any]:
    """What computes attention in a diffusers network, one for each of its attention layers."""
    return [module.processor for module in network.modules() if hasattr(module, "processor")]


def _gradients(name: str, network: nn.Module, dtype: torch.dtype, hidden: int = 0) -> list[torch.Tensor | None]:
    """Of query, key and value, from tokens of the network's head width, the last ``hidden`` of them masked."""
    config: Any = network.config
    width = config.get("attention_head_dim") or USUAL_WIDTH
    return _through(name, width, next(network.parameters()).device, dtype, hidden)


def _through(
    name: str, width: int, device: torch.device, dtype: torch.dtype, hidden: int = 0
) -> list[torch.Tensor | None]:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    shape = (1, PROBE_TOKENS, PROBE_HEADS, width)
    ramp = torch.linspace(-1, 1, torch.Size(shape).numel(), device=device, dtype=dtype).reshape(shape)
    inputs = [(ramp * scale).requires_grad_() for scale in (1, -1, 0.5)]
    shown = torch.arange(PROBE_TOKENS, device=device) < PROBE_TOKENS - hidden
    mask = shown[None, None, None, :] if hidden else None  # (N, 1, 1, L), as the networks give it
    out = dispatch_attention_fn(*inputs, attn_mask=mask, backend=name)
    if out.requires_grad:
        out.float().square().sum().backward()
    return [tensor.grad for tensor in inputs]


def survey(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Every backend that diffusers knows, and why it cannot be trained with here; empty where it can, tried both ways.

    One whose kernel would first be downloaded from the hub is not tried.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    return {str(entry.value): _verdict(str(entry.value), device, dtype) for entry in AttentionBackendName}


def _verdict(name: str, device: torch.device, dtype: torch.dtype) -> str:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry, _check_attention_backend_requirements

    if is_inference_only(name):
        return "no backward"
    if "_hub" in name:
        return "not tried: its kernel comes from the hub"
    try:
        backend = next(entry for entry in _AttentionBackendRegistry._backends if entry.value == name)
        _check_attention_backend_requirements(backend)
        gradients = _through(name, USUAL_WIDTH, device, dtype)
    except (*FAULTS, StopIteration) as error:
        return _why(error)
    return "" if _all_finite(gradients) else "its gradient is missing or not finite"
