"""Pages that the code writes: every command and every recipe key, and the links of files that lie outside docs/.

It needs vipo alone, so that tests read the same pages as the site without its packages.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

import typer.main

from vipo.cli import app
from vipo.cli.catalogue import CATALOGUES

FROM_THE_TOP = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site and the files at the top of the repository that they are."""

LINK = re.compile(r"(\]\()([^)\s#]+)")
BY_NAME = re.compile(r"\[((?:[\w.-]+/)*[\w.-]+\.md)\]\(([^)\s#]+\.md)([^)\s]*)\)")
Row = tuple[str, ...]


def moved(markdown: str, page: str) -> str:
    """The links of a file as they must be on the site, where README.md and its neighbours lie among the pages."""
    if page in FROM_THE_TOP:
        markdown = LINK.sub(lambda found: found[1] + found[2].removeprefix("docs/"), markdown)
    depth = page.count("/")
    tops = {"../" * (depth + 1) + source: "../" * depth + target for target, source in FROM_THE_TOP.items()}
    tops |= {source: target for target, source in FROM_THE_TOP.items() if page in FROM_THE_TOP}
    return LINK.sub(lambda found: found[1] + tops.get(found[2], found[2]), markdown)


def titled(markdown: str, page: str, titles: Mapping[str, str]) -> str:
    """Links that are called by their file's name, by the page's title on the site instead."""

    def by_title(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), found[2]))
        return f"[{titles.get(target, found[1])}]({found[2]}{found[3]})"

    return BY_NAME.sub(by_title, markdown)


def titles(nav: list[dict[str, Any]]) -> dict[str, str]:
    """Pages to the titles that the map of the site gives them."""
    found: dict[str, str] = {}
    for item in nav:
        for title, value in item.items():
            found |= {value: title} if isinstance(value, str) else titles(value)
    return found


def filled(markdown: str) -> str:
    """A page with the references that it asks for by a comment, ``<!-- generated: NAME -->``."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda found: GENERATED[found[1]](), markdown)


def commands() -> str:
    """Every command with its arguments and options, from the help that the command line itself prints."""
    top: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in top.commands.items())


def _command(name: str, command: Any) -> str:
    context = type(command).context_class(command, info_name=f"vipo {name}")
    usage = " ".join([f"vipo {name}", *command.collect_usage_pieces(context)])
    rows = [_parameter(parameter, context) for parameter in command.params]
    return f"## vipo {name}\n\n```\n{usage}\n```\n\n{_help(command)}\n\n{_table(('', 'what'), rows)}"


def _help(command: Any) -> str:
    """The help, in which a single new line is a space."""
    return (command.help or "").strip()


def _parameter(parameter: Any, context: Any) -> Row:
    name, meaning = parameter.get_help_record(context)
    return f"`{' '.join(name.split())}`", _cell(meaning)


def keys() -> str:
    """Every recipe key by section, as `vipo list keys` prints them."""
    return "\n\n".join(_section(name, rows) for name, rows in _sections().items())


def _sections() -> Mapping[str, list[Mapping[str, str]]]:
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in CATALOGUES["keys"]():
        found.setdefault(row["key"].partition(".")[0] if "." in row["key"] else "at the top", []).append(row)
    return found


def _section(name: str, rows: list[Mapping[str, str]]) -> str:
    cells = [(f"`{row['key']}`", _default(row["default"]), _cell(row["meaning"]), row["on resume"]) for row in rows]
    return f"## {name}\n\n{_table(('key', 'default', 'meaning', 'on resume'), cells)}"


def _default(value: str) -> str:
    return value if value == "required" else f"`{value}`" if value else "empty"


def _cell(text: str) -> str:
    """Text for a cell: no line breaks, no bars; what looks like a tag stays text."""
    return escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def _table(heading: Row, rows: list[Row]) -> str:
    return "\n".join(_lines(heading, rows))


def _lines(heading: Row, rows: list[Row]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"|{' --- |' * len(heading)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


GENERATED: Mapping[str, Callable[[], str]] = {"commands": commands, "keys": keys}
