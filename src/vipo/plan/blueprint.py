"""A generator without weights: the real adapter around the real networks, whose tensors have shapes and no storage.

Everything is built inside a ``FakeTensorMode``: parameters, buffers and activations know their shape, dtype and device,
operations compute shapes only, and autograd and autocast behave as they do on a CPU. So a network of any size can be
run forward and backward in seconds, in a few hundred megabytes, through the code that a run would use.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vipo import generators
from vipo.assemble import Model, build_generator, model_path, open_to_train
from vipo.errors import UserError
from vipo.generators.folder import one_line, refuse_quantised
from vipo.generators.quantization import kept_in_float32
from vipo.options import Solver
from vipo.plan.published import model_config
from vipo.plan.quantised import quantise
from vipo.policy import Policy
from vipo.pretrained import DTYPES
from vipo.schema import GeneratorSection, Recipe
from vipo.sharding import wrapped_blocks
from vipo.training.losses import Loss, without_code
from vipo.types import Batched
from vipo.user_file import is_user_file


class Tokenizer:
    """Stands in for a tokenizer: adapters read nothing but how many tokens it takes."""

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length


@dataclass(frozen=True)
class Blueprint:
    """What :func:`draw` makes of a recipe: the model that a run would train, without weights."""

    recipe: Recipe
    mode: FakeTensorMode
    model: Model

    @property
    def generator(self) -> Any:  # a vipo.generators.common.DiffusersGenerator
        return self.model.generator

    @property
    def policy(self) -> Policy:
        return self.model.policy

    @property
    def solver(self) -> Solver:
        return self.model.solver

    @property
    def network(self) -> nn.Module:
        return self.model.generator.network

    @property
    def loss(self) -> Loss:
        return without_code(self.recipe.objective, self.solver)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks that FSDP wraps one by one."""
        return wrapped_blocks(self.network)


def draw(recipe: Recipe) -> Blueprint:
    """Build the model of a recipe without weights, by the functions that build a run's.

    Raises:
        UserError: the model's configuration is not known, or an option does not fit it.
    """
    recipe = _without_own_generator(recipe)
    mode = FakeTensorMode()
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        pipeline = empty_pipeline(recipe.generator)
        model = open_to_train(recipe, device="meta", pipeline=pipeline)
        trained = set(model.policy.parameters)
    network = model.generator.network
    with mode:
        for part in (network, pipeline.vae):
            shapes_only(part)
        # An adapter keeps tensors of its own, so it is built again on the new ones; it freezes the network.
        generator = build_generator(recipe.generator, device="cpu", pipeline=pipeline)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
        _leave_text_blank(generator)
        if recipe.training.precision == "bf16":
            _autocast(network, cached=recipe.training.sharding in ("none", "zero2"))
        model.policy.begin()
    return Blueprint(recipe, mode, replace(model, generator=generator))


def adapter_name(section: GeneratorSection) -> str:
    """The adapter that a recipe names, or else, also in place of the user's own, the one that reads its model.

    Raises:
        UserError: the model's configuration is not known, or the adapter named reads other models.
    """
    asked = None if is_own(section) else section.name
    return generators.choose(asked, model_config(model_path(section.path))["pipeline"], section.path)


def is_own(section: GeneratorSection) -> bool:
    """Whether the generator is the user's, whose code a plan does not run."""
    return section.name is not None and is_user_file(section.name)


def _without_own_generator(recipe: Recipe) -> Recipe:
    """With the adapter of its pipeline in its place, and of its options those that this one takes too."""
    section = recipe.generator
    if not is_own(section):
        return recipe
    name = adapter_name(section)
    options = {key: value for key, value in section.options.items() if key in generators.options(name)}
    return recipe.model_copy(update={"generator": section.model_copy(update={"name": name, "options": options})})


