"""Several processes over gloo, for tests: a function's in each of them, or a command line's; with FSDP2 on a CPU.

Accelerate 1.15 takes an FSDP plugin on accelerators only. All that keeps its FSDP2 code from running over gloo is the
kind of processes that its state notes down, so that is what is put right here, and nothing else.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
# What a child would import: the server of forks does it once, for all of a test session.
PRELOADED = ["vipo.runs.run", "vipo.plan.blueprint", "peft", "gloo", "tiny", "tiny_wan", "torch.distributed.fsdp"]
PRELOADED += ["faults", "vipo.cli", "vipo.cli.progress", "vipo.report.page", "vipo.report.compare", "vipo.runs.target"]


def allow_fsdp_on_cpu() -> None:
    """Let a plugin that is given count on a CPU too."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_plugin  # type: ignore[method-assign]


def spare_deepspeed_its_compiler() -> None:
    """Let DeepSpeed talk over gloo alone: for processes of one CPU it would compile a way of its own for a minute."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def allow_context_parallel_on_cpu() -> None:
    """Let diffusers share samples over processes on a CPU, for as long as this process lives.

    It takes a rank modulo the number of accelerators, which is 0, and for its flash attention it asks for PyTorch's by
    the GPU's name, which on a CPU is another operator with the same mathematics. Nothing else keeps it from a CPU.
    """
    import torch

    torch.accelerator.device_count = lambda: 1
    KEPT.append(aten := torch.library.Library("aten", "IMPL"))
    aten.impl("_scaled_dot_product_flash_attention", _flash, "CPU")
    aten.impl("_scaled_dot_product_flash_attention_backward", _flash_backward, "CPU")


KEPT: list[Any] = []  # a library's operators go with it


def _flash(
    query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, *_: Any, scale: Any = None
) -> Any:
    import torch

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = flash(query, key, value, dropout, causal, scale=scale)
    none = [torch.empty(0, dtype=torch.long) for _ in range(5)]
    return out, sums, *none[:2], query.shape[2], key.shape[2], *none[2:]


def _flash_backward(
    gradient: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, *rest: Any, scale: Any = None
) -> Any:
    import torch

    _, _, _, _, dropout, causal, *_ = rest
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(gradient, query, key, value, out, sums, dropout, causal, scale=scale)


def forks() -> multiprocessing.context.ForkServerContext:
    """What starts processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    if str(TESTS) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    context.set_forkserver_preload(PRELOADED)
    return context


def together(
    work: Callable[..., Any], processes: int, *given: Any, seconds: float = 200, grouped: bool = True
) -> list[Any]:
    """What ``work(*given)`` returns in each of so many processes that know of each other, by rank.

    A process in which it raises ends; the others then have ``seconds`` to notice.

    Args:
        grouped: join them in a group before; without it ``work`` does, as under a launcher.
    """
    context = forks()
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = None if grouped else probe.getsockname()[1]
        probe.close()
        places = [(rank, processes, port, Path(scratch)) for rank in range(processes)]
        children = [context.Process(target=_one, args=(work, place, given), daemon=True) for place in places]
        for child in children:
            child.start()
        for child in children:
            child.join(seconds)
        failed = [child.exitcode for child in children]
        hung = [rank for rank, child in enumerate(children) if child.is_alive()]
        for rank in hung:
            children[rank].kill()
        told = {rank: (Path(scratch) / f"{rank}.error") for rank in range(processes)}
        errors = "\n".join(f"rank {rank}: {file.read_text()}" for rank, file in told.items() if file.exists())
        assert not any(failed), f"exit codes {failed}, hung: {hung}\n{errors}"
        import torch

        return [torch.load(Path(scratch) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _one(work: Callable[..., Any], place: tuple[int, int, int | None, Path], given: tuple[Any, ...]) -> None:
    """One process of several."""
    import torch

    rank, processes, port, scratch = place
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    try:
        allow_fsdp_on_cpu()
        if port is not None:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        elif processes > 1:
            store = f"file://{scratch / 'store'}"
            torch.distributed.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=processes, timeout=timedelta(seconds=60)
            )
        torch.save(work(*given), scratch / f"{rank}.pt")
    except BaseException:
        (scratch / f"{rank}.error").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":  # python gloo.py -m vipo ...
    allow_fsdp_on_cpu()
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
