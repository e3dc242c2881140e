"""The Stable Diffusion 3 adapter against its own diffusers pipeline, picture for picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

import adapters
import tiny
import tiny_sd3
from vipo.errors import UserError
from vipo.generators.sd3 import StableDiffusion3Generator
from vipo.generators.settings import AdapterOptions, Guidance

PROMPTS = ["a cat", "a red car on a blue background"]
STEPS, GUIDANCE = 3, 4.5
OPTIONS = AdapterOptions(Guidance(GUIDANCE), max_sequence_length=16)

ATTENTION = {
    f"transformer_blocks.attn{second}.{layer}" for second in ("", "2") for layer in ("to_q", "to_k", "to_v", "to_out")
} | {f"transformer_blocks.attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}


@pytest.fixture(scope="module")
def folder(model_folder: Path) -> Path:
    return tiny_sd3.save_pipeline(model_folder.parent / "sd3", model_folder)


@pytest.fixture(scope="module")
def generator(folder: Path) -> StableDiffusion3Generator:
    return tiny_sd3.generator(folder)


@pytest.fixture
def own(folder: Path) -> StableDiffusion3Generator:
    """A model that the test may change."""
    return tiny_sd3.generator(folder)


def draw(pipeline: Any, **options: Any) -> Tensor:
    """The pipeline's own pictures from :func:`adapters.noise`."""
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    start = torch.stack([torch.randn(4, *tiny_sd3.GRID, generator=rng) for _ in PROMPTS])
    settings = {"guidance_scale": GUIDANCE, "max_sequence_length": 16, "output_type": "pt", **options}
    sigmas = np.linspace(1, 1 / STEPS, STEPS)  # before the scheduler's own shift
    return pipeline(PROMPTS, height=tiny.HEIGHT, width=tiny.WIDTH, sigmas=sigmas, latents=start, **settings).images


def ours(generator: StableDiffusion3Generator) -> Tensor:
    return adapters.ode(generator, PROMPTS, adapters.noise(generator, len(PROMPTS)), STEPS)[:, :, 0]


def test_pictures_are_those_of_the_diffusers_pipeline(folder: Path, generator: StableDiffusion3Generator) -> None:
    theirs = draw(StableDiffusion3Pipeline.from_pretrained(folder))
    assert theirs.shape == (2, 3, tiny.HEIGHT, tiny.WIDTH)
    adapters.same_pictures(ours(generator), theirs)


