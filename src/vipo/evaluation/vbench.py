"""VBench: sixteen dimensions to three totals, its result files, and the dimensions that need no network of its own.

Huang et al., "VBench: Comprehensive Benchmark Suite for Video Generative Models", CVPR 2024 (arXiv 2311.17982). With
s_d the score of dimension d, n_d = (s_d - min_d) / (max_d - min_d) and w_d its weight,

    Quality  = sum w_d n_d / sum w_d    over 7 dimensions, sum w_d = 6.5
    Semantic = sum w_d n_d / sum w_d    over 9 dimensions, sum w_d = 9
    Total    = (4 Quality + Semantic) / 5

The bounds and weights are the published ones (``scripts/constant.py`` and ``scripts/cal_final_score.py`` of
https://github.com/Vchitect/VBench). What VBench counts as 0 when a dimension is missing is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.types import Prompt, Reward

QUALITY_SHARE = 4 / 5

Features = Callable[[Float[Tensor, "B 3 Y X"]], Float[Tensor, "B D"]]


@dataclass(frozen=True)
class Dimension:
    """How one dimension enters its total: the raw scores that count as 0 and as 1, and its weight."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0

    def normalized(self, score: float) -> float:
        return (score - self.low) / (self.high - self.low)


QUALITY: Mapping[str, Dimension] = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
    "dynamic_degree": Dimension(weight=0.5),
}
SEMANTIC: Mapping[str, Dimension] = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
DIMENSIONS: Mapping[str, Dimension] = {**QUALITY, **SEMANTIC}


@dataclass(frozen=True)
class Totals:
    """Shares of 1; None where a dimension that it needs is missing."""

    quality: float | None
    semantic: float | None
    total: float | None
    missing: tuple[str, ...]  # dimensions without a score, in the order of the tables above


def total(quality: float, semantic: float) -> float:
    """The published total of two published totals, in whatever unit they are."""
    return QUALITY_SHARE * quality + (1 - QUALITY_SHARE) * semantic


def aggregate(scores: Mapping[str, float]) -> Totals:
    """The three totals from raw scores by dimension; a total that cannot be known is None, never computed from fewer.

    Raises:
        UserError: a name that is not a dimension.
    """
    unknown = [name for name in scores if name not in DIMENSIONS]
    if unknown:
        raise UserError(f"{', '.join(unknown)} are not VBench dimensions; they are {', '.join(DIMENSIONS)}")
    quality, semantic = _weighted(scores, QUALITY), _weighted(scores, SEMANTIC)
    both = None if quality is None or semantic is None else total(quality, semantic)
    return Totals(quality, semantic, both, tuple(name for name in DIMENSIONS if name not in scores))


def _weighted(scores: Mapping[str, float], group: Mapping[str, Dimension]) -> float | None:
    if any(name not in scores for name in group):
        return None
    weighted = sum(dimension.weight * dimension.normalized(scores[name]) for name, dimension in group.items())
    return weighted / sum(dimension.weight for dimension in group.values())


def read_results(paths: Iterable[Path]) -> dict[str, float]:
    """Raw scores by dimension from VBench's ``*_eval_results.json``; several files are one result.

    Such a file maps a dimension to [score, [one record per video]]. In folders, every ``*_eval_results.json`` is read.

    Raises:
        UserError: a file is missing, is not such a result, names no known dimension, or contradicts another one.
    """
    merged: dict[str, float] = {}
    for file in _files(paths):
        for name, score in _scores(file).items():
            if merged.setdefault(name, score) != score:
                raise UserError(
                    f"{str(file)!r} says {name} = {score:g}, another of the files says {merged[name]:g};"
                    " give the results of one model only"
                )
    return merged


def _files(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*_eval_results.json")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"folder {str(path)!r} has no *_eval_results.json; give the files that VBench wrote")
        found += inside
    return found


def _scores(file: Path) -> dict[str, float]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        scores = {name.replace(" ", "_"): float(entry[0]) for name, entry in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f"{str(file)!r} is not a VBench result, a JSON object of dimension: [score, [videos]] ({error})"
        ) from error
    odd = [name for name, score in scores.items() if name not in DIMENSIONS or not abs(score) < float("inf")]
    if odd or not scores:
        raise UserError(
            f"{str(file)!r} has no usable score for {', '.join(odd) or 'any dimension'};"
            f" VBench's dimensions are {', '.join(DIMENSIONS)}"
        )
    return scores


def temporal_flickering(media: Float[Tensor, "N 3 F Y X"]) -> Float[Tensor, " N"]:
    """1 - the mean absolute difference of successive 8-bit frames / 255; VBench takes videos that stand still.

    A picture (F = 1) has no score: NaN.
    """
    levels = media.float().clamp(0, 1).mul(255).round()
    change = levels.diff(dim=2).abs().mean((1, 3, 4)).mean(1)  # the mean of no frame pair is NaN
    return 1 - change / 255


def consistency(media: Float[Tensor, "N 3 F Y X"], features: Features) -> Float[Tensor, " N"]:
    """How much every frame's features are like the previous frame's and the first one's.

    With f_i the unit features of frame i, the mean over i = 2..F of (max(0, f_i . f_{i-1}) + max(0, f_i . f_1)) / 2,
    as in ``vbench/subject_consistency.py`` and ``vbench/background_consistency.py``. It is VBench's subject consistency
    with the [CLS] feature of DINO ViT-B/16 and its background consistency with the image embedding of CLIP ViT-B/32.
    A picture (F = 1) has no score: NaN.
    """
    frames = media.transpose(1, 2)
    seen = torch.nn.functional.normalize(features(frames.flatten(0, 1)).float(), dim=-1)
    seen = seen.unflatten(0, frames.shape[:2])
    before = (seen[:, 1:] * seen[:, :-1]).sum(-1).clamp(min=0)
    first = (seen[:, 1:] * seen[:, :1]).sum(-1).clamp(min=0)
    return ((before + first) / 2).mean(1)


def aesthetic_quality(media: Float[Tensor, "N 3 F Y X"], reward: Reward) -> Float[Tensor, " N"]:
    """A tenth of an aesthetic reward, averaged over the frames; VBench's own head is ``sa_0_4_vit_l_14_linear``."""
    frames = media.transpose(1, 2)
    each = reward(frames.flatten(0, 1).unsqueeze(2), [Prompt("")] * (frames.shape[0] * frames.shape[1]))
    return each.unflatten(0, frames.shape[:2]).mean(1) / 10


def table(scores: Mapping[str, float]) -> list[dict[str, str | float | None]]:
    """One row per dimension: its group, raw score, normalised score and weight; None where it is missing."""
    rows: list[dict[str, str | float | None]] = []
    groups: Sequence[tuple[str, Mapping[str, Dimension]]] = (("quality", QUALITY), ("semantic", SEMANTIC))
    for group, dimensions in groups:
        for name, dimension in dimensions.items():
            score = scores.get(name)
            normalized = None if score is None else dimension.normalized(score)
            row = {"dimension": name, "group": group, "score": score, "normalized": normalized}
            rows.append({**row, "weight": dimension.weight})
    return rows
