"""The command line: parse, call, say it in one sentence. ``vipo --help`` is the map of it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from vipo.types import RunFailed, UserError

if TYPE_CHECKING:
    from vipo.types import Prompt

app = typer.Typer(
    name="vipo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Post-train image and video generators with RL that credits positions, not whole pictures.",
)
console = Console(markup=False, emoji=False)  # what is printed is data: a name may look like markup, or a path like :x:
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one (`vipo list recipes`).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
FAILED = 3  # exit code of a run in which nothing was learned
STOPPED = 130  # exit code of a run that was asked to stop, as shells have it


@app.command()
def train(
    recipe: Recipe,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in --output.")] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option("--from", help="With --resume: go on from this checkpoint, e.g. step-000010; later ones go."),
    ] = None,
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: a key or section that may differ now; may be given several times."),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
) -> None:
    """Train a recipe.

    Example: `vipo train recipes/quickstart.yaml credit=sample --output runs/scalar`

    Example: `vipo train quickstart optimizer.learning_rate=1e-4 --resume --from step-000010`
    """
    from vipo.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])  # before the heavy imports, so that a slip is told at once

    from vipo.progress import follow
    from vipo.run import Run

    folder = output or Path("runs") / parsed.name
    run = Run(parsed, folder, resume=resume, checkpoint=checkpoint, allow_changes=allow_changes or ())
    console.quiet = not run.writes  # with several processes, one speaks
    follow(run, console)
    if not run.finished:
        said = ["--output", str(folder), "--resume", *([] if report else ["--no-report"])]
        said += [word for key in allow_changes or () for word in ("--allow-changes", key)]
        command = shlex.join([*_vipo(), "train", recipe, *(overrides or []), *said])
        how = (
            f"Go on, with the same launcher of {count} processes, with"
            if (count := run.processes) > 1
            else "Go on with"
        )
        stopped = f"Stopped and saved after iteration {run.iteration}. {how}:\n  {command}"
        console.print(stopped, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(STOPPED)
    if report and run.writes:
        from vipo.report.page import write_report

        console.print(f"Report: {write_report(folder)}", soft_wrap=True)


def _vipo() -> list[str]:
    """The words that start this program again."""
    called = Path(sys.argv[0])
    if called.suffix == ".py":  # python -m vipo.cli
        return [sys.executable, "-m", "vipo.cli"]
    found = shutil.which("vipo")
    return ["vipo"] if found and Path(found).resolve() == called.resolve() else [str(called)]


def _read_texts(prompts: list[str]) -> list[Prompt]:
    """Each argument is a prompt file if it looks like one, else a prompt."""
    from vipo.build import EMBEDDED, prompt_file
    from vipo.prompts import is_unicode, names_prompts, read_prompts
    from vipo.types import Prompt

    found: list[Prompt] = []
    for entry in prompts:
        if not is_unicode(entry):
            raise UserError(f"--prompts {entry!r} is not UTF-8; write it again")
        is_file = entry.startswith(EMBEDDED) or names_prompts(entry)
        found += read_prompts(prompt_file(entry)) if is_file else [Prompt(entry)]
    return found


Target = Annotated[str, typer.Argument(help="A run directory, a pipeline folder or hub id, or embedded:NAME.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompts", help="A prompt file, set:NAME, embedded:NAME or a prompt; may be given several times."),
]
Lora = Annotated[Path | None, typer.Option(help="A LoRA, .safetensors file or folder, as the policy of a plain model.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Samples at a time; fewer need less memory. Default 64 pictures or frames.")
]
Size = Annotated[int | None, typer.Option(help="Side in pixels of a plain model's square pictures.")]
Height = Annotated[int | None, typer.Option(help="In pixels, for a plain model; default the model's.")]
Width = Annotated[int | None, typer.Option(help="In pixels, for a plain model; default the model's.")]
Frames = Annotated[int | None, typer.Option(help="Of a plain video model's clips; default the model's.")]


@app.command()
def sample(
    target: Target,
    prompts: Prompts = None,
    lora: Lora = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Solver steps; default as trained, or as the plain pipeline has them.")
    ] = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    base_tail: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps, the last ones, that the base model takes.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    names: Annotated[
        Literal["number", "prompt"], typer.Option(help="Name files by number, or by the prompt as VBench wants them.")
    ] = "number",
    video: Annotated[Literal["webp", "mp4"], typer.Option(help="Lossless webp, or mp4 (needs vipo[video]).")] = "webp",
    fps: Annotated[float | None, typer.Option(min=1, help="Of video files; default the model's.")] = None,
    batch: Batch = None,
) -> None:
    """Sample pictures or videos from a run's policy or from any model folder.

    Example: `vipo sample runs/quickstart --prompts "a cat on a teal background" --count 4`

    Example: `vipo sample Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts "a cat" --height 480 --width 832 --frames 33`
    """
    from vipo.samples import sample_names, save_samples
    from vipo.target import open_target

    given = _read_texts(prompts) if prompts else None
    model = open_target(target, size=size, height=height, width=width, frames=frames, lora=lora)
    texts = given or model.evaluation_prompts or _read_texts(["embedded:prompts_eval"])
    _warn(model.notices(texts))
    files = iter(sample_names([prompt.text for prompt in texts], count, names))
    for part in model.sample(texts, count=count, steps=steps, seed=seed, batch_size=batch, base_tail=base_tail):
        save_samples(output, part.media, list(islice(files, len(part.media))), video=video, fps=fps or model.fps)
    console.print(f"{len(texts) * count} samples in {output}", soft_wrap=True)


@app.command()
def maps(
    files: Annotated[list[Path], typer.Argument(help="PNG, JPEG, WebP, GIF, TIFF; mp4 with vipo[video].")],
    backbone: Annotated[str, typer.Option(help="See `vipo list backbones`.")] = "efficientnet_lite",
    output: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("maps"),
    components: Annotated[int, typer.Option(min=1)] = 3,
    aggregation: Annotated[str, typer.Option(help="variance, average or first.")] = "variance",
    orientation: Annotated[str | None, typer.Option(help="See docs/orientation.md.")] = None,
    smoothing_sigma: Annotated[float, typer.Option(min=0, help="In feature cells; 0 is off.")] = 1.0,
    pretrained: Annotated[str | None, typer.Option(help="Weights for dinov2, resnet or sam: hub id or folder.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Input side for the backbone, in pixels.")] = None,
    temporal_stride: Annotated[int, typer.Option(min=1, help="Pixel frames per latent frame, for clips.")] = 1,
    scope: Annotated[str, typer.Option(help="frame or clip: one basis per frame, or for all frames.")] = "frame",
) -> None:
    """Show what the allocation map sees in pictures or clips of yours.

    A picture is seen as a viewer shows it: turned as its EXIF says, 16 bits in full; what is transparent is white. At
    most 67108864 pixels (8192 x 8192, over all frames) of a file are read.

    Example: `vipo maps photo.jpg clip.gif --output maps`
    """
    from vipo.showmaps import show_maps

    options = {"pretrained": pretrained, "resolution": resolution}
    structuring: dict[str, Any] = {
        "components": components,
        "aggregation": aggregation,
        "smoothing_sigma": smoothing_sigma,
        "scope": scope,
        "temporal_stride": temporal_stride,
    }
    if orientation is not None:
        structuring["orientation"] = orientation
    chosen = {key: value for key, value in options.items() if value is not None}
    for path in show_maps(files, output, backbone=backbone, backbone_options=chosen, **structuring):
        console.print(str(path), soft_wrap=True)


@app.command("plan")
def plan_recipe(
    recipe: Recipe,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Accelerators, one process each.")] = 1,
    memory: Annotated[str, typer.Option(help="Of each, like 80GB.")] = "80GB",
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak rate reached.")] = 0.35,
    tflops: Annotated[float, typer.Option(min=0.001, help="Peak rate of each; 989 is an H100 SXM in bf16.")] = 989.0,
    sharded: Annotated[bool, typer.Option("--sharded", help="FSDP: spread the network over the GPUs.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe will need, in memory and time, and what to change if it does not fit.

    Example: `vipo plan quickstart --gpus 1 --memory 8GB`
    """
    from vipo.plan import Ledger, Machine, advise, plan
    from vipo.plan.show import memory_size, plan_view
    from vipo.recipe import load_recipe

    parsed, ledger = load_recipe(recipe, overrides or []), Ledger()
    machine = Machine(gpus, memory_size(memory), tflops, utilisation, sharded)
    found, advice = plan(parsed, machine, ledger), advise(parsed, machine, ledger)
    if as_json:
        sys.stdout.write(json.dumps({**found.as_json(), "advice": advice.as_json()}, indent=2) + "\n")
    else:
        console.print(plan_view(found, advice))


