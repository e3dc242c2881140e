"""A generator without weights: the real adapter around the real networks, whose tensors have shapes and no storage.

Everything is built inside a ``FakeTensorMode``: parameters, buffers and activations know their shape, dtype and device,
operations compute shapes only, and autograd and autocast behave as they do on a CPU. So a network of any size can be
run forward and backward in seconds, in a few hundred megabytes, through the code that a run would use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vipo import generators
from vipo.embedded import path as embedded_path
from vipo.generators.folder import one_line, refuse_quantised
from vipo.plan.published import model_config
from vipo.policy import Policy
from vipo.recipe import GeneratorSection, Recipe
from vipo.rollout import Solver, Window
from vipo.types import Batched, UserError

EMBEDDED = "embedded:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Tokenizer:
    """Stands in for a tokenizer: adapters read nothing but how many tokens it takes."""

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length


@dataclass(frozen=True)
class Blueprint:
    """What :func:`draw` makes of a recipe: parts as a run would build them, without weights."""

    recipe: Recipe
    mode: FakeTensorMode
    generator: Any  # a vipo.generators.common.DiffusersGenerator
    policy: Policy
    solver: Solver

    @property
    def network(self) -> nn.Module:
        network: nn.Module = self.generator.pipeline.transformer
        return network

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks that FSDP wraps one by one."""
        return wrapped_blocks(self.network)


def wrapped_blocks(network: nn.Module) -> list[nn.Module]:
    """Instances of the classes that a diffusers model names as not to be split."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    return [module for module in network.modules() if type(module).__name__ in names]


def draw(recipe: Recipe) -> Blueprint:
    """Build a recipe's generator, policy and solver without weights.

    Raises:
        UserError: the model's configuration is not known, or an option does not fit it.
    """
    section = recipe.generator
    adapter: Any = getattr(generators.factory(adapter_name(section)), "__self__")  # noqa: B009 - a bound from_pretrained
    mode = FakeTensorMode()
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        pipeline = empty_pipeline(section.path, adapter.pipeline_class, DTYPES[section.dtype])
        for name in adapter.float32_parts:
            getattr(pipeline, name).float()
        targets = _generator(recipe, adapter, pipeline).lora_targets
        trained = set(_policy(recipe, pipeline.transformer, targets).parameters)
    with mode:
        for network in (pipeline.transformer, pipeline.vae):
            shapes_only(network)
        generator = _generator(recipe, adapter, pipeline)
        for name, parameter in pipeline.transformer.named_parameters():
            parameter.requires_grad_(name in trained)
        is_lora, decay = recipe.policy.kind == "lora", recipe.policy.ema_decay
        compared = recipe.objective.kl_weight > 0
        policy = Policy(pipeline.transformer, is_lora=is_lora, ema_decay=decay, keep_reference=compared)
        if recipe.training.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        if recipe.training.precision == "bf16":
            _autocast(pipeline.transformer)
    window = Window(**recipe.solver.window.model_dump()) if recipe.solver.window else None
    options = recipe.solver.model_dump(exclude={"window", "shift"})
    solver = Solver(shift=recipe.solver.shift or generator.shift, window=window, **options)
    return Blueprint(recipe, mode, generator, policy, solver)


def adapter_name(section: GeneratorSection) -> str:
    """The adapter that a recipe names, or else the one that reads its model.

    Raises:
        UserError: the model's configuration is not known, or the adapter named reads other models.
    """
    return generators.choose(section.name, model_config(_place(section.path))["pipeline"], section.path)


def _place(path: str) -> str:
    return str(embedded_path(path.removeprefix(EMBEDDED))) if path.startswith(EMBEDDED) else path


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
        for home in (module._parameters, module._buffers, vars(module)):
            for name, value in list(home.items()):
                if isinstance(value, Tensor | list):
                    home[name] = swap(value)


def _generator(recipe: Recipe, adapter: Any, pipeline: Any) -> Any:
    section = recipe.generator
    sizes = {"height": section.height, "width": section.width, "frames": section.frames}
    generator = adapter(pipeline, **generators.arguments(adapter_name(section), **sizes, given=section.options))
    if not hasattr(generator, "blank_conditioning"):
        raise UserError(
            f"generator {adapter_name(section)!r} cannot be planned: its adapter has no blank_conditioning(rows), which"
            " says the shape of encoded prompts; add the method (CONTRIBUTING.md, a generator)"
        )
    generator.encode_text = lambda prompts: generator.blank_conditioning(len(prompts))
    return generator


def _autocast(network: Any) -> None:
    """As Accelerate prepares it: a pass of the network runs under autocast, and nothing else does."""
    forward = network.forward

    def casting(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    network.forward = casting


def _policy(recipe: Recipe, network: nn.Module, named: Mapping[str, str]) -> Policy:
    section = recipe.policy
    if section.kind == "full":
        return Policy.full(network, keep_reference=False)
    targets = named.get(section.targets, section.targets)
    network.requires_grad_(False)
    return Policy.lora(network, rank=section.rank, alpha=1.0, targets=targets, seed=recipe.seed)


def empty_pipeline(path: str, expected: type[Any], dtype: torch.dtype) -> Any:
    """A pipeline of the class ``expected`` whose networks have no weights.

    Raises:
        UserError: the folder or hub id is no pipeline, or a quantised one.
    """
    found = model_config(_place(path))
    for part, entry in found.items():
        if isinstance(entry, Mapping) and "config" in entry:
            refuse_quantised(path, part, entry["config"])
    taken = set(expected._get_signature_keys(expected)[0]) | set(expected._get_signature_keys(expected)[1])
    parts = {name: _part(path, name, value, dtype) for name, value in found.items() if name in taken}
    absent = {name: None for name in expected._get_signature_keys(expected)[0] if name not in parts}
    return expected(**absent, **parts, **{k: v for k, v in found["options"].items() if k in taken})


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
        if entry["library"] == "transformers":
            import transformers

            cls = getattr(transformers, entry["class"])
            network: nn.Module = cls(cls.config_class.from_dict(dict(entry["config"])))
            return network
        import diffusers

        network = getattr(diffusers, entry["class"]).from_config(dict(entry["config"]))
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, parameter in network.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
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
