"""The command line: parse, call, say it in one sentence. ``vipo --help`` is the map of it."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vipo.types import UserError

if TYPE_CHECKING:
    from vipo.evaluate import Evaluation
    from vipo.types import Prompt

app = typer.Typer(
    name="vipo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Post-train image and video generators with RL that credits positions, not whole pictures.",
)
console = Console()

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one (`vipo list recipes`).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
STOPPED = 130  # exit code of a run that was asked to stop, as shells have it


@app.command()
def train(
    recipe: Recipe,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in --output.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
) -> None:
    """Train a recipe.

    Example: `vipo train recipes/quickstart.yaml credit=sample --output runs/scalar`
    """
    from vipo.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])  # before the heavy imports, so that a slip is told at once

    from vipo.progress import follow
    from vipo.run import Run

    folder = output or Path("runs") / parsed.name
    run = Run(parsed, folder, resume=resume)
    console.quiet = not run.writes  # with several processes, one speaks
    follow(run, console)
    if not run.finished:
        command = " ".join(["vipo train", recipe, *(overrides or []), f"--output {folder}", "--resume"])
        console.print(f"Stopped and saved after iteration {run.iteration}. Go on with:\n  {command}", soft_wrap=True)
        raise typer.Exit(STOPPED)
    if report and run.writes:
        from vipo.report.page import write_report

        console.print(f"Report: {write_report(folder)}", soft_wrap=True)


def _read_texts(prompts: list[str]) -> list[Prompt]:
    """Each argument is a prompt file if there is such a file, else a prompt."""
    from vipo.build import EMBEDDED, prompt_file
    from vipo.prompts import read_prompts
    from vipo.types import Prompt

    found: list[Prompt] = []
    for entry in prompts:
        is_file = entry.startswith(EMBEDDED) or Path(entry).suffix in (".txt", ".jsonl", ".csv", ".parquet")
        found += read_prompts(prompt_file(entry)) if is_file else [Prompt(entry)]
    return found


Target = Annotated[str, typer.Argument(help="A run directory, a pipeline folder or hub id, or embedded:NAME.")]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompts", help="A prompt file or a prompt; may be given several times.")
]


@app.command()
def sample(
    target: Target,
    prompts: Prompts = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps; default as trained, or 28.")] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels, for a plain model; default the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
) -> None:
    """Sample pictures from a run's policy or from any model folder.

    Example: `vipo sample runs/quickstart --prompts "a cat on a teal background" --count 4`
    """
    from vipo.report.pictures import save_pictures
    from vipo.target import open_target

    model = open_target(target, size=size)
    texts = _read_texts(prompts or ["embedded:prompts_eval"])
    pictures = model.sample(texts, count=count, steps=steps, seed=seed)
    paths = save_pictures(output, pictures.media, [prompt.text for prompt in pictures.prompts])
    console.print(f"{len(paths)} pictures in {output}")


@app.command()
def maps(
    files: Annotated[list[Path], typer.Argument(help="Pictures of yours: PNG, JPEG, WebP.")],
    backbone: Annotated[str, typer.Option(help="See `vipo list backbones`.")] = "efficientnet_lite",
    output: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("maps"),
    components: Annotated[int, typer.Option(min=1)] = 3,
    aggregation: Annotated[str, typer.Option(help="variance, average or first.")] = "variance",
    orientation: Annotated[str | None, typer.Option(help="See docs/orientation.md.")] = None,
    smoothing_sigma: Annotated[float, typer.Option(min=0, help="In feature cells; 0 is off.")] = 1.0,
    pretrained: Annotated[str | None, typer.Option(help="Weights for dinov2, resnet or sam: hub id or folder.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Input side for the backbone, in pixels.")] = None,
) -> None:
    """Show what the allocation map sees in pictures of yours.

    Example: `vipo maps photo.jpg --output maps`
    """
    from vipo.showmaps import show_maps

    options = {"pretrained": pretrained, "resolution": resolution}
    structuring = {"components": components, "aggregation": aggregation, "smoothing_sigma": smoothing_sigma}
    if orientation is not None:
        structuring["orientation"] = orientation
    chosen = {key: value for key, value in options.items() if value is not None}
    for path in show_maps(files, output, backbone=backbone, backbone_options=chosen, **structuring):
        console.print(str(path), soft_wrap=True)


@app.command()
def evaluate(
    target: Target,
    rewards: Annotated[str | None, typer.Option(help="Comma-separated; default all of the run's.")] = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels, for a plain model.")] = None,
    as_json: Json = False,
) -> None:
    """Score a policy beside its base model on fixed prompts and noise, with 95 % bootstrap intervals.

    Example: `vipo evaluate runs/quickstart --rewards emoji_judge,emoji_layout`
    """
    from vipo.target import open_target

    model = open_target(target, size=size)
    texts = _read_texts(prompts) if prompts else model.evaluation_prompts
    names = rewards.split(",") if rewards else model.reward_names
    if not names:
        raise UserError("this model has no run behind it, so name what to score with --rewards A,B")
    results = model.evaluate(texts, names, count=count, steps=steps)
    rows = _evaluation_rows(results)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table("reward", "model", "mean", "95 % interval", "gain over base")
    for row in rows:
        gain = row["gain"]
        change = f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]" if gain else ""
        table.add_row(
            row["reward"], row["model"], f"{row['mean']:.4f}", f"[{row['low']:.4f}, {row['high']:.4f}]", change
        )
    console.print(table)


def _evaluation_rows(results: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """One row per reward and model; a policy's gain over the base is paired picture by picture."""
    from dataclasses import asdict

    from vipo.evaluate import estimate

    rows = []
    for model, evaluation in results.items():
        for reward, values in evaluation.scores.items():
            per = evaluation.samples_per_prompt
            gain = asdict(estimate(values - results["base"].scores[reward], per)) if model != "base" else None
            rows.append({"reward": reward, "model": model, **asdict(estimate(values, per)), "gain": gain})
    return sorted(rows, key=lambda row: str(row["reward"]))


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

    console.print(text_table(compare_runs(runs)), markup=False, highlight=False, soft_wrap=True)


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
    kind: Annotated[str, typer.Argument(help="generators, backbones, rewards, recipes or keys.")], as_json: Json = False
) -> None:
    """List what can be named in a recipe.

    Example: `vipo list rewards`
    """
    from vipo.catalogue import CATALOGUES

    if kind not in CATALOGUES:
        raise UserError(f"{kind!r} cannot be listed; choose from {', '.join(CATALOGUES)}")
    rows = CATALOGUES[kind]()
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _quiet() -> None:
    """Keep the libraries' start-up chatter out of our output; errors still show. VIPO_DEBUG=1 lets it through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def main() -> None:
    """Entry point. What the user can mend becomes one sentence and exit code 2; anything else shows its trace."""
    debug = bool(os.environ.get("VIPO_DEBUG"))
    if not debug:
        _quiet()
    try:
        app()
    except UserError as error:
        if debug:
            raise
        Console(stderr=True).print(f"vipo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission
        if debug:
            raise
        Console(stderr=True).print(f"vipo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
