"""On the device that is there: the parts agree with a CPU, and the loop begins at ratio 1 and resumes bit for bit.

Without a GPU, or without ``--run-needs-gpu``, the device is a CPU and these tests hold trivially or as others do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from vipo import sde
from vipo.assemble import build, default_device
from vipo.backbones.efficientnet_lite import EfficientNetLite
from vipo.objective import clipped_surrogate, spatial_advantage
from vipo.recipe import parse_recipe
from vipo.rewards.embedded import EmojiJudge, EmojiMatch
from vipo.runs.run import Run
from vipo.structuring import PerceptualStructuring, allocation_map, deviation_map
from vipo.types import Prompt

DEVICE = default_device()
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order
SEEN = {"rtol": 2e-2, "atol": 2e-2}  # through convolutions, which a GPU computes in TF32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int = 4) -> Tensor:
    """Coloured blobs on a ground, (count, 3, 1, 64, 64) in [0, 1]."""
    ramp = torch.linspace(-1, 1, 64)
    squared = (ramp[:, None] - 0.3) ** 2 + (ramp[None] + torch.linspace(-0.5, 0.5, count)[:, None, None]) ** 2
    blob = torch.exp(-8 * squared)[:, None, None]
    return (torch.tensor([0.9, 0.2, 0.1])[:, None, None, None] * blob + 0.1).clamp(0, 1)


def test_a_step_and_its_density_are_those_of_a_cpu() -> None:
    latents, velocity, sigma = draw(3, 4, 1, 6, 5), draw(3, 4, 1, 6, 5, seed=1), torch.tensor([0.9, 0.5, 0.1])

    def on(device: torch.device | str) -> list[Tensor]:
        z, u, s = (value.to(device) for value in (latents, velocity, sigma))
        step = sde.transition(u, z, s, s / 2, kind="dance", eta=0.3)
        return [step.mean.cpu(), step.std.cpu(), sde.log_prob(z - 0.01, step).cpu()]

    for ours, theirs in zip(on(DEVICE), on("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, **NEAR)


def test_loss_and_gradient_are_those_of_a_cpu() -> None:
    weights = spatial_advantage(draw(4), draw(4, 1, 6, 5, seed=2).abs())

    def on(device: torch.device | str) -> tuple[Tensor, Tensor]:
        now = (0.05 * draw(4, 1, 6, 5, seed=3)).to(device).requires_grad_()
        loss = clipped_surrogate(now, torch.zeros_like(now), weights.to(device), clip_range=0.1).loss
        loss.backward()
        assert now.grad is not None
        return loss.detach().cpu(), now.grad.cpu()

    for ours, theirs in zip(on(DEVICE), on("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, **NEAR)


def test_maps_are_those_of_a_cpu() -> None:
    # A strong direction per picture, so that an eigensolver of its own finds the same ones.
    features = draw(3, 16, 8, 8) + 6 * draw(3, 16, 1, 1, seed=4) * draw(3, 1, 8, 8, seed=5)
    ours = allocation_map(features.to(DEVICE), (6, 10), components=1)
    torch.testing.assert_close(ours.cpu(), allocation_map(features, (6, 10), components=1), rtol=1e-3, atol=1e-3)
    latents = draw(4, 4, 1, 6, 10)
    torch.testing.assert_close(deviation_map(latents.to(DEVICE), 4).cpu(), deviation_map(latents, 4), **NEAR)


def test_what_a_backbone_sees_and_its_map_are_on_the_device() -> None:
    media = pictures()
    seen = EfficientNetLite()(media[:, :, 0].to(DEVICE)).features
    theirs = EfficientNetLite()(media[:, :, 0]).features
    assert seen.device.type == DEVICE.type
    torch.testing.assert_close(seen.cpu(), theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
    maps = PerceptualStructuring(EfficientNetLite())(media.to(DEVICE), (1, 8, 8))
    assert maps.device.type == DEVICE.type and maps.shape == (4, 1, 8, 8) and bool(maps.isfinite().all())


@pytest.mark.parametrize("reward", [EmojiMatch, EmojiJudge])
def test_scores_are_those_of_a_cpu(reward: type[EmojiMatch | EmojiJudge]) -> None:
    prompts = [Prompt("a cat left of a cactus on a blue background")] * 4
    ours = reward()(pictures().to(DEVICE), prompts)
    torch.testing.assert_close(ours.cpu(), reward()(pictures(), prompts), **SEEN)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("credit", ["sample", "advantage_map"])
def test_the_loop_begins_at_ratio_one_and_moves(
    tmp_path: Path, model_folder: Path, precision: str, credit: str
) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", credit=credit, training__precision=precision)
    session = build(parse_recipe(raw))
    before = session.policy.fingerprint()
    step = session.trainer.step()
    assert session.engine.device.type == DEVICE.type == next(session.generator.network.parameters()).device.type
    assert step.metrics["ratio_deviation"] <= 1e-4 and step.metrics["skipped"] == 0
    assert step.metrics["grad_norm"] > 0 and session.policy.fingerprint() != before


def test_a_run_that_is_resumed_is_the_one_that_was_never_stopped(tmp_path: Path, model_folder: Path) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", evaluation__every=None)
    list(Run(parse_recipe(raw), tmp_path / "whole"))
    short = {**raw, "training": {**raw["training"], "iterations": 2}}
    list(Run(parse_recipe(short), tmp_path / "parts"))
    list(Run(parse_recipe(raw), tmp_path / "parts", resume=True))
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
