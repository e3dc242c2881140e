"""Which checkpoints a folder holds, and what each knows beside its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.files import SEAL, aside_of, is_intact, remove, sealed
from vipo.training.health import Record
from vipo.training.stored import fault

FORMAT = 4
STATE = "state.json"  # there last, so what has it is complete
_NAME = re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Head:
    """What a checkpoint knows beside tensors."""

    iteration: int  # iterations done
    gradient_norms: list[float]  # the guard's memory
    health: Record
    processes: int
    recipe: Mapping[str, Any]  # empty if it was saved without one
    inputs: Mapping[str, str]  # fingerprints of what the recipe names, by key
    logs: Mapping[str, str]  # SHA-256 of what each log had on record of these iterations
    files: Mapping[str, Mapping[str, str]]  # kind of tensors -> its files with their SHA-256, in the order of the parts


@dataclass(frozen=True)
class Saved:
    """The checkpoint to go on from, and those of more iterations in the same folder, newest first."""

    path: Path
    head: Head
    later: tuple[Path, ...] = ()
    damaged: tuple[str, ...] = ()  # newer ones that were passed over, and why


def name_of(iteration: int) -> str:
    return f"step-{iteration:06d}"


def iteration_of(checkpoint: Path) -> int:
    """How many iterations it holds, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, of fewest iterations first; copies under other names are none."""
    return [path for path in list_folders(folder) if (path / STATE).is_file()]


def list_folders(folder: Path) -> list[Path]:
    """Checkpoints, of fewest iterations first, also those whose index is gone."""
    return sorted((path for path in folder.glob("step-*") if _is_one(path) and path.is_dir()), key=iteration_of)


def choose(folder: Path, name: str | None = None) -> Saved | None:
    """What to go on from; None: there is no checkpoint yet.

    Args:
        name: a folder's name under ``folder`` or a path to one; None takes the latest that is not damaged.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or all are.
    """
    there, damaged = list_folders(folder), list[str]()
    for path in reversed(there) if name is None else [named(folder, name)]:
        try:
            head = verified(path)
        except UserError as error:
            damaged.append(str(error))
            continue
        later = tuple(other for other in reversed(there) if iteration_of(other) > head.iteration)
        return Saved(path, head, later, tuple(damaged))
    if damaged:
        raise UserError(damaged[0])
    return None


def verified(checkpoint: Path) -> Head:
    """What a checkpoint knows beside tensors, once every file is found to be what was written.

    Raises:
        UserError: it is damaged or of another format.
    """
    head = read_head(checkpoint)
    why = fault(checkpoint, {name: expected for files in head.files.values() for name, expected in files.items()})
    if why is not None:
        raise UserError(f"checkpoint {str(checkpoint)!r} cannot be read: {why}")
    return head


def described(head: Head) -> str:
    """The index as text, with a checksum of itself."""
    return json.dumps(sealed({"format": FORMAT, **asdict(head)}))


def read_head(checkpoint: Path) -> Head:
    """What a checkpoint knows beside tensors.

    Raises:
        UserError: it is damaged or of another format.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {str(checkpoint)!r} has format {state['format']}; this version reads {FORMAT}")
        if SEAL not in state or not is_intact(state):
            raise ValueError(f"{STATE!r} is damaged: its SHA-256 is not the one on record")
        return Head(
            iteration=int(state["iteration"]),
            gradient_norms=[float(norm) for norm in state["gradient_norms"]],
            health=Record.of(state["health"]),
            processes=int(state["processes"]),
            recipe=dict(state["recipe"]),
            inputs=dict(state["inputs"]),
            logs=dict(state.get("logs", {})),  # absent from those of before
            files={kind: _inside(files) for kind, files in state["files"].items()},
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {str(checkpoint)!r} cannot be read: {error}") from error


def _inside(files: Mapping[str, str]) -> dict[str, str]:
    """Files of the checkpoint's own folder."""
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file of its own folder")
    return {str(name): str(checksum) for name, checksum in files.items()}


def prune(folder: Path, keep: int | None, spared: Collection[int] = ()) -> None:
    """Remove the oldest beyond ``keep`` but those of the iterations ``spared``; None keeps all."""
    for old in list_checkpoints(folder)[: -keep if keep else 0]:
        if iteration_of(old) not in spared:
            discard(old)


def discard(checkpoint: Path) -> None:
    """Remove one; it has lost its name before its first file, so that none is ever half there."""
    aside = aside_of(checkpoint)
    remove(aside)
    checkpoint.rename(aside)
    remove(aside)


def _is_one(path: Path) -> bool:
    """A folder of exactly the name that is written: ``step-`` and the number, six digits or more."""
    return _NAME.fullmatch(path.name) is not None and path.name == name_of(iteration_of(path))


def named(folder: Path, name: str) -> Path:
    """The checkpoint of that name in ``folder``, or at that path.

    Raises:
        UserError: there is none; those that there are are listed.
    """
    for path in (folder / name, Path(name).expanduser()):
        if (path / STATE).is_file():
            return path
    raise UserError(f"there is no checkpoint {name!r}; {listed(folder)}")


def listed(folder: Path) -> str:
    """Which checkpoints there are, in words."""
    known = ", ".join(path.name for path in list_checkpoints(folder))
    return f"in {str(folder)!r} " + (f"there are {known}" if known else "there is none yet")
