"""``vipo sample``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vipo.cli.arguments import (
    AllowCode,
    Base,
    Batch,
    Checkpoint,
    Dtype,
    Frames,
    GuidanceScale,
    Height,
    Lora,
    Prompts,
    SamplesPerPrompt,
    Size,
    SolverSteps,
    Target,
    Width,
    read_texts,
)
from vipo.cli.consoles import console, warn
from vipo.errors import UserError

if TYPE_CHECKING:
    from vipo.runs import target as targets
    from vipo.types import Prompt


def sample(
    target: Target,
    prompts: Prompts = None,
    checkpoint: Checkpoint = None,
    lora: Lora = None,
    base: Base = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    samples_per_prompt: SamplesPerPrompt = 1,
    steps: SolverSteps = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    dtype: Dtype = None,
    guidance_scale: GuidanceScale = None,
    base_tail: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps, the last ones, that the base model takes.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    names: Annotated[
        Literal["number", "prompt"], typer.Option(help="Name files by number, or by the prompt as VBench wants them.")
    ] = "number",
    video: Annotated[
        Literal["webp", "mp4"] | None,
        typer.Option(help="Of clips: lossless webp, the default, or mp4 (needs vipo[video])."),
    ] = None,
    fps: Annotated[float | None, typer.Option(min=1, help="Of video files; default the model's.")] = None,
    sheet: Annotated[
        bool | None,
        typer.Option(help="All on one page with their prompts, sheet.png; default for several named by number."),
    ] = None,
    batch_size: Batch = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted sampling into --output, by the same arguments.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Sample pictures or videos from a run's policy or from any model folder.

    Example: `vipo sample runs/quickstart --prompts "a cat on a teal background" --count 4`

    Example: `vipo sample runs/quickstart --checkpoint best`

    Example: `vipo sample Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts "a cat" --height 480 --width 832 --frames 33`
    """
    from vipo.media.samples import sample_names
    from vipo.runs.sampled import sample_into
    from vipo.runs.target import open_target

    given = read_texts(prompts) if prompts else None
    media: dict[str, Any] = {"size": size, "height": height, "width": width, "frames": frames}
    which: dict[str, Any] = {"checkpoint": checkpoint, "lora": lora, "base": base, "guidance_scale": guidance_scale}
    model = open_target(target, **media, dtype=dtype, **which, keep_reference=base_tail > 0, allow_code=allow_code)
    _check_video(target, model, video, fps)
    texts = given or model.evaluation_prompts() or read_texts(["embedded:prompts_eval"])
    if names == "prompt":
        texts = _each_once(texts)
    warn(model.notices(texts))
    named = sample_names([prompt.text for prompt in texts], samples_per_prompt, names)
    how: dict[str, Any] = {"samples_per_prompt": samples_per_prompt, "steps": steps, "seed": seed}
    how |= {"batch_size": batch_size, "base_tail": base_tail, "resume": resume, "video": video or "webp", "fps": fps}
    wanted = (len(named) > 1 and names == "number") if sheet is None else sheet  # programs read a folder whole
    on_sheet = sample_into(output, model, texts, named, **how, sheet=wanted)
    console.print(_said(output, len(named), on_sheet), soft_wrap=True)


def _check_video(target: str, model: targets.Target, video: str | None, fps: float | None) -> None:
    """Pictures are PNG files without a rate, and the frames of a file are some milliseconds long each."""
    from vipo.schema import MAX_FPS

    given = [option for option, value in {"--video": video, "--fps": fps}.items() if value is not None]
    if given and model.generator.latent_shape()[1] == 1:
        raise UserError(f"{target!r} makes single pictures, written as png; leave out {' and '.join(given)}")
    if fps is not None and fps > MAX_FPS:
        raise UserError(f"--fps {fps:g} is more than the {MAX_FPS:g} frames per second of a clip at most; give fewer")


def _each_once(texts: list[Prompt]) -> list[Prompt]:
    """Samples that are named by their prompt: those of a prompt that comes again would take the first ones' place."""
    once: dict[str, Prompt] = {}
    for prompt in texts:
        once.setdefault(prompt.text, prompt)
    if again := len(texts) - len(once):
        warn([f"{again} of {len(texts)} prompts came before; named by prompt, each is sampled once"])
    return list(once.values())


def _said(output: Path, count: int, on_sheet: int | None) -> str:
    said = f"{count} sample{'' if count == 1 else 's'} in {output}"
    if on_sheet is None:
        return said
    return f"{said}, {'all' if on_sheet == count else f'the first {on_sheet}'} on sheet.png"
