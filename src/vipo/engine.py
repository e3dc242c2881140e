"""The only file that knows Accelerate: devices, processes, precision, sharding, and what they do to a network.

A sharded network holds a part of every weight on each process. So nobody keeps its parameters from before
:meth:`Engine.prepare`, and what leaves a process is made whole by :mod:`vipo.sharding`.

FSDP2 gathers a network block by block: every process has to make the same calls of it, also where it has nothing to
compute. That is what :attr:`Engine.in_step` says.

Under context parallel a sample is not one process's but a team's: consecutive ranks that work on the same samples, each
on its part of their tokens. Samples are dealt to teams; without it every process is a team of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import (
    AutocastKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vipo.errors import RunFailed, UserError
from vipo.options import TIMEOUT, ContextExchange, Sharding
from vipo.sharding import whole, wrapped_blocks
from vipo.workload import teams_of
from vipo.zero import ZeroOptimizer, check_installed

T = TypeVar("T")

WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun, accelerate, mpirun
FSDP, DEEPSPEED, MEGATRON = (f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"))
STAGES: Mapping[Sharding, int] = {"zero2": 2, "zero3": 3}
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
OFFLOADS = tuple(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE" for kind in ("OPTIMIZER", "PARAM"))
OFFLOAD = "FSDP_OFFLOAD_PARAMS"


class Engine:
    """Accelerate, as far as the loop needs it, as the launcher set it up.

    Args:
        precision: of autocast, ``no`` or ``bf16``; trained weights stay float32.
        sharding: ``fsdp2`` and ``zero3`` cut weights, gradients and optimiser state over the processes, ``zero2`` the
            last two; so does a launcher that asks for FSDP, whichever version it names, or for DeepSpeed. Of one
            process nothing is cut.
        context_parallel: processes of a team.
        timeout: seconds that processes wait for each other before the job ends.
        accelerator: one that exists already, instead of a new one.

    Raises:
        UserError: the launcher started other processes than the engine knows of or than make teams, or asks for
            sharding that is not FSDP2, or this machine does not compute in that precision: it is refused before
            anything is written.
    """

    def __init__(
        self,
        *,
        precision: str = "no",
        sharding: Sharding = "none",
        context_parallel: int = 1,
        timeout: float = TIMEOUT,
        accelerator: Accelerator | None = None,
    ) -> None:
        _check_supported(None)  # the plugin of a library that is missing raises on its own
        sharding = _sharding(sharding)
        self.accelerator = accelerator or _accelerator(precision, sharding, timeout)
        _check_supported(self.accelerator.distributed_type)
        _check_processes(self)
        self.timeout, self.context_parallel = timeout, context_parallel
        self.teams = teams_of(self.ranks, context_parallel)
        is_fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        several = sharding if sharding in STAGES and self.ranks > 1 else "none"
        self.sharding: Sharding = "fsdp2" if is_fsdp else several  # what there is, a launcher's too
        self.stage, self.in_step = STAGES.get(self.sharding, 0), self.sharding != "none"
        self.zero: ZeroOptimizer | None = None
        self._check_sharded(asked=sharding == "fsdp2" and accelerator is None)

    def _check_sharded(self, *, asked: bool) -> None:
        if self.stage:
            check_installed(self.stage)
        if self.sharding == "fsdp2" and not self.accelerator.is_fsdp2:
            raise UserError("this Accelerator shards with FSDP1; give its plugin fsdp_version=2")
        if asked and self.ranks > 1 and not self.in_step:
            raise UserError(
                f"training.sharding=fsdp2 cannot be had on {self.device.type}: Accelerate shards on accelerators only;"
                " take training.sharding=none, one whole copy of the weights per process"
            )

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
    def team(self) -> int:
        """This process's among the :attr:`teams`."""
        return self.rank // self.context_parallel

    def context_mesh(self, exchange: ContextExchange) -> Any:
        """The processes as (team, ring, ulysses): a ``DeviceMesh`` that diffusers' ``ContextParallelConfig`` takes."""
        from torch.distributed.device_mesh import init_device_mesh

        team = (self.context_parallel, 1) if exchange == "ring" else (1, self.context_parallel)
        names = ("team", "ring", "ulysses")
        return init_device_mesh(self.device.type, (self.teams, *team), mesh_dim_names=names)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return bool(self.accelerator.is_main_process)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The network under autocast and, with several processes, joined to its copies or cut; and its optimiser.

        Raises:
            UserError: it is to be cut, and its class does not say where.
        """
        if self.in_step:
            # FSDP2 casts by a policy of its own; autocast, as without it, goes around the forward pass first.
            network = self.accelerator.prepare_model(network, evaluation_mode=True)
        if self.stage:
            self.zero = ZeroOptimizer(network, optimizer, stage=self.stage, timeout=self.timeout)
            return self.zero.network, self.zero
        if self.in_step:
            _settle_plugin(self.accelerator.state.fsdp_plugin, network)
        elif self.ranks > 1:
            _leave_quantised(network)
        network, optimizer = self.accelerator.prepare(network, optimizer)
        return network, optimizer

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Add to the gradient.

        Args:
            last: before its step.
        """
        if self.zero:
            self.zero.backward(loss, last=last)
        else:
            self.accelerator.backward(loss)

    def syncing(self, network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced over processes once per optimiser step, with its last batch.

        Sharded ones are with every batch: until then each process would hold all of them.
        """
        return nullcontext() if last or self.in_step else self.accelerator.no_sync(network)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
        """Clip the gradient to ``max_norm``; what is returned is its norm before, over all shards."""
        if self.zero:
            return self.zero.clip(max_norm)
        norm = self.accelerator.clip_grad_norm_(list(parameters), max_norm)
        return whole(torch.as_tensor(norm, device=self.device).detach())

    def gather(self, values: Tensor) -> Tensor:
        """The rows of every team, in their order; as its first process has them."""
        if self.teams == 1:
            return values
        everyones: Tensor = self.accelerator.gather(values)
        return (
            torch.cat(everyones.split(len(values))[:: self.context_parallel]) if self.ranks > self.teams else everyones
        )

    def everyones(self, said: T) -> list[T]:
        """What each process says, in the order of their ranks: plain values, which are sent as Python objects."""
        return [said] if self.ranks == 1 else list(gather_object([said]))

    def teams_say(self, said: T) -> list[T]:
        """What the first process of each team says, in their order."""
        return self.everyones(said)[:: self.context_parallel]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the teams, in float64 and their order."""
        if self.ranks == 1:
            return list(values)
        # an accelerator may have no float64: the numbers travel as objects
        return [float(sum(column)) for column in zip(*self.teams_say(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process; they all get one answer."""
        if self.ranks == 1:
            return flag
        return bool(self.accelerator.gather(torch.tensor([float(flag)], device=self.device)).any())

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

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a process that was waited for in vain, or that has died, is an error in words.

        Raises:
            RunFailed: that.
        """
        try:
            yield
        except (RuntimeError, UserError) as told:
            error = told.__cause__ if isinstance(told, UserError) else told  # of a generator of the user's own
            if self.ranks == 1 or isinstance(error, RunFailed) or not _is_of_processes(error):
                raise
            raise RunFailed(
                f"rank {self.rank} lost another process: it died, or did not answer for training.timeout="
                f"{self.timeout:g} seconds ({_said(error)}); what it said itself comes before this. Mend"
                " that, or raise training.timeout, and go on with --resume"
            ) from error

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()


def open_tracker(kind: str, project: str, folder: Path, options: Mapping[str, Any]) -> Any:
    """One of Accelerate's trackers, started in this process, as a ``GeneralTracker``; whatever it raises comes through.

    Not by ``Accelerator.init_trackers``: there one that fails ends them all.

    Args:
        kind: Accelerate's name of it, such as ``wandb``.
        project: what its runs are gathered under; of one that writes files, the name of its folder in ``folder``.
        options: for its own ``init``.
    """
    make = LOGGER_TYPE_TO_CLASS[kind]
    tracker = make(project, *([folder] if make.requires_logging_directory else []), **options)
    tracker.start()
    return tracker


def _accelerator(precision: str, sharding: Sharding, timeout: float) -> Accelerator:
    """This process's part of the run.

    Accelerate keeps one state per process and refuses a second precision or plugin, so a run with another one begins a
    new state. The group of processes is kept elsewhere and stays; networks prepared before keep what they were given.
    """
    sharded = sharding == "fsdp2" or _is_on(FSDP)
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        other = (state.distributed_type == DistributedType.FSDP) != sharded and state.num_processes > 1
        if other or state.mixed_precision != precision:
            AcceleratorState._reset_state(reset_partial_state=other)  # Accelerate has no public way
    with _as_found(FSDP), _as_found(DEEPSPEED):
        os.environ.pop(DEEPSPEED, None)  # Accelerate would take its backward, which steps
        try:
            # Autocast's cache would hold a copy of every gathered weight to the end of a forward pass.
            handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))]
            plugin = _plugin() if sharded else None
            caching = [AutocastKwargs(cache_enabled=False)] if sharded or sharding == "zero3" else []
            return Accelerator(mixed_precision=precision, fsdp_plugin=plugin, kwargs_handlers=[*handlers, *caching])
        except ValueError as error:
            if "precision" not in str(error):
                raise
            raise UserError(f"training.precision={precision} cannot be had on this machine: {error}") from error


def _plugin() -> FullyShardedDataParallelPlugin:
    """Version 2, whatever the launcher says: Accelerate takes 1 for one that does not say it.

    Every process loads the weights itself; with ``cpu_ram_efficient_loading`` transformers would leave those of the
    text encoders empty on all but the first.
    """
    if _is_on(OFFLOAD):
        raise UserError(f"{OFFLOAD}=true keeps shards on the CPU, which vipo does not train with; leave it out")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "").lower() != "false",
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        activation_checkpointing=False,  # training.gradient_checkpointing is the network's own
    )


