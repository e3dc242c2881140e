"""Files from outside: what a viewer shows is what is read, in bounded memory; what cannot be read is one sentence."""

from __future__ import annotations

import io
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vipo.errors import UserError
from vipo.media import reading
from vipo.media.reading import read_media
from vipo.media.samples import save_samples
from vipo.rewards import wire

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    def save(picture: Image.Image, name: str, **options: object) -> Path:
        picture.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def levels(path: Path) -> np.ndarray:
    """What is read, (F, Y, X, 3) in 0 ... 255."""
    return (read_media(path) * 255).round().permute(1, 2, 3, 0).byte().numpy()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("name", ["photo.png", "photo.tiff", "photo.webp", "photo.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(saved: Saved, name: str, orientation: int) -> None:
    turns = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB),
    }
    options = {"lossless": True} if name.endswith("webp") else {"quality": 100, "subsampling": 0}
    options = {} if name.endswith(("png", "tiff")) else options
    found = levels(saved(Image.fromarray(RGB), name, exif=exif(orientation), **options))[0]
    off = np.abs(found.astype(int) - turns[orientation]) if found.shape == turns[orientation].shape else np.array([255])
    assert off.max() <= (8 if name.endswith("jpg") else 0)


def test_a_turned_clip_is_turned_in_every_frame(saved: Saved) -> None:
    frames = [Image.fromarray(np.roll(RGB, k, axis=1)) for k in range(3)]
    more = {"save_all": True, "append_images": frames[1:]}
    path = saved(frames[0], "clip.webp", exif=exif(6), lossless=True, **more)
    np.testing.assert_array_equal(levels(path), np.stack([np.rot90(frame, -1) for frame in frames]))


def half_hidden() -> Image.Image:
    """Red that is hidden on the left, half there in the middle and whole on the right."""
    picture = Image.new("RGBA", (9, 6), (255, 0, 0, 255))
    picture.paste((255, 0, 0, 0), (0, 0, 3, 6))
    picture.paste((255, 0, 0, 128), (3, 0, 6, 6))
    return picture


SHOWN = [(255, 255, 255), (255, 127, 127), (255, 0, 0)]


@pytest.mark.parametrize("name", ["see-through.png", "see-through.webp", "see-through.tiff"])
def test_transparency_is_laid_over_white(saved: Saved, name: str) -> None:
    found = levels(saved(half_hidden(), name, **({"lossless": True, "exact": True} if "webp" in name else {})))[0]
    assert [tuple(found[3, x].tolist()) for x in (1, 4, 7)] == SHOWN


def test_grey_with_alpha_and_a_transparent_palette_and_a_key_colour(saved: Saved) -> None:
    grey = levels(saved(half_hidden().convert("LA"), "grey.png"))[0]
    dark = 76  # luma of red
    assert [int(grey[3, x, 0]) for x in (1, 7)] == [255, dark] and abs(int(grey[3, 4, 0]) - (255 + dark) / 2) <= 1
    palette = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9) % 3, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = levels(saved(palette, "palette.png", transparency=b"\x00\xff\x80"))[0]
    assert found[0, :3].tolist() == [[255, 255, 255], [0, 255, 0], [127, 127, 255]]
    assert levels(saved(palette, "palette.gif", transparency=1))[0, 0, :3].tolist() == [
        [255, 0, 0],
        [255, 255, 255],
        [0, 0, 255],
    ]
    key = levels(saved(Image.fromarray(RGB), "key.png", transparency=tuple(RGB[2, 3].tolist())))[0]
    assert key[2, 3].tolist() == [255, 255, 255] and key[2, 4].tolist() == RGB[2, 4].tolist()


@pytest.mark.parametrize(("name", "kind"), [("clip.gif", "GIF"), ("clip.webp", "WEBP"), ("clip.png", "PNG")])
def test_every_frame_of_a_transparent_animation_lies_over_white(saved: Saved, name: str, kind: str) -> None:
    first, second = half_hidden(), ImageOps.mirror(half_hidden())
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {"disposal": 2 if kind == "GIF" else 1}
    found = levels(saved(first, name, save_all=True, append_images=[second], **options))
    assert found.shape == (2, 6, 9, 3)
    assert [found[k, 3, x].tolist() for k, x in ((0, 1), (0, 7), (1, 1), (1, 7))] == [
        [255, 255, 255],
        [255, 0, 0],
        [255, 0, 0],
        [255, 255, 255],
    ]


def test_the_picture_that_stands_in_for_an_animation_is_no_frame_of_it(saved: Saved) -> None:
    frames = [Image.new("RGB", (9, 6), (k, 0, 0)) for k in (9, 60, 120)]
    path = saved(frames[0], "clip.png", save_all=True, append_images=frames[1:], default_image=True)
    assert levels(path)[:, 0, 0, 0].tolist() == [60, 120]


