"""``vipo export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vipo.cli.arguments import AllowCode, Checkpoint
from vipo.cli.consoles import console, warn
from vipo.errors import UserError

if TYPE_CHECKING:
    from vipo.fetch.upload import Repository


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
    layout: Annotated[
        Literal["diffusers", "comfyui"], typer.Option("--format", help="Whose names a LoRA's layers have.")
    ] = "diffusers",
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of the Hugging Face hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for everybody; default private.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Write a run's policy for plain diffusers or ComfyUI, with a model card: `load_lora_weights`, `from_pretrained`.

    Example: `vipo export runs/quickstart`

    Example: `vipo export runs/quickstart --checkpoint best --dtype bfloat16`

    Example: `vipo export runs/wan --format comfyui --push me/wan-vipo`
    """
    if output is not None and output.exists():
        raise UserError(f"{str(output)!r} exists already; choose another --output")
    if public and push is None:
        raise UserError("--public says who sees what is uploaded; give --push OWNER/NAME too, or leave it out")
    repository = None if push is None else _repository(push, public)  # before anything is loaded
    from vipo.pretrained import DTYPES
    from vipo.runs.exporting import write_export
    from vipo.runs.trained import find_trained

    trained = find_trained(run, checkpoint, allow_code=allow_code)
    folder = output or trained.export_folder(layout)
    missing = write_export(trained, folder, layout=layout, dtype=None if dtype is None else DTYPES[dtype])
    warn([*trained.told, *missing])
    console.print(str(folder), soft_wrap=True)
    if repository is not None:
        _push(folder, repository)


def _repository(name: str, public: bool) -> Repository:
    from vipo.fetch.upload import find_repository

    return find_repository(name, public=public)


def _push(folder: Path, repository: Repository) -> None:
    from vipo.fetch.upload import upload, what_is_uploaded

    warn([f"Uploading to {repository}:", *(f"  {line}" for line in what_is_uploaded(folder))])
    console.print(upload(folder, repository), soft_wrap=True)