def _settle_plugin(plugin: Any, network: nn.Module) -> None:
    """What depends on the network: where it is cut, and in which precision its weights are gathered.

    They are gathered as they are and autocast casts them, as without sharding. Gathered in bfloat16, norms would be
    too, and a first ratio on a tiny Wan was off by 0.02: some kernels differ with and without gradient then.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    blocks = wrapped_blocks(network)
    if not blocks:
        raise UserError(
            f"{type(network).__name__} does not say where it can be cut: give its class _no_split_modules, the names of"
            " its blocks' classes, or take training.sharding=none"
        )
    plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def _leave_quantised(network: nn.Module) -> None:
    """Let DDP not send a quantised base from the first process to the others, which have made the same.

    Its tensors are of types that not every way of sending knows: torchao's have no ``aten.view``, gloo has no float8.
    """
    odd = [name for name, parameter in network.named_parameters() if _is_quantised(parameter)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, odd)


def _is_quantised(parameter: Tensor) -> bool:
    is_float8 = parameter.is_floating_point() and parameter.element_size() == 1
    return not parameter.requires_grad and (is_float8 or is_traceable_wrapper_subclass(parameter))


def _is_on(switch: str) -> bool:
    return os.environ.get(switch, "").lower() in ("1", "true")


@contextmanager
def _as_found(name: str) -> Iterator[None]:
    """Leave an environment variable as it was: Accelerate sets it, and would shard the next run by it too."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _said(error: RuntimeError) -> str:
    """Its first sentence, without the place in another library's source that gloo begins with."""
    return str(error).splitlines()[0].rsplit(".cc:", 1)[-1].partition("] ")[-1].partition(". ")[0] or str(error)[:200]


