"""Training health: every guard begins once where its curve is ill, does what the recipe says, and says nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

import tiny
from vipo import guards
from vipo.assemble import open_model
from vipo.errors import RunFailed, UserError
from vipo.evaluation.records import EvaluationRecord
from vipo.guards import GUARDS, Action, GuardOptions
from vipo.recipe import load_recipe, parse_recipe
from vipo.report.page import render
from vipo.report.run import read_run
from vipo.rollout import sample_groups
from vipo.runs.over_optimization import JudgeWatch
from vipo.runs.run import Run
from vipo.schema import GuardsSection
from vipo.training.pictures import frequencies, picture_numbers, picture_rows
from vipo.training.saved import list_checkpoints, read_head
from vipo.training.watch import USUAL, Watch
from vipo.types import Prompt, TrainStep
from waits import counted

ROOT = Path(__file__).parents[1]


def only(name: str, action: Action = "warn", **changes: Any) -> dict[str, GuardOptions]:
    """All guards off but one."""
    off = {other: GuardOptions("off") for other in GUARDS}
    return {**off, name: guards.options_of(name, {"action": action, **changes})}


# What a recipe may say


def test_the_section_the_table_and_the_page_have_the_same_guards() -> None:
    assert list(GuardsSection.model_fields) == list(GUARDS)
    page = (ROOT / "docs/curves.md").read_text()
    assert [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")] == list(GUARDS)
    for name, guard in GUARDS.items():
        assert f"| [`{name}`](#{name}) | {guard.quantity.rstrip(',')} | `{guard.usual}` |" in page
        assert f"{guard.advice[1:]}." in page and (ROOT / f"docs/images/curves/{name}.png").stat().st_size < 60_000


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("guards.clipped_fraction=stop", GuardOptions("stop", above=0.5, in_a_row=3)),
        ("guards.clipped_fraction=off", GuardOptions("off", above=0.5, in_a_row=3)),  # YAML reads false
        ("guards.clipped_fraction={above: 0.3, in_a_row: 1}", GuardOptions("warn", above=0.3)),
        ("guards.clipped_fraction.action=skip", GuardOptions("skip", above=0.5, in_a_row=3)),
    ],
)
def test_a_guard_is_an_action_or_what_is_not_usual(said: str, expected: GuardOptions) -> None:
    recipe = load_recipe("quickstart", [said])
    assert recipe.guards.clipped_fraction == expected and recipe.guards.kl == GUARDS["kl"].usual


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("guards.grd=stop", "nearest known one is 'grid'"),
        ("guards.grid=loud", "its action is off, warn, skip or stop"),
        ("guards.weights_still=skip", "nothing left to skip"),
        ("guards.grid.abov=3", "it has no 'abov'"),
        ("guards.grid.above=-1", "above is a number, 0 or more, e.g. 4"),
        ("guards.grid.below=1", "a threshold above, not below"),
        ("guards.grid.in_a_row=0", "in_a_row is a number of iterations"),
        ("guards.gradient_norm.above=3", "its threshold is optimizer.guard_factor"),
        ("guards.grid=[1]", "a guard is off, warn, skip or stop, or {action: warn, above: 4, in_a_row: 3}"),
    ],
)
def test_a_slip_is_told_in_one_sentence(said: str, words: str) -> None:
    with pytest.raises(UserError, match=r"guards") as caught:
        load_recipe("quickstart", [said])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("guard", "because", "cause"),
    [
        ("kl_reference=stop", "objective.kl_weight=0.0", "objective.kl_weight=0"),
        ("kl_reference=skip", "objective.kl_weight=0.0", "objective.kl_weight=0"),
        ("clipped_fraction=stop", "objective.loss=matching", "objective.loss=matching"),
        ("over_optimization=stop", "evaluation.every=null", "evaluation.every=null"),
        ("over_optimization=stop", "judges={}", "judges={}"),
    ],
)
def test_a_guard_that_can_never_act_is_refused(guard: str, because: str, cause: str) -> None:
    measured = ["objective.kl_weight=0.01", "evaluation.every=2", because]
    with pytest.raises(UserError, match=f"guards.{guard} can never act, because with {cause} nothing is measured"):
        load_recipe("quickstart", [*measured, f"guards.{guard}"])
    load_recipe("quickstart", [*measured[:2], f"guards.{guard}"])
    load_recipe("quickstart", [*measured, f"guards.{guard.split('=')[0]}=warn"])


# When a guard begins

WELL = {
    "grad_norm": 0.1,
    "ratio_deviation": 1e-7,
    "clipped_fraction": 0.1,
    "approx_kl": 0.001,
    "kl_reference": 0.01,
    "spread/a": 0.5,
    "spread/b": 0.2,
    "flat_groups": 0.0,
    "weight_change": 1e-4,
    "pictures/saturated": 0.3,
    "pictures/grid": 1.1,
    "pictures/diversity": 0.05,
}
ILL = {
    "first_ratio": {"ratio_deviation": 0.05},
    "clipped_fraction": {"clipped_fraction": 0.6},
    "kl": {"approx_kl": 0.2},
    "kl_reference": {"kl_reference": 3.0},
    "reward_spread": {"spread/b": 0.01},
    "flat_groups": {"flat_groups": 0.7},
    "weights_still": {"weight_change": 0.0},
    "saturation": {"pictures/saturated": 0.6},
    "grid": {"pictures/grid": 9.0},
    "diversity": {"pictures/diversity": 0.02},
}


def watched(watch: Watch, *lines: Mapping[str, float]) -> list[list[str]]:
    return [watch.iteration({**WELL, **line}) for line in lines]


@pytest.mark.parametrize("name", ILL)
def test_a_guard_begins_once_after_its_iterations_and_again_after_it_ended(name: str) -> None:
    wait = GUARDS[name].usual.in_a_row
    said = watched(Watch(USUAL, clip_range=0.2), {}, {}, {}, *[ILL[name]] * (wait + 2), {}, *[ILL[name]] * wait)
    events = [event for told in said for event in told]
    assert [number for number, told in enumerate(said) if told] == [2 + wait, 5 + 2 * wait]
    assert {guards.told_by(event) for event in events} == {name} and GUARDS[name].advice in events[0]


def test_a_healthy_run_says_nothing_and_numbers_that_are_none_are_no_reason() -> None:
    unknown = dict.fromkeys(WELL, float("nan"))
    assert not any(watched(Watch(USUAL, clip_range=0.2), *[{}] * 5, unknown, unknown, unknown, {}))


def test_a_ratio_is_measured_by_the_noise_of_the_first_iterations_within_reason() -> None:
    noisy, worse = {"ratio_deviation": 1e-3}, {"ratio_deviation": 0.015}
    assert [bool(told) for told in watched(Watch(USUAL, 0.2), noisy, noisy, noisy, noisy, worse)] == [
        *[False] * 4,
        True,
    ]
    assert watched(Watch(USUAL, 1e-4), noisy)[0], "noise beyond the clip range is told at once"
    assert not any(watched(Watch(USUAL, 0.2), {}, {}, {}, {"ratio_deviation": 1e-4})), "far below the clip range"


def test_what_is_told_already_is_silent_and_still_counts() -> None:
    watch = Watch(only("flat_groups", "stop", in_a_row=1))
    assert watch.iteration(WELL | ILL["flat_groups"], silent=("flat_groups",)) == []
    assert "guards.flat_groups=warn" in str(watch.stopping())


# Pictures


def grid_of(pictures: Tensor, period: int = 8) -> float:
    return float(picture_numbers(picture_rows(pictures[:, :, None], (period, period)), 1)["pictures/grid"])


def natural() -> Tensor:
    """Photographs that come with scikit-image."""
    names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "moon")
    found = [np.asarray(Image.fromarray(getattr(data, name)()).convert("RGB"))[:256, :256] for name in names]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("period", [4, 8, 16, 32])
def test_natural_pictures_have_no_grid_and_a_planted_one_is_found(period: int) -> None:
    """Tiles of one pattern at any period, a tenth of the scale high; single faint lines where patches are small."""
    pictures, limit = natural(), GUARDS["grid"].usual.above
    assert limit is not None and grid_of(pictures, period) < 1.5
    tiles = pictures + 0.1 * torch.sin(torch.arange(256) * 2 * torch.pi / period)
    assert grid_of(tiles.clamp(0, 1), period) > limit
    lines = pictures - 0.05 * (torch.arange(256) % period == 0).float()[:, None]
    assert grid_of(lines.clamp(0, 1), period) > limit or period > 8


def test_the_embedded_model_makes_no_grid_until_one_is_planted() -> None:
    recipe = load_recipe("quickstart")
    model = open_model(recipe, device="cpu")
    rollout = sample_groups(
        model.generator, [Prompt(text) for text in tiny.PROMPTS], model.solver.deterministic(4), group_size=2, seed=0
    )
    period = model.generator.patch_period
    plain = rollout.media[:, :, 0]
    assert period == (8, 8) and grid_of(plain, period[0]) < 2
    planted = plain - 0.1 * (torch.arange(64) % period[1] == 0).float()
    assert grid_of(planted.clamp(0, 1), period[1]) > 4


def test_a_grid_of_another_period_is_none() -> None:
    lines = natural() - 0.1 * (torch.arange(256) % 6 == 0).float()
    assert grid_of(lines.clamp(0, 1), 16) < 2


@pytest.mark.parametrize(("size", "period"), [(64, 0), (64, 7), (64, 1), (16, 8)])
def test_where_there_are_too_few_patches_nothing_is_claimed(size: int, period: int) -> None:
    assert frequencies(size, period) == ([], [])
    assert np.isnan(grid_of(torch.rand(2, 3, size, size), period))


def test_saturation_and_diversity_are_what_they_say() -> None:
    half = torch.full((4, 3, 1, 16, 16), 0.5)
    half[:, 0, :, :8] = 1.0
    half[:, 1] = torch.rand(4, 1, 1, 1) * 0.5 + 0.2
    numbers = picture_numbers(picture_rows(half, None), 4)
    assert float(numbers["pictures/saturated"]) == pytest.approx(1 / 6)
    expected = (half[:, 1, 0, 0, 0].var(correction=0) / 3).sqrt()
    assert float(numbers["pictures/diversity"]) == pytest.approx(float(expected), rel=1e-5)
    same = half[:1].expand(4, -1, -1, -1, -1)
    assert float(picture_numbers(picture_rows(same, None), 4)["pictures/diversity"]) == 0


def test_every_adapter_knows_the_pixels_of_a_token(model_folder: Path) -> None:
    model = tiny.generator(model_folder)
    assert model.patch_period == (tiny.HEIGHT // 3, tiny.WIDTH // 5)  # tokens 3 x 5


# Updates that are not applied


@pytest.mark.parametrize(
    ("name", "changes", "skipped"),
    [
        ("clipped_fraction", {"clip_range": 1e-7, "per_iteration": 2}, 1),  # the first of the two is exactly on-policy
        ("saturation", {}, 1),
        ("grid", {}, 1),
    ],
)
def test_a_guard_that_skips_keeps_the_weights(
    model_folder: Path, name: str, changes: dict[str, Any], skipped: int
) -> None:
    trainer = tiny.trainer(model_folder, credit="sample", **changes)
    trainer.health.watch.__init__(only(name, "skip", above=0.0, in_a_row=1))  # type: ignore[misc]
    trainer.health.watch.memory.first = {"pictures/saturated": [-1.0] * 3}
    step = trainer.step()
    assert step.metrics["skipped"] == skipped == trainer.health.record.skipped
    assert [guards.told_by(event) for event in step.events] == [name] and f"guards.{name}=skip" in step.events[0]
    assert (step.metrics["weight_change"] == 0) == (name != "clipped_fraction")
    assert trainer.step().events == (), "it is told when it begins"


def test_reading_the_samples_before_an_update_is_one_wait_more(model_folder: Path) -> None:
    trainer = tiny.trainer(model_folder, credit="sample")
    trainer.generator.keep_text(tiny.PROMPTS)
    trainer.step()
    trainer.health.watch.options = only("grid", "skip")
    with counted(trainer.generator) as found:
        trainer.step()
    assert found["metrics.py:as_floats"] == 2


@pytest.mark.parametrize(("action", "skipped", "told"), [("off", 0, 0), ("warn", 0, 1), ("skip", 1, 1), ("stop", 1, 1)])
def test_a_gradient_out_of_line_is_what_the_recipe_says(
    model_folder: Path, action: Action, skipped: int, told: int
) -> None:
    trainer = tiny.trainer(model_folder, credit="sample")
    trainer.step()
    trainer.health.watch.__init__(only("gradient_norm", action))  # type: ignore[misc]
    trainer.learner.guard.norms = [1e-9] * 10
    step = trainer.step()
    assert step.metrics["skipped"] == skipped and len(step.events) == told + (action == "stop")
    assert all(guards.told_by(event) == "gradient_norm" for event in step.events)
    assert (step.failure is not None) == (action == "stop")


# Whole runs


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    found = tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=4)
    found["evaluation"]["every"] = None
    return found


def run_all(raw: dict[str, Any], output: Path, **options: Any) -> str | None:
    """Why the run failed, if it did."""
    try:
        for _ in Run(parse_recipe(raw), output, **options):
            pass
    except RunFailed as failure:
        return str(failure)
    return None


def test_a_guard_that_stops_ends_the_run_with_its_state_and_without_an_export(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    raw["guards"] = {"weights_still": {"action": "stop", "below": 1e9, "in_a_row": 2}}
    failure = run_all(raw, folder)
    assert failure is not None and failure.startswith("guard weights_still stopped the run")
    lines = tiny.lines(folder / "metrics.jsonl")
    assert [len(line["events"]) for line in lines] == [0, 2] and lines[1]["failure"] == failure
    assert read_head(list_checkpoints(folder / "checkpoints")[-1]).health.guards.in_a_row == {"weights_still": 2}
    assert not (folder / "export").exists()
    page = render(read_run(folder))
    assert "What the guards saw" in page and GUARDS["weights_still"].advice in page
    assert run_all(raw, folder, resume=True) == failure and len(tiny.lines(folder / "metrics.jsonl")) == 3
    raw["guards"] = {"weights_still": "warn"}
    assert run_all(raw, folder, resume=True) is None and (folder / "export").is_dir()


def test_a_run_that_goes_on_remembers_what_its_guards_have_seen(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Streaks and first values are in the checkpoint: the logs are those of a run that was not stopped."""
    raw["guards"] = {
        "diversity": {"below": 100.0, "in_a_row": 1},  # begins once there are three iterations to compare with
        "clipped_fraction": {"above": 0.0, "in_a_row": 3},
        "weights_still": {"below": 1e9, "in_a_row": 3},
    }
    raw["training"]["iterations"] = 5
    for event in Run(parse_recipe(raw), tmp_path / "stopped"):
        if isinstance(event, TrainStep) and event.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    run_all(raw, tmp_path / "stopped", resume=True)
    run_all(raw, tmp_path / "calm")
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("stopped", "calm")]
    assert logs[0] == logs[1]
    told = [
        sorted(map(str, map(guards.told_by, line["events"]))) for line in tiny.lines(tmp_path / "calm/metrics.jsonl")
    ]
    assert told == [[], [], ["weights_still"], ["diversity"], []]


