"""Complete, atomic training state, in safetensors and JSON, written aside and renamed.

``checkpoints/step-000010/`` holds ``policy.safetensors``, ``optimizer.safetensors``, ``ema.safetensors`` if an average
is kept, and ``state.json``, which has the recipe that trained it. Random draws need no state: each is a function of
(seed, iteration, sample, purpose).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.files import remove, written_whole
from vipo.health import Record
from vipo.trainer import Trainer
from vipo.types import UserError

FORMAT = 2


@dataclass(frozen=True)
class State:
    """What a checkpoint knows beside tensors."""

    iteration: int  # iterations done
    gradient_norms: list[float]  # the guard's memory
    health: Record
    processes: int
    recipe: Mapping[str, Any]  # empty if it was saved without one


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """AdamW's state as flat names: ``<parameter>|<slot>``."""
    state = trainer.optimizer.state
    return {
        f"{name}|{slot}": value.detach().contiguous()
        for name, parameter in trainer.policy.parameters.items()
        for slot, value in state.get(parameter, {}).items()
    }


def save(trainer: Trainer, folder: Path, *, keep: int | None = None, recipe: Mapping[str, Any] | None = None) -> Path:
    """Write the trainer's state after its last completed iteration; older checkpoints beyond ``keep`` are removed.

    ``recipe`` is what trained it, for whoever goes on from there.
    """
    target = folder / f"step-{trainer.iteration:06d}"
    with written_whole(target) as aside:
        aside.mkdir()
        save_file({n: t.contiguous() for n, t in trainer.policy.state().items()}, aside / "policy.safetensors")
        save_file(_optimizer_tensors(trainer), aside / "optimizer.safetensors")
        if trainer.policy.ema:
            save_file({n: t.contiguous() for n, t in trainer.policy.ema.items()}, aside / "ema.safetensors")
        state = {
            "format": FORMAT,
            "iteration": trainer.iteration,
            "gradient_norms": trainer.guard.norms,
            "health": asdict(trainer.health.record),
            "processes": trainer.accelerator.num_processes,
            "recipe": dict(recipe or {}),
        }
        (aside / "state.json").write_text(json.dumps(state))
    for old in list_checkpoints(folder)[: -keep if keep else 0]:
        remove(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def adopt(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint from elsewhere among those in ``folder``; one that is there stays as it is."""
    if checkpoint.resolve().parent != folder.resolve():
        with written_whole(folder / f"step-{trained_iterations(checkpoint):06d}") as aside:
            shutil.copytree(checkpoint, aside)


def read_state(checkpoint: Path) -> State:
    """What a checkpoint knows beside tensors.

    Raises:
        UserError: it is damaged or of another format.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {str(checkpoint)!r} has format {state['format']}; this version reads {FORMAT}")
        norms, recipe = [float(norm) for norm in state["gradient_norms"]], dict(state["recipe"])
        health = Record(**state["health"])
        return State(int(state["iteration"]), norms, health, int(state["processes"]), recipe)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {str(checkpoint)!r} cannot be read: {error}") from error


def load(trainer: Trainer, checkpoint: Path) -> None:
    """Put a trainer back to where ``checkpoint`` was written; the next iteration is then bit for bit the same.

    The optimiser keeps the trainer's own learning rate, betas and weight decay: they may have been changed.

    Raises:
        UserError: the checkpoint is damaged, of another format, or belongs to another policy.
    """
    state = read_state(checkpoint)
    try:
        weights = load_file(checkpoint / "policy.safetensors")
        slots = load_file(checkpoint / "optimizer.safetensors")
        ema = load_file(checkpoint / "ema.safetensors") if trainer.policy.ema else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {str(checkpoint)!r} cannot be read: {error}") from error
    trainer.policy.load(weights, ema)
    _restore_optimizer(trainer, slots)
    trainer.iteration, trainer.guard.norms = state.iteration, state.gradient_norms
    trainer.health.record = state.health


def _restore_optimizer(trainer: Trainer, slots: Mapping[str, Tensor]) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in slots.items():
        name, slot = key.rsplit("|", 1)
        by_parameter.setdefault(name, {})[slot] = value
    order = list(trainer.policy.parameters)
    packed = trainer.optimizer.state_dict()
    packed["state"] = {order.index(name): state for name, state in by_parameter.items()}
    trainer.optimizer.load_state_dict(packed)


def load_policy(checkpoint: Path) -> dict[str, Tensor]:
    """The weights to judge a run by: the moving average if one was kept, else the trained weights."""
    ema = checkpoint / "ema.safetensors"
    return load_file(ema if ema.exists() else checkpoint / "policy.safetensors")


def trained_iterations(checkpoint: Path) -> int:
    """How many iterations the checkpoint holds."""
    return int(json.loads((checkpoint / "state.json").read_text())["iteration"])
