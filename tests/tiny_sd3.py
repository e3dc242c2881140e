"""A Stable Diffusion 3.5 of random weights: two blocks of width 32, the first with the second attention of medium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

import tiny
from vipo.generators.sd3 import StableDiffusion3Generator

GRID = (6, 10)  # latents of a tiny.HEIGHT x tiny.WIDTH picture; 3 x 5 patches
MAX_PIXELS = 64


def save_pipeline(folder: Path, flux: Path, seed: int = 0) -> Path:
    """Autoencoder and tokenizers are those of the tiny FLUX in ``flux``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        clip = CLIPTextConfig.from_pretrained(flux / "text_encoder", num_hidden_layers=2)
        encoders = [CLIPTextModelWithProjection(clip) for _ in range(2)]
        t5 = T5EncoderModel(T5Config.from_pretrained(flux / "text_encoder_2", d_model=32))
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(flux / "vae"),
        text_encoder=encoders[0],
        tokenizer=AutoTokenizer.from_pretrained(flux / "tokenizer"),
        text_encoder_2=encoders[1],
        tokenizer_2=AutoTokenizer.from_pretrained(flux / "tokenizer"),
        text_encoder_3=t5,
        tokenizer_3=AutoTokenizer.from_pretrained(flux / "tokenizer_2"),
    ).save_pretrained(folder)
    return folder


def generator(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> StableDiffusion3Generator:
    size = {"height": tiny.HEIGHT, "width": tiny.WIDTH, "max_sequence_length": 16}
    return StableDiffusion3Generator.from_pretrained(folder, device="cpu", dtype=dtype, **{**size, **options})
