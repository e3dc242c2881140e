"""Export a checkpoint of train_wan.py as a WanPipeline folder with half-precision safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import AutoencoderKLWan

from common import SHIPPED, WAN_WORK
from export_pipeline import export, load_weights
from wan_model import Generator, assemble


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WAN_WORK)
    parser.add_argument("--checkpoint", default="wan.safetensors", help="file name inside the work folder")
    parser.add_argument("--vae", default="vae", help="autoencoder folder inside the work folder")
    parser.add_argument("--live", action="store_true", help="the live weights instead of their average")
    parser.add_argument("--out", type=Path, default=SHIPPED.with_name("emoji-wan"))
    parser.add_argument("--shift", type=float, default=3.0)
    args = parser.parse_args()
    work, generator = args.work.expanduser(), Generator()
    notes = load_weights(generator, work / args.checkpoint, averaged=not args.live)
    vae = AutoencoderKLWan.from_pretrained(work / args.vae)
    size = export(assemble(generator.float().eval(), vae.eval(), args.shift), args.out)
    print(f"{args.out}: {size / 1e6:.2f} MB; {notes}")


if __name__ == "__main__":
    main()
