"""What a run keeps of an iteration's samples for looking closer: pictures, scores, advantages, maps and credit.

``step-NNNNNN.png`` and ``.json`` are a contact sheet (``vipo.media.sheets``) of what was scored, made smaller; of a
clip, the frame that stands for each latent frame. ``step-NNNNNN.safetensors`` has the numbers, those of positions in
bfloat16. It is written last: with it a recording is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vipo.errors import UserError
from vipo.files import SEAL, is_intact, sealed, settle_header, sha256, written_whole
from vipo.media.map_sheets import shown_frames
from vipo.media.sheets import load_sheet, save_sheet

ROLLOUTS = "rollouts"  # the folder of a run that they are in
PRODUCT = "product"  # the name of the map that several sources make
SUFFIX, INFO, MAP = ".safetensors", "recording", "map."
ENDINGS = (SUFFIX, ".json", ".png")
_STEP = re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Recording:
    """The first groups of an iteration.

    Args:
        first_sample: number of the first one among those of all processes.
        credit: the recipe's.
        media: in [0, 1], T frames of a clip: one for each latent frame.
        scores: of every reward; NaN where there was none.
        weight: what multiplied a sample's ratio, before the factor of the solver step; 0 of one not trained on.
        maps: by the source's name. taken: the name in ``maps`` of what the credit took; empty if it took none.
    """

    iteration: int
    group_size: int
    first_sample: int
    credit: str
    prompts: tuple[str, ...]
    media: Float[Tensor, "N 3 T Y X"]
    scores: Mapping[str, Float[Tensor, " N"]]
    advantage: Float[Tensor, " N"]
    weight: Float[Tensor, "N *position"]
    maps: Mapping[str, Float[Tensor, "N T H W"]]
    taken: str

    def __len__(self) -> int:
        return len(self.prompts)


def small(media: Float[Tensor, "N 3 F Y X"], latent_frames: int, stride: int, side: int) -> Float[Tensor, "N 3 T y x"]:
    """A frame for each latent one, at most ``side`` pixels long.

    Args:
        stride: pixel frames per latent frame, see ``shown_frames``.
    """
    frames = media[:, :, shown_frames(latent_frames, stride)].float()
    scale = side / max(media.shape[-2:])
    if scale >= 1:
        return frames
    size = max(1, round(media.shape[-2] * scale)), max(1, round(media.shape[-1] * scale))
    flat = frames.transpose(1, 2).flatten(0, 1)
    fitted = F.interpolate(flat, size=size, mode="bilinear", align_corners=False, antialias=True)
    return fitted.unflatten(0, (len(media), -1)).transpose(1, 2).clamp(0, 1)


def save_recording(path: Path, told: Recording) -> None:
    """Write ``path`` (PNG) and, beside it, the files of the same name."""
    save_sheet(path, told.media, told.prompts, told.scores)
    places = {"weight": told.weight, **{MAP + name: maps for name, maps in told.maps.items()}}
    tensors = {name: values.detach().to("cpu", torch.bfloat16).contiguous() for name, values in places.items()}
    tensors["advantage"] = told.advantage.detach().to("cpu", torch.float32).contiguous()
    info = {
        "iteration": told.iteration,
        "group_size": told.group_size,
        "first_sample": told.first_sample,
        "credit": told.credit,
        "taken": told.taken,
        "sheet": sha256(path),
        "numbers": _checksum(tensors),
    }
    with written_whole(path.with_suffix(SUFFIX)) as aside:
        save_file(tensors, aside, metadata={INFO: json.dumps(sealed(info), ensure_ascii=False)})
        settle_header(aside)


def prune_recordings(folder: Path, keep: int) -> None:
    """Remove all but the first and the newest ``keep``, also what a kill left of one. Numbers go first, see above."""
    named = [path for path in folder.glob("step-*.*") if _STEP.fullmatch(path.stem) and path.suffix in ENDINGS]
    there = sorted((path.stem for path in named if path.suffix == SUFFIX), key=lambda stem: (len(stem), stem))
    stay = {*there[:1], *there[-keep:]}
    for path in sorted(named, key=lambda path: ENDINGS.index(path.suffix)):
        if path.stem not in stay:
            path.unlink()


def load_recording(path: Path) -> Recording:
    """What :func:`save_recording` wrote at ``path`` (PNG).

    Raises:
        UserError: one of its three files is missing or damaged, or they do not belong together.
    """
    tiles, sheet = load_sheet(path)
    try:
        info, tensors = _numbers(path.with_suffix(SUFFIX))
        if info["sheet"] != sha256(path) or any(len(values) != len(tiles) for values in tensors.values()):
            raise ValueError("it belongs to other pictures")
        scores = {name: torch.tensor(_numbers_of(values)) for name, values in sheet["scores"].items()}
        maps = {name.removeprefix(MAP): values for name, values in tensors.items() if name.startswith(MAP)}
        return Recording(
            iteration=int(info["iteration"]),
            group_size=int(info["group_size"]),
            first_sample=int(info["first_sample"]),
            credit=str(info["credit"]),
            prompts=tuple(map(str, sheet["prompts"])),
            media=torch.stack([as_media(tile, int(sheet["frames"])) for tile in tiles]),
            scores=scores,
            advantage=tensors["advantage"],
            weight=tensors["weight"].float(),
            maps={name: values.float() for name, values in maps.items()},
            taken=str(info["taken"]),
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"recording {str(path.with_suffix(SUFFIX))!r} cannot be read: {error}") from error


def _numbers(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        info = json.loads((file.metadata() or {})[INFO])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if SEAL not in info or not is_intact(info) or info["numbers"] != _checksum(tensors):
        raise ValueError("it is not as it was written")
    return info, tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        found.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _numbers_of(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def as_media(strip: Image.Image, frames: int) -> Float[Tensor, "3 T Y X"]:
    """A tile, frames side by side, as media."""
    levels = torch.from_numpy(np.array(strip.convert("RGB"))).float().div_(255)
    return levels.unflatten(1, (frames, -1)).permute(3, 1, 0, 2)
