"""Text-to-image and text-to-video models behind one interface: one file per diffusers pipeline, one line here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vipo.types import Generator, UserError


@dataclass(frozen=True)
class GeneratorEntry:
    """Where an adapter lives and what it adapts. Importing is left until it is built."""

    target: str  # "module:class"; the class has ``from_pretrained(path, *, device, dtype, **options)``
    pipelines: tuple[str, ...]  # the diffusers classes it reads, as model_index.json names them
    summary: str


GENERATORS: dict[str, GeneratorEntry] = {
    "flux": GeneratorEntry(
        "vipo.generators.flux:FluxGenerator", ("FluxPipeline",), "FLUX.1 (dev, schnell) and the embedded emoji-flux"
    ),
    "sd3": GeneratorEntry(
        "vipo.generators.sd3:StableDiffusion3Generator", ("StableDiffusion3Pipeline",), "Stable Diffusion 3 and 3.5"
    ),
    "flux2": GeneratorEntry(
        "vipo.generators.flux2:Flux2KleinGenerator", ("Flux2KleinPipeline",), "FLUX.2 klein, base and distilled"
    ),
    "qwen_image": GeneratorEntry("vipo.generators.qwen_image:QwenImageGenerator", ("QwenImagePipeline",), "Qwen-Image"),
    "z_image": GeneratorEntry("vipo.generators.z_image:ZImageGenerator", ("ZImagePipeline",), "Z-Image"),
    "wan": GeneratorEntry(
        "vipo.generators.wan:WanGenerator", ("WanPipeline",), "Wan2.1 and Wan2.2 5B text to video, and emoji-wan"
    ),
}


def adapter_of(pipeline: str) -> str | None:
    """The adapter that reads a diffusers pipeline class, if there is one."""
    return next((name for name, known in GENERATORS.items() if pipeline in known.pipelines), None)


def choose(asked: str | None, pipeline: str, path: str) -> str:
    """The adapter for a pipeline of the class ``pipeline``: the one ``asked`` for, which must read it, or else its own.

    Raises:
        UserError: there is no such adapter, it reads other pipelines, or none reads this one.
    """
    if asked is not None and pipeline in entry(asked).pipelines:
        return asked
    found = adapter_of(pipeline)
    if found is None:
        known = ", ".join(sorted(name for adapter in GENERATORS.values() for name in adapter.pipelines))
        raise UserError(f"{path!r} is a {pipeline}; vipo adapts {known}")
    if asked is not None:
        raise UserError(
            f"generator.name={asked} reads {' and '.join(GENERATORS[asked].pipelines)}, but generator.path={path} is a"
            f" {pipeline}; leave generator.name out or set it to {found}, or give another path"
        )
    return found


def entry(name: str) -> GeneratorEntry:
    """What is known of the adapter called ``name``.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    if name not in GENERATORS:
        near = difflib.get_close_matches(name, GENERATORS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"there is no generator {name!r}; choose from {', '.join(GENERATORS)}.{hint}")
    return GENERATORS[name]


def _adapter(name: str) -> Any:
    module, attribute = entry(name).target.split(":")
    return getattr(import_module(module), attribute)


def factory(name: str) -> Callable[..., Generator]:
    """``from_pretrained`` of the adapter called ``name``.

    Raises:
        UserError: there is no such adapter.
    """
    return _adapter(name).from_pretrained


def options(name: str) -> list[str]:
    """What the adapter takes beyond the size of its media, by name."""
    common = {"pipeline", "height", "width", "frames"}
    return [key for key in inspect.signature(_adapter(name)).parameters if key not in common]


def makes_video(name: str) -> bool:
    """Whether the adapter called ``name`` takes a number of frames."""
    return "frames" in inspect.signature(_adapter(name)).parameters


def arguments(name: str, *, height: int, width: int, frames: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter called ``name`` is built with, beside its pipeline.

    Raises:
        UserError: an option it does not take, or frames for one that makes pictures.
    """
    accepted = options(name)
    for key in given:
        if key not in accepted:
            raise UserError(f"generator {name!r} takes no option {key!r}; it takes {', '.join(accepted)}")
    video = {"frames": frames} if makes_video(name) else {}
    if not video and frames != 1:
        raise UserError(f"generator {name!r} makes pictures: generator.frames={frames} must be 1")
    return {"height": height, "width": width, **video, **given}
