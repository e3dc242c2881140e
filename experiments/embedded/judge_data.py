"""Batches of scenes for the judges, with where every object is, made hard on purpose.

The judges must recognise drawings of a hand they have not seen, and a small generator's imperfect ones. So pictures are
turned, scaled, mirrored, recoloured, softened as an autoencoder softens, and made noisy; their masks move along.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scenes import Scene, SceneComposer
from vipo.embedded import VOCABULARY

CELLS = 8
NAME_INDEX = {name: index for index, name in enumerate(VOCABULARY.names)}
CLEARLY_VISIBLE = 60.0
"""Pixels of an object that must show for it to count as present; with fewer it is neither present nor absent."""


@dataclass(frozen=True)
class Batch:
    """images: (b, 3, 64, 64) in [0, 1]. coverage: (b, K, 8, 8), share of each cell that shows object k.

    present: (b, K) 0 or 1. known: (b, K) 0 where presence is a matter of taste.
    """

    images: Tensor
    coverage: Tensor
    present: Tensor
    known: Tensor


def objects_of(art: Path, vendor: str) -> tuple[str, ...]:
    """The vocabulary objects that a vendor has drawn; not every set has all of them."""
    folder = art.expanduser() / vendor / "package" / "img" / vendor / "64"
    return tuple(name for name, code in VOCABULARY.objects.items() if (folder / f"{code.lower()}.png").is_file())


class SceneSource:
    """Endless scenes from several vendors' art, one vendor per scene."""

    def __init__(self, art: Path, vendors: Sequence[str], seed: int) -> None:
        self.composers = [SceneComposer(art, vendor, objects_of(art, vendor)) for vendor in vendors]
        self.rng = np.random.default_rng(seed)

    def scenes(self, count: int, hard_share: float) -> list[Scene]:
        """Draw scenes; a share of them with objects cut, overlapping and on busy grounds."""
        drawn: list[Scene] = []
        while len(drawn) < count:
            composer = self.composers[self.rng.integers(len(self.composers))]
            objects = int(self.rng.choice(3, p=(0.3, 0.4, 0.3))) + 1
            with contextlib.suppress(ValueError):  # about 1 hard scene in 10 000 has an object wholly outside
                drawn.append(composer.sample(self.rng, count=objects, hard=bool(self.rng.random() < hard_share)))
        return drawn

    def batch(self, count: int, *, hard_share: float = 0.4, strength: float = 1.0) -> Batch:
        """Draw a batch and augment it; strength 0 leaves pictures as they are."""
        scenes = self.scenes(count, hard_share)
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 255
        masks = torch.zeros(count, 3, *images.shape[-2:])
        for row, scene in enumerate(scenes):
            masks[row, : len(scene.names)] = torch.from_numpy(scene.masks)
        generator = torch.Generator().manual_seed(int(self.rng.integers(2**31)))
        if strength > 0:
            images, masks = move(images, masks, strength, generator)
            images = _spoil(images, strength, generator)
        return _label(images, masks, [scene.names for scene in scenes])


