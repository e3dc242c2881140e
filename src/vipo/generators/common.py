"""What every adapter of a diffusers pipeline shares: loading, freezing, guidance, decoding in parts, text, export.

Classifier-free guidance is the linear blend u = u_negative + scale (u_positive - u_negative), both in one batch or one
after the other (arXiv 2207.12598); a family that blends otherwise overrides :meth:`DiffusersGenerator.blend`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.logging import disable_progress_bar
from jaxtyping import Float
from torch import Tensor

from vipo.files import settle_header, usual_permissions
from vipo.generators.quantization import check
from vipo.generators.settings import COMMON, AdapterOptions, Guidance, read_options
from vipo.generators.text import BlankText, Text, TextReader
from vipo.generators.text_cache import MEMORY_BYTES, TextCache, cache_of
from vipo.generators.token_limits import cut_prompts
from vipo.generators.weights import Fewer, load_pipeline
from vipo.options import Quantization, TextQuantization
from vipo.sharding import under_own_name
from vipo.types import Batched, Grid, sent
from vipo.user_file import checksum_of

SIZES = ("height", "width", "frames")  # of the media, in pixels and pixel frames


def channels_last(vae: torch.nn.Module) -> None:
    """Lay the convolutions' weights out so that they run faster on a CPU, those of clips about twice as fast."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            layout = torch.channels_last_3d if isinstance(module, torch.nn.Conv3d) else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


