"""Several processes over gloo, for tests: a function's in each of them, or `vipo`'s own; with FSDP2 on a CPU.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    with tempfile.TemporaryDirectory() as scratch:
        port = None if grouped else _free_port()
        places = [(rank, processes, port, Path(scratch)) for rank in range(processes)]
        failed, hung = _all_ended([(_one, (work, place, given)) for place in places], seconds)
        told = {rank: (Path(scratch) / f"{rank}.error") for rank in range(processes)}
        errors = "\n".join(f"rank {rank}: {file.read_text()}" for rank, file in told.items() if file.exists())
        assert not any(failed), f"exit codes {failed}, hung: {hung}\n{errors}"
        import torch

        return [torch.load(Path(scratch) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    code: int | None
    stdout: str
    stderr: str


def vipo(
    *words: str | Path, processes: int = 2, seconds: float = 150, before: Any = None, **environment: str
) -> list[Ended]:
    """How ``vipo WORDS`` ended in each of so many processes, by rank, started as a launcher starts them on a CPU.

    They are forks of one that has imported everything: what a real launcher does is tested in ``test_engine_files``.
    Unlike a launcher it ends none for another's failure.

    Args:
        before: called in each process before the command.
    """
    port, given = _free_port(), list(map(str, words))
    with tempfile.TemporaryDirectory() as scratch:
        places = [(rank, processes, port, Path(scratch)) for rank in range(processes)]
        codes, hung = _all_ended([(_command, (given, place, environment, before)) for place in places], seconds)
        assert not hung, f"vipo {given} still goes on in {hung} after {seconds} s"
        said = [[Path(scratch, f"{rank}.{stream}").read_text() for stream in STREAMS] for rank in range(processes)]
    return [Ended(code, *both) for code, both in zip(codes, said, strict=True)]


STREAMS = ("out", "err")


def _all_ended(
    calls: list[tuple[Callable[..., None], tuple[Any, ...]]], seconds: float
) -> tuple[list[int | None], list[int]]:
    """Exit codes of one fork per call, and which had to be killed, being there still after ``seconds``."""
    children = [forks().Process(target=target, args=given, daemon=True) for target, given in calls]
    for child in children:
        child.start()
    for child in children:
        child.join(seconds)
    codes = [child.exitcode for child in children]
    hung = [rank for rank, child in enumerate(children) if child.is_alive()]
    for rank in hung:
        children[rank].kill()
    return codes, hung


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _place_in_environment(rank: int, processes: int, port: int | None) -> None:
    """What a launcher tells each process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    if port is not None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _command(
    words: list[str], place: tuple[int, int, int, Path], environment: dict[str, str], before: Callable[[], None] | None
) -> None:
    """The command in one process of several."""
    rank, processes, port, scratch = place
    _place_in_environment(rank, processes, port)
    os.environ |= environment
    command(words, *(scratch / f"{rank}.{stream}" for stream in STREAMS), before=before)


def command(words: Sequence[str], said: Path, errors: Path, *, before: Callable[[], None] | None) -> None:
    """``vipo WORDS`` in this process, which is a fork; what it says goes to the two files."""
    import torch

    for number, file in enumerate((said, errors), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.argv = ["vipo", *words]
    importlib.import_module("vipo.cli").main()


def _one(work: Callable[..., Any], place: tuple[int, int, int | None, Path], given: tuple[Any, ...]) -> None:
    """One process of several."""
    import torch

    rank, processes, port, scratch = place
    if processes > 1:
        _place_in_environment(rank, processes, port)
    torch.set_num_threads(1)
    try:
        allow_fsdp_on_cpu()
        if port is None and processes > 1:
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
