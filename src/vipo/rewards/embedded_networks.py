"""The small networks behind the embedded rewards: definitions only, no weights, no captions.

Three of them answer, for a 64-px picture, which of K vocabulary objects is where on an 8 x 8 grid (K = 28 as shipped):

    presence_k = gain * log sum_cells exp(logit_k(cell)) + offset                       (MatchHead, JudgeNetwork)

The fourth, MotionNetwork, tells how the thing in a clip moves. CriticNetwork (judges) and CleanNetwork (reward) read a
picture as a whole: how many of what there are, and what is wrong with it.

They share no weights, and what judges share no drawings with what is trained on: what one is fooled by, another should
not be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
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


SEVERITIES = 5
"""Kinds of flaw whose strengths the two networks below estimate too, as listed in experiments/embedded/flaw_data.py."""

PEAK = 0.2
"""Most of one object that a cell of 4 px can hold: an object is a spot of about one cell's width, with sum 1."""


@dataclass(frozen=True)
class Reading:
    """What CriticNetwork and CleanNetwork see in pictures, on a grid of 16 x 16 cells.

    spot: logit of how much of an object's middle a cell holds, in shares of ``PEAK``. kind: logits of which of K
    objects that is. shown: logit of an object being there at all. worth: logits of the picture's quality and of the
    strength of each kind of flaw.
    """

    spot: Float[Tensor, "B 16 16"]
    kind: Float[Tensor, "B K 16 16"]
    shown: Float[Tensor, "B 16 16"]
    worth: Float[Tensor, "B 6"]

    def shares(self, named: Bool[Tensor, "B K"], boost: float = 3.0) -> Float[Tensor, "B K 16 16"]:
        """Which object each cell shows, if any, where ``boost`` says how much more likely the named ones are."""
        return (self.kind + boost * named[:, :, None, None]).softmax(1)

    def counts(self, named: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """How many there are of each object."""
        return torch.einsum("bij,bkij->bk", PEAK * self.spot.sigmoid(), self.shares(named))

    @staticmethod
    def of(cells: Float[Tensor, "B C 16 16"], worth: Float[Tensor, "B 6"]) -> Reading:
        """From K + 2 channels: spot, shown, then kinds."""
        cells = cells.float()
        return Reading(cells[:, 0], cells[:, 2:], cells[:, 1], worth.float())


class CriticNetwork(nn.Module):
    """A residual network that goes down to 8 x 8 cells and up again; ``flaws`` says where a picture is wrong."""

    def __init__(self, objects: int) -> None:
        super().__init__()
        self.stem = _conv(3, 32, 5, 2)
        self.fine = Residual(32, 32, 1)
        self.middle = nn.Sequential(Residual(32, 64, 2), Residual(64, 64, 1))
        self.coarse = nn.Sequential(Residual(64, 128, 2), Residual(128, 128, 1))
        self.join, self.up = _conv(128 + 64, 64, 1, 1), Residual(64, 64, 1)
        self.cells = nn.Conv2d(64, objects + 2, 1)
        self.worth = nn.Sequential(nn.Linear(3 * 32 + 64 + 2 * 128, 96), nn.ReLU(), nn.Linear(96, 1 + SEVERITIES))
        self.ask, self.answer = _conv(64 + 5, 48, 1, 1), Residual(48, 48, 1)
        self.last, self.flaw = _conv(48 + 32, 32, 1, 1), nn.Conv2d(32, 1, 1)

    def forward(
        self, images: Float[Tensor, "B 3 64 64"], named: Bool[Tensor, "B K"]
    ) -> tuple[Reading, Float[Tensor, "B 32 32"]]:
        """The reading, and logits of a flaw under a caption that names these objects."""
        fine = self.fine(F.relu(self.stem(images - 0.5)))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        up = F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
        joint = self.up(F.relu(self.join(torch.cat([up, middle], dim=1))))
        pooled = [*_summaries(fine), middle.mean((2, 3)), coarse.mean((2, 3)), coarse.amax((2, 3))]
        reading = Reading.of(self.cells(joint), self.worth(torch.cat(pooled, dim=1)))
        asked = self.answer(F.relu(self.ask(torch.cat([joint, _under(reading, named)], dim=1))))
        wide = F.interpolate(asked, scale_factor=2.0, mode="bilinear", align_corners=False)
        flaws: Tensor = self.flaw(F.relu(self.last(torch.cat([wide, fine], dim=1))))
        return reading, flaws[:, 0].float()


def _summaries(features: Float[Tensor, "B D h w"]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, spread and maximum of each feature: grain is a spread that a mean does not show."""
    return features.mean((2, 3)), features.float().var((2, 3)).add(1e-4).sqrt(), features.amax((2, 3))


def _under(reading: Reading, named: Bool[Tensor, "B K"]) -> Float[Tensor, "B 5 16 16"]:
    """What a caption has to do with each cell: something shown, named, unnamed, how many copies, a middle."""
    shares, shown = reading.shares(named), reading.shown.sigmoid()
    ours = (shares * named[:, :, None, None]).sum(1)
    copies = torch.einsum("bk,bkij->bij", reading.counts(named), shares)
    return torch.stack([shown, shown * ours, shown * (1 - ours), shown * copies, reading.spot.sigmoid()], dim=1)


class CleanNetwork(nn.Module):
    """Plain dilated convolutions at two scales, nothing of CriticNetwork's build but what it answers."""

    def __init__(self, objects: int) -> None:
        super().__init__()
        self.fine = _plain((3, 32, 5, 2, 1))
        self.middle = _plain((32, 64, 3, 2, 1), (64, 64, 3, 1, 1), (64, 64, 3, 1, 2))
        self.wide = _plain((64, 64, 3, 1, 4), (64, 64, 3, 1, 1))
        self.cells = nn.Conv2d(64 + 64, objects + 2, 1)
        self.worth = nn.Sequential(nn.Linear(3 * (32 + 64) + 64, 64), nn.SiLU(), nn.Linear(64, 1 + SEVERITIES))

    def forward(self, images: Float[Tensor, "B 3 64 64"]) -> Reading:
        fine = self.fine(images - 0.5)
        middle = self.middle(fine)
        wide = self.wide(middle)
        pooled = [*_summaries(fine), *_summaries(middle), wide.mean((2, 3))]
        return Reading.of(self.cells(torch.cat([middle, wide], dim=1)), self.worth(torch.cat(pooled, dim=1)))


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
