"""A run's model opens with what samples: no reward, judge, backbone, optimiser or second copy of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from vipo.cli import app
from vipo.errors import UserError
from vipo.recipe import parse_recipe
from vipo.runs.run import Run
from vipo.runs.target import open_target
from vipo.runs.trained import open_run
from vipo.types import Prompt

pytestmark = pytest.mark.on_cpu

PROMPTS = [Prompt(text) for text in tiny.PROMPTS[:2]]
REWARDS = "def mine(media, prompts):\n    return media.mean((1, 2, 3, 4))\n"


def trained(root: Path, model_folder: Path, **policy: Any) -> Path:
    """A run of one iteration with maps, a reward and a judge of the user's, all of whose files are gone afterwards."""
    root.mkdir()
    file, gone = root / "mine.py", root / "prompts.txt"
    file.write_text(REWARDS)
    raw = tiny.recipe(model_folder, gone, rewards={f"{file}:mine": 1.0}, training__iterations=1)
    raw |= {"credit": "advantage_map", "judges": {"held-out": {"reward": f"{file}:mine"}, "redness": {}}}
    raw["policy"] |= policy
    raw["optimizer"] |= {"learning_rate": 1e-3}
    for _ in Run(parse_recipe(raw), root / "run"):
        pass
    file.unlink()
    gone.unlink()
    return root / "run"


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained") / "lora", model_folder)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of rewards that are built; nothing else that trains may be."""
    built: list[str] = []

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("this is for training")

    monkeypatch.setattr("vipo.assemble.Trainer", refuse)
    monkeypatch.setattr("vipo.training.learner.Learner.__init__", refuse)
    monkeypatch.setattr("torch.optim.AdamW", refuse)
    monkeypatch.setattr("vipo.backbones.build", refuse)
    monkeypatch.setattr("vipo.assemble.build_map_source", refuse)
    build = __import__("vipo.rewards", fromlist=["build"]).build

    def noted(name: str, *arguments: Any, **options: Any) -> Any:
        built.append(name)
        return build(name, *arguments, **options)

    monkeypatch.setattr("vipo.rewards.build", noted)
    return built


def vipo(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None, result.exception
    return result.stdout


def test_a_run_whose_rewards_are_gone_is_exported_and_sampled(run: Path, untouched: list[str], tmp_path: Path) -> None:
    name = "pytorch_lora_weights.safetensors"
    vipo("export", run, "--output", tmp_path / "export")
    ours, theirs = (load_file(folder / name) for folder in (tmp_path / "export", run / "export"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    vipo("sample", run, "--prompts", "a cat", "--output", tmp_path / "samples")
    vipo("sample", run, "--prompts", "a cat", "--base-tail", "0.5", "--output", tmp_path / "tail")
    assert len(list((tmp_path / "samples").iterdir())) == len(list((tmp_path / "tail").iterdir())) == 1
    assert untouched == []


def test_an_evaluation_builds_what_it_scores_with_and_nothing_else(run: Path, untouched: list[str]) -> None:
    said = vipo("evaluate", run, "--prompts", "a cat", "--rewards", "redness", "--count", "1", "--json")
    assert untouched == ["redness"] and '"gain": {' in said
    with pytest.raises(UserError, match=r"mine\.py"):
        open_target(str(run)).evaluate(PROMPTS, ["held-out"], samples_per_prompt=1, steps=1)
    with pytest.raises(UserError, match=r"prompts\.txt' does not exist"):
        open_target(str(run)).evaluation_prompts()


def test_files_that_are_others_than_the_run_knew_are_told(
    run: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was moved, or is used from another folder, may find files of the same name."""
    reward, prompts, base = run.parent / "mine.py", run.parent / "prompts.txt", model_folder / "other.txt"
    reward.write_text(REWARDS)
    prompts.write_text("\n".join(tiny.PROMPTS) + "\n")
    try:
        target = open_target(str(run))
        assert not target.notices(PROMPTS, ["held-out"]) and target.evaluation_prompts() and not caplog.messages
        reward.write_text(REWARDS.replace("media.mean", "-media.mean"))
        prompts.write_text("a dog\n")
        base.write_text("another base")
        (told,) = open_target(str(run)).notices(PROMPTS, ["held-out", "redness"])
        assert told.startswith("not what this run was scored with")
        assert f"judges.held-out.reward ({str(reward)!r}" in told
        assert not target.notices(PROMPTS, ["redness"]) and target.evaluation_prompts()
        asked, evaluated = caplog.messages
        assert "checkpoint was trained with" in asked and f"generator.path ({str(model_folder)!r})" in asked
        assert evaluated == f"not what the run was evaluated on: evaluation.prompts ({str(prompts)!r})"
    finally:
        for file in (reward, prompts, base):
            file.unlink(missing_ok=True)


def test_full_weights_are_held_once_unless_the_base_is_asked_for(model_folder: Path, tmp_path: Path) -> None:
    root = trained(tmp_path / "full", model_folder, kind="full", ema_decay=0.5)
    _, model = open_run(root)
    assert model.policy.base == {} == model.policy.ema
    sampled = open_target(str(root), keep_reference=False)
    (ours,) = sampled.sample(PROMPTS, samples_per_prompt=1, steps=2, seed=0)
    with pytest.raises(ValueError, match="no copy of the first weights was kept"):
        sampled.evaluate(PROMPTS, ["redness"], samples_per_prompt=1, steps=2)
    both = open_target(str(root))
    (theirs,) = both.sample(PROMPTS, samples_per_prompt=1, steps=2, seed=0)
    assert torch.equal(ours.media, theirs.media)
    scores = both.evaluate(PROMPTS, ["redness"], samples_per_prompt=1, steps=2).scores
    assert not torch.equal(scores["base"]["redness"], scores["policy"]["redness"])
