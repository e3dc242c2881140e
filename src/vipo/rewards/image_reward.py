"""ImageReward v1.0 (arXiv 2304.05977): a BLIP that reads the prompt while looking at the picture, and a linear head.

    tokens = ViT(picture)                            ViT-L/16, 224 px
    h      = BERT(prompt, cross-attention to tokens) at the class token
    score  = (head(h) - mean) / std                  five linear layers, no activations; mean and std of its authors

Pictures are cropped and normalised as for CLIP. Videos are scored frame by frame and averaged. Gradients with respect
to media flow wherever the caller records them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vipo.errors import UserError
from vipo.rewards.frames import Frames, check_frames, scored_frames
from vipo.rewards.linear_head import affine_head
from vipo.rewards.pretrained import (
    assemble,
    check_fit,
    check_heads,
    checkpoint_file,
    load_tokenizer,
    placed,
    read_tensors,
    shape_of,
)
from vipo.types import Prompt
from vipo.vision.preprocess import centre_crop, clip_normalise

NAME = "imagereward"
FILES = ("ImageReward.safetensors", "ImageReward.pt")
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data, from their code."""
TEXT_LENGTH = 35
"""Tokens of a prompt that are read; the rest is cut off, as in training."""

UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..*|blip\.text_encoder\.embeddings\.position_ids")
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
TEXT_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.")


class ImageReward:
    """ImageReward, usually -2.3 to 2.

    Args:
        pretrained: file ``ImageReward.pt`` (or it converted to safetensors), its folder, or a hub id.
        tokenizer: hub id or folder of BERT's tokenizer, uncased.
        heads: attention heads of the picture's and of the text's encoder, which the file does not tell.
        batch_size: pictures per forward pass.
        frames: "mean" over a video's frames, or "first" for the first frame alone.
        dtype: of the two encoders; the head stays float32.
        sha256: of the file, in hexadecimal; None does not check.
        offload: keep the networks on the CPU between calls.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "zai-org/ImageReward",
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        heads: tuple[int, int] = (16, 12),
        batch_size: int = 16,
        frames: Frames = "mean",
        dtype: str = "float32",
        sha256: str | None = None,
        offload: bool = False,
    ) -> None:
        check_frames(NAME, frames)
        file = checkpoint_file(NAME, pretrained, FILES)
        self.network = load_scorer(file, read_tensors(NAME, file, sha256=sha256), heads, dtype=dtype)
        self.tokenizer = load_tokenizer(NAME, "BertTokenizer", tokenizer)
        words = self.network.text.config.vocab_size
        if len(self.tokenizer) > words:
            raise UserError(
                f"reward {NAME!r}: tokenizer {str(tokenizer)!r} has {len(self.tokenizer)} tokens, its network reads"
                f" {words}; give the tokenizer that belongs to the weights, bert-base-uncased"
            )
        self.batch_size, self.frames, self.offload = batch_size, frames, offload

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        found = self.tokenizer(
            [prompt.text for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
        )
        shown = scored_frames(media, self.frames)
        with placed(self.network, media.device, offload=self.offload):
            scores = self._scores(shown.flatten(0, 1), found.to(media.device), frames=shown.shape[1])
        return scores.unflatten(0, shown.shape[:2]).mean(1)

    def _scores(self, images: Float[Tensor, "B 3 Y X"], texts: Any, *, frames: int) -> Float[Tensor, " B"]:
        """One score per frame; ``texts`` has a row per sample, whose ``frames`` pictures follow each other."""
        parts = []
        for rows in torch.arange(len(images), device=images.device).split(self.batch_size):
            ids, mask = (texts[key][rows // frames] for key in ("input_ids", "attention_mask"))
            parts.append(self.network(images[rows], ids, mask))
        return torch.cat(parts)


class BlipScorer(nn.Module):
    """The two encoders and the head, as one module to place and move."""

    weight: Tensor

    def __init__(self, vision: Any, text: Any, weight: Float[Tensor, " D"], bias: float) -> None:
        super().__init__()
        self.vision, self.text, self.bias = vision, text, bias
        self.register_buffer("weight", weight)

    def forward(
        self, images: Float[Tensor, "B 3 Y X"], ids: Int[Tensor, "B n"], mask: Int[Tensor, "B n"]
    ) -> Float[Tensor, " B"]:
        seen = clip_normalise(centre_crop(images, self.vision.config.image_size)).to(self.vision.dtype)
        # The text encoder is a "decoder" by its config, which is what gives it cross-attention, yet it reads both ways.
        hidden = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=self.vision(seen).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state[:, 0]
        return (hidden.float() @ self.weight + self.bias - MEAN) / STD


def load_scorer(file: Path, tensors: Mapping[str, Tensor], heads: tuple[int, int], *, dtype: str) -> BlipScorer:
    """The networks filled with the published tensors, frozen.

    Raises:
        UserError: tensors are lacking, unknown or of another shape.
    """
    vision, text, head = split(file, tensors)
    seer = assemble(NAME, file, *vision_parts(file, vision, heads[0]), dtype=dtype)
    reader = assemble(NAME, file, *text_parts(file, text, heads[1]), dtype=dtype, add_pooling_layer=False)
    return BlipScorer(seer, reader, *affine_head(NAME, file, head, width=reader.config.hidden_size)).eval()


def check_checkpoint(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors from which :func:`load_scorer` could not be filled, without filling it."""
    vision, text, head = split(file, tensors)
    check_fit(NAME, file, *vision_parts(file, vision, 1))
    model_class, config, _ = text_parts(file, text, 1)
    check_fit(NAME, file, model_class, config, text, add_pooling_layer=False)
    affine_head(NAME, file, head, width=config.hidden_size)


