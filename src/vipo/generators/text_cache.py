"""Prompts are encoded once and kept, in memory and on disk.

A row of the cache depends on its prompt and the encoders alone. So by default prompts are encoded one at a time: in a
batch, the last bit of a row can depend on its neighbours, and with it a run on when it was resumed.

On disk a row is a file ``FOLDER/ab/abcd....safetensors``, named by the SHA-256 of :func:`encoding_key` and the prompt.
Files are never changed, only added, each written whole; any number of processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vipo.errors import UserError
from vipo.files import written_whole
from vipo.generators.text import Text, TextReader
from vipo.pretrained import fingerprint
from vipo.types import Batched

FORMAT = 1  # of the files; part of the key
MEMORY_BYTES = 2 * 1024**3  # of rows; with FLUX.1 (512 tokens of 4096 bfloat16 numbers) about 500 prompts
ENCODED_AT_ONCE = 64  # prompts between two looks at how full the memory is

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One prompt's conditioning on the CPU, each field without the zeros at its end (padding, mostly)."""

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, list[int]]  # with the zeros

    @classmethod
    def of(cls, conditioning: Batched, place: int) -> Row:
        whole = {f.name: getattr(conditioning, f.name)[place].detach() for f in fields(conditioning)}
        shapes = {name: list(tensor.shape) for name, tensor in whole.items()}
        return cls({name: _without_zeros(tensor).cpu().clone() for name, tensor in whole.items()}, shapes)

    def whole(self, name: str) -> Tensor:
        kept = self.tensors[name]
        if list(kept.shape) == self.shapes[name]:
            return kept
        filled = kept.new_zeros(self.shapes[name])
        filled[: len(kept)] = kept
        return filled

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def checksum(self) -> int:
        """Of the bytes and of what they are to be read as."""
        total = 0
        for name, tensor in sorted(self.tensors.items()):
            meant = f"{name} {tensor.dtype} {list(tensor.shape)} {self.shapes[name]}"
            total = zlib.crc32(_bytes(tensor).numpy().data, zlib.crc32(meant.encode(), total))
        return total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _without_zeros(tensor: Tensor) -> Tensor:
    """The tensor up to its last entry along dimension 0 with a bit set; -0.0 has one."""
    if not tensor.numel() or not tensor.ndim:
        return tensor
    used = _bytes(tensor).view(len(tensor), -1).any(1).nonzero()
    return tensor[: int(used[-1]) + 1 if len(used) else 0]


@dataclass
class Counts:
    """Where rows came from so far."""

    encoded: int = 0  # prompts that the text encoders had to read
    loaded: int = 0  # files
    damaged: int = 0  # files that were there but not whole; they are encoded and written again
    unwritten: int = 0  # rows that found no place on disk
    dropped: int = 0  # rows that had to leave the memory


