"""Train the thin AutoencoderKLWan of emoji-wan (17 x 64 x 64 clips, 8 x 5 x 16 x 16 latents) and measure its latents.

The loss is that of train_autoencoder.py on every frame. Most of the time goes to small crops, a quarter of a clip's
cost; the rest to whole clips, because the middle of the network attends to the whole picture. Afterwards each
channel's mean and standard deviation go into the config, as Wan's do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from clips import Clip, ClipComposer
from common import DEFAULT_ART, WAN_WORK, Average, Log, trapezoid
from train_autoencoder import reconstruction_loss
from vipo.files import written_whole
from vipo.generators.wan import channels_last
from wan_model import build_autoencoder

CROP_SIDE = 32


def clip_pixels(clips: list[Clip]) -> Tensor:
    """Stack clips into the pipeline's pixel range: float32 (b, 3, F, H, W) in [-1, 1]."""
    stacked = np.stack([clip.frames for clip in clips])
    return torch.from_numpy(stacked).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def crop(clip: Clip, rng: np.random.Generator) -> Tensor:
    """A part (3, F, CROP_SIDE, CROP_SIDE) of a clip where its thing passes: flat ground teaches nothing."""
    middle = clip.centres[rng.integers(len(clip.centres))] + rng.normal(0, 8, 2)
    x, y = np.clip(np.round(middle - CROP_SIDE / 2), 0, clip.frames.shape[1] - CROP_SIDE).astype(int)
    part = clip.frames[:, y : y + CROP_SIDE, x : x + CROP_SIDE]
    return torch.from_numpy(part).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)


def reconstruct(vae: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The reconstruction of pixels (b, 3, F, H, W) and the mean KL per latent."""
    posterior = vae.encode(pixels).latent_dist
    kl = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
    return vae.decode(posterior.sample()).sample, 0.5 * kl.mean()


def frames_of(media: Tensor) -> Tensor:
    """Every frame as a picture: (b, 3, F, H, W) -> (b * F, 3, H, W)."""
    return media.transpose(1, 2).flatten(0, 1)


def train(vae: AutoencoderKLWan, composer: ClipComposer, args: argparse.Namespace, log: Log) -> Average:
    """Train for a wall-clock budget; the schedule follows elapsed time. Returns the averaged weights."""
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    average, rng, step, start = Average(vae, 0.998), np.random.default_rng(args.seed), 0, time.time()
    while (elapsed := time.time() - start) < args.seconds:
        factor = min(1.0, (step + 1) / 60) * trapezoid(elapsed, args.seconds, 1.0, 0.6)
        optimizer.param_groups[0]["lr"] = args.lr * factor
        whole = elapsed > args.seconds * (1 - args.whole_share)
        if whole:
            pixels = clip_pixels([composer.clip(rng) for _ in range(2)])
        else:
            pixels = torch.stack([crop(composer.clip(rng), rng) for _ in range(args.batch)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, kl = reconstruct(vae, pixels)
        loss = reconstruction_loss(frames_of(output.float()), frames_of(pixels)) + args.kl * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(vae, step)
        if step % 50 == 0:
            log(f"step {step} whole {whole} loss {loss.item():.4f} kl {kl.item():.3f}")
        step += 1
    log(f"done: {step} steps")
    return average


@torch.no_grad()
def measure(vae: AutoencoderKLWan, composer: ClipComposer, out: Path, log: Log) -> None:
    """Set the latents' mean and spread from 96 clips, log PSNR on them, write a sheet: clip above reconstruction."""
    rng = np.random.default_rng(10_001)
    pixels = clip_pixels([composer.clip(rng) for _ in range(96)])
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(8)])
    flat = latents.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
    output = torch.cat([vae.decode(part).sample for part in latents[:32].split(8)]).clamp(-1, 1)
    mse = (output - pixels[:32]).square().mean(dim=(1, 2, 3, 4)) / 4
    log(f"PSNR {(-10 * mse.log10()).mean():.2f} dB; latents mean {flat.mean(1)}, std {flat.std(1)}")
    pairs = torch.stack([pixels[:6], output[:6]], 1).flatten(0, 1)[:, :, ::2]
    rows = pairs.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
    sheet = ((rows + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(
        out / "wan-autoencoder.png"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=DEFAULT_ART)
    parser.add_argument("--work", type=Path, default=WAN_WORK)
    parser.add_argument("--seconds", type=float, default=1600.0)
    parser.add_argument("--whole-share", type=float, default=0.25, help="share of the time spent on whole clips")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="start from the weights already in <work>/vae")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work = args.work.expanduser()
    log, composer, vae = Log(work / "autoencoder.log"), ClipComposer(args.art), build_autoencoder()
    if args.resume:
        vae = AutoencoderKLWan.from_pretrained(work / "vae")
    channels_last(vae)
    train(vae, composer, args, log).copy_to(vae)
    vae.eval()
    measure(vae, composer, work, log)
    with written_whole(work / "vae") as aside:
        vae.save_pretrained(aside)


if __name__ == "__main__":
    main()
