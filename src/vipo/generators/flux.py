"""FLUX.1 through ``diffusers.FluxPipeline``: 2 x 2 token packing, distilled guidance and dtype stay in this file.

One transformer token holds a 2 x 2 patch of latent positions: channels come out as (c, dy, dx). The rest of the package
sees latents of shape (N, C, 1, H, W) with one position per latent cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import FluxPipeline
from diffusers.utils.logging import disable_progress_bar
from jaxtyping import Float
from torch import Tensor

from vipo.types import Batched, UserError

PATCH = 2  # latent positions per token side, fixed by the architecture

# Which linear layers a LoRA may sit on, by name of the choice, as regular expressions over module names.
LORA_TARGETS: Mapping[str, str] = {
    "attention": r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    "blocks": (
        r"(transformer_blocks|single_transformer_blocks)\.\d+\."
        r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2"
        r"|norm\.linear|norm1\.linear|norm1_context\.linear|proj_mlp|proj_out)"
    ),
}


@dataclass(frozen=True)
class FluxConditioning(Batched):
    """What the two text encoders say: T5's sequence and CLIP's pooled vector."""

    prompt_embeds: Float[Tensor, "N L D"]
    pooled: Float[Tensor, "N P"]


def pack(latents: Float[Tensor, "N C 1 H W"]) -> Float[Tensor, "N L K"]:
    """Latents to tokens: (N, C, 1, H, W) -> (N, H/2 * W/2, C * 4)."""
    n, c, _, height, width = latents.shape
    patches = latents.reshape(n, c, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(n, height // PATCH * (width // PATCH), c * PATCH**2)


def unpack(tokens: Float[Tensor, "N L K"], height: int, width: int) -> Float[Tensor, "N C 1 H W"]:
    """Tokens back to latents of ``height`` x ``width`` positions; the inverse of :func:`pack`."""
    n, _, k = tokens.shape
    patches = tokens.reshape(n, height // PATCH, width // PATCH, k // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, k // PATCH**2, 1, height, width)


class FluxGenerator:
    """A FLUX.1 pipeline as a :class:`vipo.types.Generator`.

    Args:
        pipeline: any ``FluxPipeline``; its ``transformer`` is what gets trained.
        height, width: picture size in pixels, multiples of twice the autoencoder's stride.
        guidance_scale: the distilled guidance fed to the transformer (ignored by models without it).
        max_sequence_length: T5 tokens per prompt; FLUX attends to the padding, so the default is what the
            tokenizer says the model was trained with.
        decode_batch_size: pictures decoded at once.

    Raises:
        UserError: a size that the packing cannot hold.
    """

    temporal_stride = 1
    lora_targets = LORA_TARGETS

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        height: int,
        width: int,
        guidance_scale: float = 3.5,
        max_sequence_length: int | None = None,
        decode_batch_size: int = 32,
    ) -> None:
        self.pipeline = pipeline
        self.network: torch.nn.Module = pipeline.transformer
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length or min(int(pipeline.tokenizer_2.model_max_length), 512)
        self.decode_batch_size = decode_batch_size
        self.shift = float(pipeline.scheduler.config.shift)
        self._has_guidance = bool(pipeline.transformer.config.guidance_embeds)
        self._channels = int(pipeline.transformer.config.in_channels) // PATCH**2
        cell = pipeline.vae_scale_factor * PATCH
        if height % cell or width % cell:
            raise UserError(f"height={height} and width={width} must be multiples of {cell} pixels for this FLUX model")
        self._latent_size = height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
            part.requires_grad_(False).eval()
        self._image_ids = self._position_ids().to(pipeline.transformer.device)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str, dtype: torch.dtype, **options: Any) -> Self:
        """Load a pipeline folder or hub id; ``options`` are the constructor's."""
        try:
            disable_progress_bar()
            pipeline = FluxPipeline.from_pretrained(str(path), dtype=dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"no FluxPipeline could be loaded from {str(path)!r}: {error}") from error
        return cls(pipeline.to(device), **options)

    @property
    def device(self) -> torch.device:
        return self._image_ids.device

    def latent_shape(self) -> tuple[int, int, int, int]:
        return self._channels, 1, *self._latent_size

    def _position_ids(self) -> Float[Tensor, "L 3"]:
        """Row and column of every token, for the rotary embedding."""
        rows, columns = (size // PATCH for size in self._latent_size)
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] = torch.arange(rows)[:, None]
        ids[..., 2] = torch.arange(columns)[None, :]
        return ids.flatten(0, 1)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> FluxConditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return FluxConditioning(embeds, pooled)

    def velocity(
        self, latents: Float[Tensor, "N C 1 H W"], sigma: Float[Tensor, " N"], conditioning: FluxConditioning
    ) -> Float[Tensor, "N C 1 H W"]:
        dtype = conditioning.prompt_embeds.dtype
        text_ids = torch.zeros(conditioning.prompt_embeds.shape[1], 3, device=self.device, dtype=dtype)
        guidance = latents.new_full((latents.shape[0],), self.guidance_scale, dtype=torch.float32)
        tokens = self.network(
            hidden_states=pack(latents).to(dtype),
            timestep=sigma.to(dtype),  # the transformer itself multiplies by 1000
            guidance=guidance if self._has_guidance else None,
            pooled_projections=conditioning.pooled,
            encoder_hidden_states=conditioning.prompt_embeds,
            txt_ids=text_ids,
            img_ids=self._image_ids.to(dtype),
            return_dict=False,
        )[0]
        return unpack(tokens.float(), *self._latent_size)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "N C 1 H W"]) -> Float[Tensor, "N 3 1 Y X"]:
        vae = self.pipeline.vae
        scaled = latents.squeeze(2).to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pictures = [vae.decode(part, return_dict=False)[0] for part in scaled.split(self.decode_batch_size)]
        return (torch.cat(pictures).float() / 2 + 0.5).clamp(0, 1).unsqueeze(2)

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor]) -> None:
        """Write LoRA layers so that ``FluxPipeline.load_lora_weights(folder)`` reads them."""
        FluxPipeline.save_lora_weights(str(folder), transformer_lora_layers=dict(layers))

    def save_pretrained(self, folder: Path) -> None:
        """Write the whole pipeline so that ``FluxPipeline.from_pretrained(folder)`` reads it."""
        self.pipeline.save_pretrained(str(folder))
