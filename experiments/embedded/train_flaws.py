"""Train and measure the scorers that notice crowds, grain and broken objects. Minutes each on one CPU thread.

python fetch_art.py && python judge_art.py           # the drawings
python train_flaws.py critic                         # emoji_count, emoji_quality, emoji_flaws: never Noto
python train_flaws.py critic --start critic.safetensors --seed 910 --scenes 4096 --grain 0.35 --blur 0.25 \\
    --steps 120 --lr 1e-3                            # more blur
python train_flaws.py clean --steps 1000             # the reward emoji_clean, on Noto
python flaw_measure.py                               # every number of the card, on fresh scenes
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import SHIPPED as PIPELINE
from flaw_data import GRID, Flawed, FlawSource, brightened, jitter, quality
from judge_art import VENDORS
from train_judges import OBJECTS, SHIPPED, fit, save
from vipo.files import written_whole
from vipo.rewards.embedded_networks import PEAK, CleanNetwork, CriticNetwork, Reading

ART = {"critic": VENDORS, "clean": ("google",)}
SEEDS = {"critic": 900, "clean": 901}
WIDTH = 1.0
"""Standard deviation, in cells of 4 px, of the spot that stands for an object."""


def pool_of(args: argparse.Namespace) -> Flawed:
    """The scenes to learn from; kept in the work folder, since drawing and encoding them takes as long as learning."""
    file = args.work.expanduser() / f"{args.command}-{args.seed}.safetensors"
    if file.is_file():
        return Flawed(**load_file(file))
    autoencoder = AutoencoderKL.from_pretrained(PIPELINE / "vae")
    source = FlawSource(args.art, ART[args.command], autoencoder, args.seed, grain=args.grain, blur=args.blur)
    parts, start = [], time.time()
    for done in range(0, args.scenes, 128):
        parts.append(source.batch(128))
        if done % 2048 == 0:
            print(f"[{time.time() - start:6.1f}s] {done + 128} scenes", flush=True)
    pool = Flawed.join(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as aside:
        save_file({name: value.contiguous() for name, value in vars(pool).items()}, aside)
    return pool


def spot_target(spots: Tensor) -> tuple[Tensor, Tensor]:
    """(b, MOST, 4) to the spots of each object (b, MOST, 16, 16), each with its weight as sum, and its class, or -1."""
    axis = torch.arange(GRID) + 0.5
    index, x, y, weight = spots.unbind(2)
    distance = (axis - x[..., None])[:, :, None, :].square() + (axis - y[..., None])[:, :, :, None].square()
    shape = torch.exp(-0.5 * distance / WIDTH**2) / (2 * torch.pi * WIDTH**2)
    return shape * (weight * (index >= 0))[..., None, None], index.long()


def by_kind(values: Tensor, index: Tensor) -> Tensor:
    """(b, MOST, ...) of objects to (b, K, ...) of vocabulary indices, summed; -1 is no object."""
    hot = F.one_hot(index.clamp_min(0), OBJECTS).float() * (index >= 0)[..., None]
    return torch.einsum("bm...,bmk->bk...", values, hot)


def reading_loss(reading: Reading, batch: Flawed) -> Tensor:
    """Where the middles are, of what, how many, what is shown, and the quality."""
    spots, index = spot_target(batch.spots)
    cover = batch.cover.float() / 255
    middle = F.binary_cross_entropy_with_logits(reading.spot, (spots.sum(1) / PEAK).clamp(0, 1))
    shown = F.binary_cross_entropy_with_logits(reading.shown, cover.sum(1).clamp(0, 1))
    kinds = by_kind(cover + 3 * spots, index)
    kind = -(kinds * reading.kind.log_softmax(1)).sum((1, 2, 3)).mean() / 30
    there = by_kind(spots.sum((2, 3)), index)
    counted = F.smooth_l1_loss(reading.counts(batch.named), there, reduction="none", beta=0.3).sum(1).mean()
    worth = torch.cat([quality(batch.severity)[:, None], batch.severity], dim=1).clamp(0.01, 0.99)
    return 10 * middle + shown + kind + counted + 3 * F.binary_cross_entropy_with_logits(reading.worth, worth)


def flaw_loss(logits: Tensor, batch: Flawed) -> Tensor:
    """Cross-entropy of wrong pixels."""
    return 4 * F.binary_cross_entropy_with_logits(logits, (batch.kinds > 0).float())


def train(args: argparse.Namespace) -> None:
    """Either network, on its own drawings; bfloat16 arithmetic, float32 weights."""
    torch.manual_seed(args.seed)
    pool, generator = pool_of(args), torch.Generator().manual_seed(args.seed)
    network: nn.Module = CriticNetwork(OBJECTS) if args.command == "critic" else CleanNetwork(OBJECTS)
    if args.start is not None:
        network.load_state_dict({name: t.float() for name, t in load_file(args.start).items()}, strict=False)
    network.to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        batch = jitter(pool.rows(torch.randint(len(pool), (args.batch,), generator=generator)), generator)
        images = brightened(batch.images.float() / 255, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            answer = network(images, batch.named) if args.command == "critic" else (network(images), None)
        reading, flaws = answer
        return reading_loss(reading, batch) + (0 if flaws is None else flaw_loss(flaws, batch))

    fit(network, loss, args, lambda: save(network, args.out / f"{args.command}.safetensors"))


def main() -> None:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=ART)
    parser.add_argument("--art", type=Path, default=Path("~/.cache/vipo/art"), help="folder with one folder per vendor")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/vipo/flaws"), help="where the scenes are kept")
    parser.add_argument("--start", type=Path, help="weights to go on from, instead of random ones")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--scenes", type=int, default=12288)
    parser.add_argument("--grain", type=float, default=0.4, help="share of grainy pictures")
    parser.add_argument("--blur", type=float, default=0.12, help="share of pictures blurred as a whole")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.seed = SEEDS[args.command] if args.seed is None else args.seed
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
