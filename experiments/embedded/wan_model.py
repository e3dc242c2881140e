"""The architecture of emoji-wan: exactly the classes of Wan2.1-T2V, only small, and a tokenizer for its captions."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from vipo.embedded import PROMPT_TOKENS, clips

TEXT_WIDTH = 128
CHANNELS = 8
LATENT_SIDE = 16


def caption_words() -> list[str]:
    """Every word that a caption of a clip can hold, each once, in a fixed order."""
    motions = " ".join(clips.MOTIONS.values()).split()
    return list(dict.fromkeys(["a", "an", "on", "background", *motions, *clips.OBJECTS, *clips.GROUNDS]))


def build_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: each caption word whole and likely, printable ASCII characters as an unlikely fallback."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -3.0) for word in caption_words()]
    pieces += [(chr(code), -9.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=PROMPT_TOKENS)


def build_text_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """A small UMT5 encoder with random weights."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def build_transformer() -> WanTransformer3DModel:
    """The 3.5 M parameter transformer: 6 blocks of 4 heads of 48, tokens of 1 x 2 x 2 latent positions."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=576,
        num_layers=6,
        rope_max_seq_len=64,
    )


def build_autoencoder() -> AutoencoderKLWan:
    """The causal video autoencoder, narrow: 4x down in time and in space, so 17 x 64 x 64 pixels are 5 x 16 x 16."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


class Generator(nn.Module):
    """The trainable part of the pipeline, called on token ids: the text encoder and the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.transformer = build_transformer()

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and their mask as WanPipeline pads them, each (b, PROMPT_TOKENS)."""
        options = {"padding": "max_length", "max_length": PROMPT_TOKENS, "truncation": True, "return_tensors": "pt"}
        found = self.tokenizer(captions, **options)
        return found.input_ids, found.attention_mask

    def forward(self, noisy: Tensor, time: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Velocity of noisy latents (b, C, T, H, W) at times (b,) in [0, 1]; padding is zero, as in WanPipeline."""
        states = self.text_encoder(ids, attention_mask=mask)[0] * mask[..., None]
        return self.transformer(
            hidden_states=noisy, timestep=time * 1000, encoder_hidden_states=states, return_dict=False
        )[0]

    @torch.no_grad()
    def zero_gates(self) -> None:
        """Start every block near the identity and the output at zero, which trains faster."""
        for name, parameter in self.transformer.named_parameters():
            if name.startswith("proj_out."):
                parameter.zero_()
            elif name.endswith("scale_shift_table") and name.startswith("blocks."):
                parameter[:, 2].zero_()
                parameter[:, 5].zero_()
            elif name.startswith("condition_embedder.time_proj."):
                gates = parameter.view(6, -1, *parameter.shape[1:])
                gates[2].zero_()
                gates[5].zero_()


def assemble(generator: Generator, vae: AutoencoderKLWan, shift: float) -> WanPipeline:
    """Put the parts together to a WanPipeline with a static shift of the noise schedule."""
    return WanPipeline(
        tokenizer=generator.tokenizer,
        text_encoder=generator.text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
        transformer=generator.transformer,
    )
