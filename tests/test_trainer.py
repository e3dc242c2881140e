"""The loop on a tiny FLUX: what each credit does to the gradient, what the guards catch, and that it learns."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import gloo
import tiny
from vipo import objective
from vipo.errors import UserError
from vipo.evaluation.evaluator import Sampler, scored
from vipo.options import NEEDS_MAPS
from vipo.policy import Policy
from vipo.training.credit import Credit, combined
from vipo.training.health import GradientGuard
from vipo.training.trainer import Trainer
from vipo.types import Prompt, Rollout, Transitions

MAPS = tiny.MAPS


def full(model: Any) -> Policy:
    return Policy.full(model.network)


def credited(trainer: Trainer) -> tuple[Rollout, Credit]:
    """The first iteration up to its update."""
    rollout = trainer._sample(trainer.prompts.groups(0), 0, 0)
    scores = trainer.scorer(rollout.media, rollout.prompts)
    advantage = combined(trainer.objective, scores, trainer.group_size)
    maps = trainer._maps(rollout, scores, advantage)
    return rollout, trainer._credit(scores, scores, advantage, maps, rollout)


def gradient(trainer: Trainer) -> Tensor:
    """What the first iteration's loss says, before clipping; the weights stay."""
    rollout, credit = credited(trainer)
    kept = trainer._kept(credit.advantage)
    (update,) = trainer.learner._updates(rollout.transitions, rollout, kept, 0)
    assert trainer.learner._accumulate(rollout.conditioning, update, credit)[0]["grad_norm"] < 1  # not clipped
    parts = [p.grad.flatten() for p in trainer.policy.parameters.values() if p.grad is not None]
    return torch.cat(parts)


def dealt(trainer: Trainer, rollout: Rollout, kept: Tensor) -> list[Transitions]:
    """The rows of each optimiser step of the first iteration."""
    return trainer.learner._deal(rollout.transitions, len(rollout.prompts), kept, 0)


def gap(one: Tensor, other: Tensor) -> float:
    """How far apart two gradients are, in units of the first."""
    return float((one - other).norm() / one.norm())


def test_the_ratio_is_exactly_one_on_the_first_update(model_folder: Path) -> None:
    metrics = tiny.trainer(model_folder, train_fraction=0.7).step().metrics
    assert metrics["ratio_deviation"] == 0 and metrics["clipped_fraction"] == 0 and metrics["approx_kl"] == 0


@pytest.mark.parametrize("rollout_batch_size", [None, 3])
def test_the_ratio_stays_one_whatever_the_iteration_once_batches_agree(
    model_folder: Path, rollout_batch_size: int | None
) -> None:
    trainer = tiny.trainer(model_folder, rollout_batch_size=rollout_batch_size)
    deviations = [trainer.step().metrics["ratio_deviation"] for _ in range(3)]
    assert max(deviations) == 0 if rollout_batch_size is None else max(deviations) < 1e-4


def test_bfloat16_trains_with_ratio_one(model_folder: Path) -> None:
    metrics = tiny.trainer(model_folder, precision="bf16", credit="advantage_map").step().metrics
    assert metrics["ratio_deviation"] == 0 and metrics["grad_norm"] > 0


def score_of(trainer: Trainer) -> float:
    prompts = [Prompt(text) for text in tiny.PROMPTS]
    found = scored(Sampler(trainer.generator, trainer.solver, 4), trainer.scorer, prompts)
    return float(found.scores["redness"].mean())


@pytest.mark.parametrize("credit", ["sample", "advantage_map"])
def test_training_on_redness_makes_pictures_redder(model_folder: Path, credit: str) -> None:
    trainer = tiny.trainer(
        model_folder, credit=credit, policy=full, learning_rate=3e-3, group_size=8, prompts_per_iteration=4, steps=3
    )
    before = score_of(trainer)
    for _ in range(10):
        trainer.step()
    assert score_of(trainer) - before > 0.05


