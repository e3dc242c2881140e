"""Z-Image (arXiv 2511.22699) through ``diffusers.ZImagePipeline``: one stream of picture and text tokens.

The transformer takes lists, one entry per sample, so that every prompt has its own length; it cuts latents into tokens
of 2 x 2 positions itself. Its time runs the other way, 1 - sigma, and its output is x - e, the velocity with the other
sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import ZImagePipeline
from jaxtyping import Float, Int
from torch import Tensor

from vipo.generators.common import DiffusersGenerator, decode_scaled, latent_and_token_grid, shift_of
from vipo.generators.token_limits import TokenLimit, chat
from vipo.types import Batched

PATCH = 2  # latent positions per token side, as the published models are sampled

# Which linear layers a LoRA may sit on, by name of the choice, as regular expressions over module names.
_BLOCK, _ATTENTION = r"(noise_refiner|context_refiner|layers)\.\d+", r"attention\.(to_q|to_k|to_v|to_out\.0)"
LORA_TARGETS: Mapping[str, str] = {
    "attention": rf"{_BLOCK}\.{_ATTENTION}",
    "blocks": rf"{_BLOCK}\.({_ATTENTION}|feed_forward\.w[123]|adaLN_modulation\.0)",
}


@dataclass(frozen=True)
class ZImageConditioning(Batched):
    """What the last but one layer of Qwen3 says about the prompt in its chat template, zero after the last token."""

    prompt_embeds: Float[Tensor, "N L D"]
    words: Int[Tensor, " N"]  # tokens before the zeros

    def lengths(self) -> list[int]:
        """Words of each row."""
        return list(self.words.tolist())


class BlankConditioning(ZImageConditioning):
    """Rows without padding, whose length is their shape's: a plan has no values to look at."""

    def lengths(self) -> list[int]:
        return [self.prompt_embeds.shape[1]] * len(self.prompt_embeds)


class ZImageGenerator(DiffusersGenerator):
    """A Z-Image pipeline as a :class:`vipo.types.Generator`.

    Args:
        pipeline: any ``ZImagePipeline``; its ``transformer`` is what gets trained.
        height, width: picture size in pixels, multiples of twice the autoencoder's stride.
        guidance_scale: how far guidance goes beyond the positive velocity, u+ + scale (u+ - u-), so one less than
            elsewhere; 0 turns it off, as the distilled Z-Image-Turbo needs it.
        max_sequence_length: tokens kept of a prompt with its chat template.
        negative_prompt, guidance_in_one_pass, decode_batch_size: see
            :class:`vipo.generators.common.DiffusersGenerator`.

    Raises:
        UserError: a size that the patches cannot hold.
    """

    pipeline_class = ZImagePipeline
    lora_targets = LORA_TARGETS

    def __init__(
        self,
        pipeline: ZImagePipeline,
        *,
        height: int,
        width: int,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        max_sequence_length: int = 512,
        guidance_in_one_pass: bool = True,
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
        self._channels = int(pipeline.transformer.config.in_channels)
        self._latent_size, (rows, columns) = latent_and_token_grid("Z-Image", pipeline, height, width)
        self.shift = shift_of(pipeline.scheduler, rows * columns)

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 0

    def latent_shape(self) -> tuple[int, int, int, int]:
        return self._channels, 1, *self._latent_size

    @torch.no_grad()
    def encode_now(self, prompts: Sequence[str]) -> ZImageConditioning:
        rows, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        embeds = rows[0].new_zeros(len(rows), self.max_sequence_length, rows[0].shape[1])
        for filled, row in zip(embeds, rows, strict=True):
            filled[: len(row)] = row
        return ZImageConditioning(embeds, torch.tensor([len(row) for row in rows], device=self.device))

    def token_limits(self) -> Sequence[TokenLimit]:
        tokenizer = self.pipeline.tokenizer
        return [TokenLimit("Qwen3", tokenizer, self.max_sequence_length, chat(tokenizer, thinking=True))]

    def blank_conditioning(self, rows: int) -> BlankConditioning:
        """Zeros of the shape of encoded prompts of the greatest length, for planning without weights."""
        shape = rows, self.max_sequence_length, self.pipeline.transformer.config.cap_feat_dim
        embeds = torch.zeros(shape, dtype=self.pipeline.text_encoder.dtype, device=self.device)
        return BlankConditioning(embeds, torch.full((rows,), self.max_sequence_length, device=self.device))

    def predict(
        self, latents: Float[Tensor, "N C 1 H W"], sigma: Float[Tensor, " N"], conditioning: ZImageConditioning
    ) -> Float[Tensor, "N C 1 H W"]:
        dtype = self.pipeline.transformer.dtype
        embeds = conditioning.prompt_embeds.to(dtype)
        captions = [row[:length] for row, length in zip(embeds, conditioning.lengths(), strict=True)]
        pictures = self.network(list(latents.to(dtype)), 1 - sigma.float(), captions, return_dict=False)[0]
        return -torch.stack(pictures).float()

    def blend(
        self, positive: Float[Tensor, "N C 1 H W"], negative: Float[Tensor, "N C 1 H W"]
    ) -> Float[Tensor, "N C 1 H W"]:
        """Guidance counted from the positive velocity on, as the pipeline counts it."""
        return positive + self.guidance_scale * (positive - negative)

    def decode_part(self, latents: Float[Tensor, "n C 1 H W"]) -> Float[Tensor, "n 3 1 Y X"]:
        return decode_scaled(self.pipeline.vae, latents)
