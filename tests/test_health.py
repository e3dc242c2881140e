"""What keeps a run from learning: counted, told once, and the end of a run that has learned nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

import gloo
import tiny
from vipo.assemble import build
from vipo.errors import RunFailed, UserError
from vipo.guards import told_by
from vipo.policy import Policy
from vipo.recipe import apply_override, parse_recipe
from vipo.report.page import render
from vipo.report.run import read_run
from vipo.runs.run import Evaluated, Run, train
from vipo.training.credit import Credit
from vipo.training.health import Health, Record, where_not_finite
from vipo.training.learner import Learner
from vipo.training.saved import list_checkpoints
from vipo.types import Rollout, TrainStep

CONSTANT = "def reward(media, prompts):\n    return media.new_full((len(media),), 0.3)\n"
FLAT = {"advantage_size": 0.0, "spread/constant": 0.0, "spread/other": 0.0}
VARIED = {"advantage_size": 0.7, "spread/constant": 0.1, "spread/other": 0.1}


@pytest.fixture
def raw(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    return tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=6)


def constant(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with a reward that likes everything equally."""
    (folder / "constant.py").write_text(CONSTANT)
    return {**raw, "rewards": {f"{folder / 'constant.py'}:reward": 1.0}}


def test_a_streak_is_an_event_once_and_counts_again_after_it_ends() -> None:
    health = Health(limit=2)
    health.applied(moved=True)
    said = [bool(health.iteration(metrics)) for metrics in (FLAT, FLAT, FLAT, VARIED, FLAT, FLAT)]
    assert said == [False, True, False, False, False, True]
    assert health.failure(6, last=True) is None


def test_flat_groups_name_the_rewards_and_what_to_try() -> None:
    health = Health(limit=1)
    (event,) = health.iteration(FLAT)
    assert event.startswith("'constant' and 'other' gave no sample an advantage in 1 iterations in a row")
    for word in ("training.max_skipped_in_a_row=1", "docs/rewards.md", "solver.eta", "prompts.group_size"):
        assert word in event
    assert "nothing was learned in 1 iterations: 'constant'" in str(health.failure(1, last=False))


def test_rewards_that_cancel_each_other_are_told_as_that_and_not_as_faint() -> None:
    """In groups of two with equal weights, one likes better what the other likes as much less."""
    (event,) = Health(limit=2).iteration({"advantage_size": 5e-4, "spread/motion": 0.06, "spread/match": 0.13})
    assert event.startswith("the scores of 'motion' and 'match' differ within their groups, but")
    assert "cancel each other" in event and "rewards.*.weight" in event and "prompts.group_size" in event
    (event,) = Health(limit=2).iteration({"advantage_size": 5e-4, "spread/motion": 6e-8, "spread/match": 0.0})
    assert "'motion' differ by 6.0e-08 within their groups, next to the eps 0.0001" in event


def test_a_reward_that_is_constant_beside_others_is_an_event_once_also_across_a_resume() -> None:
    beside = {**VARIED, "spread/constant": 0.0}
    health, said = Health(limit=3), []
    for k in range(6):
        if k == 2:  # as a checkpoint keeps it
            kept = json.loads(json.dumps(asdict(health.record)))
            health = Health(limit=3)
            health.restore(Record.of(kept))
        said.append(health.iteration(FLAT if k == 1 else beside))
    assert [len(events) for events in said] == [0, 0, 0, 1, 0, 0]
    start = "'constant' told no two samples of a group apart in 3 iterations in a row"
    assert said[3][0].startswith(start) and "teaches nothing while other rewards do" in said[3][0]
    assert told_by(said[3][0]) is None  # the prompts are not to blame
    alone = {key: value for key, value in beside.items() if key != "spread/other"}  # what it learns from is no reward
    assert not any(Health(limit=1).iteration(alone))


def test_updates_are_counted_and_not_iterations() -> None:
    health = Health(limit=3)
    said = [health.skipped("gradient norm is nan", finite=False) for _ in range(4)]
    assert [len(events) for events in said] == [1, 1, 2, 1]
    assert said[2][1] == "3 updates in a row were skipped (training.max_skipped_in_a_row=3)"
    assert health.failure(1, last=False) is not None
    health.applied(moved=True)
    assert health.failure(1, last=False) is None and len(health.skipped("gradient norm is nan", finite=False)) == 1


