"""Load a network with transformers: a hub id or a local folder, safetensors only, nothing left random; tell it again.

Backbones and rewards share it. ``user`` is who asks, in the words of a message: "backbone 'dinov2'".
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vipo.files import lines
from vipo.types import UserError

PROBED = 64  # elements of each tensor that a fingerprint looks at
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_network(user: str, pretrained: str | Path, classes: Mapping[str, str], *, dtype: str = "float32") -> Any:
    """The network in ``pretrained``.

    Args:
        user: who asks, for messages.
        pretrained: hub id or local folder with config.json and safetensors weights.
        classes: model_type in config.json -> name of the transformers class that reads it.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        UserError: nothing there, another kind of model, or weights that do not fill the network.
    """
    import transformers

    pretrained = folder_or_id(user, pretrained)
    kind = dtype_named(user, dtype)
    model_type = _model_type(user, pretrained)
    if model_type not in classes:
        raise UserError(f"{pretrained} holds a model of type {model_type!r}; {user} accepts {', '.join(classes)}")
    model_class = getattr(transformers, classes[model_type])
    with quiet():
        try:
            network, report = model_class.from_pretrained(
                str(pretrained), dtype=kind, use_safetensors=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(not_found(user, pretrained, "safetensors weights", error)) from error
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise UserError(
            f"{pretrained} lacks {len(lacking)} tensors of {classes[model_type]}, the first is {lacking[0]!r};"
            " is it a checkpoint of another model? Download it again or point pretrained= elsewhere"
        )
    return network


def fingerprint(network: torch.nn.Module) -> str:
    """A digest of a network's weights from some elements of every tensor, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        flat = tensor.detach().flatten()
        probes = flat[:: max(1, len(flat) // PROBED)].double().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + probes.tobytes())
    return digest.hexdigest()


def dtype_named(user: str, dtype: str) -> torch.dtype:
    """The torch type of a name."""
    if dtype not in DTYPES:
        raise UserError(f"{user} has no dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[dtype]


def folder_or_id(user: str, pretrained: str | Path) -> str:
    """A folder where one was meant, a hub id otherwise."""
    folder = Path(pretrained).expanduser()
    if is_path(pretrained) and not folder.is_dir():
        raise UserError(not_found(user, pretrained, "such folder", FileNotFoundError("it does not exist")))
    return str(folder if folder.is_dir() else pretrained)


def is_path(pretrained: str | Path) -> bool:
    """Whether a place on this machine is meant, there or not; "owner/name" is a hub id."""
    name = str(pretrained)
    return isinstance(pretrained, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1


def not_found(
    user: str,
    pretrained: str | Path,
    part: str,
    error: Exception,
    accepted: str = "a folder with config.json and model.safetensors",
    option: str = "pretrained=FOLDER",
) -> str:
    """What to tell a user whose model is not where it was said to be."""
    return (
        f"{user} found no {part} at {str(pretrained)!r}. Accepted: a hub id that can be downloaded from here, or"
        f" {accepted}. Download it once where there is a network and pass {option}."
        f" Cause: {cause(error)}"
    )


def cause(error: Exception) -> str:
    """The first line of what went wrong, for the end of a sentence."""
    return lines(str(error))[0] or type(error).__name__


@contextmanager
def quiet(library: str = "transformers", level: int = logging.ERROR) -> Iterator[None]:
    """Keep a library's remarks on loaded keys off the terminal: what they say is checked here."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _model_type(user: str, pretrained: str | Path) -> str:
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(str(pretrained))
    except (OSError, ValueError) as error:
        raise UserError(not_found(user, pretrained, "config.json", error)) from error
    if "model_type" not in config:
        raise UserError(not_found(user, pretrained, "config.json with a model_type", ValueError("none in there")))
    return str(config["model_type"])
