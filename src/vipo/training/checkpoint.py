"""Complete, atomic training state, in safetensors and JSON, written aside and renamed.

``checkpoints/step-000010/`` holds ``policy.safetensors``, ``optimizer.safetensors``, ``ema.safetensors`` if an average
is kept, and the index ``state.json``, which has the checksum of each of them and the recipe that trained it. Where the
weights are cut over processes, each writes a file of its own, ``policy-00000-of-00002.safetensors`` and so on; any
number of processes goes on from them. Random draws need no state: each is a function of its seed, purpose and indices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from vipo.engine import Engine
from vipo.errors import UserError
from vipo.files import CannotWrite, aside_of, writing, written_whole
from vipo.training import stored
from vipo.training.saved import STATE, Head, described, name_of, prune
from vipo.training.stored import Checksums, Stored
from vipo.training.trainer import TrainState

POLICY, OPTIMIZER, AVERAGE = "policy", "optimizer", "ema"


def save(
    state: TrainState,
    folder: Path,
    *,
    engine: Engine | None = None,
    keep: int | None = None,
    spared: Collection[int] = (),
    recipe: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    logs: Mapping[str, str] | None = None,
) -> Path:
    """Write the state after its last completed iteration; older checkpoints beyond ``keep`` are removed.

    Those of the iterations ``spared`` stay.

    ``recipe`` and ``inputs``, fingerprints of what it names, trained it; ``logs`` are checksums of what was logged so
    far. They are for whoever goes on from there.

    Args:
        engine: the processes, which all have to ask; None is one.

    Raises:
        CannotWrite: a process could not; none goes on, and what was there stays.
    """
    target, writes = folder / name_of(state.iteration), engine is None or engine.is_main
    with written_whole(target) if writes else nullcontext(aside_of(target)) as aside:
        if engine is None:
            aside.mkdir()
        else:
            engine.agreed(aside.mkdir)
        files = _write(state, aside, engine)
        if writes:
            norms, trained_by = state.gradient_norms, (dict(recipe or {}), dict(inputs or {}), dict(logs or {}))
            head = Head(state.iteration, norms, state.health, engine.ranks if engine else 1, *trained_by, files)
            (aside / STATE).write_text(described(head))
    if engine is not None:
        engine.wait()
    if writes:
        prune(folder, keep, spared)
    return target


def _write(state: TrainState, folder: Path, engine: Engine | None) -> dict[str, Checksums]:
    """This process's files; the checksums of all, in the order of the processes."""
    kinds = {POLICY: state.weights, OPTIMIZER: state.optimizer, AVERAGE: state.averages}
    kept = {kind: tensors for kind, tensors in kinds.items() if tensors or kind != AVERAGE}
    if engine is None or engine.ranks == 1:
        return {kind: stored.write(folder, kind, tensors) for kind, tensors in kept.items()}
    place = {"rank": engine.rank, "ranks": engine.ranks if engine.in_step else 1}
    mine: dict[str, Checksums] = {kind: {} for kind in kept}
    caught: CannotWrite | None = None
    if engine.in_step or engine.is_main:
        try:
            with writing(folder):
                mine = {kind: stored.write(folder, kind, tensors, **place) for kind, tensors in kept.items()}
        except CannotWrite as error:
            caught = error
    everyones = engine.everyones((mine, None if caught is None else f"rank {engine.rank}: {caught}"))
    for _, fault in everyones:
        if fault is not None:
            raise caught or CannotWrite(fault)
    return {kind: {name: sum_ for files, _ in everyones for name, sum_ in files[kind].items()} for kind in kept}


def load(checkpoint: Path, head: Head, *, averages: bool) -> TrainState:
    """What ``checkpoint`` holds; its tensors are read when they are asked for.

    Args:
        head: what it knows beside tensors (:func:`vipo.training.saved.verified`).
        averages: whether a moving average belongs to it.

    Raises:
        UserError: a file is missing or is none.
    """
    kinds = (POLICY, OPTIMIZER, AVERAGE) if averages else (POLICY, OPTIMIZER)
    absent = [kind for kind in kinds if not head.files.get(kind)]
    if absent:
        raise UserError(f"checkpoint {str(checkpoint)!r} cannot be read: its index names no file for {absent[0]!r}")
    weights, optimizer, *average = (Stored(checkpoint, list(head.files[kind])) for kind in kinds)
    return TrainState(
        iteration=head.iteration,
        weights=weights,
        averages=average[0] if average else {},
        optimizer=optimizer,
        gradient_norms=head.gradient_norms,
        health=head.health,
    )


def load_policy(checkpoint: Path, head: Head) -> dict[str, Tensor]:
    """The weights that stand for a run: the moving average if one was kept, else the trained weights.

    Raises:
        UserError: a file is missing or is none.
    """
    return dict(Stored(checkpoint, list(head.files[AVERAGE if AVERAGE in head.files else POLICY])))
