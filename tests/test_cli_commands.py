"""The command line as a whole: its map, how it is started, what that costs."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import tiny
import vipo as package
from terminal import Said, Vipo, assert_refused, imported
from vipo.cli import app, commands
from vipo.cli.catalogue import CATALOGUES

COMMANDS = [
    "train",
    "sweep",
    "sample",
    "maps",
    "plan",
    "fetch",
    "evaluate",
    "vbench",
    "serve-reward",
    "convert-reward",
    "report",
    "compare",
    "metrics",
    "watch",
    "export",
    "list",
]
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "peft", "tensorboard"}
CALL = "from vipo.cli import main; main()"
SLIP = "traning.iterations=3"
LIGHT = ["--help", "--version", f"train quickstart {SLIP}", f"plan quickstart {SLIP}", "maps --help", "list planets"]
LIGHT += [f"sweep quickstart seed=0..1 {SLIP}"]
LIGHT += ["fetch flux1-dev-vipo-hpsv2 --offline", "fetch wan2.1-14b-vipo-videoalign --offline"]
LIGHT += [f"list {kind}" for kind in CATALOGUES]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and f"vipo {command} " in shown.output and "Example:" in shown.output


def test_the_map_of_the_commands_is_complete() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(command in shown for command in COMMANDS)


def test_every_argument_and_option_says_what_it_is_and_a_rewards_are_no_keys_of_a_recipe() -> None:
    top: Any = typer.main.get_command(app)
    helps = {name: {one.name: getattr(one, "help", None) for one in top.commands[name].params} for name in COMMANDS}
    assert [(name, one) for name, texts in helps.items() for one, text in texts.items() if not text] == []
    assert "reward" in helps["serve-reward"]["options"] and "recipe" in helps["train"]["overrides"]


def test_version_and_short_help(vipo: Vipo) -> None:
    assert vipo("--version") == Said(0, f"vipo {package.__version__}\n", "")
    assert vipo("-h").out == vipo("--help").out and vipo("maps", "-h").out == vipo("maps", "--help").out


@pytest.mark.parametrize("command", LIGHT)
def test_a_help_page_a_slip_and_a_list_cost_no_heavy_library(command: str) -> None:
    loaded = imported(CALL, *command.split())
    assert "vipo.cli.commands" in loaded and not HEAVY & loaded


@pytest.mark.slow
def test_a_process_of_its_own_refuses_in_the_same_words() -> None:
    process = tiny.command_line("train", "nowhere.yaml")
    out, err = process.communicate(timeout=60)
    assert_refused(Said(process.returncode, out, err), "'nowhere.yaml' does not exist")


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch grows segments on Linux only")
@pytest.mark.parametrize("key", [None, *commands.ALLOCATOR_KEYS])
def test_the_allocator_grows_segments_unless_it_is_set_up(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    for known in commands.ALLOCATOR_KEYS:
        monkeypatch.delenv(known, raising=False)
    if key:
        monkeypatch.setenv(key, "max_split_size_mb:64")
    monkeypatch.setattr(sys, "argv", ["vipo", "--version"])
    with pytest.raises(SystemExit):
        commands.main()
    found = {known: os.environ.get(known) for known in commands.ALLOCATOR_KEYS if known in os.environ}
    assert found == ({key: "max_split_size_mb:64"} if key else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
