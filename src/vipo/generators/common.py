"""What every adapter of a diffusers pipeline shares: loading, freezing, guidance, decoding in parts, text, export.

Classifier-free guidance is the linear blend u = u_negative + scale (u_positive - u_negative), both in one batch or one
after the other; a family that blends otherwise overrides :meth:`DiffusersGenerator.blend`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.logging import disable_progress_bar
from jaxtyping import Float
from torch import Tensor

from vipo.files import usual_permissions
from vipo.generators.token_limits import TokenLimit, cut_prompts
from vipo.generators.weights import load_pipeline
from vipo.types import Batched, Grid, UserError

Encode = Callable[[Sequence[str]], Batched]


class DiffusersGenerator(ABC):
    """A diffusers pipeline as a :class:`vipo.types.Generator`; one subclass per pipeline family.

    Args:
        pipeline: an instance of ``pipeline_class``; its ``transformer`` is what gets trained.
        guidance_scale: 1 is the plain velocity; what else it means is the family's.
        negative_prompt: what guidance leads away from.
        guidance_in_one_pass: both halves of guidance in one network call; False halves the memory.
        decode_batch_size: samples decoded at once.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_targets: Mapping[str, str]
    shift: float  # each subclass sets it, from its scheduler and size
    temporal_stride = 1
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    float32_parts: ClassVar[tuple[str, ...]] = ()  # of the pipeline, whatever dtype the rest is loaded in

    def __init__(
        self,
        pipeline: Any,
        *,
        guidance_scale: float,
        negative_prompt: str = "",
        guidance_in_one_pass: bool = True,
        decode_batch_size: int = 32,
    ) -> None:
        self.pipeline = pipeline
        self.network: torch.nn.Module = pipeline.transformer
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.guidance_in_one_pass = guidance_in_one_pass
        self.decode_batch_size = decode_batch_size
        self.device: torch.device = pipeline.transformer.device
        self.encode_text: Encode = self.encode_now  # replaced by a cache, see vipo.generators.text_cache
        for part in (pipeline.vae, *self.text_encoders, pipeline.transformer):
            part.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str, dtype: torch.dtype, **options: Any) -> Self:
        """Load a pipeline folder or hub id; ``options`` are the constructor's.

        Raises:
            UserError: no pipeline of this family is there, or its weights do not fit it in both directions.
        """
        disable_progress_bar()
        dtypes = {"default": dtype, **dict.fromkeys(cls.float32_parts, torch.float32)}
        return cls(load_pipeline(cls.pipeline_class, str(path), dtypes).to(device), **options)

    @property
    def text_encoders(self) -> tuple[torch.nn.Module, ...]:
        """What turns text into conditioning; needed no more once every prompt is in a cache; some may be left out."""
        parts = (getattr(self.pipeline, name) for name in self.text_encoder_names)
        return tuple(part for part in parts if part is not None)

    @property
    def is_guided(self) -> bool:
        """Whether a velocity takes two passes of the network."""
        return self.guidance_scale > 1

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one sample."""

    @abstractmethod
    def encode_now(self, prompts: Sequence[str]) -> Batched:
        """What the text encoders say, one row per prompt, all of one length; without gradient."""

    @abstractmethod
    def token_limits(self) -> Sequence[TokenLimit]:
        """How much of a prompt each encoder reads that hands on a sequence of tokens; pooled vectors do not count."""

    @abstractmethod
    def predict(
        self, latents: Float[Tensor, "N C T H W"], sigma: Float[Tensor, " N"], conditioning: Any
    ) -> Float[Tensor, "N C T H W"]:
        """u = e - x of one pass of the network, float32, without classifier-free guidance."""

    @abstractmethod
    def decode_part(self, latents: Float[Tensor, "n C T H W"]) -> Float[Tensor, "n 3 F Y X"]:
        """A few clean latents to media in the autoencoder's range [-1, 1]."""

    def encode(self, prompts: Sequence[str]) -> Any:
        return self.encode_text(prompts)

    def cut_prompts(self, **texts: Sequence[str]) -> list[str]:
        """A sentence for each kind of prompt, ``training`` for one, of which some are longer than an encoder reads."""
        negative = {"negative": [self.negative_prompt]} if self.is_guided else {}
        limits = [limit for limit in self.token_limits() if limit.tokenizer is not None]
        return cut_prompts(limits, {f"{kind} prompts": given for kind, given in (texts | negative).items()})

    def velocity(
        self, latents: Float[Tensor, "N C T H W"], sigma: Float[Tensor, " N"], conditioning: Any
    ) -> Float[Tensor, "N C T H W"]:
        if not self.is_guided:
            return self.predict(latents, sigma, conditioning)
        away = self._negative_row.take(torch.zeros(len(latents), dtype=torch.long))
        if not self.guidance_in_one_pass:
            return self.blend(self.predict(latents, sigma, conditioning), self.predict(latents, sigma, away))
        both = type(conditioning).cat([conditioning, away])
        positive, negative = self.predict(latents.repeat(2, 1, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return self.blend(positive, negative)

    @cached_property
    def _negative_row(self) -> Batched:
        row: Batched = self.encode([self.negative_prompt]).to(self.device)
        return row

    def blend(
        self, positive: Float[Tensor, "N C T H W"], negative: Float[Tensor, "N C T H W"]
    ) -> Float[Tensor, "N C T H W"]:
        """The guided velocity from the two passes (arXiv 2207.12598)."""
        return negative + self.guidance_scale * (positive - negative)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N 3 F Y X"]:
        media = torch.cat([self.decode_part(part).float() for part in latents.split(self.decode_batch_size)])
        return (media / 2 + 0.5).clamp(0, 1)

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor]) -> None:
        """Write LoRA layers so that the pipeline's ``load_lora_weights(folder)`` reads them.

        The file's header names them too, so that a reader can see that none is missing.
        """
        saver: Any = self.pipeline_class
        ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in layers.items() if "lora_A" in name}
        rank = next(iter(ranks.values()))  # of all of them; alpha is the rank because B is scaled already
        settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)}
        saver.save_lora_weights(
            str(folder), transformer_lora_layers=dict(layers), transformer_lora_adapter_metadata=settings
        )
        usual_permissions([folder / LORA_WEIGHT_NAME_SAFE])

    def save_pretrained(self, folder: Path) -> None:
        """Write the whole pipeline so that its ``from_pretrained(folder)`` reads it."""
        self.pipeline.save_pretrained(str(folder))
        usual_permissions(folder.rglob("*.safetensors"))


