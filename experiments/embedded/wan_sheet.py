"""Write a sheet of clips of a WanPipeline folder, one clip a row (every second frame), and time the sampling."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image

from common import SHIPPED
from vipo.embedded import PICTURE_SIZE, PROMPT_TOKENS, clips


def sheet_prompts(rows: int) -> list[str]:
    """Every thing with changing motions and grounds."""
    motions, grounds = list(clips.MOTIONS), clips.GROUNDS
    each = [(name, k) for k in range(len(motions)) for name in clips.OBJECTS]
    chosen = [(n, motions[(i + k) % len(motions)], grounds[(i + k) % len(grounds)]) for i, (n, k) in enumerate(each)]
    return [clips.make_clip_caption(*claims) for claims in chosen[:rows]]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=SHIPPED.with_name("emoji-wan"))
    parser.add_argument("--out", type=Path, default=Path("clips.png"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--shift", type=float, default=None, help="override the scheduler's shift")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipeline = WanPipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if args.shift is not None:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=args.shift)
    prompts, started = sheet_prompts(args.rows), time.time()
    media = pipeline(
        prompts,
        height=PICTURE_SIZE,
        width=PICTURE_SIZE,
        num_frames=clips.FRAMES,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        max_sequence_length=PROMPT_TOKENS,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="np",
    ).frames
    print(f"{len(media)} clips in {time.time() - started:.2f} s", *prompts, sep="\n")
    rows = [np.concatenate(list(clip[::2]), axis=1) for clip in np.asarray(media)]
    sheet = (np.concatenate(rows) * 255).round().astype(np.uint8)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(args.out)


if __name__ == "__main__":
    main()
