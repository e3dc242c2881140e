"""The Wan adapter against its own diffusers pipeline, picture for picture, as Wan2.1 and as Wan2.2-TI2V-5B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from torch import Tensor

import adapters
import tiny_wan
from tiny_wan import Kind
from vipo import sde
from vipo.errors import UserError
from vipo.generators import factory, makes_video, options
from vipo.generators.wan import WanGenerator
from vipo.structuring import align_frames

PROMPTS = ["a cat", "a red car on a blue background"]
GUIDANCE, STEPS = 3.0, 4
KINDS: list[Kind] = ["2.1", "2.2-5B"]
LAYERS = {f"blocks.{part}.{layer}" for part in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out")}

Build = Callable[..., WanGenerator]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("wan") / kind, kind)


@pytest.fixture
def build(folder: Path, kind: Kind) -> Build:
    return lambda **options: tiny_wan.generator(folder, kind, **{"guidance_scale": GUIDANCE, **options})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan2.1 alone, for what does not depend on the kind."""
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("wan") / "small")


def drawing(generator: WanGenerator, start: Tensor, **options: Any) -> Callable[[WanPipeline], Tensor]:
    """Our prompts through a plain pipeline with its own loop, on our sigma grid: (N, 3, F, Y, X)."""
    _, latent_frames, height, width = generator.latent_shape()
    stride = generator.pipeline.vae_scale_factor_spatial

    def draw(pipeline: WanPipeline) -> Tensor:
        shipped, pipeline.scheduler = pipeline.scheduler, tiny_wan.Euler(shift=generator.shift)
        pipeline.set_progress_bar_config(disable=True)
        clips = pipeline(
            PROMPTS,
            height=height * stride,
            width=width * stride,
            num_frames=4 * (latent_frames - 1) + 1,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=generator.reader.max_sequence_length,
            latents=start,
            output_type="pt",
            **options,
        ).frames
        pipeline.scheduler = shipped  # it may be exported next
        return clips.movedim(2, 1)

    return draw


@pytest.mark.parametrize("frames", [1, 9])
def test_clips_are_those_of_the_diffusers_pipeline(build: Build, folder: Path, frames: int) -> None:
    model = build(frames=frames)
    start = adapters.noise(model, 2)
    mine = adapters.ode(model, PROMPTS, start, STEPS)
    assert mine.shape[2] == frames
    adapters.same_pictures(mine, drawing(model, start)(WanPipeline.from_pretrained(folder)))


def test_a_negative_prompt_is_the_pipelines(small: Path) -> None:
    model = tiny_wan.generator(small, guidance_scale=GUIDANCE, negative_prompt="a sun")
    start = adapters.noise(model, 2)
    mine, pipeline = adapters.ode(model, PROMPTS, start, STEPS), WanPipeline.from_pretrained(small)
    adapters.same_pictures(mine, drawing(model, start, negative_prompt="a sun")(pipeline))
    assert (mine - drawing(model, start)(pipeline)).abs().max() > 0.01


def test_one_pass_of_guidance_is_two(build: Build) -> None:
    both = build(guidance_in_one_pass=True)
    assert torch.allclose(adapters.velocity(both, PROMPTS), adapters.velocity(build(), PROMPTS), atol=1e-5)


def test_a_sample_alone_is_the_sample_in_a_batch(build: Build) -> None:
    adapters.one_equals_many(build(), PROMPTS)


def test_replay_is_the_rollout_bit_for_bit(build: Build) -> None:
    adapters.replay_equals_rollout(build(), PROMPTS)


def test_a_hot_map_cell_asks_for_a_change_of_its_own_position_only(build: Build) -> None:
    adapters.hot_cell(build(), PROMPTS, (1, 2, 5))


