"""A run's evaluations: in parts that bound the memory, shared by processes, whole in the files of the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import gloo
import tiny
from vipo.cli.progress import follow
from vipo.errors import UserError
from vipo.recipe import load_recipe, parse_recipe
from vipo.runs.evaluating import PIXELS_AT_ONCE, evaluate_run, prompts_at_once
from vipo.runs.run import Run

pytestmark = pytest.mark.on_cpu


@pytest.mark.parametrize(
    ("side", "frames", "batch_size", "samples_per_prompt", "ranks", "found"),
    [
        (64, 1, None, 4, 1, 400),  # as in the quickstart: everything at once
        (1024, 1, None, 1, 1, 64),
        (1024, 1, None, 4, 1, 16),
        (1024, 1, 4, 1, 1, 64),
        (1024, 1, 6, 4, 1, 15),  # 60 samples: ten whole batches of six
        (1024, 1, 96, 1, 1, 96),  # one batch is more than that already
        (640, 81, None, 2, 1, 1),
        (640, 81, 3, 2, 1, 3),
        (1024, 1, 4, 1, 8, 50),
        (1024, 1, 128, 1, 8, 50),  # a share of the prompts counts more than whole batches
        (64, 1, None, 4, 3, 134),
    ],
)
def test_parts_hold_as_many_prompts_as_fit_and_whole_batches(
    side: int, frames: int, batch_size: int | None, samples_per_prompt: int, ranks: int, found: int
) -> None:
    raw = tiny.recipe(Path("somewhere"), Path(os.devnull), training__rollout_batch_size=batch_size)
    raw["generator"] |= {"height": side, "width": side, "frames": frames}
    raw["evaluation"] |= {"samples_per_prompt": samples_per_prompt}
    assert prompts_at_once(parse_recipe(raw), 400, ranks) == found


def counted(recipe: Path, output: Path) -> dict[str, Any]:
    """The first evaluation of a run, and of how many latents each decoding was, in one process."""
    run = Run(load_recipe(recipe), output)
    decoded, decode = list[int](), run.session.generator.decode
    run.session.generator.decode = lambda latents: decoded.append(len(latents)) or decode(latents)  # type: ignore[func-returns-value,method-assign]
    event = next(iter(run))
    run.engine.wait()
    return {"decoded": decoded, "scores": event.scores["redness"].tolist()}


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    """Three prompts of two samples, so that two processes do not have as many."""
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", training__rollout_batch_size=2)
    raw["evaluation"] |= {"limit": 3, "samples_per_prompt": 2}
    return raw


@pytest.mark.slow
def test_two_processes_sample_each_prompt_once_and_write_what_one_writes(tmp_path: Path, raw: dict[str, Any]) -> None:
    recipe, both, alone = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "both", tmp_path / "alone"
    told = gloo.together(counted, 2, recipe, both, grouped=False)
    assert [sum(one["decoded"]) for one in told] == [4, 2]  # two prompts and one, each sampled once
    assert told[0]["scores"] == told[1]["scores"] and len(told[0]["scores"]) == 6
    next(iter(Run(parse_recipe(raw), alone)))
    for name in ("evaluations.jsonl", "samples/step-000000.png", "samples/step-000000.json"):
        assert (both / name).read_bytes() == (alone / name).read_bytes(), name  # the batches are the same, so are bits


def test_parts_give_the_scores_and_the_sheet_of_one_go(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, media = evaluate_run(Run(parse_recipe(raw), tmp_path / "whole").session)
    pixels = tiny.HEIGHT * tiny.WIDTH * 2
    monkeypatch.setattr("vipo.runs.evaluating.PIXELS_AT_ONCE", pixels)
    run = Run(parse_recipe(raw), tmp_path / "parts")
    assert prompts_at_once(run.recipe, 3, 1) == 1 and pixels * 3 < PIXELS_AT_ONCE
    parts, media_of_parts = evaluate_run(run.session)
    assert torch.equal(parts.scores["policy"]["redness"], whole.scores["policy"]["redness"])
    assert torch.equal(media_of_parts, media) and media.dtype == torch.uint8 and len(media) == 6


HOLES = """
import torch
def cats(media, prompts):
    return torch.tensor([1.0 if "cat" in prompt.text else float("nan") for prompt in prompts])
def nothing(media, prompts):
    return media.new_full((len(media),), float("nan"))
"""


def test_a_part_without_a_score_is_a_hole_and_an_evaluation_without_one_is_refused(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "holes.py").write_text(HOLES)
    monkeypatch.setattr("vipo.runs.evaluating.PIXELS_AT_ONCE", 1)  # a prompt at a time
    cats, nothing = (f"{tmp_path / 'holes.py'}:{name}" for name in ("cats", "nothing"))
    evaluation, _ = evaluate_run(Run(parse_recipe(raw | {"judges": [cats]}), tmp_path / "some").session)
    assert evaluation.scores["policy"][cats].isfinite().tolist() == [True] * 2 + [False] * 4
    assert [told.split(" samples ")[1] for told in evaluation.failures] == [
        "from prompt 1 on: the score was not finite", "from prompt 2 on: the score was not finite"
    ]  # fmt: skip
    follow(Run(parse_recipe(raw | {"judges": [cats]}), tmp_path / "followed"), Console(width=400))
    assert capsys.readouterr().out.count("from prompt 1 on: the score was not finite") == 3  # evaluations
    with pytest.raises(UserError, match=r"nothing' gave no finite score for any of the 6 samples of the evaluation"):
        evaluate_run(Run(parse_recipe(raw | {"judges": [nothing]}), tmp_path / "none").session)
