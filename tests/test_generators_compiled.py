"""``training.compile``: sampling and replay take one graph, whatever their batch, and nothing is kept for a backward.

Most of it is about which graphs there are, which Dynamo decides and counts without generating code; the last test
generates it, for the smallest block that a LoRA can sit on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_sd3
import tiny_wan
from vipo.errors import UserError
from vipo.generators import compiled
from vipo.policy import Policy
from vipo.recipe import parse_recipe
from vipo.runs.run import Run
from vipo.types import TrainStep

Graphs = list[Any]


def graphs_alone(made: Graphs, *, both_ways: bool = False) -> Callable[..., Any]:
    """In place of ``torch.compile``: graphs are kept, and run as they are; ``both_ways`` makes the backward's too."""
    real, traced = torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def keep(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return traced(graph, inputs) if both_ways else graph.forward

    def uncompiled(function: Callable[..., Any], *, options: Any, **given: Any) -> Any:  # noqa: ARG001 - of Inductor
        return real(function, backend=keep, **given)

    return uncompiled


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> Iterator[Graphs]:  # noqa: ARG001 - see below
    """Every graph that is made, and run as it is instead of being compiled.

    Without the run-time checks of shapes, which a graph would take for a reason to be for one shape only.
    """
    made: Graphs = []
    monkeypatch.setattr(torch, "compile", graphs_alone(made))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def family(name: str, folder: Path, flux: Path) -> Any:
    if name == "flux":
        return tiny.generator(flux)
    if name == "wan":
        return tiny_wan.generator(tiny_wan.save_pipeline(folder))
    return tiny_sd3.generator(tiny_sd3.save_pipeline(folder, flux))


def velocity(model: Any, rows: int) -> Tensor:
    noise = torch.randn(rows, *model.latent_shape(), generator=torch.Generator().manual_seed(rows))
    conditioning = model.encode([tiny.PROMPTS[0]] * rows)
    return model.velocity(noise, torch.full((rows,), 0.7), conditioning)


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_sampling_and_replay_share_their_graphs(
    tmp_path: Path, model_folder: Path, graphs: Graphs, name: str, checkpointed: bool
) -> None:
    model = family(name, tmp_path / name, model_folder)
    tiny.nudged(Policy.lora(model.network, rank=2, alpha=2.0, targets=model.lora_targets["blocks"], seed=0))
    plain = velocity(model, 3).detach()
    compiled.install(model.network, "cpu", checkpointed=checkpointed)
    graphs.clear()  # that of the compiler's test
    with torch.no_grad():
        sampled = velocity(model, 3)
        velocity(model, 2)
    after_sampling = len(graphs)
    replayed = velocity(model, 3)
    replayed.sum().backward()
    velocity(model, 5)
    assert after_sampling == len(graphs) == 2  # two classes of blocks, or a first block and the others
    assert not sampled.requires_grad and replayed.requires_grad
    assert torch.equal(sampled, replayed)
    assert torch.allclose(sampled, plain, atol=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.network.parameters() if p.requires_grad)


def test_nothing_is_kept_for_a_backward_that_never_comes(model_folder: Path, graphs: Graphs) -> None:
    model = tiny.generator(model_folder)
    policy = Policy.full(model.network)
    compiled.install(model.network, "cpu")
    seen: list[Tensor] = []
    for block in compiled.repeated_blocks(model.network):
        block.register_forward_hook(lambda _module, _inputs, output: seen.extend(output))
    with torch.no_grad():
        velocity(model, 2)
    assert graphs and seen and all(tensor.grad_fn is None and tensor.requires_grad for tensor in seen)
    seen.clear()
    velocity(model, 2).sum().backward()
    assert all(tensor.grad_fn is not None for tensor in seen)
    assert all(p.grad is not None for p in policy.parameters.values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_run_learns_with_ratio_one_and_resumes_bit_for_bit(
    tmp_path: Path, model_folder: Path, graphs: Graphs, checkpointed: bool
) -> None:
    changes = {"training__compile": True, "training__gradient_checkpointing": checkpointed}
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=4, **changes)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    steps = [step for step in Run(parse_recipe(raw), whole) if isinstance(step, TrainStep)]
    assert graphs and all(step.metrics["grad_norm"] > 0 for step in steps)
    assert max(step.metrics["ratio_deviation"] for step in steps) == 0
    for step in Run(parse_recipe(raw), halves):
        if isinstance(step, TrainStep) and step.iteration == 2:  # the third; the checkpoint is of the second
            break
    torch._dynamo.reset()  # the second half begins without any graph, as another process does
    list(Run(parse_recipe(raw), halves, resume=True))
    assert tiny.lines(halves / "metrics.jsonl") == tiny.lines(whole / "metrics.jsonl")


def test_a_network_without_blocks_and_a_machine_without_compiler_are_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"training\.compile=true: Linear names no repeated blocks"):
        compiled.install(nn.Linear(2, 2), "cpu")

    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found in config.cpp.cxx: ('g++',)\nmore")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(UserError, match=r"nothing can be compiled for cpu here \(No working C\+\+ compiler .*g\+\+"):
        compiled.install(tiny.generator(model_folder).network, "cpu")


class Block(nn.Module):
    """The smallest thing that a LoRA sits on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.linear(x) * torch.sigmoid(x))


class Blocks(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.into, self.blocks = nn.Linear(16, 16), nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return x


def kept_for_a_backward(network: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of what a pass keeps beside weights."""
    kept: list[tuple[int, ...]] = []

    def keep(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        network(x)
    return kept


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_code_that_is_really_generated_rounds_alike_in_sampling_and_replay(checkpointed: bool) -> None:
    torch._dynamo.reset()
    network = Blocks().requires_grad_(False)
    tiny.nudged(Policy.lora(network, rank=2, alpha=2.0, targets=r"blocks\.\d\.linear", seed=0))
    x = torch.randn(6, 5, 16)
    expected = network(x)
    expected.sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    network.zero_grad()
    compiled.install(network, "cpu", checkpointed=checkpointed)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            sampled = network(x)
        replayed = network(x)
        kept = kept_for_a_backward(network, x)
    assert torch.equal(sampled, replayed) and replayed.requires_grad
    assert torch.allclose(sampled.float(), expected, atol=0.05)
    assert (kept == [(6, 5, 16)]) == checkpointed  # the block's input alone
    replayed.sum().backward()
    for name, gradient in gradients.items():
        assert torch.allclose(network.get_parameter(name).grad, gradient, rtol=0.05, atol=0.05), name
    torch._dynamo.reset()


@pytest.mark.needs_gpu
@pytest.mark.parametrize(("kind", "checkpointed"), [("lora", "true"), ("lora", "false"), ("full", "true")])
def test_a_compiled_quickstart_begins_with_ratio_one_on_a_gpu(tmp_path: Path, kind: str, checkpointed: str) -> None:
    assert torch.cuda.is_available(), "asked for with --run-needs-gpu, but torch finds no GPU"
    small = ("training.iterations=3", "evaluation.limit=4", "prompts.per_iteration=2", "prompts.group_size=4")
    process = tiny.command_line(
        *("train", "quickstart", *small, "training.compile=true", f"policy.kind={kind}"),
        f"training.gradient_checkpointing={checkpointed}",
        *("--no-report", "--output", tmp_path / "run"),
    )
    _, said = process.communicate()
    assert process.returncode == 0, said
    metrics = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 3 and all(line["ratio_deviation"] < 1e-5 and line["grad_norm"] > 0 for line in metrics)
