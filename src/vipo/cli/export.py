"""``vipo export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vipo.cli.arguments import RunFolder
from vipo.cli.consoles import console
from vipo.errors import UserError


def export(
    run: RunFolder, output: Annotated[Path | None, typer.Option(help="Folder; default RUN/export.")] = None
) -> None:
    """Write a run's policy for plain diffusers: `load_lora_weights` or `from_pretrained`.

    Example: `vipo export runs/quickstart`
    """
    from vipo.files import written_whole
    from vipo.runs.trained import open_run

    folder = output or run / "export"
    if output is not None and output.exists():
        raise UserError(f"{str(output)!r} exists already; choose another --output")
    _, model = open_run(run)
    with written_whole(folder) as aside:
        model.policy.export(model.generator, aside)
    console.print(str(folder), soft_wrap=True)