# A judge that falls while the reward rises


def scored(iteration: int, judge: float, reward: float, prompts: int = 8) -> EvaluationRecord:
    noise = torch.linspace(-1, 1, prompts, dtype=torch.float64)
    values = {"judge": judge + noise, "reward": (reward + noise + 0.01 * noise**2) / 2}
    return EvaluationRecord(iteration, 1, ("a fox",) * prompts, values)


def watch(options: GuardOptions) -> JudgeWatch:
    return JudgeWatch(options, ["judge", "a judge that came later"], {"reward": 2.0})


UP_AND_DOWN = [scored(0, 0.0, 0.0), scored(2, 1.0, 1.0), scored(4, 0.5, 2.0), scored(6, 0.4, 3.0)]
USUAL_FALL = GUARDS["over_optimization"].usual


def test_over_optimisation_is_told_when_it_begins_and_against_the_judges_best() -> None:
    said = [watch(USUAL_FALL).events(UP_AND_DOWN[: k + 1]) for k in range(4)]
    assert [len(told) for told in said] == [0, 0, 1, 0]
    assert "judge 'judge', since its best evaluation, after iteration 2" in said[2][0]
    twice = watch(GuardOptions("stop", above=0.0, in_a_row=2))
    assert [bool(twice.failure(UP_AND_DOWN[: k + 1])) for k in range(4)] == [False] * 3 + [True]
    assert not watch(GuardOptions("warn", above=5.0)).events(UP_AND_DOWN[:3]), "a fall that is small"
    begun_anew = [replace(one, comparable_since=4) for one in UP_AND_DOWN[2:]]
    assert not watch(USUAL_FALL).events([*UP_AND_DOWN[:2], *begun_anew[:1]]), "evaluated in another way than the best"


