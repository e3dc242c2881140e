"""A pool of encoded scenes, slowly refreshed, so that training never waits for drawing and encoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from common import draw_scenes, to_pixels
from model import IMAGE_TOKENS, Generator, pack
from scenes import SceneComposer
from vipo.embedded import PROMPT_TOKENS


@dataclass(frozen=True)
class Batch:
    """Clean packed latents (b, 64, 16) and the token ids (b, 16) of their captions for both text encoders."""

    clean: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


class LatentPool:
    """A ring buffer of encoded scenes; ``fill`` adds fresh ones, ``draw`` returns a random batch."""

    def __init__(self, art: Path, vae: AutoencoderKL, generator: Generator, capacity: int, seed: int) -> None:
        self.composer, self.vae, self.generator = SceneComposer(art, "google"), vae.eval(), generator
        self.rng = np.random.default_rng(seed)
        self.capacity, self.added = capacity, 0
        self.clean = torch.zeros(capacity, IMAGE_TOKENS, 16, dtype=torch.float16)
        self.ids = torch.zeros(2, capacity, PROMPT_TOKENS, dtype=torch.long)
        self.empty = [ids[0] for ids in generator.tokenize([""])]

    @property
    def size(self) -> int:
        """Number of scenes that can be drawn now."""
        return min(self.added, self.capacity)

    @torch.no_grad()
    def fill(self, count: int, chunk: int = 32) -> None:
        """Draw and encode ``count`` fresh scenes; the oldest make room."""
        for start in range(0, count, chunk):
            scenes = draw_scenes(self.composer, self.rng, min(chunk, count - start))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                latents = self.vae.encode(to_pixels(scenes)).latent_dist.mean.float()
            latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
            where = (torch.arange(len(scenes)) + self.added) % self.capacity
            self.clean[where] = pack(latents).half()
            for k, ids in enumerate(self.generator.tokenize([scene.caption for scene in scenes])):
                self.ids[k, where] = ids
            self.added += len(scenes)

    def draw(self, count: int, drop: float) -> Batch:
        """Return a random batch; a share ``drop`` of the captions is replaced by the empty one."""
        index = torch.from_numpy(self.rng.integers(0, self.size, count))
        dropped = torch.from_numpy(self.rng.random(count) < drop)[:, None]
        clip_ids, t5_ids = (
            torch.where(dropped, empty, ids[index]) for empty, ids in zip(self.empty, self.ids, strict=True)
        )
        return Batch(self.clean[index].float(), clip_ids, t5_ids)
