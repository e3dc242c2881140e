"""Advantage, credit and the clipped surrogate: the properties the method implies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vipo import objective
from vipo.options import CreditKind, Objective
from vipo.training.credit import assign, flat_groups
from vipo.types import Scores

GRID = (1, 4, 6)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_advantage_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0])
    ours = objective.group_advantage(rewards, 3, eps=0.0)
    expected = torch.tensor([-1.0, 0.0, 1.0, -0.57735, -0.57735, 1.154701])  # unbiased deviation: 1 and 17.3205
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-4, 1e-8])
def test_a_group_of_equal_rewards_teaches_nothing_not_rounding_noise(eps: float) -> None:
    rewards = torch.full((6,), 0.7, dtype=torch.float64)
    assert rewards[:3].sum() / 3 != rewards[0]  # the mean of three of them is rounded to another number
    assert torch.equal(objective.group_advantage(rewards, 3, eps=eps), torch.zeros_like(rewards))
    assert flat_groups(objective.group_advantage(rewards, 3, eps=eps), 3) == 1


def test_a_sample_without_a_score_is_left_out_of_its_group() -> None:
    rewards = torch.tensor([1.0, torch.nan, 3.0, torch.inf, 5.0, 6.0, 7.0, 8.0])
    ours = objective.group_advantage(rewards, 4)
    assert torch.allclose(ours[[0, 2]], objective.group_advantage(torch.tensor([1.0, 3.0]), 2))
    assert ours[1] == ours[3] == 0
    assert torch.allclose(ours[4:], objective.group_advantage(rewards[4:], 4))


def test_spread_is_over_the_scored_samples_of_each_group() -> None:
    whole = torch.rand(12, generator=rng())
    assert torch.equal(objective.spread(whole, 4), whole.unflatten(0, (3, 4)).var(1).nanmean().sqrt())
    holes = torch.tensor([1.0, torch.nan, 3.0, torch.inf, 5.0, 6.0, 7.0, 8.0])
    expected = ((2.0 + holes[4:].var()) / 2) ** 0.5  # the variance of 1 and 3 is 2
    assert objective.spread(holes, 4) == pytest.approx(float(expected))
    one_left = torch.cat([holes, torch.tensor([9.0, torch.nan, torch.nan, torch.nan]), torch.full((4,), torch.nan)])
    assert objective.spread(one_left, 4) == pytest.approx(float(expected))  # neither of these groups has a variance
    assert objective.spread(one_left[8:], 4) == 0 and objective.spread(one_left[12:], 4).isnan()
    assert objective.spread(whole, 1) == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8),
    st.floats(0.1, 10),
    st.floats(-50, 50),
)
def test_advantage_ignores_the_scale_and_offset_of_a_reward(values: list[float], scale: float, offset: float) -> None:
    rewards = torch.tensor(values, dtype=torch.float64)
    if (rewards.unflatten(0, (2, 4)).std(1) < 1e-2).any():
        return
    ours = objective.group_advantage(rewards, 4, eps=0.0)
    assert torch.allclose(ours, objective.group_advantage(rewards * scale + offset, 4, eps=0.0), atol=1e-6)
    assert ours.unflatten(0, (2, 4)).sum(1).abs().max() < 1e-6


def test_rewards_are_normalised_before_they_are_weighed() -> None:
    small, large = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([300.0, 0.0, 100.0, 200.0])
    both = objective.combine_advantages({"a": small, "b": large}, {"a": 1.0, "b": 2.0}, 4)
    assert torch.allclose(both, objective.group_advantage(small, 4) + 2 * objective.group_advantage(large, 4))
    holed = objective.combine_advantages(
        {"a": small, "b": torch.tensor([torch.nan, 0.0, 1.0, 2.0])}, {"a": 1.0, "b": 1.0}, 4
    )
    assert holed[0] == 0  # one score is missing, so there is no total to trust


def test_group_size_must_divide_the_samples() -> None:
    with pytest.raises(ValueError, match="7 samples do not divide into groups of group_size=4"):
        objective.group_advantage(torch.zeros(7), 4)


def credited(credit: CreditKind, rewards: torch.Tensor, maps: torch.Tensor | None) -> torch.Tensor:
    """What multiplies each ratio; groups of three."""
    advantage = objective.group_advantage(rewards, 3)
    scores = Scores({"reward": rewards}, {"reward": 1.0})
    return assign(credit, Objective(clip_range=0.2), scores, advantage, maps, GRID, 3, torch.ones(1)).local


def surrogate_gradient(credit: CreditKind, maps: torch.Tensor) -> torch.Tensor:
    """d loss / d log_prob (N, T, H, W) at ratio 1."""
    log_prob = torch.randn(6, *GRID, generator=rng(2)).requires_grad_()
    weight = credited(credit, torch.randn(6, generator=rng(1)), maps)
    new = log_prob.mean((1, 2, 3)) if weight.ndim == 1 else log_prob
    objective.clipped_surrogate(new, new.detach(), weight, clip_range=0.2).loss.backward()
    assert log_prob.grad is not None
    return log_prob.grad


def test_a_map_of_ones_has_exactly_the_gradient_of_scalar_grpo() -> None:
    maps = torch.rand(6, *GRID, generator=rng(3))
    ones = torch.ones(6, *GRID)
    scalar = surrogate_gradient("sample", maps)
    assert torch.allclose(surrogate_gradient("uniform", maps), scalar, atol=1e-9)
    assert torch.allclose(surrogate_gradient("advantage_map", ones), scalar, atol=1e-9)


def test_shuffling_the_map_changes_the_gradient() -> None:
    maps = torch.rand(6, *GRID, generator=rng(3))
    shuffled = maps.flatten(1)[:, torch.randperm(24, generator=rng(4))].reshape_as(maps)
    before, after = surrogate_gradient("advantage_map", maps), surrogate_gradient("advantage_map", shuffled)
    assert (before - after).abs().max() > 0.1 * before.abs().max()


def test_a_hot_cell_moves_only_its_own_position() -> None:
    maps = torch.zeros(6, *GRID)
    maps[:, 0, 2, 3] = 1.0
    gradient = surrogate_gradient("advantage_map", maps)
    moved = gradient.abs().sum(0) > 0
    assert moved.sum() == 1 and moved[0, 2, 3]


def test_maps_never_flip_a_sign_and_negative_ones_are_refused() -> None:
    advantage = torch.randn(6, generator=rng(5))
    spread = objective.spatial_advantage(advantage, torch.rand(6, *GRID, generator=rng(6)))
    assert (spread * advantage[:, None, None, None] >= 0).all()
    for bad in (-0.1, torch.nan, torch.inf):
        maps = torch.ones(6, *GRID)
        maps[0, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="finite and non-negative"):
            objective.spatial_advantage(advantage, maps)


def test_reward_map_normalises_each_position_over_the_group() -> None:
    rewards, maps = torch.randn(6, generator=rng(7)), torch.rand(6, *GRID, generator=rng(8))
    ours = credited("reward_map", rewards, maps)
    by_hand = objective.group_advantage(maps[:, 0, 1, 2] * rewards, 3)
    assert torch.allclose(ours[:, 0, 1, 2], by_hand, atol=1e-6)


def test_zero_advantage_gives_zero_gradient() -> None:
    log_prob = torch.randn(4, *GRID, generator=rng()).requires_grad_()
    objective.clipped_surrogate(log_prob, torch.randn(4, *GRID), torch.zeros(4, *GRID), clip_range=0.2).loss.backward()
    assert log_prob.grad is not None and (log_prob.grad == 0).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.05, 1.0, True)],
)
def test_clipping_stops_only_what_has_already_gone_far_enough(ratio: float, advantage: float, moves: bool) -> None:
    log_prob = torch.tensor([ratio]).log().requires_grad_()
    ours = objective.clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), clip_range=0.2)
    ours.loss.backward()
    assert log_prob.grad is not None and (log_prob.grad.item() != 0) == moves
    assert ours.clipped_fraction.item() == float(abs(ratio - 1) > 0.2)


def test_approx_kl_is_the_unbiased_estimator() -> None:
    log_ratio = torch.tensor([0.1, -0.2])
    ours = objective.clipped_surrogate(log_ratio, torch.zeros(2), torch.ones(2), clip_range=0.2)
    assert ours.approx_kl.item() == pytest.approx(float((log_ratio.exp() - 1 - log_ratio).mean()))


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        objective.clipped_surrogate(torch.zeros(4, *GRID), torch.zeros(4, *GRID), torch.zeros(4), clip_range=0.2)
    with pytest.raises(ValueError, match=r"\(N,\) and \(N, T, H, W\)"):
        objective.spatial_advantage(torch.zeros(4), torch.ones(3, *GRID))
    with pytest.raises(ValueError, match="needs maps"):
        credited("advantage_map", torch.zeros(6), None)
    with pytest.raises(ValueError, match="clip_range"):
        objective.clipped_surrogate(torch.zeros(4), torch.zeros(4), torch.zeros(4), clip_range=0.0)


def test_extremes_are_the_best_and_the_worst_of_each_group() -> None:
    advantage = torch.tensor([0.0, 3.0, -2.0, 1.0, 5.0, 5.0, 5.0, 5.0])
    assert objective.extremes(advantage, 4, 2).tolist() == [False, True, True, False, True, False, False, True]
    assert objective.extremes(advantage, 4, 4).all()
    for keep in (0, 3, 6):
        with pytest.raises(ValueError, match="half best, half worst"):
            objective.extremes(advantage, 4, keep)
