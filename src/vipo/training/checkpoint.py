"""Complete, atomic training state, in safetensors and JSON, written aside and renamed.

``checkpoints/step-000010/`` holds ``policy.safetensors``, ``optimizer.safetensors``, ``ema.safetensors`` if an average
is kept, and ``state.json``, which has the recipe that trained it. Random draws need no state: each is a function of
(seed, iteration, sample, purpose).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.errors import UserError
from vipo.files import written_whole
from vipo.training.saved import FORMAT, STATE, Head, name_of, prune
from vipo.training.trainer import TrainState


def save(
    state: TrainState,
    folder: Path,
    *,
    keep: int | None = None,
    processes: int = 1,
    recipe: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Path:
    """Write the state after its last completed iteration; older checkpoints beyond ``keep`` are removed.

    ``recipe`` and ``inputs``, fingerprints of what it names, trained it; they are for whoever goes on from there.
    """
    target = folder / name_of(state.iteration)
    head = Head(state.iteration, state.gradient_norms, state.health, processes, dict(recipe or {}), dict(inputs or {}))
    files = {"policy": state.weights, "optimizer": state.optimizer, "ema": state.averages}
    with written_whole(target) as aside:
        aside.mkdir()
        for name, tensors in files.items():
            if tensors or name != "ema":
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / f"{name}.safetensors")
        (aside / STATE).write_text(json.dumps({"format": FORMAT, **asdict(head)}))
    prune(folder, keep)
    return target


def load(checkpoint: Path, head: Head, *, averages: bool) -> TrainState:
    """What ``checkpoint`` holds.

    Args:
        head: what it knows beside tensors (:func:`vipo.training.saved.read_head`).
        averages: whether a moving average belongs to it.

    Raises:
        UserError: it is damaged.
    """
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
