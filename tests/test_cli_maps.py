"""``vipo maps``: sheets of the user's own files, or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
from PIL import Image
from skimage import data as photos

from terminal import Vipo, assert_refused, imported


def test_maps_of_a_photograph(vipo: Vipo, tmp_path: Path) -> None:
    Image.fromarray(photos.astronaut()[:256, :192]).save(tmp_path / "photo.png")
    said = vipo("maps", tmp_path / "photo.png", "--output", tmp_path / "maps", "--resolution", "96")
    assert said.code == 0, said
    sheet = Image.open(tmp_path / "maps" / "photo-map.png")
    assert str(tmp_path / "maps" / "photo-map.png") in said.out and sheet.width > sheet.height > 50


def test_maps_load_nothing_that_trains(tmp_path: Path) -> None:
    Image.fromarray(photos.astronaut()[:64, :64]).save(tmp_path / "photo.png")
    call = "from vipo.cli import main; main()"
    loaded = imported(call, "maps", tmp_path / "photo.png", "--output", tmp_path, "--resolution", "64")
    assert (tmp_path / "photo-map.png").is_file() and "vipo.structuring.perceptual" in loaded
    trains = {"accelerate", "peft", "tensorboard", "torch.utils.tensorboard", "diffusers", "transformers"}
    assert not loaded & (trains | {"vipo.assemble", "vipo.engine", "vipo.policy", "vipo.training", "vipo.runs"})


def _clip(path: Path, frames: int, *sides: int) -> None:
    """Grey frames, of the sides in turn."""
    made = [Image.new("L", (side, side), k) for k, side in zip(range(frames), cycle(sides), strict=False)]
    made[0].save(path, save_all=True, append_images=made[1:])


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "note.txt": lambda path: path.write_text("not a picture"),
    "text.png": lambda path: path.write_text("not a picture"),
    "cut.png": lambda path: path.write_bytes(Path("photo.png").read_bytes()[:3000]),
    "bomb.png": lambda path: Image.new("1", (9000, 9000)).save(path),
    "dot.png": lambda path: Image.new("L", (1, 1)).save(path),
    "sizes.tiff": lambda path: _clip(path, 2, 30, 20),
    "long.gif": lambda path: _clip(path, 18, 2000),
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["lost.png"], ["'lost.png' does not exist"]),
        (["note.txt"], ["note.txt", "cannot be read as a picture"]),
        (["photo.png", "note.txt"], ["note.txt", "cannot be read as a picture"]),
        (["photo.png", "text.png"], ["text.png", "cannot be read as a picture", "give a whole PNG"]),
        (["cut.png"], ["cut.png", "cannot be read as a picture", "truncated"]),
        (["bomb.png"], ["bomb.png", "9000 x 9000 pixels", "67108864"]),
        (["dot.png"], ["dot.png", "1 x 1 pixels", "at least 8 a side"]),
        (["sizes.tiff"], ["sizes.tiff", "2 pictures differ in size or depth", "give each as a file"]),
        (["long.gif"], ["long.gif", "2000 x 2000 pixels in each of its first 17 frames", "67108864"]),
        (["photo.png", "--backbone", "resnett"], ["no backbone 'resnett'", "resnet"]),
        (["photo.png", "--aggregation", "sum"], ["aggregation", "variance"]),
        (["photo.png", "--orientation", "upwards"], ["orientation", "border"]),
    ],
)
def test_maps_that_cannot_be_made_are_refused_and_leave_nothing(
    vipo: Vipo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photos.astronaut()[:64, :64]).save("photo.png")
    if options[-1] in BAD_FILES:
        BAD_FILES[options[-1]](Path(options[-1]))
    assert_refused(vipo("maps", *options, "--output", "maps"), *words)
    assert not Path("maps").exists()


def test_a_port_without_the_page_that_it_is_of_is_refused(vipo: Vipo, tmp_path: Path) -> None:
    Image.fromarray(photos.astronaut()[:64, :64]).save(tmp_path / "photo.png")
    for port in (0, 8080):
        said = vipo("maps", tmp_path / "photo.png", "--output", tmp_path / "maps", "--port", port)
        assert_refused(said, "--port is of the page that --ui serves; add --ui, or leave it out")
    assert not (tmp_path / "maps").exists()
