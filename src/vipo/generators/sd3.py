"""Stable Diffusion 3 and 3.5 (medium, large) through ``diffusers.StableDiffusion3Pipeline``.

The transformer patchifies by itself, so latents enter and leave with one position per latent cell. Guidance is real
classifier-free guidance. The network's time is 1000 sigma in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.generators.common import DiffusersGenerator, decode_scaled, shift_of
from vipo.generators.conditioning import PooledConditioning
from vipo.generators.settings import AdapterOptions, Guidance
from vipo.generators.sizes import check_multiple
from vipo.generators.text import TextReader
from vipo.generators.token_limits import TokenLimit
from vipo.types import Grid

# ``attn2`` is the second, picture-only attention of the first blocks of SD3.5-medium.
_ATTENTION = r"attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
LORA_TARGETS: Mapping[str, str] = {
    "attention": rf".*\.{_ATTENTION}",
    "blocks": (
        rf"transformer_blocks\.\d+\.({_ATTENTION}"
        r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|norm1\.linear|norm1_context\.linear)"
    ),
}


class StableDiffusion3Text(TextReader):
    """The sequences of both CLIPs and T5, and both CLIPs' pooled vectors; without T5 its part is zeros.

    ``max_sequence_length`` is T5's, padding included.
    """

    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def usual_length(self) -> int:
        return 256

    def read(self, prompts: Sequence[str]) -> PooledConditioning:
        """What the text encoders say.

        Raises:
            UserError: the pipeline lacks a CLIP text encoder.
        """
        missing = [name for name in self.encoder_names[:2] if getattr(self.pipeline, name) is None]
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
        return PooledConditioning(embeds, pooled)

    def limits(self) -> Sequence[TokenLimit]:
        """The CLIPs' and, if it is there, T5's: the network reads the sequences of all of them."""
        clip = TokenLimit("CLIP", self.pipeline.tokenizer, self.pipeline.tokenizer_max_length)
        if self.pipeline.text_encoder_3 is None:
            return [clip]
        return [clip, TokenLimit("T5", self.pipeline.tokenizer_3, self.max_sequence_length)]

    def blank(self, rows: int) -> PooledConditioning:
        config = self.pipeline.transformer.config
        tokens = self.pipeline.tokenizer_max_length + self.max_sequence_length  # both CLIPs', then T5's
        embeds = self.zeros(rows, tokens, config.joint_attention_dim)
        return PooledConditioning(embeds, self.zeros(rows, config.pooled_projection_dim))


class StableDiffusion3Generator(DiffusersGenerator):
    """A Stable Diffusion 3 or 3.5 pipeline as a :class:`vipo.types.Generator`.

    Left to itself the pipeline ends its grid near sigma = 0.009 and jumps to 0 from there; ours is
    :func:`vipo.sde.shifted_sigmas`, which is the pipeline's for ``sigmas=numpy.linspace(1, 1 / steps, steps)``.

    Args:
        pipeline: any ``StableDiffusion3Pipeline``.
        height, width: picture size in pixels, multiples of the autoencoder's stride times the patch.

    Raises:
        UserError: a size that does not fill whole patches, or one beyond the position embedding.
    """

    pipeline_class = StableDiffusion3Pipeline
    text_reader = StableDiffusion3Text
    usual = AdapterOptions(Guidance(4.5))
    lora_targets = LORA_TARGETS

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, *, height: int, width: int, options: AdapterOptions | None = None
    ) -> None:
        config, stride = pipeline.transformer.config, pipeline.vae_scale_factor
        cell = stride * config.patch_size
        check_multiple(cell, "Stable Diffusion 3", height=height, width=width)
        if max(height, width) > config.pos_embed_max_size * cell:
            raise UserError(
                f"height={height} and width={width} are beyond this model's position embedding; ask for at most"
                f" {config.pos_embed_max_size * cell} pixels a side"
            )
        super().__init__(pipeline, (int(config.in_channels), 1, height // stride, width // stride), options)
        self.shift = shift_of(pipeline.scheduler, height // cell * (width // cell))

    @property
    def patch_period(self) -> Grid:
        side = int(self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size)
        return side, side

    def predict(
        self,
        latents: Float[Tensor, "N C 1 H W"],
        sigma: Float[Tensor, " N"],
        conditioning: PooledConditioning,
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
