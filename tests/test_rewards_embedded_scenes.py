"""The scorers of counts, quality and places: shipped weights, on composed scenes with flaws that the test plants."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vipo import embedded, rewards
from vipo.embedded import VOCABULARY
from vipo.rewards.embedded_scenes import EmojiCount, EmojiFlaws, count_score
from vipo.types import Prompt, Reward

SCENES = Path(__file__).parent / "data" / "scenes"
NAMES = ("emoji_count", "emoji_quality", "emoji_flaws", "emoji_clean")


@pytest.fixture(scope="module")
def built() -> dict[str, Reward]:
    return {name: rewards.build(name) for name in NAMES}


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, list[Prompt]]:
    """Composed pictures (8, 3, 1, 64, 64) and the captions they were composed from."""
    captions = json.loads((SCENES / "captions.json").read_text(encoding="utf-8"))
    pictures = [np.asarray(Image.open(SCENES / name).convert("RGB")) for name in captions]
    media = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255).unsqueeze(2)
    return media, [Prompt(caption) for caption in captions.values()]


def tiled(media: Tensor) -> Tensor:
    """Each picture four times, half as large: four copies of everything where there was one."""
    small = torch.nn.functional.interpolate(media[:, :, 0], size=(32, 32), mode="bilinear", antialias=True)
    return small.repeat(1, 1, 2, 2)[:, :, None]


def grainy(media: Tensor, strength: float = 0.08) -> Tensor:
    return (media + strength * torch.randn(media.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def blurred(media: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(media[:, :, 0], 7, 1, 3, count_include_pad=False)[:, :, None]


def test_count_score_is_exact() -> None:
    named = torch.zeros(6, 28, dtype=torch.bool)
    named[:4, 0] = named[2:5, 1] = True
    counts = torch.zeros(6, 28)
    counts[0, 0] = 1  # the one that was asked for
    counts[1, 0] = 4  # four of it
    counts[2, 0], counts[2, 1] = 1, 2
    counts[3, 0] = counts[3, 1] = counts[3, 2] = 1  # and a stray
    counts[4, 5] = 1  # only a stray
    expected = torch.tensor([1.0, 0.25, 0.75, 2 / 3, 0.0, torch.nan])
    torch.testing.assert_close(count_score(counts, named), expected, equal_nan=True)


def test_copies_are_counted(built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]) -> None:
    media, prompts = scenes
    one, four = (built["emoji_count"](pictures, prompts) for pictures in (media, tiled(media)))
    assert one.mean() > 0.8 and four.mean() < 0.6 and (one > four).all()
    count = built["emoji_count"]
    assert isinstance(count, EmojiCount)
    named = torch.tensor([[name in prompt.text.split() for name in VOCABULARY.names] for prompt in prompts])
    once, four_times = (count.counts(pictures, prompts)[named].mean() for pictures in (media, tiled(media)))
    assert 0.8 < once < 1.2 and four_times > 2.5


@pytest.mark.parametrize("spoil", [grainy, blurred])
def test_grain_and_blur_lower_quality(
    spoil: object, built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]
) -> None:
    media, prompts = scenes
    for name in ("emoji_quality", "emoji_clean"):
        whole, spoilt = built[name](media, prompts), built[name](spoil(media), prompts)  # type: ignore[operator]
        assert whole.mean() > 0.6 and whole.mean() - spoilt.mean() > 0.25 and (whole > spoilt).sum() >= 7


def test_the_reward_prefers_one_copy(built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]) -> None:
    media, prompts = scenes
    assert (built["emoji_clean"](media, prompts) > built["emoji_clean"](tiled(media), prompts)).all()


def test_heat_is_where_the_flaw_is(built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]) -> None:
    media, prompts = scenes
    flaws = built["emoji_flaws"]
    assert isinstance(flaws, EmojiFlaws)
    half = media.clone()
    half[..., :32] = grainy(media, 0.12)[..., :32]
    heat = flaws.heat(half, prompts)
    assert heat.shape == (8, 32, 32) and (heat >= 0).all() and (heat <= 1).all()
    assert (heat[:, :, :14].mean((1, 2)) > heat[:, :, 18:].mean((1, 2)) + 0.1).sum() >= 7
    torch.testing.assert_close(flaws(half, prompts), 1 - heat.mean((1, 2)))


def test_an_object_is_wrong_where_nobody_named_it(
    built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]
) -> None:
    media, prompts = scenes
    flaws = built["emoji_flaws"]
    others = [
        Prompt("a car on a white background" if "car" not in p.text else "a frog on a white background")
        for p in prompts
    ]
    assert (flaws(media, prompts) > flaws(media, others)).sum() >= 7


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_scores(name: str, built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]) -> None:
    media, prompts = scenes
    together = built[name](media[:3], prompts[:3])
    assert together.shape == (3,) and together.dtype == torch.float32
    assert (together >= 0).all() and (together <= 1).all()
    torch.testing.assert_close(built[name](media[2:3], prompts[2:3]), together[2:], rtol=1e-3, atol=1e-4)
    clip = media[:2].expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(built[name](clip, prompts[:2]), together[:2], rtol=1e-3, atol=1e-4)
    unknown = built[name](media[:2], [Prompt("a dragon over a castle"), prompts[1]])
    assert unknown[0].isnan() and unknown[1].isfinite()


def test_judges_and_reward_share_no_weights() -> None:
    folder = Path(embedded.__file__).parent / "judges"
    assert all((folder / f"{name}.safetensors").stat().st_size < 3_000_000 for name in ("critic", "clean"))
    critic, clean = (rewards.build(name).network.state_dict() for name in ("emoji_count", "emoji_clean"))  # type: ignore[attr-defined]
    assert all(
        a.shape != b.shape or not torch.equal(a, b)
        for a in critic.values()
        if a.numel() > 100
        for b in clean.values()
        if b.numel() > 100
    )
