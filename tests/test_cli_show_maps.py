"""Maps of the user's own files: sheets with names of their own, latent frames as asked for, bad files refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vipo.cli.show_maps import sheet_paths, show_maps
from vipo.errors import UserError
from vipo.media.samples import save_samples

LITE: dict[str, Any] = {"backbone": "efficientnet_lite", "backbone_options": {"resolution": 64}}


def clip(frames: int) -> torch.Tensor:
    """A bright square on grey walks to the right."""
    media = torch.full((1, 3, frames, 32, 64), 0.4)
    for k in range(frames):
        media[:, :, k, 8:24, 8 * k : 8 * k + 16] = torch.tensor([0.9, 0.6, 0.1])[:, None, None]
    return media


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


def picture(path: Path, level: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (level, 0, 0)).save(path)
    return path


def test_files_of_one_stem_keep_their_own_sheets(tmp_path: Path) -> None:
    files = [picture(tmp_path / name) for name in ("ok.png", "ok.jpg", "a/ok.png", "b/OK.png", "other.gif")]
    sheets = show_maps(files, tmp_path / "maps", **LITE)
    assert [sheet.name for sheet in sheets] == [
        "ok.png-map.png",
        "ok.jpg-map.png",
        "ok.png-2-map.png",
        "OK.png-3-map.png",
        "other-map.png",
    ]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == sorted(sheet.name for sheet in sheets)


def test_names_that_a_unique_stem_has_are_left_to_it(tmp_path: Path) -> None:
    files = [Path(name) for name in ("ok.png", "ok.jpg", "ok.png.gif", "ok.png")]
    names = [path.name for path in sheet_paths(files, tmp_path)]
    assert names == ["ok.png-2-map.png", "ok.jpg-map.png", "ok.png-map.png", "ok.png-3-map.png"]


@pytest.mark.usefixtures("unchecked")
def test_a_sheet_never_takes_the_place_of_a_file(tmp_path: Path) -> None:
    files = [picture(tmp_path / "ok.png"), picture(tmp_path / "ok-map.png")]
    with pytest.raises(UserError, match=r"would overwrite '.*ok-map\.png', which is one of the files; choose another"):
        show_maps(files, tmp_path, **LITE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ok-map.png", "ok.png"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [(1, 1), (7, 500)])
def test_a_picture_too_small_for_a_map_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "dot.png")
    with pytest.raises(UserError, match=rf"dot\.png' is {size[0]} x {size[1]} pixels, .* at least 8 a side"):
        show_maps([tmp_path / "dot.png"], tmp_path / "maps", **LITE)
    assert not (tmp_path / "maps").exists()


def test_a_strip_has_a_sheet_too(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 4000, 3), dtype=np.uint8)).save(
        tmp_path / "strip.png"
    )
    (sheet,) = show_maps([tmp_path / "strip.png"], tmp_path / "maps", **LITE)
    assert sheet.is_file()


def test_the_sheet_shows_the_picture_as_a_viewer_does(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    wide.paste((0, 0, 255, 255), (40, 0, 64, 32))
    wide.save(tmp_path / "photo.png", exif=exif)
    (sheet,) = show_maps([tmp_path / "photo.png"], tmp_path / "maps", **LITE)
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:] < 80).all(-1)
    blue = (pixels[..., 2] > 240) & (pixels[..., :2] < 15).all(-1)
    rows, columns = np.nonzero(blue[:, : 24 + 190 + 16 + 96])
    assert not red[:, : 24 + 190 + 16 + 96].any(), "the hidden red must stay hidden"
    assert np.ptp(columns) > 80 and np.ptp(rows) == pytest.approx(192 * 24 / 64, abs=4), "upright: the blue is below"
