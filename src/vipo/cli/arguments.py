"""Arguments that several commands take, and what the texts among them stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vipo.cli import completing
from vipo.errors import UserError

if TYPE_CHECKING:
    from vipo.types import Prompt

Recipe = Annotated[
    str,
    typer.Argument(
        help="A recipe file, or the name of a shipped one (`vipo list recipes`).", autocompletion=completing.recipes
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys of the recipe and their values here (`vipo list keys`).",
        autocompletion=completing.overrides,
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="A run directory.", autocompletion=completing.runs)]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Rewards and other parts that a file names may be Python code, file.py:thing."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Target = Annotated[
    str,
    typer.Argument(
        help="A run or a checkpoint of it, a pipeline folder or hub id, embedded:NAME, or a LoRA.",
        autocompletion=completing.runs,
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts",
        help="A prompt file, set:NAME, embedded:NAME, hub:OWNER/NAME@COMMIT or a prompt; also several times.",
    ),
]
Lora = Annotated[Path | None, typer.Option(help="A LoRA, .safetensors file or folder, as the policy of a plain model.")]
Base = Annotated[
    str | None, typer.Option(help="The model that TARGET, then a LoRA, goes on: a pipeline folder or hub id.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="Of a run, e.g. step-000020, or best as training.keep_best has it; default the latest."),
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Default as the run was trained, or as the model's pipeline has it.")
]
SamplesPerPrompt = Annotated[int, typer.Option("--count", min=1, help="Pictures per prompt.")]
Batch = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Samples at a time; fewer need less memory. Default 64 pictures or frames."),
]
Size = Annotated[int | None, typer.Option(help="Side in pixels of a plain model's square pictures.")]
Height = Annotated[int | None, typer.Option(help="In pixels, for a plain model; default the model's.")]
Width = Annotated[int | None, typer.Option(help="In pixels, for a plain model; default the model's.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of a plain model's weights; default float32. A run has its own."),
]
SolverSteps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Solver steps; default as trained, or as the plain pipeline has them."),
]
Frames = Annotated[int | None, typer.Option(help="Of a plain video model's clips; default the model's.")]


def read_texts(prompts: Sequence[str]) -> list[Prompt]:
    """Each argument is a prompt file if it looks like one, else a prompt."""
    from vipo.files import is_unicode
    from vipo.prompts.files import named_prompts, names_prompts
    from vipo.types import Prompt

    found: list[Prompt] = []
    for entry in prompts:
        if not is_unicode(entry):
            raise UserError(f"--prompts {entry!r} is not UTF-8; write it again")
        found += named_prompts(entry) if names_prompts(entry) else [Prompt(entry)]
    return found
