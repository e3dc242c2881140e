"""What a pipeline folder or hub id says of itself, read before any weights: its class, its parts, their settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.files import is_path
from vipo.offline import hub_is_silent

ACCEPTED = "a folder or hub id with model_index.json, as diffusers' save_pretrained writes it, or embedded:NAME"


def read_config(
    path: str, part: str | None = None, *, absent: str = "is not a diffusers pipeline"
) -> Mapping[str, Any]:
    """What a pipeline says of itself (model_index.json), or of its ``part`` (config.json).

    Of a hub id only that file is fetched. ``absent`` is the verdict when there is nothing to read.

    Raises:
        UserError: there is no such pipeline, or the file cannot be read.
    """
    from diffusers import AutoencoderKL, DiffusionPipeline

    if not path or (is_path(path) and not Path(path).exists()):  # the hub need not be asked
        raise UserError(f"{path!r} {absent}: there is no such folder; give {ACCEPTED}")
    reader: Any = DiffusionPipeline if part is None else AutoencoderKL  # any model's class reads a config.json
    silent = None if Path(path).is_dir() else hub_is_silent()
    try:
        config: Mapping[str, Any] = reader.load_config(path, subfolder=part)
    except (OSError, ValueError) as error:
        where = f"{path!r} {absent}" if part is None else f"{part}/config.json of {path!r} cannot be read"
        if silent is not None:
            raise UserError(
                f"{where}: it is not in the hub's cache here, and {silent}. Else give {ACCEPTED}"
            ) from error
        raise UserError(f"{where}; give {ACCEPTED}. Cause: {one_line(error)}") from error
    return config


def pipeline_class(path: str, *, absent: str = "is not a diffusers pipeline") -> str:
    """The diffusers class that model_index.json names.

    Raises:
        UserError: there is none.
    """
    config = read_config(path, absent=absent)
    if not isinstance(config, Mapping) or "_class_name" not in config:
        raise UserError(f"model_index.json of {path!r} names no pipeline class (_class_name); give {ACCEPTED}")
    return str(config["_class_name"])


def refuse_quantised(path: str, part: str, config: Mapping[str, Any]) -> None:
    """Weights in a quantised layout are neither trained nor sampled here.

    Raises:
        UserError: the part's config has a ``quantization_config``.
    """
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "an unnamed method") if isinstance(found, Mapping) else found
        raise UserError(
            f"the {part} of {path!r} is quantised (quantization_config in {part}/config.json: {method}); vipo loads"
            " float32, bfloat16 and float16 weights, and quantises them itself: give the model that is not quantised,"
            " and for less memory set generator.dtype=bfloat16 or generator.quantization"
        )


def one_line(error: Exception) -> str:
    """What went wrong, short enough for the end of a sentence."""
    return " ".join(str(error).split())[:300] or type(error).__name__