def split(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the vision encoder, the text encoder and the head, less those that scoring never uses.

    Raises:
        UserError: one belongs to none of them.
    """
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for key in tensors.keys() - set(filter(UNUSED.fullmatch, tensors)):
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is None:
            raise UserError(
                f"reward {NAME!r}: {file} holds a tensor {key!r}, which is no part of ImageReward; give the file that"
                " its authors published"
            )
        parts[prefix][key.removeprefix(prefix)] = tensors[key]
    vision, text, head = parts.values()
    return vision, text, head


def vision_parts(file: Path, tensors: Mapping[str, Tensor], heads: int) -> tuple[Any, Any, dict[str, Tensor]]:
    """Class, config and renamed tensors of the vision encoder; sizes are read off the tensors."""
    from transformers import BlipVisionConfig, BlipVisionModel

    def shape(key: str) -> tuple[int, ...]:
        return shape_of(NAME, file, tensors, key)

    width = shape("cls_token")[-1]
    check_heads(NAME, width, heads)
    patch = shape("patch_embed.proj.weight")[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape("blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=len({m[1] for m in map(BLOCK.fullmatch, tensors) if m}),
        num_attention_heads=heads,
        patch_size=patch,
        image_size=patch * math.isqrt(shape("pos_embed")[1] - 1),
        layer_norm_eps=1e-6,  # as the ViT of the original; BLIP's own default is another
    )
    return BlipVisionModel, config, {_vision_name(key): value for key, value in tensors.items()}


def text_parts(file: Path, tensors: Mapping[str, Tensor], heads: int) -> tuple[Any, Any, Mapping[str, Tensor]]:
    """Class, config and tensors of the text encoder, whose names are transformers' already."""
    from transformers import BlipTextConfig, BlipTextModel

    def shape(key: str) -> tuple[int, ...]:
        return shape_of(NAME, file, tensors, key)

    words, width = shape("embeddings.word_embeddings.weight")
    check_heads(NAME, width, heads)
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=shape("encoder.layer.0.crossattention.self.key.weight")[1],
        intermediate_size=shape("encoder.layer.0.intermediate.dense.weight")[0],
        num_hidden_layers=len({m[1] for m in map(TEXT_BLOCK.match, tensors) if m}),
        num_attention_heads=heads,
        max_position_embeddings=shape("embeddings.position_embeddings.weight")[0],
        layer_norm_eps=1e-12,
        is_decoder=True,
    )
    return BlipTextModel, config, tensors


def _vision_name(key: str) -> str:
    block = BLOCK.fullmatch(key)
    if block and block[2] in IN_BLOCK:
        return f"encoder.layers.{block[1]}.{IN_BLOCK[block[2]]}.{block[3]}"
    return VISION.get(key, key)
