"""The training loop of the embedded generators: a wall-clock budget, an average, checkpoints that a cut run resumes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common import Average, Log, load_checkpoint, optimizer_tensors, restore_optimizers, save_checkpoint, trapezoid


def build_optimizers(generator: nn.Module, kind: str, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""
    named = [(n, p) for n, p in generator.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if kind == "muon" and p.ndim == 2 and "blocks" in n and ".linear." not in n]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, foreach=True)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        )
    for optimizer in optimizers:
        optimizer.param_groups[0]["peak"] = lr
    return optimizers


def checkpoint_tensors(generator: nn.Module, average: Average, optimizers: list[torch.optim.Optimizer]) -> dict:
    """Everything a resumed run or an export needs, under flat names."""
    live = {f"live.{name}": p for name, p in generator.named_parameters()}
    return live | {f"average.{name}": v for name, v in average.values.items()} | optimizer_tensors(optimizers)


def restore(file: Path, generator: nn.Module, average: Average, optimizers: list[torch.optim.Optimizer]) -> dict:
    """Load a checkpoint into all parts; returns its notes (step, elapsed seconds, loss)."""
    tensors, notes = load_checkpoint(file)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.copy_(tensors[f"live.{name}"])
            average.values[name].copy_(tensors[f"average.{name}"])
    restore_optimizers(optimizers, tensors)
    return notes


def update(loss: Tensor, parameters: list[Tensor], optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """One optimizer step at this share of the peak learning rates, with gradients clipped to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        group = optimizer.param_groups[0]
        group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run(
    args: argparse.Namespace,
    file: Path,
    generator: nn.Module,
    loss_at: Callable[[float], Tensor],
    refresh: Callable[[], None],
    log: Log,
) -> None:
    """Draw, step, average, refresh the data, report and save; ``loss_at`` is given the share of the budget spent."""
    parameters = list(generator.parameters())
    optimizers, average = build_optimizers(generator, args.optimizer, args.lr), Average(generator, args.decay)
    step, before, smooth = 0, 0.0, 1.0
    if args.resume and file.is_file():
        notes = restore(file, generator, average, optimizers)
        step, before, smooth = int(notes["step"]), notes["elapsed"], notes["loss"]
    start = saved = time.time()
    while (elapsed := before + time.time() - start) < args.seconds:
        factor = min(1.0, (step + 1) / args.warmup) * trapezoid(elapsed, args.seconds, 1.0, args.cooldown)
        loss = loss_at(elapsed / args.seconds)
        update(loss, parameters, optimizers, factor)
        average.update(generator, step)
        smooth = torch.lerp(torch.tensor(smooth), loss.detach(), max(0.01, 1 / (step + 1))).item()
        step += 1
        if step % args.refresh_every == 0:
            refresh()
        if step % 100 == 0:
            log(f"step {step} samples {step * args.batch} elapsed {elapsed:.0f} loss {smooth:.4f} lr x{factor:.3f}")
        if time.time() - saved > args.save_every or elapsed > args.seconds - 1:
            _save(file, generator, average, optimizers, {"step": step, "elapsed": elapsed, "loss": smooth})
            saved = time.time()
    _save(file, generator, average, optimizers, {"step": step, "elapsed": elapsed, "loss": smooth})
    log(f"done: {step} steps, {step * args.batch} samples, loss {smooth:.4f}")


def _save(file: Path, generator: nn.Module, average: Average, optimizers: list, notes: dict[str, float]) -> None:
    """Write the checkpoint."""
    save_checkpoint(file, checkpoint_tensors(generator, average, optimizers), notes)


def add_options(parser: argparse.ArgumentParser, *, seconds: float, batch: int) -> None:
    """The loop's command line options."""
    parser.add_argument("--seconds", type=float, default=seconds, help="whole budget, over all resumed parts")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--cooldown", type=float, default=0.5, help="share of the budget in which the rate falls")
    parser.add_argument("--decay", type=float, default=0.998)
    parser.add_argument("--drop", type=float, default=0.1, help="share of captions that are emptied")
    parser.add_argument("--refresh-every", type=int, default=4, help="steps between additions of fresh scenes")
    parser.add_argument("--save-every", type=float, default=150.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