def test_a_position_belongs_to_one_token(build: Build) -> None:
    """Tokens are rows of 1 x 2 x 2 positions, in the order (t, h, w): position (1, 2, 5) is in token (1, 1, 2)."""
    model, made = build(guidance_scale=1.0), list[Tensor]()
    network: Any = model.network
    hook = network.proj_out.register_forward_hook(lambda *call: made.append(call[-1].requires_grad_()) or made[-1])
    velocity = model.velocity(adapters.noise(model, 1), torch.tensor([0.8]), model.encode(PROMPTS[:1]))
    hook.remove()
    (gradient,) = torch.autograd.grad(velocity[:, :, 1, 2, 5].sum(), made)
    rows, columns = (size // 2 for size in tiny_wan.shape()[2:])
    asked = gradient[0].abs().sum(-1).nonzero().squeeze(1).tolist()
    assert gradient.shape[1] == 2 * rows * columns and asked == [1 * rows * columns + 1 * columns + 2]


def test_checkpointing_changes_no_gradient(build: Build) -> None:
    adapters.checkpointing_same_gradient(build(), PROMPTS)


def test_an_exported_lora_draws_the_same_in_plain_diffusers(build: Build, folder: Path, tmp_path: Path) -> None:
    model = build()
    draw = drawing(model, adapters.noise(model, 2))
    adapters.lora_round_trip(model, folder, tmp_path, draw, rank=4, alpha=8.0)


def test_exported_weights_draw_the_same_in_plain_diffusers(build: Build, tmp_path: Path) -> None:
    model = build()
    adapters.full_round_trip(model, tmp_path, drawing(model, adapters.noise(model, 2)))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("attention", LAYERS), ("blocks", LAYERS | {"blocks.ffn.net.proj", "blocks.ffn.net"})],
)
def test_a_lora_sits_on_the_named_layers(small: Path, targets: str, layers: set[str]) -> None:
    adapters.lora_sits_on(tiny_wan.generator(small), targets, layers)


def test_nothing_is_trained_unasked(build: Build) -> None:
    adapters.text_is_frozen(build())


def test_bfloat16_is_close_and_keeps_its_time_and_norms_exact(build: Build) -> None:
    rounded = build(dtype=torch.bfloat16)
    adapters.bfloat16_is_close(build(), rounded, PROMPTS)
    exact = {name for name, weight in rounded.network.named_parameters() if weight.dtype == torch.float32}
    assert {"scale_shift_table", "blocks.0.norm2.weight", "condition_embedder.time_embedder.linear_1.weight"} <= exact
    assert not any(".attn" in name or ".ffn" in name for name in exact)


def test_bfloat16_tells_neighbouring_times_apart(small: Path) -> None:
    """Steps 0.001 apart would be one time if it were rounded to bfloat16 before it reaches the network."""
    model = tiny_wan.generator(small, dtype=torch.bfloat16)
    seen: list[Tensor] = []
    hook = model.network.register_forward_pre_hook(lambda *call: seen.append(call[-1]["timestep"]), with_kwargs=True)
    adapters.velocity(model, PROMPTS, 0.901)
    adapters.velocity(model, PROMPTS, 0.902)
    hook.remove()
    assert torch.allclose(torch.stack(seen).unique(), torch.tensor([901.0, 902.0]))


def test_a_lora_trains_on_a_bfloat16_network_without_autocast(small: Path) -> None:
    model = tiny_wan.generator(small, dtype=torch.bfloat16)
    policy = adapters.lora(model)
    model.velocity(adapters.noise(model, 1), torch.tensor([0.8]), model.encode(PROMPTS[:1])).square().mean().backward()
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in policy.parameters.values())


@pytest.mark.parametrize("steps", [2, 10])
def test_the_shift_is_the_schedulers(small: Path, steps: int) -> None:
    """Wan ships UniPC, which ends a thousandth short of 1; with its ``flow_shift`` our grid is its grid."""
    unipc = UniPCMultistepScheduler.from_pretrained(small, subfolder="scheduler")
    unipc.set_timesteps(steps)
    model = tiny_wan.generator(small)
    assert torch.allclose(sde.shifted_sigmas(steps, model.shift), unipc.sigmas, atol=2e-3)
    assert tiny_wan.generator(small, shift=8.0).shift == 8.0
    model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    again = WanGenerator(model.pipeline, height=32, width=48, frames=5)
    assert again.shift == 5.0


def test_padding_is_zero_and_of_one_length(small: Path) -> None:
    model = tiny_wan.generator(small)
    embeds = model.encode(["a cat", "a cat on a teal background"]).prompt_embeds
    used = model.pipeline.tokenizer("a cat", return_tensors="pt").input_ids.shape[1]
    assert model.reader.max_sequence_length == embeds.shape[1] == 16 > used
    assert not embeds[0, used:].any() and bool(embeds[1, used:].any())
    assert tiny_wan.generator(small, max_sequence_length=8).encode(["a cat"]).prompt_embeds.shape[1] == 8


def test_decoding_in_parts_changes_nothing(build: Build) -> None:
    one, all_at_once = build(), build(decode_batch_size=3)
    latents = adapters.noise(one, 3)
    assert torch.allclose(one.decode(latents), all_at_once.decode(latents), atol=1e-5)


