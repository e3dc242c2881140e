"""DeepSpeed's ZeRO-2 and ZeRO-3: the only file that knows DeepSpeed. What lies where is :mod:`vipo.sharding`'s to know.

DeepSpeed is used without Accelerate's wrapper of it, whose ``backward`` also steps: here a gradient is looked at first,
and its step is taken or the gradient dropped. Neither stage casts weights: they are float32 where they are trained, as
everywhere else, and autocast casts them.

Both stages keep what an optimiser works on, float32 weights and moments, in flat tensors of which each process has a
part (arXiv 1910.02054); :func:`_piece` says where in them a weight is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.options import BUCKET
from vipo.sharding import in_rows, shape_of

COUNT = "step"  # the slot that counts steps, one for a whole flat tensor
INVALID = -1.0  # what DeepSpeed says of a norm that is not finite


class Piece(NamedTuple):
    """Where this process has some of a weight's numbers."""

    flat: Tensor
    at: int  # in ``flat``
    begin: int  # in the weight
    size: int


class ZeroOptimizer:
    """An optimiser whose state, and with stage 3 whose weights, are cut over processes; and the network it trains.

    Args:
        network: with stage 3 it is left with parts of its weights.
        optimizer: of its trained parameters, elementwise.
        stage: 2 cuts gradients and what the optimiser remembers, 3 the weights too.
        timeout: seconds that processes wait for each other.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, *, stage: int, timeout: float) -> None:
        check_installed(stage)
        import deepspeed

        self.stage = stage
        own = {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 0,  # small weights would stay whole, copies that nobody puts right
            "stage3_max_reuse_distance": 0,  # nor does any other stay for a later layer: the plan counts on it
        }
        config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": own}
        self.network, self._zero, _, _ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        for group in _groups(self._zero, stage):
            torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._zero.param_groups
        return groups

    @property
    def flats(self) -> list[Tensor]:
        """What the optimiser works on, this process's parts of it."""
        name = "single_partition_of_fp32_groups" if self.stage == 2 else "fp32_partitioned_groups_flat"
        return list(getattr(self._zero, name))

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Add to the gradient.

        Args:
            last: before its step.
        """
        self.network.set_gradient_accumulation_boundary(last)
        self.network.backward(loss)

    def clip(self, max_norm: float) -> Float[Tensor, ""]:
        """The gradient's norm over all processes; the step will clip it to ``max_norm``."""
        self._zero.clip_grad = max_norm
        norms = [self._zero.scaled_global_norm()] if self.stage == 2 else self._zero._get_norm_groups()
        of_groups = torch.stack([torch.as_tensor(norm) for norm in norms])
        return of_groups.norm().where((of_groups != INVALID).all(), math.nan).float()

    def step(self) -> None:
        self.network.step()

    def zero_grad(self) -> None:
        """Drop the gradient, taken or not."""
        self._zero.zero_grad()
        if self.stage == 2:
            for number in self._zero.averaged_gradients:
                self._zero.averaged_gradients[number] = self._zero.all_grad_tensors[number] = None
            self._zero._release_preflattened_grad_buffers()
            self._zero.micro_step_id = -1
        else:
            self._zero.averaged_gradients = {}

    def peaks(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The largest absolute value of each gradient, over all processes; NaN if one is in there."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter).abs().max() for name, parameter in parameters.items()}

    def adopt(self) -> None:
        """Take the network's weights, which somebody has written, for the optimiser's own."""
        self._zero.refresh_fp32_params()

    def slots(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What the optimiser remembers of each weight, cut along its first dimension, as ``<parameter>|<slot>``."""
        states = [self._zero.optimizer.state.get(flat, {}) for flat in self.flats]
        found = {}
        for slot in states[0]:
            for name, parameter in parameters.items():
                is_count = slot == COUNT
                found[f"{name}|{slot}"] = states[0][slot].clone() if is_count else in_rows(self._whole(parameter, slot))
        return found

    def restore(self, parameters: Mapping[str, nn.Parameter], slots: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`slots` gave, made whole."""
        for flat in self.flats if slots else []:
            self._zero.optimizer.state[flat] = {}
        for key, value in slots.items():
            name, slot = key.rsplit("|", 1)
            for flat in self.flats:
                state = self._zero.optimizer.state[flat]
                state.setdefault(slot, value.clone() if slot == COUNT else torch.zeros_like(flat))
            piece = None if slot == COUNT else self._piece(parameters[name])
            if piece is not None:
                part = value.flatten()[piece.begin : piece.begin + piece.size]
                self._zero.optimizer.state[piece.flat][slot][piece.at : piece.at + piece.size].copy_(part)

    def _whole(self, parameter: nn.Parameter, slot: str) -> Tensor:
        """A slot of a weight, whole; every process has to ask."""
        shape = shape_of(parameter)
        found = torch.zeros(math.prod(shape), device=self.flats[0].device)
        piece = self._piece(parameter)
        if piece is not None:
            part = self._zero.optimizer.state[piece.flat][slot][piece.at : piece.at + piece.size]
            found[piece.begin : piece.begin + piece.size] = part
        torch.distributed.all_reduce(found)
        return found.view(shape)

    def _piece(self, parameter: Any) -> Piece | None:
        """Where this process has numbers of a weight; None: it has none of it."""
        if self.stage == 2:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            return Piece(self.flats[mapping.param_group_index], here.start, there.start, there.numel)
        group, at, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        begin = torch.distributed.get_rank() * parameter.ds_tensor.ds_numel
        size = max(0, min(int(size), parameter.ds_numel - begin))  # the last process's part is filled up
        return Piece(self.flats[group], int(at), begin, size) if size else None


def _groups(zero: Any, stage: int) -> list[Any]:
    """Groups of processes that DeepSpeed made, each of which would wait for half an hour."""
    found = list(zero.real_dp_process_group) if stage == 2 else [zero.dp_process_group]
    return [*{id(group): group for group in found if group is not None}.values()]


def check_installed(stage: int) -> None:
    """Raises:
    UserError: DeepSpeed is not there.
    """
    if find_spec("deepspeed") is None:
        raise UserError(
            f"training.sharding=zero{stage} needs DeepSpeed, which is not installed: pip install 'vipo[deepspeed]', or"
            " take training.sharding=fsdp2, which cuts what ZeRO-3 cuts"
        )
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # none of its compiled parts is used
