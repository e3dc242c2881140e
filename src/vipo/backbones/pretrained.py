"""Load a frozen vision network with transformers: a hub id or a local folder, safetensors only, nothing left random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipo.backbones.preprocess import freeze
from vipo.pretrained import load_network


def load_pretrained(
    backbone: str, pretrained: str | Path, classes: Mapping[str, str], *, dtype: str = "float32"
) -> Any:
    """The network in ``pretrained``, frozen; arguments and errors are those of :func:`vipo.pretrained.load_network`.

    ``backbone`` is the name the user knows, for messages.
    """
    return freeze(load_network(f"backbone {backbone!r}", pretrained, classes, dtype=dtype))
