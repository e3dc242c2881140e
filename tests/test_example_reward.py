"""The example of docs/rewards-your-own.md, exactly as it stands there, scores and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

import tiny
import vipo
from vipo import rewards
from vipo.types import Prompt

ROOT = Path(__file__).parent.parent
NAME = "docs/examples/my_reward.py:warmth"
GUIDE = (ROOT / "docs" / "rewards-your-own.md").read_text()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_example_scores_what_it_says() -> None:
    media = torch.zeros(2, 3, 1, 4, 4)
    media[0, 0, :, :1] = 1.0  # a quarter of the first picture is red
    media[1, 2] = 1.0
    assert rewards.build(NAME)(media, [Prompt("a"), Prompt("b")]).tolist() == [0.25, 0.0]


def test_the_guide_shows_the_file_and_a_recipe_line_that_trains(model_folder: Path, tmp_path: Path) -> None:
    assert (ROOT / "docs/examples/my_reward.py").read_text() in GUIDE
    line = re.search(r"^rewards: .*warmth.*$", GUIDE, re.MULTILINE)
    assert line is not None
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", **yaml.safe_load(line[0]))
    recipe = vipo.load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", raw), ["training.iterations=1"])
    (step,) = vipo.train(recipe)
    scores = step.scores.by_name[NAME]
    assert torch.equal(scores, rewards.build(NAME)(step.rollout.media, step.rollout.prompts))
    assert bool(((scores >= 0) & (scores <= 1)).all())


def test_the_dense_example_says_where_and_its_command_trains(model_folder: Path, tmp_path: Path) -> None:
    assert (ROOT / "docs/examples/my_dense_reward.py").read_text() in GUIDE
    given = re.search(r"^vipo train quickstart (credit=\S+) \"(rewards=.*Warmth.*)\" --output", GUIDE, re.MULTILINE)
    assert given is not None
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=1)
    (step,) = vipo.train(vipo.load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", raw), list(given.groups())))
    (evidence,) = step.scores.evidence.values()
    warm = step.rollout.media[:, 0] - step.rollout.media[:, 2]
    assert torch.corrcoef(torch.stack([evidence.mean((1, 2, 3)), warm.mean((1, 2, 3))]))[0, 1] > 0.99
    assert evidence.shape == (6, *tiny.GRID) and step.metrics["grad_norm"] > 0
