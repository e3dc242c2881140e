"""Stage 2: guidance distillation, as FLUX.1-dev had: one forward pass that already contains the guidance.

The teacher is the averaged stage-1 model. The student sees the guidance scale w ~ U(1, 5) through its guidance
embedder and learns uncond + w (cond - uncond). The text encoders stay as they are; captions are never empty here.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from common import DEFAULT_ART, DEFAULT_WORK, Average, Log, save_checkpoint, trapezoid
from export_pipeline import load_weights
from latents import Batch, LatentPool
from loop import update
from model import Generator


@torch.no_grad()
def guided_velocity(
    teacher: nn.Module, noisy: Tensor, t: Tensor, batch: Batch, empty: list[Tensor], w: Tensor
) -> Tensor:
    """The teacher's velocity (b, 64, 16) with classifier-free guidance of scale w (b,)."""
    ones = torch.ones_like(t)
    conditional = teacher(noisy, t, ones, batch.clip_ids, batch.t5_ids)
    blank = [ids.expand(len(t), -1) for ids in empty]
    unconditional = teacher(noisy, t, ones, *blank)
    return torch.lerp(unconditional.float(), conditional.float(), w[:, None, None])


def distillation_loss(student: nn.Module, teacher: nn.Module, pool: LatentPool, args: argparse.Namespace) -> Tensor:
    """Squared error between the student with the embedded scale and the guided teacher."""
    batch = pool.draw(args.batch, 0.0)
    noise = torch.randn_like(batch.clean)
    t = torch.sigmoid(torch.randn(args.batch) * 1.2 + 0.2)
    w = 1.0 + (args.max_guidance - 1.0) * torch.rand(args.batch)
    noisy = torch.lerp(batch.clean, noise, t[:, None, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = guided_velocity(teacher, noisy, t, batch, pool.empty, w)
        predicted = student(noisy, t, w, batch.clip_ids, batch.t5_ids)
    return (predicted.float() - target).square().mean()


def run(args: argparse.Namespace, work: Path, student: Generator, pool: LatentPool, log: Log) -> None:
    """Train the student's transformer for the wall-clock budget; save its average at intervals and at the end."""
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    student.text_encoder.requires_grad_(False)
    student.text_encoder_2.requires_grad_(False)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    optimizer.param_groups[0]["peak"] = args.lr
    average, step, smooth, start = Average(student, 0.99), 0, 0.0, time.time()
    while (elapsed := time.time() - start) < args.seconds:
        factor = min(1.0, (step + 1) / 30) * trapezoid(elapsed, args.seconds, 1.0, 0.7)
        loss = distillation_loss(student, teacher, pool, args)
        update(loss, parameters, [optimizer], factor)
        average.update(student, step)
        smooth = loss.item() if step == 0 else 0.97 * smooth + 0.03 * loss.item()
        step += 1
        if step % 50 == 0:
            log(f"distill step {step} samples {step * args.batch} loss {smooth:.4f}")
        if step % 200 == 0:
            _save(work / args.out, average, step, smooth)
    _save(work / args.out, average, step, smooth)
    log(f"distill done: {step} steps, {step * args.batch} samples, loss {smooth:.4f}")


def _save(file: Path, average: Average, step: int, loss: float) -> None:
    """Write the averaged student under the names that export_pipeline.py reads."""
    tensors = {f"average.{name}": value for name, value in average.values.items()}
    save_checkpoint(file, tensors, {"step": step, "loss": loss})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=DEFAULT_ART)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--checkpoint", default="flux.safetensors", help="stage-1 checkpoint in the work folder")
    parser.add_argument("--out", default="distilled.safetensors")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--max-guidance", type=float, default=5.0)
    parser.add_argument("--pool", type=int, default=8_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work = args.work.expanduser()
    student = Generator()
    load_weights(student, work / args.checkpoint)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    pool = LatentPool(args.art, vae, student, args.pool, args.seed + 100)
    pool.fill(args.pool)
    run(args, work, student, pool, Log(work / "distill.log"))


if __name__ == "__main__":
    main()
