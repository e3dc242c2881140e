"""Train the thin AutoencoderKL of emoji-flux (64x64 pictures, 4x16x16 latents) and measure its latents.

Loss: L1 on pixels, on their gradients (keeps outlines crisp) and on the half-size picture, plus a mild KL term that
keeps latents smooth. Afterwards scaling_factor and shift_factor are set from measured latents so that the generator
sees roughly N(0, 1), as FLUX's does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from common import DEFAULT_ART, DEFAULT_WORK, Average, Log, draw_scenes, to_pixels, trapezoid
from scenes import Scene, SceneComposer
from vipo.files import written_whole


def build_autoencoder() -> AutoencoderKL:
    """Build the architecture: three blocks (4x down), no attention, narrow at full resolution so decoding is fast."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of pixels + of horizontal and vertical gradients + of the half-size picture; both (b, 3, H, W)."""
    delta = output - target
    edges = (delta[..., 1:] - delta[..., :-1]).abs().mean() + (delta[..., 1:, :] - delta[..., :-1, :]).abs().mean()
    return delta.abs().mean() + 0.5 * edges + 0.5 * F.avg_pool2d(delta, 2).abs().mean() + delta.square().mean()


def _crowded(composer: SceneComposer, rng: np.random.Generator, count: int) -> list[Scene]:
    """Draw scenes with more objects than the generator's: drawings, not flat grounds, are what is hard to encode."""
    counts = rng.choice((1, 2, 3), size=count, p=(0.2, 0.3, 0.5))
    return [composer.sample(rng, count=int(n), hard=bool(rng.random() < 0.3)) for n in counts]


def _forward(vae: AutoencoderKL, pixels: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Reconstruct pixels (b, 3, H, W); also the mean KL per latent, 0 where only the decoder is trained.

    Decoder-only training keeps the latents that a generator already learned, and adds noise of varying strength to
    them, because the generator's latents are never exactly the encoder's.
    """
    if not args.decoder_only:
        posterior = vae.encode(pixels).latent_dist
        kl = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        return vae.decode(posterior.sample()).sample, 0.5 * kl.mean()
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        strength = args.latent_noise * torch.rand(len(latents), 1, 1, 1) / vae.config.scaling_factor
        latents = latents + strength * torch.randn_like(latents)
    return vae.decode(latents).sample, torch.zeros(())


def train(vae: AutoencoderKL, composer: SceneComposer, args: argparse.Namespace, log: Log) -> Average:
    """Train for a wall-clock budget; the schedule follows elapsed time. Returns the averaged weights."""
    parameters = list((vae.decoder if args.decoder_only else vae).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    average, rng, step, start = Average(vae, 0.998), np.random.default_rng(args.seed), 0, time.time()
    while (elapsed := time.time() - start) < args.seconds:
        factor = min(1.0, (step + 1) / 60) * trapezoid(elapsed, args.seconds, 1.0, 0.6)
        optimizer.param_groups[0]["lr"] = args.lr * factor
        pixels = to_pixels(_crowded(composer, rng, args.batch))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, kl = _forward(vae, pixels, args)
        loss = reconstruction_loss(output.float(), pixels) + args.kl * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(vae, step)
        if step % 100 == 0:
            log(f"step {step} loss {loss.item():.4f} kl {kl.item():.3f} mse {(output - pixels).square().mean():.5f}")
        step += 1
    log(f"done: {step} steps, {step * args.batch} pictures")
    return average


@torch.no_grad()
def measure(vae: AutoencoderKL, composer: SceneComposer, out: Path, log: Log) -> None:
    """Set scaling and shift from 1,024 scenes' latents, log PSNR on fresh scenes, write a reconstruction sheet."""
    scenes = draw_scenes(composer, np.random.default_rng(10_001), 1024)
    pixels = to_pixels(scenes)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
    if vae.config.scaling_factor == 1.0:
        vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    output = torch.cat([vae.decode(part).sample for part in latents[:256].split(64)]).clamp(-1, 1)
    mse = (output - pixels[:256]).square().mean(dim=(1, 2, 3)) / 4
    log(f"PSNR {(-10 * mse.log10()).mean():.2f} dB on {len(mse)} pictures; latents mean {latents.mean():.4f}")
    log(f"latent std {latents.std():.4f}, per channel {latents.std(dim=(0, 2, 3)).tolist()}")
    pairs = torch.stack([pixels[:48], output[:48]], dim=1).reshape(8, 12, 3, 64, 64)
    sheet = pairs.permute(0, 3, 1, 4, 2).reshape(8 * 64, 12 * 64, 3)
    picture = Image.fromarray(((sheet + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(out / "reconstructions.png")


def main() -> None:
    """Command line; the result is ``<work>/<out>``, loadable with AutoencoderKL.from_pretrained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=DEFAULT_ART)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--seconds", type=float, default=530.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder, so latents stay what they are")
    parser.add_argument("--latent-noise", type=float, default=0.15, help="most noise in decoder-only training, in std")
    parser.add_argument("--out", default="vae", help="result folder inside the work folder")
    parser.add_argument("--resume", action="store_true", help="start from the weights already in <work>/vae")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work = args.work.expanduser()
    log, composer = Log(work / "autoencoder.log"), SceneComposer(args.art, "google")
    vae = AutoencoderKL.from_pretrained(work / "vae") if args.resume else build_autoencoder()
    train(vae, composer, args, log).copy_to(vae)
    vae.eval()
    measure(vae, composer, work, log)
    with written_whole(work / args.out) as aside:
        vae.save_pretrained(aside)


if __name__ == "__main__":
    main()
