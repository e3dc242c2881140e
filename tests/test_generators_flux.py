"""The FLUX adapter against its own diffusers pipeline, picture for picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

import adapters
import tiny
from vipo import sde
from vipo.errors import UserError
from vipo.generators import factory
from vipo.generators.common import pack_patches, unpack_patches
from vipo.generators.flux import FluxGenerator
from vipo.options import Solver
from vipo.rollout import sample_groups
from vipo.types import Prompt

PROMPTS = ["a cat", "a red car on a blue background"]
CHANNELS, STRIDE = 4, 4  # of the tiny autoencoder; FLUX.1's has 16 and 8
STEPS = 4

JOINT = {f"transformer_blocks.attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
ATTENTION = JOINT | {
    f"{blocks}.attn.{layer}"
    for blocks in ("transformer_blocks", "single_transformer_blocks")
    for layer in ("to_q", "to_k", "to_v")
}
ATTENTION |= {"transformer_blocks.attn.to_out"}


@pytest.fixture(scope="module")
def generator(model_folder: Path) -> FluxGenerator:
    return tiny.generator(model_folder)


@pytest.fixture
def pipeline(model_folder: Path) -> FluxPipeline:
    """A pipeline that the test may change."""
    return FluxPipeline.from_pretrained(model_folder)


def draw(pipeline: Any, *, height: int = tiny.HEIGHT, width: int = tiny.WIDTH, **options: Any) -> Tensor:
    """The pipeline's own pictures from :func:`adapters.noise`."""
    pipeline.set_progress_bar_config(disable=True)
    rows, columns = height // STRIDE, width // STRIDE
    rng = torch.Generator().manual_seed(0)
    start = torch.stack([torch.randn(CHANNELS, rows, columns, generator=rng) for _ in PROMPTS])
    packed = FluxPipeline._pack_latents(start, len(PROMPTS), CHANNELS, rows, columns)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.5, "output_type": "pt", **options}
    return pipeline(PROMPTS, height=height, width=width, max_sequence_length=16, latents=packed, **settings).images


def adapted(pipeline: Any, *, height: int = tiny.HEIGHT, width: int = tiny.WIDTH, **options: Any) -> FluxGenerator:
    given = {"height": height, "width": width, "max_sequence_length": 16, **options}
    return FluxGenerator(pipeline, **FluxGenerator.arguments(given))


def ours(generator: FluxGenerator) -> Tensor:
    return adapters.ode(generator, PROMPTS, adapters.noise(generator, len(PROMPTS)), STEPS)[:, :, 0]


