"""Where a reward found what it scored: what it says beside its scores, checked and laid on the latent grid.

Evidence is a number in [-1, 1] per position, higher is better as with a score: above 0 where the sample earned its
score, below 0 where it is at fault, 0 where there is nothing to say. Whoever measures faults alone returns minus them.

A judge behind a server may also answer with boxes. Those of one kind become (BoxFlow-GRPO, arXiv 2606.06113)

    W(p) = max over the boxes b of  s_b * share of p that b covers,      s_b in [0, 1] the box's score
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.structuring.frames import align_frames
from vipo.structuring.maps import resample
from vipo.types import LatentGrid

Box = tuple[float, float, float, float, float]  # x0, y0, x1, y1 in shares of the picture's sides, and a score
OVERSHOOT = 1e-3  # beyond [-1, 1]: what half precision makes of 1
SHAPE = "(N, T, H, W)"


@dataclass(frozen=True)
class EvidenceGrid:
    """Whose evidence is asked for, and where it is laid.

    Args:
        weights: c of each reward with evidence, see :mod:`vipo.training.credit`.
        grid: of the latents.
        temporal_stride: pixel frames per latent frame (causal, as in ``align_frames``).
    """

    weights: Mapping[str, float]
    grid: LatentGrid
    temporal_stride: int = 1

    def lay(
        self, name: str, evidence: Mapping[int, Tensor], media: Float[Tensor, "N 3 F Y X"]
    ) -> Float[Tensor, "N T H W"]:
        """Evidence by sample on the latent grid, beside the media; NaN for samples without any.

        Args:
            name: of the reward, for messages.

        Raises:
            UserError: it has neither one frame, nor as many as the media, nor as the latents.
        """
        laid = torch.full((len(media), *self.grid), torch.nan, device=media.device)
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, values in evidence.items():
            alike.setdefault(tuple(values.shape), []).append(row)
        for rows in alike.values():
            found = resample(torch.stack([evidence[row].to(media.device) for row in rows]), self.grid[1:])
            laid[torch.tensor(rows, device=media.device)] = self._aligned(name, found, media.shape[2])
        return laid

    def _aligned(self, name: str, maps: Float[Tensor, "k t H W"], frames: int) -> Float[Tensor, "k T H W"]:
        there, wanted = maps.shape[1], self.grid[0]
        if there == frames:
            return align_frames(maps, wanted, temporal_stride=self.temporal_stride)
        if there in (1, wanted):
            return maps.expand(-1, wanted, -1, -1)
        raise UserError(
            f"reward {name!r} gave evidence of {there} frames; give 1, which holds for all of them, {frames} as the"
            f" media have, or {wanted} as the latents have"
        )


def by_sample(name: str, values: Any, count: int) -> dict[int, Float[Tensor, "t h w"]]:
    """What a reward returned as evidence, checked, by sample; a sample of NaN alone has none.

    Args:
        values: (N, T, H, W), a tensor or an array, or a mapping of samples to (T, H, W).

    Raises:
        UserError: another shape, numbers that are not real or not finite, or some beyond [-1, 1].
    """
    if isinstance(values, Mapping):
        parts = {row: _checked(name, [row], _tensor(name, value, 3)[None]) for row, value in values.items()}
        return {row: part[row] for row, part in parts.items() if row in part}
    found = _tensor(name, values, 4)
    if len(found) != count:
        raise UserError(f"reward {name!r} gave evidence for {len(found)} samples of {count}; its shape is {SHAPE}")
    return _checked(name, range(count), found)


def _tensor(name: str, values: Any, dimensions: int) -> Tensor:
    """As float32, with that many dimensions."""
    found = torch.from_numpy(values) if isinstance(values, np.ndarray) and values.dtype.kind in "fiub" else values
    if not isinstance(found, Tensor) or found.is_complex():
        kind = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else type(values).__name__
        raise UserError(f"reward {name!r} gave evidence as {kind}; it must be real numbers, {SHAPE}, as a tensor")
    if found.ndim != dimensions or 0 in found.shape:
        raise UserError(
            f"reward {name!r} gave evidence of shape {tuple(found.shape)}; it must be {SHAPE}, at any resolution, with"
            " 1 frame or as many as the media"
        )
    return found.detach().float()


def _checked(name: str, rows: Sequence[int], values: Float[Tensor, "k t h w"]) -> dict[int, Float[Tensor, "t h w"]]:
    """The rows that have evidence."""
    flat = values.flatten(1)
    nothing, largest = torch.stack([flat.isnan().all(1).float(), flat.abs().amax(1)]).tolist()  # one wait
    for row, none, size in zip(rows, nothing, largest, strict=True):
        if not none and not size <= 1 + OVERSHOOT:  # NaN if any number is
            what = f"numbers up to {size:g}" if math.isfinite(size) else "numbers that are not finite"
            raise UserError(
                f"reward {name!r} gave evidence with {what} for sample {row}; each must be from -1 (at fault) to 1"
                " (earned), or all of the sample's NaN where there is no evidence"
            )
    clamped = values.clamp(-1, 1)
    return {row: clamped[place] for place, row in enumerate(rows) if not nothing[place]}


def drawn(boxes: Sequence[Box], size: tuple[int, int]) -> Float[Tensor, "1 h w"]:
    """W of boxes, see the top of the file, on a grid of ``size`` cells; no boxes are zeros."""
    found = torch.zeros(size)
    for x0, y0, x1, y1, score in boxes:
        rows, columns = _covered(y0, y1, size[0]), _covered(x0, x1, size[1])
        found = torch.maximum(found, score * rows[:, None] * columns)
    return found[None]


def _covered(start: float, end: float, cells: int) -> Float[Tensor, " cells"]:
    """The share of each cell of a side that lies between two places on it, in shares of the side."""
    edges = torch.arange(cells, dtype=torch.float64)
    covered = (end * cells - edges).clamp(0, 1) - (start * cells - edges).clamp(0, 1)
    return covered.float()
