"""Sampling groups and replaying their steps: what is shared, what is recorded, and that replay is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from vipo import sde
from vipo.errors import UserError
from vipo.generators.flux import FluxGenerator
from vipo.options import Solver, Window
from vipo.rollout import replay, sample_groups, stochastic_steps
from vipo.types import Prompt, Rollout

PROMPTS = [Prompt("a cat"), Prompt("a red car")]
SOLVER = Solver(steps=5, shift=2.0, kind="dance", eta=0.6)
WINDOW = replace(SOLVER, window=Window(size=2, starts=2))


@pytest.fixture(scope="module")
def generator(model_folder: Path) -> FluxGenerator:
    return tiny.generator(model_folder)


def sampled(generator: FluxGenerator, solver: Solver, **changes: object) -> Rollout:
    options = {"group_size": 3, "seed": 7, "iteration": 2, **changes}
    return sample_groups(generator, PROMPTS, solver, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dance", "flow", "cps"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_replay_gives_the_recorded_log_prob_bit_for_bit(
    generator: FluxGenerator, kind: sde.Kind, reduce: sde.Reduce
) -> None:
    solver = replace(SOLVER, kind=kind)
    rollout = sampled(generator, solver, reduce=reduce)
    for step in range(4):  # the batches that sampled them
        rows = rollout.transitions.take((rollout.transitions.step == step).nonzero().squeeze(1))
        again, _ = replay(generator, rollout.conditioning, rows, solver, reduce=reduce)
        assert torch.equal(again, rows.log_prob)


def test_replay_in_other_batches_agrees_to_rounding(generator: FluxGenerator) -> None:
    rollout = sampled(generator, SOLVER)
    mixed = torch.randperm(len(rollout.transitions.sample), generator=torch.Generator().manual_seed(0))
    rows = rollout.transitions.take(mixed)
    again, _ = replay(generator, rollout.conditioning, rows, SOLVER, reduce="mean")
    assert torch.allclose(again, rows.log_prob, atol=1e-4)


def test_all_steps_but_the_last_are_recorded(generator: FluxGenerator) -> None:
    transitions = sampled(generator, SOLVER).transitions
    assert sorted(set(transitions.step.tolist())) == [0, 1, 2, 3]
    assert len(transitions.step) == 4 * 6
    assert transitions.log_prob.shape == (24, *tiny.GRID)


def test_a_window_records_its_own_steps_and_shares_the_prefix(generator: FluxGenerator) -> None:
    whole, window = sampled(generator, SOLVER), sampled(generator, WINDOW)
    steps = sorted(set(window.transitions.step.tolist()))
    assert len(steps) == 2 and steps[1] == steps[0] + 1
    assert whole.model_passes == 5 * 6
    assert window.model_passes == 2 * steps[0] + 6 * (5 - steps[0])  # one sample per group before the window


def test_sharing_the_prefix_changes_no_picture(generator: FluxGenerator) -> None:
    """One group alone, whose prefix is one sample, against the same samples computed one by one."""
    late = replace(SOLVER, window=Window(size=1, first=2, schedule="fixed"))
    together = sampled(generator, late).media
    alone = sampled(generator, late, batch_size=1).media
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_fraction_is_drawn_per_sample(generator: FluxGenerator) -> None:
    solver = replace(SOLVER, train_fraction=0.5)
    transitions = sampled(generator, solver).transitions
    per_sample = [sorted(transitions.step[transitions.sample == i].tolist()) for i in range(6)]
    assert all(len(steps) == 2 for steps in per_sample)
    assert len({tuple(steps) for steps in per_sample}) > 1


def test_a_group_starts_from_one_noise_unless_told_otherwise(generator: FluxGenerator) -> None:
    quiet = replace(SOLVER, eta=1e-6)
    same, own = sampled(generator, quiet).media, sampled(generator, replace(quiet, same_noise=False)).media
    assert torch.allclose(same[0], same[1], atol=1e-3)
    assert not torch.allclose(own[0], own[1], atol=1e-2)


def test_noise_belongs_to_the_sample_not_to_the_batch(generator: FluxGenerator) -> None:
    both = sampled(generator, SOLVER).media
    second = sample_groups(generator, PROMPTS[1:], SOLVER, group_size=3, seed=7, iteration=2, first_group=1).media
    assert torch.allclose(both[3:], second, atol=1e-4)
    assert not torch.allclose(both, sampled(generator, SOLVER, iteration=3).media, atol=1e-2)
    assert not torch.allclose(both, sampled(generator, SOLVER, seed=8).media, atol=1e-2)


def test_every_iteration_step_and_sample_draws_its_own_step_noise(generator: FluxGenerator) -> None:
    drawn = []
    for iteration in (2, 3):
        rollout = sampled(generator, SOLVER, iteration=iteration)
        _, step = replay(generator, rollout.conditioning, rollout.transitions, SOLVER, reduce="mean")
        drawn.append((rollout.transitions.next_latents - step.mean) / step.std)
    noise = torch.cat(drawn).flatten(1)
    likeness = torch.corrcoef(noise) - torch.eye(len(noise))
    assert likeness.abs().max() < 0.5  # the same draw twice would correlate fully


def test_without_noise_the_rollout_is_the_ode(generator: FluxGenerator) -> None:
    ode = sampled(generator, SOLVER.deterministic())
    assert len(ode.transitions.step) == 0
    quiet = sampled(generator, replace(SOLVER, eta=1e-7, same_noise=False))
    assert torch.allclose(ode.media, quiet.media, atol=1e-3)


@pytest.mark.parametrize(
    ("window", "starts"),
    [
        (Window(size=1, starts=3, schedule="sliding", every=2), [0, 0, 1, 1, 2, 2, 0]),
        (Window(size=1, first=2, schedule="fixed"), [2] * 7),
    ],
)
def test_windows_that_are_not_random_go_where_they_say(window: Window, starts: list[int]) -> None:
    solver = replace(SOLVER, window=window)
    assert [stochastic_steps(solver, 0, iteration).start for iteration in range(7)] == starts


def test_random_windows_cover_their_starts_and_depend_on_the_seed() -> None:
    solver = replace(SOLVER, window=Window(size=2, starts=3))
    drawn, again, other = ([stochastic_steps(solver, seed, i).start for i in range(30)] for seed in (0, 0, 1))
    assert set(drawn) == {0, 1, 2} and drawn == again != other
    assert set(solver.candidates) == {0, 1, 2, 3} and solver.stochastic_count == 2


def test_a_window_may_not_reach_the_last_step() -> None:
    with pytest.raises(ValueError, match="last step is never stochastic"):
        Solver(steps=4, shift=1.0, window=Window(size=2, starts=3))


def test_nan_latents_stop_the_run_with_the_step(model_folder: Path) -> None:
    diverged = tiny.generator(model_folder)
    next(diverged.network.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite at solver step 1 of 5"):
        sampled(diverged, SOLVER)
