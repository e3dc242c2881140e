"""Train and measure the three embedded scorers. Each step takes minutes on one CPU thread.

python fetch_art.py && python judge_art.py           # the drawings
python train_judges.py match                         # head of emoji_match, on Noto
python train_judges.py judge                         # emoji_judge, from scratch, never Noto
python train_judges.py layout                        # emoji_layout, from scratch, never Noto
python train_judges.py evaluate                      # every number of the card, on fresh scenes
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from judge_art import VENDORS
from judge_data import Batch, SceneSource, scramble
from judge_measure import measure
from vipo.embedded import VOCABULARY
from vipo.files import written_whole
from vipo.rewards.embedded import MATCH_RESOLUTION
from vipo.rewards.embedded_networks import JudgeNetwork, LayoutNetwork, MatchHead
from vipo.vision.efficientnet_lite import FoldedTrunk, load_unfolded, to_input
from vipo.vision.frozen import freeze
from vipo.vision.preprocess import resize

SHIPPED = Path(__file__).resolve().parents[2] / "src" / "vipo" / "embedded" / "judges"
OBJECTS = len(VOCABULARY.names)
SMOOTHING = 0.03
"""Targets lie in [SMOOTHING, 1 - SMOOTHING]: a scorer that is never certain keeps a slope to climb."""


def save(network: nn.Module, file: Path) -> None:
    """Write a network's tensors as float16 safetensors, whole or not at all, with the vocabulary it was trained on."""
    tensors = {
        name: t.detach().half().contiguous() for name, t in network.state_dict().items() if t.is_floating_point()
    }
    with written_whole(file) as aside:
        save_file(tensors, aside, metadata={"objects": json.dumps(list(VOCABULARY.names))})


def presence_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Smoothed cross-entropy of presence (b, K) where presence is known; positives count threefold."""
    target = batch.present.clamp(SMOOTHING, 1 - SMOOTHING)
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return (loss * batch.known * (1 + 2 * batch.present)).sum(1).mean()


def cell_loss(logits: Tensor, coverage: Tensor) -> Tensor:
    """Cross-entropy of what each cell shows; a cell covered by half counts as showing the object. (b, K, 8, 8)."""
    target = (2 * coverage).clamp(0, 1)
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").sum(1).mean()


def layout_loss(log_probs: Tensor, coverage: Tensor) -> Tensor:
    """Cross-entropy against the shares of each cell that objects and background take. (b, K + 1, 8, 8)."""
    background = (1 - coverage.sum(1, keepdim=True)).clamp_min(0)
    shares = torch.cat([coverage, background], dim=1)
    shares = shares / shares.sum(1, keepdim=True)
    weight = 1 + 2 * (1 - background)
    return -(shares * log_probs * weight).sum(1).mean()


def fit(network: nn.Module, loss_of: Callable[[], Tensor], args: argparse.Namespace, keep: Callable[[], None]) -> None:
    """AdamW with a one-cycle schedule over ``args.steps``; ``keep`` is called now and then and at the end."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.15)
    start, running = time.time(), 0.0
    network.train()
    for step in range(1, args.steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        running = 0.95 * running + 0.05 * float(loss.detach()) if step > 1 else float(loss.detach())
        if step % 50 == 0 or step == args.steps:
            print(f"[{time.time() - start:6.1f}s] step {step}/{args.steps} loss {running:.4f}", flush=True)
        if step % 200 == 0 or step == args.steps:
            keep()


def train_from_scratch(
    args: argparse.Namespace, network: nn.Module, loss_of: Callable[[Tensor, Batch], Tensor]
) -> None:
    """Fresh augmented scenes at every step; bfloat16 arithmetic, float32 weights."""
    torch.manual_seed(args.seed)
    source = SceneSource(args.art, args.vendors, args.seed)
    if args.start is not None:
        network.load_state_dict({name: t.float() for name, t in load_file(args.start).items()}, strict=False)
    network.to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        batch = source.batch(args.batch)
        with torch.autocast("cpu", torch.bfloat16):
            output = network(batch.images.contiguous(memory_format=torch.channels_last))
        return loss_of(output.float(), batch)

    fit(network, loss, args, lambda: save(network, args.out / f"{args.command}.safetensors"))


def train_judge(args: argparse.Namespace) -> None:
    """emoji_judge: presence and cells."""
    torch.manual_seed(args.seed)
    network = JudgeNetwork(OBJECTS)
    nn.init.constant_(network.out.bias, -5.0)
    train_from_scratch(
        args,
        network,
        lambda logits, batch: presence_loss(network.presence(logits), batch) + 2 * cell_loss(logits, batch.coverage),
    )


def train_layout(args: argparse.Namespace) -> None:
    """emoji_layout: cells only."""
    torch.manual_seed(args.seed)
    train_from_scratch(args, LayoutNetwork(OBJECTS), lambda output, batch: layout_loss(output, batch.coverage))


@torch.no_grad()
def match_features(args: argparse.Namespace) -> tuple[Tensor, Tensor, Batch]:
    """The frozen trunk's features of ``args.scenes`` augmented Noto scenes, float16, and their labels."""
    source = SceneSource(args.art, ("google",), args.seed)
    trunk = freeze(FoldedTrunk(load_unfolded(), 32))
    generator = torch.Generator().manual_seed(args.seed)
    fine, coarse, batches, start = [], [], [], time.time()
    for done in range(0, args.scenes, 64):
        batch = scramble(source.batch(64, hard_share=0.3, strength=0.5), 0.25, generator)
        for part in to_input(resize(batch.images, (MATCH_RESOLUTION, MATCH_RESOLUTION))).split(16):
            *_, features16, features32 = trunk.stages(part)
            fine.append(features16.half())
            coarse.append(features32.half())
        batches.append(Batch(torch.empty(64, 0), batch.coverage.half(), batch.present, batch.known))
        if done % 2048 == 0:
            print(f"[{time.time() - start:6.1f}s] {done + 64} scenes", flush=True)
    fields = ("images", "coverage", "present", "known")
    labels = Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in fields})
    return torch.cat(fine), torch.cat(coarse), labels


