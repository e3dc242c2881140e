"""Honest intervals: over prompts, not over samples, and paired where two models are compared."""

from __future__ import annotations

import math

import pytest
import torch

from vipo.errors import UserError
from vipo.evaluation.estimate import estimate, first_at, paired, paired_prompts, pairs, summary
from vipo.evaluation.records import Evaluation
from vipo.types import Prompt


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


NAN = math.nan
BEFORE = torch.tensor([1.0, 3.0, 2.0, NAN, 6.0, 8.0, NAN, NAN])
AFTER = torch.tensor([2.0, 3.0, 4.0, 9.0, NAN, 7.0, 1.0, 1.0])  # gains 1, 0, 2, -1 of prompts 0, 0, 1, 2


def test_a_gain_is_of_samples_with_both_scores() -> None:
    gain = paired(AFTER, BEFORE, 2)
    assert gain.mean == pytest.approx((0.5 + 2 - 1) / 3)
    assert pairs(AFTER, BEFORE) == 4 and paired_prompts(AFTER, BEFORE, 2) == 3
    assert gain == estimate(torch.tensor([1.0, 0.0, 2.0, NAN, NAN, -1.0]), 2)
    with pytest.raises(UserError, match="no prompt got a score"):
        paired(AFTER, torch.full((8,), NAN), 2)


def test_a_summary_has_the_policy_beside_its_base() -> None:
    scores = {"base": {"b": BEFORE, "a": BEFORE * NAN}, "policy": {"b": AFTER, "a": AFTER}}
    rows = summary(Evaluation(tuple(map(Prompt, "wxyz")), 2, scores))
    assert [(row["reward"], row["model"], row["scored"]) for row in rows] == [
        ("a", "base", 0), ("a", "policy", 7), ("b", "base", 5), ("b", "policy", 7)
    ]  # fmt: skip
    assert rows[0]["mean"] is rows[0]["gain"] is rows[1]["gain"] is rows[2]["gain"] is None
    assert rows[3]["gain"]["mean"] == paired(AFTER, BEFORE, 2).mean


def test_where_a_curve_is_first_at_a_level() -> None:
    at = torch.tensor([0.0, 10, 20], dtype=torch.float64)
    curves = torch.tensor([[0.0, 1, 0], [0, 1, 2], [3, 1, 3], [0, 1, 1], [2, 2, 2]], dtype=torch.float64)
    levels = torch.tensor([0.5, 1.5, 2, 1.5, 2], dtype=torch.float64)
    assert first_at(levels, at, curves).tolist() == [5, 15, 0, torch.inf, 0]
