"""Samples on disk: their names, and that a video comes back as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from vipo.errors import UserError
from vipo.media import samples
from vipo.media.clips import save_gif
from vipo.media.pictures import to_uint8
from vipo.media.samples import sample_names, save_clips, save_samples
from vipo.prompts.files import read_prompts, shipped_set


def clip(frames: int, height: int = 16, width: int = 32) -> torch.Tensor:
    """A bright square that moves right."""
    media = torch.zeros(1, 3, frames, height, width)
    for k in range(frames):
        media[:, :, k, 4:12, 2 * k : 2 * k + 8] = torch.tensor([0.9, 0.5, 0.1])[:, None, None]
    return media


def test_names_by_number_and_by_prompt() -> None:
    texts = ["A cat, on teal!", "…"]
    assert sample_names(texts, 2, "number") == ["00000-0-a-cat-on-teal", "00000-1-a-cat-on-teal", "00001-0", "00001-1"]
    assert sample_names(texts, 1, "prompt") == ["A cat, on teal!-0", "…-0"]


def test_every_vbench_prompt_can_be_a_file_name() -> None:
    texts = [prompt.text for prompt in read_prompts(shipped_set("vbench"))]
    names = sample_names(texts, 5, "prompt")
    assert names[4] == f"{texts[0]}-4" and max(len(f".{name}.mp4.partial".encode()) for name in names) <= 255


@pytest.mark.parametrize("text", ["this/that", ".hidden", "long " * 60])
def test_a_prompt_that_is_no_file_name_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="cannot be a file name"):
        sample_names([text], 1, "prompt")


def test_pictures_and_webp_videos_are_lossless(tmp_path: Path) -> None:
    picture, video = torch.rand(1, 3, 1, 4, 6), clip(3)
    (still,) = save_samples(tmp_path, picture, ["still"])
    (moving,) = save_samples(tmp_path, video, ["moving"], fps=16)
    assert (still.name, moving.name) == ("still.png", "moving.webp")
    with Image.open(still) as opened:
        assert np.array_equal(np.asarray(opened), to_uint8(picture)[0, 0])
    with Image.open(moving) as opened:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)]
        assert opened.info["duration"] in (62, 63)
    assert np.array_equal(np.stack(frames), to_uint8(video)[0])
    with pytest.raises(ValueError, match="2 names for 1 samples"):
        save_samples(tmp_path, picture, ["a", "b"])


def test_an_mp4_shows_the_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (path,) = save_samples(tmp_path, clip(9), ["a cat-0"], video="mp4", fps=16)
    with av.open(str(path)) as opened:
        assert float(opened.streams.video[0].average_rate) == 16
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])
    assert frames.shape == (9, 16, 32, 3)
    assert np.abs(frames.astype(float) - to_uint8(clip(9))[0]).mean() < 12  # 4:2:0 blurs the square's edges
    assert [path.name for path in tmp_path.iterdir()] == ["a cat-0.mp4"]
    with pytest.raises(UserError, match="needs even sides, these frames are 15 x 32"):
        save_samples(tmp_path, clip(2, height=15), ["odd"], video="mp4")


def test_mp4_without_pyav_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"install 'vipo\[video\]', or take --video webp"):
        save_samples(tmp_path, clip(2), ["a"], video="mp4")


def without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)


def test_the_first_clips_of_an_evaluation_are_files_and_play_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pyav(monkeypatch)
    media = torch.cat([clip(3)] * 10)
    folder = tmp_path / "step-000000"
    folder.mkdir()
    (folder / "old.webp").touch()
    save_clips(folder, media, ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"], samples_per_prompt=2, fps=4)
    names = [f"{k:05d}-{i}-{'abcd'[k]}.webp" for k in range(4) for i in range(2)]
    assert sorted(path.name for path in folder.iterdir()) == names
    with Image.open(tmp_path / "step-000000.gif") as opened:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)]
        assert opened.info["duration"] == 250 and opened.info["loop"] == 0
    assert frames[0].shape == (2 * 96 + 4, 4 * 192 + 3 * 4, 3)  # 16 x 32 enlarged six times, two rows of four
    for frame, k in zip(frames, range(3), strict=True):
        square = frame[2 * 24 + 8, 6 * (2 * k + 4)]  # inside the bright square, which has moved by 2 k pixels
        assert np.abs(square.astype(int) - to_uint8(media)[0, k, 8, 2 * k + 4]).max() < 12
        assert frame[2, 2].max() < 12


def test_large_clips_are_compressed_for_the_eye(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pyav(monkeypatch)
    media = torch.rand(1, 3, 2, 16, 162)
    save_clips(tmp_path / "step", media, ["a"], samples_per_prompt=1, fps=8)
    with Image.open(tmp_path / "step" / "00000-0-a.webp") as opened:
        frame = np.asarray(opened.convert("RGB")).astype(float)
        assert opened.n_frames == 2
    difference = np.abs(frame - to_uint8(media)[0, 0]).mean()
    assert 0 < difference < 60


def test_a_gif_of_a_fast_clip_plays_as_long_as_the_clip(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in to_uint8(clip(12))[0]]
    for fps, kept, milliseconds in ((50, 12, 20), (120, 4, 20), (240, 3, 20)):
        save_gif(tmp_path / "fast.gif", frames, fps)
        with Image.open(tmp_path / "fast.gif") as opened:
            assert (opened.n_frames, opened.info["duration"]) == (kept, milliseconds)


def test_clips_that_cannot_be_written_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pyav(monkeypatch)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "save_webp", full)
    with pytest.raises(OSError, match="No space left"):
        save_clips(tmp_path / "step", clip(2), ["a"], samples_per_prompt=1, fps=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("codecs", "height", "made"), [({"libx264"}, 16, True), ({"libx264"}, 15, False), ({"mpeg4"}, 16, False)]
)
def test_mp4_is_made_where_pyav_can(monkeypatch: pytest.MonkeyPatch, codecs: set[str], height: int, made: bool) -> None:
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(codecs_available=codecs, __spec__=object()))
    assert samples._makes_mp4(height, 32) is made


def test_beside_webp_there_is_mp4(tmp_path: Path) -> None:
    pytest.importorskip("av")
    save_clips(tmp_path / "step", clip(3), ["a"], samples_per_prompt=1, fps=8)
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == ["00000-0-a.mp4", "00000-0-a.webp"]
