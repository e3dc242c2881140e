"""vipo: online reinforcement learning for image and video generators, with credit where the picture earned it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vipo.assemble import build
    from vipo.recipe import load_recipe
    from vipo.report.table import metrics_frame
    from vipo.runs.run import train
    from vipo.structuring import PerceptualStructuring

__version__ = "0.1.0"

# Loaded on first use, so that `import vipo` and `vipo --help` stay fast.
_HOMES = {
    "build": "vipo.assemble",
    "load_recipe": "vipo.recipe",
    "metrics_frame": "vipo.report.table",
    "train": "vipo.runs.run",
    "PerceptualStructuring": "vipo.structuring",
    "objective": "vipo",
    "sde": "vipo",
    "structuring": "vipo",
}

__all__ = ["PerceptualStructuring", "__version__", "build", "load_recipe", "metrics_frame", "train"]


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__, *_HOMES})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vipo' has no attribute {name!r}")
    if _HOMES[name] == "vipo":
        return import_module(f"vipo.{name}")
    return getattr(import_module(_HOMES[name]), name)