def train_match(args: argparse.Namespace) -> None:
    """Head of emoji_match on precomputed features."""
    torch.manual_seed(args.seed)
    fine, coarse, labels = match_features(args)
    head = MatchHead(OBJECTS)
    nn.init.constant_(head.out.bias, -5.0)

    def loss() -> Tensor:
        rows = torch.randint(len(fine), (args.batch,))
        batch = Batch(labels.images[rows], labels.coverage[rows].float(), labels.present[rows], labels.known[rows])
        logits = head(fine[rows].float(), coarse[rows].float())
        return presence_loss(head.presence(logits), batch) + 2 * cell_loss(logits, batch.coverage)

    fit(head, loss, args, lambda: save(head, args.out / "match.safetensors"))


def evaluate(args: argparse.Namespace) -> None:
    """Print every number of the card as JSON."""
    print(json.dumps(measure(args.art, args.scenes, args.seed, args.judges), indent=2))


COMMANDS = {
    "match": (train_match, {"lr": 2e-3, "steps": 1500, "scenes": 16384}),
    "judge": (train_judge, {"lr": 3e-3, "steps": 800, "scenes": 0}),
    "layout": (train_layout, {"lr": 3e-3, "steps": 600, "scenes": 0}),
    "evaluate": (evaluate, {"lr": 0.0, "steps": 0, "scenes": 512}),
}


def main() -> None:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--art", type=Path, default=Path("~/.cache/vipo/art"), help="folder with one folder per vendor")
    parser.add_argument("--vendors", nargs="+", default=list(VENDORS), help="whose drawings the from-scratch nets see")
    parser.add_argument("--start", type=Path, help="weights of judge or layout to go on from, instead of random ones")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--judges", nargs="+", default=["emoji_match", "emoji_judge", "emoji_layout"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if "google" in args.vendors:
        parser.error("the judges must not see Noto (google), which the generator draws")
    command, defaults = COMMANDS[args.command]
    for name, value in (defaults | {"seed": 100 + list(COMMANDS).index(args.command)}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    torch.set_num_threads(args.threads)
    command(args)


if __name__ == "__main__":
    main()
