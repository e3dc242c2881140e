"""``vipo list``."""

from __future__ import annotations

from typing import Annotated

import typer

from vipo.cli import completing
from vipo.cli.arguments import Json
from vipo.cli.catalogue import CATALOGUES
from vipo.cli.consoles import show
from vipo.errors import UserError
from vipo.user_file import BACKBONE, CREDIT, GENERATOR, LOSS, REWARD, SOURCE

OWN = {
    "generators": GENERATOR,
    "backbones": BACKBONE,
    "rewards": REWARD,
    "sources": SOURCE,
    "credits": CREDIT,
    "losses": LOSS,
}
"""What may also be a part of the user's own, ``file.py:thing``."""


def list_parts(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(CATALOGUES)}.", autocompletion=completing.kinds)],
    as_json: Json = False,
) -> None:
    """List what can be named in a recipe.

    Example: `vipo list rewards`
    """
    if kind not in CATALOGUES:
        raise UserError(f"{kind!r} cannot be listed; choose from {', '.join(CATALOGUES)}")

    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    rows = CATALOGUES[kind]()
    table = Table()
    for number, heading in enumerate(rows[0]):  # a name is there to be copied: it must not be cut
        table.add_column(heading, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    own = f"or one of your own, file.py:thing, where the file has\n{OWN[kind].example}" if kind in OWN else ""
    show(rows, Group(table, *filter(None, [escape(own)])), as_json=as_json)
