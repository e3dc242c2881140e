"""What do maps cost? Ratios of medians, interleaved, in one run on one thread.

    python benchmarks/structuring.py [--rounds 5] [--device cpu]

First the residual check, with it over without it: on a steep spectrum (eigenvalues fall as 1/rank), where all that it
adds is the check, and on a flat one (white features), where each picture is then solved in full.

Then batched maps against one scikit-learn PCA per picture. That needs scikit-learn, which vipo itself does not. Both
sides do PCA, orientation (one by one: distance from the border's median), aggregation, Gaussian smoothing and
upsampling to 32 x 32, the per-picture side through numpy and scipy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vipo.structuring import allocation_map, components

LARGE_SHAPES = [(16, 320, 17, 17), (4, 768, 37, 37), (4, 1024, 37, 37)]
SHAPES = [(96, 112, 8, 8), (96, 112, 14, 14), (4, 1024, 37, 37)]
GRID = (32, 32)


def one_by_one(features: Tensor) -> list[np.ndarray]:
    """A map per picture through numpy, as scikit-learn and scipy offer it."""
    from scipy.ndimage import gaussian_filter, zoom
    from sklearn.decomposition import PCA

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


def medians(contenders: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):  # the first round warms up
        for name, work in contenders.items():
            times[name].append(seconds(work, device))
    return {name: float(np.median(taken[1:])) for name, taken in times.items()}


def white(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def steep(features: Tensor) -> Tensor:
    """The same axes, with eigenvalues that fall as 1 / rank."""
    cells = features.flatten(2)
    left, singular, right = torch.linalg.svd(cells - cells.mean(2, keepdim=True), full_matrices=False)
    rank = torch.arange(1, singular.shape[1] + 1, device=features.device)
    return ((left * rank**-0.5) @ right).reshape(features.shape)


def without_check(features: Tensor) -> Tensor:
    check, components._settled = components._settled, _believed
    try:
        return allocation_map(features, GRID)
    finally:
        components._settled = check


def _believed(matrix: Tensor, *_: Tensor) -> Tensor:
    return torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)


def check_against_none(rounds: int, device: str) -> None:
    for shape in LARGE_SHAPES:
        flat = white(shape, device)
        for name, features in {"steep": steep(flat), "flat": flat}.items():
            contenders = {
                "with": lambda f=features: allocation_map(f, GRID),
                "without": lambda f=features: without_check(f),
            }
            median = medians(contenders, rounds, device)
            ratio = median["with"] / median["without"]
            print(f"{shape}, {name} spectrum: the check makes maps take {ratio:.3f} times as long", flush=True)


def batched_against_one_by_one(rounds: int, device: str) -> None:
    for shape in SHAPES:
        features = white(shape, device)
        contenders = {
            "border_distance": lambda f=features: allocation_map(f, GRID, orientation="border_distance"),
            "background": lambda f=features: allocation_map(f, GRID, orientation="background"),
            "scikit-learn": lambda f=features: one_by_one(f),
        }
        median = medians(contenders, rounds, device)
        ratios = ", ".join(f"{name} {median['scikit-learn'] / median[name]:.2f}" for name in list(contenders)[:2])
        print(f"{shape}: times as fast as scikit-learn one by one: {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check_against_none(args.rounds, args.device)
    try:
        batched_against_one_by_one(args.rounds, args.device)
    except ImportError as error:
        raise SystemExit(f"the rest compares with scikit-learn and scipy; pip install them first ({error})") from error


if __name__ == "__main__":
    main()