class DiffusersGenerator(ABC):
    """A diffusers pipeline as a :class:`vipo.types.Generator`; one subclass per pipeline family.

    Args:
        pipeline: an instance of ``pipeline_class``; its ``transformer`` is what gets trained.
        latent_shape: (C, T, H, W) of one sample.
        options: None means ``usual``.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    text_reader: ClassVar[type[TextReader]]
    usual: ClassVar[AdapterOptions]  # what holds unless a recipe says otherwise
    takes: ClassVar[tuple[str, ...]] = COMMON  # keys of ``generator.options``
    unguided: ClassVar[float] = 1.0  # the guidance scale that is the plain velocity
    masks_text: ClassVar[bool] = False  # whether the network's attention is given masks
    lora_targets: Mapping[str, str]  # linear layers by name of the choice, as regular expressions over module names
    shift: float  # each subclass sets it, from its scheduler and size
    temporal_stride = 1
    patch: ClassVar[int] = 2  # latent positions per token side; one that has another says so in ``patch_period``
    float32_parts: ClassVar[tuple[str, ...]] = ()  # of the pipeline, whatever dtype the rest is loaded in

    def __init__(
        self, pipeline: Any, latent_shape: tuple[int, int, int, int], options: AdapterOptions | None = None
    ) -> None:
        self.pipeline, self.options = pipeline, options or self.usual
        self.network: torch.nn.Module = pipeline.transformer
        self.device: torch.device = pipeline.transformer.device
        if self.device.type == "cpu":
            channels_last(pipeline.vae)
        self.reader = self.text_reader(pipeline, self.options.max_sequence_length)
        self._text: Text = self.reader
        self._latent_shape = latent_shape
        for part in (pipeline.vae, *self.text_encoders, pipeline.transformer):
            part.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str,
        dtype: torch.dtype,
        quantization: Quantization = "none",
        text_quantization: TextQuantization = "none",
        **given: Any,
    ) -> Self:
        """Load a pipeline folder or hub id; ``given`` is as in :meth:`arguments`.

        Raises:
            UserError: no pipeline of this family is there, its weights do not fit it in both directions, an option
                that the adapter does not take, or no library to quantise with.
        """
        check(quantization)
        check(text_quantization, "text_quantization")
        disable_progress_bar()
        arguments = cls.arguments(given)
        dtypes = {"default": dtype, **dict.fromkeys(cls.float32_parts, torch.float32)}
        fewer = Fewer(quantization, device, text_quantization)
        return cls(load_pipeline(cls.pipeline_class, str(path), dtypes, fewer).to(device), **arguments)

    @classmethod
    def arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's, beside the pipeline, from sizes and options under the names that a recipe gives them.

        Raises:
            UserError: an option that the adapter does not take, or a value that does not fit it.
        """
        sizes = {name: value for name, value in given.items() if name in SIZES}
        options = {name: value for name, value in given.items() if name not in SIZES}
        return {**sizes, "options": read_options(cls.__name__, cls.usual, cls.takes, options)}

    @property
    def patch_period(self) -> Grid:
        """(rows, columns) of pixels that one token of the network paints."""
        side = int(self.pipeline.vae_scale_factor) * self.patch
        return side, side

    @property
    def guidance(self) -> Guidance:
        return self.options.guidance

    @property
    def is_guided(self) -> bool:
        """Whether a velocity takes two passes of the network."""
        return self.guidance.scale > self.unguided

    @property
    def takes_guidance(self) -> bool:
        """Whether the scale of guidance changes anything."""
        return True

    @property
    def text_encoders(self) -> tuple[torch.nn.Module, ...]:
        """What reads prompts; needed no more once every prompt is in a cache."""
        return self.reader.encoders

    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one sample."""
        return self._latent_shape

    @property
    def grid(self) -> Grid:
        """(H, W) of one sample."""
        return self._latent_shape[2:]

    @abstractmethod
    def predict(
        self, latents: Float[Tensor, "N C T H W"], sigma: Float[Tensor, " N"], conditioning: Any
    ) -> Float[Tensor, "N C T H W"]:
        """u = e - x of one pass of the network, float32, without classifier-free guidance."""

    @abstractmethod
    def decode_part(self, latents: Float[Tensor, "n C T H W"]) -> Float[Tensor, "n 3 F Y X"]:
        """A few clean latents to media in the autoencoder's range [-1, 1]."""

    @property
    def text(self) -> Text:
        """What is asked about prompts at present; another one may be put in its place."""
        return self._text

    @text.setter
    def text(self, text: Text) -> None:
        self._text = text

    def encode(self, prompts: Sequence[str]) -> Any:
        return self.text(prompts)

    def keep_text(
        self,
        ahead: Sequence[str] = (),
        *,
        folder: Path | None = None,
        offload: bool = False,
        batch_size: int = 1,
        memory_bytes: int = MEMORY_BYTES,
    ) -> TextCache:
        """From now on encode each prompt once only.

        Args:
            ahead: prompts to encode now; the negative prompt is added where guidance needs it.
            folder: where rows are kept between runs; None keeps them in memory only.
            offload: then move the text encoders to the CPU. A prompt that is not in the cache calls them back for that
                moment.
            batch_size: prompts encoded at once; more than 1 is faster, but see :mod:`vipo.generators.text_cache`.
            memory_bytes: bound on the rows in memory.

        Raises:
            UserError: ``folder`` cannot be made.
        """
        name = type(self).__qualname__ + checksum_of(type(self))
        cache = cache_of(self.reader, adapter=name, folder=folder, batch_size=batch_size, memory_bytes=memory_bytes)
        cache.fill([self.guidance.negative_prompt, *ahead] if self.is_guided else ahead)
        if offload:
            self.reader.offload()
        self._text = cache
        return cache

    def blank_text(self) -> None:
        """From now on answer every prompt with zeros, as long as one can be: a plan has no weights to encode with."""
        self._text = BlankText(self.reader)

    def cut_prompts(self, **texts: Sequence[str]) -> list[str]:
        """A sentence for each kind of prompt, ``training`` for one, of which some are longer than an encoder reads."""
        negative = {"negative": [self.guidance.negative_prompt]} if self.is_guided else {}
        limits = [limit for limit in self.reader.limits() if limit.tokenizer is not None]
        return cut_prompts(limits, {f"{kind} prompts": given for kind, given in (texts | negative).items()})

    def velocity(
        self, latents: Float[Tensor, "N C T H W"], sigma: Float[Tensor, " N"], conditioning: Any
    ) -> Float[Tensor, "N C T H W"]:
        if not self.is_guided:
            return self.predict(latents, sigma, conditioning)
        away = self.negative_row.take(torch.zeros(len(latents), dtype=torch.long))
        if not self.guidance.in_one_pass:
            return self.blend(self.predict(latents, sigma, conditioning), self.predict(latents, sigma, away))
        both = type(conditioning).cat([conditioning, away])
        positive, negative = self.predict(latents.repeat(2, 1, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return self.blend(positive, negative)

    @cached_property
    def negative_row(self) -> Batched:
        row: Batched = self.encode([self.guidance.negative_prompt]).to(self.device)
        return row

    def blend(
        self, positive: Float[Tensor, "N C T H W"], negative: Float[Tensor, "N C T H W"]
    ) -> Float[Tensor, "N C T H W"]:
        """The guided velocity from the two passes."""
        return negative + self.guidance.scale * (positive - negative)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N 3 F Y X"]:
        media = torch.cat([self.decode_part(part).float() for part in latents.split(self.options.decode_batch_size)])
        return (media / 2 + 0.5).clamp(0, 1)

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor]) -> None:
        """Write LoRA layers so that the pipeline's ``load_lora_weights(folder)`` reads them.

        The file's header names them too, so that a reader can see that none is missing.
        """
        saver: Any = self.pipeline_class
        ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in layers.items() if "lora_A" in name}
        settings = lora_settings(ranks, [name for name, _ in self.pipeline.transformer.named_modules()])
        saver.save_lora_weights(
            str(folder), transformer_lora_layers=dict(layers), transformer_lora_adapter_metadata=settings
        )
        settle_header(folder / LORA_WEIGHT_NAME_SAFE)
        usual_permissions([folder / LORA_WEIGHT_NAME_SAFE])

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the whole pipeline, its network with ``weights``, so that its ``from_pretrained(folder)`` reads it."""
        network = self.pipeline.transformer
        _settle_tokenizers(self.pipeline)
        network.state_dict = lambda: dict(weights)  # what diffusers asks for; a sharded network would give its shards
        try:
            with under_own_name(network):
                self.pipeline.save_pretrained(str(folder))
        finally:
            del network.state_dict
        usual_permissions(folder.rglob("*.safetensors"))


def _settle_tokenizers(pipeline: Any) -> None:
    """Forget how the last text was padded and cut: a tokenizer's file would tell whether and how it was used."""
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and (backend := getattr(part, "backend_tokenizer", None)) is not None:
            backend.no_padding()
            backend.no_truncation()


def lora_settings(ranks: Mapping[str, int], modules: Sequence[str]) -> dict[str, Any]:
    """PEFT's settings for the layers of a LoRA and no others; alpha is the rank because B is scaled already.

    PEFT takes a name in a list for the end of one too, and an expression whole.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != usual}
    parts = (name.split(".") for name in modules if name not in ranks)
    ends = {".".join(part[k:]) for part in parts for k in range(1, len(part))}
    whole = "|".join(map(re.escape, sorted(ranks)))
    patterns = {"rank_pattern": odd, "alpha_pattern": odd} if odd else {}
    targets = whole if ends & ranks.keys() else sorted(ranks)
    return {"r": usual, "lora_alpha": usual, "target_modules": targets, **patterns}


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
    statistics = sent(torch.tensor([vae.config.latents_mean, vae.config.latents_std]), latents.device)
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
