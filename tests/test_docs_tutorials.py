"""The tutorials of the documentation: every block of every page runs, in order, in an empty folder.

A file is written under its title, Python is executed, and what bash makes of a command line is called in this process.
By default each run is one iteration of two pictures, and the embedded model one of random weights; with ``--run-long``
the pages run to the letter.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from terminal import Vipo
from vipo import embedded
from vipo.runs.combinations import combinations

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "rewards-your-own.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
TRAINS = {"train"}
TOY: dict[str, Any] = {
    "training.iterations": 1,
    "training.precision": "no",
    "prompts.per_iteration": 1,
    "prompts.group_size": 2,
    "solver.steps": 3,
    "solver.window": "{size: 1, starts: 1}",
    "structuring.sources": "[deviation]",
    "evaluation.limit": 1,
    "evaluation.samples_per_prompt": 1,
    "judges": "[]",
}
QUIET = ["--no-report"]
TELL = 'vipo() { python3 -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@" >> calls; }\n'


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def calls(script: str) -> list[list[str]]:
    """The arguments of every ``vipo`` that bash comes to in a block; its other commands are run."""
    Path("calls").write_text("")
    subprocess.run(["bash", "-eu", "-c", TELL + script], check=True, timeout=60)
    return [json.loads(line) for line in Path("calls").read_text().splitlines()]


def runs_of(arguments: list[str]) -> list[list[str]]:
    """The runs of a sweep, to be trained in this process; any other call is itself."""
    if arguments[0] != "sweep":
        return [arguments]
    given, root = arguments[2 : arguments.index("--output")], Path(arguments[arguments.index("--output") + 1])
    found = combinations(arguments[1], given)
    return [["train", arguments[1], *one.overrides, "--output", str(root / one.name)] for one in found]


def at_toy_size(arguments: list[str]) -> list[str]:
    """The same call with the smallest run; only a command that takes recipe keys is given any."""
    small = [argument.replace("embedded:prompts_eval", "embedded:prompts_eval?limit=1") for argument in arguments]
    if small[0] not in TRAINS:
        return small
    kept = [argument for argument in small if argument.partition("=")[0] not in TOY]
    return [*kept, *(f"{key}={value}" for key, value in TOY.items()), *QUIET]


@pytest.fixture(autouse=True)
def _in_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a clone has, as far as the pages name it."""
    for name in ("docs/examples", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)


def walk(page: Path, vipo: Vipo, *, toy: bool) -> None:
    names: dict[str, Any] = {"__name__": "tutorial"}
    for number, block in enumerate(blocks(page), 1):
        where = f"{page.name}, block {number}"
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        else:
            assert block.language == "bash", f"{where}: give it a title, or a language that runs"
            for written in calls(block.text):
                for arguments in map(at_toy_size, runs_of(written)) if toy else [written]:
                    said = vipo(*arguments)
                    assert said.code == 0, (arguments, said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_tutorial_runs(
    page: Path, model_folder: Path, vipo: Vipo, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = embedded.path
    monkeypatch.setattr(embedded, "path", lambda name: model_folder if name == "emoji-flux" else shipped(name))
    walk(page, vipo, toy=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_to_the_letter(page: Path, vipo: Vipo) -> None:
    walk(page, vipo, toy=False)
