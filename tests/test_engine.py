"""What a launcher started against what the engine sees; and weights that an engine has cut into shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gloo
import tiny
import vipo
from vipo import engine as engine_module
from vipo import zero
from vipo.cli.plan import plan as plan_command
from vipo.engine import Engine
from vipo.errors import UserError
from vipo.policy import Policy
from vipo.recipe import parse_recipe
from vipo.runs.run import Run, train
from vipo.sharding import is_sharded, whole
from vipo.training import checkpoint
from vipo.training.saved import verified
from vipo.training.trainer import Trainer

pytestmark = pytest.mark.on_cpu


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    return tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=1)


def engine(**given: Any) -> Any:
    """An Accelerator that says what it is told to."""
    own = {"num_processes": 1, "is_main_process": True, "distributed_type": DistributedType.NO}
    return Mock(spec=Accelerator, **{**own, "device": torch.device("cpu"), **given})


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_do_not_know_of_each_other_are_refused_before_anything_is_written(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    recipe = parse_recipe(raw)
    said = rf"{name}=2 .* 2 processes .* engine counts 1.*ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2"
    with pytest.raises(UserError, match=said):
        Run(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=said):  # keeps no folder, but trains
        next(train(recipe))
    assert not (tmp_path / "run").exists()


def test_as_many_processes_as_were_started_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    Engine(accelerator=engine(num_processes=4, distributed_type=DistributedType.MULTI_GPU))
    with pytest.raises(UserError, match=r"WORLD_SIZE=4 .* engine counts 2.*torchrun --nproc_per_node 4 -m vipo "):
        Engine(accelerator=engine(num_processes=2, device=torch.device("cuda")))
    monkeypatch.setenv("WORLD_SIZE", "1")
    Engine(accelerator=engine())


def test_a_sharding_plugin_is_refused_before_its_library_is_asked_for(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UserError, match=r"^Megatron is not .* FSDP2 cuts .*training\.sharding=fsdp2"):
        Run(parse_recipe(raw), tmp_path / "run")
    with pytest.raises(UserError, match=r"^Megatron is not"):
        Engine()
    assert not (tmp_path / "run").exists()


def test_of_a_launchers_deepspeed_its_stage_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert engine_module._sharding("none") == "zero3" and engine_module._sharding("zero2") == "zero2"
    assert Engine().stage == 0 and os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"  # of one process nothing is cut
    with pytest.raises(UserError, match=r"\(ACCELERATE_USE_DEEPSPEED beside training.sharding=fsdp2\): .*torchrun and"):
        Engine(sharding="fsdp2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    for recipes in ("none", "zero2"):
        with pytest.raises(UserError, match=r"\(ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE beside"):
            Engine(sharding=recipes)  # type: ignore[arg-type]
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    with pytest.raises(UserError, match=r"\(ACCELERATE_DEEPSPEED_ZERO_STAGE=1 beside"):
        Engine()


def test_without_deepspeed_its_stages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda _: None)
    own = engine(num_processes=2, distributed_type=DistributedType.MULTI_GPU)
    with pytest.raises(UserError, match=r"training.sharding=zero3 needs DeepSpeed.*pip install 'vipo\[deepspeed\]'"):
        Engine(sharding="zero3", accelerator=own)
    Engine(sharding="zero3", accelerator=engine())  # of one process nothing is cut


def test_an_engine_that_a_plan_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match=r"--engine fsdp1 is not known; take ddp, fsdp2, zero2 or zero3"):
        plan_command("quickstart", engine="fsdp1")


def test_an_engine_of_a_callers_own_is_refused_if_it_shards_otherwise(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^vipo drives DeepSpeed itself"):
        vipo.assemble(parse_recipe(raw), engine=Engine(accelerator=engine(distributed_type=DistributedType.DEEPSPEED)))
    with pytest.raises(UserError, match="shards with FSDP1; give its plugin fsdp_version=2"):
        Engine(accelerator=engine(distributed_type=DistributedType.FSDP, is_fsdp2=False))


def test_a_launcher_that_asks_for_fsdp_gets_version_2_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")  # what `accelerate launch --use_fsdp` says for one that does not say it
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # and this, by which text encoders would stay empty
    given: list[Any] = []
    real = engine_module.Accelerator
    monkeypatch.setattr(engine_module, "Accelerator", lambda **kw: given.append(kw["fsdp_plugin"]) or real(**kw))
    assert not Engine().in_step  # one process has nothing to cut
    assert given[0].fsdp_version == 2 and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    Engine(sharding="fsdp2")
    assert "ACCELERATE_USE_FSDP" not in os.environ
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match="FSDP_OFFLOAD_PARAMS=true keeps shards on the CPU"):
        Engine(sharding="fsdp2")


def test_what_the_main_process_decides_or_refuses_holds_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    wire: list[list[Any]] = []

    def broadcast(told: list[Any]) -> None:
        if wire:
            told[:] = wire.pop()
        else:
            wire.append(list(told))

    def refuse() -> int:
        raise UserError("in use")

    monkeypatch.setattr(engine_module, "broadcast_object_list", broadcast)
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = {"num_processes": 2, "distributed_type": DistributedType.MULTI_CPU}
    main = Engine(accelerator=engine(**both))
    other = Engine(accelerator=engine(**both, is_main_process=False))
    assert main.agreed(lambda: 7) == 7 and other.agreed(lambda: 8) == 7
    for process in (main, other):
        with pytest.raises(UserError, match="in use"):
            process.agreed(refuse)


@pytest.mark.slow
def test_two_separate_processes_are_refused_by_both(tmp_path: Path, raw: dict[str, Any]) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    for ended in gloo.vipo("train", recipe, "--output", tmp_path / "run", ACCELERATE_USE_CPU="0"):
        assert ended.code == 2 and "vipo: WORLD_SIZE=2" in ended.stderr, ended.stderr[-3000:]
    assert not (tmp_path / "run").exists()


class Sharding(Engine):
    """Cuts the network as FSDP2 does: every parameter becomes another object, which holds a part."""

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        (group,) = optimizer.param_groups
        before = {id(p): name for name, p in network.named_parameters()}
        mesh = init_device_mesh("cpu", (1,))
        for block in (*network.transformer_blocks, *network.single_transformer_blocks):  # type: ignore[union-attr, operator]
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        live = dict(network.named_parameters())
        group["params"] = [live[before[id(p)]] for p in group["params"]]
        return network, optimizer


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def full(model: Any) -> Policy:
    return Policy.full(model.network, ema_decay=0.5)


def lora(model: Any) -> Policy:
    return tiny.lora(model, ema_decay=0.5)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("kind", [full, lora])
def test_a_sharded_network_is_trained_saved_resumed_and_exported_as_a_whole_one(
    model_folder: Path, tmp_path: Path, kind: Any
) -> None:
    """Nobody holds the parameters of before: checkpoint, average, export and clipping see what is trained."""
    changes = {"policy": kind, "kl_weight": 0.1, "max_grad_norm": 1e-4, "learning_rate": 1e-3}
    plain = tiny.trainer(model_folder, **changes)
    sharded = tiny.trainer(model_folder, **changes, engine=Sharding(accelerator=Accelerator(cpu=True)))
    assert all(is_sharded(p) for p in sharded.policy.parameters.values())
    start = {name: value.clone() for name, value in sharded.policy.state().items()}
    ours, theirs = ([trainer.step().metrics for _ in range(2)] for trainer in (plain, sharded))
    for key in ("reward", "grad_norm", "kl_reference", "loss"):
        assert [m[key] for m in theirs] == pytest.approx([m[key] for m in ours], abs=1e-4)
    assert theirs[0]["grad_norm"] > 1e-4 and theirs[0]["ratio_deviation"] == 0  # it was clipped, on the same weights

    where = checkpoint.save(sharded.state(), tmp_path / "checkpoints")
    saved = checkpoint.load(where, verified(where), averages=True)
    live = {name: whole(p.detach()) for name, p in sharded.policy.parameters.items()}
    assert all(torch.equal(saved.weights[name], live[name]) for name in live)
    assert any((saved.weights[name] - start[name]).abs().max() > 1e-4 for name in live)
    assert len(saved.optimizer) == 3 * len(live) and saved.averages.keys() == live.keys()

    again = tiny.trainer(model_folder, **changes, engine=Sharding(accelerator=Accelerator(cpu=True)))
    again.restore(saved)
    assert again.step().metrics == sharded.step().metrics
    sharded.restore(saved)
    assert_exports_what_is_trained(sharded, tmp_path / "export")


def assert_exports_what_is_trained(trainer: Trainer, folder: Path) -> None:
    trainer.policy.export(trainer.generator, folder)
    averages = trainer.policy.averages()
    if not trainer.policy.is_lora:
        written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        assert written.keys() == averages.keys() and all(torch.equal(written[n], averages[n]) for n in averages)
        return
    written = load_file(folder / "pytorch_lora_weights.safetensors")
    assert len(written) == len(averages)
    for name, value in averages.items():
        assert torch.allclose(written[f"transformer.{name.replace('.default', '')}"], value)
