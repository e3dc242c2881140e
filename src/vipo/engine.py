"""The only file that knows Accelerate: devices, processes, precision, and what they do to a network and its gradients.

A sharded network holds a part of every weight on each process. So nobody keeps its parameters from before
:meth:`Engine.prepare`, and what leaves a process is made whole by :mod:`vipo.sharding`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from jaxtyping import Float
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.sharding import whole

T = TypeVar("T")

WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun, accelerate, mpirun
SHARDING = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron": "ACCELERATE_USE_MEGATRON_LM",
}
SHARDED = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron",
}


class Engine:
    """Accelerate, as far as the loop needs it, as the launcher set it up.

    Args:
        precision: of autocast, ``no`` or ``bf16``; trained weights stay float32.
        accelerator: one that exists already, instead of a new one.

    Raises:
        UserError: the launcher started more or fewer processes than the engine knows of, or asks for sharding, or this
            machine does not compute in that precision: it is refused before anything is written.
    """

    def __init__(self, *, precision: str = "no", accelerator: Accelerator | None = None) -> None:
        _check_not_sharded(None)  # the plugin of a library that is missing raises on its own
        self.accelerator = accelerator or _accelerator(precision)
        _check_not_sharded(self.accelerator.distributed_type)
        _check_processes(self)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return bool(self.accelerator.is_main_process)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The network under autocast and, with several processes, joined to its copies; and its optimiser."""
        network, optimizer = self.accelerator.prepare(network, optimizer)
        return network, optimizer

    def backward(self, loss: Float[Tensor, ""]) -> None:
        self.accelerator.backward(loss)

    def syncing(self, network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced over processes once per optimiser step, with its last batch."""
        return nullcontext() if last else self.accelerator.no_sync(network)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
        """Clip the gradient to ``max_norm``; what is returned is its norm before, over all shards."""
        norm = self.accelerator.clip_grad_norm_(list(parameters), max_norm)
        return whole(torch.as_tensor(norm, device=self.device).detach())

    def gather(self, values: Tensor) -> Tensor:
        """The rows of every process, in the order of their ranks."""
        return values if self.ranks == 1 else self.accelerator.gather(values)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process; they all get one answer."""
        if self.ranks == 1:
            return flag
        return bool(self.gather(torch.tensor([float(flag)], device=self.device)).any())

    def agreed(self, decide: Callable[[], T]) -> T:
        """What ``decide`` returns on the main process, on every process; so is what it refuses."""
        if self.ranks == 1:
            return decide()
        told: list[Any] = [None, None]
        caught: Exception | None = None
        if self.is_main:
            try:
                told[0] = decide()
            except (UserError, OSError) as error:
                told[1], caught = str(error), error
        broadcast_object_list(told)
        if told[1] is not None:
            raise caught or UserError(told[1])
        decided: T = told[0]
        return decided

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()


def _accelerator(precision: str) -> Accelerator:
    """This process's part of the run.

    Accelerate keeps one state per process and refuses a second precision, so a run in another one begins a new state.
    The group of processes is kept elsewhere and stays; networks prepared before keep the precision they were given.
    """
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # Accelerate has no public way
    try:
        return Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise UserError(f"training.precision={precision} cannot be had on this machine: {error}") from error


def _check_not_sharded(kind: DistributedType | None) -> None:
    asked = [name for name, switch in SHARDING.items() if os.environ.get(switch, "").lower() in ("1", "true")]
    if kind in SHARDED:
        asked.append(SHARDED[kind])
    if asked:
        raise UserError(
            f"{asked[0]} shards the weights, which vipo cannot train, checkpoint or export yet; start it without the"
            " plugin (torchrun, or accelerate launch --multi_gpu), one whole copy of the weights per process"
        )


def _check_processes(engine: Engine) -> None:
    counts = {name: int(os.environ[name]) for name in WORLD_SIZES if os.environ.get(name, "").isdigit()}
    wrong = [name for name, count in counts.items() if count != engine.ranks]
    if wrong:
        raise UserError(_alone(wrong[0], counts[wrong[0]], engine))


def _alone(name: str, count: int, engine: Engine) -> str:
    """What is wrong and how to start it instead; ``accelerate launch --cpu`` starts one process, so it is no advice."""
    how = (
        f"on a CPU use `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node {count} -m vipo ...`"
        if engine.device.type == "cpu"
        else f"use `torchrun --nproc_per_node {count} -m vipo ...` or `accelerate launch --multi_gpu`"
    )
    return (
        f"{name}={count} in the environment says that {count} processes were started, but the engine counts"
        f" {engine.ranks}, so each would train for itself into the same folder; {how}, or unset {name} for one process"
    )
