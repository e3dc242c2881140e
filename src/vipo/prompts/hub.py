"""Prompts out of data sets on the Hugging Face hub, pinned by commit: ``hub:OWNER/NAME...@COMMIT``.

========================================= ===========================================================================
``hub:OWNER/NAME/FILE.json@COMMIT``       one file of it, read as a prompt file; kept in the hub's own cache
``hub:OWNER/NAME@COMMIT?split=train``     a data set that ``datasets`` reads, row by row; its prompts are kept
``hub:./FOLDER?split=train``              likewise, out of a folder
========================================= ===========================================================================

What is kept lies under ``HF_HOME``, so that a run needs no network, nor ``datasets``, once ``vipo fetch`` was there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.files import written_whole
from vipo.offline import hub_is_silent
from vipo.prompts.selection import MEANINGS, Selection, selection, split

HUB = "hub:"
COMMIT = re.compile(r"[0-9a-f]{40}")
LOADING = ("config", "split")  # of datasets.load_dataset
Row = Mapping[str, Any]
Entry = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class HubSource:
    """A data set, or one file of it, at one commit.

    Args:
        name: as it was given.
        repository: hub id, or a folder.
        file: within it; None reads it with ``datasets``.
        commit: None for a folder.
        loading: what ``datasets.load_dataset`` is told, and ``select`` which rows are taken.
    """

    name: str
    repository: str
    file: str | None
    commit: str | None
    loading: Mapping[str, str]
    select: Selection

    @property
    def kept(self) -> Path:
        """Where the prompts lie once they were read with ``datasets``."""
        from huggingface_hub.constants import HF_HOME

        digest = hashlib.sha256(self.name.encode()).hexdigest()[:24]
        return Path(HF_HOME) / "vipo" / "prompts" / f"{digest}.jsonl"

    @property
    def is_here(self) -> bool:
        """Whether no network is needed."""
        if self.commit is None:
            return Path(self.repository).is_dir()
        return self.downloaded() is not None if self.file else self.kept.is_file()

    def downloaded(self) -> Path | None:
        """The file, if it is here."""
        from huggingface_hub import try_to_load_from_cache

        assert self.file is not None
        found = try_to_load_from_cache(self.repository, self.file, revision=self.commit, repo_type="dataset")
        return Path(found) if isinstance(found, str) else None


def hub_source(name: str) -> HubSource:
    """What a name that begins with ``hub:`` stands for.

    Raises:
        UserError: it names no data set or no commit, or asks for something that there is not.
    """
    plain, asked = split(name.removeprefix(HUB))
    loading = {key: asked.pop(key)[0] for key in LOADING if key in asked}
    select = selection(name, asked)
    if plain.startswith((".", "/", "~")):
        return HubSource(name, str(Path(plain).expanduser()), None, None, loading, select)
    place, _, commit = plain.partition("@")
    owner, _, rest = place.partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        keys = ", ".join((*LOADING, *MEANINGS))
        raise UserError(
            f"{name!r} names no data set; give hub:OWNER/NAME@COMMIT, hub:OWNER/NAME/FILE@COMMIT or hub:./FOLDER, then"
            f" perhaps ? and {keys}"
        )
    place = f"{owner}/{repository}"
    if not COMMIT.fullmatch(commit):
        raise UserError(
            f"{name!r} is not pinned, so it may be another list tomorrow; give the commit, 40 hex digits after @, from"
            f" https://huggingface.co/datasets/{place}/commits/main"
        )
    if file and loading:
        raise UserError(f"{name!r}: {', '.join(loading)} go with a whole data set, not with one file of it")
    return HubSource(name, place, file or None, commit, loading, select)


def download(source: HubSource) -> Path:
    """One file of a data set, out of the hub's cache or from the hub.

    Raises:
        UserError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    assert source.file is not None
    silent = hub_is_silent()
    try:
        found = hf_hub_download(source.repository, source.file, repo_type="dataset", revision=source.commit)
        return Path(found)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise UserError(_unread(source, silent or error)) from error


def rows(source: HubSource) -> Iterator[Row]:
    """The rows of a data set, one after the other, never all of them in memory.

    Raises:
        UserError: ``datasets`` is not installed or cannot read it.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{source.name!r} needs datasets: pip install 'vipo[datasets]', or name one file,"
            " hub:OWNER/NAME/FILE@COMMIT"
        ) from error
    silent = None if source.commit is None else hub_is_silent()
    options = {"name": source.loading.get("config"), "split": source.loading.get("split", "train")}
    try:
        stream = load_dataset(source.repository, revision=source.commit, streaming=True, **options)
        yield from _columns(stream, source.select)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # RuntimeError: data sets that are a script
        if isinstance(error, UserError):
            raise
        raise UserError(_unread(source, (isinstance(error, OSError) and silent) or error)) from error


def _columns(stream: Any, select: Selection) -> Any:
    """Only the columns that are asked for, where they are known: pictures beside a prompt need not be decoded."""
    if select.column is None:
        return stream
    wanted = {select.column, *select.keep, *(condition.column for condition in select.where)}
    if not wanted <= set(stream.column_names or ()):
        return stream
    return stream.select_columns(sorted(wanted))


def kept_entries(source: HubSource, read: Callable[[Iterable[Row]], list[Entry]]) -> list[Entry]:
    """The prompts that ``read`` makes of the rows; of a pinned data set they are kept, and read once only."""
    if source.commit is None:
        return read(rows(source))
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # it is among its public names

    source.kept.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(source.kept.with_suffix(".lock")):  # processes that train together ask at the same time
        if not source.kept.is_file():
            with written_whole(source.kept) as aside:
                found = read(rows(source))
                aside.write_text("".join(json.dumps(entry) + "\n" for entry in found), encoding="utf-8")
    return [(text, metadata) for text, metadata in map(json.loads, source.kept.open(encoding="utf-8"))]


def _unread(source: HubSource, error: Exception | str) -> str:
    why = " ".join(str(error).split())[:300] or type(error).__name__
    return (
        f"{source.name!r} cannot be read: {why}. `vipo fetch RECIPE --download` gets what a recipe needs, where there"
        " is a network"
    )