def shapes_only(network: nn.Module) -> None:
    """Swap every tensor of a network on the meta device for one that passes for a CPU tensor; inside a fake mode."""
    swapped: dict[int, Any] = {}

    def swap(value: Any) -> Any:
        if isinstance(value, list):
            return [swap(entry) for entry in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) not in swapped:
            empty = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            is_weight = isinstance(value, nn.Parameter)
            swapped[id(value)] = nn.Parameter(empty, value.requires_grad) if is_weight else empty
        return swapped[id(value)]

    for module in network.modules():
        own = {"recurse": False, "remove_duplicate": False}
        parameters, buffers = module.named_parameters("", **own), module.named_buffers("", **own)
        for name, value in [*parameters, *buffers, *vars(module).items()]:
            if isinstance(value, Tensor | list):
                setattr(module, name, swap(value))


def _leave_text_blank(generator: Any) -> None:
    """Let prompts be zeros of their shape: there are no encoders to read them."""
    if not hasattr(generator, "blank_text"):
        raise UserError(
            f"{type(generator).__name__} cannot be planned: it has no blank_text(), after which prompts are zeros of"
            " their shape; add it (CONTRIBUTING.md, a generator)"
        )
    generator.blank_text()


def _autocast(network: Any, *, cached: bool) -> None:
    """As the engine prepares it: a pass of the network runs under autocast, and nothing else does.

    Args:
        cached: autocast keeps a cast weight to the end of the pass; where weights are cut it would keep them all whole.
    """
    forward = network.forward

    def casting(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            return forward(*args, **kwargs)

    network.forward = casting


def empty_pipeline(section: GeneratorSection) -> Any:
    """The pipeline at ``section.path``, its networks without weights, in the dtypes that they are loaded in.

    Raises:
        UserError: the folder or hub id is no pipeline that an adapter reads, or a quantised one.
    """
    found = model_config(model_path(section.path))
    for part, entry in found.items():
        if isinstance(entry, Mapping) and "config" in entry:
            refuse_quantised(section.path, part, entry["config"])
    adapter = generators.adapter(adapter_name(section))
    taken = inspect.signature(adapter.pipeline_class).parameters
    dtype = DTYPES[section.dtype]
    parts = {name: _part(section.path, name, value, dtype) for name, value in found.items() if name in taken}
    absent = {name: None for name, p in taken.items() if p.default is p.empty and name not in parts}
    options = {name: value for name, value in found["options"].items() if name in taken}
    pipeline = adapter.pipeline_class(**absent, **parts, **options)
    for name in adapter.float32_parts:
        getattr(pipeline, name).float()
    quantise(pipeline.transformer, section.quantization, dtype)
    for name in adapter.text_reader.encoder_names:
        if (encoder := getattr(pipeline, name)) is not None:
            quantise(encoder, section.text_quantization, dtype)
    return pipeline


def _part(path: str, name: str, entry: Any, dtype: torch.dtype) -> Any:
    try:
        return _component(entry, dtype)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"the {name} of {path!r} cannot be built from its configuration: {one_line(error)}") from error


def _component(entry: Any, dtype: torch.dtype) -> Any:
    if entry is None:
        return None
    if isinstance(entry, int):
        return Tokenizer(entry)
    if "Scheduler" in entry["class"]:
        import diffusers

        with torch.device("cpu"):  # it looks at its own numbers
            return getattr(diffusers, entry["class"]).from_config(entry["config"])
    return empty_network(entry, dtype)


def empty_network(entry: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A network from its class and config. Modules that its class keeps in float32 stay there, as when it is loaded."""
    with _default_dtype(dtype):
        network = _from_config(entry)
    kept = kept_in_float32(network, dtype)
    for name, parameter in network.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return network


def _from_config(entry: Mapping[str, Any]) -> nn.Module:
    network: nn.Module
    if entry["library"] == "transformers":
        import transformers

        cls = getattr(transformers, entry["class"])
        network = cls(cls.config_class.from_dict(dict(entry["config"])))
    else:
        import diffusers

        network = getattr(diffusers, entry["class"]).from_config(dict(entry["config"]))
    return network


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def conditioning(generator: Any, rows: int) -> Batched:
    """Encoded prompts of the right shape."""
    encoded: Batched = generator.encode([""] * rows)
    return encoded