def test_advice_against_nan_is_given_where_a_streak_begins_and_fits_the_run() -> None:
    health = Health(remedies=["training.precision=no"])
    assert health.skipped("x", finite=False) == ["x: update skipped; in a new run, try training.precision=no"]
    assert health.skipped("x", finite=False) == ["x: update skipped"]
    health.applied(moved=True)  # it did learn: the rate may be to blame
    (event,) = health.skipped("x", finite=False)
    assert event.endswith("try training.precision=no or a lower optimizer.learning_rate")
    health.applied(moved=True)
    assert health.skipped("x", finite=True) == ["x: update skipped"]


def test_a_streak_of_outliers_names_the_guard() -> None:
    health = Health(limit=1)
    health.applied(moved=True)
    assert "optimizer.guard_factor" in health.skipped("gradient norm 9 is over", finite=True)[1]
    assert health.failure(1, last=True) is None


@pytest.mark.parametrize(
    ("happens", "cause", "advice"),
    [
        (lambda health: health.iteration(FLAT), "0 updates were skipped, and in 1 iterations", "solver.eta"),
        (lambda health: health.skipped("x", finite=False), "1 updates were skipped", "a lower optimizer.learning_rate"),
        (lambda health: health.applied(moved=False), "no trained weight has moved", "a higher optimizer.learning_rate"),
    ],
)
def test_weights_that_have_not_moved_at_the_end_are_a_failure(
    happens: Callable[[Health], Any], cause: str, advice: str
) -> None:
    health = Health()
    happens(health)
    assert health.failure(1, last=False) is None
    failure = str(health.failure(1, last=True))
    assert cause in failure and advice in failure and "no trained weight has moved" in failure


def test_where_a_gradient_is_not_finite() -> None:
    peaks = {"a": torch.tensor(1.0), "b": torch.tensor(math.inf), "c": torch.tensor(math.nan)}
    assert where_not_finite(peaks) == ", first in 'b' (2 of 3 trained tensors)"
    assert where_not_finite({"a": torch.tensor(1e30)}) == ""


# The fingerprint of weights


@pytest.mark.parametrize("size", [5, 4, 1])
def test_a_fingerprint_sees_every_bit_wherever_it_is(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.policy.CHECKED_AT_ONCE", size)
    network = torch.nn.Linear(3, 3)
    policy = Policy.full(network, keep_reference=False)
    before, weight = policy.fingerprint(), network.weight
    assert policy.fingerprint() == before
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.flatten().index_put((torch.tensor([8]),), torch.nextafter(w[2, 2], torch.tensor(9.0))).view(3, 3),
        lambda w: torch.stack([torch.nextafter(w[0], torch.tensor(9.0)), torch.nextafter(w[1], -9 + w[1] * 0), w[2]]),
        lambda w: w.flip(1),
        lambda w: -w,
    ]
    for number, change in enumerate(changes):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(change(kept))
        assert policy.fingerprint() != before, number
        with torch.no_grad():
            weight.copy_(kept)
    assert policy.fingerprint() == before


def full(model: Any) -> Policy:
    return Policy.full(model.network, keep_reference=False)


@pytest.mark.parametrize("build_policy", [tiny.lora, full], ids=["lora", "full"])
@pytest.mark.parametrize("reward", [tiny.redness, tiny.constant])
def test_weight_decay_alone_is_no_learning(
    model_folder: Path, build_policy: Callable[..., Policy], reward: Callable[..., Tensor]
) -> None:
    trainer = tiny.trainer(model_folder, policy=build_policy, scorer=tiny.scorer(reward), weight_decay=0.1)
    before = trainer.policy.fingerprint()
    step = trainer.step(last=True)
    assert trainer.policy.fingerprint() != before  # the decay moves A of a LoRA, and full weights
    assert (step.failure is None) == (reward is tiny.redness) == trainer.health.record.learned
    assert list(step.events) == ([] if step.failure is None else [step.failure])


def test_a_rate_below_the_resolution_of_the_weights_moves_nothing(model_folder: Path) -> None:
    step = tiny.trainer(model_folder, policy=full, learning_rate=1e-30).step(last=True)
    assert step.metrics["grad_norm"] > 0
    assert "no trained weight has moved" in str(step.failure) and "a higher optimizer.learning_rate" in step.events[0]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_parameter_is_named_although_clipping_spoils_all(model_folder: Path, value: float) -> None:
    trainer = tiny.trainer(model_folder)
    name, parameter = list(trainer.policy.parameters.items())[3]
    parameter.register_hook(lambda grad: torch.full_like(grad, value))
    (event,) = trainer.step().events
    many = len(trainer.policy.parameters)
    assert event.startswith(
        f"gradient norm is {value}, first in {name!r} (1 of {many} trained tensors): update skipped"
    )


