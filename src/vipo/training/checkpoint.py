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

from vipo.errors import UserError
from vipo.files import remove, written_whole
from vipo.training.health import Record
from vipo.training.trainer import TrainState

FORMAT = 2


@dataclass(frozen=True)
class Head:
    """What a checkpoint knows beside tensors."""

    iteration: int  # iterations done
    gradient_norms: list[float]  # the guard's memory
    health: Record
    processes: int
    recipe: Mapping[str, Any]  # empty if it was saved without one


def save(
    state: TrainState,
    folder: Path,
    *,
    keep: int | None = None,
    processes: int = 1,
    recipe: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state after its last completed iteration; older checkpoints beyond ``keep`` are removed.

    ``recipe`` is what trained it, for whoever goes on from there.
    """
    target = folder / f"step-{state.iteration:06d}"
    head = Head(state.iteration, state.gradient_norms, state.health, processes, dict(recipe or {}))
    files = {"policy": state.weights, "optimizer": state.optimizer, "ema": state.averages}
    with written_whole(target) as aside:
        aside.mkdir()
        for name, tensors in files.items():
            if tensors or name != "ema":
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(head)}))
    for old in list_checkpoints(folder)[: -keep if keep else 0]:
        remove(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def adopt(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint from elsewhere among those in ``folder``; one that is there stays as it is."""
    if checkpoint.resolve().parent != folder.resolve():
        with written_whole(folder / f"step-{read_head(checkpoint).iteration:06d}") as aside:
            shutil.copytree(checkpoint, aside)


def read_head(checkpoint: Path) -> Head:
    """What a checkpoint knows beside tensors.

    Raises:
        UserError: it is damaged or of another format.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {str(checkpoint)!r} has format {state['format']}; this version reads {FORMAT}")
        norms, recipe = [float(norm) for norm in state["gradient_norms"]], dict(state["recipe"])
        return Head(int(state["iteration"]), norms, Record(**state["health"]), int(state["processes"]), recipe)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {str(checkpoint)!r} cannot be read: {error}") from error


def load(checkpoint: Path, *, averages: bool) -> TrainState:
    """What ``checkpoint`` holds.

    Args:
        averages: whether a moving average belongs to it.

    Raises:
        UserError: the checkpoint is damaged or of another format.
    """
    head = read_head(checkpoint)
    return TrainState(
        iteration=head.iteration,
        weights=_tensors(checkpoint, "policy"),
        averages=_tensors(checkpoint, "ema") if averages else {},
        optimizer=_tensors(checkpoint, "optimizer"),
        gradient_norms=head.gradient_norms,
        health=head.health,
    )


def load_policy(checkpoint: Path) -> dict[str, Tensor]:
    """The weights that stand for a run: the moving average if one was kept, else the trained weights."""
    return _tensors(checkpoint, "ema" if (checkpoint / "ema.safetensors").exists() else "policy")


def _tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(checkpoint / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {str(checkpoint)!r} cannot be read: {error}") from error