@pytest.mark.parametrize(
    "last",
    [scored(4, 0.5, 0.5), scored(4, 1.5, 2.0)],
    ids=["the reward fell too", "the judge rose"],
)
def test_what_is_no_over_optimisation(last: EvaluationRecord) -> None:
    assert watch(USUAL_FALL).fall([*UP_AND_DOWN[:2], last]) is None
    few = [scored(0, 1.0, 0.0, prompts=5), scored(2, 0.0, 1.0, prompts=5)]
    assert watch(USUAL_FALL).fall(few) is None, "five prompts are too few to tell"


def test_a_run_that_is_hacked_says_so_in_its_log_its_report_and_at_its_end(
    tmp_path: Path, raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from vipo.cli.progress import follow

    (tmp_path / "reward.py").write_text(
        "def red(media, prompts):\n    return media[:, 0].mean((1, 2, 3))\n"
        "def pale(media, prompts):\n    return -media[:, 0].mean((1, 2, 3))\n"
    )
    prompts = tmp_path / "eight.txt"
    prompts.write_text("".join(f"{count} cats\n" for count in range(2, 10)))
    raw |= {"rewards": {f"{tmp_path}/reward.py:red": 1.0}, "judges": {"pale": {"reward": f"{tmp_path}/reward.py:pale"}}}
    raw["evaluation"] = {"prompts": str(prompts), "samples_per_prompt": 1, "every": 2}
    raw["optimizer"]["learning_rate"] = 5e-2
    raw["guards"] = {"over_optimization": "stop"}
    folder = tmp_path / "run"
    with pytest.raises(RunFailed, match="guard over_optimization stopped the run") as caught:
        follow(Run(parse_recipe(raw), folder), Console(width=200))
    lines = tiny.lines(folder / "evaluations.jsonl")
    told = [event for line in lines for event in line.get("events", [])]
    assert len(told) == 1 and told[0].startswith("guard over_optimization: ") and "judge 'pale'" in told[0]
    out = " ".join(capsys.readouterr().out.split())
    assert "guard over_optimization, at iteration" in out and "See docs/curves.md#over_optimization." in out
    assert "over_optimization" in render(read_run(folder))
    assert not (folder / "export").exists()
    assert run_all(raw, folder, resume=True) == str(caught.value), "nothing has changed"
    slower = raw | {"optimizer": raw["optimizer"] | {"learning_rate": 1e-3}}
    kept = (folder / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=r"end at once, .* 0\.05 -> 0\.001 .* give guards\.over_optimization=warn,"):
        Run(parse_recipe(slower), folder, resume=True)
    assert (folder / "recipe.yaml").read_bytes() == kept
    raw["guards"] = {"over_optimization": "warn"}
    assert run_all(raw, folder, resume=True) is None and (folder / "export").is_dir()
