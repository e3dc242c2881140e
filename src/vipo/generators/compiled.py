"""Compiled blocks whose first ratio is still right: ``training.compile``.

Only the network's repeated blocks are compiled (regional compilation); what lies between them runs as written. Sampling
and replay must take one graph, or they round differently and the first ratio is not 1. Inductor builds one graph per

- grad mode and which inputs need a gradient. So a call without gradients runs in grad mode too. Each block's graph of
  gradients is cut off right behind it, and its output is marked as needing what it would need in a replay: nothing is
  kept for a backward that never comes, and every block sees the inputs that a replay shows it.
- shape. The batch is a symbol, so all batches of two rows or more share a graph; a single row has one of its own. All
  else is static, and nothing becomes a symbol later: which graph a batch takes never depends on what came before.

Gradient checkpointing is part of the graph: its forward then keeps a block's inputs and nothing else, in the rollout
too, which otherwise writes out all that a backward would need. The network's own checkpoints, around its blocks, leave
the graph as it is and run it a second time before each backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vipo.errors import UserError

# No choice by stopwatch that could round otherwise in the next process: a run that goes on would not be the same.
OPTIONS: dict[str, Any] = {"deterministic": True}


def install(network: nn.Module, device: torch.device | str, *, checkpointed: bool = False) -> None:
    """Compile a network's blocks in place, when its adapters are on it and before an engine wraps it.

    Nothing is compiled yet: that happens in the first passes, and takes minutes for a large model. ``checkpointed``
    takes the place of the network's own gradient checkpointing, which must be off.

    Raises:
        UserError: the network names no repeated blocks, or nothing can be compiled for this device here.
    """
    blocks = repeated_blocks(network)
    if not blocks:
        raise UserError(
            f"training.compile=true: {type(network).__name__} names no repeated blocks (_repeated_blocks or"
            " _no_split_modules) that could be compiled; set it to false"
        )
    _check_compiler(device)
    sampling = _Sampling()
    for block in blocks:
        block.forward = _cut(torch.compile(block.forward, fullgraph=True, dynamic=False, options=OPTIONS), sampling)
    network.forward = _in_grad_mode(network.forward, sampling)
    if checkpointed:
        network.forward = _keeping_inputs(network.forward)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers compiles, or where it names none (SD3), those it never splits over devices."""
    names: Sequence[str] = (
        getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ()
    )
    return [module for module in network.modules() if type(module).__name__ in names]


class _Sampling:
    """Whether a network is being called without gradients."""

    on = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.on = True
        try:
            with torch.enable_grad():
                yield
        finally:
            self.on = False


def _in_grad_mode(forward: Callable[..., Any], sampling: _Sampling) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with sampling():
            return tree_map_only(Tensor, Tensor.detach, forward(*args, **kwargs))

    return call


def _keeping_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Graphs that are made in the call have a forward that keeps its inputs alone: all else is computed once more.

    ``torch.utils.checkpoint`` inside of what is compiled asks for the same, but not of the graph of a reference, which
    needs no gradient: PyTorch 2.13 refuses that one, because attention may be random.
    """

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=0.0):
            return forward(*args, **kwargs)

    return call


def _cut(compiled: Callable[..., Any], sampling: _Sampling) -> Callable[..., Any]:
    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        _mark_batch(args, kwargs)
        found = compiled(*args, **kwargs)
        return tree_map_only(Tensor, _leaf, found) if sampling.on else found

    return call


def _leaf(value: Tensor) -> Tensor:
    """The same values, with what led to them forgotten, but not that they have a gradient."""
    return value.detach().requires_grad_(value.requires_grad)


def _mark_batch(*inputs: Any) -> None:
    """Say that the first dimension of the first tensor, and of those as long, is a batch and may be of any size."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    for tensor in tensors:
        if len(tensor) == len(tensors[0]) > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _check_compiler(device: torch.device | str) -> None:
    """Compile a few numbers: it needs a C++ compiler on a CPU, Triton and a C compiler on a GPU."""
    try:
        torch.compile(torch.sin, fullgraph=True, dynamic=False, options=OPTIONS)(torch.ones(8, device=device))
    except Exception as error:  # whatever a tool chain raises that is not there or not whole
        why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UserError(
            f"training.compile=true: nothing can be compiled for {device} here ({why}); install a C++ compiler (g++)"
            " and Python's headers, on a GPU also Triton, or set it to false"
        ) from error
