"""The Qwen-Image adapter against its own diffusers pipeline, picture for picture, on random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import adapters
import tiny
from vipo.errors import UserError
from vipo.generators import adapter_of, factory
from vipo.generators.qwen_image import QwenImageGenerator

HEIGHT, WIDTH = 24, 40  # latents 6 x 10, tokens 3 x 5
STEPS, GUIDANCE = 3, 4.0
PROMPTS = ["a cat", "a red car on a blue background"]
LENGTH = 224  # the tiny tokenizer takes one token per byte, also for the template's end
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer() -> Qwen2Tokenizer:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: place for place, letter in enumerate(bytes_to_unicode().values())}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=SPECIAL[1:])


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    network = Qwen2_5_VLForConditionalGeneration(config)
    for weight in network.parameters():
        if weight.ndim > 1:  # far from zero, so that attention looks somewhere
            torch.nn.init.normal_(weight, std=0.2)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes and the scheduler of Qwen-Image with two blocks of width 32; random weights."""
    where = tmp_path_factory.mktemp("tiny") / "qwen_image"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, -0.4],
            latents_std=[1.5, 0.8, 2.0, 1.2],
        )
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_image_seq_len=256,
                max_image_seq_len=8192,
                base_shift=0.5,
                max_shift=0.9,
                shift_terminal=0.02,
            ),
            vae=vae,
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            transformer=transformer,
        ).save_pretrained(where)
    return where


Build = Callable[..., QwenImageGenerator]


@pytest.fixture(scope="module")
def build(folder: Path) -> Build:
    def built(**options: Any) -> QwenImageGenerator:
        settings = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": LENGTH, "dtype": torch.float32, **options}
        return QwenImageGenerator.from_pretrained(folder, device="cpu", **settings)

    return built


@pytest.fixture(scope="module")
def generator(build: Build) -> QwenImageGenerator:
    return build()


