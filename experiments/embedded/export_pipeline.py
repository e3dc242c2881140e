"""Export a checkpoint (or random weights) as a FluxPipeline folder with half-precision safetensors.

The transformer and the autoencoder are written in float16. The text encoders are tiny and stay in float32, so that a
plain ``from_pretrained(folder)`` gives one common type whatever the library's defaults are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from common import DEFAULT_WORK, SHIPPED, load_checkpoint
from model import Generator, assemble, folder_bytes
from vipo.files import write_text, written_whole


def load_weights(generator: nn.Module, file: Path, averaged: bool = True) -> dict[str, float]:
    """Load a checkpoint's (averaged) weights into the generator; returns the checkpoint's notes."""
    tensors, notes = load_checkpoint(file)
    prefix = "average." if averaged else "live."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    missing, unexpected = generator.load_state_dict(weights, strict=False)
    untied = [name for name in missing if not name.endswith("encoder.embed_tokens.weight")]
    if untied or unexpected:
        raise ValueError(f"checkpoint does not fit: missing {missing}, unexpected {unexpected}")
    return notes


@torch.no_grad()
def ignore_guidance(generator: Generator) -> None:
    """Make every guidance scale act like the 1.0 that stage 1 was trained with (for exports before distillation)."""
    embedder = generator.transformer.time_text_embed
    first = embedder.guidance_embedder.linear_1
    at_one = first(embedder.time_proj(torch.tensor([1000.0])))[0]
    first.weight.zero_()
    first.bias.copy_(at_one)


def export(pipeline: DiffusionPipeline, folder: Path) -> int:
    """Write the pipeline folder, keeping a README.md that is already there; returns its size in bytes."""
    pipeline.transformer.half()
    pipeline.vae.half()
    with written_whole(folder) as aside:
        pipeline.save_pretrained(aside)
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", aside / "README.md")
        config = json.loads((aside / "vae" / "config.json").read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # the folder it was loaded from is nobody's business
        write_text(aside / "vae" / "config.json", json.dumps(config, indent=2) + "\n")
    return folder_bytes(folder)


def main() -> None:
    """Command line: ``python export_pipeline.py --checkpoint flux.safetensors`` or ``--random``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--checkpoint", default="flux.safetensors", help="file name inside the work folder")
    parser.add_argument("--vae", default="vae", help="autoencoder folder inside the work folder")
    parser.add_argument("--random", action="store_true", help="random weights of the final architecture")
    parser.add_argument("--ignore-guidance", action="store_true", help="for stage 1: any guidance scale acts like 1.0")
    parser.add_argument("--live", action="store_true", help="the live weights instead of their average")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--shift", type=float, default=2.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    work, generator = args.work.expanduser(), Generator()
    if args.random:
        from train_autoencoder import build_autoencoder

        vae, notes = build_autoencoder(), {}
    else:
        vae = AutoencoderKL.from_pretrained(work / args.vae)
        notes = load_weights(generator, work / args.checkpoint, averaged=not args.live)
    if args.ignore_guidance:
        ignore_guidance(generator)
    size = export(assemble(generator.float().eval(), vae.eval(), args.shift), args.out)
    print(f"{args.out}: {size / 1e6:.2f} MB; {notes}")


if __name__ == "__main__":
    main()