@torch.no_grad()
def test_a_latent_frame_is_the_pixel_frames_that_a_map_is_averaged_over(build: Build) -> None:
    """Latent frame k sees pixel frames up to 4k; 4k-3 ... 4k are new to it, and align_frames gives them to it."""
    model = build(frames=13)
    vae = model.pipeline.vae
    height, width = (side * model.pipeline.vae_scale_factor_spatial for side in model.latent_shape()[2:])
    clip = torch.rand(1, 3, 13, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before, stride = vae.encode(clip).latent_dist.mode(), model.temporal_stride
    assert before.shape[2] == 4 and stride == 4
    for frame in range(13):
        other = clip.clone()
        other[:, :, frame] *= -1
        changed = (vae.encode(other).latent_dist.mode() - before).abs().amax((0, 1, 3, 4)) > 0
        map_of_frame = torch.zeros(1, 13, 1, 1)
        map_of_frame[:, frame] = 1.0
        first = int(align_frames(map_of_frame, 4, temporal_stride=stride).flatten().argmax())
        assert int(changed.int().argmax()) == first, f"pixel frame {frame}"


@torch.no_grad()
def test_decoding_is_causal(build: Build) -> None:
    """A change of latent frame k leaves every pixel frame before 4k-3 as it was."""
    model = build(frames=13)
    latents = adapters.noise(model, 1)
    before = model.decode(latents)
    for k in range(4):
        other = latents.clone()
        other[:, :, k] *= -1
        changed = (model.decode(other) - before).abs().amax((0, 1, 3, 4)) > 0
        assert int(changed.int().argmax()) == max(0, 4 * k - 3)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ({"frames": 6}, r"frames=6 is not one more than a multiple of 4.*nearest is frames=5"),
        ({"frames": 80}, r"nearest is frames=81"),
        ({"frames": 2}, r"nearest is frames=1"),
        ({"height": 40}, r"height=40 and width=48 must be multiples of 16 and 16 .*height=32 and width=48"),
        ({"width": 63}, r"the nearest are height=32 and width=64"),
        ({"height": 4}, r"the nearest are height=16 and"),
    ],
)
def test_a_size_the_model_cannot_make_names_the_nearest(small: Path, size: dict[str, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_wan.generator(small, **size)


def test_the_nearest_size_is_one_that_the_model_makes(build: Build, kind: Kind) -> None:
    if kind == "2.2-5B":
        with pytest.raises(UserError, match=r"multiples of 32 and 32 .*height=64 and width=64"):
            build(height=48, width=80)
    model = build(height=64, width=64, frames=1)
    assert model.decode(adapters.noise(model, 1)).shape == (1, 3, 1, 64, 64)


def test_two_transformers_are_refused(tmp_path: Path) -> None:
    mixed = tiny_wan.save_pipeline(tmp_path / "a14b", boundary_ratio=0.875)
    with pytest.raises(UserError, match=r"Wan2\.2-A14B.*trains one transformer: give Wan2\.1-T2V-1\.3B"):
        tiny_wan.generator(mixed)


def test_a_transformer_that_wants_an_image_is_refused(small: Path) -> None:
    pipeline = WanPipeline.from_pretrained(small)
    pipeline.transformer.register_to_config(in_channels=36)
    with pytest.raises(UserError, match=r"takes 36 channels, but its autoencoder makes 4.*give a text-to-video model"):
        WanGenerator(pipeline, height=32, width=48, frames=5)


def test_the_adapter_is_registered_as_one_that_makes_video() -> None:
    assert makes_video("wan") and factory("wan") == WanGenerator.from_pretrained
    assert {"guidance_scale", "negative_prompt", "shift"} <= set(options("wan")) and "frames" not in options("wan")


def test_prompts_that_umt5_cuts_are_counted(small: Path) -> None:
    """As the pipeline cleans them: an escaped sign is one sign."""
    model = tiny_wan.generator(small)
    adapters.counts_what_is_cut(model, adapters.tokens_given(model, "text_encoder", "tokenizer"), reader="UMT5")
    (limit,) = model.reader.limits()
    assert limit.tokens(["a  cat &amp;amp; a dog"]) == limit.tokens(["a cat & a dog"])


def test_the_network_masks_text_as_the_adapter_says(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.masks_as_it_says(build(), PROMPTS, monkeypatch)
