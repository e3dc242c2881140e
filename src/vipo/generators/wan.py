"""Wan text to video through ``diffusers.WanPipeline``: Wan2.1 (1.3B, 14B) and Wan2.2-TI2V-5B, used from text alone.

The latents are in the transformer's own layout (N, C, T, H, W); it cuts them into tokens of 1 x 2 x 2 positions itself.
The autoencoder is causal: latent frame 0 is pixel frame 0, and latent frame k adds the pixel frames s(k-1)+1 ... sk of
its temporal stride s, so a clip has s(T-1)+1 frames (Wan-VAE, arXiv 2503.20314).

Wan2.2-TI2V-5B takes one time per token, so that an image can be given as a first frame without noise. From text alone
all tokens have the same time, and one time per sample is the same function without a modulation per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from jaxtyping import Float
from torch import Tensor

from vipo.generators.common import DiffusersGenerator, decode_normalised, shift_of
from vipo.generators.token_limits import TokenLimit
from vipo.types import Batched, UserError

TIME_SCALE = 1000.0  # the transformer's time runs from 0 to 1000

# Which linear layers a LoRA may sit on, by name of the choice, as regular expressions over module names.
LORA_TARGETS: Mapping[str, str] = {
    "attention": r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "blocks": r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.0\.proj|ffn\.net\.2)",
}


@dataclass(frozen=True)
class WanConditioning(Batched):
    """What UMT5 says, zero after the prompt's last token; the transformer attends to the zeros too."""

    prompt_embeds: Float[Tensor, "N L D"]


class WanGenerator(DiffusersGenerator):
    """A Wan text-to-video pipeline as a :class:`vipo.types.Generator`.

    Args:
        pipeline: a ``WanPipeline`` with one transformer; that is what gets trained.
        height, width: in pixels, multiples of the autoencoder's stride times the transformer's patch.
        frames: in pixel space, one more than a multiple of the temporal stride; 1 is a picture.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        max_sequence_length: UMT5 tokens per prompt; the padding is attended to, so the default is what the model was
            trained with: 512, or less if the tokenizer says so.
        negative_prompt: what guidance leads away from.
        guidance_in_one_pass: both halves of guidance in one network call; twice the memory for videos.
        shift: of the time schedule; None takes the scheduler's.
        decode_batch_size: videos decoded at once.

    Raises:
        UserError: a size or a number of frames that the model cannot make, or another kind of Wan.
    """

    pipeline_class = WanPipeline
    lora_targets = LORA_TARGETS
    float32_parts = ("vae",)  # as its authors run it

    def __init__(
        self,
        pipeline: WanPipeline,
        *,
        height: int,
        width: int,
        frames: int,
        guidance_scale: float = 5.0,
        max_sequence_length: int | None = None,
        negative_prompt: str = "",
        guidance_in_one_pass: bool = False,
        shift: float | None = None,
        decode_batch_size: int = 1,
    ) -> None:
        _check_kind(pipeline)
        super().__init__(
            pipeline,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            guidance_in_one_pass=guidance_in_one_pass,
            decode_batch_size=decode_batch_size,
        )
        self.max_sequence_length = max_sequence_length or min(int(pipeline.tokenizer.model_max_length), 512)
        self.temporal_stride = int(pipeline.vae_scale_factor_temporal)
        stride, patch = int(pipeline.vae_scale_factor_spatial), pipeline.transformer.config.patch_size
        _check_frames(frames, self.temporal_stride)
        _check_sides(height, width, stride * int(patch[1]), stride * int(patch[2]))
        latent_frames = (frames - 1) // self.temporal_stride + 1
        self._latent_shape = int(pipeline.vae.config.z_dim), latent_frames, height // stride, width // stride
        self.shift = _flow_shift(pipeline.scheduler) if shift is None else shift
        if self.device.type == "cpu":
            channels_last(pipeline.vae)

    def latent_shape(self) -> tuple[int, int, int, int]:
        return self._latent_shape

    @torch.no_grad()
    def encode_now(self, prompts: Sequence[str]) -> WanConditioning:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return WanConditioning(embeds)

    def token_limits(self) -> Sequence[TokenLimit]:
        return [TokenLimit("UMT5", self.pipeline.tokenizer, self.max_sequence_length, prompt_clean)]

    def blank_conditioning(self, rows: int) -> WanConditioning:
        """Zeros of the shape of encoded prompts, for planning without weights."""
        shape = rows, self.max_sequence_length, self.pipeline.transformer.config.text_dim
        return WanConditioning(torch.zeros(shape, dtype=self.pipeline.text_encoder.dtype, device=self.device))

    def predict(
        self, latents: Float[Tensor, "N C T H W"], sigma: Float[Tensor, " N"], conditioning: WanConditioning
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


def channels_last(vae: torch.nn.Module) -> None:
    """Lay the convolutions' weights out so that they run about twice as fast on a CPU."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


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


def _nearest(value: float, step: int) -> int:
    """The positive multiple of ``step`` that is closest."""
    return max(1, round(value / step)) * step


def _check_frames(frames: int, stride: int) -> None:
    accepted = stride * max(0, round((frames - 1) / stride)) + 1
    if frames != accepted:
        raise UserError(
            f"frames={frames} is not one more than a multiple of {stride}, as the clips of this Wan model are;"
            f" the nearest is frames={accepted}"
        )


def _check_sides(height: int, width: int, row: int, column: int) -> None:
    accepted = _nearest(height, row), _nearest(width, column)
    if (height, width) != accepted:
        raise UserError(
            f"height={height} and width={width} must be multiples of {row} and {column} pixels for this Wan model;"
            f" the nearest are height={accepted[0]} and width={accepted[1]}"
        )


def _flow_shift(scheduler: Any) -> float:
    """The time shift a Wan pipeline ships with; its UniPC scheduler calls it ``flow_shift``."""
    shift = scheduler.config.get("flow_shift")
    return shift_of(scheduler, tokens=0) if shift is None else float(shift)
