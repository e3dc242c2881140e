"""A page out of its template: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vipo.report import svg

HERE = Path(__file__).parent
PAPER = "https://arxiv.org/abs/2511.18719"


def rendered(template: Path, sheets: Sequence[str] = (), **values: Any) -> str:
    """The page as text; what is put in is escaped.

    Args:
        template: may import ``parts.html.j2``, which is beside this file.
        sheets: style sheets beside this file, after ``page.css``.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=svg.number, signed=svg.signed, fixed=svg.fixed)
    style = "".join((HERE / sheet).read_text(encoding="utf-8") for sheet in ("page.css", *sheets))
    return environment.get_template(template.name).render(style=Markup(style), paper=PAPER, **values)
