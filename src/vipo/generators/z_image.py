"""Z-Image (arXiv 2511.22699) through ``diffusers.ZImagePipeline``: one stream of picture and text tokens.

The transformer takes lists, one entry per sample, so that every prompt has its own length; it cuts latents into tokens
of 2 x 2 positions itself. Its time runs the other way, 1 - sigma, and its output is x - e, the velocity with the other
sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import ZImagePipeline
from jaxtyping import Float
from torch import Tensor

from vipo.generators.common import DiffusersGenerator, decode_scaled, shift_of
from vipo.generators.conditioning import BlankConditioning, PaddedConditioning
from vipo.generators.settings import AdapterOptions, Guidance
from vipo.generators.sizes import latent_and_token_grid
from vipo.generators.text import TextReader
from vipo.generators.token_limits import TokenLimit, chat

_BLOCK, _ATTENTION = r"(noise_refiner|context_refiner|layers)\.\d+", r"attention\.(to_q|to_k|to_v|to_out\.0)"
LORA_TARGETS: Mapping[str, str] = {
    "attention": rf"{_BLOCK}\.{_ATTENTION}",
    "blocks": rf"{_BLOCK}\.({_ATTENTION}|feed_forward\.w[123]|adaLN_modulation\.0)",
}


class ZImageText(TextReader):
    """The last but one layer of Qwen3 on the prompt in its chat template, padded to ``max_sequence_length``."""

    def read(self, prompts: Sequence[str]) -> PaddedConditioning:
        rows, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        embeds = rows[0].new_zeros(len(rows), self.max_sequence_length, rows[0].shape[1])
        for filled, row in zip(embeds, rows, strict=True):
            filled[: len(row)] = row
        return PaddedConditioning(embeds, torch.tensor([len(row) for row in rows], device=self.device))

    def limits(self) -> Sequence[TokenLimit]:
        tokenizer = self.pipeline.tokenizer
        return [TokenLimit("Qwen3", tokenizer, self.max_sequence_length, chat(tokenizer, thinking=True))]

    def blank(self, rows: int) -> BlankConditioning:
        return self.full_rows(rows, self.pipeline.transformer.config.cap_feat_dim)


class ZImageGenerator(DiffusersGenerator):
    """A Z-Image pipeline as a :class:`vipo.types.Generator`.

    The guidance scale is how far guidance goes beyond the positive velocity, u+ + scale (u+ - u-), so one less than
    elsewhere; 0 turns it off, as the distilled Z-Image-Turbo needs it.

    Args:
        pipeline: any ``ZImagePipeline``.
        height, width: picture size in pixels, multiples of twice the autoencoder's stride.

    Raises:
        UserError: a size that the patches cannot hold.
    """

    pipeline_class = ZImagePipeline
    text_reader = ZImageText
    usual = AdapterOptions(Guidance(5.0))
    unguided = 0.0
    masks_text = True
    lora_targets = LORA_TARGETS

    def __init__(
        self, pipeline: ZImagePipeline, *, height: int, width: int, options: AdapterOptions | None = None
    ) -> None:
        grid, (rows, columns) = latent_and_token_grid("Z-Image", pipeline, height, width)
        super().__init__(pipeline, (int(pipeline.transformer.config.in_channels), 1, *grid), options)
        self.shift = shift_of(pipeline.scheduler, rows * columns)

    def predict(
        self, latents: Float[Tensor, "N C 1 H W"], sigma: Float[Tensor, " N"], conditioning: PaddedConditioning
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
        return positive + self.guidance.scale * (positive - negative)

    def decode_part(self, latents: Float[Tensor, "n C 1 H W"]) -> Float[Tensor, "n 3 1 Y X"]:
        return decode_scaled(self.pipeline.vae, latents)
