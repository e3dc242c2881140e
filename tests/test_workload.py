"""What an iteration comes to, against what a rollout and an update really do, counted while they do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from vipo.errors import UserError
from vipo.options import Solver, Window
from vipo.plan.work import Work, work_of
from vipo.recipe import parse_recipe
from vipo.rollout import sample_groups, stochastic_steps
from vipo.schema import Recipe
from vipo.training.losses import LOSSES, Loss
from vipo.types import Batched, Prompt, Rollout
from vipo.workload import check_updates, parts, possible_steps, share_of, share_sizes, shared_steps, shares


class Counting:
    """A generator whose network does nothing but count: how many samples each call has."""

    network: torch.nn.Module = torch.nn.Linear(1, 1)
    temporal_stride = 1
    shift = 1.0
    lora_targets: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.calls: list[int] = []

    def latent_shape(self) -> tuple[int, int, int, int]:
        return 1, 1, 1, 1

    def encode(self, prompts: Sequence[str]) -> Batched:  # noqa: ARG002
        return Batched()

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:  # noqa: ARG002
        self.calls.append(len(latents))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(len(latents), 3, 1, 1, 1)

    def save_lora(self, folder: Path, layers: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


@st.composite
def solvers(draw: st.DrawFn) -> Solver:
    steps = draw(st.integers(2, 6))
    if draw(st.booleans()):
        return Solver(steps=steps, kind="ode", same_noise=False)
    window, schedule = None, draw(st.sampled_from(["random", "sliding", "fixed"]))
    if draw(st.booleans()):
        size = draw(st.integers(1, steps - 1))
        first = draw(st.integers(0, steps - 1 - size))
        starts = draw(st.integers(1, steps - size - first))
        window = Window(size=size, first=first, starts=starts, schedule=schedule, every=draw(st.integers(1, 2)))
    fraction = draw(st.sampled_from([1.0, 0.5]))
    found = Solver(steps=steps, window=window, train_fraction=fraction, same_noise=draw(st.booleans()))
    return found if found.trained_count else replace(found, train_fraction=1.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return parse_recipe(tiny.recipe(Path("nowhere"), tmp_path_factory.mktemp("prompts") / "prompts.txt"))


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other keys, by dotted key with ``__`` for the dot; sections are models or records."""
    for key, value in changes.items():
        section, leaf = key.split("__")
        old = getattr(recipe, section)
        new = old.model_copy(update={leaf: value}) if hasattr(old, "model_copy") else replace(old, **{leaf: value})
        recipe = recipe.model_copy(update={section: new})
    return recipe


def sampled(generator: Counting, recipe: Recipe, iteration: int, keep_steps: bool) -> list[Rollout]:
    """An iteration as the trainer samples it, in parts."""
    groups, options = recipe.prompts.per_iteration, recipe.training
    return [
        sample_groups(
            generator,
            [Prompt("a")] * len(part),
            recipe.solver,
            group_size=recipe.prompts.group_size,
            seed=0,
            iteration=iteration,
            first_group=part.start,
            batch_size=options.rollout_batch_size,
            keep_steps=keep_steps,
        )
        for part in parts(groups, options.prompts_at_once)
    ]


@settings(max_examples=80, deadline=None)
@given(
    solver=solvers(),
    groups=st.integers(1, 4),
    group_size=st.integers(2, 3),
    at_once=st.none() | st.integers(1, 5),
    batch=st.none() | st.integers(1, 7),
    loss=st.sampled_from(sorted(LOSSES)),
)
def test_a_rollout_does_what_is_counted(
    recipe: Recipe, solver: Solver, groups: int, group_size: int, at_once: int | None, batch: int | None, loss: str
) -> None:
    one = changed(
        recipe,
        solver__steps=solver.steps,
        prompts__per_iteration=groups,
        prompts__group_size=group_size,
        training__prompts_at_once=at_once,
        training__rollout_batch_size=batch,
        objective__loss=loss,
    ).model_copy(update={"solver": solver})
    work, keep_steps = work_of(one, 1), LOSSES[loss](one.objective, solver).keep_steps  # type: ignore[index]
    passes: dict[range, tuple[int, int]] = {}
    for iteration in range(40):  # until the window has been at every place
        generator, place = Counting(), stochastic_steps(solver, 0, iteration)
        if place in passes:
            continue
        rollouts = sampled(generator, one, iteration, keep_steps)
        passes[place] = sum(r.model_passes for r in rollouts), len(generator.calls)
        assert passes[place][0] == sum(generator.calls)
        assert max(generator.calls) == work.sampled_at_once
        assert work.recorded == sum(len(r.transitions.sample) for r in rollouts)
        assert work.samples == sum(len(r.prompts) for r in rollouts)
    assert set(passes) == set(possible_steps(solver))
    assert work.passes == pytest.approx(sum(p for p, _ in passes.values()) / len(passes))
    assert work.calls == pytest.approx(sum(c for _, c in passes.values()) / len(passes))