SIBLINGS: dict[str, dict[str, Any]] = {
    "guard": {"loss": "guard"},
    "detached": {"ratio": "detached"},
    "noise_level": {"step_weight": "noise_level"},
    "gradient": {"step_weight": "gradient"},
    "matching": {"loss": "matching", "kind": "ode", "same_noise": False},
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_every_loss_begins_on_its_policy_and_makes_pictures_redder(model_folder: Path, name: str) -> None:
    trainer = tiny.trainer(
        model_folder,
        **SIBLINGS[name],
        credit="advantage_map",
        policy=full,
        learning_rate=3e-3,
        group_size=8,
        prompts_per_iteration=4,
        steps=3,
    )
    before = score_of(trainer)
    first = trainer.step().metrics
    assert first["ratio_deviation"] == 0 and first["grad_norm"] > 0
    assert ("clipped_fraction" in first) == (name != "matching")
    for _ in range(9):
        trainer.step()
    assert score_of(trainer) - before > 0.05


def test_a_kl_term_holds_a_loss_without_a_ratio(model_folder: Path) -> None:
    changes = {**SIBLINGS["matching"], "scorer": tiny.scorer(tiny.constant), "kl_weight": 1.0, "learning_rate": 3e-3}
    trainer = tiny.trainer(model_folder, **changes)
    assert trainer.step().metrics["kl_reference"] == 0
    tiny.nudged(trainer.policy, 0.1)
    away = trainer.step().metrics["kl_reference"]
    for _ in range(8):
        last = trainer.step().metrics["kl_reference"]
    assert 0 < last < 0.8 * away


def test_a_loss_without_a_ratio_records_no_step(model_folder: Path) -> None:
    trainer = tiny.trainer(model_folder, **SIBLINGS["matching"], matching_draws=3, per_iteration=2)
    rollout, credit = credited(trainer)
    assert len(rollout.transitions.sample) == 0
    rows = trainer.learner.loss.rows(rollout, seed=0, iteration=0)
    shares = trainer.learner._deal(rows, len(rollout.prompts), trainer._kept(credit.advantage), 0)
    assert [len(share.sample) for share in shares] == [12, 12]
    assert sorted(torch.cat([share.sample for share in shares]).tolist()) == sorted(list(range(8)) * 3)


@pytest.mark.parametrize("credit", ["sample", "uniform", "reward_map", "advantage_map", "flaw_map"])
def test_every_credit_moves_the_weights(model_folder: Path, credit: str) -> None:
    trainer = tiny.trainer(model_folder, credit=credit)
    before = {name: value.clone() for name, value in trainer.policy.state().items()}
    step = trainer.step()
    assert any(not torch.equal(before[name], value) for name, value in trainer.policy.state().items())
    assert (step.maps is not None) == (credit in NEEDS_MAPS) == ("map/mean" in step.metrics)
    assert all(math.isfinite(value) for value in step.metrics.values())


def test_a_map_of_ones_has_the_gradient_of_one_ratio_per_sample(model_folder: Path) -> None:
    sample, uniform = (gradient(tiny.trainer(model_folder, credit=credit)) for credit in ("sample", "uniform"))
    assert gap(sample, uniform) < 1e-5


def test_where_the_map_puts_its_weight_matters(model_folder: Path) -> None:
    ours, uniform, shuffled = (
        gradient(tiny.trainer(model_folder, credit=credit, map_source=source))
        for credit, source in [("advantage_map", MAPS), ("uniform", MAPS), ("advantage_map", tiny.Shuffled(MAPS))]
    )
    assert gap(ours, shuffled) > 0.05 and gap(ours, uniform) > 0.05


def test_a_map_on_one_side_moves_that_side(model_folder: Path) -> None:
    """The transposition test of the whole path: weight on the left columns, and the loss is about those alone."""

    def left(rollout: Rollout, *_: object) -> Tensor:
        maps = torch.zeros(len(rollout.media), *rollout.latent_grid)
        maps[..., : rollout.latent_grid[2] // 2] = 2.0
        return maps

    trainer = tiny.trainer(model_folder, credit="advantage_map", map_source=left)
    weight, advantage = (found := credited(trainer)[1]).local, found.advantage
    assert weight.shape == (8, *tiny.GRID)
    assert torch.equal(weight[..., :5], (2 * advantage)[:, None, None, None].expand(8, 1, 6, 5))
    assert not weight[..., 5:].any()


def test_parts_scored_while_the_next_is_sampled_give_the_scores_of_one_after_the_other(model_folder: Path) -> None:
    whole, parts = (tiny.trainer(model_folder, prompts_at_once=count).step() for count in (None, 1))
    assert [p.text for p in parts.rollout.prompts] == [p.text for p in whole.rollout.prompts]
    assert torch.allclose(parts.rollout.media, whole.rollout.media, atol=1e-4)
    assert torch.allclose(parts.scores.total, whole.scores.total, atol=1e-4)
    assert torch.equal(parts.rollout.transitions.sample.sort().values, whole.rollout.transitions.sample.sort().values)
    assert parts.metrics["grad_norm"] == pytest.approx(whole.metrics["grad_norm"], rel=1e-3)
    assert parts.metrics["ratio_deviation"] < 1e-4


def test_a_part_is_scored_in_the_background(model_folder: Path) -> None:
    threads: list[str] = []

    def redness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        threads.append(threading.current_thread().name)
        return tiny.redness(media, prompts)

    tiny.trainer(model_folder, scorer=tiny.scorer(redness), prompts_at_once=1).step()
    tiny.trainer(model_folder, scorer=tiny.scorer(redness)).step()
    assert [name.startswith("vipo-reward") for name in threads] == [True, True, False]


def test_a_reward_that_fails_in_the_background_stops_the_run(model_folder: Path) -> None:
    def broken(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
        raise RuntimeError("no eyes")

    with pytest.raises(UserError, match="no eyes"):
        tiny.trainer(model_folder, scorer=tiny.scorer(broken), prompts_at_once=1).step()


def test_several_rewards_tell_how_each_agrees_with_their_sum(model_folder: Path) -> None:
    def blueness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return -tiny.redness(media, prompts)

    weights = {"redness": 3.0, "blueness": 1.0}
    metrics = tiny.trainer(model_folder, scorer=tiny.scorer(tiny.redness, blueness, weights=weights)).step().metrics
    assert metrics["agreement/redness"] == pytest.approx(1, abs=1e-3)
    assert metrics["agreement/blueness"] == pytest.approx(-1, abs=1e-3)
    assert "agreement/redness" not in tiny.trainer(model_folder).step().metrics


def test_a_group_of_equal_rewards_has_no_gradient(model_folder: Path) -> None:
    step = tiny.trainer(model_folder, scorer=tiny.scorer(tiny.constant)).step()
    assert step.metrics["grad_norm"] == 0 and step.metrics["flat_groups"] == 1


def sometimes(failing: Sequence[int]) -> Callable[..., Tensor]:
    def redness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        values = tiny.redness(media, prompts)
        values[list(failing)] = torch.nan
        return values

    return redness


def test_a_sample_without_a_score_is_left_out_and_counted(model_folder: Path) -> None:
    trainer = tiny.trainer(model_folder, scorer=tiny.scorer(sometimes([2])))
    weight, advantage = (found := credited(trainer)[1]).local, found.advantage
    assert advantage[2] == 0 and not weight[2].any() and advantage.isfinite().all() and (advantage != 0).sum() == 7
    step = trainer.step()
    assert step.metrics["unscored/redness"] == 1 / 8 and any("redness" in event for event in step.events)
    scored = step.scores.by_name["redness"]
    spread = (scored[[0, 1, 3]].var() + scored[4:].var()) / 2
    assert step.metrics["spread/redness"] == pytest.approx(float(spread.sqrt()))
    assert all(math.isfinite(value) for value in step.metrics.values())


@pytest.mark.parametrize("combine", ["advantage", "reward"])
def test_several_rewards_are_combined_as_asked(model_folder: Path, combine: str) -> None:
    weights = {"redness": 1.0, "brightness": 0.5}
    both = tiny.scorer(tiny.redness, tiny.brightness, weights=weights)
    trainer = tiny.trainer(model_folder, scorer=both, combine=combine)
    rollout = trainer._sample(trainer.prompts.groups(0), 0, 0)
    scores = both(rollout.media, rollout.prompts)
    red, bright = scores.by_name["redness"], scores.by_name["brightness"]
    expected = (
        objective.group_advantage(red, 4) + 0.5 * objective.group_advantage(bright, 4)
        if combine == "advantage"
        else objective.group_advantage(red + 0.5 * bright, 4)
    )
    assert torch.allclose(combined(trainer.objective, scores, 4), expected)
    assert trainer.step().metrics["reward"] == pytest.approx(float((red + 0.5 * bright).mean()))


def test_weights_are_clipped_at_the_advantage_clip(model_folder: Path) -> None:
    _, credit = credited(tiny.trainer(model_folder, advantage_clip=0.5, credit="advantage_map"))
    assert credit.local.abs().max() == 0.5


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_several_updates_use_each_recorded_step_once(model_folder: Path, steps: int) -> None:
    trainer = tiny.trainer(model_folder, per_iteration=steps)
    rollout = trainer._sample(trainer.prompts.groups(0), 0, 0)
    shares = dealt(trainer, rollout, torch.arange(8))
    used = sorted((int(s), int(t)) for share in shares for s, t in zip(share.sample, share.step, strict=True))
    assert used == [(sample, step) for sample in range(8) for step in range(3)]
    samples = [set(share.sample.tolist()) for share in shares]
    assert len(shares) == steps and sum(map(len, samples)) == 8  # a sample's steps stay together
    assert max(map(len, samples)) - min(map(len, samples)) <= 1


def test_best_of_n_trains_on_the_best_and_the_worst_of_each_group_only(model_folder: Path) -> None:
    """The gradient is that of a rollout in which the samples between them were never recorded."""
    trainer = tiny.trainer(model_folder, keep_per_group=2, per_iteration=2)
    rollout, credit = credited(trainer)
    kept = trainer._kept(credit.advantage)
    scores = trainer.scorer(rollout.media, rollout.prompts).total.unflatten(0, (2, 4))
    expected = {4 * group + int(place(scores[group])) for group in range(2) for place in (torch.argmax, torch.argmin)}
    assert set(kept.tolist()) == expected
    shares = dealt(trainer, rollout, kept)
    used = sorted((int(s), int(t)) for share in shares for s, t in zip(share.sample, share.step, strict=True))
    assert used == sorted((sample, step) for sample in expected for step in range(3))
    assert [len(set(share.sample.tolist())) for share in shares] == [2, 2]


def test_keeping_the_whole_group_is_no_selection(model_folder: Path) -> None:
    whole, kept = (gradient(tiny.trainer(model_folder, keep_per_group=keep)) for keep in (None, 4))
    chosen = gradient(tiny.trainer(model_folder, keep_per_group=2))
    assert torch.equal(whole, kept) and gap(whole, chosen) > 1e-2


def test_only_the_first_of_several_updates_is_on_policy(model_folder: Path) -> None:
    metrics = tiny.trainer(model_folder, per_iteration=2, policy=full).step().metrics
    assert metrics["ratio_deviation"] == 0 < metrics["largest_log_ratio"]


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_the_replayed_batches_size_does_not_change_the_gradient(model_folder: Path, batch_size: int) -> None:
    whole = gradient(tiny.trainer(model_folder, credit="advantage_map"))
    parts = gradient(tiny.trainer(model_folder, credit="advantage_map", replay_batch_size=batch_size))
    assert (whole - parts).abs().max() < 1e-6 and gap(whole, parts) < 1e-3


def test_the_guard_skips_what_is_not_finite_and_what_is_far_out() -> None:
    guard = GradientGuard(factor=10.0)
    assert all(guard.reason_to_skip(norm) is None for norm in [1.0, 500.0, *[1.0] * 8])  # too few to judge by at first
    assert "over 10 times the recent median" in str(guard.reason_to_skip(11.0))
    assert "gradient norm is nan" in str(guard.reason_to_skip(math.nan))
    assert "gradient norm is inf" in str(guard.reason_to_skip(math.inf))
    assert guard.reason_to_skip(9.0) is None
    assert 11.0 not in guard.norms and all(map(math.isfinite, guard.norms))


def test_iterations_without_a_gradient_do_not_make_the_next_one_an_outlier() -> None:
    guard = GradientGuard(factor=10.0)
    assert all(guard.reason_to_skip(norm) is None for norm in [*[0.0] * 20, 1.0, *[0.0] * 20, 1.0])


@pytest.mark.parametrize("norm", [math.nan, 1e9])
def test_a_skipped_update_changes_nothing_and_is_an_event(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, norm: float
) -> None:
    trainer = tiny.trainer(model_folder)
    trainer.learner.guard.norms = [1.0] * 20
    monkeypatch.setattr(trainer.engine, "clip", lambda *_: torch.tensor(norm))
    before = {name: value.clone() for name, value in trainer.policy.state().items()}
    step = trainer.step()
    assert step.metrics["skipped"] == 1 and any("update skipped" in event for event in step.events)
    assert all(torch.equal(before[name], value) for name, value in trainer.policy.state().items())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainer.policy.parameters.values())


def test_a_real_nan_in_the_gradient_is_skipped(model_folder: Path) -> None:
    trainer = tiny.trainer(model_folder)
    parameter = next(iter(trainer.policy.parameters.values()))
    parameter.register_hook(lambda grad: torch.full_like(grad, torch.nan))
    step = trainer.step()
    assert step.metrics["skipped"] == 1 and "gradient norm is nan" in step.events[0]
    assert all(value.isfinite().all() for value in trainer.policy.state().values())


def test_latents_that_stop_being_finite_end_the_run_in_words(model_folder: Path) -> None:
    trainer = tiny.trainer(model_folder)
    with torch.no_grad():
        next(iter(trainer.policy.parameters.values())).fill_(torch.nan)
    with pytest.raises(UserError, match="latents became NaN or infinite at solver step 1 of 4"):
        trainer.step()


@pytest.mark.parametrize("build", [tiny.lora, full], ids=["lora", "full"])
def test_kl_is_zero_at_the_reference_and_pulls_back_to_it(model_folder: Path, build: Callable[..., Policy]) -> None:
    trainer = tiny.trainer(
        model_folder, policy=build, scorer=tiny.scorer(tiny.constant), kl_weight=1.0, learning_rate=3e-3
    )
    first = trainer.step().metrics
    assert first["kl_reference"] == 0 and first["grad_norm"] == 0
    tiny.nudged(trainer.policy, 0.1)
    away = trainer.step().metrics["kl_reference"]
    for _ in range(8):
        last = trainer.step().metrics["kl_reference"]
    assert 0 < last < 0.8 * away


def test_a_number_of_prompts_that_processes_cannot_share_is_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _self: 3))
    with pytest.raises(UserError, match=r"prompts\.per_iteration=2 must be a multiple of 3 processes"):
        tiny.trainer(model_folder)


