"""``vipo list``: everything that can be named, each name with its meaning."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from terminal import Vipo, assert_refused
from vipo import options
from vipo.cli.catalogue import CATALOGUES
from vipo.training.losses import LOSSES


@pytest.mark.parametrize(("kind", "entry"), [
    ("generators", "flux"), ("backbones", "dinov2"), ("rewards", "redness"), ("recipes", "quickstart"),
    ("sources", "deviation"), ("credits", "advantage_map"), ("losses", "guard"), ("prompts", "set:geneval"),
    ("keys", "optimizer.learning_rate"),
])  # fmt: skip
def test_list_shows_what_can_be_named_as_a_table_and_as_json(vipo: Vipo, kind: str, entry: str) -> None:
    table, document = vipo("list", kind), vipo("list", kind, "--json")
    assert table.code == document.code == 0 and entry in table.out
    rows = json.loads(document.out)
    assert entry in {next(iter(row.values())) for row in rows}


def test_listing_something_else_is_refused(vipo: Vipo) -> None:
    assert_refused(vipo("list", "planets"), "'planets' cannot be listed", "generators")


def test_a_list_keeps_what_stands_in_brackets(vipo: Vipo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.rewards.find_spec", lambda _package: None)
    shown = " ".join(vipo("list", "rewards").out.replace("│", " ").split())
    state = json.loads(vipo("list", "rewards", "--json").out)
    assert "missing: pip install 'vipo[ocr]'" in [row["state"] for row in state]
    assert "'vipo[ocr]'" in shown and "'vipo[geneval]'" in shown


@pytest.mark.parametrize(
    ("kind", "names"),
    [("sources", options.SourceName), ("credits", options.CreditKind), ("losses", options.LossKind)],
)
def test_every_name_that_a_recipe_takes_has_its_meaning(kind: str, names: Any) -> None:
    rows = CATALOGUES[kind]()
    assert [next(iter(row.values())) for row in rows] == list(get_args(names))
    assert all(len(row["meaning"]) > 10 for row in rows)


def test_every_loss_that_is_listed_can_be_built() -> None:
    assert list(options.LOSS_MEANINGS) == list(LOSSES)


def test_the_keys_of_records_and_sections_are_listed_with_defaults_and_meanings() -> None:
    rows = {row["key"]: row for row in CATALOGUES["keys"]()}
    assert rows["solver.window.size"]["default"] == "2" and rows["solver.steps"]["default"] == "required"
    assert rows["structuring.sources"]["default"] == "('perceptual',)" and "rewards.NAME.weight" in rows
    assert all(row["meaning"] for row in rows.values())
