"""Fetch the drawings that only the judges learn from: six more hands, none of them Noto's.

Microsoft's Fluent emoji in three styles (MIT), Mozilla's FxEmojis (Apache-2.0), EmojiOne 2 and Streamline (CC-BY 4.0).
Some of them lack a few objects of the vocabulary. Fills the same layout as fetch_art.py
(``<cache>/<vendor>/package/img/<vendor>/64/<code point>.png``), so that ``SceneComposer(cache, vendor)`` reads them.
Uses the ordinary npm client; the vector styles also need ``pip install resvg-py``. Noto, which the generator draws,
must never be among the judges' drawings.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fetch_art import DEFAULT_CACHE
from vipo.embedded import VOCABULARY

RASTER_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
VECTOR_PACKAGE = "fluentui-emoji@1.3.0"
SET_PACKAGES = {
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "emojione": "@iconify-json/emojione@1.2.3",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
}
VENDORS = ("twitter", "fluent3d", "fluentflat", "fluentmodern", "fxemoji", "emojione", "streamline")
"""All drawings the judges may learn from; Twemoji comes from fetch_art.py."""

FLUENT_NAMES = {
    "apple": "red-apple",
    "grape": "grapes",
    "donut": "doughnut",
    "pumpkin": "jack-o-lantern",
    "cat": "cat-face",
    "pig": "pig-face",
    "tree": "evergreen-tree",
    "moon": "crescent-moon",
    "flame": "fire",
    "heart": "red-heart",
    "ball": "soccer-ball",
    "car": "automobile",
    "globe": "globe-showing-americas",
}
"""Vocabulary name -> Fluent's own, where they differ."""


SET_NAMES = {
    "apple": ("redapple", "red-apple"),
    "grape": ("grapes",),
    "watermelon": ("watermelon-1",),
    "eggplant": ("aubergine",),
    "donut": ("doughnut", "doughnut-1"),
    "pizza": ("sliceofpizza", "pizza-1"),
    "pumpkin": ("jackolantern", "jack-o-lantern"),
    "cat": ("cat-face",),
    "panda": ("pandaface", "panda-face"),
    "frog": ("frog-face",),
    "pig": ("pig-face",),
    "fox": ("fox-face", "fox-face-1"),
    "penguin": ("penguin-1",),
    "cactus": ("cactus-1",),
    "tree": ("evergreen", "evergreen-tree"),
    "sunflower": ("sunflower-1",),
    "sun": ("sunrays",),
    "moon": ("crescentmoon", "crescent-moon"),
    "flame": ("fire",),
    "heart": ("redheart", "red-heart"),
    "ball": ("soccerball", "soccer-ball"),
    "car": ("automobile",),
    "globe": ("americasglobe", "globe-showing-americas"),
}
"""Vocabulary name -> names in the three icon sets, tried in this order and before the vocabulary's own."""


def pack(package: str, folder: Path) -> tarfile.TarFile:
    """Download one npm package into the folder and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True)
    return tarfile.open(folder / done.stdout.split()[-1])


def raster_drawings(archive: tarfile.TarFile) -> Iterator[tuple[str, Image.Image]]:
    """(code point, picture) of every vocabulary object in Fluent's 3D style."""
    for code in VOCABULARY.objects.values():
        for name in (code.lower(), code.lower().removesuffix("-fe0f")):
            if (member := f"package/assets/{name}.webp") in archive.getnames():
                yield code, Image.open(io.BytesIO(_read(archive, member))).convert("RGBA")
                break


def vector_drawings(archive: tarfile.TarFile, style: str) -> Iterator[tuple[str, Image.Image]]:
    """(code point, picture of 128 px) of every vocabulary object in one of Fluent's vector styles."""
    for name, code in VOCABULARY.objects.items():
        member = f"package/icons/{style}/{FLUENT_NAMES.get(name, name)}.svg"
        yield code, _render(_read(archive, member).decode())


def set_drawings(archive: tarfile.TarFile) -> Iterator[tuple[str, Image.Image]]:
    """(code point, picture of 128 px) of the vocabulary objects that an icon set has."""
    icons = json.loads(_read(archive, "package/icons.json"))
    for name, code in VOCABULARY.objects.items():
        found = next((n for n in (*SET_NAMES.get(name, ()), name) if n in icons["icons"]), None)
        if found:
            icon = icons["icons"][found]
            sides = [icon.get(side, icons.get(side, 16)) for side in ("width", "height")]
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {sides[0]} {sides[1]}">'
            yield code, _render(f"{head}{icon['body']}</svg>")


def _render(svg: str) -> Image.Image:
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128)))).convert("RGBA")


def _read(archive: tarfile.TarFile, member: str) -> bytes:
    handle = archive.extractfile(member)
    if handle is None:
        raise FileNotFoundError(f"{member} is not a file of {archive.name}")
    return handle.read()


def write(drawings: Iterator[tuple[str, Image.Image]], cache: Path, vendor: str) -> int:
    """Save drawings where SceneComposer looks for them; how many there were."""
    folder = cache / vendor / "package" / "img" / vendor / "64"
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for code, picture in drawings:
        picture.thumbnail((128, 128), Image.Resampling.LANCZOS)
        picture.save(folder / f"{code.lower()}.png")
        count += 1
    return count


def main() -> None:
    """Command line: ``python judge_art.py [--cache DIR]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    cache = parser.parse_args().cache.expanduser()
    with pack(RASTER_PACKAGE, cache / "packages") as archive:
        print("fluent3d:", write(raster_drawings(archive), cache, "fluent3d"))
    with pack(VECTOR_PACKAGE, cache / "packages") as archive:
        for style in ("flat", "modern"):
            print(f"fluent{style}:", write(vector_drawings(archive, style), cache, f"fluent{style}"))
    for vendor, package in SET_PACKAGES.items():
        with pack(package, cache / "packages") as archive:
            print(f"{vendor}:", write(set_drawings(archive), cache, vendor))


if __name__ == "__main__":
    main()