def check_multiple(cell: int, model: str, **sides: int) -> None:
    """Sides in pixels must fill whole tokens.

    Raises:
        UserError: one does not.
    """
    if any(side % cell for side in sides.values()):
        given = " and ".join(f"{name}={side}" for name, side in sides.items())
        raise UserError(f"{given} must be multiples of {cell} pixels for this {model} model")


def latent_and_token_grid(model: str, pipeline: Any, height: int, width: int, patch: int = 2) -> tuple[Grid, Grid]:
    """(H, W) of a picture's latents, and of its tokens of ``patch`` x ``patch`` positions.

    Raises:
        UserError: sides that do not fill whole tokens.
    """
    stride = int(pipeline.vae_scale_factor)
    check_multiple(stride * patch, model, height=height, width=width)
    latent = height // stride, width // stride
    return latent, (latent[0] // patch, latent[1] // patch)


def shift_of(scheduler: Any, tokens: int, *, mu: float | None = None) -> float:
    """The time shift a pipeline's scheduler applies to a picture of so many tokens.

    A static ``shift``, or with ``use_dynamic_shifting`` ``mu``, a shift's logarithm. It is what the pipeline works out
    or else on the line through (``base_image_seq_len``, ``base_shift``) and (``max_image_seq_len``, ``max_shift``), as
    in arXiv 2403.03206, sec. 5.3.2.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return float(config.shift)
    if mu is None:
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def network_time(sigma: Float[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, " N"]:
    """The noise level as the FLUX pipelines hand it over: 1000 sigma in the network's dtype, divided by 1000.

    In bfloat16 that rounds to about 1/256 of sigma. The published models sample with it, and their transformers would
    round it anyway; sampling and replay round alike.
    """
    return (sigma * 1000).to(dtype) / 1000


def decode_scaled(vae: Any, latents: Float[Tensor, "n C 1 H W"]) -> Float[Tensor, "n 3 1 Y X"]:
    """Clean latents of one picture each through an ``AutoencoderKL`` with scaling and shift, to [-1, 1]."""
    scaled = latents.squeeze(2).to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(scaled, return_dict=False)[0].unsqueeze(2)


def decode_normalised(vae: Any, latents: Float[Tensor, "n C T H W"]) -> Float[Tensor, "n 3 F Y X"]:
    """Decode with an autoencoder whose config has a mean and a standard deviation per channel, as Wan's."""
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=latents.device)
    mean, std = statistics.view(2, 1, -1, 1, 1, 1)
    media: Tensor = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
    return media


def pack_patches(latents: Float[Tensor, "N C 1 H W"], side: int = 2) -> Float[Tensor, "N L K"]:
    """Latents to tokens of ``side`` x ``side`` positions; channels come out as (c, dy, dx)."""
    n, c, _, height, width = latents.shape
    patches = latents.reshape(n, c, height // side, side, width // side, side)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(n, height // side * (width // side), c * side**2)


def unpack_patches(
    tokens: Float[Tensor, "N L K"], height: int, width: int, side: int = 2
) -> Float[Tensor, "N C 1 H W"]:
    """Tokens back to latents of ``height`` x ``width`` positions; the inverse of :func:`pack_patches`."""
    n, _, k = tokens.shape
    patches = tokens.reshape(n, height // side, width // side, k // side**2, side, side)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, k // side**2, 1, height, width)
