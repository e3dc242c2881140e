"""Scorers that are a CLIP (arXiv 2103.00020): how well a picture's embedding meets its prompt's.

    HPSv2.1       cos(image, text)                      ViT-H/14 tuned on preferences, letterboxed      arXiv 2306.09341
    PickScore     exp(logit scale) cos(image, text)     ViT-H/14 tuned on preferences                   arXiv 2305.01569
    CLIPScore     cos, 2.5 max(cos, 0) or 100 max(cos, 0)                                               arXiv 2104.08718

Videos are scored frame by frame and averaged. No weights ship. Gradients with respect to media flow wherever the
caller records them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vipo.errors import UserError
from vipo.pretrained import dtype_named
from vipo.rewards import open_clip
from vipo.rewards.frames import Frames, check_frames, per_frame
from vipo.rewards.pretrained import assemble, checkpoint_file, load_model, load_tokenizer, placed, read_tensors
from vipo.types import Prompt
from vipo.vision.preprocess import centre_crop, clip_normalise, letterbox

HPS = "hpsv2.1"
HPS_FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt")
CLIP_VIT_L = "openai/clip-vit-large-patch14"
CLIP_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLASSES = {"clip": "CLIPModel"}

Fit = Callable[[Tensor, int], Tensor]  # pictures of any size and a side in px to squares of that side
Scale = Literal["cosine", "hessel", "percent"]
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda cosine: cosine,
    "hessel": lambda cosine: 2.5 * cosine.clamp_min(0),
    "percent": lambda cosine: 100 * cosine.clamp_min(0),
}


class Matcher:
    """A CLIP with its tokenizer: media and prompts to one cosine per sample and frame.

    Args:
        reward: the name the user knows, for messages.
        network: a transformers ``CLIPModel``, frozen.
        tokenizer: hub id or folder of its tokenizer.
        fit: how pictures become squares.
        batch_size: pictures, or prompts, per forward pass.
        frames: "mean" scores every frame of a video and averages, "first" the first alone.
        offload: give the device's memory back after each call without gradients.
    """

    def __init__(
        self,
        reward: str,
        network: Any,
        tokenizer: str | Path,
        fit: Fit,
        *,
        batch_size: int,
        frames: Frames,
        offload: bool,
    ) -> None:
        check_frames(reward, frames)
        self.network, self.fit, self.batch_size, self.frames, self.offload = network, fit, batch_size, frames, offload
        self.tokenizer = load_tokenizer(reward, "CLIPTokenizer", tokenizer)
        _check_tokenizer(reward, tokenizer, self.tokenizer, network.config.text_config)

    def cosines(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, "N f"]:
        """cos(frame, prompt), float32. A prompt that several samples share is embedded once."""
        with placed(self.network, media.device, offload=self.offload):
            images = embed_frames(self.network, self.fit, media, self.frames, self.batch_size)
            texts = self._embed([prompt.text for prompt in prompts])
        return (images * texts[:, None]).sum(-1)

    def tokens(self, texts: Sequence[str]) -> Int[Tensor, "P n"]:
        """Padded to the network's length, or cut to it with the end-of-text token kept last."""
        length = self.network.config.text_config.max_position_embeddings
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids: Tensor = found["input_ids"]
        return ids

    def _embed(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        unique = list(dict.fromkeys(texts))
        parts = self.tokens(unique).to(self.network.device).split(self.batch_size)
        embeddings = torch.cat([self.network.get_text_features(part).pooler_output.float() for part in parts])
        return F.normalize(embeddings, dim=-1)[[unique.index(text) for text in texts]]


def embed_frames(
    network: Any, fit: Fit, media: Float[Tensor, "N 3 F Y X"], frames: Frames, batch_size: int
) -> Float[Tensor, "N f D"]:
    """One unit vector per scored frame, float32."""
    side = network.config.vision_config.image_size

    def embed(images: Tensor) -> Tensor:
        seen = clip_normalise(fit(images, side)).to(network.dtype)
        embedding: Tensor = network.get_image_features(seen).pooler_output
        return embedding

    return F.normalize(per_frame(embed, media, frames, batch_size), dim=-1)


def _check_tokenizer(reward: str, name: str | Path, tokenizer: Any, config: Any) -> None:
    """CLIP reads a text off at its end-of-text token, which another vocabulary would silently have elsewhere."""
    # 2 is an old mistake in published configs; transformers then takes the highest id, as the original did.
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end:
        raise UserError(
            f"reward {reward!r}: tokenizer {str(name)!r} ends a text with token {tokenizer.eos_token_id}, its network"
            f" with {end} of {config.vocab_size}; give the tokenizer that belongs to the weights"
        )


class HpsV21:
    """HPSv2.1 (arXiv 2306.09341): cosine, usually 0.10 to 0.40. Scores of v2.0 and v2.1 do not compare.

    Args:
        pretrained: file ``HPS_v2.1_compressed.pt`` (or it converted to safetensors), its folder, or a hub id.
        tokenizer: hub id or folder of CLIP's tokenizer.
        heads: attention heads of the vision and of the text tower, which the file does not tell.
        batch_size: pictures per forward pass.
        frames: "mean" over a video's frames, or "first" for the first frame alone.
        dtype: of the network; the original runs in float16 autocast.
        sha256: of the file, in hexadecimal; None does not check.
        offload: keep the network on the CPU between calls.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "xswu/HPSv2",
        tokenizer: str | Path = CLIP_VIT_L,
        heads: tuple[int, int] = (16, 16),
        batch_size: int = 16,
        frames: Frames = "mean",
        dtype: str = "float32",
        sha256: str | None = None,
        offload: bool = False,
    ) -> None:
        file = checkpoint_file(HPS, pretrained, HPS_FILES)
        tensors = read_tensors(HPS, file, sha256=sha256)
        network = assemble(HPS, file, *hps_parts(file, tensors, heads), dtype=dtype)
        self.matcher = Matcher(
            HPS, network, tokenizer, letterbox, batch_size=batch_size, frames=frames, offload=offload
        )

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return self.matcher.cosines(media, prompts).mean(1)


def hps_parts(file: Path, tensors: Mapping[str, Tensor], heads: tuple[int, int]) -> tuple[Any, Any, dict[str, Tensor]]:
    """Class, config and renamed tensors of a checkpoint of HPSv2.

    Raises:
        UserError: it is no CLIP in open_clip's layout, or the heads do not divide its widths.
    """
    from transformers import CLIPModel

    # open_clip's ViT-H-14 has the exact GELU, unlike OpenAI's CLIPs.
    config = open_clip.config_from_shapes(HPS, file, tensors, heads=heads, activation="gelu")
    return CLIPModel, config, open_clip.to_transformers(tensors)


class PickScore:
    """PickScore (arXiv 2305.01569): exp(logit scale) times the cosine, usually 18 to 25; not divided by 26.

    Args:
        pretrained: hub id or local folder of the CLIP.
        tokenizer: hub id or folder of its tokenizer.
        batch_size: pictures per forward pass.
        frames: "mean" over a video's frames, or "first" for the first frame alone.
        dtype: of the network; the scale stays float32.
        sha256: of model.safetensors, in hexadecimal; None does not check.
        offload: keep the network on the CPU between calls.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "yuvalkirstain/PickScore_v1",
        tokenizer: str | Path = CLIP_VIT_H,
        batch_size: int = 16,
        frames: Frames = "mean",
        dtype: str = "float32",
        sha256: str | None = None,
        offload: bool = False,
    ) -> None:
        kind = dtype_named("reward 'pickscore'", dtype)
        network = load_model("pickscore", pretrained, CLASSES, sha256=sha256)
        self.scale = float(network.logit_scale.exp())  # before the cast: bfloat16 would move it by half a percent
        self.matcher = Matcher(
            "pickscore",
            network.to(kind),
            tokenizer,
            centre_crop,
            batch_size=batch_size,
            frames=frames,
            offload=offload,
        )

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return self.scale * self.matcher.cosines(media, prompts).mean(1)


