"""Score samples of a pipeline folder with the three judges, for several shifts of the noise schedule."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from common import SHIPPED
from sample_sheet import sample
from vipo.embedded import VOCABULARY, parse_caption, prompts
from vipo.rewards.embedded import EmojiJudge, EmojiLayout, EmojiMatch
from vipo.types import Prompt


def found_shares(probabilities: torch.Tensor, captions: list[str]) -> tuple[float, float]:
    """Of probabilities (n, K): share of named objects above one half, and of one-object pictures ranked right first."""
    found, first = [], []
    for row, caption in zip(probabilities, captions, strict=True):
        names = parse_caption(caption)[0]
        index = [VOCABULARY.names.index(name) for name in names]
        found += [bool(row[i] > 0.5) for i in index]
        if len(names) == 1:
            first.append(int(row.argmax()) == index[0])
    return float(np.mean(found)), float(np.mean(first))


def measure(pipeline: FluxPipeline, captions: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Sample every caption and return the judges' means."""
    pictures = sample(pipeline, captions, args.steps, args.guidance, args.seed)
    media = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255)[:, :, None]
    asked = [Prompt(text) for text in captions]
    judge = EmojiJudge()
    found, first = found_shares(judge.probabilities(media[:, :, 0]), captions)
    scores = {type(scorer).__name__: scorer(media, asked).mean().item() for scorer in (EmojiMatch(), EmojiLayout())}
    return {"judge": judge(media, asked).mean().item(), "found": found, "first of 28": first} | scores


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=SHIPPED)
    parser.add_argument("--shifts", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipeline = FluxPipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    captions = [caption for caption in prompts("eval") for _ in range(args.each)]
    for shift in args.shifts:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=shift)
        figures = measure(pipeline, captions, args)
        print(f"shift {shift}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
