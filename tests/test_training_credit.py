"""Factors of an advantage: what each credit makes of rewards and maps, and what a solver step adds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vipo import objective, sde
from vipo.options import Objective, Solver, Window
from vipo.training.credit import Credit, assign, combined, flat_groups, step_factor
from vipo.types import Scores

GRID = (1, 2, 3)
MAPS = torch.rand(8, *GRID, generator=torch.Generator().manual_seed(0)) * 2
ONE = Scores({"a": torch.tensor([1.0, 2, 3, 4, 0, 0, 5, 9])}, {"a": 1.0})
TWO = Scores({**ONE.by_name, "b": torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])}, {"a": 1.0, "b": 0.5})
STEP = torch.ones(4)


def credited(credit: str, scores: Scores, maps: Tensor | None = MAPS, **options: object) -> Credit:
    chosen = Objective(**{"clip_range": 0.1, **options})  # type: ignore[arg-type]
    advantage = combined(chosen, scores, 4)
    return assign(credit, chosen, scores, advantage, maps, GRID, 4, STEP)  # type: ignore[arg-type]


def test_what_each_credit_is() -> None:
    advantage = objective.group_advantage(ONE.by_name["a"], 4)
    assert torch.equal(credited("sample", ONE).local, advantage)
    assert torch.equal(credited("uniform", ONE, None).local, advantage[:, None, None, None].expand(8, *GRID))
    assert torch.equal(credited("advantage_map", ONE).local, advantage[:, None, None, None] * MAPS)
    mapped = ONE.by_name["a"][:, None, None, None] * MAPS
    assert torch.equal(credited("reward_map", ONE).local, objective.group_advantage(mapped, 4))


@pytest.mark.parametrize("combine", ["advantage", "reward"])
def test_a_map_of_rewards_combines_several_as_asked(combine: str) -> None:
    seen = {name: values[:, None, None, None] * MAPS for name, values in TWO.by_name.items()}
    expected = (
        objective.group_advantage(seen["a"], 4) + 0.5 * objective.group_advantage(seen["b"], 4)
        if combine == "advantage"
        else objective.group_advantage(seen["a"] + 0.5 * seen["b"], 4)
    )
    assert torch.allclose(credited("reward_map", TWO, combine=combine).local, expected, atol=1e-6)


def test_flat_groups_follow_what_is_combined() -> None:
    """Two rewards that differ, but whose sum does not: flat when they are summed first, not when they are not."""
    scores = Scores({"a": torch.tensor([1.0, 2, 3, 5]), "b": torch.tensor([5.0, 4, 3, 1])}, {"a": 1.0, "b": 1.0})
    chosen = {how: credited("sample", scores, None, combine=how).advantage for how in ("advantage", "reward")}
    assert flat_groups(chosen["reward"], 4) == 1
    lopsided = Scores(dict(scores.by_name), {"a": 1.0, "b": 0.5})
    assert flat_groups(credited("sample", lopsided, None, combine="advantage").advantage, 4) == 0


def test_a_sample_without_a_score_has_no_weight_anywhere() -> None:
    values = ONE.by_name["a"].clone()
    values[2] = math.nan
    for kind in ("sample", "uniform", "reward_map", "advantage_map"):
        credit = credited(kind, Scores({"a": values}, {"a": 1.0}))
        assert credit.advantage[2] == 0 and not credit.local[2].any() and credit.local.isfinite().all()


def test_weights_are_clipped_before_the_factor_of_a_step() -> None:
    credit = credited("advantage_map", ONE, advantage_clip=0.5)
    assert credit.local.abs().max() == 0.5
    doubled = replace(credit, step=torch.tensor([1.0, 2.0]))
    rows, steps = torch.tensor([0, 0, 3]), torch.tensor([0, 1, 1])
    assert torch.equal(doubled.weight(rows, steps), credit.local[rows] * torch.tensor([1.0, 2, 2])[:, None, None, None])


@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="credit='all' is not known; choose from sample"):
        credited("all", ONE)
    with pytest.raises(ValueError, match="needs maps of shape"):
        credited("advantage_map", ONE, None)
    assert not credited("advantage_map", ONE, -MAPS).sound  # the learner refuses it: tests/test_waits.py


def dense(scores: Scores, evidence: Tensor, **options: object) -> Tensor:
    return credited("dense_reward", scores, evidence, **options).local


FLAWS = torch.rand(8, *GRID, generator=torch.Generator().manual_seed(2))


def test_a_dense_reward_is_boxflows_formula() -> None:
    """R(p) = R - a W(p) with a = c std_group(R), then (R(p) - mean) / std over the group at each position."""
    rewards, c = ONE.by_name["a"], 0.5
    expected = torch.zeros(8, *GRID)
    for group in (slice(0, 4), slice(4, 8)):
        r = rewards[group, None, None, None] - c * rewards[group].std() * FLAWS[group]
        expected[group] = (r - r.mean(0)) / (r.std(0) + 1e-4)
    found = dense(ONE, -c * FLAWS)
    assert torch.allclose(found, expected, atol=1e-5)
    signs = dense(ONE, -3 * FLAWS).sign() * credited("sample", ONE).local.sign()[:, None, None, None]
    assert (signs < 0).any()  # a position's sign may be another than its sample's
    assert torch.allclose(dense(ONE, torch.zeros_like(FLAWS)), credited("uniform", ONE, None).local, atol=1e-6)


@pytest.mark.parametrize("combine", ["advantage", "reward"])
def test_a_dense_reward_of_several_combines_as_asked_and_a_negative_weight_turns_no_evidence(combine: str) -> None:
    scores = Scores(TWO.by_name, {"a": 1.0, "b": -0.5})
    a, b = (objective.dense_reward(TWO.by_name[name], sign * FLAWS, 4) for name, sign in (("a", 1), ("b", -1)))
    expected = objective.group_advantage(a, 4) - 0.5 * objective.group_advantage(b, 4)
    if combine == "reward":
        expected = objective.group_advantage(objective.dense_reward(scores.total, FLAWS, 4), 4)
    assert torch.allclose(dense(scores, FLAWS, combine=combine).double(), expected, atol=1e-5)
    better = FLAWS.clone()
    better[3] = 1.0  # at every position it then is what it was or better
    assert (dense(scores, better, combine=combine)[3] >= dense(scores, FLAWS, combine=combine)[3] - 1e-6).all()


def test_a_dense_reward_leaves_out_what_is_missing_and_learns_nothing_of_flat_groups() -> None:
    values, evidence = ONE.by_name["a"].clone(), FLAWS.clone()
    values[1], evidence[2] = math.nan, math.nan
    found = dense(Scores({"a": values}, {"a": 1.0}), evidence)
    scalar = objective.group_advantage(values, 4)
    assert found.isfinite().all() and not found[1].any() and (found[2] == scalar[2]).all() and scalar[2] != 0
    r = values[[0, 3], None, None, None] + values[[0, 2, 3]].std() * evidence[[0, 3]]
    assert torch.allclose(found[[0, 3]], (r - r.mean(0)) / (r.std(0) + 1e-4), atol=1e-5)
    flat = torch.tensor([0.3] * 4 + [0.1, 0.3, 0.2, 0.7])
    assert not dense(Scores({"a": flat}, {"a": 1.0}), FLAWS)[:4].any()


def test_flaws_and_a_signed_consensus_weigh_the_advantage_as_they_are() -> None:
    advantage = credited("sample", ONE).local[:, None, None, None]
    assert torch.equal(credited("flaw_map", ONE, 1 - FLAWS).local, advantage * (1 - FLAWS))  # not brought to mean 1
    signed = credited("signed_consensus", ONE, FLAWS - 0.5)
    assert torch.equal(signed.local, advantage * (FLAWS - 0.5)) and signed.sound
    assert not credited("flaw_map", ONE, FLAWS - 0.5).sound
    assert not credited("signed_consensus", ONE, FLAWS / 0).sound


SIGMAS = sde.shifted_sigmas(6, 3.0)


def factor(weight: str, **options: object) -> Tensor:
    solver = Solver(**{"steps": 6, "kind": "flow", "eta": 0.7, **options})  # type: ignore[arg-type]
    return step_factor(Objective(clip_range=0.1, step_weight=weight), solver, SIGMAS)  # type: ignore[arg-type]


def test_equal_steps_weigh_one() -> None:
    assert torch.equal(factor("equal"), torch.ones(6))


@pytest.mark.parametrize("kind", ["dance", "flow"])
def test_noise_level_weighs_by_the_size_of_the_noise(kind: str) -> None:
    """Norm(eps_t sqrt(dt)), TempFlow-GRPO."""
    found = factor("noise_level", kind=kind)
    t, t_next = SIGMAS[:-2].double(), SIGMAS[1:-1].double()
    eps = torch.full_like(t, 0.7)
    if kind == "flow":
        eps = 0.7 * (t / (1 - torch.where(t >= 1, t_next, t))).sqrt()
    expected = eps * (t - t_next).sqrt()
    assert torch.allclose(found[:-1].double(), expected / expected.mean(), rtol=1e-5) and found[-1] == 1


@pytest.mark.parametrize("kind", ["dance", "flow"])
def test_gradient_weighs_by_one_over_c(kind: str) -> None:
    """c(t) = sqrt(dt) / eps_t + eps_t sqrt(dt) (1 - t) / (2 t), Flash-GRPO."""
    found = factor("gradient", kind=kind)
    t, t_next = SIGMAS[:-2].double(), SIGMAS[1:-1].double()
    eps = torch.full_like(t, 0.7)
    if kind == "flow":
        eps = 0.7 * (t / (1 - torch.where(t >= 1, t_next, t))).sqrt()
    length = (t - t_next).sqrt()
    c = length / eps + eps * length * (1 - t) / (2 * t)
    assert torch.allclose(found[:-1].double(), (1 / c) / (1 / c).mean(), rtol=1e-5)


def test_the_factor_is_taken_over_all_steps_that_a_window_may_reach() -> None:
    """With one stochastic step an iteration it would be 1 for ever if it were normalised over that iteration's."""
    found = factor("gradient", window=Window(size=1, starts=4))
    assert torch.allclose(found[:4].mean(), torch.tensor(1.0)) and (found[4:] == 1).all() and found[:4].std() > 0.01


def test_steps_that_solve_without_noise_weigh_one() -> None:
    assert torch.equal(factor("gradient", kind="ode"), torch.ones(6))
