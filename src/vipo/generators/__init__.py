"""Text-to-image and text-to-video models behind one interface: one file per diffusers pipeline, one line here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vipo.types import Generator, UserError


@dataclass(frozen=True)
class GeneratorEntry:
    """Where an adapter lives and what it adapts. Importing is left until it is built."""

    target: str  # "module:class"; the class has ``from_pretrained(path, *, device, dtype, **options)``
    summary: str


GENERATORS: dict[str, GeneratorEntry] = {
    "flux": GeneratorEntry("vipo.generators.flux:FluxGenerator", "FLUX.1 (dev, schnell) and the embedded emoji-flux"),
}


def _adapter(name: str) -> Any:
    if name not in GENERATORS:
        near = difflib.get_close_matches(name, GENERATORS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"there is no generator {name!r}; choose from {', '.join(GENERATORS)}.{hint}")
    module, attribute = GENERATORS[name].target.split(":")
    return getattr(import_module(module), attribute)


def factory(name: str) -> Callable[..., Generator]:
    """``from_pretrained`` of the adapter called ``name``.

    Raises:
        UserError: there is no such adapter.
    """
    return _adapter(name).from_pretrained


def options(name: str) -> list[str]:
    """What the adapter takes beyond the picture's size, by name."""
    common = {"pipeline", "height", "width"}
    return [key for key in inspect.signature(_adapter(name)).parameters if key not in common]
