"""Text-to-image and text-to-video models behind one interface: one file per diffusers pipeline, one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vipo import registry
from vipo.errors import UserError

if TYPE_CHECKING:
    from vipo.types import Generator

MEDIA = ("pipeline", "height", "width", "frames")  # what an adapter takes that is not among generator.options


@dataclass(frozen=True)
class GeneratorEntry(registry.Entry):
    """An adapter and what it adapts; its class has ``from_pretrained(path, *, device, dtype, **options)``."""

    pipelines: tuple[str, ...]  # the diffusers classes it reads, as model_index.json names them


GENERATORS: dict[str, GeneratorEntry] = {
    "flux": GeneratorEntry(
        "vipo.generators.flux:FluxGenerator", "FLUX.1 (dev, schnell) and the embedded emoji-flux", ("FluxPipeline",)
    ),
    "sd3": GeneratorEntry(
        "vipo.generators.sd3:StableDiffusion3Generator", "Stable Diffusion 3 and 3.5", ("StableDiffusion3Pipeline",)
    ),
    "flux2": GeneratorEntry(
        "vipo.generators.flux2:Flux2KleinGenerator", "FLUX.2 klein, base and distilled", ("Flux2KleinPipeline",)
    ),
    "qwen_image": GeneratorEntry("vipo.generators.qwen_image:QwenImageGenerator", "Qwen-Image", ("QwenImagePipeline",)),
    "z_image": GeneratorEntry("vipo.generators.z_image:ZImageGenerator", "Z-Image", ("ZImagePipeline",)),
    "wan": GeneratorEntry(
        "vipo.generators.wan:WanGenerator", "Wan2.1 and Wan2.2 5B text to video, and emoji-wan", ("WanPipeline",)
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
    return registry.find("generator", GENERATORS, name, otherwise=", or give file.py:thing")


def adapter(name: str) -> Any:
    """The class called ``name``, which is made of a diffusers pipeline and options.

    Raises:
        UserError: there is no such adapter.
    """
    return entry(name).load()


def factory(name: str) -> Callable[..., Generator]:
    """``from_pretrained`` of the adapter called ``name``.

    Raises:
        UserError: there is no such adapter.
    """
    made: Callable[..., Generator] = adapter(name).from_pretrained
    return made


def options(name: str) -> list[str]:
    """What the adapter takes beyond the size of its media, by name."""
    takes: tuple[str, ...] = adapter(name).takes
    return list(takes)


def makes_video(name: str) -> bool:
    """Whether the adapter called ``name`` takes a number of frames."""
    return "frames" in entry(name).parameters()


def arguments(name: str, *, height: int, width: int, frames: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter called ``name`` is made from, beside its pipeline; it checks its options itself.

    Raises:
        UserError: frames for one that makes pictures.
    """
    video = {"frames": frames} if makes_video(name) else {}
    if not video and frames != 1:
        raise UserError(f"generator {name!r} makes pictures: generator.frames={frames} must be 1")
    return {"height": height, "width": width, **video, **given}
