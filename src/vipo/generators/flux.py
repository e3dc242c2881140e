"""FLUX.1 through ``diffusers.FluxPipeline``: 2 x 2 token packing, distilled guidance and dtype stay in this file.

One transformer token holds a 2 x 2 patch of latent positions: channels come out as (c, dy, dx). The rest of the package
sees latents of shape (N, C, 1, H, W) with one position per latent cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from vipo.generators.common import (
    DiffusersGenerator,
    decode_scaled,
    latent_and_token_grid,
    network_time,
    pack_patches,
    shift_of,
    unpack_patches,
)
from vipo.generators.token_limits import TokenLimit
from vipo.types import Batched

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


class FluxGenerator(DiffusersGenerator):
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

    pipeline_class = FluxPipeline
    lora_targets = LORA_TARGETS
    text_encoder_names = ("text_encoder", "text_encoder_2")

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
        super().__init__(pipeline, guidance_scale=guidance_scale, decode_batch_size=decode_batch_size)
        self.max_sequence_length = max_sequence_length or min(int(pipeline.tokenizer_2.model_max_length), 512)
        self._has_guidance = bool(pipeline.transformer.config.guidance_embeds)
        self._channels = int(pipeline.transformer.config.in_channels) // PATCH**2
        self._latent_size, tokens = latent_and_token_grid("FLUX", pipeline, height, width)
        self._image_ids = _position_ids(*tokens).to(self.device)
        self.shift = shift_of(pipeline.scheduler, len(self._image_ids))

    @property
    def is_guided(self) -> bool:
        return False  # guidance is an input of the network

    def latent_shape(self) -> tuple[int, int, int, int]:
        return self._channels, 1, *self._latent_size

    @torch.no_grad()
    def encode_now(self, prompts: Sequence[str]) -> FluxConditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return FluxConditioning(embeds, pooled)

    def token_limits(self) -> Sequence[TokenLimit]:
        """T5's; CLIP's pooled vector always stands for the first 77 tokens only."""
        return [TokenLimit("T5", self.pipeline.tokenizer_2, self.max_sequence_length)]

    def blank_conditioning(self, rows: int) -> FluxConditioning:
        """Zeros of the shape of encoded prompts, for planning without weights."""
        config, dtype = self.pipeline.transformer.config, self.pipeline.text_encoder_2.dtype
        embeds = torch.zeros(
            rows, self.max_sequence_length, config.joint_attention_dim, dtype=dtype, device=self.device
        )
        return FluxConditioning(embeds, embeds.new_zeros(rows, config.pooled_projection_dim))

    def predict(
        self, latents: Float[Tensor, "N C 1 H W"], sigma: Float[Tensor, " N"], conditioning: FluxConditioning
    ) -> Float[Tensor, "N C 1 H W"]:
        dtype = conditioning.prompt_embeds.dtype
        text_ids = torch.zeros(conditioning.prompt_embeds.shape[1], 3, device=self.device, dtype=dtype)
        guidance = latents.new_full((latents.shape[0],), self.guidance_scale, dtype=torch.float32)
        tokens = self.network(
            hidden_states=pack_patches(latents).to(dtype),
            timestep=network_time(sigma, dtype),  # the transformer multiplies by 1000 again
            guidance=guidance if self._has_guidance else None,
            pooled_projections=conditioning.pooled,
            encoder_hidden_states=conditioning.prompt_embeds,
            txt_ids=text_ids,
            img_ids=self._image_ids.to(dtype),
            return_dict=False,
        )[0]
        return unpack_patches(tokens.float(), *self._latent_size)

    def decode_part(self, latents: Float[Tensor, "n C 1 H W"]) -> Float[Tensor, "n 3 1 Y X"]:
        return decode_scaled(self.pipeline.vae, latents)


def _position_ids(rows: int, columns: int) -> Float[Tensor, "L 3"]:
    """Row and column of every token, for the rotary embedding."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.flatten(0, 1)
