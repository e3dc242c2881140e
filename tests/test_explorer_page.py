"""The explorer's page in a headless Chromium, served by a process that can reach nothing but this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from skimage import data as photos

import tiny
from browser import CHROMIUM, page
from vipo.recipe import parse_recipe
from vipo.runs.run import Run

pytest.importorskip("nicegui", reason="needs vipo[ui]")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

SERVER = """
import sys

def alone(event, given):
    named = given[1][0] if event == "socket.connect" and isinstance(given[1], tuple) else None
    named = given[0] if event == "socket.getaddrinfo" else named
    if named not in (None, "127.0.0.1", "localhost"):
        sys.stderr.write(f"REACHED FOR {named}\\n")
        raise OSError(f"no network: {named}")

sys.addaudithook(alone)
from vipo.cli import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A photograph, a clip and a run."""
    folder = tmp_path_factory.mktemp("page")
    Image.fromarray(photos.astronaut()[::4, ::4]).save(folder / "photo.png")
    frames = [Image.fromarray(photos.astronaut()[20 * k : 20 * k + 96, :96]) for k in range(3)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:])
    raw = tiny.recipe(model_folder, folder / "prompts.txt", credit="advantage_map")
    raw["structuring"] = {"sources": ["deviation", "perceptual"], "backbone_options": {"resolution": 64}}
    raw["training"] |= {"iterations": 1}
    list(Run(parse_recipe(raw), folder / "run"))
    return folder


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-c", SERVER, "maps", "--ui", "photo.png", "run", "--output", "saved"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        first = server.stdout.readline()
        assert first.startswith("http://127.0.0.1:"), server.stderr.read()
        yield first.split()[0]
        server.send_signal(signal.SIGINT)
        _, told = server.communicate(timeout=60)
    assert server.returncode == 0 and not told, told


def test_both_views_in_a_browser(folder: Path, address: str, tmp_path: Path) -> None:
    def text(part: str) -> str:
        return f"(document.querySelector('[data-part=\"{part}\"]') || {{innerText: ''}}).innerText"

    with page(address, tmp_path / "profile") as seen:
        seen.wait(f"{text('lines')}.includes('components: 3')")
        seen.write("input[data-part=components]", "1")
        seen.wait(f"{text('changed')}.includes('components: 3 → 1') && {text('lines')}.includes('components: 1')")
        seen.wait(f"{text('moved')}.includes('correlation')")
        seen.picture(tmp_path / "picture.png")
        seen.give("input[type=file]", folder / "clip.gif")
        seen.wait("document.body.innerText.includes('96 x 96, 3 frames')")
        seen.click("[data-part=save]")
        seen.wait("document.body.innerText.includes('saved ')")
        seen.click(".q-tab:nth-of-type(2)")
        seen.wait(f"{text('run')}.includes('credit advantage_map of deviation x perceptual')")
        first = seen.wait(text("facts"))
        seen.click("[data-part=sample-2]")
        seen.wait(f"{text('facts')} && {text('facts')} !== {json.dumps(first)}")
        seen.wait("document.querySelectorAll('article').length === 5")
        seen.wait(f"{text('missing-text_relevance')}.includes('Not kept')")
        assert seen.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        seen.write("input[data-part=folder]", str(folder))
        seen.click("[data-part=open]")
        seen.wait("document.querySelector('[role=alert]').innerText.includes('is not a run directory')")
        seen.picture(tmp_path / "run.png")
        own = (address, address.replace("http", "ws"), f"blob:{address}", "data:")
        elsewhere = [asked for asked in seen.asked if not asked.startswith(own)]
        assert not elsewhere and not seen.problems
    saved = yaml.safe_load((folder / "saved" / "clip-map.yaml").read_text())
    assert saved["structuring"]["components"] == 1 and (folder / "saved" / "clip-map.png").is_file()
    assert not (folder / ".nicegui").exists()
