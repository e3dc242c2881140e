"""Rectified flow on the latents of clips, transformer and text encoder together, from random weights.

First single frames (a clip's first latent frame is a picture's: the autoencoder is causal), then whole clips: five
times the tokens. z_t = (1 - t) x + t e, target e - x, t logit-normal and then shifted towards noise as Wan's schedule
is; ten in a hundred captions are empty so that guidance has an unconditional model.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from clips import ClipComposer
from common import DEFAULT_ART, WAN_WORK, Log
from loop import add_options, run
from train_wan_autoencoder import clip_pixels
from vipo.embedded import PROMPT_TOKENS
from wan_model import CHANNELS, LATENT_SIDE, Generator

SHIFT = 2.0


@dataclass(frozen=True)
class Batch:
    """Clean latents (b, C, T, H, W), and their captions' token ids and mask, both (b, L)."""

    clean: Tensor
    ids: Tensor
    mask: Tensor


class ClipPool:
    """A ring buffer of encoded clips of ``frames`` frames; ``fill`` adds fresh ones, ``draw`` takes a random batch."""

    def __init__(self, art: Path, vae: AutoencoderKLWan, generator: Generator, *, frames: int, size: int) -> None:
        self.composer, self.vae, self.generator = ClipComposer(art), vae.eval(), generator
        self.rng, self.frames, self.added = np.random.default_rng(frames), frames, 0
        self.clean = torch.zeros(size, CHANNELS, 1 + (frames - 1) // 4, LATENT_SIDE, LATENT_SIDE, dtype=torch.float16)
        self.ids, self.mask = torch.zeros(2, size, PROMPT_TOKENS, dtype=torch.long)
        self.empty = [row[0] for row in generator.tokenize([""])]
        statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
        self.mean, self.std = statistics.view(2, 1, CHANNELS, 1, 1, 1)

    @torch.no_grad()
    def fill(self, count: int, chunk: int = 16) -> None:
        """Draw and encode ``count`` fresh clips; the oldest make room."""
        for start in range(0, count, chunk):
            drawn = [self.composer.clip(self.rng) for _ in range(min(chunk, count - start))]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                latents = self.vae.encode(clip_pixels(drawn)[:, :, : self.frames]).latent_dist.mean.float()
            where = (torch.arange(len(drawn)) + self.added) % len(self.clean)
            self.clean[where] = ((latents - self.mean) / self.std).half()
            self.ids[where], self.mask[where] = self.generator.tokenize([clip.caption for clip in drawn])
            self.added += len(drawn)

    def draw(self, count: int, drop: float) -> Batch:
        """A random batch; a share ``drop`` of the captions is replaced by the empty one."""
        index = torch.from_numpy(self.rng.integers(0, min(self.added, len(self.clean)), count))
        dropped = torch.from_numpy(self.rng.random(count) < drop)[:, None]
        ids, mask = (
            torch.where(dropped, e, all_[index]) for e, all_ in zip(self.empty, (self.ids, self.mask), strict=True)
        )
        return Batch(self.clean[index].float(), ids, mask)


def flow_loss(generator: Generator, batch: Batch) -> Tensor:
    """Mean squared error of the predicted velocity at shifted logit-normal times."""
    noise, t = torch.randn_like(batch.clean), torch.sigmoid(torch.randn(len(batch.clean)))
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    noisy = torch.lerp(batch.clean, noise, t[:, None, None, None, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = generator(noisy, t, batch.ids, batch.mask)
    return (predicted.float() - (noise - batch.clean)).square().mean()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=DEFAULT_ART)
    parser.add_argument("--work", type=Path, default=WAN_WORK)
    parser.add_argument("--checkpoint", default="wan.safetensors")
    parser.add_argument("--pictures", type=int, default=8000, help="single frames encoded before the start")
    parser.add_argument("--clips", type=int, default=4000, help="clips encoded before the start")
    parser.add_argument("--picture-share", type=float, default=0.25, help="share of the budget spent on single frames")
    parser.add_argument("--clip-batch", type=int, default=24)
    parser.add_argument("--fresh", type=int, default=4, help="clips added at each refresh")
    add_options(parser, seconds=3300.0, batch=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work = args.work.expanduser()
    log, generator = Log(work / "wan.log"), Generator()
    generator.zero_gates()
    vae = AutoencoderKLWan.from_pretrained(work / "vae")
    pictures = ClipPool(args.art, vae, generator, frames=1, size=args.pictures)
    pictures.fill(args.pictures, 64)
    log(f"{args.pictures} single frames, latent std {pictures.clean.float().std():.3f}; {vars(args)}")
    clips = ClipPool(args.art, vae, generator, frames=ClipComposer(args.art).frames, size=args.clips)
    clips.fill(args.clips)
    log(f"{args.clips} clips, latent std {clips.clean.float().std():.3f}")

    def loss_at(share: float) -> Tensor:
        if share < args.picture_share:
            return flow_loss(generator, pictures.draw(args.batch, args.drop))
        return flow_loss(generator, clips.draw(args.clip_batch, args.drop))

    run(args, work / args.checkpoint, generator, loss_at, lambda: clips.fill(args.fresh), log)


if __name__ == "__main__":
    main()
