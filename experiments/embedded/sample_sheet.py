"""Write a sheet of samples of a pipeline folder, one row per prompt, and time the sampling of 96 pictures."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

from common import SHIPPED
from vipo.embedded import PICTURE_SIZE, PROMPT_TOKENS, VOCABULARY, make_caption

PAIRS = (("cat", "apple", "left"), ("sun", "tree", "above"), ("car", "heart", "left"), ("moon", "fish", "above"))


def sheet_prompts(rows: int) -> list[str]:
    """One-object prompts over all objects, then two-object prompts, then one of three: ``rows`` in all."""
    grounds = VOCABULARY.ground_names
    singles = [make_caption([n], None, grounds[i % len(grounds)]) for i, n in enumerate(VOCABULARY.names)]
    doubles = [make_caption([a, b], r, grounds[(3 * i) % len(grounds)]) for i, (a, b, r) in enumerate(PAIRS)]
    extra = [*doubles, make_caption(["cat", "banana", "ball"], None, "teal")]
    return (singles + extra)[:rows]


def sample(
    pipeline: FluxPipeline, prompts: list[str], steps: int, guidance: float, seed: int, true_cfg: float = 1.0
) -> np.ndarray:
    """Sample one picture per prompt: uint8 (n, 64, 64, 3). ``true_cfg`` above 1 guides with two forward passes."""
    pixels = pipeline(
        prompts,
        negative_prompt=[""] * len(prompts) if true_cfg > 1 else None,
        true_cfg_scale=true_cfg,
        height=PICTURE_SIZE,
        width=PICTURE_SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=PROMPT_TOKENS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return (np.asarray(pixels) * 255).round().astype(np.uint8)


def tile(pictures: np.ndarray, columns: int, scale: int) -> Image.Image:
    """Tile pictures (n, H, W, 3) row by row and enlarge them."""
    pictures = np.pad(pictures, ((0, -len(pictures) % columns), (0, 0), (0, 0), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(pictures[i : i + columns]), axis=1) for i in range(0, len(pictures), columns)]
    picture = Image.fromarray(np.concatenate(rows))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=SHIPPED)
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    parser.add_argument("--rows", type=int, default=33)
    parser.add_argument("--each", type=int, default=3, help="pictures per prompt")
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--true-cfg", type=float, default=1.0, help="for stage 1, together with --guidance 1")
    parser.add_argument("--shift", type=float, default=None, help="override the scheduler's shift")
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipeline = FluxPipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    if args.shift is not None:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=args.shift)
    prompts = [prompt for prompt in sheet_prompts(args.rows) for _ in range(args.each)]
    started = time.time()
    pictures = sample(pipeline, prompts, args.steps, args.guidance, args.seed, args.true_cfg)
    print(f"{len(pictures)} pictures in {time.time() - started:.2f} s")
    tile(pictures, args.columns, args.scale).save(args.out)


if __name__ == "__main__":
    main()
