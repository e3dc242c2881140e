"""Stable Diffusion 3 and 3.5 (medium, large) through ``diffusers.StableDiffusion3Pipeline``.

The transformer patchifies by itself, so latents enter and leave with one position per latent cell. Guidance is real
classifier-free guidance. The network's time is 1000 sigma in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from vipo.generators.common import DiffusersGenerator, check_multiple, decode_scaled, shift_of
from vipo.generators.token_limits import TokenLimit
from vipo.types import Batched, UserError

_ATTENTION = r"attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"

# Which linear layers a LoRA may sit on, by name of the choice, as regular expressions over module names. ``attn2`` is
# the second, picture-only attention of the first blocks of SD3.5-medium.
LORA_TARGETS: Mapping[str, str] = {
    "attention": rf".*\.{_ATTENTION}",
    "blocks": (
        rf"transformer_blocks\.\d+\.({_ATTENTION}"
        r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|norm1\.linear|norm1_context\.linear)"
    ),
}


@dataclass(frozen=True)
class StableDiffusion3Conditioning(Batched):
    """What the three text encoders say: the sequences of both CLIPs and T5, and both CLIPs' pooled vectors."""

    prompt_embeds: Float[Tensor, "N L D"]
    pooled: Float[Tensor, "N P"]


class StableDiffusion3Generator(DiffusersGenerator):
    """A Stable Diffusion 3 or 3.5 pipeline as a :class:`vipo.types.Generator`.

    Left to itself the pipeline ends its grid near sigma = 0.009 and jumps to 0 from there; ours is
    :func:`vipo.sde.shifted_sigmas`, which is the pipeline's for ``sigmas=numpy.linspace(1, 1 / steps, steps)``.

    Args:
        pipeline: any ``StableDiffusion3Pipeline``; its ``transformer`` is what gets trained. Without the T5 encoder
            that part of the conditioning is zeros.
        height, width: picture size in pixels, multiples of the autoencoder's stride times the patch.
        guidance_scale: of classifier-free guidance; 1 is one pass of the network instead of two.
        negative_prompt, guidance_in_one_pass, decode_batch_size: see
            :class:`vipo.generators.common.DiffusersGenerator`.
        max_sequence_length: T5 tokens per prompt, padding included.

    Raises:
        UserError: a size that does not fill whole patches, or one beyond the position embedding.
    """

    pipeline_class = StableDiffusion3Pipeline
    lora_targets = LORA_TARGETS
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        height: int,
        width: int,
        guidance_scale: float = 4.5,
        negative_prompt: str = "",
        guidance_in_one_pass: bool = True,
        max_sequence_length: int = 256,
        decode_batch_size: int = 32,
    ) -> None:
        super().__init__(
            pipeline,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            guidance_in_one_pass=guidance_in_one_pass,
            decode_batch_size=decode_batch_size,
        )
        self.max_sequence_length = max_sequence_length
        config, stride = pipeline.transformer.config, pipeline.vae_scale_factor
        cell = stride * config.patch_size
        check_multiple(cell, "Stable Diffusion 3", height=height, width=width)
        if max(height, width) > config.pos_embed_max_size * cell:
            raise UserError(
                f"height={height} and width={width} are beyond this model's position embedding; ask for at most"
                f" {config.pos_embed_max_size * cell} pixels a side"
            )
        self._latent_shape = int(config.in_channels), 1, height // stride, width // stride
        self.shift = shift_of(pipeline.scheduler, height // cell * (width // cell))

    def latent_shape(self) -> tuple[int, int, int, int]:
        return self._latent_shape

    @torch.no_grad()
    def encode_now(self, prompts: Sequence[str]) -> StableDiffusion3Conditioning:
        """What the text encoders say.

        Raises:
            UserError: the pipeline lacks a CLIP text encoder.
        """
        missing = [name for name in self.text_encoder_names[:2] if getattr(self.pipeline, name) is None]
        if missing:
            raise UserError(
                f"this StableDiffusion3Pipeline has no {missing[0]}; only text_encoder_3 (T5) may be left out, so load"
                " a pipeline with both CLIP text encoders"
            )
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return StableDiffusion3Conditioning(embeds, pooled)

    def token_limits(self) -> Sequence[TokenLimit]:
        """The CLIPs' and, if it is there, T5's: the network reads the sequences of all of them."""
        clip = TokenLimit("CLIP", self.pipeline.tokenizer, self.pipeline.tokenizer_max_length)
        if self.pipeline.text_encoder_3 is None:
            return [clip]
        return [clip, TokenLimit("T5", self.pipeline.tokenizer_3, self.max_sequence_length)]

    def blank_conditioning(self, rows: int) -> StableDiffusion3Conditioning:
        """Zeros of the shape of encoded prompts, for planning without weights."""
        config, dtype = self.pipeline.transformer.config, self.pipeline.text_encoder.dtype
        tokens = self.pipeline.tokenizer_max_length + self.max_sequence_length  # both CLIPs', then T5's
        embeds = torch.zeros(rows, tokens, config.joint_attention_dim, dtype=dtype, device=self.device)
        return StableDiffusion3Conditioning(embeds, embeds.new_zeros(rows, config.pooled_projection_dim))

    def predict(
        self,
        latents: Float[Tensor, "N C 1 H W"],
        sigma: Float[Tensor, " N"],
        conditioning: StableDiffusion3Conditioning,
    ) -> Float[Tensor, "N C 1 H W"]:
        velocity = self.network(
            hidden_states=latents.squeeze(2).to(conditioning.prompt_embeds.dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0]
        return velocity.unsqueeze(2).float()

    def decode_part(self, latents: Float[Tensor, "n C 1 H W"]) -> Float[Tensor, "n 3 1 Y X"]:
        return decode_scaled(self.pipeline.vae, latents)
