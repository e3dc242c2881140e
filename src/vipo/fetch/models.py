"""Models as needs: a pipeline and a frozen network, on the hub or in a folder, and what of them is here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vipo.fetch.need import Need, State
from vipo.files import is_path

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin")
HALF = 2  # bytes of a published weight, at least: which files are in float32 is not known without asking the hub
SETTINGS = ("*.json", "*.txt")  # of a network and its tokenizer


@cache
def published() -> Mapping[str, Any]:
    """Hub repositories by id: weights by part, counted from the published configs; licence and gate where known.

    The counts are those of :mod:`vipo.plan.published`'s configs (a test holds them together). Licences are what the
    models' own pages and licence files name; null is not known here.
    """
    parsed: Mapping[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    return parsed


def cached(repository: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def pipeline_need(path: str, user: str) -> Need:
    """A diffusers pipeline: a folder that holds it, or a hub id of which its parts are wanted."""
    folder = Path(path).expanduser()
    if is_path(path) or folder.is_dir():
        lacking = lacking_parts(folder, {}) if (folder / INDEX).is_file() else (INDEX,)
        hint = None if not lacking else "write it there, or give a hub id as generator.path"
        return Need(path, "file", (user,), _state(lacking, folder.is_dir()), str(folder), lacking, hint=hint)
    known = published().get(path, {})
    parts, index = known.get("parts", {}), cached(path, INDEX)
    lacking = (INDEX,) if index is None else lacking_parts(index.parent, parts)
    wanted = (INDEX, *(f"{part}/*" for part in parts)) if parts else (INDEX, "*/*")
    return Need(
        path,
        "model",
        (user,),
        _state(lacking, index is not None),
        None if index is None else str(index.parent),
        lacking,
        wanted,
        size=sum(parts.values()) * HALF if parts else None,
        at_least=bool(parts),
        licence=known.get("licence"),
        gated=known.get("gated"),
    )


def lacking_parts(folder: Path, parts: Mapping[str, int]) -> tuple[str, ...]:
    """What a pipeline's folder lacks of what its index names: whole parts, or weights that a part's own index names."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        named = [part for part, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]]
    except (OSError, ValueError):
        return (INDEX,)
    return tuple(gap for part in named for gap in _gaps(folder, part, parts.get(part)))


def _gaps(folder: Path, part: str, weights: int | None) -> list[str]:
    place = folder / part
    files = [file.name for file in place.iterdir()] if place.is_dir() else []
    indexes = [name for name in files if name.endswith(".index.json")]
    if indexes:
        listed = json.loads((place / indexes[0]).read_text(encoding="utf-8")).get("weight_map", {})
        return [f"{part}/{shard}" for shard in sorted(set(listed.values()) - set(files))]
    has_network = weights if weights is not None else "config.json" in files
    whole = any(name.endswith(WEIGHTS) for name in files) if has_network else bool(files)
    return [] if whole else [f"{part}/*"]


def network_need(
    name: str, user: str, files: Sequence[str], *, size: int | None = None, licence: str | None = None
) -> Need:
    """A frozen network or a tokenizer: ``files`` must be there, on the hub or in a folder, or ``name`` a file."""
    path = Path(name).expanduser()
    if is_path(name) or path.exists():
        lacking = () if path.is_file() else tuple(file for file in files if not (path / file).is_file())
        return Need(name, "file", (user,), _state(lacking, path.is_dir()), str(path), lacking, licence=licence)
    known = published().get(name, {})
    places = {file: cached(name, file) for file in files}
    lacking = tuple(file for file, place in places.items() if place is None)
    there = [place.parent for place in places.values() if place is not None]
    counted = known.get("weights", 0) * known.get("bytes_per_weight", 0)
    return Need(
        name,
        "model",
        (user,),
        _state(lacking, bool(there)),
        str(there[0]) if there else None,
        lacking,
        tuple(dict.fromkeys(pattern for file in files for pattern in _patterns(file))),
        size=counted or size,
        licence=known.get("licence") or licence,
        gated=known.get("gated"),
    )


def _patterns(file: str) -> tuple[str, ...]:
    """What belongs to a file: to weights in transformers' format and to a vocabulary, the settings beside them."""
    if "/" in file:  # a folder of its own, with its tokenizer
        return (f"{file.rsplit('/', 1)[0]}/*",)
    if file.endswith((".json", ".txt")):
        return SETTINGS
    return (file, *SETTINGS)


def _state(lacking: Sequence[str], any_there: bool) -> State:
    if not lacking:
        return "there"
    return "in part" if any_there else "missing"
