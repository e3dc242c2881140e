"""Fetch the emoji drawings (npm packages) into a cache folder: Noto for the generator, Twemoji for the judges.

Uses the ordinary npm client, whatever registry it is configured with: ``npm pack`` and an unpack of the images.
"""

from __future__ import annotations

import argparse
import subprocess
import tarfile
from pathlib import Path

PACKAGES = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
DEFAULT_CACHE = Path("~/.cache/vipo/art")


def fetch(vendor: str, cache: Path) -> Path:
    """Pack one vendor's package into ``cache/vendor`` and unpack it; does nothing where it is already there."""
    folder = cache / vendor
    images = folder / "package" / "img" / vendor / "64"
    if images.is_dir():
        return images
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", PACKAGES[vendor], "--silent"], cwd=folder, check=True)
    archive = next(folder.glob("*.tgz"))
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar.getmembers() if "/sheets" not in m.name]
        tar.extractall(folder, members=wanted, filter="data")
    archive.unlink()
    return images


def main() -> None:
    """Command line: ``python fetch_art.py [--cache DIR]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args()
    for vendor in PACKAGES:
        images = fetch(vendor, args.cache.expanduser())
        print(f"{vendor}: {sum(1 for _ in images.glob('*.png'))} drawings in {images}")


if __name__ == "__main__":
    main()
