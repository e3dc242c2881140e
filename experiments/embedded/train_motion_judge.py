"""Train the held-out judge of motion on clips of drawings that the generator has never seen, and measure it.

One class per motion of the captions, and one more for whatever is none of them: slanted and bent ways, a thing that
turns back, that becomes another, that comes or goes, or nothing at all. Clips are drawn at the judge's small size,
softened as an autoencoder softens, and made noisy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clips import ClipComposer
from scenes import Array
from train_judges import SHIPPED, fit, save
from vipo.embedded import clips
from vipo.rewards.embedded_networks import MOTION_FRAMES, MOTION_SIZE, MotionNetwork

OTHER = len(clips.MOTIONS)
OTHER_SHARE = 0.35
DAMAGES = ("slanted", "bent", "back", "swapped", "comes", "goes", "empty", "short")


class MotionSource:
    """Endless labelled clips from several vendors' art, one vendor per clip."""

    def __init__(self, art: Path, vendors: list[str], seed: int) -> None:
        self.composers = [ClipComposer(art, vendor, MOTION_SIZE, MOTION_FRAMES) for vendor in vendors]
        self.rng = np.random.default_rng(seed)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Clips (b, 3, 9, 32, 32) in [0, 1] and their classes (b,)."""
        drawn = [self._clip() for _ in range(count)]
        media = torch.from_numpy(np.stack([frames for frames, _ in drawn])).permute(0, 4, 1, 2, 3).float() / 255
        return self._worn(media), torch.tensor([label for _, label in drawn])

    def _clip(self) -> tuple[NDArray[np.uint8], int]:
        rng, composer = self.rng, self.composers[self.rng.integers(len(self.composers))]
        if rng.random() >= OTHER_SHARE:
            clip = composer.clip(rng)
            return clip.frames, list(clips.MOTIONS).index(clip.claims.motion)
        return self._damaged(composer, str(rng.choice(DAMAGES))), OTHER

    def _damaged(self, composer: ClipComposer, how: str) -> NDArray[np.uint8]:
        """A clip that no caption describes."""
        rng = self.rng
        clip, other = composer.clip(rng), composer.clip(rng)
        half = MOTION_FRAMES // 2 + int(rng.integers(-1, 2))
        if how in ("slanted", "bent", "back", "short"):
            drawing = composer.drawing(clip.claims.name, rng)
            ground = clip.frames[0, :1, :1].astype(np.float32) * np.ones((MOTION_SIZE, MOTION_SIZE, 1), np.float32)
            return composer.render(drawing, self._odd_way(drawing.shape, how), ground)[0]
        frames = clip.frames.copy()
        empty = np.broadcast_to(frames[:, :1, :1], frames.shape)
        if how == "swapped":
            frames[half:] = other.frames[half:]
        elif how == "comes":
            frames[:half] = empty[:half]
        else:
            first = half if how == "goes" else 0
            frames[first:] = empty[first:]
        return frames

    def _odd_way(self, shape: tuple[int, ...], how: str) -> Array:
        """A path (F, 2) inside the picture that goes where no caption says."""
        rng, room = self.rng, np.asarray([MOTION_SIZE - shape[1], MOTION_SIZE - shape[0]], dtype=np.float32)
        share = np.linspace(0, 1, MOTION_FRAMES, dtype=np.float32)[:, None]
        corners = rng.permutation(np.asarray([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=np.float32))
        if how == "slanted":
            start = rng.integers(0, 2, 2).astype(np.float32)
            return room * (start + share * (1 - 2 * start) * rng.uniform(0.6, 1.0))
        if how == "bent":
            return room * np.where(
                share < 0.5, corners[0] + 2 * share * (0.5 - corners[0]), 0.5 + (2 * share - 1) * (corners[1] - 0.5)
            )
        axis = np.eye(2, dtype=np.float32)[rng.integers(2)]
        base = room * rng.uniform(0, 1, 2) * (1 - axis)
        if how == "back":
            return base + room * axis * (1 - np.abs(2 * share - 1))
        return base + room * axis * (0.3 + 0.16 * share)  # too short a way for a motion, too long for none

    def _worn(self, media: Tensor) -> Tensor:
        """Softened and noisy by a random strength each, as what small generators draw."""
        n, channels, frames = media.shape[:3]
        flat = media.transpose(1, 2).flatten(0, 1)
        soft = F.interpolate(F.avg_pool2d(flat, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
        soft = soft.unflatten(0, (n, frames)).transpose(1, 2)
        strength, noise = torch.rand(2, n, 1, 1, 1, 1)
        worn = torch.lerp(media, soft, strength) + 0.06 * noise * torch.randn_like(media)
        tint = 1 + 0.1 * torch.randn(n, channels, 1, 1, 1)
        return (worn * tint).clamp(0, 1)


@torch.no_grad()
def measure(network: MotionNetwork, source: MotionSource, count: int = 1024) -> dict[str, float]:
    """Share of clips told right, per class; only motions that were in the clip count for them."""
    network.eval()
    media, labels = source.batch(count)
    found = torch.cat([network(part) for part in media.split(128)]).argmax(1)
    names = [*clips.MOTIONS, "other"]
    return {name: round(float((found == labels)[labels == k].float().mean()), 4) for k, name in enumerate(names)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=Path("~/.cache/vipo/art"))
    parser.add_argument("--vendors", nargs="+", default=["twitter"])
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=110)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if "google" in args.vendors:
        parser.error("the judge must not see Noto (google), which the generator draws")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    source, network = MotionSource(args.art, args.vendors, args.seed), MotionNetwork(OTHER + 1)

    def loss() -> Tensor:
        media, labels = source.batch(args.batch)
        return F.cross_entropy(network(media), labels, label_smoothing=0.05)

    fit(network, loss, args, lambda: save(network, args.out / "motion.safetensors"))
    for vendor in (*args.vendors, "google"):
        print(vendor, measure(network, MotionSource(args.art, [vendor], args.seed + 1)))


if __name__ == "__main__":
    main()
