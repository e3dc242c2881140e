"""The Z-Image adapter against its own diffusers pipeline, picture for picture, on random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

import adapters
import tiny
from vipo.embedded import path as embedded_path
from vipo.errors import UserError
from vipo.generators import adapter_of, factory
from vipo.generators.z_image import ZImageGenerator

HEIGHT, WIDTH = 24, 40  # latents 6 x 10, tokens 3 x 5
STEPS, GUIDANCE, SHIFT = 3, 2.5, 3.0
PROMPTS = ["a cat", "a red car and " * 3 + "a heart on a blue background"]  # on two sides of 32 tokens
LENGTH = 64
CHAT = (
    "{% for message in messages %}a {{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}above a star{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The classes of Z-Image with one refiner of each kind and two layers of width 32; random weights."""
    where = tmp_path_factory.mktemp("tiny") / "z_image"
    tokenizer = AutoTokenizer.from_pretrained(embedded_path("emoji-flux") / "tokenizer_2")
    tokenizer.chat_template = CHAT
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 32, 32],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.2,
        )
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKL.from_pretrained(model_folder, subfolder="vae"),
            text_encoder=Qwen3Model(config),
            tokenizer=tokenizer,
            transformer=transformer,
        ).save_pretrained(where)
    return where


Build = Callable[..., ZImageGenerator]


@pytest.fixture(scope="module")
def build(folder: Path) -> Build:
    def built(**options: Any) -> ZImageGenerator:
        settings = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": LENGTH, "dtype": torch.float32, **options}
        return ZImageGenerator.from_pretrained(folder, device="cpu", **{"guidance_scale": GUIDANCE, **settings})

    return built


@pytest.fixture(scope="module")
def generator(build: Build) -> ZImageGenerator:
    return build()


def draw(pipeline: Any, guidance: float = GUIDANCE) -> Tensor:
    """The pipeline's own pictures."""
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    return pipeline(
        list(PROMPTS),  # it writes into its list
        guidance_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        max_sequence_length=LENGTH,
        latents=torch.cat([torch.randn(4, 1, 6, 10, generator=rng).transpose(0, 1) for _ in PROMPTS]),
        output_type="pt",
    ).images[:, :, None]


@pytest.mark.parametrize("guidance", [GUIDANCE, 0.5, 0.0])
def test_pictures_are_those_of_the_diffusers_pipeline(folder: Path, build: Build, guidance: float) -> None:
    """Also below 1: here guidance counts from the positive velocity on, and only 0 is off."""
    model = build(guidance_scale=guidance)
    theirs = draw(ZImagePipeline.from_pretrained(folder), guidance)
    adapters.same_pictures(adapters.ode(model, PROMPTS, adapters.noise(model, 2), STEPS), theirs)


def test_guidance_zero_makes_one_pass(build: Build) -> None:
    calls = Counter[float]()
    for scale in (0.0, 0.5):
        model = build(guidance_scale=scale, guidance_in_one_pass=False)
        model.network.register_forward_hook(lambda *_, scale=scale: calls.update([scale]))
        adapters.velocity(model, PROMPTS)
    assert calls == {0.0: 1, 0.5: 2}


def test_both_halves_of_guidance_in_one_pass_are_two_passes(build: Build, generator: ZImageGenerator) -> None:
    two = build(guidance_in_one_pass=False)
    assert torch.allclose(adapters.velocity(two, PROMPTS), adapters.velocity(generator, PROMPTS), atol=1e-5)


def test_one_at_a_time_equals_a_batch(generator: ZImageGenerator) -> None:
    adapters.one_equals_many(generator, PROMPTS)


def test_a_row_is_padded_to_the_full_length_and_what_stands_in_the_padding_is_not_read(
    generator: ZImageGenerator,
) -> None:
    rows = generator.encode(PROMPTS)
    assert rows.prompt_embeds.shape[:2] == (2, LENGTH)
    first, second = rows.words.tolist()
    assert first < 32 < second < LENGTH
    assert rows.prompt_embeds[0, first - 1].abs().sum() > 0 and rows.prompt_embeds[0, first:].abs().sum() == 0
    spoiled = rows.prompt_embeds.clone()
    spoiled[0, first:], spoiled[1, second:] = 9.0, 9.0
    z, sigma = adapters.noise(generator, 2), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        clean = generator.predict(z, sigma, rows)
        assert torch.equal(generator.predict(z, sigma, replace(rows, prompt_embeds=spoiled)), clean)
        assert not torch.allclose(generator.predict(z, sigma, rows.take(torch.tensor([1, 0]))), clean, atol=1e-3)


