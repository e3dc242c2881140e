"""The learning rate of an iteration: transformers' schedules, and a run that goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

import tiny
from vipo.errors import UserError
from vipo.options import OptimizerOptions
from vipo.recipe import parse_recipe
from vipo.report.figures import health_panels
from vipo.report.run import read_run
from vipo.runs.run import Run
from vipo.training.schedule import learning_rate

RATE, TOTAL = 3e-4, 23


def theirs(build: Any, **options: Any) -> list[float]:
    """A scheduler's rates, step by step."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule, rates = build(optimizer, **options), []
    for _ in range(TOTAL + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def ours(**options: Any) -> list[float]:
    return [learning_rate(OptimizerOptions(RATE, **options), i, TOTAL) for i in range(TOTAL)]


@pytest.mark.parametrize("warmup", [0, 1, 6])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_transformers_after_a_warmup_that_does_not_begin_at_zero(warmup: int, final: float) -> None:
    def built(steps: int) -> list[float]:
        return theirs(
            get_cosine_with_min_lr_schedule_with_warmup,
            num_warmup_steps=steps,
            num_training_steps=TOTAL,
            min_lr_rate=final,
        )

    found = ours(schedule="cosine", warmup=warmup, final=final)
    assert found[warmup:] == pytest.approx(built(warmup)[warmup:TOTAL], rel=1e-12)
    if not final:  # theirs warms up from the final rate
        assert found[:warmup] == pytest.approx(built(warmup + 1)[1 : warmup + 1], rel=1e-12)
    assert min(found) > 0 and max(found) == RATE


@pytest.mark.parametrize("warmup", [0, 6])
def test_linear_is_transformers(warmup: int) -> None:
    expected = theirs(get_linear_schedule_with_warmup, num_warmup_steps=warmup, num_training_steps=TOTAL)
    found = ours(schedule="linear", warmup=warmup)
    assert found[warmup:] == pytest.approx(expected[warmup:TOTAL], rel=1e-12)
    half = ours(schedule="linear", warmup=warmup, final=0.5)
    assert half[warmup:] == pytest.approx([(rate + RATE) / 2 for rate in expected[warmup:TOTAL]], rel=1e-12)


def test_constant_rises_and_stays() -> None:
    assert ours() == [RATE] * TOTAL
    assert ours(warmup=3) == pytest.approx([RATE / 4, RATE / 2, RATE * 3 / 4] + [RATE] * (TOTAL - 3))


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    training = {"iterations": 4, "precision": "no", "checkpoint_every": 1, "keep_checkpoints": 9}
    return tiny.recipe(model_folder, tmp_path / "prompts.txt", training=training, evaluation__every=None)


def run_all(raw: dict[str, Any], output: Path, **options: Any) -> list[dict[str, Any]]:
    for _ in Run(parse_recipe(raw), output, **options):
        pass
    return tiny.lines(output / "metrics.jsonl")


def test_a_run_follows_it_and_goes_on_where_it_was(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Several optimiser steps share a rate; a killed run ends byte for byte like one that was not."""
    raw["optimizer"] = {"learning_rate": 1e-2, "schedule": "cosine", "warmup": 1, "per_iteration": 2}
    straight = run_all(raw, tmp_path / "straight")
    options = OptimizerOptions(1e-2, schedule="cosine", warmup=1)
    assert [line["learning_rate"] for line in straight] == [learning_rate(options, i, 4) for i in range(4)]
    assert [panel.title for panel in health_panels(read_run(tmp_path / "straight"))].count("Learning rate") == 1
    run_all(raw, tmp_path / "again")
    run_all(raw, tmp_path / "again", resume=True, checkpoint="step-000002")
    for file in ("metrics.jsonl", "checkpoints/step-000004/policy.safetensors"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    raw["optimizer"] = {"learning_rate": 1e-2, "per_iteration": 2}
    constant = run_all(raw, tmp_path / "constant")
    assert all("learning_rate" not in line for line in constant)
    same = [key for key in constant[0] if constant[1][key] == straight[1][key]]
    assert "reward/redness" not in same  # the second iteration sampled with other weights


def test_what_makes_no_sense_is_refused(raw: dict[str, Any]) -> None:
    raw["optimizer"] = {"learning_rate": 1e-2, "warmup": 4}
    with pytest.raises(UserError, match=r"optimizer.warmup=4 leaves no iteration .* less than training.iterations=4"):
        parse_recipe(raw)
    raw["optimizer"] = {"learning_rate": 1e-2, "final": 0.1}
    with pytest.raises(UserError, match=r"final=0.1 is what schedule=cosine or linear comes down to"):
        parse_recipe(raw)
    with pytest.raises(UserError, match="schedule"):
        parse_recipe({**raw, "optimizer": {"learning_rate": 1e-2, "schedule": "step"}})


def test_a_longer_run_is_told_where_it_moves_the_rate(tmp_path: Path, raw: dict[str, Any]) -> None:
    """``training.iterations`` is free to change, but not where the learning rate comes down towards it."""
    longer = {**raw["training"], "iterations": 5}
    for name, optimizer, told in (
        ("constant", {"learning_rate": 1e-2}, []),
        (
            "linear",
            {"learning_rate": 1e-2, "schedule": "linear"},
            ["resumed at iteration 4 with training.iterations 4 -> 5"],
        ),
    ):
        run_all({**raw, "optimizer": optimizer}, tmp_path / name)
        again = run_all({**raw, "optimizer": optimizer, "training": longer}, tmp_path / name, resume=True)
        assert again[4]["events"] == told, name
    assert again[4]["learning_rate"] == pytest.approx(1e-2 / 5)
    changed = {"learning_rate": 1e-2, "warmup": 1}
    again = run_all(
        {**raw, "optimizer": changed, "training": {**longer, "iterations": 6}}, tmp_path / "constant", resume=True
    )
    assert again[5]["events"] == ["resumed at iteration 5 with optimizer.warmup 0 -> 1"]
