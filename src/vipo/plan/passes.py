"""What one pass through the network costs: bytes alive at worst, and floating-point operations, measured by doing it.

The functions that run are the trainer's own: :func:`vipo.rollout.policy_step` samples, :func:`vipo.rollout.replay` and
the loss train, ``decode_part`` decodes. Only the tensors have no storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vipo.objective import clipped_surrogate
from vipo.plan.blueprint import Blueprint, conditioning
from vipo.plan.meter import Meter, cuda_casts
from vipo.rollout import policy_step, replay
from vipo.types import Batched, Transitions


@dataclass(frozen=True)
class Cost:
    """Of one pass: ``bytes`` alive at worst beside weights, gradients and inputs; ``flops`` of it."""

    bytes: int
    flops: int


def sampling(drawn: Blueprint, batch: int, *, like_cuda: bool = True) -> Cost:
    """One solver step of ``batch`` samples, guidance included."""
    with drawn.mode, torch.no_grad():
        rows, latents, sigma = conditioning(drawn.generator, batch), _latents(drawn, batch), torch.full((batch,), 0.5)
        _warm(drawn)
        return _measure(
            lambda: policy_step(drawn.generator, latents, sigma, sigma / 2, rows, drawn.solver),
            [*_held(drawn), *_tensors(rows), latents],
            like_cuda,
        )


def replaying(drawn: Blueprint, batch: int, *, like_cuda: bool = True) -> Cost:
    """``batch`` transitions forward and backward; the gradients they are added to are there already."""
    reduce, clip_range = drawn.recipe.objective.reduce, drawn.recipe.objective.clip_range
    with drawn.mode:
        rows, latents, sigma = conditioning(drawn.generator, batch), _latents(drawn, batch), torch.full((batch,), 0.5)
        old, index = torch.zeros_like(latents[:, 0]), torch.arange(batch)
        recorded = Transitions(index, index, sigma, sigma / 2, latents, torch.zeros_like(latents), old)
        for parameter in drawn.policy.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        _warm(drawn)

        def update() -> None:
            log_prob, _ = replay(drawn.generator, rows, recorded, drawn.solver, reduce=reduce)
            clipped_surrogate(log_prob, old, torch.ones_like(old), clip_range=clip_range).loss.backward()

        return _measure(update, [*_held(drawn), *_tensors(rows), *_tensors(recorded)], like_cuda)


def decoding(drawn: Blueprint, batch: int, *, like_cuda: bool = True) -> Cost:
    """Clean latents of ``batch`` samples to media, which count."""
    with drawn.mode, torch.no_grad():
        latents = _latents(drawn, batch)
        held = [*drawn.generator.pipeline.vae.parameters(), *drawn.generator.pipeline.vae.buffers(), latents]
        return _measure(lambda: drawn.generator.decode_part(latents), held, like_cuda)


def run(network: nn.Module, forward: Callable[[], Any], *, like_cuda: bool = True) -> Cost:
    """Any other network, without gradient."""
    with torch.no_grad():
        return _measure(forward, [*network.parameters(), *network.buffers()], like_cuda)


def _measure(work: Callable[[], Any], held: list[Tensor], like_cuda: bool) -> Cost:
    with cuda_casts() if like_cuda else nullcontext(), Meter(held) as meter:
        work()
    return Cost(meter.peak, meter.flops)


def _latents(drawn: Blueprint, batch: int) -> Tensor:
    return torch.zeros(batch, *drawn.generator.latent_shape())


def _warm(drawn: Blueprint) -> None:
    """What is computed once and kept: the encoded negative prompt."""
    if drawn.generator.is_guided:
        drawn.generator._negative_row  # noqa: B018 - a cached property


def _held(drawn: Blueprint) -> list[Tensor]:
    """Tensors that are there before any pass."""
    parameters = list(drawn.network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [*parameters, *gradients, *drawn.network.buffers()]


def _tensors(record: Batched) -> list[Tensor]:
    return [value for value in vars(record).values() if isinstance(value, Tensor)]


@contextmanager
def in_dtype(drawn: Blueprint, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the trained weights are of ``dtype``, as FSDP gathers them, instead of float32."""
    trained = drawn.policy.parameters.values()
    for parameter in trained:
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.grad = None
            parameter.data = parameter.data.float()
