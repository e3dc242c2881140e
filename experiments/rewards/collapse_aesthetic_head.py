"""Collapse LAION's aesthetic head into the 769 numbers that ship with the package.

python collapse_aesthetic_head.py sac+logos+ava1-l14-linearMSE.pth

The published file is in the git repository christophschuhmann/improved-aesthetic-predictor (Apache-2.0).
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from vipo.files import written_whole
from vipo.rewards.aesthetic import SHIPPED_HEAD
from vipo.rewards.linear_head import affine_head
from vipo.rewards.pretrained import read_tensors

NOTICE = {
    "source": "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    "file": "sac+logos+ava1-l14-linearMSE.pth",
    "licence": "Apache-2.0",
    "changed": "its five linear layers collapsed into one",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path)
    parser.add_argument("--output", type=Path, default=SHIPPED_HEAD)
    arguments = parser.parse_args()
    weight, bias = affine_head("aesthetic", arguments.published, read_tensors("aesthetic", arguments.published))
    sha256 = hashlib.sha256(arguments.published.read_bytes()).hexdigest()
    tensors = {"weight": weight[None].contiguous(), "bias": torch.tensor([bias])}
    with written_whole(arguments.output) as aside:
        save_file(tensors, aside, metadata={**NOTICE, "sha256": sha256})
    print(f"{arguments.output}: |w| = {float(weight.norm()):.4f}, b = {bias:.4f}, from sha256 {sha256}")


if __name__ == "__main__":
    main()
