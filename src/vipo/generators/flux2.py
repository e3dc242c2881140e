"""FLUX.2 klein (base and distilled) through ``diffusers.Flux2KleinPipeline``.

The autoencoder has 32 channels at an eighth of the picture's size. A transformer token holds a 2 x 2 patch of its
cells, 128 channels that come out as (c, dy, dx), and the autoencoder's batch-norm statistics normalise each of the 128.
That is one affine map per (c, dy, dx) and mixes no cells: the rest of the package sees normalised latents of shape
(N, 32, 1, Y / 8, X / 8), one position per autoencoder cell, four per token; only the way to pixels undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from jaxtyping import Float, Int
from torch import Tensor

from vipo.generators.common import (
    DiffusersGenerator,
    network_time,
    pack_patches,
    shift_of,
    unpack_patches,
)
from vipo.generators.conditioning import Conditioning
from vipo.generators.settings import COMMON, AdapterOptions, Guidance
from vipo.generators.sizes import latent_and_token_grid
from vipo.generators.text import TextReader
from vipo.generators.token_limits import TokenLimit, chat

PATCH = 2  # autoencoder cells per token side, fixed by the architecture
DISTILLED_STEPS, BASE_STEPS = 4, 50  # what the two kinds are sampled with

# In the single blocks attention and feed-forward share ``to_qkv_mlp_proj`` and ``to_out``, so "attention" reaches both
# there. The modulations are shared by all blocks, so "blocks" leaves them out.
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_qkv_mlp_proj|to_out)"
LORA_TARGETS: Mapping[str, str] = {
    "attention": rf".*\.{_ATTENTION}",
    "blocks": rf"(transformer_blocks|single_transformer_blocks)\.\d+\.({_ATTENTION}|ff(_context)?\.linear_(in|out))",
}


class Flux2Text(TextReader):
    """Three layers of Qwen3, side by side, on the prompt in its chat template; FLUX.2 attends to the padding."""

    def read(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning(embeds)

    def limits(self) -> Sequence[TokenLimit]:
        tokenizer = self.pipeline.tokenizer
        return [TokenLimit("Qwen3", tokenizer, self.max_sequence_length, chat(tokenizer, thinking=False))]

    def blank(self, rows: int) -> Conditioning:
        width = self.pipeline.transformer.config.joint_attention_dim
        return Conditioning(self.zeros(rows, self.max_sequence_length, width))


class Flux2KleinGenerator(DiffusersGenerator):
    """A FLUX.2 klein pipeline as a :class:`vipo.types.Generator`. A distilled model takes no guidance.

    The time shift that the pipeline fits depends on the tokens and on the number of solver steps: up to 4300 tokens its
    logarithm is linear in the steps, through fits at 10 and 200 steps (``compute_empirical_mu``). ``shift`` is one
    number, that of ``options.shift_steps``, or else of 4 steps for a distilled model and 50 for a base model: set it to
    the recipe's ``solver.steps`` to sample with the pipeline's grid.

    Args:
        pipeline: any ``Flux2KleinPipeline``.
        height, width: picture size in pixels, multiples of twice the autoencoder's stride.

    Raises:
        UserError: a size that the packing cannot hold.
    """

    pipeline_class = Flux2KleinPipeline
    text_reader = Flux2Text
    usual = AdapterOptions(Guidance(4.0))
    takes = (*COMMON, "shift_steps")
    lora_targets = LORA_TARGETS

    def __init__(
        self, pipeline: Flux2KleinPipeline, *, height: int, width: int, options: AdapterOptions | None = None
    ) -> None:
        grid, (rows, columns) = latent_and_token_grid("FLUX.2", pipeline, height, width)
        super().__init__(pipeline, (int(pipeline.transformer.config.in_channels) // PATCH**2, 1, *grid), options)
        self._is_distilled = bool(pipeline.config.is_distilled)
        self._image_ids = position_ids(rows=rows, columns=columns).to(self.device)
        self._text_ids = position_ids(words=self.reader.max_sequence_length).to(self.device)
        steps = self.options.shift_steps or (DISTILLED_STEPS if self._is_distilled else BASE_STEPS)
        self.shift = shift_of(pipeline.scheduler, rows * columns, mu=compute_empirical_mu(rows * columns, steps))

    @property
    def is_guided(self) -> bool:
        return super().is_guided and not self._is_distilled

    @property
    def takes_guidance(self) -> bool:
        return not self._is_distilled

    def predict(
        self, latents: Float[Tensor, "N C 1 H W"], sigma: Float[Tensor, " N"], conditioning: Conditioning
    ) -> Float[Tensor, "N C 1 H W"]:
        embeds = conditioning.prompt_embeds
        tokens = self.network(
            hidden_states=pack_patches(latents).to(embeds.dtype),
            timestep=network_time(sigma, embeds.dtype),  # the transformer multiplies by 1000 again
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return unpack_patches(tokens.float(), *self.grid)

    def decode_part(self, latents: Float[Tensor, "n C 1 H W"]) -> Float[Tensor, "n 3 1 Y X"]:
        vae: Any = self.pipeline.vae
        std = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
        tokens = pack_patches(latents) * std + vae.bn.running_mean.float()
        cells = unpack_patches(tokens, *self.grid).squeeze(2)
        return vae.decode(cells.to(vae.dtype), return_dict=False)[0].unsqueeze(2)


def position_ids(*, rows: int = 1, columns: int = 1, words: int = 1) -> Int[Tensor, "L 4"]:
    """(picture, row, column, word) of every token, for the rotary embedding; what a token has not is 0."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns), torch.arange(words))
