"""The best of a run's evaluations, and a fall from it that is more than chance over prompts."""

from __future__ import annotations

import math

import torch

from vipo.evaluation.best import best_of, fall_of, latest_series, series_of
from vipo.evaluation.records import EvaluationRecord, recorded

NOISE = torch.tensor([0.3, -0.3, 0.2, -0.2, 0.1, -0.1, 0.0, 0.0], dtype=torch.float64)  # by prompt


def evaluation(
    iteration: int, mean: float, *, noise: float = 0.0, since: int = 0, prompts: int = 8
) -> EvaluationRecord:
    """Scores of one sample a prompt; the noise is another each time, and sums to nothing."""
    values = mean + noise * NOISE[:prompts].roll(iteration)
    return EvaluationRecord(iteration, 1, ("a cat",) * prompts, {"judge": values}, since)


def test_the_best_has_the_highest_mean_and_is_the_earliest_of_equals() -> None:
    series = [evaluation(0, 0.1), evaluation(2, 0.5), evaluation(4, 0.5), evaluation(6, 0.2)]
    best = best_of(series, "judge")
    assert best is not None and (best.iteration, best.mean) == (2, 0.5) and str(best) == "iteration 2 (0.5)"
    assert best_of(series, "another") is None and best_of([], "judge") is None


def test_the_best_is_one_whose_weights_are_kept_or_the_untrained_model() -> None:
    series = [evaluation(0, 0.1), evaluation(2, 0.5), evaluation(4, 0.3)]
    kept = [best_of(series, "judge", those) for those in ([2, 4], [4], [])]
    assert [one.iteration for one in kept if one] == [2, 4, 0]
    assert str(kept[2]) == "the untrained model (0.1)"


def test_the_mean_is_over_prompts_and_what_has_no_score_is_left_out() -> None:
    line = {"iteration": 1, "samples_per_prompt": 2, "prompts": ["a"] * 4, "values": {"judge": [1.0, None, 0.0, 0.5]}}
    nothing = {**line, "iteration": 2, "values": {"judge": [None] * 4}}
    best = best_of([recorded(line), recorded(nothing)], "judge")
    assert best is not None and (best.iteration, best.mean) == (1, 0.625)


def test_evaluations_made_in_another_way_are_another_series() -> None:
    records = [evaluation(0, 0.9), evaluation(2, 0.95), evaluation(2, 0.1, since=2), evaluation(4, 0.2, since=2)]
    assert [[one.iteration for one in series] for series in series_of(records)] == [[0, 2], [2, 4]]
    best = best_of(latest_series(records), "judge")
    assert best is not None and best.iteration == 4


def test_a_fall_is_more_than_its_interval() -> None:
    before = [evaluation(0, 0.1), evaluation(2, 0.8, noise=1.0)]
    fall = fall_of([*before, evaluation(5, 0.3, noise=1.0)], "judge")
    assert fall is not None and fall.best.iteration == 2 and fall.iteration == 5
    assert 0 < fall.loss.low < fall.loss.mean < fall.loss.high and math.isclose(fall.loss.mean, 0.5)
    assert str(fall).startswith("judge fell by 0.5 [") and str(fall).endswith("from its best, iteration 2 (0.8)")
    assert fall_of([*before, evaluation(5, 0.75, noise=1.0)], "judge") is None  # within the interval
    assert fall_of([*before, evaluation(5, 0.9)], "judge") is None and fall_of(before[:1], "judge") is None


def test_a_fall_needs_prompts_enough_and_the_last_evaluation() -> None:
    assert fall_of([evaluation(0, 0.9, prompts=6), evaluation(1, 0.1, prompts=6)], "judge") is not None
    assert fall_of([evaluation(0, 0.9, prompts=5), evaluation(1, 0.1, prompts=5)], "judge") is None
    without = EvaluationRecord(2, 1, ("a cat",) * 8, {"another": torch.zeros(8, dtype=torch.float64)})
    assert fall_of([evaluation(0, 0.9), evaluation(1, 0.1), without], "judge") is None
