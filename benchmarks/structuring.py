"""How much faster are batched maps than one scikit-learn PCA per picture? Ratios, interleaved, in one run.

    python benchmarks/structuring.py [--rounds 5] [--device cpu]

Needs scikit-learn, which vipo itself does not. Both sides do PCA, orientation (one by one: distance from the border's
median), aggregation, Gaussian smoothing and upsampling to 32 x 32, the per-picture side through numpy and scipy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vipo.structuring import allocation_map

try:
    from scipy.ndimage import gaussian_filter, zoom
    from sklearn.decomposition import PCA
except ImportError as error:
    raise SystemExit(
        f"this benchmark compares with scikit-learn and scipy; pip install them first ({error})"
    ) from error

SHAPES = [(96, 112, 8, 8), (96, 112, 14, 14), (4, 1024, 37, 37)]
GRID = (32, 32)


def one_by_one(features: Tensor) -> list[np.ndarray]:
    """A map per picture through numpy, as scikit-learn and scipy offer it."""
    maps = []
    for picture in features.cpu().numpy():
        h, w = picture.shape[1:]
        pca = PCA(n_components=3)
        z = pca.fit_transform(picture.reshape(picture.shape[0], -1).T).reshape(h, w, 3)
        edge = np.ones((h, w), dtype=bool)
        edge[1:-1, 1:-1] = False
        distance = np.abs(z - np.median(z[edge], axis=0))
        distance /= distance.max((0, 1))
        structure = gaussian_filter((distance * pca.explained_variance_ratio_).sum(-1), 1.0)
        maps.append(zoom(structure, (GRID[0] / h, GRID[1] / w), order=1))
    return maps


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for shape in SHAPES:
        features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)
        contenders = {
            "border_distance": lambda f=features: allocation_map(f, GRID, orientation="border_distance"),
            "background": lambda f=features: allocation_map(f, GRID, orientation="background"),
            "scikit-learn": lambda f=features: one_by_one(f),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds + 1):  # the first round warms up
            for name, work in contenders.items():
                times[name].append(seconds(work, args.device))
        median = {name: float(np.median(taken[1:])) for name, taken in times.items()}
        ratios = ", ".join(f"{name} {median['scikit-learn'] / median[name]:.2f}" for name in list(contenders)[:2])
        print(f"{shape}: times as fast as scikit-learn one by one: {ratios}", flush=True)


if __name__ == "__main__":
    main()
