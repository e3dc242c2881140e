"""Another scale of guidance than a run was trained with, which must be said: pictures of two scales do not compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.recipe import load_recipe
from vipo.runs.directory import RunDirectory
from vipo.schema import GeneratorSection
from vipo.types import Generator

KEY = "guidance_scale"  # of ``generator.options``


def guided(section: GeneratorSection, scale: float | None) -> GeneratorSection:
    """The same model with another scale of guidance; None leaves it."""
    return section if scale is None else section.model_copy(update={"options": {**section.options, KEY: scale}})


def check_guidance(generator: Generator, scale: float | None) -> None:
    """Raises:
    UserError: a scale is given to a model that does not look at it.
    """
    if scale is not None and not getattr(generator, "takes_guidance", True):
        raise UserError("this model takes no guidance; leave out --guidance-scale")


def guidance_note(generator: Generator, trained: GeneratorSection) -> list[str]:
    """A sentence if the generator samples at another scale than it was trained at, by the run's own section."""
    used, then = _scale(generator), _trained_scale(generator, trained)
    if used is None or then is None or used == then or not getattr(generator, "takes_guidance", True):
        return []
    return [f"guidance {used:g}, but the run trained at {then:g} (--guidance-scale {then:g} samples as it was trained)"]


def run_behind(exported: Path | None) -> GeneratorSection | None:
    """The section of the run whose export lies in its folder, or is a file of it; None if that cannot be told."""
    for folder in () if exported is None else (exported, *exported.parents[:1]):
        run = RunDirectory(folder.resolve().parent)
        if folder.name.startswith("export") and run.exists() and run.checkpoints.is_dir():
            return _section_of(run)
    return None


def _section_of(run: RunDirectory) -> GeneratorSection | None:
    try:
        return load_recipe(run.recipe).generator
    except UserError:  # it is asked for a remark only: an export needs no recipe
        return None


def _scale(generator: Any) -> float | None:
    guidance = getattr(generator, "guidance", None)
    return None if guidance is None else float(guidance.scale)


def _trained_scale(generator: Any, section: GeneratorSection) -> float | None:
    usual = getattr(generator, "usual", None)  # a generator of the user's own need not say
    scale = section.options.get(KEY, None if usual is None else usual.guidance.scale)
    return None if scale is None else float(scale)
