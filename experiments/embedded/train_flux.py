"""Stage 1: rectified flow on the latents, transformer and text encoders together, from random weights.

z_t = (1 - t) x + t e, target e - x, t logit-normal; ten in a hundred captions are empty so that guidance has an
unconditional model. The guidance embedder sees 1.0 throughout; stage 2 (distill_guidance.py) teaches it the rest.
The learning rate follows wall-clock time, and ``--resume`` continues a run that was cut.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from common import DEFAULT_ART, DEFAULT_WORK, Log
from latents import Batch, LatentPool
from loop import add_options, run
from model import Generator

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flow_loss(velocity: Velocity, batch: Batch) -> Tensor:
    """Mean squared error of the predicted velocity at logit-normal times."""
    noise = torch.randn_like(batch.clean)
    t = torch.sigmoid(torch.randn(len(noise)))
    noisy = torch.lerp(batch.clean, noise, t[:, None, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = velocity(noisy, t, torch.ones_like(t), batch.clip_ids, batch.t5_ids)
    return (predicted.float() - (noise - batch.clean)).square().mean()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=DEFAULT_ART)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--checkpoint", default="flux.safetensors")
    parser.add_argument("--pool", type=int, default=12_000, help="scenes encoded before the start")
    add_options(parser, seconds=4000.0, batch=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work = args.work.expanduser()
    log, generator = Log(work / "flux.log"), Generator()
    generator.zero_gates()
    vae = AutoencoderKL.from_pretrained(work / "vae")
    seed = args.seed + (int(time.time()) if args.resume else 0)
    pool = LatentPool(args.art, vae, generator, max(args.pool, 100_000), seed)
    pool.fill(args.pool)
    log(f"pool of {pool.size} scenes, latent std {pool.clean[: pool.size].float().std():.3f}; {vars(args)}")
    velocity: Velocity = torch.compile(generator) if args.compile else generator
    run(
        args,
        work / args.checkpoint,
        generator,
        lambda _share: flow_loss(velocity, pool.draw(args.batch, args.drop)),
        lambda: pool.fill(32),
        log,
    )


if __name__ == "__main__":
    main()
