"""A CLIP in open_clip's layout, as HPSv2 is published, told in transformers' names.

Only names differ, except that open_clip keeps query, key and value of a layer in one tensor (stacked in that order) and
its two projections as (width, embedding), the transpose of a linear layer's weight. The architecture is read off the
tensors' shapes; the number of attention heads is the one thing that they do not tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vipo.rewards.pretrained import check_heads, shape_of

WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # sic: transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(?P<tower>visual\.)?transformer\.resblocks\.(?P<layer>\d+)\.(?P<part>.+)[._](?P<kind>weight|bias)")


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under transformers' names; a name that is not of open_clip's layout stays as it is."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        block = BLOCK.fullmatch(key)
        if key in TRANSPOSED:
            renamed[TRANSPOSED[key]] = value.T.contiguous()
        elif block and block["part"] == "attn.in_proj":
            for name, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{_layer(block)}.self_attn.{name}_proj.{block['kind']}"] = third.contiguous()
        elif block and block["part"] in IN_LAYER:
            renamed[f"{_layer(block)}.{IN_LAYER[block['part']]}.{block['kind']}"] = value
        else:
            renamed[WHOLE.get(key, key)] = value
    return renamed


def _layer(block: re.Match[str]) -> str:
    return f"{'vision_model' if block['tower'] else 'text_model'}.encoder.layers.{block['layer']}"


def config_from_shapes(
    reward: str, source: Path | str, tensors: Mapping[str, Tensor], *, heads: tuple[int, int], activation: str
) -> Any:
    """The ``CLIPConfig`` of tensors under open_clip's names.

    Args:
        reward: the name the user knows, for messages.
        source: where the tensors came from, for messages.
        tensors: under open_clip's names.
        heads: attention heads of the vision and of the text tower.
        activation: between the two linear layers of a block, by transformers' name.

    Raises:
        UserError: a tensor that tells a size is lacking, or the heads do not divide a width.
    """
    from transformers import CLIPConfig

    def shape(key: str) -> tuple[int, ...]:
        return shape_of(reward, source, tensors, key)

    def tower(prefix: str, width: int, count: int) -> dict[str, Any]:
        check_heads(reward, width, count)
        layers = {int(m["layer"]) for m in map(BLOCK.fullmatch, tensors) if m and (m["tower"] or "") == prefix}
        return {
            "hidden_size": width,
            "intermediate_size": shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": count,
            "hidden_act": activation,
            "projection_dim": shape("text_projection")[1],
        }

    patch = shape("visual.conv1.weight")[-1]
    patches = shape("visual.positional_embedding")[0] - 1
    words, width = shape("token_embedding.weight")
    vision = tower("visual.", shape("visual.class_embedding")[0], heads[0])
    text = tower("", width, heads[1])
    # CLIP's vocabulary ends with the start and the end of text, and the text's embedding is read off at its end.
    special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    return CLIPConfig(
        vision_config={**vision, "patch_size": patch, "image_size": patch * math.isqrt(patches)},
        text_config={**text, "vocab_size": words, "max_position_embeddings": shape("positional_embedding")[0]}
        | special,
        projection_dim=vision["projection_dim"],
    )