def test_a_prompt_that_is_too_long_is_cut(build: Build) -> None:
    rows = build(max_sequence_length=20).encode(["a cat " * 20])
    assert rows.prompt_embeds.shape[1] == 20 == int(rows.words)


def test_the_shift_is_the_scheduler_s(generator: ZImageGenerator) -> None:
    assert generator.shift == SHIFT


def test_replay_is_the_rollout_bit_for_bit(generator: ZImageGenerator) -> None:
    adapters.replay_equals_rollout(generator, PROMPTS)


def test_a_hot_map_cell_moves_its_own_position_only(generator: ZImageGenerator) -> None:
    adapters.hot_cell(generator, PROMPTS, (0, 3, 7))


def test_text_and_autoencoder_are_frozen(generator: ZImageGenerator) -> None:
    adapters.text_is_frozen(generator)


KINDS = ("noise_refiner", "context_refiner", "layers")
ATTENTION = {f"{kind}.attention.{name}" for kind in KINDS for name in ("to_q", "to_k", "to_v", "to_out")}
FORWARD = {f"{kind}.feed_forward.{name}" for kind in KINDS for name in ("w1", "w2", "w3")}
MODULATION = {f"{kind}.adaLN_modulation" for kind in ("noise_refiner", "layers")}  # the text is not told the time
BLOCKS = ATTENTION | FORWARD | MODULATION


@pytest.mark.parametrize(("targets", "layers"), [("attention", ATTENTION), ("blocks", BLOCKS)])
def test_a_lora_sits_on(build: Build, targets: str, layers: set[str]) -> None:
    adapters.lora_sits_on(build(), targets, layers)


def test_two_iterations_of_the_whole_loop_train_it(build: Build) -> None:
    adapters.trains_two_steps(build(), PROMPTS)


def test_gradient_checkpointing_changes_no_gradient(build: Build) -> None:
    adapters.checkpointing_same_gradient(build(), PROMPTS)


def test_a_lora_comes_back_through_plain_diffusers(build: Build, folder: Path, tmp_path: Path) -> None:
    adapters.lora_round_trip(build(), folder, tmp_path / "lora", draw)


def test_full_weights_come_back_through_plain_diffusers(build: Build, tmp_path: Path) -> None:
    adapters.full_round_trip(build(), tmp_path / "full", draw)


def test_bfloat16_is_close(build: Build, generator: ZImageGenerator) -> None:
    adapters.bfloat16_is_close(generator, build(dtype=torch.bfloat16), PROMPTS)


def test_sizes_the_patches_cannot_hold_are_refused(build: Build) -> None:
    with pytest.raises(UserError, match=r"height=24 and width=44 must be multiples of 8 pixels .* Z-Image"):
        build(width=44)


def test_a_plan_counts_what_runs(build: Build, folder: Path, tmp_path: Path) -> None:
    prompt = "a cat " * 200  # as long as is taken
    options = {"negative_prompt": prompt, "max_sequence_length": LENGTH}
    section = {"path": str(folder), "height": HEIGHT, "width": WIDTH, "options": options}
    recipe = tiny.recipe(folder, tmp_path / "prompts.txt", generator=section)
    adapters.planned_as_it_runs(build(negative_prompt=prompt), prompt, recipe)


def test_the_catalogue_knows_it() -> None:
    assert adapter_of("ZImagePipeline") == "z_image"
    assert factory("z_image") == ZImageGenerator.from_pretrained


def test_prompts_that_are_cut_are_counted_with_their_chat_template(generator: ZImageGenerator) -> None:
    adapters.counts_what_is_cut(generator, lambda prompt: int(generator.reader([prompt]).words[0]), reader="Qwen3")
    (limit,) = generator.reader.limits()
    bare = len(generator.pipeline.tokenizer("a cat").input_ids)
    assert limit.tokens(["a cat"])[0] > bare


def test_the_network_masks_text_as_the_adapter_says(
    generator: ZImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters.masks_as_it_says(generator, PROMPTS, monkeypatch)
