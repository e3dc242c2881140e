"""A plain pipeline, as a folder or on the hub: its adapter, what it makes unless told otherwise, a LoRA on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from vipo.assemble import model_path
from vipo.errors import UserError
from vipo.generators import choose, makes_video
from vipo.generators.folder import pipeline_class, read_config
from vipo.generators.lora import attach_lora
from vipo.recipe import parse_section
from vipo.schema import GeneratorSection
from vipo.types import Generator

# How a plain model is sampled unless told otherwise. Steps by adapter, as its diffusers pipeline has them.
PLAIN_STEPS: Mapping[str, int] = {"flux": 28, "sd3": 28, "flux2": 50, "qwen_image": 50, "z_image": 50, "wan": 50}
NOTHING = "is neither a run directory nor a diffusers pipeline, as a folder or on the hub"
PICTURE_SIDE = 1024  # pixels, where the autoencoder does not say
# A Wan's clips by its autoencoder's stride: emoji-wan, Wan2.1 at 480p, Wan2.2-TI2V-5B at 720p.
WAN_CLIPS: Mapping[int, Mapping[str, int]] = {
    4: {"height": 64, "width": 64, "frames": 17, "fps": 8},
    8: {"height": 480, "width": 832, "frames": 81, "fps": 16},
    16: {"height": 704, "width": 1280, "frames": 121, "fps": 24},
}


def plain_section(target: str, given: Mapping[str, Any]) -> GeneratorSection:
    """How to build a plain model: what is ``given`` of its section, or else what it was made for.

    Raises:
        UserError: no pipeline that an adapter knows, sides that contradict each other, or a rate of pictures.
    """
    if "size" in given and {"height", "width"} & given.keys():
        raise UserError("--size is short for --height and --width, both that long; give it or them")
    path = model_path(target)
    name = choose(None, pipeline_class(path, absent=NOTHING), path)
    square = {side: given["size"] for side in ("height", "width") if "size" in given}
    asked = {key: value for key, value in given.items() if key != "size"}
    options = {"name": name, "path": path, **_usual_media(path, name), **square, **asked}
    section = parse_section(GeneratorSection, options, source="size")
    if "fps" in given and section.frames == 1:
        raise UserError(f"{target!r} makes single pictures, which have no frames per second; leave out --fps")
    return section


def _usual_media(path: str, name: str) -> Mapping[str, int]:
    """What a pipeline's media measure unless told otherwise, from its autoencoder."""
    autoencoder = read_config(path, "vae")
    if makes_video(name):
        return WAN_CLIPS.get(int(autoencoder.get("scale_factor_spatial", 8)), WAN_CLIPS[8])
    side = int(autoencoder.get("sample_size", PICTURE_SIDE))
    return {"height": side, "width": side}


def put_on_lora(generator: Generator, lora: Path) -> Callable[[], AbstractContextManager[None]]:
    """Load a LoRA into the generator's network; what is returned switches it off.

    Raises:
        UserError: the generator takes none, or the LoRA does not fit.
    """
    pipeline, network = getattr(generator, "pipeline", None), generator.network
    if not hasattr(pipeline, "lora_state_dict"):
        raise UserError(f"{type(generator).__name__} takes no LoRA; leave out --lora")
    attach_lora(pipeline, lora)

    @contextmanager
    def without() -> Iterator[None]:
        network.disable_lora()  # type: ignore[operator]
        try:
            yield
        finally:
            network.enable_lora()  # type: ignore[operator]

    return without
