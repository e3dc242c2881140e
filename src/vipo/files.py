"""Files: there whole or not at all, readable by whom the umask lets read them, and what a line of one is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

LONGEST_YAML, MOST_YAML_VALUES = 10**6, 10**5  # characters; values, with every alias written out


class CannotWrite(OSError):  # noqa: N818 - as the sentence has it
    """A file could not be written: a full disk, a folder without permission."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of ``path`` to write to; it takes the name ``path`` only once it is complete.

    Works for a file or a folder. Whatever goes wrong inside, ``path`` keeps what it was and nothing is left behind.
    Files have the permissions that the umask gives, also where the library that wrote them gave less.

    Raises:
        CannotWrite: the system did not let it be written.
    """
    aside = aside_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)
        try:
            yield aside
            usual_permissions(_files(aside))
            _flush(aside)
            if path.is_dir():
                remove(path)
            os.replace(aside, path)
        finally:
            with suppress(OSError):  # the next to write it clears what is left
                remove(aside)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, and why, in one sentence.

    Raises:
        CannotWrite: an error of the system, also as safetensors tells it.
    """
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise CannotWrite(f"{str(path)!r} cannot be written: {why}; what was there before is as it was") from error


def aside_of(path: Path) -> Path:
    """Where :func:`written_whole` writes what will be at ``path``."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force the bytes to disk, so that the rename never survives a crash that the contents did not."""
    for file in _files(path):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _files(path: Path) -> list[Path]:
    """The file, or every file of the folder."""
    return [path] if path.is_file() else [inside for inside in path.rglob("*") if inside.is_file()]


def usual_permissions(files: Iterable[Path]) -> None:
    """Give files that are their owner's alone the permissions of any new file; safetensors 0.8 writes 0600.

    What a new file gets is tried, not worked out: the umask cannot be read without setting it, for all threads, and in
    a folder with a default access list it does not count.
    """
    for file in files:
        present = file.stat().st_mode & 0o777
        if not present & 0o077 and (usual := _mode_of_new_file(file)) != present:
            file.chmod(usual)


def _mode_of_new_file(neighbour: Path) -> int:
    probe = neighbour.with_name(f".{uuid.uuid4().hex}.probe")
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def lines(text: str) -> list[str]:
    """The lines of a text: only a newline, alone or after a carriage return, ends one.

    ``str.splitlines`` would also end one at U+0085, U+2028, a form feed and others, which may stand inside a prompt.
    """
    return re.split("\r?\n", text)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, with or without a byte order mark; a lone carriage return stays in its line."""
    return lines(path.read_bytes().decode("utf-8-sig"))


def read_yaml(text: str) -> Any:
    """A YAML document of plain values, of a size that a person writes.

    Raises:
        ValueError: it is longer, or its aliases stand for more values than may be; or it holds itself.
        yaml.YAMLError, RecursionError: it is no YAML, or nested too deeply.
    """
    if len(text) > LONGEST_YAML:
        raise ValueError(f"it has {len(text)} characters, more than the {LONGEST_YAML} that are read")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values it stands for, each alias written out; one that is being counted is 0 in ``counted``."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError("an alias in it stands for what it is a part of")
        return counted[id(node)]
    counted[id(node)] = 0
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
    counted[id(node)] = 1 + sum(_count_nodes(part, counted) for part in parts)
    if counted[id(node)] > MOST_YAML_VALUES:
        raise ValueError(f"with its aliases it has more than {MOST_YAML_VALUES} values")
    return counted[id(node)]


def settle_header(file: Path) -> None:
    """Put a safetensors file's header into one order: its metadata comes in another at every writing."""
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
        settled = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(settled) > length:  # never of a header that safetensors wrote
            raise ValueError(f"the header of {str(file)!r} cannot be put into order: {len(settled)} > {length} bytes")
        handle.seek(8)
        handle.write(settled.ljust(length))


def complete_lines(path: Path, errors: str = "strict") -> list[str]:
    """The lines of a log that were written whole and are not blank; a kill can cut the last one short.

    Args:
        errors: what becomes of bytes that are not UTF-8, see ``bytes.decode``.
    """
    return [line for line in lines(path.read_bytes().decode(errors=errors))[:-1] if line.strip()]


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


SEAL = "sha256"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of plain values with a checksum of the others at its end."""
    return {**record, SEAL: _checksum(record)}


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether a record is what :func:`sealed` made of it; one without a checksum passes."""
    return SEAL not in record or record[SEAL] == _checksum({key: record[key] for key in record if key != SEAL})


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON and a command line can bring half of a character, a lone surrogate."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def is_path(pretrained: str | Path) -> bool:
    """Whether a place on this machine is meant, there or not; "owner/name" is a hub id."""
    name = str(pretrained)
    return isinstance(pretrained, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1


def nearest_folder(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above that does."""
    return next(place for place in (path, *path.resolve().parents) if place.exists())
