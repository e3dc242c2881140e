"""Put a LoRA file on a pipeline's transformer, strictly: all of the file goes in, and nothing else is put there.

diffusers only warns about tensors that find no layer, and leaves adapters that found no tensor at random values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.generators.folder import one_line
from vipo.generators.lora_file import (
    BARE,
    COMFY,
    DIFFUSERS,
    KOHYA,
    PEFT,
    READ,
    LoraFile,
    RefusedLoraError,
    parse,
    read_lora,
)
from vipo.generators.weights import some
from vipo.types import LoraLayer

Size = tuple[int, ...]

ADAPTER = "default"
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
SHARED_NAMES = (
    0.8  # of a file's layers must be the model's own for the others to count as slips; Z-Image's authors share some
)
CONVERSION = (ValueError, KeyError, IndexError, TypeError, AttributeError, NameError, RuntimeError)


def attach_lora(pipeline: Any, path: Path) -> None:
    """Load the LoRA in ``path``, a safetensors file or the folder that holds it.

    Raises:
        UserError: there is none, or it is not wholly one of this model: the tensors at fault are named, and the network
            is as it was.
    """
    network = pipeline.transformer
    layers = fitting_layers(pipeline, path)
    state = {f"{name}.{half}.weight": part for name, layer in layers.items() for half, part in layer.halves}
    network.load_lora_adapter(dict(state), prefix=None, adapter_name=ADAPTER)
    loaded = dict(_loaded(network))
    strange = [
        n
        for n in state.keys() | loaded.keys()
        if n not in state or n not in loaded or not loaded[n].equal(state[n].to(loaded[n]))
    ]
    if strange:
        network.delete_adapters(ADAPTER)
        raise UserError(
            f"LoRA {str(path)!r} did not arrive in the network as it is in the file: {some(sorted(strange))}"
        )


def fitting_layers(pipeline: Any, path: Path) -> Mapping[str, LoraLayer]:
    """The layers of the LoRA in ``path`` by diffusers' names for them, each of which is one of the transformer's.

    Raises:
        UserError: there is none, or it is not wholly one of this model.
    """
    try:
        return layers_for(pipeline, read_lora(path))
    except RefusedLoraError as reason:
        raise UserError(f"LoRA {str(path)!r} {reason}") from reason


def layers_for(pipeline: Any, file: LoraFile) -> Mapping[str, LoraLayer]:
    """The file's layers by diffusers' names for them.

    Raises:
        RefusedLoraError: they are not those of this transformer.
    """
    weights = _sizes(pipeline.transformer)
    own = sum(name in weights for name in file.layers) / len(file.layers)
    if own > SHARED_NAMES or file.prefix == DIFFUSERS:
        check_fit(file.layers, weights, file.config)
        return file.layers
    if file.prefix == BARE:
        raise RefusedLoraError(f"has names in no layout that is known, such as {next(iter(file.layers))}; {READ}")
    layers = _converted(pipeline, file)
    check_fit(layers, weights, None)
    return layers


def _sizes(network: nn.Module) -> dict[str, Size]:
    """The sizes of the weights that a LoRA may sit on, by layer; quantised ones are stored in other sizes."""
    modules = dict(network.named_modules())
    linear = {name: (m.out_features, m.in_features) for name, m in modules.items() if isinstance(m, nn.Linear)}
    return linear | {name: tuple(m.weight.shape) for name, m in modules.items() if isinstance(m, CONVOLUTIONS)}


def check_fit(layers: Mapping[str, LoraLayer], weights: Mapping[str, Size], config: LoraConfig | None) -> None:
    """Each layer of the file is one of the network, of its size, and none is missing.

    What should be there is what ``config`` names. Without it, blocks from the first one on that end before the
    network's last are taken for a shallower model's.

    Raises:
        RefusedLoraError: it does not fit.
    """
    unknown = sorted(layers.keys() - weights.keys())
    missing = (
        []
        if config is None
        else sorted(n for n in weights if check_target_module_exists(config, n) and n not in layers)
    )
    if unknown or missing:
        said = [f"has {some(unknown, 'layer')} that this model has not"] * bool(unknown)
        said += [f"lacks {some(missing, 'layer')} that its settings name"] * bool(missing)
        raise RefusedLoraError(f"{' and '.join(said)}; were they renamed, or was it made for another model?")
    for name, layer in layers.items():
        takes, weight = (len(layer.up), *layer.down.shape[1:]), weights[name]
        if takes != weight:
            raise RefusedLoraError(f"is for a weight of size {takes} in {name}, where this model has {weight}")
    if config is None:
        _check_depth(layers, weights)


def _check_depth(layers: Mapping[str, LoraLayer], weights: Mapping[str, Size]) -> None:
    there, covered = _blocks(weights), _blocks(layers)
    for stack, blocks in covered.items():
        if len(blocks) < len(there[stack]) and blocks == set(range(len(blocks))):
            raise RefusedLoraError(
                f"ends with block {len(blocks) - 1} of {stack}, of which this model has {len(there[stack])}, as one"
                " made for a shallower model would; if only the first blocks were trained, PEFT's target_modules must"
                " say so, in adapter_config.json or in the header that diffusers writes"
            )


def _blocks(names: Mapping[str, Any]) -> dict[str, set[int]]:
    """The outermost numbered stacks that layers are in, and which blocks of each."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(r"(\w+)\.(\d+)\.", name):
            found.setdefault(match[1], set()).add(int(match[2]))
    return found