def deep(dtype: str, last: float) -> np.ndarray:
    return np.linspace(0, last, 54).reshape(6, 9).astype(dtype)


@pytest.mark.parametrize(
    ("name", "pixels", "expected"),
    [
        ("i16.png", deep("u2", 65535), deep("u2", 65535) / 65535),
        ("dark.png", deep("u2", 4095), deep("u2", 4095) / 65535),
        ("i16.tiff", deep("u2", 65535), deep("u2", 65535) / 65535),
        ("big-endian.tiff", deep(">u2", 65535), deep("u2", 65535) / 65535),
        ("i.tiff", deep("i4", 65535), deep("u2", 65535) / 65535),
        ("i32.tiff", deep("i4", 2**31 - 1) - 7, deep("i4", 2**31 - 1) / (2**31 - 1)),
        ("unit.tiff", deep("f4", 0.5), deep("f4", 0.5)),
        ("hot.tiff", deep("f4", 300) - 100, deep("f4", 1)),
        ("one-level.tiff", deep("f4", 0) + 7, deep("f4", 0)),
    ],
)
def test_deep_pictures_keep_their_levels(saved: Saved, name: str, pixels: np.ndarray, expected: np.ndarray) -> None:
    found = read_media(saved(Image.fromarray(pixels), name))
    assert found.shape == (3, 1, 6, 9) and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected).float().expand(3, 1, 6, 9), atol=1e-6, rtol=0)


def test_the_level_of_16_bits_that_stands_for_transparent_is_white(saved: Saved) -> None:
    pixels = deep("u2", 53)
    found = read_media(saved(Image.fromarray(pixels), "key.png", transparency=12))[0, 0]
    assert found.flatten()[12] == 1 and found.amax() == 1 and (found == 1).sum() == 1


@pytest.mark.parametrize(
    ("mode", "name"), [("CMYK", "print.tiff"), ("CMYK", "print.jpg"), ("L", "l.png"), ("1", "1.png"), ("P", "p.png")]
)
def test_other_modes(saved: Saved, mode: str, name: str) -> None:
    blocks = Image.fromarray(np.kron(RGB[:2, :3], np.ones((16, 16, 1), np.uint8)))
    expected = np.asarray(blocks.convert(mode).convert("RGB")).astype(int)
    found = levels(saved(blocks.convert(mode), name, **({"quality": 100, "subsampling": 0} if "jpg" in name else {})))
    assert np.abs(found[0] - expected).max() <= (6 if "jpg" in name else 0)


def test_a_photo_with_a_preview_is_one_picture(saved: Saved) -> None:
    preview = Image.fromarray(RGB[:3, :3])
    path = saved(Image.fromarray(RGB), "photo.jpg", format="MPO", save_all=True, append_images=[preview])
    assert read_media(path).shape == (3, 1, 6, 9)