def _is_of_processes(error: BaseException | None) -> TypeGuard[RuntimeError]:
    """Whether it comes from the messages between processes: gloo raises plain errors, other backends their own."""
    words = ("gloo/transport", "Connection closed by peer", "Timed out waiting", "NCCL")
    plain = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return plain or isinstance(error, torch.distributed.DistError)


def _sharding(asked: Sharding) -> Sharding:
    """What cuts weights: the recipe's word, or where it says nothing the stage of a launcher that asks for DeepSpeed.

    Of a launcher's file for DeepSpeed that is all that counts: the rest of it is the recipe's to say, or not done.
    """
    kept_off = [name for name in OFFLOADS if os.environ.get(name, "none") != "none"]
    if not _is_on(DEEPSPEED) or (asked in STAGES and not kept_off):
        return asked
    stage = next((name for name, number in STAGES.items() if str(number) == os.environ.get(STAGE)), None)
    if stage is None or kept_off or asked != "none":
        given = kept_off[0] if kept_off else DEEPSPEED if stage else f"{STAGE}={os.environ.get(STAGE, 'nothing')}"
        raise UserError(
            f"the launcher asks for DeepSpeed in a way that vipo does not train in ({given} beside training.sharding="
            f"{asked}): start it with torchrun and training.sharding=zero2 or zero3"
        )
    return stage


def _check_supported(kind: DistributedType | None) -> None:
    if _is_on(MEGATRON) or kind == DistributedType.MEGATRON_LM:
        raise UserError(
            "Megatron is not what vipo shards with: FSDP2 cuts weights, gradients and optimiser state; start it with"
            " torchrun and training.sharding=fsdp2"
        )
    if kind == DistributedType.DEEPSPEED:
        raise UserError("vipo drives DeepSpeed itself: give an Accelerator without its plugin and sharding='zero3'")


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
