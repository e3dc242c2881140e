"""How far a training moved the weights: the Frobenius norm of its LoRA's products B A, over all layers.

    cd runs/claims; python ../../experiments/claims/moved.py sample-rate-1e-3-0.safetensors

B is zero before training, so the product is the whole change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file


def moved(file: Path) -> float:
    weights = load_file(file)
    products = [weights[name.replace("lora_A", "lora_B")] @ weights[name] for name in weights if "lora_A" in name]
    return float(sum(product.square().sum() for product in products) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="weights that arms ended with")
    for file in parser.parse_args().files:
        print(f"{moved(file):.2f}  {file}")


if __name__ == "__main__":
    main()