class TextCache:
    """A :class:`vipo.generators.text.Text` that asks another one only once about each prompt.

    Args:
        encode: what to ask, any number of prompts at once.
        record: the class of the conditioning that ``encode`` returns.
        key: of everything beside the prompt that a row depends on, see :func:`encoding_key`.
        device: where the rows are wanted.
        folder: where rows are kept between runs; None keeps them in memory only.
        memory_bytes: bound on the rows in memory; the least recently used ones leave first.

    Raises:
        UserError: ``folder`` cannot be made.
    """

    def __init__(
        self,
        encode: Text,
        *,
        record: type[Batched],
        key: str,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.encode, self.record, self.key, self.device = encode, record, key, device
        self.folder, self.memory_bytes = folder, memory_bytes
        self.counts = Counts()
        self._memory: OrderedDict[str, Row] = OrderedDict()
        self._memory_used = 0
        if folder is not None:
            _make(folder)

    def __call__(self, prompts: Sequence[str]) -> Batched:
        """One row per prompt, as ``encode`` would give them."""
        distinct = list(dict.fromkeys(prompts))
        rows = self._rows(distinct)
        stacked = {f.name: torch.stack([row.whole(f.name) for row in rows]) for f in fields(self.record)}
        place = {text: i for i, text in enumerate(distinct)}
        return self.record(**stacked).to(self.device).take(torch.tensor([place[text] for text in prompts]))

    def fill(self, prompts: Iterable[str]) -> None:
        """Encode what is not there yet. Without a folder it ends where the memory is full."""
        absent = [text for text in dict.fromkeys(prompts) if not self._has(text)]
        for start in range(0, len(absent), ENCODED_AT_ONCE):
            self._rows(absent[start : start + ENCODED_AT_ONCE])
            if self.folder is None and self.counts.dropped:
                kept = len(self._memory)
                log.warning("the text cache's memory holds %d of %d prompts: give it a folder", kept, len(absent))
                return

    def _has(self, text: str) -> bool:
        return text in self._memory or (self.folder is not None and self._path(self.folder, text).is_file())

    def _rows(self, texts: Sequence[str]) -> list[Row]:
        found = {text: self._recall(text) for text in texts}
        absent = [text for text, row in found.items() if row is None]
        new = self._encoded(absent) if absent else {}
        return [found[text] or new[text] for text in texts]

    def _recall(self, text: str) -> Row | None:
        if text in self._memory:
            self._memory.move_to_end(text)
            return self._memory[text]
        row = None if self.folder is None else self._load(self._path(self.folder, text))
        if row is not None:
            self._remember(text, row)
        return row

    def _encoded(self, texts: Sequence[str]) -> dict[str, Row]:
        conditioning = self.encode(texts)
        self.counts.encoded += len(texts)
        rows = {text: Row.of(conditioning, i) for i, text in enumerate(texts)}
        for text, row in rows.items():
            self._remember(text, row)
            if self.folder is not None:
                self._save(self._path(self.folder, text), row)
        return rows

    def _remember(self, text: str, row: Row) -> None:
        self._memory[text] = row
        self._memory_used += row.nbytes
        while self._memory_used > self.memory_bytes and self._memory:
            self._memory_used -= self._memory.popitem(last=False)[1].nbytes
            self.counts.dropped += 1

    def _path(self, folder: Path, text: str) -> Path:
        name = hashlib.sha256(json.dumps([self.key, text]).encode()).hexdigest()
        return folder / name[:2] / f"{name}.safetensors"

    def _load(self, path: Path) -> Row | None:
        """The row in a file; None if there is no file, or one that is not whole."""
        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()["row"])
                row = Row({f.name: file.get_tensor(f.name) for f in fields(self.record)}, note["shapes"])
            if row.checksum() != note["checksum"]:
                raise ValueError(f"{path} has another checksum than was written")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            self.counts.damaged += 1
            return None
        self.counts.loaded += 1
        return row

    def _save(self, path: Path, row: Row) -> None:
        """Write a row, under a name of its own first because another process may be writing the same one.

        A disk that is full or read-only ends no run: the first failure is logged and the row stays in memory.
        """
        note = json.dumps({"shapes": row.shapes, "checksum": row.checksum()})
        own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            with written_whole(own) as aside:
                save_file(dict(row.tensors), aside, metadata={"row": note})
            os.replace(own, path)
        except (OSError, SafetensorError) as error:
            if not self.counts.unwritten:
                log.warning("the text cache %s takes no more files, prompts stay in memory only: %s", path, error)
            self.counts.unwritten += 1


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the text cache cannot be kept in {str(folder)!r} ({error}); give another folder") from error


def cache_of(reader: TextReader, *, adapter: str, folder: Path | None, batch_size: int, memory_bytes: int) -> TextCache:
    """A cache before the text encoders of a pipeline, which it asks about ``batch_size`` prompts at once.

    Raises:
        UserError: ``folder`` cannot be made.
    """
    return TextCache(
        partial(reader, batch_size=batch_size),
        record=reader.record,
        key=encoding_key(reader, adapter),
        device=reader.device,
        folder=folder,
        memory_bytes=memory_bytes,
    )


def encoding_key(reader: TextReader, adapter: str) -> str:
    """A digest of everything beside the prompt that its row depends on.

    The name of the generator's class and ``max_sequence_length``, the encoders' weights and dtype, the tokenizers'
    words and chat template, and the versions of the two libraries that put a prompt into its template and through the
    encoders.
    """
    parts = reader.pipeline.components.items()
    tokenizers = {name: part for name, part in parts if name.startswith("tokenizer") and part is not None}
    told = {
        "format": FORMAT,
        "adapter": adapter,
        "max_sequence_length": reader.max_sequence_length,
        "encoders": [[str(encoder.dtype), fingerprint(encoder)] for encoder in reader.encoders],
        "tokenizers": {name: _words(tokenizer) for name, tokenizer in tokenizers.items()},
        "versions": {name: version(name) for name in ("diffusers", "transformers")},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _words(tokenizer: Any) -> str:
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([words, tokenizer.chat_template]).encode()).hexdigest()