def _converted(pipeline: Any, file: LoraFile) -> dict[str, LoraLayer]:
    """Layers under their authors' names, by diffusers' own conversion for this family.

    A scale that they all share stays beside them; others go into the tensors, because layers may be split and joined.
    """
    family = type(pipeline).__name__
    scales = {layer.scale for layer in file.layers.values()}
    shared = (scales.pop() if len(scales) == 1 else 0) or 1.0
    given = {name: replace(layer, scale=layer.scale / shared) for name, layer in file.layers.items()}
    try:
        state = type(pipeline).lora_state_dict(_spelled(given, file.prefix))
        marks = {
            name: LoraLayer(_filled(layer.down, 2 * k + 1), _filled(layer.up, 2 * k + 2))
            for k, (name, layer) in enumerate(file.layers.items())
        }
        marked = type(pipeline).lora_state_dict(_spelled(marks, file.prefix))
    except CONVERSION as error:
        raise RefusedLoraError(
            f"is in a layout that diffusers does not convert for {family} ({one_line(error)}); {READ}"
        ) from error
    if any(not name.startswith(DIFFUSERS) for name in state):
        named = next(iter(file.layers))
        raise RefusedLoraError(f"names layers such as {named}, which diffusers does not convert for {family}; {READ}")
    arrived = {value for tensor in marked.values() for value in tensor.unique().tolist()}
    if lost := [name for name, mark in marks.items() if not {float(part.max()) for _, part in mark.halves} <= arrived]:
        raise RefusedLoraError(f"has {some(lost, 'layer')} that diffusers' conversion for {family} leaves out")
    return {name: replace(layer, scale=layer.scale * shared) for name, layer in parse(state, DIFFUSERS).items()}


def _filled(like: Tensor, value: int) -> Tensor:
    """A number in the place of each element, which survives being split, joined and reordered: so it can be found."""
    return torch.full_like(like, value, dtype=torch.float32)


def _spelled(layers: Mapping[str, LoraLayer], prefix: str) -> dict[str, Tensor]:
    """Tensors named so that diffusers recognises the layout."""
    if prefix == KOHYA:
        ranks = {f"{prefix}{name}.alpha": torch.tensor(float(layer.rank)) for name, layer in layers.items()}
        parts = {"lora_A": "lora_down", "lora_B": "lora_up"}
        return {
            f"{prefix}{name}.{parts[half]}.weight": part
            for name, layer in layers.items()
            for half, part in layer.halves
        } | ranks
    start = COMFY if prefix == PEFT else prefix  # beneath PEFT's wrapper the names are the same
    return {f"{start}{name}.{half}.weight": part for name, layer in layers.items() for half, part in layer.halves}


def _loaded(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors in the network, with a scale of 1."""
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer) and ADAPTER in module.lora_A:
            yield f"{name}.lora_A.weight", module.lora_A[ADAPTER].weight.detach()
            yield f"{name}.lora_B.weight", module.lora_B[ADAPTER].weight.detach() * module.scaling[ADAPTER]
