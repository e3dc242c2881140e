"""Every command by name, and the entry point."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated

import typer

from vipo.cli import doctor, evaluate, export, fetch, listing, maps, plan, report, rewards, sample, sweep, train
from vipo.cli.consoles import errors
from vipo.errors import RunFailed, UserError
from vipo.secrets import redacted
from vipo.threads import left_behind

# Diffusers and PEFT import torchao and bitsandbytes wherever these are installed, whatever the command.
LOUD = ("transformers", "torchao", "torch.utils._pytree", "bitsandbytes")
INTERRUPTED = 130  # exit code after a second Ctrl-C, as shells have it
FAILED = 3  # exit code of a run in which nothing was learned

app = typer.Typer(
    name="vipo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Post-train image and video generators with RL that credits positions, not whole pictures.",
)
COMMANDS: Mapping[str, Callable[..., None]] = {
    "train": train.train,
    "sweep": sweep.sweep,
    "sample": sample.sample,
    "maps": maps.maps,
    "plan": plan.plan,
    "fetch": fetch.fetch,
    "evaluate": evaluate.evaluate,
    "vbench": evaluate.vbench,
    "serve-reward": rewards.serve_reward,
    "convert-reward": rewards.convert_reward,
    "report": report.report,
    "compare": report.compare,
    "metrics": report.metrics,
    "watch": report.watch,
    "export": export.export,
    "list": listing.list_parts,
    "doctor": doctor.doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _print_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        typer.echo(f"vipo {version('vipo')}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What goes before a command."""


def _quiet() -> None:
    """Keep the libraries' start-up chatter out of our output; errors still show. VIPO_DEBUG=1 lets it through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    for library in LOUD:
        logging.getLogger(library).setLevel(logging.ERROR)
    threading.excepthook = partial(_told_elsewhere, threading.excepthook)


def _told_elsewhere(hook: Callable[[threading.ExceptHookArgs], object], failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer keeps its error and raises it where something is written; its thread need not show it."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        hook(failed)


ALLOCATOR = "expandable_segments:True"  # blocks that grow instead of new ones beside gaps
ALLOCATOR_KEYS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # all that PyTorch reads


def grow_segments() -> None:
    """Have CUDA's allocator grow its blocks, unless the user has set it up. PyTorch reads this when it is loaded.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf; Linux only.
    """
    if sys.platform == "linux" and not any(key in os.environ for key in ALLOCATOR_KEYS):
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR


def main() -> None:
    """Entry point; ends the process also where a reward's call was left behind."""
    code: int | str | None = 0
    try:
        _call()
    except SystemExit as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    if left_behind():  # Python would wait for their libraries, or crash inside them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def _call() -> None:
    """One command. What the user can mend becomes one sentence and exit code 2, a run that learned nothing one and 3.

    Anything else shows its trace.
    """
    debug = bool(os.environ.get("VIPO_DEBUG"))
    if not debug:
        _quiet()
    grow_segments()
    try:
        app(prog_name="vipo")
    except (UserError, RunFailed, OSError) as error:  # OSError: a full disk, a folder without permission
        if debug:
            raise
        errors.print(f"vipo: {redacted(str(error))}", style="red", soft_wrap=True)
        sys.exit(FAILED if isinstance(error, RunFailed) else 2)
