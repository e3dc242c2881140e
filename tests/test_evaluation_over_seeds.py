"""An interval over seeds and prompts: its parts against scipy and by hand, and how often it holds a known truth."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from vipo.evaluation.over_seeds import T_975, estimate_over_seeds, mean_squares, variance_of_mean

TABLE = torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 7.0]], dtype=torch.double)


def test_quantiles_are_those_of_students_t() -> None:
    assert list(T_975) == pytest.approx([stats.t.ppf(0.975, freedom) for freedom in range(1, 31)], abs=6e-4)


def test_parts_by_hand() -> None:
    # means of seeds 1 and 4, of prompts 1, 2 and 4.5, of all 2.5; what is left 0.5, 0.5, -1 and their opposites
    assert mean_squares(TABLE) == pytest.approx((13.5, 2 * 3.25, 1.5))
    variance, freedom = variance_of_mean(TABLE)
    assert variance == pytest.approx((13.5 + 6.5 - 1.5) / 6)
    assert freedom == pytest.approx(18.5**2 / (13.5**2 + 6.5**2 / 2 + 1.5**2 / 2))
    found, error = estimate_over_seeds(TABLE), math.sqrt(18.5 / 6)
    assert (found.mean, found.standard_error) == pytest.approx((2.5, error))
    assert (found.low, found.high) == pytest.approx((2.5 - 12.706 * error, 2.5 + 12.706 * error))


def test_where_all_seeds_agree_it_is_of_the_prompts_and_no_narrower_than_a_bootstrap() -> None:
    prompts = torch.linspace(0, 1, 200, dtype=torch.double).square()
    found = estimate_over_seeds(prompts.expand(5, -1))
    reach = 1.96 * float(prompts.std()) / math.sqrt(200)
    assert reach * 0.95 < found.high - found.mean < reach * 1.15


@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
def test_it_holds_a_known_truth_as_often_as_it_says_with_three_seeds(spread: float) -> None:
    draws, held = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        seeds = spread * torch.randn(3, 1, generator=draws, dtype=torch.double)
        prompts = torch.randn(1, 24, generator=draws, dtype=torch.double)
        found = estimate_over_seeds(1.0 + seeds + prompts + torch.randn(3, 24, generator=draws, dtype=torch.double))
        held += found.low <= 1.0 <= found.high
    assert held / 300 > 0.92  # 95 % but for three standard errors of the count
