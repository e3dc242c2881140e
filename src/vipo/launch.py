"""How a launcher started us against what the engine sees: refused before anything is written if they differ."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list

from vipo.types import UserError

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


def open_engine(precision: str) -> Accelerator:
    """Accelerate as the launcher set it up, with this autocast.

    Raises:
        UserError: it would not train what the launcher promised, see :func:`check_engine`, or this machine does not
            compute in that precision.
    """
    _check_not_sharded(None)  # the plugin of a library that is missing raises on its own
    accelerator = _accelerator(precision)
    check_engine(accelerator)
    return accelerator


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


def check_engine(accelerator: Accelerator) -> None:
    """Hold the engine against the launcher's environment.

    Raises:
        UserError: the launcher started more or fewer processes than the engine knows of, or asks for sharding.
    """
    _check_not_sharded(accelerator.distributed_type)
    counts = {name: int(os.environ[name]) for name in WORLD_SIZES if os.environ.get(name, "").isdigit()}
    wrong = [name for name, count in counts.items() if count != accelerator.num_processes]
    if wrong:
        raise UserError(_alone(wrong[0], counts[wrong[0]], accelerator))


def _check_not_sharded(kind: DistributedType | None) -> None:
    asked = [name for name, switch in SHARDING.items() if os.environ.get(switch, "").lower() in ("1", "true")]
    if kind in SHARDED:
        asked.append(SHARDED[kind])
    if asked:
        raise UserError(
            f"{asked[0]} shards the weights, which vipo cannot train, checkpoint or export yet; start it without the"
            " plugin (torchrun, or accelerate launch --multi_gpu), one whole copy of the weights per process"
        )


def _alone(name: str, count: int, accelerator: Accelerator) -> str:
    """What is wrong and how to start it instead; ``accelerate launch --cpu`` starts one process, so it is no advice."""
    how = (
        f"on a CPU use `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node {count} -m vipo.cli ...`"
        if accelerator.device.type == "cpu"
        else f"use `torchrun --nproc_per_node {count} -m vipo.cli ...` or `accelerate launch --multi_gpu`"
    )
    return (
        f"{name}={count} in the environment says that {count} processes were started, but the engine counts"
        f" {accelerator.num_processes}, so each would train for itself into the same folder; {how}, or unset {name} for"
        " one process"
    )


def agreed(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What ``decide`` returns on the main process, on every process; so is what it refuses."""
    if accelerator.num_processes == 1:
        return decide()
    told: list[Any] = [None, None]
    caught: Exception | None = None
    if accelerator.is_main_process:
        try:
            told[0] = decide()
        except (UserError, OSError) as error:
            told[1], caught = str(error), error
    broadcast_object_list(told)
    if told[1] is not None:
        raise caught or UserError(told[1])
    decided: T = told[0]
    return decided
