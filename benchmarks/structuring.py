"""What do maps cost? Ratios of medians, interleaved, in one run on one thread.

    python benchmarks/structuring.py [--rounds 5] [--device cpu]

First the components alone against other solvers, in core-seconds: all pictures in full (what an unsettled picture
costs), the same by double precision's eigenvectors alone, torch.pca_lowrank of 16 columns, and scikit-learn's PCA
picture by picture; on steep spectra (eigenvalues fall as 1/rank and 1/rank^2) and on a flat one (white features),
where each picture is tried and then solved in full.
"angle" is how far the third component is from the exact one, in radians.

Then batched maps against one scikit-learn PCA per picture. That needs scikit-learn, which vipo itself does not. Both
sides do PCA, orientation (one by one: distance from the border's median), aggregation, Gaussian smoothing and
upsampling to 32 x 32, the per-picture side through numpy and scipy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from vipo.structuring import allocation_map, components

LARGE_SHAPES = [(64, 384, 16, 16), (64, 1024, 37, 37)]
STEEPNESS = (1, 2, 0)
DISTINCT = 2  # pictures of which a batch consists, over and over
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
    """Of the processor's time, which others on the machine do not lengthen by taking turns; of the wall's on a GPU."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    start = clock()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start


def medians(contenders: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):  # the first round warms up
        for name, work in contenders.items():
            times[name].append(seconds(work, device))
    return {name: float(np.median(taken[1:])) for name, taken in times.items()}


def white(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def of_spectrum(shape: tuple[int, ...], steepness: int, device: str) -> Tensor:
    """A batch whose eigenvalues fall as rank ** -steepness; white ones for 0."""
    features = white((DISTINCT, *shape[1:]), device)
    if steepness:
        cells = features.flatten(2).double()
        left, singular, right = torch.linalg.svd(cells - cells.mean(2, keepdim=True), full_matrices=False)
        rank = torch.arange(1, singular.shape[1] + 1, device=features.device)
        features = ((left * rank ** (-steepness / 2)) @ right).reshape(features.shape).float()
    return features.repeat(shape[0] // DISTINCT, 1, 1, 1)


def angle(projections: Tensor, features: Tensor) -> float:
    """Of the third component (B, n, K) from the exact one, at worst over the batch's distinct pictures."""
    cells = features[:DISTINCT].flatten(2).double()
    exact = torch.linalg.svd(cells - cells.mean(2, keepdim=True), full_matrices=False).Vh[:, 2]
    found = projections[:DISTINCT, :, 2].double()
    found = found / found.norm(dim=1, keepdim=True)
    return float((found - exact * (exact * found).sum(1, keepdim=True)).norm(dim=1).max())


def with_sklearn(features: Tensor) -> Tensor:
    from sklearn.decomposition import PCA

    pictures = features.flatten(2).mT.cpu().numpy()
    return torch.from_numpy(np.stack([PCA(3, random_state=0).fit_transform(picture) for picture in pictures]))


def solvers(features: Tensor) -> dict[str, Callable[[], Tensor]]:
    cells = features.flatten(2)

    def low_rank(iterations: int) -> Tensor:
        torch.manual_seed(0)
        left, singular, _ = torch.pca_lowrank(cells.mT, q=16, niter=iterations)
        return left * singular[:, None]

    def in_full() -> Tensor:
        return components._in_parts(components._in_full, cells, 3).projections.mT

    def in_double() -> Tensor:
        with patch.object(components, "_all_vectors", components._in_own_precision):
            return in_full()

    return {
        "ours": lambda: components.principal_components(features, 3).projections.flatten(2).mT,
        "in full": in_full,
        "in full, in double throughout": in_double,
        "pca_lowrank, 4 iterations": lambda: low_rank(4),
        "pca_lowrank, 8 iterations": lambda: low_rank(8),
        "scikit-learn": lambda: with_sklearn(features),
    }


def components_alone(rounds: int, device: str) -> None:
    for shape in LARGE_SHAPES:
        for steepness in STEEPNESS:
            features = of_spectrum(shape, steepness, device)
            contenders = solvers(features)
            median = medians(contenders, rounds, device)
            for name, work in contenders.items():
                print(f"{shape}, 1/rank^{steepness}, {name}: {median[name]:.3f} s, angle {angle(work(), features):.0e}")


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
    try:
        components_alone(args.rounds, args.device)
        batched_against_one_by_one(args.rounds, args.device)
    except ImportError as error:
        raise SystemExit(f"this compares with scikit-learn and scipy; pip install them first ({error})") from error


if __name__ == "__main__":
    main()
