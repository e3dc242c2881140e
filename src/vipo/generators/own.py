"""A generator of the user's own, ``file.py:thing``: made as a recipe says, held to the protocol, its answers checked.

What the file names is called with the model's path, or its ``from_pretrained`` is, where it has one, as the adapters
of this package do. So a subclass of an adapter needs nothing but what it does otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.generators.folder import pipeline_class
from vipo.registry import parameters
from vipo.types import Batched, Generator
from vipo.user_answer import checked
from vipo.user_file import GENERATOR, answering, make, named_in_file

PARTS = ("network", "temporal_stride", "shift", "lora_targets")
METHODS = ("encode", "latent_shape", "velocity", "decode", "save_lora", "save_pretrained")
# Settings of a recipe that a generator may leave alone as long as they say this.
USUAL: Mapping[str, Any] = {"frames": 1, "dtype": torch.float32, "quantization": "none", "text_quantization": "none"}
EDGE = 1e-3  # how far beyond [0, 1] media may be: rounding
LoadedOr = Any  # a diffusers pipeline that is there already


def build(
    name: str, path: str, offered: Mapping[str, Any], options: Mapping[str, Any], *, pipeline: LoadedOr = None
) -> Generator:
    """The generator that the file makes of the model at ``path``, or of a ``pipeline`` that is there already.

    Args:
        offered: the recipe's settings (device, dtype, height, width, ...); it is given those that it has.
        options: its own, all of them.

    Raises:
        UserError: the file gives no generator, it reads another pipeline, or leaves alone what the recipe sets.
    """
    thing = named_in_file(GENERATOR, name)
    _check_pipeline(name, thing, path, pipeline)
    taken = _taken(thing)
    for key, usual in USUAL.items():
        if key not in taken and offered[key] != usual:
            raise UserError(
                f"generator {name!r} takes no {key}, so generator.{key}={_shown(offered[key])} would do nothing; leave"
                f" that out, or let it take {key}"
            )
    given = {key: value for key, value in offered.items() if key in taken}
    if pipeline is None:
        made = make(name, getattr(thing, "from_pretrained", thing), path, **given, **options)
    else:
        sizes = {key: value for key, value in given.items() if key in ("height", "width", "frames")}
        made = make(name, thing, pipeline, **thing.arguments({**sizes, **options}))
    _check_parts(name, made)
    return _watched(name, made, (offered["frames"], offered["height"], offered["width"]))


def _check_pipeline(name: str, thing: Any, path: str, pipeline: LoadedOr) -> None:
    """Raises:
    UserError: it names the class of pipeline that it reads, and that is not what there is to read.
    """
    wanted = getattr(thing, "pipeline_class", None)
    if pipeline is not None and (wanted is None or not hasattr(thing, "arguments")):
        raise UserError(
            f"generator {name!r} loads its model itself and takes no pipeline that is there already; derive it from"
            " vipo.generators.common.DiffusersGenerator, or give generator.path alone"
        )
    if wanted is None:
        return
    found = pipeline_class(path) if pipeline is None else type(pipeline).__name__
    if found != wanted.__name__:
        raise UserError(
            f"generator {name!r} reads a {wanted.__name__}, but generator.path={path} is a {found}; give another path"
        )


def _taken(thing: Any) -> set[str]:
    """What it can be given by name; of a class also what those that it derives from take."""
    makers = [*(thing.__mro__[:-1] if isinstance(thing, type) else [thing]), getattr(thing, "from_pretrained", thing)]
    return {key for maker in makers for key in parameters(maker)}


def _check_parts(name: str, made: Any) -> None:
    """Raises:
    UserError: it lacks what a generator has.
    """
    lacking = [part for part in PARTS if not hasattr(made, part)]
    lacking += [method for method in METHODS if not callable(getattr(made, method, None))]
    if lacking:
        raise UserError(
            f"{name} made a {type(made).__name__}, which is no generator: it has no {', '.join(lacking)}; derive it"
            " from an adapter such as vipo.generators.flux.FluxGenerator, or give it what vipo.types.Generator lists"
        )
    if not isinstance(made.network, nn.Module):
        raise UserError(
            f"the network of generator {name!r} is a {type(made.network).__name__}; a torch.nn.Module is trained"
        )
    with answering(GENERATOR, name):
        shape = made.latent_shape()
    if not isinstance(shape, tuple) or len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UserError(f"generator {name!r} has the latent_shape() {shape!r}; return (C, T, H, W) of one sample")


def _watched(name: str, made: Any, media: tuple[int, int, int]) -> Generator:
    """The same object, whose answers are looked at whenever it gives one; nothing here waits for the device, but for
    decoded media, which are waited for in any case.
    """
    frames, height, width = media

    def check_rows(given: Any, prompts: Any) -> None:
        lengths = {len(getattr(given, f.name)) for f in fields(given)} if isinstance(given, Batched) else None
        if lengths != {len(prompts)}:
            what = f"a {type(given).__name__}" if lengths is None else f"{' and '.join(map(str, lengths))} rows"
            raise UserError(
                f"generator {name!r} returned {what} from encode; return a vipo.types.Batched, a frozen dataclass of"
                f" tensors with one row per prompt, here {len(prompts)}"
            )

    def check_velocity(given: Any, latents: Tensor, *_: Any, **__: Any) -> None:
        said = "(N, C, T, H, W) from velocity, float32"
        checked(GENERATOR, name, given, [tuple(latents.shape)], said, finite=False)
        if given.dtype != torch.float32:
            raise UserError(f"generator {name!r} returned {given.dtype} from velocity; return float32")

    def check_media(given: Any, latents: Tensor) -> None:
        said = "(N, 3, F, Y, X) from decode, as generator.frames, height and width have it"
        checked(GENERATOR, name, given, [(len(latents), 3, frames, height, width)], said, finite=False)
        low, high = (float(edge) for edge in torch.aminmax(given))
        if low < -EDGE or high > 1 + EDGE:
            raise UserError(f"generator {name!r} decoded media from {low:.3g} to {high:.3g}; return them in [0, 1]")

    for method, check in (("encode", check_rows), ("velocity", check_velocity), ("decode", check_media)):
        _watch(name, made, method, check)
    return cast("Generator", made)


def _watch(name: str, made: Any, method: str, check: Callable[..., None]) -> None:
    answer = getattr(made, method)

    @wraps(answer)
    def watched(*given: Any, **named: Any) -> Any:
        with answering(GENERATOR, name):
            answered = answer(*given, **named)
            check(answered, *given, **named)
        return answered

    try:
        object.__setattr__(made, method, watched)
    except AttributeError as error:
        raise UserError(f"generator {name!r} cannot be watched ({error}); leave out its __slots__") from error


def _shown(value: Any) -> str:
    return str(value).removeprefix("torch.")
