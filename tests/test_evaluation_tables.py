"""Tables for a terminal: a name that looks like rich's markup stands in them as it is, whatever console prints them."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console, RenderableType

from vipo.cli.progress import _evaluation
from vipo.evaluation.records import Evaluation
from vipo.evaluation.tables import evaluation_table
from vipo.runs.run import Evaluated
from vipo.types import Prompt

ODD = ("[/x]", "[bold]", ":heart:", "mine[0].py:score[red]")


def printed(table: RenderableType) -> str:
    console = Console(width=200, record=True)
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("name", ODD)
def test_an_evaluation_keeps_the_names_of_its_rewards(name: str) -> None:
    found = {"mean": 0.5, "low": 0.4, "high": 0.6}
    row = {"reward": name, "model": "policy", "scored": 2, "samples": 3, **found, "gain": found}
    said = printed(evaluation_table([row]))
    assert name in said and "2 of 3" in said and "0.5000 │ [0.4000, 0.6000] │ +0.5000 [+0.4000, +0.6000]" in said


@pytest.mark.parametrize("name", ODD)
def test_the_evaluations_of_a_run_keep_them_too(name: str) -> None:
    scores = {name: torch.tensor([1.0, 2.0])}
    event = Evaluated(1, Evaluation((Prompt("a"), Prompt("b")), 1, {"policy": scores}))
    said = printed(_evaluation(event, {name: torch.tensor([0.5, 1.5])}, 0, (name,)))
    assert name in said and "1.5000" in said and "+0.5000" in said
