"""The small networks behind the embedded rewards: definitions only, no weights, no captions.

Three of them answer, for a 64-px picture, which of K vocabulary objects is where on an 8 x 8 grid (K = 28 as shipped):

    presence_k = gain * log sum_cells exp(logit_k(cell)) + offset                       (MatchHead, JudgeNetwork)

The fourth, MotionNetwork, tells how the thing in a clip moves.

They share no weights, and two of the three no training data either: what one is fooled by, another should not be.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PICTURE_SIZE = 64
"""Side in px the from-scratch networks were trained at; other pictures are resized to it."""


MOTION_SIZE, MOTION_FRAMES = 32, 9
"""Side in px and number of frames of the clips that MotionNetwork was trained at."""


class Presence(nn.Module):
    """Smooth maximum over cells: gain * logsumexp + offset, two learnt numbers shared by all objects."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, logits: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K"]:
        return self.gain * logits.flatten(2).logsumexp(2) + self.offset

    def alone(self, logits: Float[Tensor, "*B K h w"]) -> Float[Tensor, "*B K h w"]:
        """The presence of each cell, as if all cells of its picture were like it."""
        return self.gain * (logits + math.log(logits.shape[-1] * logits.shape[-2])) + self.offset


class MatchHead(nn.Module):
    """Object logits per cell from a frozen trunk's features at strides 16 and 32 (112 and 320 channels)."""

    def __init__(self, objects: int, width: int = 160) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(112, width, 1), nn.Conv2d(320, width, 1)
        self.spread = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.out = nn.Conv2d(width, objects, 1)
        self.presence = Presence()

    def forward(self, fine: Float[Tensor, "B 112 h w"], coarse: Float[Tensor, "B 320 i j"]) -> Float[Tensor, "B K h w"]:
        wide = F.interpolate(self.coarse(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        hidden = F.relu(self.fine(fine) + wide)
        return self.out(hidden + F.relu(self.spread(hidden)))


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm and a skip (arXiv 1512.03385, figure 2)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(width_in, width, 3, stride)
        self.second = _conv(width, width, 3, 1)
        same = stride == 1 and width_in == width
        self.skip = nn.Identity() if same else _conv(width_in, width, 1, stride)

    def forward(self, x: Float[Tensor, "B D i j"]) -> Float[Tensor, "B E h w"]:
        return F.relu(self.skip(x) + self.second(F.relu(self.first(x))))


class JudgeNetwork(nn.Module):
    """A small residual network, 64 px to 8 x 8 cells, independent logits per object."""

    def __init__(self, objects: int) -> None:
        super().__init__()
        self.stem = _conv(3, 32, 3, 2)
        self.stages = nn.Sequential(
            Residual(32, 64, 2), Residual(64, 64, 1), Residual(64, 128, 2), Residual(128, 128, 1)
        )
        self.out = nn.Conv2d(128, objects, 1)
        self.presence = Presence()

    def forward(self, images: Float[Tensor, "B 3 64 64"]) -> Float[Tensor, "B K 8 8"]:
        return self.out(self.stages(F.relu(self.stem(images - 0.5))))


class LayoutNetwork(nn.Module):
    """Plain dilated convolutions, 64 px to 8 x 8 cells: log-probabilities over K objects and, last, background."""

    def __init__(self, objects: int) -> None:
        super().__init__()
        self.fine = _plain((3, 24, 5, 2, 1), (24, 64, 3, 2, 1), (64, 64, 3, 1, 1))
        self.coarse = _plain((64, 112, 3, 2, 1), (112, 112, 3, 1, 1), (112, 112, 3, 1, 2))
        self.out = nn.Conv2d(64 + 112, objects + 1, 1)

    def forward(self, images: Float[Tensor, "B 3 64 64"]) -> Float[Tensor, "B K1 8 8"]:
        fine = self.fine(images - 0.5)
        both = torch.cat([F.max_pool2d(fine, 2), self.coarse(fine)], dim=1)
        return self.out(both).float().log_softmax(1)


class MotionNetwork(nn.Module):
    """Convolutions over space and time, then a linear layer over a coarse grid: logits of K kinds of motion."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _over_time(3, 24, (1, 2, 2)), _over_time(24, 32, (2, 2, 2)), _over_time(32, 48, (2, 2, 2))
        )
        self.out = nn.Linear(48 * 3 * 4 * 4, kinds)

    def forward(self, clips: Float[Tensor, "B 3 9 32 32"]) -> Float[Tensor, "B K"]:
        return self.out(self.layers(clips - 0.5).flatten(1))


def _over_time(width_in: int, width: int, stride: tuple[int, int, int]) -> nn.Sequential:
    conv = nn.Conv3d(width_in, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(width), nn.SiLU())


def _plain(*layers: tuple[int, int, int, int, int]) -> nn.Sequential:
    """Convolution, batch norm, SiLU for each (width in, width, kernel, stride, dilation)."""
    return nn.Sequential(
        *(nn.Sequential(_conv(a, b, kernel, stride, dilation), nn.SiLU()) for a, b, kernel, stride, dilation in layers)
    )


def _conv(width_in: int, width: int, kernel: int, stride: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(width_in, width, kernel, stride, padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))
