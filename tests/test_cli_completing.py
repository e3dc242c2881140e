"""What a shell is offered after a tab, asked as bash asks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from terminal import Vipo, imported

CALL = """
import os
os.environ.update(COMP_WORDS="vipo train quickstart optimizer.l", COMP_CWORD="3", _VIPO_COMPLETE="complete_bash")
sys.argv = ["vipo"]
from vipo.cli import main
main()
"""
OFFERED = [
    (["li"], {"list"}),
    (["list", "ke"], {"keys"}),
    (["train", "quickstart-g"], {"quickstart-grpo", "quickstart-guard"}),
    (["train", "quickstart", "optimizer.l"], {"optimizer.learning_rate="}),
    (["report", "runs/"], {"runs/mine"}),
    (["sample", "runs/m"], {"runs/mine"}),
]


@pytest.mark.parametrize(("typed", "expected"), OFFERED)
def test_a_tab_offers_what_may_come_next(
    typed: list[str], expected: set[str], vipo: Vipo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    (tmp_path / "runs" / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMP_WORDS", " ".join(["vipo", *typed]))
    monkeypatch.setenv("COMP_CWORD", str(len(typed)))
    monkeypatch.setenv("_VIPO_COMPLETE", "complete_bash")
    assert set(vipo().out.split()) == expected


def test_a_tab_costs_no_heavy_library() -> None:
    loaded = imported(CALL)
    assert "vipo.cli.completing" in loaded and not {"torch", "transformers", "diffusers"} & loaded


def test_the_script_of_a_shell_is_that_of_the_command_also_from_the_module(
    vipo: Vipo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # there may be no shell above the tests
    shown = vipo("--show-completion", "bash")
    assert shown.code == 0 and "_VIPO_COMPLETE=complete_bash" in shown.out and shown.out.strip().endswith(" vipo")