def draw(pipeline: Any, guidance: float = GUIDANCE) -> Tensor:
    """The pipeline's own pictures, from its scheduler without the stretch at the end of the grid."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift_terminal=None)
    rng = torch.Generator().manual_seed(0)
    start = torch.stack([torch.randn(4, 1, 6, 10, generator=rng) for _ in PROMPTS])
    return pipeline(
        PROMPTS,
        negative_prompt=[" "] * len(PROMPTS),
        true_cfg_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        max_sequence_length=LENGTH,
        latents=QwenImagePipeline._pack_latents(start, len(PROMPTS), 4, 6, 10),
        output_type="pt",
    ).images[:, :, None]


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_pictures_are_those_of_the_diffusers_pipeline(folder: Path, build: Build, guidance: float) -> None:
    model = build(guidance_scale=guidance)
    theirs = draw(QwenImagePipeline.from_pretrained(folder), guidance)
    adapters.same_pictures(adapters.ode(model, PROMPTS, adapters.noise(model, 2), STEPS), theirs)


def test_both_halves_of_guidance_in_one_pass_are_two_passes(build: Build, generator: QwenImageGenerator) -> None:
    """The negative prompt is shorter than the prompts, so one pass pads what two do not."""
    two = build(guidance_in_one_pass=False)
    assert torch.allclose(adapters.velocity(two, PROMPTS), adapters.velocity(generator, PROMPTS), atol=1e-5)


def test_guidance_keeps_every_token_as_long_as_the_positive_one(generator: QwenImageGenerator) -> None:
    positive, negative = (adapters.noise(generator, 2, seed) for seed in (1, 2))
    guided = generator.blend(positive, negative)

    def lengths(velocity: Tensor) -> Tensor:
        return velocity.square().unfold(3, 2, 2).unfold(4, 2, 2).sum((1, 2, 5, 6)).sqrt()  # (N, rows, columns)

    assert torch.allclose(lengths(guided), lengths(positive), atol=1e-5)
    plain = negative + GUIDANCE * (positive - negative)
    ratio = guided / plain
    assert torch.allclose(ratio[..., 0::2, 0::2], ratio[..., 1::2, 1::2], atol=1e-5)  # one factor per token
    assert not torch.allclose(ratio[..., :2, :2], ratio[..., 2:4, :2], atol=1e-3)


def test_guidance_one_makes_one_pass(build: Build) -> None:
    calls = Counter[float]()
    for scale in (1.0, GUIDANCE):
        model = build(guidance_scale=scale, guidance_in_one_pass=False)
        model.network.register_forward_hook(lambda *_, scale=scale: calls.update([scale]))
        adapters.velocity(model, PROMPTS)
    assert calls == {1.0: 1, GUIDANCE: 2}


def test_one_at_a_time_equals_a_batch(generator: QwenImageGenerator) -> None:
    adapters.one_equals_many(generator, PROMPTS)


def test_a_row_is_padded_to_the_full_length_and_what_stands_in_the_padding_is_not_read(
    generator: QwenImageGenerator,
) -> None:
    rows = generator.encode(PROMPTS)
    assert rows.prompt_embeds.shape[:2] == (2, LENGTH)
    first, second = rows.words.tolist()
    assert second - first == len(PROMPTS[1]) - len(PROMPTS[0])  # one token per byte
    assert rows.prompt_embeds[0, first - 1].abs().sum() > 0 and rows.prompt_embeds[0, first:].abs().sum() == 0
    spoiled = rows.prompt_embeds.clone()
    spoiled[0, first:], spoiled[1, second:] = 9.0, 9.0
    z, sigma = adapters.noise(generator, 2), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        clean = generator.predict(z, sigma, rows)
        assert torch.allclose(generator.predict(z, sigma, replace(rows, prompt_embeds=spoiled)), clean, atol=1e-6)
        assert not torch.allclose(generator.predict(z, sigma, rows.take(torch.tensor([1, 0]))), clean, atol=1e-3)


def test_a_prompt_that_is_too_long_is_cut(build: Build) -> None:
    rows = build(max_sequence_length=160).encode(["a cat " * 20])
    assert rows.prompt_embeds.shape[1] == 160 == int(rows.words)


def test_a_cached_row_is_the_encoded_one_and_its_padding_is_not_stored(build: Build, tmp_path: Path) -> None:
    model = build()
    kept = model.keep_text(PROMPTS, folder=tmp_path)
    assert kept.counts.encoded == 3  # and the negative prompt
    rows = model.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = model.reader([prompt])
        assert torch.equal(rows.prompt_embeds[i : i + 1], alone.prompt_embeds)
        assert torch.equal(rows.words[i : i + 1], alone.words)
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    words = int(model.encode([*PROMPTS, " "]).words.sum())
    assert words * 32 * 4 < stored < words * 32 * 4 + 3 * 1024  # float32 numbers and three headers


def test_the_shift_is_the_published_line(build: Build) -> None:
    wide = build(height=192, width=512)  # 24 x 64 tokens of 8 pixels
    expected = 0.5 + (0.9 - 0.5) * (24 * 64 - 256) / (8192 - 256)
    assert wide.shift == pytest.approx(torch.tensor(expected).exp().item())


def test_replay_is_the_rollout_bit_for_bit(generator: QwenImageGenerator) -> None:
    adapters.replay_equals_rollout(generator, PROMPTS)


def test_a_hot_map_cell_moves_its_own_token_only(generator: QwenImageGenerator) -> None:
    adapters.hot_cell(generator, PROMPTS, (0, 3, 7), token=1 * 5 + 3)


def test_text_and_autoencoder_are_frozen(generator: QwenImageGenerator) -> None:
    adapters.text_is_frozen(generator)


ATTENTION = {f"transformer_blocks.attn.{name}" for name in (
    "to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
)}  # fmt: skip
BLOCKS = ATTENTION | {f"transformer_blocks.{name}" for name in (
    "img_mod", "txt_mod", "img_mlp.net.proj", "img_mlp.net", "txt_mlp.net.proj", "txt_mlp.net"
)}  # fmt: skip


@pytest.mark.parametrize(("targets", "layers"), [("attention", ATTENTION), ("blocks", BLOCKS)])
def test_a_lora_sits_on(build: Build, targets: str, layers: set[str]) -> None:
    adapters.lora_sits_on(build(), targets, layers)


def test_every_weight_of_a_lora_gets_a_gradient(build: Build) -> None:
    """Also in the last block, whose text leads nowhere."""
    model = build()
    policy = adapters.lora(model)
    z, sigma = adapters.noise(model, 2), torch.tensor([0.9, 0.4])
    model.velocity(z, sigma, model.encode(PROMPTS)).square().mean().backward()
    without = [name for name, p in policy.parameters.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_two_iterations_of_the_whole_loop_train_it(build: Build) -> None:
    adapters.trains_two_steps(build(), PROMPTS)


def test_gradient_checkpointing_changes_no_gradient(build: Build) -> None:
    adapters.checkpointing_same_gradient(build(), PROMPTS)


def test_a_lora_comes_back_through_plain_diffusers(build: Build, folder: Path, tmp_path: Path) -> None:
    adapters.lora_round_trip(build(), folder, tmp_path / "lora", draw)


def test_full_weights_come_back_through_plain_diffusers(build: Build, tmp_path: Path) -> None:
    adapters.full_round_trip(build(), tmp_path / "full", draw)


def test_bfloat16_is_close(build: Build, generator: QwenImageGenerator) -> None:
    adapters.bfloat16_is_close(generator, build(dtype=torch.bfloat16), PROMPTS)


def test_sizes_the_packing_cannot_hold_are_refused(build: Build) -> None:
    with pytest.raises(UserError, match=r"height=24 and width=44 must be multiples of 8 pixels .* Qwen-Image"):
        build(width=44)


def test_a_plan_counts_what_runs(build: Build, folder: Path, tmp_path: Path) -> None:
    prompt = "a cat " * 200  # as long as is taken
    options = {"negative_prompt": prompt, "max_sequence_length": LENGTH}
    section = {"path": str(folder), "height": HEIGHT, "width": WIDTH, "options": options}
    recipe = tiny.recipe(folder, tmp_path / "prompts.txt", generator=section)
    adapters.planned_as_it_runs(build(negative_prompt=prompt), prompt, recipe)


def test_the_catalogue_knows_it() -> None:
    assert adapter_of("QwenImagePipeline") == "qwen_image"
    assert factory("qwen_image") == QwenImageGenerator.from_pretrained


def test_prompts_that_are_cut_are_counted_with_what_stands_after_them(build: Build) -> None:
    model = build(max_sequence_length=250)
    adapters.counts_what_is_cut(
        model, lambda prompt: int(model.reader([prompt]).words[0]), reader="Qwen2.5-VL", word="x"
    )


def test_the_network_masks_text_as_the_adapter_says(
    generator: QwenImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters.masks_as_it_says(generator, PROMPTS, monkeypatch)