class ClipScore:
    """CLIPScore (arXiv 2104.08718) of a frame and its prompt, averaged over frames; the cosine is usually 0.15 to 0.35.

    Args:
        pretrained: hub id or local folder of the CLIP.
        tokenizer: hub id or folder of its tokenizer; None takes it from ``pretrained``.
        scale: "cosine" as it is, "hessel" 2.5 max(cos, 0) as the paper, "percent" 100 max(cos, 0) as torchmetrics.
        batch_size: pictures per forward pass.
        frames: "mean" over a video's frames, or "first" for the first frame alone.
        dtype: of the network.
        sha256: of model.safetensors, in hexadecimal; None does not check.
        offload: keep the network on the CPU between calls.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = CLIP_VIT_L,
        tokenizer: str | Path | None = None,
        scale: Scale = "cosine",
        batch_size: int = 16,
        frames: Frames = "mean",
        dtype: str = "float32",
        sha256: str | None = None,
        offload: bool = False,
    ) -> None:
        if scale not in SCALES:
            raise UserError(f"reward 'clipscore' has no scale {scale!r}; choose from {', '.join(SCALES)}")
        self.scaled = SCALES[scale]
        self.matcher = Matcher(
            "clipscore",
            load_model("clipscore", pretrained, CLASSES, dtype=dtype, sha256=sha256),
            pretrained if tokenizer is None else tokenizer,
            centre_crop,
            batch_size=batch_size,
            frames=frames,
            offload=offload,
        )

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return self.scaled(self.matcher.cosines(media, prompts)).mean(1)
