"""What a launcher started against what the engine sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

import tiny
from vipo import build, launch
from vipo.launch import agreed, check_engine, open_engine
from vipo.recipe import parse_recipe
from vipo.run import Run, train
from vipo.types import UserError


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    return tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=1)


def engine(**given: Any) -> Any:
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
    check_engine(engine(num_processes=4, distributed_type=DistributedType.MULTI_GPU))
    with pytest.raises(UserError, match=r"WORLD_SIZE=4 .* engine counts 2.*torchrun --nproc_per_node 4 -m vipo.cli"):
        check_engine(engine(num_processes=2, device=torch.device("cuda")))
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_engine(engine())


@pytest.mark.parametrize(("switch", "name"), [
    ("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")
])  # fmt: skip
def test_a_sharding_plugin_is_refused_before_its_library_is_asked_for(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, switch: str, name: str
) -> None:
    monkeypatch.setenv(switch, "true")
    with pytest.raises(UserError, match=rf"^{name} shards the weights"):
        Run(parse_recipe(raw), tmp_path / "run")
    with pytest.raises(UserError, match=rf"^{name} shards the weights"):
        open_engine("no")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_sharding_engine_of_a_callers_own_is_refused(raw: dict[str, Any], kind: DistributedType) -> None:
    with pytest.raises(UserError, match="shards the weights"):
        build.build(parse_recipe(raw), accelerator=engine(distributed_type=kind))


def test_what_the_main_process_decides_or_refuses_holds_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    wire: list[list[Any]] = []

    def broadcast(told: list[Any]) -> None:
        if wire:
            told[:] = wire.pop()
        else:
            wire.append(list(told))

    def refuse() -> int:
        raise UserError("in use")

    monkeypatch.setattr(launch, "broadcast_object_list", broadcast)
    main, other = engine(num_processes=2), engine(num_processes=2, is_main_process=False)
    assert agreed(main, lambda: 7) == 7 and agreed(other, lambda: 8) == 7
    for process in (main, other):
        with pytest.raises(UserError, match="in use"):
            agreed(process, refuse)


@pytest.mark.slow
def test_two_separate_processes_are_refused_by_both(tmp_path: Path, raw: dict[str, Any]) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vipo.cli"]
    command = [*launcher, "train", str(recipe), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode != 0 and "vipo: WORLD_SIZE=2" in done.stderr and "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()
