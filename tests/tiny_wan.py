"""Wan pipelines of random weights: one as Wan2.1-T2V, one as Wan2.2-TI2V-5B, each a few hundred kilobytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from vipo.embedded import path as embedded_path
from vipo.generators.wan import WanGenerator

Kind = Literal["2.1", "2.2-5B"]
FRAMES = 5  # two latent frames
SIZES: dict[Kind, tuple[int, int]] = {"2.1": (32, 48), "2.2-5B": (64, 96)}  # latents 4 x 6, tokens 2 x 3
SHIFT = 3.0
CHANNELS: dict[Kind, int] = {"2.1": 4, "2.2-5B": 6}


def shape(kind: Kind = "2.1") -> tuple[int, int, int, int]:
    """(C, T, H, W) of one sample."""
    return CHANNELS[kind], 2, 4, 6


def _transformer(channels: int) -> WanTransformer3DModel:
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    with torch.no_grad():  # or a velocity would hardly feel the prompt
        network.condition_embedder.text_embedder.linear_2.weight.mul_(10)
    return network


def _autoencoder(kind: Kind) -> AutoencoderKLWan:
    channels = CHANNELS[kind]
    large = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1 * channel - 0.2 for channel in range(channels)],
        latents_std=[1.0 + 0.2 * channel for channel in range(channels)],
        **(large if kind == "2.2-5B" else {}),
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(5)  # random decoders are grey: spread the pictures over [0, 1]
    return vae


def save_pipeline(folder: Path, kind: Kind = "2.1", seed: int = 0, **config: Any) -> Path:
    """The classes of ``kind`` with two blocks of width 24; ``config`` goes to the pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = UMT5EncoderModel(UMT5Config(vocab_size=142, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
        transformer, vae = _transformer(CHANNELS[kind]), _autoencoder(kind)
    WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(embedded_path("emoji-flux") / "tokenizer_2"),
        text_encoder=text,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
        ),
        transformer=transformer,
        expand_timesteps=kind == "2.2-5B",
        **config,
    ).save_pretrained(folder)
    return folder


def generator(folder: Path, kind: Kind = "2.1", **options: Any) -> WanGenerator:
    height, width = SIZES[kind]
    given = {"dtype": torch.float32, "height": height, "width": width, "frames": FRAMES, **options}
    return WanGenerator.from_pretrained(folder, device="cpu", **given)


class Euler(FlowMatchEulerDiscreteScheduler):
    """The plain Euler step on shifted steps of equal length from 1 to 0, where the class itself stops short of 0."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        steps = [1 - k / num_inference_steps for k in range(num_inference_steps)]
        super().set_timesteps(sigmas=steps, device=device)
