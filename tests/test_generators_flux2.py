"""The FLUX.2 klein adapter against its own diffusers pipeline, picture for picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import adapters
import tiny
from vipo import sde
from vipo.errors import UserError
from vipo.generators.flux2 import Flux2KleinGenerator

PROMPTS = ["a cat", "a red car on a blue background"]
STEPS, GUIDANCE = 3, 4.0

ATTENTION = {
    f"transformer_blocks.attn.{layer}"
    for layer in ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
} | {"single_transformer_blocks.attn.to_qkv_mlp_proj", "single_transformer_blocks.attn.to_out"}
FEED_FORWARD = {f"transformer_blocks.{part}.linear_{way}" for part in ("ff", "ff_context") for way in ("in", "out")}


def save_pipeline(folder: Path, flux: Path) -> Path:
    """One double and one single block of width 32; the tokenizer is that of the tiny FLUX in ``flux``."""
    tokenizer = AutoTokenizer.from_pretrained(flux / "tokenizer_2")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            mid_block_add_attention=False,
            batch_norm_eps=0.1,  # large enough to be missed
        )
        qwen = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=142,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=27,  # the pipeline reads layers 9, 18 and 27
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=4,
                max_position_embeddings=64,
            )
        )
        with torch.no_grad():
            vae.decoder.conv_out.weight.mul_(20)  # random decoders are grey: spread the pictures over [0, 1]
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 2)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(model_folder: Path) -> Path:
    return save_pipeline(model_folder.parent / "flux2", model_folder)


@pytest.fixture
def pipeline(folder: Path) -> Flux2KleinPipeline:
    """A pipeline that the test may change."""
    return Flux2KleinPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Flux2KleinGenerator:
    return adapted(Flux2KleinPipeline.from_pretrained(folder))


def adapted(pipeline: Any, *, height: int = tiny.HEIGHT, width: int = tiny.WIDTH, **options: Any) -> Any:
    given = {"height": height, "width": width, "max_sequence_length": 16, "shift_steps": STEPS, **options}
    return Flux2KleinGenerator(pipeline, **Flux2KleinGenerator.arguments(given))


def draw(pipeline: Any, *, height: int = tiny.HEIGHT, width: int = tiny.WIDTH, **options: Any) -> Tensor:
    """The pipeline's own pictures from :func:`adapters.noise`."""
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    start = torch.stack([torch.randn(4, height // 4, width // 4, generator=rng) for _ in PROMPTS])
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt", **options}
    latents = Flux2KleinPipeline._patchify_latents(start)
    return pipeline(
        prompt=PROMPTS, height=height, width=width, max_sequence_length=16, latents=latents, **settings
    ).images


def ours(generator: Flux2KleinGenerator) -> Tensor:
    return adapters.ode(generator, PROMPTS, adapters.noise(generator, len(PROMPTS)), STEPS)[:, :, 0]


def test_pictures_of_a_base_model_are_those_of_the_diffusers_pipeline(
    pipeline: Flux2KleinPipeline, generator: Flux2KleinGenerator
) -> None:
    theirs = draw(pipeline)
    assert generator.is_guided and theirs.shape == (2, 3, tiny.HEIGHT, tiny.WIDTH)
    assert generator.latent_shape() == (4, 1, 6, 10)  # one position per cell of the autoencoder, four per token
    adapters.same_pictures(ours(generator), theirs)
    assert (theirs - draw(pipeline, guidance_scale=1.0)).abs().max() > 1e-3


def test_a_distilled_model_draws_the_pipelines_pictures_and_takes_no_guidance(pipeline: Flux2KleinPipeline) -> None:
    pipeline.register_to_config(is_distilled=True)
    model = adapted(pipeline)
    assert not model.is_guided
    adapters.same_pictures(ours(model), draw(pipeline))


@pytest.mark.parametrize("steps", [4, 8, 50])
@pytest.mark.parametrize("size", [(256, 256), (512, 672)])  # 1024 and 5376 tokens
def test_the_grid_is_the_one_the_pipeline_works_out(
    pipeline: Flux2KleinPipeline, monkeypatch: pytest.MonkeyPatch, steps: int, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(pipeline.transformer, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    height, width = size
    draw(pipeline, height=height, width=width, num_inference_steps=steps, guidance_scale=1.0, output_type="latent")
    shift = adapted(pipeline, height=height, width=width, shift_steps=steps).shift
    assert torch.allclose(sde.shifted_sigmas(steps, shift), pipeline.scheduler.sigmas, atol=1e-6)


def test_without_a_number_the_shift_is_for_the_steps_of_its_kind(pipeline: Flux2KleinPipeline) -> None:
    base = adapted(pipeline, shift_steps=None).shift
    assert base == adapted(pipeline, shift_steps=50).shift
    pipeline.register_to_config(is_distilled=True)
    distilled = adapted(pipeline, shift_steps=None).shift
    assert distilled == adapted(pipeline, shift_steps=4).shift > base


def test_one_at_a_time_equals_a_batch(generator: Flux2KleinGenerator) -> None:
    adapters.one_equals_many(generator, [*PROMPTS, "a sun"])


def test_replay_gives_the_recorded_log_prob(generator: Flux2KleinGenerator) -> None:
    adapters.replay_equals_rollout(generator, PROMPTS)


def test_a_hot_map_cell_asks_for_a_change_of_its_own_position_only(generator: Flux2KleinGenerator) -> None:
    """Through the packing: cell (3, 7) of 6 x 10 is in token (1, 3) of 3 x 5."""
    adapters.hot_cell(generator, PROMPTS, (0, 3, 7), token=1 * 5 + 3)


def test_two_iterations_of_the_whole_loop_train_it(pipeline: Flux2KleinPipeline) -> None:
    adapters.trains_two_steps(adapted(pipeline), PROMPTS)


def test_gradient_checkpointing_changes_no_gradient(pipeline: Flux2KleinPipeline) -> None:
    adapters.checkpointing_same_gradient(adapted(pipeline), PROMPTS)


@pytest.mark.parametrize(("targets", "layers"), [("attention", ATTENTION), ("blocks", ATTENTION | FEED_FORWARD)])
def test_lora_choices_are_the_layers_they_say(pipeline: Flux2KleinPipeline, targets: str, layers: set[str]) -> None:
    adapters.lora_sits_on(adapted(pipeline), targets, layers)


def test_plain_diffusers_loads_an_exported_lora(pipeline: Flux2KleinPipeline, folder: Path, tmp_path: Path) -> None:
    adapters.lora_round_trip(adapted(pipeline), folder, tmp_path, draw, rank=2, alpha=8.0)


def test_plain_diffusers_loads_exported_weights(pipeline: Flux2KleinPipeline, tmp_path: Path) -> None:
    adapters.full_round_trip(adapted(pipeline), tmp_path, draw)


def test_everything_but_the_trained_weights_is_frozen(generator: Flux2KleinGenerator) -> None:
    adapters.text_is_frozen(generator)


def test_a_bfloat16_network_is_close(folder: Path, generator: Flux2KleinGenerator) -> None:
    rounded = adapted(Flux2KleinPipeline.from_pretrained(folder, dtype=torch.bfloat16))
    adapters.bfloat16_is_close(generator, rounded, PROMPTS, tolerance=0.1)


def test_sizes_the_packing_cannot_hold_are_refused(pipeline: Flux2KleinPipeline) -> None:
    with pytest.raises(UserError, match=r"height=24 and width=44 must be multiples of 8 pixels for this FLUX\.2 model"):
        adapted(pipeline, width=44)


def test_prompts_that_are_cut_are_counted(generator: Flux2KleinGenerator) -> None:
    adapters.counts_what_is_cut(
        generator, adapters.tokens_given(generator, "text_encoder", "tokenizer"), reader="Qwen3"
    )


def test_the_network_masks_text_as_the_adapter_says(
    generator: Flux2KleinGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters.masks_as_it_says(generator, PROMPTS, monkeypatch)