@app.command()
def evaluate(
    target: Target,
    rewards: Annotated[
        str | None, typer.Option(help="Names, comma-separated, or a YAML file as under `judges`; default the run's.")
    ] = None,
    prompts: Prompts = None,
    lora: Lora = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    fps: Annotated[
        float | None, typer.Option(min=1, help="Of a plain model's clips, for rewards that ask; default the model's.")
    ] = None,
    batch: Batch = None,
    output: Annotated[Path | None, typer.Option(help="Folder for scores and sheets, see docs/evaluate.md.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the evaluation in --output.")] = False,
    pictures: Annotated[bool, typer.Option("--pictures", help="Keep every picture in --output too.")] = False,
    as_json: Json = False,
) -> None:
    """Score a policy beside its base model on fixed prompts and noise, with 95 % bootstrap intervals.

    Example: `vipo evaluate runs/quickstart --rewards emoji_judge,emoji_layout`

    Example: `vipo evaluate models/wan --lora runs/wan/export --rewards mine.py:smooth --prompts clips.txt --frames 33`
    """
    from vipo.evaldir import EvaluationFolder
    from vipo.evaluate import summary
    from vipo.recipe import read_judges
    from vipo.tables import evaluation_table
    from vipo.target import open_target

    if output is None and (resume or pictures):
        raise UserError("--resume and --pictures need a folder to work in; name it with --output")
    given = _read_texts(prompts) if prompts else None
    model = open_target(target, size=size, height=height, width=width, frames=frames, fps=fps, lora=lora)
    if rewards and rewards.endswith((".yaml", ".yml")):
        model, rewards = model.judged_by(read_judges(rewards)), None
    texts, asked = given or model.evaluation_prompts, rewards.split(",") if rewards else list(model.rewards)
    if not asked:
        raise UserError("this model has no run behind it, so name what to score with --rewards A,B")
    if not texts:
        raise UserError("this model has no run behind it, so name prompts with --prompts FILE")
    _warn(model.notices(texts, asked))
    shared: dict[str, Any] = {"count": count, "steps": steps, "batch_size": batch or model.batch_size}
    folder = None
    if output is not None:
        settings = model.settings(texts, asked, **shared)
        folder = EvaluationFolder(output, settings, fps=model.fps, resume=resume, pictures=pictures)
    with _counting(len(texts)) as done:
        judgement = model.evaluate(texts, asked, **shared, keeper=folder, progress=done)
    if folder is not None:
        folder.finish(judgement)
    rows = summary(judgement)
    _show(rows, evaluation_table(rows), as_json=as_json)
    _warn(judgement.failures)