def by_size(pipeline: Any) -> Any:
    """The scheduler of FLUX.1-dev: the shift depends on the size of the picture."""
    pipeline.scheduler.register_to_config(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return pipeline


def test_pictures_are_those_of_the_diffusers_pipeline(pipeline: FluxPipeline, generator: FluxGenerator) -> None:
    theirs = draw(pipeline)
    assert generator.shift == 3 and theirs.shape == (2, 3, tiny.HEIGHT, tiny.WIDTH)
    adapters.same_pictures(ours(generator), theirs)


@pytest.mark.parametrize("size", [(24, 40), (96, 48)])
def test_with_a_shift_by_size_the_pictures_are_the_pipelines(pipeline: FluxPipeline, size: tuple[int, int]) -> None:
    height, width = size
    model = adapted(by_size(pipeline), height=height, width=width)
    adapters.same_pictures(ours(model), draw(pipeline, height=height, width=width))


@pytest.mark.parametrize("size", [(512, 512), (720, 720), (1024, 1024), (768, 1344)])
def test_at_full_size_the_grid_is_the_one_the_pipeline_works_out(
    pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """``size`` is FLUX.1's; the tiny autoencoder's stride is half, so half the pixels make the same tokens."""
    height, width = size[0] // 2, size[1] // 2
    monkeypatch.setattr(pipeline.transformer, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    model = adapted(by_size(pipeline), height=height, width=width)
    draw(pipeline, height=height, width=width, output_type="latent")
    assert model.latent_shape()[2:] == (size[0] // 8, size[1] // 8)
    assert torch.allclose(sde.shifted_sigmas(STEPS, model.shift), pipeline.scheduler.sigmas, atol=1e-6)
    assert model.shift > 1.8  # 512 pixels and more


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_a_model_without_distilled_guidance_draws_the_pipelines_pictures(
    pipeline: FluxPipeline, guidance_scale: float
) -> None:
    """FLUX.1-schnell: no guidance, no shift."""
    config = {**pipeline.transformer.config, "guidance_embeds": False}
    pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(config))
    pipeline.scheduler.set_shift(1.0)
    pipeline.scheduler.register_to_config(shift=1.0)
    model = adapted(pipeline, guidance_scale=guidance_scale)
    assert model.shift == 1
    adapters.same_pictures(ours(model), draw(pipeline, guidance_scale=0.0))


def test_a_bfloat16_network_is_fed_what_the_pipeline_feeds_it(model_folder: Path) -> None:
    """Time, guidance and positions to the last bit; only the latents, which we keep in float32, may differ."""
    pipeline = FluxPipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    fed: list[dict[str, Tensor]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _module, _, given: fed.append(given), with_kwargs=True)
    draw(pipeline)
    theirs, model = fed[:], adapted(pipeline)
    fed.clear()
    ours(model)
    assert len(fed) == len(theirs) == STEPS
    for mine, other in zip(fed, theirs, strict=True):
        for name in ("timestep", "guidance", "img_ids", "txt_ids", "pooled_projections", "encoder_hidden_states"):
            assert torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype, name
        assert mine["hidden_states"].dtype == torch.bfloat16
    assert len({float(mine["timestep"][0]) for mine in fed}) == STEPS


def test_a_bfloat16_network_is_close(model_folder: Path, generator: FluxGenerator) -> None:
    pipeline = FluxPipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    adapters.bfloat16_is_close(generator, adapted(pipeline), PROMPTS)


def test_packing_is_diffusers_packing_and_loses_nothing(generator: FluxGenerator) -> None:
    latents = adapters.noise(generator, 2)
    tokens = pack_patches(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents[:, :, 0], 2, 4, 6, 10))
    assert torch.equal(unpack_patches(tokens, 6, 10), latents)


def test_one_at_a_time_equals_a_batch(generator: FluxGenerator) -> None:
    adapters.one_equals_many(generator, [*PROMPTS, "a sun"])


def test_a_hot_map_cell_asks_for_a_change_of_its_own_position_only(generator: FluxGenerator) -> None:
    """Through the packing: cell (3, 7) of 6 x 10 is in token (1, 3) of 3 x 5."""
    adapters.hot_cell(generator, PROMPTS, (0, 3, 7), token=1 * 5 + 3)


def test_gradient_checkpointing_changes_no_gradient(model_folder: Path) -> None:
    adapters.checkpointing_same_gradient(tiny.generator(model_folder), PROMPTS)


def test_lora_choices_are_the_layers_they_say(model_folder: Path) -> None:
    adapters.lora_sits_on(tiny.generator(model_folder), "attention", ATTENTION)
    model = tiny.generator(model_folder)
    linear = [name for name, module in model.network.named_modules() if isinstance(module, torch.nn.Linear)]
    blocks = {
        ".".join(part for part in name.split(".") if not part.isdigit())
        for name in linear
        if name.split(".")[0] in ("transformer_blocks", "single_transformer_blocks")
    }
    adapters.lora_sits_on(model, "blocks", blocks)


def test_guidance_reaches_the_network(pipeline: FluxPipeline, generator: FluxGenerator) -> None:
    other = adapted(pipeline, guidance_scale=1.0)
    assert not torch.allclose(adapters.velocity(other, PROMPTS), adapters.velocity(generator, PROMPTS))


def test_sizes_the_packing_cannot_hold_are_refused(pipeline: FluxPipeline) -> None:
    with pytest.raises(UserError, match="multiples of 8 pixels"):
        adapted(pipeline, width=44)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a diffusers pipeline; give a folder or hub id"):
        FluxGenerator.from_pretrained(tmp_path, device="cpu", dtype=torch.float32, height=24, width=40)


def test_an_unknown_generator_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'flux'"):
        factory("fluxx")


def test_everything_but_the_trained_weights_is_frozen(generator: FluxGenerator) -> None:
    assert len(generator.text_encoders) == 2
    adapters.text_is_frozen(generator)


def test_the_embedded_pipeline_samples_through_the_adapter() -> None:
    from vipo.embedded import path

    model = FluxGenerator.from_pretrained(path("emoji-flux"), device="cpu", dtype=torch.float32, height=64, width=64)
    solver = Solver(steps=2, shift=model.shift).deterministic()
    media = sample_groups(model, [Prompt("a cat on a teal background")], solver, group_size=2, seed=0).media
    assert media.shape == (2, 3, 1, 64, 64) and bool(media.isfinite().all()) and media.std() > 0.02


def test_prompts_that_t5_cuts_are_counted(generator: FluxGenerator) -> None:
    """CLIP would cut them too, but stands for the first 77 tokens by design."""
    adapters.counts_what_is_cut(
        generator, adapters.tokens_given(generator, "text_encoder_2", "tokenizer_2"), reader="T5"
    )
    assert [limit.reader for limit in generator.reader.limits()] == ["T5"]


def test_the_network_masks_text_as_the_adapter_says(generator: FluxGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.masks_as_it_says(generator, PROMPTS, monkeypatch)
