"""A pretrained model before and after it is loaded: folder or hub id, dtype by name, what to tell, its fingerprint.

``user`` is who asks, in the words of a message: "backbone 'dinov2'".
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vipo.errors import UserError
from vipo.files import is_path, lines
from vipo.offline import hub_is_silent

PROBED = 64  # elements of each tensor that a fingerprint looks at
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fingerprint(network: torch.nn.Module) -> str:
    """A digest of a network's weights from some elements of every tensor, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        for part in _plain(tensor.detach()):
            flat = part.flatten()
            probes = flat[:: max(1, len(flat) // PROBED)].double().cpu().numpy()
            digest.update(f"{name}{tuple(part.shape)}".encode() + probes.tobytes())
    return digest.hexdigest()


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor is stored in: itself, or the plain tensors of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    inner: Any = tensor
    return [part for name in inner.__tensor_flatten__()[0] for part in _plain(getattr(tensor, name))]


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
    if not folder.is_dir():
        hub_is_silent()
    return str(folder if folder.is_dir() else pretrained)


def not_found(
    user: str,
    pretrained: str | Path,
    part: str,
    error: Exception,
    accepted: str = "a folder with config.json and model.safetensors",
    option: str = "pretrained=FOLDER",
) -> str:
    """What to tell a user whose model is not where it was said to be."""
    on_hub = isinstance(error, OSError) and not is_path(pretrained) and not Path(pretrained).exists()
    silent = hub_is_silent() if on_hub else None
    return (
        f"{user} found no {part} at {str(pretrained)!r}. Accepted: a hub id that can be downloaded from here, or"
        f" {accepted}. Download it once where there is a network and pass {option}."
        f" Cause: {silent or cause(error)}"
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
