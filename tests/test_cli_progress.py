"""The live line of a run: what it says of each loss, and nothing that the loss does not have."""

from __future__ import annotations

from pathlib import Path

import tiny
from terminal import Vipo
from vipo.cli.progress import _loss, _spreads

WITHOUT_RATIO = ["objective.loss=matching", "solver.kind=ode", "solver.same_noise=false"]


def test_a_ratio_is_checked_in_words() -> None:
    exact = {"loss": -0.1, "clipped_fraction": 0.25, "ratio_deviation": 0.0}
    assert _loss(exact) == "clipped 25%  ratio 1 ok"
    assert _loss({**exact, "ratio_deviation": 3e-4}) == "clipped 25%  ratio off 3e-04"


def test_a_loss_without_a_ratio_shows_its_value() -> None:
    assert _loss({"loss": -0.123, "matching_error": 0.7, "ratio_deviation": 0.0}) == "loss -0.12"


def test_a_run_without_a_ratio_is_told_and_reported(vipo: Vipo, model_folder: Path, tmp_path: Path) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=2)
    recipe, output = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run"
    said = vipo("train", recipe, *WITHOUT_RATIO, "--output", output)
    assert said.code == 0 and "2/2 reward" in said.out and not said.err, said
    assert "ratio 1 ok" not in said.out and "clipped" not in said.out and "loss " in said.out
    logged = tiny.lines(output / "metrics.jsonl")
    assert len(logged) == 2 and all(line["matching_error"] > 0 and line["grad_norm"] > 0 for line in logged)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Gradient norm" in page and "Matching error" in page and "Complete" in page
    assert not any(title in page for title in ("Clipped fraction", "Replay error", "Approximate KL"))


def test_several_rewards_are_named_and_one_is_not() -> None:
    one = {"reward": 0.5, "reward/a": 0.5, "spread/a": 0.1}
    assert _spreads(one) == "±0.100"
    assert _spreads({**one, "reward/b": -2.0, "spread/b": 0.25}) == "a +0.500 ±0.100  b -2.000 ±0.250"
