"""What all adapters share: guidance in one pass or two, the negative prompt, decoding in parts, the time shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import adapters
import tiny_sd3
from vipo.generators.common import network_time, pack_patches, shift_of, unpack_patches
from vipo.generators.sd3 import StableDiffusion3Generator
from vipo.types import Batched

PROMPTS = ["a cat", "a red car on a blue background", "a sun"]
GUIDANCE = 4.5


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> Any:
    return tiny_sd3.generator(tiny_sd3.save_pipeline(model_folder.parent / "sd3-shared", model_folder)).pipeline


def adapted(pipeline: Any, **options: Any) -> StableDiffusion3Generator:
    given = {"height": 24, "width": 40, "max_sequence_length": 16, "guidance_scale": GUIDANCE, **options}
    return StableDiffusion3Generator(pipeline, **StableDiffusion3Generator.arguments(given))


def rows_per_call(model: StableDiffusion3Generator) -> tuple[list[int], Tensor]:
    """How many samples each call of the network had for one velocity, and that velocity."""
    rows: list[int] = []
    hook = model.network.register_forward_pre_hook(
        lambda _module, _, given: rows.append(len(given["hidden_states"])), with_kwargs=True
    )
    velocity = adapters.velocity(model, PROMPTS)
    hook.remove()
    return rows, velocity


def test_guidance_takes_one_pass_of_both_halves_or_two_passes_and_gives_the_same(pipeline: Any) -> None:
    together, one = rows_per_call(adapted(pipeline))
    apart, two = rows_per_call(adapted(pipeline, guidance_in_one_pass=False))
    assert together == [6] and apart == [3, 3]
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("guidance_in_one_pass", [True, False])
def test_a_guided_velocity_leads_away_from_the_negative_prompt(pipeline: Any, guidance_in_one_pass: bool) -> None:
    plain = adapted(pipeline, guidance_scale=1.0)
    positive, z = adapters.velocity(plain, PROMPTS), adapters.noise(plain, len(PROMPTS), seed=3)
    with torch.no_grad():
        negative = plain.velocity(z, torch.full((3,), 0.7), plain.encode(["a blurry dog"] * 3))
    guided = adapted(pipeline, negative_prompt="a blurry dog", guidance_in_one_pass=guidance_in_one_pass)
    expected = negative + GUIDANCE * (positive - negative)
    assert torch.allclose(adapters.velocity(guided, PROMPTS), expected, atol=1e-5)
    assert not torch.allclose(expected, positive, atol=1e-3)


def test_guidance_one_is_a_single_pass_that_asks_for_no_negative_prompt(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(pipeline, guidance_scale=1.0, negative_prompt="a blurry dog")
    asked = recorded(model, monkeypatch)
    rows, _ = rows_per_call(model)
    assert rows == [3]
    assert asked == [PROMPTS]


def recorded(model: StableDiffusion3Generator, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of every call of the text encoders from now on."""
    asked: list[list[str]] = []
    read = model.reader.read

    def remembering(prompts: Sequence[str]) -> Batched:
        asked.append(list(prompts))
        return read(prompts)

    monkeypatch.setattr(model.reader, "read", remembering)
    return asked


def test_the_negative_prompt_is_encoded_once_and_through_the_cache_of_texts(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(pipeline, negative_prompt="a blurry dog")
    asked = recorded(model, monkeypatch)
    for _ in range(3):
        adapters.velocity(model, PROMPTS)
    assert asked.count(["a blurry dog"]) == 1 and asked.count(PROMPTS) == 3 and len(asked) == 4
    kept = adapted(pipeline, negative_prompt="a blurry dog")
    asked = recorded(kept, monkeypatch)
    kept.keep_text(PROMPTS)
    assert asked == [["a blurry dog"], *([prompt] for prompt in PROMPTS)]
    velocity = adapters.velocity(kept, PROMPTS)
    assert len(asked) == 4 and torch.allclose(velocity, adapters.velocity(model, PROMPTS), atol=1e-5)


def test_decoding_in_parts_changes_nothing(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole, parts = adapted(pipeline), adapted(pipeline, decode_batch_size=2)
    decode, latents = pipeline.vae.decode, adapters.noise(whole, 5)
    expected = whole.decode(latents)

    def counted(part: Tensor, **options: Any) -> Any:
        sizes.append(len(part))
        return decode(part, **options)

    monkeypatch.setattr(pipeline.vae, "decode", counted)
    adapters.same_pictures(parts.decode(latents), expected)
    assert sizes == [2, 2, 1]


def test_pictures_decode_with_channels_last_as_without_on_a_cpu(pipeline: Any) -> None:
    model = adapted(pipeline)
    weight = next(p for p in pipeline.vae.decoder.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    latents = adapters.noise(model, 2)
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    found = model.decode(latents)
    pipeline.vae.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(found, model.decode(latents), atol=1e-4, rtol=0)  # random weights


def test_media_are_float32_in_the_unit_interval(pipeline: Any) -> None:
    model = adapted(pipeline)
    media = model.decode(20 * adapters.noise(model, 2))
    assert media.shape == (2, 3, 1, 24, 40) and media.dtype == torch.float32
    assert media.min() == 0 and media.max() == 1


def test_an_autoencoder_without_a_shift_decodes(pipeline: Any) -> None:
    model, latents = adapted(pipeline), torch.zeros(1, 4, 1, 6, 10)
    before = pipeline.vae.config.shift_factor
    pipeline.vae.register_to_config(shift_factor=None)
    without = model.decode(latents)
    pipeline.vae.register_to_config(shift_factor=before)
    assert (model.decode(latents) - without).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "tokens", "mu", "shift"),
    [
        ({"shift": 3.0}, 4096, None, 3.0),
        ({"shift": 3.0}, 4096, 0.9, 3.0),  # a static shift is what it is
        ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, 256, None, math.exp(0.5)),
        ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, 4096, None, math.exp(1.15)),
        ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, 2176, None, math.exp(0.825)),
        ({"use_dynamic_shifting": True}, 256, 0.9, math.exp(0.9)),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 256, 2.0, 2.0),
    ],
)
def test_the_shift_of_a_scheduler(settings: dict[str, Any], tokens: int, mu: float | None, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    assert shift_of(scheduler, tokens, mu=mu) == pytest.approx(shift)


def test_the_time_is_rounded_where_the_pipelines_round_it() -> None:
    sigma = torch.tensor([1.0, 0.998, 0.951, 0.0])
    assert torch.allclose(network_time(sigma, torch.float32), sigma, atol=1e-7)
    rounded = network_time(sigma, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert rounded.tolist() == [1.0, 1.0, 0.953125, 0.0]  # sigma itself would round to 0.99609375 and 0.94921875


def test_packing_takes_patches_of_any_side() -> None:
    latents = torch.arange(2 * 3 * 6 * 9).float().reshape(2, 3, 1, 6, 9)
    tokens = pack_patches(latents, side=3)
    assert tokens.shape == (2, 6, 27)
    assert tokens[1, 4].reshape(3, 3, 3).equal(latents[1, :, 0, 3:6, 3:6])  # row 1, column 1 of 2 x 3, as (c, dy, dx)
    assert torch.equal(unpack_patches(tokens, 6, 9, side=3), latents)
