"""A LoRA under the names that ComfyUI reads.

ComfyUI takes any LoRA whose layers are called ``diffusion_model.`` and the name that the model's authors gave them, and
for some families diffusers' names as well (``model_lora_keys_unet`` of https://github.com/Comfy-Org/ComfyUI,
comfy/lora.py): ``UNCHANGED`` is those. FLUX.2 under diffusers' names is read by its newer versions alone, its authors'
names by all. What is written here, diffusers converts back (``_convert_non_diffusers_wan_lora_to_diffusers``,
``_convert_non_diffusers_flux2_lora_to_diffusers``), and the tests hold the two against each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file, save_file

from vipo.errors import UserError
from vipo.files import written_whole
from vipo.generators import adapter_of
from vipo.generators.lora_file import COMFY, DIFFUSERS, parse
from vipo.generators.weights import some
from vipo.types import LoraLayer

UNCHANGED = ("flux", "sd3", "qwen_image", "z_image")
FUSED = ("q", "k", "v")  # in the order of their rows in one weight
Names = Mapping[str, str]  # regular expression over diffusers' names -> what takes its place

WAN: Names = {
    r"(blocks\.\d+)\.attn1\.to_([qkv])": r"\1.self_attn.\2",
    r"(blocks\.\d+)\.attn1\.to_out\.0": r"\1.self_attn.o",
    r"(blocks\.\d+)\.attn2\.to_([qkv])": r"\1.cross_attn.\2",
    r"(blocks\.\d+)\.attn2\.to_out\.0": r"\1.cross_attn.o",
    r"(blocks\.\d+)\.ffn\.net\.0\.proj": r"\1.ffn.0",
    r"(blocks\.\d+)\.ffn\.net\.2": r"\1.ffn.2",
    r"condition_embedder\.(text|time)_embedder\.linear_1": r"\1_embedding.0",
    r"condition_embedder\.(text|time)_embedder\.linear_2": r"\1_embedding.2",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"proj_out": "head.head",
}
# norm_out is left out: its two halves change places on the way, and diffusers' way back leaves them.
FLUX2: Names = {
    r"transformer_blocks\.(\d+)\.attn\.to_([qkv])": r"double_blocks.\1.img_attn.qkv:\2",
    r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj": r"double_blocks.\1.txt_attn.qkv:\2",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.linear_in": r"double_blocks.\1.img_mlp.0",
    r"transformer_blocks\.(\d+)\.ff\.linear_out": r"double_blocks.\1.img_mlp.2",
    r"transformer_blocks\.(\d+)\.ff_context\.linear_in": r"double_blocks.\1.txt_mlp.0",
    r"transformer_blocks\.(\d+)\.ff_context\.linear_out": r"double_blocks.\1.txt_mlp.2",
    r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.attn\.to_out": r"single_blocks.\1.linear2",
    r"(single_stream_modulation|double_stream_modulation_(?:img|txt))\.linear": r"\1.lin",
    r"x_embedder": "img_in",
    r"context_embedder": "txt_in",
    r"proj_out": "final_layer.linear",
}
AUTHORS: Mapping[str, Names] = {"wan": WAN, "flux2": FLUX2}


def family_of(generator: Any) -> str:
    """The name in ``GENERATORS`` of the adapter of its pipeline, if ComfyUI's names for a LoRA of that are known.

    Raises:
        UserError: they are not.
    """
    found = adapter_of(type(getattr(generator, "pipeline", None)).__name__)
    if found is None or found not in (*UNCHANGED, *AUTHORS):
        raise UserError(
            f"ComfyUI's names are not known for a LoRA of {type(generator).__name__}, only of"
            f" {', '.join(sorted((*UNCHANGED, *AUTHORS)))}; take --format diffusers"
        )
    return found


def rename_for_comfyui(folder: Path, family: str) -> None:
    """Write the LoRA that ``Policy.export`` wrote into ``folder`` once more, under the names that ComfyUI reads.

    Raises:
        UserError: of a layer the name is not known.
    """
    if family in UNCHANGED:
        return
    file = folder / LORA_WEIGHT_NAME_SAFE
    layers = comfyui_layers(parse(load_file(file), DIFFUSERS), AUTHORS[family])
    tensors = {f"{COMFY}{n}.{half}.weight": t.contiguous() for n, layer in layers.items() for half, t in layer.halves}
    with written_whole(file) as aside:  # what is read may still be on disk alone
        save_file(tensors, aside, {"format": "pt"})


def comfyui_layers(layers: Mapping[str, LoraLayer], names: Names) -> dict[str, LoraLayer]:
    """Layers by their authors' names; queries, keys and values that are one weight there are one layer.

    Raises:
        UserError: of a layer the name is not known.
    """
    found: dict[str, LoraLayer] = {}
    fused: dict[str, dict[str, LoraLayer]] = {}
    unknown = []
    for layer, value in layers.items():
        name, _, part = (_renamed(layer, names) or "").partition(":")
        if not name:
            unknown.append(layer)
        elif part:
            fused.setdefault(name, {})[part] = value
        else:
            found[name] = value
    if unknown:
        raise UserError(
            f"ComfyUI's name is not known for {some(sorted(unknown), 'layer')} of this LoRA; take --format diffusers"
        )
    return found | {name: _joined(parts) for name, parts in fused.items()}


def _renamed(layer: str, names: Names) -> str | None:
    matches = ((re.fullmatch(expression, layer), place) for expression, place in names.items())
    return next((match.expand(place) for match, place in matches if match), None)


def _joined(parts: Mapping[str, LoraLayer]) -> LoraLayer:
    """One LoRA on rows of one weight: its rank is the sum of theirs, B is theirs on the diagonal, and the rest zeros.

    The three have as many rows each; one without a LoRA adds nothing to its own.
    """
    rows = next(len(part.up) for part in parts.values())
    down = torch.cat([parts[name].down for name in FUSED if name in parts])
    up = torch.block_diag(*(_up(parts.get(name), rows, down.dtype) for name in FUSED))
    return LoraLayer(down, up)


def _up(part: LoraLayer | None, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(rows, 0, dtype=dtype) if part is None else part.halves[1][1]
