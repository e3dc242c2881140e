"""``vipo evaluate`` and ``vipo vbench``: scores as tables."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Json,
    Lora,
    Prompts,
    SamplesPerPrompt,
    Size,
    SolverSteps,
    Target,
    Width,
    read_texts,
)
from vipo.cli.consoles import counting, show, warn
from vipo.errors import UserError

if TYPE_CHECKING:
    from vipo.runs import target as targets
    from vipo.types import Prompt


def evaluate(
    target: Target,
    rewards: Annotated[
        str | None, typer.Option(help="Names, comma-separated, or a YAML file as under `judges`; default the run's.")
    ] = None,
    prompts: Prompts = None,
    checkpoint: Checkpoint = None,
    lora: Lora = None,
    base: Base = None,
    samples_per_prompt: SamplesPerPrompt = 2,
    steps: SolverSteps = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    dtype: Dtype = None,
    guidance_scale: GuidanceScale = None,
    fps: Annotated[
        float | None, typer.Option(min=1, help="Of a plain model's clips, for rewards that ask; default the model's.")
    ] = None,
    batch_size: Batch = None,
    output: Annotated[Path | None, typer.Option(help="Folder for scores and sheets, see docs/evaluate.md.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the evaluation in --output.")] = False,
    pictures: Annotated[bool, typer.Option("--pictures", help="Keep every picture in --output too.")] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Score a policy beside its base model on fixed prompts and noise, with 95 % bootstrap intervals.

    Example: `vipo evaluate runs/quickstart --rewards emoji_judge,emoji_layout`

    Example: `vipo evaluate models/wan --lora runs/wan/export --rewards mine.py:smooth --prompts clips.txt --frames 33`
    """
    from vipo.cli.evaluate_target import evaluate_target
    from vipo.engine import Engine
    from vipo.evaluation.estimate import summary
    from vipo.evaluation.tables import evaluation_table
    from vipo.runs.target import open_target

    if output is None and (resume or pictures):
        raise UserError("--resume and --pictures need a folder to work in; name it with --output")
    given, engine = read_texts(prompts) if prompts else None, Engine()
    media: dict[str, Any] = {"size": size, "height": height, "width": width, "frames": frames, "fps": fps}
    which: dict[str, Any] = {"checkpoint": checkpoint, "lora": lora, "base": base, "guidance_scale": guidance_scale}
    model = open_target(target, **media, dtype=dtype, **which, device=engine.device, allow_code=allow_code)
    model, asked, texts = _what_to_score(model, rewards, given)
    _check_code(target, model, asked, rewards or "", allowed=allow_code)
    how: dict[str, Any] = {"samples_per_prompt": samples_per_prompt, "steps": steps, "batch_size": batch_size}
    where: dict[str, Any] = {"output": output, "resume": resume, "pictures": pictures}
    with counting(len(texts)) if engine.is_main else nullcontext(lambda _done: None) as done:
        warn(model.notices(texts, asked) if engine.is_main else ())
        evaluation = evaluate_target(model, texts, asked, engine, **how, **where, progress=done)
    if engine.is_main:  # with several processes, one speaks
        rows = summary(evaluation)
        show(rows, evaluation_table(rows), as_json=as_json)
        warn(evaluation.failures)


def _check_code(target: str, model: targets.Target, asked: list[str], given: str, *, allowed: bool) -> None:
    """A run, or a file of judges, may be somebody else's; what stands in --rewards is the user's own word."""
    from vipo.recipe import check_code, code_of

    sections = [{name: model.rewards[name]} for name in asked if name in model.rewards]
    source = given if given.endswith((".yaml", ".yml")) else target
    check_code(code_of(sections), source, own=given.split(","), allowed=allowed)


def _what_to_score(
    model: targets.Target, rewards: str | None, given: list[Prompt] | None
) -> tuple[targets.Target, list[str], list[Prompt]]:
    """The model with the rewards it may be asked for, their names, and the prompts."""
    from vipo.recipe import read_judges

    if rewards and rewards.endswith((".yaml", ".yml")):
        model, rewards = model.with_rewards(read_judges(rewards)), None
    asked, texts = rewards.split(",") if rewards else list(model.rewards), given or list(model.evaluation_prompts())
    if not asked:
        raise UserError("this model has no run behind it, so name what to score with --rewards A,B")
    if not texts:
        raise UserError("this model has no run behind it, so name prompts with --prompts FILE")
    return model, asked, texts


def vbench(
    files: Annotated[list[Path], typer.Argument(help="VBench's *_eval_results.json, or folders of them.")],
    partial: Annotated[bool, typer.Option("--partial", help="Go on with dimensions missing.")] = False,
    as_json: Json = False,
) -> None:
    """Aggregate VBench's results to Quality, Semantic and Total, as its leaderboard does.

    Example: `vipo vbench evaluation_results`
    """
    from vipo.evaluation.tables import vbench_table
    from vipo.evaluation.vbench import aggregate, read_results, table

    scores = read_results(files)
    totals = aggregate(scores)
    if totals.missing and not partial:
        raise UserError(f"these results lack {', '.join(totals.missing)}; add their files, or go on with --partial")
    rows = table(scores)
    show({**asdict(totals), "dimensions": rows}, vbench_table(rows, totals), as_json=as_json)