def test_pages_of_one_size_are_frames_and_of_several_sizes_are_refused(saved: Saved) -> None:
    pages = [Image.fromarray(np.roll(RGB, k, axis=1)) for k in range(3)]
    path = saved(pages[0], "pages.tiff", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(levels(path), np.stack(pages))
    pages[1] = pages[1].resize((4, 4))
    path = saved(pages[0], "sizes.tiff", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"sizes\.tiff'.* 3 pictures differ in size or depth \(4 x 4 and 9 x 6\)"):
        read_media(path)


def broken(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tiff", "a.bmp"])
def test_a_truncated_file_is_refused(saved: Saved, name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=rf"'[^']*{name}' cannot be read as a picture: .*; give a whole PNG") as refused:
        read_media(broken(saved(noise, name)))
    assert "\n" not in str(refused.value)


def test_what_is_no_picture_is_refused(tmp_path: Path, saved: Saved) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    for name, words in {
        "text.png": "cannot be read as a picture",
        "lost.png": "does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(UserError, match=words):
            read_media(tmp_path / name)
    with pytest.raises(UserError, match="levels that are not finite"):
        read_media(saved(Image.fromarray(np.full((6, 9), np.nan, np.float32)), "nan.tiff"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_picture_is_refused_before_it_is_decoded(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the bound, over what Pillow warns of, over what Pillow refuses."""
    paths = [saved(Image.new("1", (side, side)), f"bomb-{side}.png") for side in (8193, 10_000, 14_000)]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    for path in paths:
        with pytest.raises(UserError, match=r"67108864 .*; make it smaller"):
            read_media(path)


def test_a_small_file_of_many_large_frames_takes_little_memory(saved: Saved) -> None:
    frames = [Image.new("L", (2000, 2000), k) for k in range(40)]
    path = saved(frames[0], "clip.gif", save_all=True, append_images=frames[1:])
    assert path.stat().st_size < 500_000
    tracemalloc.start()
    with pytest.raises(UserError, match=r"2000 x 2000 pixels in each of its first 17 frames, but at most 67108864"):
        read_media(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * reading.MOST_PIXELS
    tracemalloc.stop()


def test_the_bound_itself_is_read(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_PIXELS", 2 * 54)
    frames = [Image.fromarray(np.roll(RGB, k, axis=1)) for k in range(3)]
    assert read_media(saved(frames[0], "two.png", save_all=True, append_images=frames[1:2])).shape[1] == 2
    with pytest.raises(UserError, match="in each of its first 3 frames"):
        read_media(saved(frames[0], "three.png", save_all=True, append_images=frames[1:]))


def test_a_served_reward_reads_pictures_with_the_same_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(picture: Image.Image, **options: object) -> Tensor:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", **options)
        return wire._read_png(buffer.getvalue())

    turned = sent(Image.fromarray(RGB), exif=exif(6))[:, 0].permute(1, 2, 0)
    np.testing.assert_array_equal((turned * 255).round().byte().numpy(), np.rot90(RGB, -1))
    with pytest.raises(ValueError, match="not RGB, opaque and one frame"):
        sent(Image.fromarray(RGB), transparency=(1, 2, 3))
    with pytest.raises(ValueError, match="not RGB, opaque and one frame"):
        sent(Image.fromarray(RGB), save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())])
    monkeypatch.setattr(reading, "MOST_PIXELS", 53)
    with pytest.raises(ValueError, match="9 x 6 pixels, but at most 53"):
        sent(Image.fromarray(RGB))


def clip(frames: int) -> torch.Tensor:
    """A bright square on grey walks to the right."""
    media = torch.full((1, 3, frames, 32, 64), 0.4)
    for k in range(frames):
        media[:, :, k, 8:24, 8 * k : 8 * k + 16] = torch.tensor([0.9, 0.6, 0.1])[:, None, None]
    return media


def test_all_frames_of_a_clip_are_read(tmp_path: Path) -> None:
    (path,) = save_samples(tmp_path, clip(5), ["clip"])
    assert torch.equal((read_media(path) * 255).round(), (clip(5)[0] * 255).round())


def test_a_video_needs_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"clip\.mp4' needs PyAV to be read: pip install 'vipo\[video\]'"):
        read_media(tmp_path / "clip.mp4")


class Container:
    """As PyAV opens a file, with the frames it is given, which are shown turned counterclockwise by ``rotation``."""

    def __init__(self, frames: list[np.ndarray], rotation: int = 0) -> None:
        self.frames, self.rotation = frames, rotation

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def decode(self, video: int) -> list[SimpleNamespace]:
        assert video == 0
        return [
            SimpleNamespace(to_ndarray=lambda format, kept=frame: kept, rotation=self.rotation)  # noqa: ARG005
            for frame in self.frames
        ]


def test_a_video_is_read_frame_by_frame_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.MP4").touch()
    frames = list((clip(3)[0].permute(1, 2, 3, 0) * 255).round().byte().numpy())

    def open_with(given: list[np.ndarray], rotation: int = 0) -> None:
        monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=lambda _: Container(given, rotation)))

    open_with(frames)
    assert torch.equal((read_media(tmp_path / "clip.MP4") * 255).round(), (clip(3)[0] * 255).round())
    for rotation, turns in ((90, 1), (-90, -1), (180, 2)):
        open_with(frames, rotation)
        assert torch.equal(
            (read_media(tmp_path / "clip.MP4") * 255).round(), torch.rot90(clip(3)[0] * 255, turns, (2, 3)).round()
        )
    open_with([frames[0]] * (reading.MOST_FRAMES + 1))
    with pytest.raises(UserError, match="more than the 1024 frames"):
        read_media(tmp_path / "clip.MP4")
    monkeypatch.setattr(reading, "MOST_FRAMES", 10**6)
    open_with([frames[0]] * (reading.MOST_PIXELS // frames[0][..., 0].size + 1))
    with pytest.raises(UserError, match=r"64 x 32 pixels in each of its first 32769 frames, but .* or cut it"):
        read_media(tmp_path / "clip.MP4")
    open_with([])
    with pytest.raises(UserError, match="holds no frame"):
        read_media(tmp_path / "clip.MP4")

    def broken(_: str) -> Container:
        raise ValueError("Invalid data found")

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=broken))
    with pytest.raises(UserError, match=r"cannot be read as a video: Invalid data found"):
        read_media(tmp_path / "clip.MP4")
