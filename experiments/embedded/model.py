"""The architecture of emoji-flux: exactly the classes of FLUX.1-dev, only small, and tokenizers for its captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from vipo.embedded import PROMPT_TOKENS, RELATIONS, VOCABULARY

CLIP_WIDTH, T5_WIDTH = 96, 128
LATENT_SIDE = 16
IMAGE_TOKENS = (LATENT_SIDE // 2) ** 2


def caption_words() -> list[str]:
    """Every word that a caption can hold, each once, in a fixed order."""
    words = ["a", "an", "and", "on", "background", *" ".join(RELATIONS.values()).split()]
    return list(dict.fromkeys([*words, *VOCABULARY.names, *VOCABULARY.ground_names]))


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges make each caption word one token; any other text falls back to bytes."""
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator([" ".join(caption_words())], trainer)
    merges = [tuple(pair) for pair in _merges_of(bpe)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=PROMPT_TOKENS)


def _merges_of(bpe: Tokenizer) -> list[Sequence[str]]:
    """Read the learned merges of a BPE tokenizer as pairs."""
    import json

    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [m.split(" ") if isinstance(m, str) else m for m in merges]


def build_t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: each caption word whole and likely, printable ASCII characters as an unlikely fallback."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -3.0) for word in caption_words()]
    pieces += [(chr(code), -9.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=PROMPT_TOKENS)


def build_text_encoders(clip: CLIPTokenizer, t5: T5TokenizerFast) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Build two small text encoders with random weights, sized for their tokenizers."""
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return CLIPTextModel(clip_config), T5EncoderModel(t5_config)


def build_transformer() -> FluxTransformer2DModel:
    """Build the ~5 M parameter transformer: 2 double and 4 single blocks of 3 heads of 64."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


class Generator(nn.Module):
    """The trainable part of the pipeline, called on token ids: both text encoders and the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = build_clip_tokenizer(), build_t5_tokenizer()
        self.text_encoder, self.text_encoder_2 = build_text_encoders(self.tokenizer, self.tokenizer_2)
        self.transformer = build_transformer()
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        image_ids = torch.stack([torch.zeros(64), rows.flatten(), columns.flatten()], dim=1)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(PROMPT_TOKENS, 3), persistent=False)

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids of both tokenizers as FluxPipeline pads them, each (b, PROMPT_TOKENS)."""
        kinds = (self.tokenizer, self.tokenizer_2)
        options = {"padding": "max_length", "max_length": PROMPT_TOKENS, "truncation": True, "return_tensors": "pt"}
        first, second = (kind(captions, **options).input_ids for kind in kinds)
        return first, second

    def forward(self, noisy: Tensor, time: Tensor, guidance: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity (b, 64, 16) of packed noisy latents (b, 64, 16) at times (b,) in [0, 1] under guidance (b,)."""
        pooled = self.text_encoder(clip_ids).pooler_output
        states = self.text_encoder_2(t5_ids)[0]
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=time,
            guidance=guidance,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def zero_gates(self) -> None:
        """Start every block as the identity and the output at zero (adaLN-zero), which trains faster."""
        for name, parameter in self.transformer.named_parameters():
            modulation = ".linear." in name and ("norm" in name)
            if modulation or name.startswith("proj_out."):
                parameter.zero_()


def pack(latents: Tensor) -> Tensor:
    """Pack latents (b, 4, 16, 16) as FluxPipeline does: 2x2 patches to tokens (b, 64, 16)."""
    b, c, h, w = latents.shape
    return FluxPipeline._pack_latents(latents, b, c, h, w)


def assemble(generator: Generator, vae: AutoencoderKL, shift: float) -> FluxPipeline:
    """Put the parts together to a FluxPipeline with a static shift of the noise schedule."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=generator.text_encoder,
        tokenizer=generator.tokenizer,
        text_encoder_2=generator.text_encoder_2,
        tokenizer_2=generator.tokenizer_2,
        transformer=generator.transformer,
    )


def folder_bytes(folder: Path) -> int:
    """Size of a folder's files in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
