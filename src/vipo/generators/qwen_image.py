"""Qwen-Image (arXiv 2508.02324) through ``diffusers.QwenImagePipeline``: packing, padding, guidance stay in this file.

One transformer token holds a 2 x 2 patch of latent positions: channels come out as (c, dy, dx). The rest of the package
sees latents of shape (N, C, 1, H, W) with one position per latent cell. Text and picture are two streams that attend to
each other; words beyond a prompt's last one are masked, so a prompt's length changes nothing for its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from jaxtyping import Float
from torch import Tensor

from vipo.generators.common import (
    DiffusersGenerator,
    decode_normalised,
    network_time,
    pack_patches,
    shift_of,
    unpack_patches,
)
from vipo.generators.conditioning import BlankConditioning, PaddedConditioning
from vipo.generators.settings import AdapterOptions, Guidance
from vipo.generators.sizes import latent_and_token_grid
from vipo.generators.text import TextReader
from vipo.generators.token_limits import TokenLimit

PATCH = 2  # latent positions per token side, fixed by the architecture


def lora_targets(blocks: int) -> Mapping[str, str]:
    """The choices for a network of so many blocks.

    What the last block makes of the text is not used, so the layers that only serve it get no gradient there. They are
    left out: a weight without gradient stops distributed training.
    """
    block, not_last = r"transformer_blocks\.\d+", rf"transformer_blocks\.(?!{blocks - 1}\.)\d+"
    joint = r"attn\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)"
    text = r"attn\.(add_q_proj|to_add_out)"
    return {
        "attention": rf"{block}\.{joint}|{not_last}\.{text}",
        "blocks": (
            rf"{block}\.({joint}|img_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
            rf"|{not_last}\.({text}|txt_mlp\.net\.(0\.proj|2))"
        ),
    }


class QwenImageText(TextReader):
    """Qwen2.5-VL on the prompt in its template.

    At most 1024 tokens are read; rows are padded to ``max_sequence_length``, the network reads no padding beyond the
    longest prompt of a batch.
    """

    def read(self, prompts: Sequence[str]) -> PaddedConditioning:
        embeds, mask = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        longest = embeds.shape[1]
        words = torch.full((len(embeds),), longest, device=embeds.device) if mask is None else mask.sum(1)
        return PaddedConditioning(F.pad(embeds, (0, 0, 0, self.max_sequence_length - longest)), words)

    def limits(self) -> Sequence[TokenLimit]:
        """Of the template the pipeline drops what stands before the prompt."""
        template, before = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        return [
            TokenLimit("Qwen2.5-VL", self.pipeline.tokenizer, self.max_sequence_length, template.format, before),
        ]

    def blank(self, rows: int) -> BlankConditioning:
        return self.full_rows(rows, self.pipeline.transformer.config.joint_attention_dim)


class QwenImageGenerator(DiffusersGenerator):
    """A Qwen-Image pipeline as a :class:`vipo.types.Generator`.

    ``shift`` is the exponential of the scheduler's line in the number of tokens. The published scheduler also stretches
    its grid so that the last level before 0 is ``shift_terminal`` = 0.02 whatever the number of steps. No shift can say
    that: the grid here ends with the shifted 1 / steps, a longer last step. The velocity at a given level is the same.

    The guidance scale is what the pipeline calls ``true_cfg_scale``, 1 turns it off; a blank as the negative prompt, as
    the model's authors take it, says nothing.

    Args:
        pipeline: any ``QwenImagePipeline``.
        height, width: picture size in pixels, multiples of twice the autoencoder's stride.

    Raises:
        UserError: a size that the packing cannot hold.
    """

    pipeline_class = QwenImagePipeline
    text_reader = QwenImageText
    usual = AdapterOptions(Guidance(4.0, negative_prompt=" "))
    masks_text = True

    def __init__(
        self, pipeline: QwenImagePipeline, *, height: int, width: int, options: AdapterOptions | None = None
    ) -> None:
        grid, (rows, columns) = latent_and_token_grid("Qwen-Image", pipeline, height, width)
        config = pipeline.transformer.config
        super().__init__(pipeline, (int(config.in_channels) // PATCH**2, 1, *grid), options)
        self.lora_targets = lora_targets(int(config.num_layers))
        self._image_shape = 1, rows, columns
        self.shift = shift_of(pipeline.scheduler, rows * columns)

    def predict(
        self, latents: Float[Tensor, "N C 1 H W"], sigma: Float[Tensor, " N"], conditioning: PaddedConditioning
    ) -> Float[Tensor, "N C 1 H W"]:
        dtype = self.pipeline.transformer.dtype
        words = conditioning.words
        lengths = conditioning.lengths()
        longest = max(lengths)
        mask = torch.arange(longest, device=words.device) < words[:, None]
        tokens = self.network(
            hidden_states=pack_patches(latents).to(dtype),
            timestep=network_time(sigma, dtype),  # the transformer multiplies by 1000 again
            encoder_hidden_states=conditioning.prompt_embeds[:, :longest].to(dtype),
            encoder_hidden_states_mask=None if min(lengths) == longest else mask,
            img_shapes=[[self._image_shape]] * len(latents),
            return_dict=False,
        )[0]
        return unpack_patches(tokens.float(), *self.grid)

    def blend(
        self, positive: Float[Tensor, "N C 1 H W"], negative: Float[Tensor, "N C 1 H W"]
    ) -> Float[Tensor, "N C 1 H W"]:
        """The linear blend, every token of it scaled back to the length that the positive one has."""
        guided, kept = pack_patches(super().blend(positive, negative)), pack_patches(positive)
        scale = kept.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack_patches(guided * scale, *self.grid)

    def decode_part(self, latents: Float[Tensor, "n C 1 H W"]) -> Float[Tensor, "n 3 1 Y X"]:
        return decode_normalised(self.pipeline.vae, latents)
