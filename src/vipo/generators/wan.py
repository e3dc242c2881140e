"""Wan text to video through ``diffusers.WanPipeline``: Wan2.1 (1.3B, 14B) and Wan2.2-TI2V-5B, used from text alone.

The latents are in the transformer's own layout (N, C, T, H, W); it cuts them into tokens of 1 x 2 x 2 positions itself.
The autoencoder is causal: latent frame 0 is pixel frame 0, and latent frame k adds the pixel frames s(k-1)+1 ... sk of
its temporal stride s, so a clip has s(T-1)+1 frames (Wan-VAE, arXiv 2503.20314).

Wan2.2-TI2V-5B takes one time per token, so that an image can be given as a first frame without noise. From text alone
all tokens have the same time, and one time per sample is the same function without a modulation per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.generators.common import DiffusersGenerator, decode_normalised, shift_of
from vipo.generators.conditioning import Conditioning
from vipo.generators.settings import COMMON, AdapterOptions, Guidance
from vipo.generators.sizes import check_frames, check_sides
from vipo.generators.text import USUAL_LENGTH, TextReader
from vipo.generators.token_limits import TokenLimit
from vipo.types import Grid

TIME_SCALE = 1000.0  # the transformer's time runs from 0 to 1000

_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
LORA_TARGETS: Mapping[str, str] = {
    "attention": rf"blocks\.\d+\.{_ATTENTION}",
    "blocks": rf"blocks\.\d+\.({_ATTENTION}|ffn\.net\.0\.proj|ffn\.net\.2)",
}


class WanText(TextReader):
    """UMT5, zero after the prompt's last token. The transformer attends to the zeros: as many as in training."""

    def usual_length(self) -> int:
        return min(int(self.pipeline.tokenizer.model_max_length), USUAL_LENGTH)

    def read(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return Conditioning(embeds)

    def limits(self) -> Sequence[TokenLimit]:
        return [TokenLimit("UMT5", self.pipeline.tokenizer, self.max_sequence_length, prompt_clean)]

    def blank(self, rows: int) -> Conditioning:
        return Conditioning(self.zeros(rows, self.max_sequence_length, self.pipeline.transformer.config.text_dim))


class WanGenerator(DiffusersGenerator):
    """A Wan text-to-video pipeline as a :class:`vipo.types.Generator`.

    Both halves of guidance in one pass need twice the memory, which is much for videos, so it is two unless told.

    Args:
        pipeline: a ``WanPipeline`` with one transformer.
        height, width: in pixels, multiples of the autoencoder's stride times the transformer's patch.
        frames: in pixel space, one more than a multiple of the temporal stride; 1 is a picture.

    Raises:
        UserError: a size or a number of frames that the model cannot make, or another kind of Wan.
    """

    pipeline_class = WanPipeline
    text_reader = WanText
    usual = AdapterOptions(Guidance(5.0, in_one_pass=False), decode_batch_size=1)
    takes = (*COMMON, "shift")
    lora_targets = LORA_TARGETS
    float32_parts = ("vae",)  # as its authors run it

    def __init__(
        self, pipeline: WanPipeline, *, height: int, width: int, frames: int, options: AdapterOptions | None = None
    ) -> None:
        _check_kind(pipeline)
        self.temporal_stride = int(pipeline.vae_scale_factor_temporal)
        stride, patch = int(pipeline.vae_scale_factor_spatial), pipeline.transformer.config.patch_size
        check_frames("Wan", frames, self.temporal_stride)
        check_sides("Wan", height, width, stride * int(patch[1]), stride * int(patch[2]))
        grid = (frames - 1) // self.temporal_stride + 1, height // stride, width // stride
        super().__init__(pipeline, (int(pipeline.vae.config.z_dim), *grid), options)
        self.shift = self.options.shift or _flow_shift(pipeline.scheduler)

    @property
    def patch_period(self) -> Grid:
        stride, patch = int(self.pipeline.vae_scale_factor_spatial), self.pipeline.transformer.config.patch_size
        return stride * int(patch[1]), stride * int(patch[2])

    def predict(
        self, latents: Float[Tensor, "N C T H W"], sigma: Float[Tensor, " N"], conditioning: Conditioning
    ) -> Float[Tensor, "N C T H W"]:
        dtype = self.pipeline.transformer.dtype  # of its linear layers: norms and the time embedding stay in float32
        velocity = self.network(
            hidden_states=latents.to(dtype),
            timestep=sigma.float() * TIME_SCALE,  # in bfloat16 neighbouring times above 256 would fall together
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    def decode_part(self, latents: Float[Tensor, "n C T H W"]) -> Float[Tensor, "n 3 F Y X"]:
        return decode_normalised(self.pipeline.vae, latents)


def _check_kind(pipeline: Any) -> None:
    """One transformer from text to video is what can be trained here."""
    if pipeline.config.boundary_ratio is not None or pipeline.transformer_2 is not None:
        raise UserError(
            "this Wan pipeline has one transformer for high and one for low noise (as Wan2.2-A14B); vipo trains one"
            " transformer: give Wan2.1-T2V-1.3B, Wan2.1-T2V-14B or Wan2.2-TI2V-5B"
        )
    taken, made = pipeline.transformer.config.in_channels, pipeline.vae.config.z_dim
    if taken != made:
        raise UserError(
            f"this Wan transformer takes {taken} channels, but its autoencoder makes {made}: it wants an image beside"
            " the text; give a text-to-video model, such as Wan2.1-T2V-1.3B"
        )


def _flow_shift(scheduler: Any) -> float:
    """The time shift a Wan pipeline ships with; its UniPC scheduler calls it ``flow_shift``."""
    shift = scheduler.config.get("flow_shift")
    return shift_of(scheduler, tokens=0) if shift is None else float(shift)
