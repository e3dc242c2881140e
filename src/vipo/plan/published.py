"""Published configurations of models, as data: what a hub repository's config.json files say, with where it was read.

``configs/parts.json`` holds one entry per network (class, config, source), ``configs/models.json`` puts them together
to pipelines by hub id, ``configs/judges.json`` says which network a reward or backbone loads by default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.generators.folder import pipeline_class, read_config

FOLDER = Path(__file__).parent / "configs"


@cache
def table(name: str) -> Mapping[str, Any]:
    """One of the three files: ``parts``, ``models`` or ``judges``."""
    parsed: Mapping[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return parsed


def model_config(path: str) -> dict[str, Any]:
    """What a pipeline consists of: ``pipeline`` (its class), ``options`` and one entry per component.

    A component is ``{"library", "class", "config"}``, a tokenizer the number of tokens it takes, or None.

    Args:
        path: a pipeline folder, of which only the config files are read, or a published hub id.

    Raises:
        UserError: neither.
    """
    if (Path(path) / "model_index.json").is_file():
        return _of_folder(Path(path))
    if path in table("models"):
        return _of_hub(table("models")[path])
    raise UserError(
        f"{path!r} cannot be planned: it is no pipeline folder (with model_index.json), and its configuration does not"
        f" ship with vipo. Accepted: a folder that holds the model's config files (the weights are not needed), or"
        f" {', '.join(table('models'))}"
    )


def _of_hub(entry: Mapping[str, Any]) -> dict[str, Any]:
    components = {name: value for name, value in entry.items() if name not in ("pipeline", "options")}
    found = {name: table("parts")[value] if isinstance(value, str) else value for name, value in components.items()}
    return {**found, "pipeline": entry["pipeline"], "options": entry.get("options", {})}


def _of_folder(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"pipeline": pipeline_class(str(folder)), "options": {}}
    for name, value in read_config(str(folder)).items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):
            found["options"][name] = value
        elif value[0] is None:
            found[name] = None
        elif name.startswith("tokenizer"):
            found[name] = int(_read(folder / name, "tokenizer_config.json")["model_max_length"])
        elif (folder / name).is_dir() and not name.startswith(("feature_extractor", "processor", "image_processor")):
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            found[name] = {"library": value[0], "class": value[1], "config": _read(folder / name, file)}
    return found


def _read(folder: Path, file: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(folder / file)!r} cannot be read, so the model cannot be planned: {error}") from error
    return parsed
