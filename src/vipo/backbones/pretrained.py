"""Load a frozen vision network with transformers: a hub id or a local folder, safetensors only, nothing left random."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vipo.backbones.preprocess import freeze
from vipo.types import UserError


def load_pretrained(
    backbone: str, pretrained: str | Path, classes: Mapping[str, str], *, dtype: str = "float32"
) -> Any:
    """The network in ``pretrained``, frozen.

    Args:
        backbone: the name the user knows, for messages.
        pretrained: hub id or local folder with config.json and safetensors weights.
        classes: model_type in config.json -> name of the transformers class that reads it.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        UserError: nothing there, another kind of model, or weights that do not fill the network.
    """
    import transformers

    pretrained = _existing(backbone, pretrained)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise UserError(f"backbone {backbone!r} has no dtype {dtype!r}; choose from {', '.join(kinds)}")
    model_type = _model_type(backbone, pretrained)
    if model_type not in classes:
        raise UserError(
            f"{pretrained} holds a model of type {model_type!r}; backbone {backbone!r} accepts {', '.join(classes)}"
        )
    model_class = getattr(transformers, classes[model_type])
    with _quiet():
        try:
            network, report = model_class.from_pretrained(
                str(pretrained), dtype=kinds[dtype], use_safetensors=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(_not_loaded(backbone, pretrained, "safetensors weights", error)) from error
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise UserError(
            f"{pretrained} lacks {len(lacking)} tensors of {classes[model_type]}, the first is {lacking[0]!r};"
            " is it a checkpoint of another model? Download it again or point pretrained= elsewhere"
        )
    return freeze(network)


def _existing(backbone: str, pretrained: str | Path) -> str:
    """A folder where one was meant, a hub id otherwise."""
    folder = Path(pretrained).expanduser()
    is_path = (
        isinstance(pretrained, Path) or str(pretrained).startswith(("/", ".", "~")) or str(pretrained).count("/") > 1
    )
    if is_path and not folder.is_dir():
        raise UserError(_not_loaded(backbone, pretrained, "such folder", FileNotFoundError("it does not exist")))
    return str(folder if folder.is_dir() else pretrained)


def _model_type(backbone: str, pretrained: str | Path) -> str:
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(str(pretrained))
    except (OSError, ValueError) as error:
        raise UserError(_not_loaded(backbone, pretrained, "config.json", error)) from error
    if "model_type" not in config:
        raise UserError(_not_loaded(backbone, pretrained, "config.json with a model_type", ValueError("none in there")))
    return str(config["model_type"])


def _not_loaded(backbone: str, pretrained: str | Path, part: str, error: Exception) -> str:
    return (
        f"backbone {backbone!r} found no {part} at {str(pretrained)!r}. Accepted: a hub id that can be downloaded from"
        " here, or a folder with config.json and model.safetensors. Download it once where there is a network and pass"
        f" pretrained=FOLDER. Cause: {str(error).splitlines()[0]}"
    )


class _quiet:  # noqa: N801
    """Keep transformers' table of loaded keys off the terminal: what it says is checked here."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("transformers")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
