"""What is in a LoRA file: its layers under the file's own names, and the settings it was trained with.

A LoRA adds scale * B A to the weights of some layers (arXiv 2106.09685). A is ``down``, (r, in), B is ``up``, (out, r);
the scale is alpha / r, or alpha / sqrt(r) with PEFT's ``use_rslora``.

Layouts are told apart by how the names of the tensors begin:

===================== ==================== ====================================================================
``transformer.``      diffusers            alpha in the file's header, beside the layer, or none: a scale of 1
``base_model.model.`` PEFT                 alpha in adapter_config.json, which must lie beside the file
``diffusion_model.``  ComfyUI              alpha beside the layer, or none
``lora_unet_``        kohya                likewise
(none of these)       the bare network's   as PEFT, or as diffusers
===================== ==================== ====================================================================
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vipo.generators.folder import one_line
from vipo.generators.weights import some
from vipo.types import LoraLayer

DIFFUSERS, PEFT, COMFY, KOHYA, BARE = "transformer.", "base_model.model.", "diffusion_model.", "lora_unet_", ""
READ = (
    "vipo reads LoRA of the transformer in the layouts of diffusers (transformer.NAME.lora_A.weight), PEFT"
    " (base_model.model.NAME...), ComfyUI (diffusion_model.NAME...) and kohya (lora_unet_NAME...)"
)
USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and PEFT, in a folder
SETTINGS = "adapter_config.json"  # PEFT's, beside the file
HEADER = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings in the file

TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:\.\w+)?\.weight"
)
TEXT = re.compile(r"(base_model\.model\.)?(text_encoder|lora_te|te\d?_|text_model|conditioner)")
OTHER_KINDS = {  # what a tensor's name may hold beside plain LoRA
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "LoRA with biases",
    "lora_embedding": "LoRA of embeddings",
    ".diff": "differences of whole weights",
}
# PEFT settings that mean more than scale * B A, and the values of each that do not.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # the others change the base weights too
}


class RefusedLoraError(Exception):
    """Why a file is not taken, as the rest of a sentence that begins with its name."""


@dataclass(frozen=True)
class LoraFile:
    """A file's content.

    Args:
        prefix: how its names begin, which is its layout.
        layers: by their names without the prefix.
        config: what PEFT trained with, where that is known.
    """

    prefix: str
    layers: Mapping[str, LoraLayer]
    config: LoraConfig | None


def read_lora(path: Path) -> LoraFile:
    """Read a file, or the one in a folder.

    Raises:
        RefusedLoraError: there is none, or a tensor of it is not understood.
    """
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            header = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RefusedLoraError(f"is not a safetensors file that can be read ({one_line(error)}); {READ}") from error
    prefix = _layout(tensors)
    config = _config(file, prefix, header)
    return LoraFile(prefix, parse(tensors, prefix, config), config)


def weights_file(path: Path) -> Path:
    """The file that ``path`` means: itself, or the one in a folder."""
    if not path.exists():
        raise RefusedLoraError("does not exist; give a .safetensors file or the folder that holds one")
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors"))
    usual = [file for file in found if file.name in USUAL_NAMES]
    if len(usual or found) == 1:
        return (usual or found)[0]
    held = some([file.name for file in found], "file") if found else "none"
    raise RefusedLoraError(f"must hold one .safetensors file, or one named {' or '.join(USUAL_NAMES)}; it holds {held}")


def is_lora(path: Path) -> bool:
    """Whether ``path`` looks like a LoRA on its own: a file of tensors, or a folder with one under a usual name."""
    if (path / "model_index.json").is_file():  # a whole pipeline
        return False
    return path.suffix == ".safetensors" or any((path / name).is_file() for name in USUAL_NAMES)


def _layout(tensors: Mapping[str, Tensor]) -> str:
    """How the names begin, all of them."""
    if text := [name for name in tensors if TEXT.match(name)]:
        raise RefusedLoraError(
            f"has {some(text)} for a text encoder, which stays as it is here; give the transformer's alone"
        )
    for part, kind in OTHER_KINDS.items():
        if odd := [name for name in tensors if part in name]:
            raise RefusedLoraError(f"has {kind}: {some(odd)}; {READ}")
    known = (DIFFUSERS, PEFT, COMFY, KOHYA)
    starts = Counter(start for name in tensors for start in known if name.startswith(start))
    prefix = starts.most_common(1)[0][0] if starts else BARE
    if not tensors:
        raise RefusedLoraError("holds no tensor")
    if odd := [name for name in tensors if not name.startswith(prefix)]:
        raise RefusedLoraError(
            f"has {some(odd)} beside its layout, in which names begin with {prefix!r}; were they renamed?"
        )
    return prefix


def _config(file: Path, prefix: str, header: Mapping[str, str]) -> LoraConfig | None:
    """What PEFT trained with, where the file or its folder says so."""
    beside = file.with_name(SETTINGS)
    try:
        if prefix == DIFFUSERS and HEADER in header:
            stored = json.loads(header[HEADER])
            return _checked({key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)})
        if prefix in (PEFT, BARE) and beside.is_file():
            return _checked(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, re.error) as error:
        raise RefusedLoraError(f"comes with settings that cannot be read: {one_line(error)}") from error
    if prefix == PEFT:
        raise RefusedLoraError(f"is in PEFT's layout, but no {beside.name} lies beside it to say its lora_alpha")
    return None


def _checked(given: Mapping[str, Any]) -> LoraConfig:
    """Settings of a plain LoRA, with numbers and expressions where they belong."""
    for key, plain in PLAIN.items():
        if key in given and given[key] not in plain:
            raise RefusedLoraError(f"was trained with {key}={given[key]!r}, which is more than a LoRA; {READ}")
    known = {entry.name for entry in fields(LoraConfig)}
    config = LoraConfig(**{key: value for key, value in given.items() if key in known and value is not None})
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    for number in (config.r, config.lora_alpha, *ranks.values(), *alphas.values()):
        float(number)
    for expression in (*ranks, *alphas, *([config.target_modules] if isinstance(config.target_modules, str) else [])):
        re.compile(expression)
    return config


def parse(tensors: Mapping[str, Tensor], prefix: str, config: LoraConfig | None = None) -> dict[str, LoraLayer]:
    """Tensors to layers, by the names that follow ``prefix``.

    Raises:
        RefusedLoraError: a tensor is no part of a LoRA, or its other part is missing.
    """
    halves: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}}
    alpha: dict[str, float] = {}
    odd = []
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if match := TENSOR.fullmatch(short):
            halves["down" if match["down"] else "up"][match["layer"]] = tensor
        elif short.endswith(".alpha") and tensor.numel() == 1:
            alpha[short.removesuffix(".alpha")] = float(tensor)
        else:
            odd.append(name)
    down, up = halves.values()
    if odd:
        raise RefusedLoraError(f"has {some(odd)} that is no part of a LoRA; {READ}")
    if alone := sorted((down.keys() ^ up.keys()) | (alpha.keys() - down.keys())):
        raise RefusedLoraError(f"has A without B, B without A or alpha without both for {some(alone, 'layer')}")
    if alpha and config:
        raise RefusedLoraError("says its alpha twice, beside its layers and in its settings; remove one of them")
    return {name: _layer(name, down[name], up[name], alpha.get(name), config) for name in down}


def _layer(name: str, down: Tensor, up: Tensor, alpha: float | None, config: LoraConfig | None) -> LoraLayer:
    if down.ndim < 2 or up.ndim < 2 or len(down) != up.shape[1]:
        raise RefusedLoraError(f"has no common rank in {name}: A is {tuple(down.shape)}, B is {tuple(up.shape)}")
    return LoraLayer(down, up, _scale(name, len(down), alpha, config))


def _scale(name: str, rank: int, alpha: float | None, config: LoraConfig | None) -> float:
    if config is None:
        return 1.0 if alpha is None else alpha / rank
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    expected = ranks.get(get_pattern_key(list(ranks), name), config.r)
    if rank != expected:
        raise RefusedLoraError(f"has rank {rank} in {name}, but its settings say {expected}")
    chosen = float(alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha))
    return chosen / rank**0.5 if config.use_rslora else chosen / rank
