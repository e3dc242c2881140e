"""The FLUX adapter against its own diffusers pipeline, picture for picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import tiny
from vipo import objective, sde
from vipo.generators import factory
from vipo.generators.common import pack_patches, unpack_patches
from vipo.generators.flux import FluxGenerator
from vipo.rollout import Solver, sample_groups
from vipo.types import Prompt, UserError

SHAPE = (4, 1, 6, 10)
STEPS, GUIDANCE = 4, 3.5


@pytest.fixture(scope="module")
def generator(model_folder: Path) -> FluxGenerator:
    return tiny.generator(model_folder)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def ours(generator: FluxGenerator, prompts: list[str], start: torch.Tensor) -> torch.Tensor:
    """The adapter run through our own ODE."""
    conditioning = generator.encode(prompts)
    sigmas, z = sde.shifted_sigmas(STEPS, generator.shift), start
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            velocity = generator.velocity(z, now.expand(len(z)), conditioning)
            z = sde.transition(velocity, z, now, after, kind="ode", eta=0.0).mean
    return generator.decode(z)


def test_pictures_are_those_of_the_diffusers_pipeline(model_folder: Path, generator: FluxGenerator) -> None:
    prompts, start = ["a cat", "a red car on a blue background"], noise(2)
    pipeline = FluxPipeline.from_pretrained(model_folder)
    theirs = pipeline(
        prompts,
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=generator.max_sequence_length,
        latents=FluxPipeline._pack_latents(start[:, :, 0], 2, *SHAPE[:1], *SHAPE[2:]),
        output_type="pt",
    ).images
    mine = ours(generator, prompts, start)
    assert mine.shape == (2, 3, 1, tiny.HEIGHT, tiny.WIDTH)
    assert mine.std() > 0.05  # two grey pictures would agree too
    assert torch.allclose(mine[:, :, 0], theirs, atol=1e-4)


def test_packing_is_diffusers_packing_and_loses_nothing() -> None:
    latents = noise(2)
    tokens = pack_patches(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents[:, :, 0], 2, 4, 6, 10))
    assert torch.equal(unpack_patches(tokens, 6, 10), latents)


def test_one_at_a_time_equals_a_batch(generator: FluxGenerator) -> None:
    prompts = ["a cat", "a fox", "a sun"]
    together = ours(generator, prompts, noise(3))
    for i, prompt in enumerate(prompts):
        assert torch.allclose(ours(generator, [prompt], noise(3)[i : i + 1]), together[i : i + 1], atol=1e-4)


def test_decoding_in_parts_changes_nothing(generator: FluxGenerator) -> None:
    whole = generator.decode(noise(5))
    generator.decode_batch_size, before = 2, generator.decode_batch_size
    assert torch.allclose(generator.decode(noise(5)), whole, atol=1e-4)
    generator.decode_batch_size = before


def test_a_hot_map_cell_asks_for_a_change_of_its_own_position_only(generator: FluxGenerator) -> None:
    """Through the packing: the loss of a map with one hot cell depends on the velocity there and nowhere else."""
    z, conditioning = noise(2), generator.encode(["a cat", "a fox"])
    with torch.no_grad():
        velocity = generator.velocity(z, torch.full((2,), 0.8), conditioning)
    velocity.requires_grad_()
    step = sde.transition(velocity, z, 0.8, 0.6, kind="dance", eta=0.5)
    nexts = sde.sample(step, noise(2, seed=1)).detach()
    maps = torch.zeros(2, *SHAPE[1:])
    maps[:, 0, 3, 7] = 1.0
    log_prob = sde.log_prob(nexts, step)
    weight = objective.spatial_advantage(torch.tensor([1.0, -1.0]), maps)
    objective.clipped_surrogate(log_prob, log_prob.detach(), weight, clip_range=0.2).loss.backward()
    assert velocity.grad is not None
    asked = velocity.grad.abs().sum((0, 1, 2)) > 0
    assert asked.sum() == 1 and asked[3, 7]


def test_guidance_reaches_the_network(model_folder: Path, generator: FluxGenerator) -> None:
    other = FluxGenerator.from_pretrained(
        model_folder, device="cpu", dtype=torch.float32, height=24, width=40, guidance_scale=1.0
    )
    z, sigma, rows = noise(1), torch.tensor([0.7]), generator.encode(["a cat"])
    with torch.no_grad():
        assert not torch.allclose(other.velocity(z, sigma, rows), generator.velocity(z, sigma, rows))


def test_sizes_the_packing_cannot_hold_are_refused(model_folder: Path) -> None:
    with pytest.raises(UserError, match="multiples of 8 pixels"):
        FluxGenerator.from_pretrained(model_folder, device="cpu", dtype=torch.float32, height=24, width=44)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no FluxPipeline could be loaded"):
        FluxGenerator.from_pretrained(tmp_path, device="cpu", dtype=torch.float32, height=24, width=40)


def test_an_unknown_generator_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'flux'"):
        factory("fluxx")


def test_everything_but_the_trained_weights_is_frozen(generator: FluxGenerator) -> None:
    parts = (generator.pipeline.vae, generator.pipeline.text_encoder, generator.pipeline.text_encoder_2)
    assert not any(p.requires_grad for part in (*parts, generator.network) for p in part.parameters())


def test_the_embedded_pipeline_samples_through_the_adapter() -> None:
    from vipo.embedded import path

    model = FluxGenerator.from_pretrained(path("emoji-flux"), device="cpu", dtype=torch.float32, height=64, width=64)
    solver = Solver(steps=2, shift=model.shift).deterministic()
    media = sample_groups(model, [Prompt("a cat on a teal background")], solver, group_size=2, seed=0).media
    assert media.shape == (2, 3, 1, 64, 64) and bool(media.isfinite().all()) and media.std() > 0.02
