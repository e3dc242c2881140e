"""What a reward may destroy: structure kept against the untrained model's picture of the same noise, and diversity.

All numbers are per prompt, the mean over its pictures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.backbones.efficientnet_lite import EfficientNetLite
from vipo.evaluation.records import Scored

RESOLUTION = 128


def edges(images: Tensor) -> Tensor:
    """Size of the luma's gradient (Sobel), (B, Y, X)."""
    luma = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernel = torch.stack([across, across.T])[:, None]
    return F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernel).norm(dim=1)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row, (B,); 0 where a row is constant."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (first, second))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-8)


def features(images: Tensor) -> Tensor:
    """What an ImageNet network sees in each picture, (B, D), of length 1."""
    backbone = EfficientNetLite(stride=32, resolution=RESOLUTION)
    return F.normalize(backbone(images).features.flatten(2).mean(2), dim=1)


def structure(untrained: Scored, now: Scored) -> dict[str, list[float]]:
    """``edges_kept``: correlation of edges; ``features_kept``: cosine of features; ``diversity``: 1 - mean cosine of
    the features of a prompt's pictures.
    """
    count = now.samples_per_prompt
    before, after = untrained.media[:, :, 0], now.media[:, :, 0]
    seen, saw = features(after), features(before)
    grouped = seen.unflatten(0, (-1, count))
    likeness = grouped @ grouped.mT  # (P, n, n), ones on the diagonal
    apart = 1 - (likeness.sum((1, 2)) - count) / max(count * (count - 1), 1)
    return {
        "edges_kept": _means(correlation(edges(before), edges(after)), count),
        "features_kept": _means((seen * saw).sum(1), count),
        "diversity": [round(v, 5) for v in apart.tolist()],
    }


def _means(values: Tensor, count: int) -> list[float]:
    return [round(v, 5) for v in values.unflatten(0, (-1, count)).mean(1).tolist()]
