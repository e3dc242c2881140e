"""What one pass through the network costs: bytes alive at worst, and floating-point operations, measured by doing it.

The functions that run are the trainer's own: :func:`vipo.rollout.policy_step` samples, the loss asks and costs,
``decode_part`` decodes. Only the tensors have no storage.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vipo.plan.blueprint import Blueprint, conditioning
from vipo.plan.meter import Meter, cuda_casts
from vipo.rollout import policy_step, sigmas_of
from vipo.types import Batched, Prompt, Rollout, Transitions


@dataclass(frozen=True)
class Cost:
    """Of one pass: ``bytes`` alive at worst beside weights, gradients and inputs, ``flops``, ``operators`` called."""

    bytes: int
    flops: int
    operators: int = 0


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
    """``batch`` rows of the loss forward and backward; the gradients they are added to are there already."""
    loss, recorded = drawn.loss, _rows(drawn, batch)
    with drawn.mode:
        encoded = conditioning(drawn.generator, batch)
        grid = () if drawn.recipe.credit == "sample" else drawn.generator.latent_shape()[1:]
        for parameter in drawn.policy.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        _warm(drawn)

        def update() -> None:
            answer = loss.ask(drawn.generator, encoded.take(recorded.sample), recorded)
            weight = torch.ones(batch, *grid)  # the credit's, which is worked out for each batch
            loss.cost(answer, recorded, weight).loss.backward()

        return _measure(update, [*_held(drawn), *_tensors(encoded), *_tensors(recorded)], like_cuda)


def row_bytes(drawn: Blueprint) -> int:
    """Of one row of the loss, without the few single numbers of it."""
    tensors = [tensor for tensor in _tensors(_one_sample(drawn)) if tensor.ndim > 1]
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)


def _rows(drawn: Blueprint, batch: int) -> Any:
    """As many rows as a batch has, without storage."""
    one = _one_sample(drawn)
    with drawn.mode:
        empty = type(one)(**{f.name: drawn.mode.from_tensor(getattr(one, f.name)) for f in fields(one)})
        return empty.take(torch.zeros(batch, dtype=torch.long))


def _one_sample(drawn: Blueprint) -> Any:
    """The loss's own rows of one sample. It is a real one, because a loss may look at the numbers that it draws."""
    loss, generator = drawn.loss, drawn.generator
    latents, sigma, index = torch.zeros(1, *generator.latent_shape()), torch.full((1,), 0.5), torch.tensor([0])
    mean = latents if loss.keep_mean else latents[:, :0]
    recorded = Transitions(index, index, sigma, sigma / 2, latents, latents, latents[:, 0], mean)
    media, sigmas = torch.zeros(1, 3, 1, 1, 1), sigmas_of(drawn.solver, generator)
    sample = Rollout((Prompt(""),), 1, Batched(), latents, media, recorded, model_passes=0, sigmas=sigmas)
    return loss.rows(sample, seed=0, iteration=0)


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
    return Cost(meter.peak, meter.flops, meter.operators)


def _latents(drawn: Blueprint, batch: int) -> Tensor:
    return torch.zeros(batch, *drawn.generator.latent_shape())


def _warm(drawn: Blueprint) -> None:
    """What is computed once and kept: the encoded negative prompt."""
    if drawn.generator.is_guided:
        drawn.generator.negative_row  # noqa: B018 - a cached property


def _held(drawn: Blueprint) -> list[Tensor]:
    """Tensors that are there before any pass."""
    parameters = list(drawn.network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [*parameters, *gradients, *drawn.network.buffers()]


def _tensors(record: Batched) -> list[Tensor]:
    return [value for value in vars(record).values() if isinstance(value, Tensor)]
