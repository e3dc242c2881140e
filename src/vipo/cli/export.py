"""``vipo export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vipo.cli.arguments import Checkpoint
from vipo.cli.consoles import console, warn
from vipo.errors import UserError


def export(
    run: Annotated[Path, typer.Argument(help="A run directory, or a checkpoint's folder.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder; default RUN/export, of a chosen checkpoint RUN/export-NAME.")
    ] = None,
    checkpoint: Checkpoint = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the exported weights; default as they are, what is trained in float32."),
    ] = None,
) -> None:
    """Write a run's policy for plain diffusers: `load_lora_weights` or `from_pretrained`.

    Example: `vipo export runs/quickstart`

    Example: `vipo export runs/quickstart --checkpoint best --dtype bfloat16`
    """
    from vipo.files import written_whole
    from vipo.pretrained import DTYPES
    from vipo.runs.trained import find_trained, open_trained

    if output is not None and output.exists():
        raise UserError(f"{str(output)!r} exists already; choose another --output")
    trained = find_trained(run, checkpoint)
    folder = output or trained.export_folder()
    model = open_trained(trained)
    warn(trained.told)
    with written_whole(folder) as aside:
        model.policy.export(model.generator, aside, dtype=None if dtype is None else DTYPES[dtype])
    console.print(str(folder), soft_wrap=True)