def _label(images: Tensor, masks: Tensor, names: Sequence[Sequence[str]]) -> Batch:
    """Masks (b, 3, 64, 64) in the order of ``names`` to coverage and presence by vocabulary index."""
    cells = F.adaptive_avg_pool2d(masks, CELLS)
    pixels = masks.sum((2, 3))
    coverage = torch.zeros(len(images), len(NAME_INDEX), CELLS, CELLS)
    present, known = torch.zeros(coverage.shape[:2]), torch.ones(coverage.shape[:2])
    for row, scene_names in enumerate(names):
        for slot, name in enumerate(scene_names):
            index = NAME_INDEX[name]
            coverage[row, index] = cells[row, slot]
            present[row, index] = float(pixels[row, slot] >= CLEARLY_VISIBLE)
            known[row, index] = present[row, index]
    return Batch(images.clamp(0, 1), coverage, present, known)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def move(images: Tensor, masks: Tensor, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the batch; turn, scale, stretch and shift each picture a little, and its masks with it."""
    count = len(images)
    angle = uniform((count,), -0.3, 0.3, generator) * strength
    scale = 1 + uniform((count, 2), -0.15, 0.2, generator) * strength
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, 1.0, -1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * scale[:, 0] * mirror, -angle.sin() * scale[:, 1]
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * scale[:, 0] * mirror, angle.cos() * scale[:, 1]
    theta[:, :, 2] = uniform((count, 2), -0.12, 0.12, generator) * strength
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    grid = grid + _wobble(count, images.shape[-1], 0.03 * strength, generator)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return images, F.grid_sample(masks, grid, padding_mode="zeros", align_corners=False)


def _wobble(count: int, size: int, reach: float, generator: torch.Generator) -> Tensor:
    """A smooth random displacement (count, size, size, 2): drawings come out dented, as a generator's do."""
    knots = torch.randn(count, 2, 5, 5, generator=generator) * reach * torch.rand(count, 1, 1, 1, generator=generator)
    return F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def _spoil(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Recolour, soften and roughen, each picture by its own random amount."""
    images = recolour(images, strength, generator)
    images = _soften(images, generator)
    noise = torch.randn(images.shape, generator=generator)
    amount = torch.rand(len(images), 1, 1, 1, generator=generator).square() * 0.08 * strength
    coarse = F.interpolate(noise[..., ::4, ::4], size=images.shape[-2:], mode="bilinear", align_corners=False)
    mix = torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + amount * (noise * mix + coarse * (1 - mix))).clamp(0, 1)


def recolour(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Turn hue (a rotation about grey), scale saturation and contrast, shift brightness and channels."""
    count = len(images)
    turn = uniform((count,), -0.25, 0.25, generator) * strength
    axis = 1 / math.sqrt(3)
    cross = torch.tensor([[0.0, -axis, axis], [axis, 0.0, -axis], [-axis, axis, 0.0]])
    grey = torch.full((3, 3), 1 / 3)
    rotation = turn.cos()[:, None, None] * (torch.eye(3) - grey) + turn.sin()[:, None, None] * cross
    saturation = 1 + uniform((count, 1, 1), -0.45, 0.35, generator) * strength
    images = torch.einsum("bij,bjyx->biyx", rotation * saturation + grey, images)
    contrast = 1 + uniform((count, 1, 1, 1), -0.3, 0.3, generator) * strength
    middle = images.mean((2, 3), keepdim=True)
    shift = uniform((count, 3, 1, 1), -0.06, 0.06, generator) + uniform((count, 1, 1, 1), -0.12, 0.12, generator)
    return ((images - middle) * contrast + middle + shift * strength).clamp(0, 1)


def _soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Send a third of the batch through fewer pixels, and sharpen or blur another third."""
    count = len(images)
    side = int(torch.randint(24, 56, (), generator=generator))
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    small = F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = uniform((count, 1, 1, 1), -0.6, 1.0, generator)
    choice = torch.randint(0, 3, (count, 1, 1, 1), generator=generator)
    tuned = images + amount * (blurred - images)
    return torch.where(choice == 0, small, torch.where(choice == 1, tuned, images))


def scramble(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """Spoil a share of the pictures: some of their 64 tiles change places, and what was on them counts as gone.

    A picture of which a part p was scrambled keeps presence 1 - p, so that a score falls with damage, not only with
    absence.
    """
    count = len(batch.images)
    chosen = torch.rand(count, generator=generator) < share
    part = torch.rand(count, generator=generator) * chosen
    moved = torch.rand(count, CELLS * CELLS, generator=generator) < part[:, None]
    order = torch.arange(CELLS * CELLS).repeat(count, 1)
    for row in range(count):
        places = moved[row].nonzero().flatten()
        order[row, places] = places[torch.randperm(len(places), generator=generator)]
    tile = batch.images.shape[-1] // CELLS
    tiles = F.unfold(batch.images, tile, stride=tile)
    shuffled = tiles.gather(2, order[:, None, :].expand_as(tiles))
    images = F.fold(shuffled, batch.images.shape[-2:], tile, stride=tile)
    coverage = batch.coverage * (~moved).float().view(count, 1, CELLS, CELLS)
    left = coverage.sum((2, 3)) / batch.coverage.sum((2, 3)).clamp_min(1e-6)
    return Batch(images, coverage, batch.present * left.clamp(0, 1), batch.known)