def _warn(sentences: Iterable[str]) -> None:
    """On the error stream, so that what is read by a program stays what it is."""
    for sentence in sentences:
        errors.print(sentence, soft_wrap=True)


@contextmanager
def _counting(prompts: int) -> Iterator[Callable[[int], None]]:
    """A line on a terminal's error stream that says how many prompts are done."""
    with errors.status(f"0 of {prompts} prompts") as status:
        yield lambda done: status.update(f"{done} of {prompts} prompts")


def _show(document: Any, table: Table, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        console.print(table)


@app.command()
def vbench(
    files: Annotated[list[Path], typer.Argument(help="VBench's *_eval_results.json, or folders of them.")],
    partial: Annotated[bool, typer.Option("--partial", help="Go on with dimensions missing.")] = False,
    as_json: Json = False,
) -> None:
    """Aggregate VBench's results to Quality, Semantic and Total, as its leaderboard does.

    Example: `vipo vbench evaluation_results`
    """
    from vipo.tables import vbench_table
    from vipo.vbench import aggregate, read_results, table

    scores = read_results(files)
    totals = aggregate(scores)
    if totals.missing and not partial:
        raise UserError(f"these results lack {', '.join(totals.missing)}; add their files, or go on with --partial")
    rows = table(scores)
    _show({**asdict(totals), "dimensions": rows}, vbench_table(rows, totals), as_json=as_json)


@app.command("serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(help="See `vipo list rewards`, or file.py:function.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    host: Annotated[str, typer.Option(help="Anything but this machine needs --token-env.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8421,
    token_env: Annotated[str | None, typer.Option(help="Environment variable with the bearer token.")] = None,
    max_megabytes: Annotated[float, typer.Option(help="Longest request.")] = 256,
    device: Annotated[str | None, typer.Option(help="Default: the accelerator if there is one.")] = None,
) -> None:
    """Serve a reward to runs in other processes, which name it as the reward `remote` with `url`.

    Example: `vipo serve-reward jpeg_compressibility quality=90 --port 8421`
    """
    from vipo.recipe import apply_override
    from vipo.rewards.server import serve

    parsed: dict[str, Any] = {}
    for option in options or []:
        apply_override(parsed, option)
    serve(name, parsed, host=host, port=port, token_env=token_env, max_megabytes=max_megabytes, device=device)


@app.command("convert-reward")
def convert_reward(
    name: Annotated[str, typer.Argument(help="hpsv2.1, imagereward or aesthetic.")],
    source: Annotated[Path, typer.Argument(help="The published checkpoint.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Turn a published pickle checkpoint into safetensors, once; code in it is never run.

    Example: `vipo convert-reward hpsv2.1 HPS_v2.1_compressed.pt hpsv2.1.safetensors`
    """
    from vipo.rewards import convert

    console.print(str(convert.convert_reward(name, source, target)), soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html: curves, before and after, maps, health. Works while the run is going.

    Example: `vipo report runs/quickstart`
    """
    from vipo.report.page import write_report

    console.print(str(write_report(run)), soft_wrap=True)


@app.command()
def compare(runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the yardstick.")]) -> None:
    """Compare the last evaluations of several runs, paired prompt by prompt.

    Example: `vipo compare runs/quickstart-grpo runs/quickstart`
    """
    from vipo.report.compare import compare_runs, text_table

    console.print(text_table(compare_runs(runs)), highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    output: Annotated[Path | None, typer.Option(help="Folder; default RUN/export.")] = None,
) -> None:
    """Write a run's policy for plain diffusers: `load_lora_weights` or `from_pretrained`.

    Example: `vipo export runs/quickstart`
    """
    from vipo.files import written_whole
    from vipo.run import load_run

    folder = output or run / "export"
    if output is not None and output.exists():
        raise UserError(f"{str(output)!r} exists already; choose another --output")
    session = load_run(run)
    with written_whole(folder) as aside:
        session.policy.export(session.generator, aside)
    console.print(str(folder), soft_wrap=True)


@app.command("list")
def list_parts(
    kind: Annotated[str, typer.Argument(help="generators, backbones, rewards, prompts, recipes or keys.")],
    as_json: Json = False,
) -> None:
    """List what can be named in a recipe.

    Example: `vipo list rewards`
    """
    from vipo.catalogue import CATALOGUES

    if kind not in CATALOGUES:
        raise UserError(f"{kind!r} cannot be listed; choose from {', '.join(CATALOGUES)}")
    rows = CATALOGUES[kind]()
    table = Table()
    for number, heading in enumerate(rows[0]):  # a name is there to be copied: it must not be cut
        table.add_column(heading, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    _show(rows, table, as_json=as_json)


def _quiet() -> None:
    """Keep the libraries' start-up chatter out of our output; errors still show. VIPO_DEBUG=1 lets it through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def main() -> None:
    """Entry point. What the user can mend becomes one sentence and exit code 2, a run that learned nothing one and 3.

    Anything else shows its trace.
    """
    debug = bool(os.environ.get("VIPO_DEBUG"))
    if not debug:
        _quiet()
    try:
        app()
    except (UserError, RunFailed, OSError) as error:  # OSError: a full disk, a folder without permission
        if debug:
            raise
        errors.print(f"vipo: {error}", style="red", soft_wrap=True)
        sys.exit(FAILED if isinstance(error, RunFailed) else 2)


if __name__ == "__main__":
    main()
