"""Measure the embedded scorers on fresh scenes: the numbers of ``src/vipo/embedded/judges/README.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from judge_art import VENDORS
from judge_data import NAME_INDEX, SceneSource, objects_of
from scenes import Scene, SceneComposer
from vipo import rewards
from vipo.embedded import VOCABULARY, make_caption, parse_caption
from vipo.types import Prompt

NAMES = VOCABULARY.names


def draw(art: Path, vendor: str, count: int, seed: int, *, hard: bool, single: bool) -> list[Scene]:
    """Scenes of one vendor, not augmented: what the generator is trained to draw."""
    composer, rng = SceneComposer(art, vendor, objects_of(art, vendor)), np.random.default_rng(seed)
    return [composer.sample(rng, hard=hard, count=1 if single else None) for _ in range(count)]


def as_media(scenes: Sequence[Scene]) -> Tensor:
    """(N, 3, 1, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float().div(255).unsqueeze(2)


def another_caption(caption: str, rng: np.random.Generator) -> str:
    """The caption with one of its objects replaced by one that it does not name."""
    names, relation, ground = parse_caption(caption)
    swapped = list(names)
    swapped[rng.integers(len(names))] = rng.choice([name for name in NAMES if name not in names])
    return make_caption(swapped, relation, ground)


def presence_numbers(values: Tensor, scenes: Sequence[Scene], threshold: float) -> dict[str, object]:
    """values (N, K): how often named objects are found, others are not, and (one object) it is the strongest."""
    named = torch.zeros_like(values, dtype=torch.bool)
    for row, scene in enumerate(scenes):
        named[row, [NAME_INDEX[name] for name in scene.names]] = True
    found = values > threshold
    numbers: dict[str, object] = {
        "named_found": float(found[named].float().mean()),
        "unnamed_found": float(found[~named].float().mean()),
    }
    if all(len(scene.names) == 1 for scene in scenes):
        numbers["top1"] = float((values.argmax(1) == named.float().argmax(1)).float().mean())
        worst = [(float(found[named[:, k], k].float().mean()), n) for k, n in enumerate(NAMES)]
        numbers["worst"] = ", ".join(f"{n} {share:.2f}" for share, n in sorted(w for w in worst if w[0] == w[0])[:4])
    return numbers


def values_of(reward: object, media: Tensor) -> tuple[Tensor, float]:
    """A scorer's answer per object (N, K) and the threshold that means "there"."""
    if hasattr(reward, "presence"):
        return reward.presence(media[:, :, 0]), 0.0
    if hasattr(reward, "probabilities"):
        return reward.probabilities(media[:, :, 0]), 0.5
    return reward.heat(media[:, :, 0])[:, :-1].amax((2, 3)), reward.threshold  # type: ignore[attr-defined]


def on_scenes(reward: object, scenes: Sequence[Scene], seed: int) -> dict[str, object]:
    """Presence, the mean score of the right caption and of one with an object exchanged, how often right wins."""
    rng = np.random.default_rng(seed)
    media = as_media(scenes)
    right = reward(media, [Prompt(s.caption) for s in scenes])  # type: ignore[operator]
    wrong = reward(media, [Prompt(another_caption(s.caption, rng)) for s in scenes])  # type: ignore[operator]
    values, threshold = values_of(reward, media)
    numbers = presence_numbers(values, scenes, threshold)
    numbers |= {"score_right": float(right.mean()), "score_right_std": float(right.std())}
    numbers |= {"score_wrong": float(wrong.mean()), "right_wins": float((right > wrong).float().mean())}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}


def augmented(art: Path, vendors: Sequence[str], reward: object, seed: int, count: int) -> dict[str, float]:
    """Named objects found in augmented scenes, where presence is not a matter of taste."""
    batch = SceneSource(art, vendors, seed).batch(count)
    values, threshold = values_of(reward, batch.images.unsqueeze(2))
    found, present, known = values > threshold, batch.present > 0, batch.known > 0
    return {
        "named_found": round(float(found[present & known].float().mean()), 4),
        "unnamed_found": round(float(found[~present & known].float().mean()), 4),
    }


def measure(art: Path, count: int, seed: int, judges: Sequence[str]) -> dict[str, dict[str, object]]:
    """Every scorer on plain, hard and augmented scenes of Noto and of the vendors that taught the judges."""
    report: dict[str, dict[str, object]] = {}
    for name in judges:
        reward = rewards.build(name)
        report[name] = {
            f"{vendor}, {kind}": on_scenes(
                reward, draw(art, vendor, count, seed, hard=kind == "hard", single=kind == "one object"), seed
            )
            for vendor in ("google", *VENDORS)
            for kind in (("one object", "plain", "hard") if vendor == "google" else ("plain",))
        }
        report[name]["google, augmented"] = augmented(art, ("google",), reward, seed, count)
        report[name]["own vendors, augmented"] = augmented(art, VENDORS, reward, seed, count)
    return report