def test_a_credit_that_needs_maps_says_so(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="'advantage_map' needs a map_source"):
        tiny.trainer(model_folder, credit="advantage_map", map_source=None).step()


def two_iterations(model_folder: Path) -> dict[str, Tensor]:
    """What one process of several saw, scored, credited and learned."""
    trainer = tiny.same_calls(tiny.trainer(model_folder, credit="advantage_map", learning_rate=1e-4))
    steps = [trainer.step() for _ in range(2)]
    kept = {f"media{k}": step.rollout.media for k, step in enumerate(steps)}
    kept |= {f"scores{k}": step.scores.total for k, step in enumerate(steps)}
    kept |= {f"advantage{k}": tiny.advantage_of(trainer, step) for k, step in enumerate(steps)}
    kept["reward"] = torch.tensor([step.metrics["reward"] for step in steps], dtype=torch.float64)
    return kept | {f"weights/{name}": value.clone() for name, value in trainer.policy.state().items()}


@pytest.mark.long
def test_two_processes_train_as_one(model_folder: Path) -> None:
    ranks = gloo.together(two_iterations, 2, model_folder, grouped=False)
    trainer = tiny.same_calls(tiny.trainer(model_folder, credit="advantage_map", learning_rate=1e-4))
    steps = [trainer.step() for _ in range(2)]
    both = {name: torch.cat([rank[name] for rank in ranks]) for name in ("media0", "media1", "scores0", "advantage0")}
    # Before the first update nothing depends on the number of processes, CONTRIBUTING.md says; after it, rounding does.
    assert torch.equal(both["media0"], steps[0].rollout.media) and torch.equal(both["scores0"], steps[0].scores.total)
    assert torch.equal(both["advantage0"], tiny.advantage_of(trainer, steps[0]))
    assert torch.allclose(both["media1"], steps[1].rollout.media, atol=1e-3)
    for k, step in enumerate(steps):
        assert ranks[0]["reward"][k] == ranks[1]["reward"][k] == pytest.approx(step.metrics["reward"], abs=1e-5)
    for name, value in trainer.policy.state().items():
        assert torch.equal(ranks[0][f"weights/{name}"], ranks[1][f"weights/{name}"])
        assert torch.allclose(ranks[0][f"weights/{name}"], value, atol=1e-5)
