"""State on disk: whole or not at all, and complete."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from vipo.errors import UserError
from vipo.files import write_text, written_whole
from vipo.policy import Policy
from vipo.training import checkpoint, saved, stored
from vipo.training.trainer import Trainer, TrainState


def with_average(model: Any) -> Policy:
    return tiny.lora(model, ema_decay=0.5)


@pytest.fixture
def trained(model_folder: Path) -> Trainer:
    trainer = tiny.trainer(model_folder, policy=with_average, prompts_per_iteration=1)
    trainer.step()
    trainer.step()
    return trainer


def load(where: Path, *, averages: bool) -> TrainState:
    return checkpoint.load(where, saved.verified(where), averages=averages)


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, average and optimiser state under flat names."""
    slots = {
        f"{name}/{slot}": value.clone()
        for name, parameter in trainer.policy.parameters.items()
        for slot, value in trainer.learner.optimizer.state.get(parameter, {}).items()
    }
    average = {f"ema/{name}": value.clone() for name, value in trainer.policy.ema.items()}
    return {n: v.clone() for n, v in trainer.policy.state().items()} | average | slots


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def make_file(path: Path) -> None:
    path.write_text("new")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("new")


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_a_target_is_replaced_as_a_whole(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "deep" / "target"
    for _ in range(2):
        with written_whole(target) as aside:
            make(aside)
            assert aside != target
    assert (target if make is make_file else target / "inside").read_text() == "new"
    assert files(target.parent) in (["target"], ["target", "target/inside"])


@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_and_nothing_else(
    tmp_path: Path, make: Callable[[Path], None], error: BaseException
) -> None:
    target = tmp_path / "target"
    with written_whole(target) as aside:
        make(aside)
    before = {name: (tmp_path / name).read_text() for name in files(tmp_path) if (tmp_path / name).is_file()}
    with pytest.raises(type(error)), written_whole(target) as aside:
        make(aside)
        (aside / "inside" if aside.is_dir() else aside).write_text("half")
        raise error
    assert {name: (tmp_path / name).read_text() for name in files(tmp_path) if (tmp_path / name).is_file()} == before


def test_what_an_earlier_kill_left_aside_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".note.partial").mkdir()
    (tmp_path / ".note.partial" / "half").write_text("half")
    write_text(tmp_path / "note", "whole")
    assert files(tmp_path) == ["note"] and (tmp_path / "note").read_text() == "whole"


def test_a_round_trip_restores_every_number(model_folder: Path, tmp_path: Path, trained: Trainer) -> None:
    where = checkpoint.save(trained.state(), tmp_path)
    fresh = tiny.trainer(model_folder, policy=with_average, prompts_per_iteration=1)
    fresh.restore(load(where, averages=True))
    written, loaded = everything(trained), everything(fresh)
    assert written.keys() == loaded.keys() and any(key.endswith("/exp_avg_sq") for key in written)
    assert all(torch.equal(written[key], loaded[key]) for key in written)
    assert fresh.iteration == 2 and fresh.learner.guard.norms == trained.learner.guard.norms != []
    assert fresh.learner.optimizer.param_groups[0]["lr"] == trained.learner.optimizer.param_groups[0]["lr"]


def test_the_iteration_after_a_round_trip_is_the_same_bit_for_bit(
    model_folder: Path, tmp_path: Path, trained: Trainer
) -> None:
    fresh = tiny.trainer(model_folder, policy=with_average, prompts_per_iteration=1)
    fresh.restore(load(checkpoint.save(trained.state(), tmp_path), averages=True))
    ours, theirs = trained.step(), fresh.step()
    assert ours.metrics == theirs.metrics and torch.equal(ours.rollout.media, theirs.rollout.media)
    assert all(torch.equal(v, everything(fresh)[k]) for k, v in everything(trained).items())


def test_only_json_and_safetensors_are_written(tmp_path: Path, trained: Trainer) -> None:
    where = checkpoint.save(trained.state(), tmp_path)
    assert files(where) == ["ema.safetensors", "optimizer.safetensors", "policy.safetensors", "state.json"]
    assert where.name == "step-000002" and saved.read_head(where).iteration == 2


def test_a_run_is_known_by_its_average(tmp_path: Path, trained: Trainer) -> None:
    where = checkpoint.save(trained.state(), tmp_path)
    weights = checkpoint.load_policy(where, saved.verified(where))
    assert all(torch.equal(weights[name], average) for name, average in trained.policy.ema.items())


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [2, 3, 4, 5]), (None, [2, 3, 4, 5])])
def test_only_the_newest_checkpoints_are_kept(
    tmp_path: Path, trained: Trainer, keep: int | None, left: list[int]
) -> None:
    for iteration in range(2, 6):
        trained.iteration = iteration
        checkpoint.save(trained.state(), tmp_path, keep=keep)
    assert [saved.read_head(path).iteration for path in saved.list_checkpoints(tmp_path)] == left


def flip(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a weight file cut short": lambda c: (c / "policy.safetensors").write_bytes(b"\x10\x00"),
    "an optimiser file of zeros": lambda c: (c / "optimizer.safetensors").write_bytes(b"\x00" * 64),
    "no average": lambda c: (c / "ema.safetensors").unlink(),
    "half a state": lambda c: (c / "state.json").write_text('{"format": 1, "iter'),
    "an empty state": lambda c: (c / "state.json").write_text("{}"),
    "a list for a state": lambda c: (c / "state.json").write_text("[]"),
    "a bit of the index": lambda c: (c / "state.json").write_text((c / "state.json").read_text().replace("1", "2", 1)),
    "a bit of the weights": lambda c: flip(c / "policy.safetensors"),
    "a bit of the optimiser": lambda c: flip(c / "optimizer.safetensors"),
    "another format": lambda c: (c / "state.json").write_text(json.dumps({"format": 99})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_trainer_untouched(tmp_path: Path, trained: Trainer, damage: str) -> None:
    where = checkpoint.save(trained.state(), tmp_path)
    DAMAGE[damage](where)
    before = everything(trained)
    with pytest.raises(UserError, match=r"step-000002' (cannot be read|has format 99)") as raised:
        trained.restore(load(where, averages=True))
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[key], value) for key, value in everything(trained).items())


def test_a_checkpoint_of_another_policy_is_refused(model_folder: Path, tmp_path: Path, trained: Trainer) -> None:
    other = tiny.trainer(model_folder, policy=lambda model: tiny.lora(model, rank=2))
    with pytest.raises(UserError, match="do not fit this policy"):
        other.restore(load(checkpoint.save(trained.state(), tmp_path), averages=False))


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_partial_one(
    tmp_path: Path, trained: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(trained.state(), tmp_path, keep=1)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path) if (tmp_path / name).is_file()}
    write = stored.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(stored, "save_file", full)
    trained.iteration += 1
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(trained.state(), tmp_path, keep=1)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path) if (tmp_path / name).is_file()} == before


def test_a_half_written_checkpoint_is_not_one(tmp_path: Path, trained: Trainer) -> None:
    whole = checkpoint.save(trained.state(), tmp_path)
    (tmp_path / ".step-000009.partial").mkdir()
    (tmp_path / ".step-000009.partial" / "state.json").write_text("{}")
    (tmp_path / "step-000008").mkdir()
    assert saved.list_checkpoints(tmp_path) == [whole]
