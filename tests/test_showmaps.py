"""Maps of the user's own clips: every frame is read, latent frames are as asked for, what does not fit is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vipo.samples import save_samples
from vipo.showmaps import read_media, show_maps
from vipo.types import UserError

LITE: dict[str, Any] = {"backbone": "efficientnet_lite", "backbone_options": {"resolution": 64}}


def clip(frames: int) -> torch.Tensor:
    """A bright square on grey walks to the right."""
    media = torch.full((1, 3, frames, 32, 64), 0.4)
    for k in range(frames):
        media[:, :, k, 8:24, 8 * k : 8 * k + 16] = torch.tensor([0.9, 0.6, 0.1])[:, None, None]
    return media


def test_all_frames_of_a_clip_are_read(tmp_path: Path) -> None:
    (path,) = save_samples(tmp_path, clip(5), ["clip"])
    assert torch.equal((read_media(path) * 255).round(), (clip(5)[0] * 255).round())


@pytest.mark.parametrize(("stride", "columns"), [(1, 5), (4, 2)])
def test_a_clip_has_a_column_per_latent_frame(tmp_path: Path, stride: int, columns: int) -> None:
    (path,) = save_samples(tmp_path, clip(5), ["clip"])
    (sheet,) = show_maps([path], tmp_path / "maps", temporal_stride=stride, scope="clip", **LITE)
    with Image.open(sheet) as opened:
        assert sheet.name == "clip-map.png"
        assert opened.width == 24 + 190 + 16 + 192 * columns + 8 * (columns - 1) + 24


@pytest.mark.usefixtures("unchecked")
def test_a_clip_that_does_not_fit_the_stride_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (path,) = save_samples(tmp_path, clip(4), ["clip"])
    with pytest.raises(UserError, match=r"has 4 frames, but with a temporal stride of 4 .* cut it to 1 frames"):
        show_maps([path], tmp_path / "maps", temporal_stride=4, **LITE)
    assert not (tmp_path / "maps").exists()


def test_a_video_needs_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"clip\.mp4' needs PyAV to be read; install vipo\[video\]"):
        read_media(tmp_path / "clip.mp4")


class Container:
    """As PyAV opens a file, with the frames it is given."""

    def __init__(self, frames: list[np.ndarray]) -> None:
        self.frames = frames

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def decode(self, video: int) -> list[SimpleNamespace]:
        assert video == 0
        return [SimpleNamespace(to_ndarray=lambda format, kept=frame: kept) for frame in self.frames]  # noqa: ARG005


def test_a_video_is_read_frame_by_frame_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.MP4").touch()
    frames = list((clip(3)[0].permute(1, 2, 3, 0) * 255).round().byte().numpy())

    def open_with(given: list[np.ndarray]) -> None:
        monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=lambda _: Container(given)))

    open_with(frames)
    assert torch.equal((read_media(tmp_path / "clip.MP4") * 255).round(), (clip(3)[0] * 255).round())
    open_with([])
    with pytest.raises(UserError, match="holds no frame"):
        read_media(tmp_path / "clip.MP4")

    def broken(_: str) -> Container:
        raise ValueError("Invalid data found")

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=broken))
    with pytest.raises(UserError, match=r"cannot be read as a video: Invalid data found"):
        read_media(tmp_path / "clip.MP4")
