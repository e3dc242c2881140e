"""Scorers for clips of the embedded video vocabulary: whether the thing moves as its caption says.

    EmojiMotion   follows what differs from the ground: (way along the claimed direction - way across it) / full way,
                  for a thing that must stand still 1 - way / full way; minus the roughness of its path and
                  twice the share of frames in which there is nothing to follow
    MotionJudge   a small network that has seen other artists' drawings only: P(claimed motion), where one more class
                  is any other motion, a thing that changes, or nothing to see

The first is trained on, the second judges. A prompt outside the grammar gets NaN, no score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vipo.embedded.clips import DIRECTIONS, MOTIONS, ClipCaption, parse_clip_caption
from vipo.rewards.embedded import load_shipped, to_lab
from vipo.rewards.embedded_networks import MOTION_FRAMES, MOTION_SIZE, MotionNetwork
from vipo.types import Prompt
from vipo.vision.preprocess import in_batches

BORDER = 2  # pixels of each edge that are taken for ground
ENDS = 3  # frames averaged at each end of a path
SEEN = 0.01  # share of a frame's pixels from which something is there to follow


class EmojiMotion:
    """The rule that the embedded video recipes train on, at most 1.

    Args:
        full_way: way that earns the whole reward, in shares of the picture's side.
        ground_distance: CIELAB units from the border's median colour at which a pixel is half a thing's.
        roughness: weight of the mean second difference of the path, in full ways.
    """

    def __init__(self, *, full_way: float = 0.4, ground_distance: float = 20.0, roughness: float = 1.0) -> None:
        if full_way <= 0:
            raise ValueError(f"full_way={full_way}: must be positive, a share of the picture's side")
        self.full_way, self.ground_distance, self.roughness = full_way, ground_distance, roughness

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        weight = foreground(media, self.ground_distance)
        claims = [claimed(prompt) for prompt in prompts]
        directions = [DIRECTIONS[c.motion] if c else (0, 0) for c in claims]
        direction = torch.tensor(directions, dtype=torch.float32, device=media.device)
        known = torch.tensor([c is not None for c in claims], device=media.device)
        unseen = (weight.mean((2, 3)) < SEEN).float().mean(1)
        return (self._score(centres(weight), direction) - 2 * unseen).where(known, torch.nan)

    def _score(self, path: Float[Tensor, "N F 2"], direction: Float[Tensor, "N 2"]) -> Float[Tensor, " N"]:
        ends = min(ENDS, path.shape[1])
        way = (path[:, -ends:].mean(1) - path[:, :ends].mean(1)) / self.full_way
        along = (way * direction).sum(1)
        across = (way - along[:, None] * direction).norm(dim=1)
        score = torch.where(direction.any(1), along.clamp(-1, 1) - across, 1 - across)
        if path.shape[1] < 3:
            return score
        return score - self.roughness * path.diff(n=2, dim=1).norm(dim=2).mean(1) / self.full_way


def centres(weight: Float[Tensor, "N F Y X"]) -> Float[Tensor, "N F 2"]:
    """Centre (x, y) of the weight in each frame, in shares of the sides; the middle where there is none."""
    mass = weight.sum((2, 3)).clamp_min(1e-6)
    y, x = ((torch.arange(side, device=weight.device) + 0.5) / side - 0.5 for side in weight.shape[2:])
    return torch.stack([(weight.sum(2) * x).sum(2) / mass, (weight.sum(3) * y).sum(2) / mass], 2) + 0.5


def foreground(media: Float[Tensor, "N 3 F Y X"], distance: float) -> Float[Tensor, "N F Y X"]:
    """How much each pixel differs from its frame's ground, 0 to 1; the ground is the border's median colour."""
    n, _, frames, height, width = media.shape
    flat = media.permute(0, 2, 3, 4, 1)  # (N, F, Y, X, 3)
    lab = to_lab(flat.reshape(-1, 3)).reshape(n, frames, height, width, 3)
    edge = torch.ones(height, width, dtype=torch.bool, device=media.device)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = lab[:, :, edge].median(2).values[:, :, None, None]
    return ((lab - ground).norm(dim=4) / distance - 0.5).clamp(0, 1)  # exactly 0 on the ground, or its mass would count


class MotionJudge:
    """The held-out judge of motion, in [0, 1].

    Args:
        batch_size: clips per forward pass.
    """

    def __init__(self, *, batch_size: int = 32) -> None:
        self.batch_size = batch_size
        self.network = load_shipped(MotionNetwork(len(MOTIONS) + 1), "motion")

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        likely = self.probabilities(media)
        names = list(MOTIONS)
        claims = [claimed(prompt) for prompt in prompts]
        return torch.stack(
            [
                row[names.index(claim.motion)] if claim else row.new_tensor(torch.nan)
                for row, claim in zip(likely, claims, strict=True)
            ]
        )

    def probabilities(self, media: Float[Tensor, "N 3 F Y X"]) -> Float[Tensor, "N K"]:
        """P of each motion, and last of anything else."""
        network = self.network.to(media.device)
        return in_batches(lambda part: network(part).softmax(1), to_motion_input(media), self.batch_size)


def to_motion_input(media: Float[Tensor, "N 3 F Y X"]) -> Float[Tensor, "N 3 f y x"]:
    """Clips as the motion judge sees them: few small frames, evenly spread over whatever length."""
    return F.interpolate(
        media.float(), size=(MOTION_FRAMES, MOTION_SIZE, MOTION_SIZE), mode="trilinear", align_corners=True
    )


def claimed(prompt: Prompt) -> ClipCaption | None:
    """What a caption claims; None for a prompt outside the grammar, which therefore gets no score."""
    try:
        return parse_clip_caption(prompt.text)
    except ValueError:
        return None
