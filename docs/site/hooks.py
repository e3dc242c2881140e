"""What the site has beyond docs/: the files at the top of the repository, and references that the code writes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from pages import FROM_THE_TOP, filled, moved, titled, titles

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """The front door, how to contribute and what changed are pages too."""
    for page, source in FROM_THE_TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Links are those of the repository until here; references are written where a page asks for them."""
    name = page.file.src_uri
    return filled(titled(moved(markdown, name), name, titles(config.nav)))


def on_post_page(output: str, **_: Any) -> str:
    """Wide tables scroll by themselves, so that a phone shows the text at its own width."""
    return re.sub(r"<table>.*?</table>", r'<div class="wide">\g<0></div>', output, flags=re.DOTALL)
