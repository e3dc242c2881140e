"""The documentation as files: links that lead somewhere, a map of the site that is whole, examples that run.

None of it needs the site's packages; ``make docs`` builds the site with them, strictly.
"""

from __future__ import annotations

import doctest
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from vipo import __version__
from vipo.cli import app
from vipo.cli.catalogue import CATALOGUES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "site"))

pages = import_module("pages")
PAGES = [ROOT / source for source in pages.FROM_THE_TOP.values()] + sorted(DOCS.rglob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
EXAMPLES = ["vipo.sde", "vipo.objective", "vipo.structuring.maps", "vipo.structuring.frames"]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings: lower case, no punctuation, dashes for spaces."""
    headings = HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


def test_every_page_is_on_the_map_of_the_site_once_and_every_entry_is_there() -> None:
    named = pages.titles(SITE["nav"])
    assert len(named) == len(set(named.values())) == str(SITE["nav"]).count(".md")
    assert set(named) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | set(pages.FROM_THE_TOP)


def test_links_of_files_at_the_top_are_moved_with_them() -> None:
    assert pages.moved("[a](docs/plan.md#b) [c](CONTRIBUTING.md) [d](https://e/docs/f)", "index.md") == (
        "[a](plan.md#b) [c](contributing.md) [d](https://e/docs/f)"
    )
    assert pages.moved("[a](../../README.md#b) [c](../plan.md)", "guides/x.md") == "[a](../index.md#b) [c](../plan.md)"
    assert pages.moved("[a](../CHANGELOG.md)", "x.md") == "[a](changelog.md)"


def test_a_link_that_is_called_by_its_file_has_the_pages_title() -> None:
    nav = [{"Guides": [{"Will it fit?": "plan.md"}, {"Speed": "guides/speed.md"}]}]
    text = "[docs/plan.md](../plan.md#a), [speed.md](speed.md), [here](speed.md), [other.md](other.md)"
    assert pages.titled(text, "guides/x.md", pages.titles(nav)) == (
        "[Will it fit?](../plan.md#a), [Speed](speed.md), [here](speed.md), [other.md](other.md)"
    )


def test_the_references_have_every_command_option_and_key() -> None:
    top: Any = typer.main.get_command(app)
    written = pages.filled("<!-- generated: commands -->")
    for name, command in top.commands.items():
        assert f"## vipo {name}\n" in written
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert all(option in written for option in options)
    rows = CATALOGUES["keys"]()
    keys = pages.filled("<!-- generated: keys -->")
    assert len(rows) > 80 and all(f"| `{row['key']}` |" in keys for row in rows)


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_of_the_reference_are_true(module: str) -> None:
    """As a reader tries them; doctest's own search passes over functions that something has wrapped."""
    names = vars(import_module(module))
    texts = {name: value.__doc__ for name, value in names.items() if getattr(value, "__module__", "") == module}
    examples = {name: text for name, text in texts.items() if text and ">>>" in text}
    assert examples
    for name, text in examples.items():
        test = doctest.DocTestParser().get_doctest(text, {}, name, module, 0)
        assert doctest.DocTestRunner().run(test) == doctest.TestResults(0, len(test.examples))


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__ and cited["license"] == "Apache-2.0"
    assert any("2511.18719" in str(reference) for reference in cited["references"])