def test_the_negative_prompt_is_the_pipelines(folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    theirs = draw(pipeline, negative_prompt="a blurry dog")
    adapters.same_pictures(ours(tiny_sd3.generator(folder, negative_prompt="a blurry dog")), theirs)
    assert (theirs - draw(pipeline)).abs().max() > 1e-3


def test_without_guidance_the_pictures_are_the_pipelines(folder: Path) -> None:
    theirs = draw(StableDiffusion3Pipeline.from_pretrained(folder), guidance_scale=1.0)
    adapters.same_pictures(ours(tiny_sd3.generator(folder, guidance_scale=1.0)), theirs)


def test_a_scheduler_that_shifts_by_size_shifts_as_the_pipeline_does(folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.scheduler.register_to_config(use_dynamic_shifting=True)
    model = StableDiffusion3Generator(pipeline, height=24, width=40, options=OPTIONS)
    assert 1 < model.shift < 2  # few tokens, little shift; not the static 3
    adapters.same_pictures(ours(model), draw(pipeline))


def test_the_t5_encoder_may_be_left_out(folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    model = StableDiffusion3Generator(pipeline, height=24, width=40, options=OPTIONS)
    assert len(model.text_encoders) == 2
    adapters.text_is_frozen(model)
    adapters.same_pictures(ours(model), draw(pipeline))


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_missing_clip_encoder_is_told_when_text_is_encoded(folder: Path, name: str) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **{name: None})
    model = StableDiffusion3Generator(pipeline, height=24, width=40)
    assert len(model.text_encoders) == 2
    with pytest.raises(UserError, match=rf"has no {name}; only text_encoder_3 \(T5\) may be left out"):
        model.encode(["a cat"])


def test_one_at_a_time_equals_a_batch(generator: StableDiffusion3Generator) -> None:
    adapters.one_equals_many(generator, [*PROMPTS, "a sun"])


def test_replay_gives_the_recorded_log_prob(generator: StableDiffusion3Generator) -> None:
    adapters.replay_equals_rollout(generator, PROMPTS)


def test_a_hot_map_cell_asks_for_a_change_of_its_own_position_only(generator: StableDiffusion3Generator) -> None:
    adapters.hot_cell(generator, PROMPTS, (0, 3, 7))


def test_gradient_checkpointing_changes_no_gradient(own: StableDiffusion3Generator) -> None:
    adapters.checkpointing_same_gradient(own, PROMPTS)


def test_lora_on_attention_includes_the_second_attention(own: StableDiffusion3Generator) -> None:
    adapters.lora_sits_on(own, "attention", ATTENTION)


def test_lora_on_blocks_is_every_linear_layer_of_them(own: StableDiffusion3Generator) -> None:
    linear = [name for name, module in own.network.named_modules() if isinstance(module, torch.nn.Linear)]
    blocks = {
        ".".join(part for part in name.split(".") if not part.isdigit())
        for name in linear
        if name.startswith("transformer_blocks.")
    }
    adapters.lora_sits_on(own, "blocks", blocks)


@pytest.mark.parametrize("targets", ["attention", "blocks"])
def test_plain_diffusers_loads_an_exported_lora(
    own: StableDiffusion3Generator, folder: Path, tmp_path: Path, targets: str
) -> None:
    adapters.lora_round_trip(own, folder, tmp_path, draw, targets=targets, rank=2, alpha=8.0)


def test_plain_diffusers_loads_exported_weights(own: StableDiffusion3Generator, tmp_path: Path) -> None:
    adapters.full_round_trip(own, tmp_path, draw)


def test_everything_but_the_trained_weights_is_frozen(generator: StableDiffusion3Generator) -> None:
    assert len(generator.text_encoders) == 3
    adapters.text_is_frozen(generator)


def test_a_bfloat16_network_is_close(folder: Path, generator: StableDiffusion3Generator) -> None:
    adapters.bfloat16_is_close(generator, tiny_sd3.generator(folder, dtype=torch.bfloat16), PROMPTS)


def test_sizes_that_fill_no_whole_patch_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="height=24 and width=44 must be multiples of 8 pixels"):
        tiny_sd3.generator(folder, width=44)


def test_sizes_beyond_the_position_embedding_are_refused(folder: Path) -> None:
    tiny_sd3.generator(folder, height=tiny_sd3.MAX_PIXELS)
    with pytest.raises(UserError, match="ask for at most 64 pixels a side"):
        tiny_sd3.generator(folder, height=tiny_sd3.MAX_PIXELS + 8)


@pytest.mark.parametrize(
    ("reader", "parts", "length"),
    [("CLIP", ("text_encoder", "tokenizer"), 32), ("T5", ("text_encoder_3", "tokenizer_3"), 12)],
)
def test_prompts_that_an_encoder_cuts_are_counted(
    folder: Path, reader: str, parts: tuple[str, str], length: int
) -> None:
    """T5 may read more of a prompt than the CLIPs do, or less."""
    model = tiny_sd3.generator(folder, max_sequence_length=length, guidance_scale=1.0)
    adapters.counts_what_is_cut(model, adapters.tokens_given(model, *parts), reader=reader)
    long = "cat " * 40
    assert [told.split(" reads")[0].split()[-1] for told in model.cut_prompts(some=[long])] == ["CLIP", "T5"]
    model.pipeline.text_encoder_3 = None
    assert [limit.reader for limit in model.reader.limits()] == ["CLIP"]


def test_a_negative_prompt_that_is_cut_is_told_where_it_is_used(folder: Path) -> None:
    model = tiny_sd3.generator(folder, negative_prompt="cat " * 40)
    assert [told[:30] for told in model.cut_prompts(some=["a cat"])] == ["1 of 1 negative prompts longer"] * 2
    model = tiny_sd3.generator(folder, negative_prompt="cat " * 40, guidance_scale=1.0)
    assert model.cut_prompts(some=["a cat"]) == []