class Watched:
    """A loss that writes down how many rows each pass has."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.batches = loss, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def ask(self, generator: Any, conditioning: Any, rows: Any) -> Any:
        self.batches.append(len(rows.sample))
        return self.loss.ask(generator, conditioning, rows)


ORDINARY: dict[str, Any] = {}
UPDATES = {"optimizer__per_iteration": 3, "training__keep_per_group": 2}
FRACTION = {"solver__steps": 5, "solver__train_fraction": 0.5, "optimizer__per_iteration": 2}
SMALL = {"solver__steps": 5, "solver__train_fraction": 0.5, "training__replay_batch_size": 3}
WINDOW = {"solver__steps": 4, "solver__window": {"size": 1, "starts": 3}}
GUARD = {"objective": {"clip_range": 0.2, "loss": "guard"}}
MATCHING = {"objective": {"clip_range": 0.2, "loss": "matching", "matching_draws": 3}}
CASES = [ORDINARY, UPDATES, FRACTION, SMALL, WINDOW, GUARD, MATCHING, {**MATCHING, **UPDATES}, {**MATCHING, **SMALL}]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_an_update_goes_through_what_is_counted(case: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    parsed = parse_recipe(tiny.recipe(model_folder, tmp_path / "prompts.txt", prompts__group_size=4, **case))
    work = work_of(parsed, 1)
    trainer = tiny.trainer(
        model_folder,
        credit="sample",
        prompts_per_iteration=parsed.prompts.per_iteration,
        **{name: getattr(parsed.training, name) for name in ("keep_per_group", "replay_batch_size")},
        **vars(replace(parsed.solver, shift=3.0)),
        **vars(parsed.objective),
        per_iteration=parsed.optimizer.per_iteration,
    )
    watched = Watched(trainer.learner.loss)
    trainer.learner.loss = watched  # type: ignore[assignment]
    step = trainer.step()
    assert sum(watched.batches) == work.trained
    assert len(step.rollout.transitions.sample) == work.recorded
    _check_batches(watched, work, drawn=parsed.objective.loss == "matching" and not parsed.training.replay_batch_size)


def _check_batches(watched: Watched, work: Work, *, drawn: bool) -> None:
    """Exact, but for steps that are drawn for each row: there they are bounds."""
    counted = len(watched.batches), max(watched.batches)
    if drawn:
        assert counted[0] <= work.replays and counted[1] <= work.replayed_at_once
    else:
        assert counted[0] == work.replays and counted[1] <= work.replayed_at_once


def test_samples_are_dealt_evenly_to_updates() -> None:
    assert shares(5, 2) == [0, 0, 0, 1, 1] and share_sizes(5, 2) == [3, 2] and share_sizes(12, 3) == [4, 4, 4]
    assert [list(part) for part in parts(5, 2)] == [[0, 1], [2, 3], [4]] and parts(3, None) == [range(3)]


def test_the_last_step_is_never_shared() -> None:
    solver = Solver(steps=4)
    assert [shared_steps(solver, range(first, first + 1)) for first in (0, 2, 3)] == [0, 2, 3]
    assert shared_steps(solver, range(0)) == 3 and shared_steps(replace(solver, same_noise=False), range(2, 3)) == 0


def test_groups_are_dealt_to_processes_whole_or_split_evenly() -> None:
    def dealt(processes: int, per_iteration: int, group_size: int = 4) -> list[list[int]]:
        given = {"per_iteration": per_iteration, "group_size": group_size}
        return [list(share_of(rank, processes, **given).samples) for rank in range(processes)]

    assert dealt(2, 4, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]] and dealt(1, 1) == [[0, 1, 2, 3]]
    assert dealt(4, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]] and dealt(2, 1) == [[0, 1], [2, 3]]
    assert share_of(1, 2, per_iteration=1, group_size=4).splits_groups
    for processes, per_iteration, group_size in ((3, 4, 3), (4, 3, 4), (4, 2, 3)):
        with pytest.raises(UserError, match=r"must be a multiple of . processes.*splits evenly"):
            dealt(processes, per_iteration, group_size)


def test_every_process_needs_a_sample_for_each_optimiser_step() -> None:
    check_updates(4, samples=4, processes=1)
    check_updates(4, samples=8, processes=2)
    with pytest.raises(UserError, match=r"per_iteration=4 needs as many samples .*, but 2 processes share 6"):
        check_updates(4, samples=6, processes=2)
