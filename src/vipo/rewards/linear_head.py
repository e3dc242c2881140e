"""The heads of ImageReward and of LAION's aesthetic predictor: linear layers with nothing but dropout between them.

Such a stack is one affine map, W_k (... (W_1 x + b_1) ...) + b_k = w . x + b, and is loaded as that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError

LAYER = re.compile(r"(?:layers\.(\d+)\.)?(weight|bias)")


def affine_head(
    reward: str, file: Path, tensors: Mapping[str, Tensor], *, width: int | None = None
) -> tuple[Float[Tensor, " D"], float]:
    """Collapse the layers, in float64, to w (float32) and b.

    Args:
        reward: the name the user knows, for messages.
        file: where the tensors came from, for messages.
        tensors: ``weight`` and ``bias``, or ``layers.I.weight`` and ``layers.I.bias`` in the order of I; the last layer
            has one output.
        width: how many numbers the encoder gives; None does not check.

    Raises:
        UserError: something else is in there, the layers do not follow on each other, or they read another width.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = LAYER.fullmatch(key)
        if match is None:
            raise _no_stack(reward, file, tensors)
        layers.setdefault(int(match[1] or 0), {})[match[2]] = value.double()
    first, *rest = [layers[place] for place in sorted(layers)] or [{}]
    try:
        weight, bias = first["weight"], first["bias"]
        for layer in rest:
            weight, bias = layer["weight"] @ weight, layer["weight"] @ bias + layer["bias"]
        weight, offset = weight.squeeze(0).float(), float(bias)
    except (KeyError, RuntimeError, ValueError) as error:
        raise _no_stack(reward, file, tensors) from error
    if width not in (None, len(weight)):
        raise UserError(
            f"reward {reward!r}: the head in {file} reads {len(weight)} numbers and the encoder gives {width}; give a"
            " head and an encoder that belong together"
        )
    return weight, offset


def _no_stack(reward: str, file: Path, tensors: Mapping[str, Tensor]) -> UserError:
    shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in sorted(tensors.items())[:10])
    return UserError(
        f"reward {reward!r}: the head in {file} is no stack of linear layers that ends in one number, its tensors are"
        f" {shapes or 'none'}; download the published file again"
    )
