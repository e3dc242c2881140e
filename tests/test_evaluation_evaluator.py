"""Evaluation: the same prompts and noise for every policy, in parts and over processes as in one go."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from vipo.evaluation.evaluator import Evaluator, Sampler, scored
from vipo.evaluation.records import Evaluation, Scored
from vipo.options import Solver
from vipo.ranks import everyones_rows
from vipo.types import Generator, Prompt, Scores

PROMPTS = [Prompt(text, k) for k, text in enumerate(tiny.PROMPTS[:3])]


def evaluated(model: Generator, **options: object) -> Scored:
    solver = Solver(steps=3, shift=3.0, kind="dance", eta=0.7)
    return scored(Sampler(model, solver, 2, **options), tiny.scorer(tiny.redness), PROMPTS)  # type: ignore[arg-type]


def test_the_same_weights_give_the_same_pictures_whatever_the_batch(model_folder: Path) -> None:
    model = tiny.generator(model_folder)
    torch.manual_seed(1)
    first = evaluated(model)
    torch.manual_seed(2)
    assert torch.equal(evaluated(model).media, first.media)
    assert torch.allclose(evaluated(model, batch_size=4).media, first.media, atol=1e-4)


def test_rows_are_prompt_by_prompt_each_from_its_own_noise(model_folder: Path) -> None:
    result = evaluated(tiny.generator(model_folder))
    assert [prompt.index for prompt in result.prompts] == [0, 0, 1, 1, 2, 2]
    assert len({tuple(row.flatten().tolist()) for row in result.media}) == 6
    assert result.scores["redness"].shape == (6,)


def test_evaluation_adds_no_noise_between_steps(model_folder: Path) -> None:
    model, scorer = tiny.generator(model_folder), tiny.scorer(tiny.redness)
    noisy, plain = (Solver(steps=3, shift=3.0, kind=kind, eta=1.0) for kind in ("dance", "ode"))
    ours, ode = (scored(Sampler(model, s, 1), scorer, PROMPTS).media for s in (noisy, plain))
    assert torch.equal(ours, ode)


def test_more_steps_may_be_asked_for(model_folder: Path) -> None:
    model = tiny.generator(model_folder)
    assert not torch.equal(evaluated(model, steps=6).media, evaluated(model).media)


@dataclass(frozen=True)
class Thread:
    """One of several threads that gather like processes."""

    team: int
    teams: int
    barrier: threading.Barrier
    said: dict[int, torch.Tensor]
    in_step: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        self.said[self.team] = values
        self.barrier.wait(20)
        assert len({tuple(value.shape) for value in self.said.values()}) == 1  # as a real gather asks for
        found = torch.cat([self.said[rank] for rank in range(self.teams)])
        self.barrier.wait(20)
        return found

    def any(self, flag: bool) -> bool:
        return bool(self.gather(torch.tensor([flag])).any())


def together(ranks: int, work: Callable[[Thread], Any]) -> list[Any]:
    """What ``work`` returns in each of so many teams of one."""
    barrier, said = threading.Barrier(ranks), {}
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, [Thread(rank, ranks, barrier, said) for rank in range(ranks)]))


class Numbers:
    """Samples that know their number, one reward of two missing for a few; keeps a list of what was sampled."""

    samples_per_prompt = 2

    def __init__(self) -> None:
        self.sampled: list[str] = []

    def __call__(self, prompts: Sequence[Prompt], first: int = 0) -> Any:
        self.sampled += [prompt.text for prompt in prompts]
        media = torch.arange(2.0 * first, 2 * (first + len(prompts)))[:, None, None, None, None].expand(-1, 3, 1, 2, 2)
        return SimpleNamespace(media=media, prompts=tuple(prompt for prompt in prompts for _ in range(2)))

    @staticmethod
    def score(media: torch.Tensor, _prompts: Sequence[Prompt]) -> Scores:
        number = media[:, 0, 0, 0, 0]
        third = (number / 3).masked_fill(number == 5, torch.nan)
        return Scores({"number": number, "third": third}, {}, {"third": "five"} if 5 in number else {})


@pytest.mark.parametrize(("prompts", "at_once", "ranks"), [(7, 2, 1), (7, 2, 2), (7, 2, 3), (4, 1, 4), (2, 1, 3)])
def test_ranks_share_the_prompts_and_all_know_every_score(prompts: int, at_once: int, ranks: int) -> None:
    asked = [Prompt(str(k)) for k in range(prompts)]
    samplers = [Numbers() for _ in range(ranks)]

    def work(rank: Thread) -> Evaluation:
        sampler = samplers[rank.team]
        return Evaluator({"policy": nullcontext}, sampler, sampler.score, at_once, ranks=rank)(asked)

    numbers = torch.arange(2.0 * prompts)
    for found in together(ranks, work):
        assert torch.equal(found.scores["policy"]["number"], numbers) and found.prompts == tuple(asked)
        third = (numbers / 3).where(numbers != 5, torch.nan)
        assert torch.equal(found.scores["policy"]["third"].nan_to_num(-1), third.nan_to_num(-1))
        first = 5 // 2 // at_once * at_once
        why = f"policy: third has no score for 1 of {2 * at_once} samples from prompt {first} on: five"
        assert found.failures == ((why,) if prompts > 2 else ())
    sampled = sorted(text for sampler in samplers for text in sampler.sampled)
    idle = max(0, ranks - -(-prompts // at_once))  # they do the last part again, so that all call the network
    assert sampled == sorted([prompt.text for prompt in asked] + [asked[-1].text] * idle)
    assert all(sampler.sampled for sampler in samplers)


@pytest.mark.parametrize(("prompts", "ranks"), [(7, 3), (5, 2), (2, 3)])
def test_ranks_whose_network_is_cut_call_it_equally_often(prompts: int, ranks: int) -> None:
    samplers = [Numbers() for _ in range(ranks)]

    def work(rank: Thread) -> Evaluation:
        sampler, cut = samplers[rank.team], replace(rank, in_step=True)
        return Evaluator({"policy": nullcontext}, sampler, sampler.score, 1, ranks=cut)(
            [Prompt(str(k)) for k in range(prompts)]
        )

    for found in together(ranks, work):
        assert torch.equal(found.scores["policy"]["number"], torch.arange(2.0 * prompts))
    assert {len(sampler.sampled) for sampler in samplers} == {-(-prompts // ranks)}  # or the others would wait for ever


@pytest.mark.parametrize("at_once", [1, 3, 8, 100, None])
def test_rows_of_all_ranks_come_together_a_few_at_a_time(at_once: int | None) -> None:
    counts = (5, 1, 3)
    rows = [torch.full((count, 3, 1, 2, 2), rank, dtype=torch.uint8) for rank, count in enumerate(counts)]
    found = together(3, lambda rank: everyones_rows(rows[rank.team], rank, at_once=at_once, wanted=rank.team < 2))
    assert [[len(part) for part in parts] for parts in found] == [[5, 1, 3], [5, 1, 3], []]
    assert torch.equal(torch.cat(found[0]), torch.cat(rows))


def test_no_more_media_are_there_than_a_part_has(model_folder: Path) -> None:
    sampler = Sampler(tiny.generator(model_folder), Solver(steps=2, shift=3.0), 2, batch_size=2)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def score(media: torch.Tensor, prompts: Sequence[Prompt]) -> Scores:
        nonlocal most
        alive.add(media)
        gc.collect()
        most = max(most, sum(len(one) for one in alive))
        return tiny.scorer(tiny.redness)(media, prompts)

    whole = scored(sampler, tiny.scorer(tiny.redness), PROMPTS)
    for at_once in (1, 2):
        most = 0
        found = Evaluator({"policy": nullcontext}, sampler, score, at_once)(PROMPTS)
        assert most == 2 * at_once
        assert torch.equal(found.scores["policy"]["redness"], whole.scores["redness"])  # the batches are the same
