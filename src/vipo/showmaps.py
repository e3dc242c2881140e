"""Allocation maps of the user's own pictures, as sheets to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vipo.build import build_structuring
from vipo.files import written_whole
from vipo.recipe import StructuringSection, parse_section
from vipo.report.maps import map_sheet
from vipo.run import components
from vipo.types import UserError

MAP_SIDE = 64  # map cells along the longer side: fine enough to look at


def read_picture(path: Path) -> Float[Tensor, "3 Y X"]:
    """A picture file in [0, 1].

    Raises:
        UserError: it does not exist or is not a picture.
    """
    if not path.is_file():
        raise UserError(f"picture {str(path)!r} does not exist")
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def show_maps(
    files: Sequence[Path], output: Path, *, backbone: str, backbone_options: dict[str, Any], **structuring: Any
) -> list[Path]:
    """Write one sheet per picture (picture, components as colours, map, overlay) and return their paths.

    Every file is read before the first sheet is written, so a bad one leaves nothing behind.
    """
    pictures = [read_picture(path) for path in files]
    options = {"backbone": backbone, "backbone_options": backbone_options, **structuring}
    section = parse_section(StructuringSection, options, source="maps")
    source = build_structuring(section, temporal_stride=1, device="cpu")
    written = []
    for path, picture in zip(files, pictures, strict=True):
        height, width = picture.shape[1:]
        scale = MAP_SIDE / max(height, width)
        grid = (1, max(1, round(height * scale)), max(1, round(width * scale)))
        maps = source(picture[None, :, None], grid)
        sheet = map_sheet(picture[None], components(source, picture[None]), maps[:, 0], [path.name])
        target = output / f"{path.stem}-map.png"
        with written_whole(target) as aside:
            sheet.save(aside, format="PNG")
        written.append(target)
    return written