# Whole runs


def run_all(raw: dict[str, Any], output: Path, **options: Any) -> tuple[Run, list[TrainStep], str | None]:
    """The run, its steps, and why it failed if it did."""
    run, steps = Run(parse_recipe(raw), output, **options), []
    try:
        for event in run:
            if isinstance(event, TrainStep):
                steps.append(event)
    except RunFailed as failure:
        return run, steps, str(failure)
    return run, steps, None


def outcome(folder: Path) -> dict[str, bytes]:
    last = list_checkpoints(folder / "checkpoints")[-1]
    files = [folder / "metrics.jsonl", folder / "evaluations.jsonl", *sorted(last.iterdir())]
    return {file.name: file.read_bytes() for file in files} | {"last": last.name.encode()}


def test_a_constant_reward_stops_the_run_and_leaves_no_export(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    run, _, failure = run_all(constant(raw, tmp_path), folder)
    assert failure is not None and "constant.py:reward' gave no sample an advantage in 3 iterations" in failure
    assert run.iteration == 3 and not (folder / "export").exists()
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-000002", "step-000003"]
    lines = tiny.lines(folder / "metrics.jsonl")
    assert [len(line["events"]) for line in lines] == [0, 0, 1] and "constant.py:reward" in lines[2]["events"][0]
    assert [line.get("failure") for line in lines] == [None, None, failure]
    page = render(read_run(folder))
    assert "Failed: nothing was learned in 3 iterations" in page and "Complete" not in page


def test_a_failed_run_that_is_resumed_tries_once_more_and_recovers_if_it_can(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    bad = constant(raw, tmp_path)
    run_all(bad, tmp_path / "run")
    _, steps, failure = run_all(bad, tmp_path / "run", resume=True)
    assert "in 4 iterations in a row" in str(failure) and [step.events for step in steps] == [()]
    (tmp_path / "constant.py").write_text("def reward(media, prompts):\n    return media.mean((1, 2, 3, 4))\n")
    run, _, failure = run_all(bad, tmp_path / "run", resume=True, allow_changes=["inputs.rewards"])
    assert failure is None and run.finished and (tmp_path / "run" / "export").is_dir()
    assert "Complete: all 6 iterations" in render(read_run(tmp_path / "run"))


def test_a_run_too_short_for_a_streak_fails_at_its_end_and_again_when_resumed(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    bad = constant(raw, tmp_path)
    bad["training"]["iterations"] = 2
    _, _, failure = run_all(bad, tmp_path / "run")
    assert failure is not None and "no trained weight has moved" in failure
    before = outcome(tmp_path / "run")
    assert tiny.lines(tmp_path / "run" / "metrics.jsonl")[1]["events"] == [failure]
    _, steps, again = run_all(bad, tmp_path / "run", resume=True)
    assert again == failure and not steps and outcome(tmp_path / "run") == before
    assert not (tmp_path / "run" / "export").exists()
    page = render(read_run(tmp_path / "run"))
    assert "Failed: nothing was learned in 2 iterations" in page and "Complete" not in page


@pytest.mark.parametrize("output", [None, "run"])
def test_train_raises_after_its_last_step(tmp_path: Path, raw: dict[str, Any], output: str | None) -> None:
    steps = []
    with pytest.raises(RunFailed, match="nothing was learned in 3 iterations"):
        for step in train(parse_recipe(constant(raw, tmp_path)), output and tmp_path / output):
            steps.append(step)
    assert [step.failure is None for step in steps] == [True, True, False]
    assert not issubclass(RunFailed, UserError)


def spoil(monkeypatch: pytest.MonkeyPatch, spoiled: Callable[[int], bool]) -> None:
    """NaN in the whole gradient of some iterations, as a wrong kernel would have it."""
    original = Learner.learn

    def learn(self: Learner, rollout: Rollout, credit: Credit, kept: Tensor, iteration: int) -> Any:
        factor = torch.nan if spoiled(iteration) else 1.0
        monkeypatch.setattr(self.engine, "backward", lambda loss, **_: (loss * factor).backward())
        return original(self, rollout, credit, kept, iteration)

    monkeypatch.setattr(Learner, "learn", learn)


def test_a_gradient_that_is_never_finite_stops_the_run_with_what_to_try(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda _iteration: True)
    raw["training"]["precision"] = "bf16"
    run, steps, failure = run_all(raw, tmp_path / "run")
    first = next(iter(run.session.policy.parameters))
    assert f"gradient norm is nan, first in {first!r}" in steps[0].events[0]
    advice = "generator.attention=_native_math or training.precision=no"
    assert steps[0].events[0].endswith(f"in a new run, try {advice}")
    assert failure is not None and f"first in {first!r}" in failure
    assert failure.endswith(f"begin a new run with {advice}")
    assert "learning_rate" not in failure  # no update has been applied that could have been too large
    assert len(steps) == 3 and [len(step.events) for step in steps] == [1, 1, 2]
    assert run.session.policy.fingerprint() == build(parse_recipe(raw)).policy.fingerprint()


@pytest.mark.parametrize(
    ("dtype", "precision", "advice"),
    [
        ("bfloat16", "bf16", "generator.dtype=float32 training.precision=no"),
        ("float32", "bf16", "training.precision=no"),
        ("float32", "no", None),
    ],
)
def test_the_advice_is_what_the_recipe_does_not_do_yet_and_can_be_followed(
    tmp_path: Path, raw: dict[str, Any], dtype: str, precision: str, advice: str | None
) -> None:
    raw["generator"]["dtype"] = dtype
    raw["training"] |= {"precision": precision, "iterations": 1}
    remedies = build(parse_recipe(raw)).trainer.health.remedies
    assert remedies == ("generator.attention=_native_math", *([advice] if advice else []))
    for remedy in remedies:
        AcceleratorState._reset_state(reset_partial_state=True)  # one process trains at one precision
        changed = copy.deepcopy(raw)
        for override in remedy.split():
            apply_override(changed, override)
        assert run_all(changed, tmp_path / remedy)[2] is None
        assert remedy not in build(parse_recipe(changed)).trainer.health.remedies


@pytest.mark.long
def test_two_processes_fail_together_with_one_record(tmp_path: Path, raw: dict[str, Any]) -> None:
    recipe, folder = tiny.write_recipe(tmp_path / "recipe.yaml", constant(raw, tmp_path)), tmp_path / "run"
    first, second = gloo.vipo("train", recipe, "--allow-code", "--output", folder)
    assert first.code == second.code == 3 and "vipo: nothing was learned in 3 iterations" in first.stderr
    lines = tiny.lines(folder / "metrics.jsonl")
    assert [len(line["events"]) for line in lines] == [0, 0, 1] and not (folder / "export").exists()
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-000002", "step-000003"]


def test_a_streak_after_learning_is_an_event_and_the_run_goes_on(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda iteration: 1 <= iteration <= 4)
    run, steps, failure = run_all(raw, tmp_path / "run")
    assert failure is None and run.finished and (tmp_path / "run" / "export").is_dir()
    streak = ["updates in a row" in " ".join(step.events) for step in steps]
    assert streak == [False, False, False, True, False, False]
    assert [step.metrics["skipped"] for step in steps] == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("learned", [True, False])
def test_a_run_stopped_in_the_middle_of_a_streak_goes_on_as_if_it_had_not_been(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, learned: bool
) -> None:
    spoil(monkeypatch, lambda iteration: iteration >= (1 if learned else 0))
    stop_after = 2 if learned else 1  # two of three are skipped
    stopped = Run(parse_recipe(raw), tmp_path / "stopped")
    for event in stopped:
        if isinstance(event, TrainStep) and event.iteration == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
    record = json.loads((list_checkpoints(tmp_path / "stopped/checkpoints")[-1] / "state.json").read_text())["health"]
    assert record["skipped_in_a_row"] == 2 and record["learned"] is learned
    resumed = run_all(raw, tmp_path / "stopped", resume=True)
    calm = run_all(raw, tmp_path / "calm")
    assert resumed[2] == calm[2] and (calm[2] is None) == learned
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "calm")


def test_an_ordinary_run_says_nothing(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"]["iterations"] = 2
    events = list(Run(parse_recipe(raw), tmp_path / "run"))
    assert isinstance(events[-1], Evaluated)
    for line in tiny.lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["events"] == [] and "failure" not in line
