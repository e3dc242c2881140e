"""Tensors of a checkpoint on disk: safetensors, whole in one file or cut over several, each with its checksum.

What is cut is cut along its first dimension, as FSDP2 does it: a tensor that several files have is their parts one
after the other, a tensor that only the first has is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vipo.errors import UserError
from vipo.files import sha256
from vipo.sharding import cut_in_rows, is_sharded, local

Checksums = Mapping[str, str]  # file's name -> SHA-256 of its bytes, in the order of the parts


def write(folder: Path, kind: str, tensors: Mapping[str, Tensor], *, rank: int = 0, ranks: int = 1) -> Checksums:
    """Write this process's parts, and on the first what is whole; the file's checksum.

    Args:
        kind: what the file is called, before the number of its part.
        ranks: processes that write a part; 1 where nothing is cut.

    Raises:
        ValueError: a tensor is cut otherwise than along its first dimension.
    """
    file = folder / (f"{kind}.safetensors" if ranks == 1 else f"{kind}-{rank:05d}-of-{ranks:05d}.safetensors")
    odd = [name for name, tensor in tensors.items() if is_sharded(tensor) and not cut_in_rows(tensor)]
    if odd:
        raise ValueError(f"{odd[0]!r} is not cut along its first dimension, so its parts cannot be put together")
    mine = {name: local(tensor) for name, tensor in tensors.items() if rank == 0 or is_sharded(tensor)}
    save_file({name: part.contiguous() for name, part in mine.items()}, file)
    return {file.name: sha256(file)}


def fault(folder: Path, files: Checksums) -> str | None:
    """What is wrong with the first of the files that is not what was written, in words; None if all are."""
    for name, expected in files.items():
        try:
            found = sha256(folder / name)
        except OSError as error:
            return f"its file {name!r} cannot be read ({error.strerror})"
        if found != expected:
            return f"its file {name!r} is damaged: its SHA-256 is not the one on record"
    return None


class Stored(Mapping[str, Tensor]):
    """Tensors by name, whole; each is read, and put together, when it is asked for.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._folder = folder
        try:
            self._files = [safe_open(folder / name, framework="pt") for name in files]
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint {str(folder)!r} cannot be read: {error}") from error
        self._names = [set(file.keys()) for file in self._files]

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(name) for file, names in zip(self._files, self._names, strict=True) if name in names]
        if not parts:
            raise KeyError(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files[0].keys())

    def __len__(self) -> int:
        return len(self._names[0])
