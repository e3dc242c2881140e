"""Evaluation: the same prompts and noise for every policy, and honest intervals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import tiny
from vipo.evaluate import Evaluation, estimate, evaluate
from vipo.rollout import Solver
from vipo.types import Generator, Prompt, UserError

PROMPTS = [Prompt(text, k) for k, text in enumerate(tiny.PROMPTS[:3])]


def judged(model: Generator, **options: object) -> Evaluation:
    solver = Solver(steps=3, shift=3.0, kind="dance", eta=0.7)
    return evaluate(model, PROMPTS, tiny.scorer(tiny.redness), solver, **{"samples_per_prompt": 2, **options})  # type: ignore[arg-type]


def test_the_same_weights_give_the_same_pictures_whatever_the_batch(model_folder: Path) -> None:
    model = tiny.generator(model_folder)
    torch.manual_seed(1)
    first = judged(model)
    torch.manual_seed(2)
    assert torch.equal(judged(model).media, first.media)
    assert torch.allclose(judged(model, batch_size=4).media, first.media, atol=1e-4)


def test_rows_are_prompt_by_prompt_each_from_its_own_noise(model_folder: Path) -> None:
    result = judged(tiny.generator(model_folder))
    assert [prompt.index for prompt in result.prompts] == [0, 0, 1, 1, 2, 2]
    assert len({tuple(row.flatten().tolist()) for row in result.media}) == 6
    assert result.scores["redness"].shape == (6,)


def test_evaluation_adds_no_noise_between_steps(model_folder: Path) -> None:
    model, scorer = tiny.generator(model_folder), tiny.scorer(tiny.redness)
    noisy, plain = (Solver(steps=3, shift=3.0, kind=kind, eta=1.0) for kind in ("dance", "ode"))
    ours, ode = (evaluate(model, PROMPTS, scorer, s, samples_per_prompt=1).media for s in (noisy, plain))
    assert torch.equal(ours, ode)


def test_more_steps_may_be_asked_for(model_folder: Path) -> None:
    model = tiny.generator(model_folder)
    assert not torch.equal(judged(model, steps=6).media, judged(model).media)


def test_estimate_by_hand() -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 2.0, 6.0, 8.0])  # prompt means 2, 2, 7
    found = estimate(values, 2)
    assert found.mean == pytest.approx(11 / 3)
    assert found.standard_error == pytest.approx(torch.tensor([2.0, 2.0, 7.0]).std().item() / math.sqrt(3))
    assert 2 <= found.low <= found.mean <= found.high <= 7
    assert estimate(values, 2) == found


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = torch.Generator().manual_seed(0)
    found = [estimate(torch.randn(40, generator=rng), 1, resamples=400) for _ in range(200)]
    covered = sum(e.low <= 0 <= e.high for e in found) / len(found)
    assert 0.88 <= covered <= 0.99


def test_samples_of_one_prompt_are_not_counted_as_independent() -> None:
    prompts = torch.randn(10, generator=torch.Generator().manual_seed(0))
    once, copied = estimate(prompts, 1), estimate(prompts.repeat_interleave(50), 50)
    assert copied.standard_error == pytest.approx(once.standard_error, rel=1e-5)


def test_missing_scores_are_left_out() -> None:
    nan = math.nan
    found = estimate(torch.tensor([1.0, nan, nan, nan, 5.0, 7.0]), 2)  # the second prompt has none at all
    assert found.mean == pytest.approx(3.5) and math.isfinite(found.standard_error)
    with pytest.raises(UserError, match="no prompt got a score"):
        estimate(torch.full((4,), nan), 2)


def test_one_prompt_has_no_standard_error() -> None:
    assert math.isnan(estimate(torch.tensor([1.0, 2.0]), 2).standard_error)
