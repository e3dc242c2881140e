"""FLUX.1 through ``diffusers.FluxPipeline``: 2 x 2 token packing, distilled guidance and dtype stay in this file.

One transformer token holds a 2 x 2 patch of latent positions: channels come out as (c, dy, dx). The rest of the package
sees latents of shape (N, C, 1, H, W) with one position per latent cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from vipo.generators.common import (
    DiffusersGenerator,
    decode_scaled,
    network_time,
    pack_patches,
    shift_of,
    unpack_patches,
)
from vipo.generators.conditioning import PooledConditioning
from vipo.generators.settings import AdapterOptions, Guidance
from vipo.generators.sizes import latent_and_token_grid
from vipo.generators.text import USUAL_LENGTH, TextReader
from vipo.generators.token_limits import TokenLimit

PATCH = 2  # latent positions per token side, fixed by the architecture

_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
LORA_TARGETS: Mapping[str, str] = {
    "attention": rf".*\.{_ATTENTION}",
    "blocks": (
        rf"(transformer_blocks|single_transformer_blocks)\.\d+\.({_ATTENTION}"
        r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2"
        r"|norm\.linear|norm1\.linear|norm1_context\.linear|proj_mlp|proj_out)"
    ),
}


class FluxText(TextReader):
    """T5's sequence and CLIP's pooled vector. FLUX attends to the padding: as much of it as in training."""

    encoder_names = ("text_encoder", "text_encoder_2")

    def usual_length(self) -> int:
        return min(int(self.pipeline.tokenizer_2.model_max_length), USUAL_LENGTH)

    def read(self, prompts: Sequence[str]) -> PooledConditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return PooledConditioning(embeds, pooled)

    def limits(self) -> Sequence[TokenLimit]:
        """T5's; CLIP's pooled vector always stands for the first 77 tokens only."""
        return [TokenLimit("T5", self.pipeline.tokenizer_2, self.max_sequence_length)]

    def blank(self, rows: int) -> PooledConditioning:
        config = self.pipeline.transformer.config
        embeds = self.zeros(rows, self.max_sequence_length, config.joint_attention_dim)
        return PooledConditioning(embeds, self.zeros(rows, config.pooled_projection_dim))


class FluxGenerator(DiffusersGenerator):
    """A FLUX.1 pipeline as a :class:`vipo.types.Generator`. Guidance is distilled: an input of the transformer.

    Args:
        pipeline: any ``FluxPipeline``; one whose transformer takes no guidance ignores its scale.
        height, width: picture size in pixels, multiples of twice the autoencoder's stride.

    Raises:
        UserError: a size that the packing cannot hold.
    """

    pipeline_class = FluxPipeline
    text_reader = FluxText
    usual = AdapterOptions(Guidance(3.5))
    takes = ("guidance_scale", "max_sequence_length", "decode_batch_size")
    lora_targets = LORA_TARGETS

    def __init__(
        self, pipeline: FluxPipeline, *, height: int, width: int, options: AdapterOptions | None = None
    ) -> None:
        grid, tokens = latent_and_token_grid("FLUX", pipeline, height, width)
        super().__init__(pipeline, (int(pipeline.transformer.config.in_channels) // PATCH**2, 1, *grid), options)
        self._has_guidance = bool(pipeline.transformer.config.guidance_embeds)
        self._image_ids = _position_ids(*tokens).to(self.device)
        self.shift = shift_of(pipeline.scheduler, len(self._image_ids))

    @property
    def is_guided(self) -> bool:
        return False  # by a second pass

    @property
    def takes_guidance(self) -> bool:
        return self._has_guidance

    def predict(
        self, latents: Float[Tensor, "N C 1 H W"], sigma: Float[Tensor, " N"], conditioning: PooledConditioning
    ) -> Float[Tensor, "N C 1 H W"]:
        dtype = conditioning.prompt_embeds.dtype
        text_ids = torch.zeros(conditioning.prompt_embeds.shape[1], 3, device=self.device, dtype=dtype)
        guidance = latents.new_full((latents.shape[0],), self.guidance.scale, dtype=torch.float32)
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
        return unpack_patches(tokens.float(), *self.grid)

    def decode_part(self, latents: Float[Tensor, "n C 1 H W"]) -> Float[Tensor, "n 3 1 Y X"]:
        return decode_scaled(self.pipeline.vae, latents)


def _position_ids(rows: int, columns: int) -> Float[Tensor, "L 3"]:
    """Row and column of every token, for the rotary embedding."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.flatten(0, 1)
